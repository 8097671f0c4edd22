# SPDX-License-Identifier: Apache-2.0
"""Rules for what follows a codebook head: golden runs with gradients, what stays on the logits and why, save and ONNX."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import rewriter
from rewriter.kernels.after_head import op as after
from rewriter.kernels.cross_entropy.op import linear_cross_entropy
from rewriter.kernels.vq_logits import op as heads
from rewriter.kernels.vq_logits.codec import pack_codes
from rewriter.passes import AfterHead, VQLogits
from rewriter.passes.vq_logits import modules
from rewriter.passes.vq_logits.heads import ExactHead, ProductHead, ResidualHead, TiersHead

aten = torch.ops.aten
V, D = 29, 6
HEADS = {
    "tiers": heads.vq_logits_tiers,
    "pure": heads.vq_logits_tiers,
    "product": heads.vq_logits_product,
    "exact": heads.vq_logits_product_exact,
    "residual": heads.vq_logits_residual,
}


def head(kind: str) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    code_of, bias = pack_codes(torch.randint(0, 7, (V,), generator=g), 7), torch.randn(V, generator=g)
    codes = torch.randint(0, 5, (V, 2), generator=g).to(torch.uint8)
    book, product = torch.randn(7, D, generator=g), torch.randn(2, 5, 3, generator=g)
    fitted: dict[str, Callable[[], Any]] = {
        "tiers": lambda: TiersHead(book, code_of, bias),
        "pure": lambda: TiersHead(book, code_of, None),
        "product": lambda: ProductHead(product, codes, bias),
        "exact": lambda: ExactHead(product, codes, bias, book[:2], pack_codes(torch.tensor([3, 8]), V)),
        "residual": lambda: ResidualHead(
            torch.stack([book, book + 1]), pack_codes(torch.randint(0, 7, (V, 2), generator=g), 7), bias
        ),
    }
    return modules.of(fitted[kind](), D)


class Model(nn.Module):
    """Something before a codebook head, and a function of its logits and targets after it."""

    def __init__(self, kind: str, function: Callable[..., Any]) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(V, D), nn.Linear(D, D), head(kind)
        self.function = function
        self.register_buffer("class_weight", torch.rand(V, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor, target: Tensor) -> Any:
        logits = self.head(self.body(x + self.embed(target)))  # which says that their sizes agree
        return self.function(logits, target, self.class_weight)


def inputs(batch: int = 4, length: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(length)
    return torch.randn(batch, length, D, generator=g).to(dtype), torch.randint(0, V, (batch, length), generator=g)


def rewritten(model: nn.Module, dtype: torch.dtype) -> tuple[rewriter.Program, rewriter.Program, rewriter.Plan]:
    before = rewriter.capture(model.eval().to(dtype), inputs(dtype=dtype))
    plan = rewriter.plan(before, ["after_head"])
    return before, rewriter.apply(before, plan), plan


def targets(program: rewriter.Program) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def soft(t: Tensor) -> Tensor:
    return 0.9 * F.one_hot(t, V).float() + 0.1 / V


LOSSES: dict[str, Callable[..., Any]] = {
    "mean": lambda x, t, w: F.cross_entropy(x.view(-1, V), t.view(-1)),
    "sum, in float32": lambda x, t, w: F.cross_entropy(x.float().flatten(0, 1), t.flatten(), reduction="sum"),
    "each": lambda x, t, w: F.cross_entropy(x.transpose(1, 2), t, reduction="none"),
    "ignoring": lambda x, t, w: F.cross_entropy(x.permute(0, 2, 1), t, ignore_index=3),
    "nll": lambda x, t, w: F.nll_loss(x.reshape(-1, V).log_softmax(-1), t.flatten()),
    "gather": lambda x, t, w: -x.log_softmax(-1).gather(-1, t.unsqueeze(-1)).squeeze(-1).mean(),
    "shifted": lambda x, t, w: F.cross_entropy(x[:, :-1, :].contiguous().view(-1, V), t[:, 1:].reshape(-1)),
    "last": lambda x, t, w: F.cross_entropy(x[:, -1], t[:, -1]),
}
TIERS_LOSSES: dict[str, Callable[..., Any]] = {
    "smoothed": lambda x, t, w: F.cross_entropy(x.view(-1, V), t.view(-1), label_smoothing=0.1),
    "weighted": lambda x, t, w: F.cross_entropy(x.view(-1, V), t.view(-1), weight=w),
    "all of it": lambda x, t, w: F.cross_entropy(
        x.transpose(1, 2), t, weight=w, ignore_index=3, label_smoothing=0.2, reduction="mean"
    ),
    "soft": lambda x, t, w: F.cross_entropy(x.view(-1, V), soft(t).view(-1, V).to(x.dtype)),
    "soft, transposed": lambda x, t, w: F.cross_entropy(
        x.transpose(1, 2), soft(t).transpose(1, 2).to(x.dtype), weight=w, label_smoothing=0.1, reduction="sum"
    ),
}
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "log_softmax": lambda x, t, w: x.log_softmax(-1),
    "softmax in float32": lambda x, t, w: F.softmax(x, dim=-1, dtype=torch.float32),
    "softmax of the last": lambda x, t, w: x[:, -1].softmax(-1),
}
LARGEST: dict[str, Callable[..., Any]] = {
    "argmax": lambda x, t, w: x[:, -1, :].argmax(-1),
    "argmax, kept": lambda x, t, w: x.argmax(-1, keepdim=True),
    "max": lambda x, t, w: x.max(-1),
    "topk": lambda x, t, w: x.float().topk(3, dim=-1),
}
FORMS = {**LOSSES, **TIERS_LOSSES, **ELEMENTWISE, **LARGEST}
CASES = [
    *(("tiers", name) for name in FORMS),
    *(("pure", name) for name in ("mean", "all of it", "soft", "log_softmax")),
    *(("product", name) for name in ("mean", "each", "gather", "shifted", "all of it", "argmax", "topk")),
    *((kind, name) for kind in ("exact", "residual") for name in ("mean", "topk")),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_golden_run_with_gradients(kind: str, name: str) -> None:
    before, after_, plan = rewritten(Model(kind, FORMS[name]), torch.float32)
    assert len(plan.sites) == 1
    assert HEADS[kind] not in targets(after_)  # the logits are not made
    result = rewriter.verify(before, after_, [inputs(4, 5), inputs(3, 8)])
    # In float64. What rounding does to losses is tested on many positions at once, with the operators: that of a mean over
    # a few positions is luck, before as well as after.
    assert max(f.relative for f in (*result.outputs, *result.gradients)) <= 1e-10
    assert result.outputs and (name in LARGEST or len(result.gradients) >= 5)


@pytest.mark.parametrize("name", ["sum, in float32", "soft", "softmax in float32"])
def test_values_in_bfloat16_have_the_dtypes_they_had(name: str) -> None:
    before, after_, plan = rewritten(Model("tiers", FORMS[name]), torch.bfloat16)
    assert len(plan.sites) == 1
    result = rewriter.verify(before, after_, [inputs(4, 5, torch.bfloat16)])
    assert max(f.relative for f in (*result.outputs, *result.gradients)) <= 1e-10
    given = inputs(8, 64, torch.bfloat16)
    want, got = before.graph_module(*given)[0], after_.graph_module(*given)[0]
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)


def test_applying_twice_is_applying_once() -> None:
    _, after_, _ = rewritten(Model("tiers", FORMS["mean"]), torch.float32)
    assert rewriter.plan(after_, ["after_head"]).sites == ()


def test_logits_that_are_returned_as_well_stay() -> None:
    model = Model("tiers", lambda x, t, w: (FORMS["mean"](x, t, w), x))
    before, after_, _ = rewritten(model, torch.float32)
    called = targets(after_)
    assert heads.vq_logits_tiers in called and heads.vq_tiers_nll in called
    assert aten.cross_entropy_loss.default not in called
    rewriter.verify(before, after_, [inputs()]).raise_if_failed()


def reasons(kind: str, function: Callable[..., Any]) -> str:
    before = rewriter.capture(Model(kind, function).eval(), inputs())
    plan = rewriter.plan(before, ["after_head"])
    assert plan.sites == ()
    return "\n".join(str(miss) for miss in plan.misses)


@pytest.mark.parametrize(
    ("kind", "function", "message"),
    [
        ("tiers", lambda x, t, w: F.cross_entropy((x / 2).view(-1, V), t.view(-1)), "needs all logits"),
        ("tiers", lambda x, t, w: x.softmax(1), "over the vocabulary"),
        ("tiers", lambda x, t, w: x.argmax(), "not taken over the vocabulary"),
        ("tiers", lambda x, t, w: x.topk(2, dim=-1, largest=False), "largest"),
        ("tiers", lambda x, t, w: F.cross_entropy(x.double().view(-1, V), t.view(-1)), "needs all logits"),
        ("tiers", lambda x, t, w: x.log_softmax(-1, dtype=torch.float64), "more than the hidden states have"),
        ("product", lambda x, t, w: x.softmax(-1), "as large as the logits"),
        ("product", lambda x, t, w: (FORMS["mean"](x, t, w), x), "needs the logits as well"),
        ("product", FORMS["soft"], "as large as the logits"),
    ],
)
def test_what_stays_on_the_logits_says_why(kind: str, function: Callable[..., Any], message: str) -> None:
    assert message in reasons(kind, function)


def test_a_write_between_logits_and_loss_is_refused() -> None:
    class Writing(Model):
        def forward(self, x: Tensor, target: Tensor) -> Any:
            h = self.body(x + self.embed(target))
            logits = self.head(h)
            h.add_(1.0)
            return F.cross_entropy(logits.view(-1, V), target.view(-1))

    before = rewriter.capture(Writing("tiers", FORMS["mean"]).eval(), inputs())
    plan = rewriter.plan(before, ["after_head"])
    assert plan.sites == () and "is written by" in "\n".join(map(str, plan.misses))


def test_options_choose_the_rules() -> None:
    for option in ("cross_entropy", "log_softmax", "softmax", "largest"):
        rules = AfterHead(**{option: False}).rules()
        assert len(rules) == 3 and f"after_head.{option}" not in [rule.name for rule in rules]


@pytest.mark.parametrize("name", ["all of it", "softmax in float32", "topk"])
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    model = Model("tiers", FORMS[name]).eval()
    opt = rewriter.optimize(model, ["after_head"], inputs())
    opt.save(tmp_path / "model")
    again = rewriter.load(tmp_path / "model")
    for a, b in zip(_flat(opt(*inputs(3, 7))), _flat(again(*inputs(3, 7))), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("tiers", "log_softmax"), ("tiers", "topk"), ("tiers", "all of it"), ("product", "mean"), ("product", "argmax")],
)
def test_onnx_runtime_agrees(kind: str, name: str, tmp_path: Path) -> None:
    opt = rewriter.optimize(Model(kind, FORMS[name]).eval(), ["after_head"], inputs())
    opt.export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    given = inputs(3, 7)
    feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
    for got, want in zip(session.run(None, feed), _flat(opt(*given)), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)


# -- together with the head --------------------------------------------------------------------------------------


class LanguageModel(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(600, 16), nn.Linear(16, 16), nn.Linear(16, 600, bias=False)
        self.function = function

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        return self.function(self.head(self.body(self.embed(ids)) + self.embed(labels)), labels)


FOLLOWED: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "loss": (
        lambda x, t: F.cross_entropy(x.view(-1, 600), t.view(-1)), heads.vq_tiers_nll, linear_cross_entropy,
    ),
    "argmax": (lambda x, t: x[:, -1].argmax(-1), after.vq_tiers_topk, after.linear_topk),
}  # fmt: skip


@pytest.mark.parametrize("structure", ["tiers", "product"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_head_is_replaced_together_with_what_follows_it(name: str, structure: str) -> None:
    function, by_codes, by_rows = FOLLOWED[name]
    model, ids = LanguageModel(function).eval(), torch.randint(0, 600, (4, 9))
    options = {"codes": 60} if structure == "tiers" else {}
    opt = rewriter.optimize(model, [VQLogits(structure=structure, **options)], (ids, ids), expect={"vq_logits": 1})
    called = targets(opt.program)
    assert (by_codes if structure == "tiers" else by_rows) in called
    assert heads.vq_logits_tiers not in called and heads.vq_logits_product not in called
    restored = opt.to_module().eval()
    torch.testing.assert_close(opt(ids, ids), restored(ids, ids))
    back = opt.undo("vq_logits")
    torch.testing.assert_close(back(ids, ids), model(ids, ids))


def test_the_loss_of_a_causal_model_reads_the_codes_and_the_logits_are_still_returned() -> None:
    config = hf.LlamaConfig(
        vocab_size=600, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model, ids = hf.LlamaForCausalLM(config).eval(), torch.randint(0, 600, (2, 16))
    for dtype in (torch.float32, torch.bfloat16):
        opt = rewriter.optimize(
            model.to(dtype), [VQLogits(structure="tiers", codes=60)], example_kwargs={"input_ids": ids, "labels": ids}
        )
        called = targets(opt.program)
        assert called.count(heads.vq_tiers_nll) == 1 and aten.cross_entropy_loss.default not in called
        out = opt(input_ids=ids, labels=ids)
        logits = out.logits[:, :-1].float().reshape(-1, 600)
        torch.testing.assert_close(out.loss, F.cross_entropy(logits, ids[:, 1:].reshape(-1)), rtol=1e-2, atol=1e-4)
        out.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in opt.parameters())
        assert opt(input_ids=ids).logits.shape == (2, 16, 600)  # another program of the same plan, without a loss


def _flat(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def test_the_examples_of_the_page_run() -> None:
    page = (Path(__file__).parents[2] / "docs" / "after_head.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["tokens"].shape == (3, 5) and names["opt"].plan.sites[0].rule == "after_head.cross_entropy"
