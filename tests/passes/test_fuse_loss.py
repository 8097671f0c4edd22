# SPDX-License-Identifier: Apache-2.0
"""`fuse` with `loss=True`: the loss of a head without its logits, exactly, and only where nobody else reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rewriter
from rewriter.kernels.cross_entropy.op import linear_cross_entropy, linear_cross_entropy_reduced
from rewriter.optimized import Optimized
from rewriter.passes import Fuse

CLASSES, WIDTH = 2500, 6


class Classifier(nn.Module):
    """Hidden states to a loss, in the spelling asked for."""

    def __init__(self, spelling: str = "plain", **options: Any) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES, bias=spelling != "no_bias")
        self.spelling, self.options = spelling, options
        self.register_buffer("weights", torch.linspace(0.5, 1.5, CLASSES))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor, target: Tensor) -> Any:
        logits = self.head(x)
        match self.spelling:
            case "returned":
                return F.cross_entropy(logits.flatten(0, 1), target.flatten()), logits
            case "capped":
                logits = torch.tanh(logits / 2.0) * 2.0
            case "shifted":  # as language models do
                return F.cross_entropy(logits[:, :-1].reshape(-1, CLASSES), target[:, 1:].flatten())
            case "channels":
                return F.cross_entropy(logits.transpose(1, 2), target, **self.options)
            case "weighted":
                return F.cross_entropy(logits.flatten(0, 1), target.flatten(), self.weights, **self.options)
            case "nll":
                return F.nll_loss(logits.flatten(0, 1).log_softmax(-1), target.flatten())
            case "squared":
                return (logits.square() - 1.0).mean() + target.sum()
            case "twice":
                one = F.cross_entropy(logits.flatten(0, 1), target.flatten())
                return one + F.cross_entropy(logits[:, 1:].flatten(0, 1), target[:, :-1].flatten())
        return F.cross_entropy(logits.flatten(0, 1).float() if self.spelling == "cast" else logits.flatten(0, 1),
                               target.flatten(), **self.options)  # fmt: skip


def inputs(rows: int = 3, length: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, CLASSES, (rows, length), generator=generator)
    return torch.randn(rows, length, WIDTH, generator=generator), target


def optimized(model: nn.Module, args: tuple[Tensor, ...]) -> Optimized:
    return rewriter.optimize(model, passes=[Fuse(loss=True)], example_inputs=args)


def fused(opt: Optimized) -> int:
    operators = (linear_cross_entropy, linear_cross_entropy_reduced)
    return sum(node.target in operators for node in opt.program.graph.nodes)


TAKEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {},
    "cast": {"label_smoothing": 0.1},
    "capped": {},
    "shifted": {},
    "channels": {"reduction": "none"},
    "weighted": {"label_smoothing": 0.2, "ignore_index": 7},
    "nll": {},
}


@pytest.mark.parametrize("spelling", TAKEN)
def test_golden_run_with_gradients(spelling: str) -> None:
    model = Classifier(spelling, **TAKEN[spelling])
    samples = [inputs(), inputs(2, 5, 1)]
    samples[1][1][0, :2] = 7
    opt = optimized(model, samples[0])
    assert fused(opt) == 1
    result = rewriter.verify(opt.original_program(), opt.program, samples)
    result.raise_if_failed()
    assert max(f.relative for f in (*result.outputs, *result.gradients)) <= 1e-10
    assert len(result.gradients) >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_targets_other_sizes_and_dtypes(dtype: torch.dtype) -> None:
    model = Classifier(reduction="sum")
    opt = optimized(model, inputs()).to(dtype)
    x, target = inputs(5, 7, 2)
    target[0] = -100
    wanted = model.double()(x.double(), target).detach()
    got = opt(x.to(dtype), target).detach()
    assert got.dtype == dtype and abs(float(got) - float(wanted)) <= 2 * torch.finfo(dtype).eps * float(wanted)


REFUSED = {
    "returned": "reads the logits as well",
    "twice": "2 losses read the same logits",
}


@pytest.mark.parametrize("spelling", REFUSED)
def test_what_is_left_says_why(spelling: str) -> None:
    opt = optimized(Classifier(spelling), inputs())
    assert fused(opt) == 0
    reasons = [miss.reason for miss in rewriter.explain(opt.original_program(), Fuse(loss=True).rules()[-1])]
    assert any(REFUSED[spelling] in reason for reason in reasons), reasons


def test_a_linear_without_a_loss_is_no_site() -> None:
    assert fused(optimized(Classifier("squared"), inputs())) == 0


def test_probabilities_and_few_classes_are_left() -> None:
    class Soft(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, classes)

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(self.head(x), target)

    x = torch.randn(4, WIDTH)
    for classes, target, why in (
        (CLASSES, torch.full((4, CLASSES), 1 / CLASSES), "as large as the logits"),
        (10, torch.arange(4), "10 classes are one chunk"),
    ):
        opt = optimized(Soft(classes), (x, target))
        assert fused(opt) == 0
        misses = rewriter.explain(opt.original_program(), Fuse(loss=True).rules()[-1])
        assert any(why in miss.reason for miss in misses)


def test_off_by_default() -> None:
    assert fused(rewriter.optimize(Classifier(), passes=["fuse"], example_inputs=inputs())) == 0


class LossOnly(nn.Module):
    """A causal language model that returns its loss alone."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=2200, num_key_value_heads=1, **sizes))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=input_ids, labels=labels, use_cache=False).loss
        return loss


def test_a_language_model_that_returns_its_loss_alone_trains() -> None:
    model = LossOnly()
    ids = torch.randint(0, 2200, (2, 9), generator=torch.Generator().manual_seed(1))
    opt = optimized(model, (ids, ids))
    assert fused(opt) == 1
    loss, wanted = opt(ids, ids), model(ids, ids)
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    wanted.backward()
    mine, its = dict(opt.named_parameters()), dict(model.named_parameters())
    torch.testing.assert_close(mine["model.lm_head.weight"].grad, its["model.lm_head.weight"].grad)


def test_exports_to_onnx(tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = Classifier(label_smoothing=0.1).eval()
    opt = optimized(model, inputs())
    file = tmp_path / "loss.onnx"
    rewriter.export_onnx(opt, file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    x, target = inputs()
    names = [value.name for value in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, (x.numpy(), target.numpy()), strict=True)))
    torch.testing.assert_close(torch.tensor(got), model(x, target).detach())
