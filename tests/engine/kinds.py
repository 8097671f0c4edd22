# SPDX-License-Identifier: Apache-2.0
"""The six kinds of model every promise is tested on, each optimised once per process and copied where a test writes.

All are small and random, with dropout 0.5 for training mode, widths that leave a ragged group of 32, and where the
kind has a head, one that is found as such (512 outputs or more).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import rewriter
from rewriter.optimized import Optimized

VOCABULARY = 512
KINDS = ("gpt2", "llama", "bert", "vit", "sequential", "exported")
TRANSFORMERS = KINDS[:4]
LANGUAGE = ("gpt2", "llama", "bert")
CAUSAL = ("gpt2", "llama")
PLANS = ("identity", "all")

_SEED = 7


class Attending(nn.Module):
    """Token ids and an additive mask -> logits, with attention written out; what the ExportedProgram is made of."""

    def __init__(self, width: int = 48, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(VOCABULARY, width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width, bias=False)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask[:, None, None, :]
        seen = torch.softmax(scores, -1) @ v
        return self.head(x + self.out(seen.transpose(1, 2).flatten(2)))


@dataclass(frozen=True)
class Call:
    """One way to call a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, function: Callable[..., Any]) -> Any:
        return function(*self.args, **self.kwargs)

    def to(self, dtype: torch.dtype) -> Call:
        """With floating inputs in ``dtype``."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Call(tuple(map(cast, self.args)), {k: cast(v) for k, v in self.kwargs.items()})


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int, side: str, count: int = 3) -> Tensor:
    """An attention mask whose first row has ``count`` padding positions on one side."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, slice(0, count) if side == "left" else slice(length - count, None)] = 0
    return mask


def calls(kind: str) -> dict[str, Call]:
    """Name -> a call the kind accepts; the first one is plain."""
    if kind in LANGUAGE:
        found = {
            "positional": Call((tokens(3, 9),)),
            "keyword": Call((), {"input_ids": tokens(3, 9)}),
            "mask of ones": Call((tokens(3, 9), torch.ones(3, 9, dtype=torch.long)))
            if kind != "gpt2"
            else Call((tokens(3, 9),), {"attention_mask": torch.ones(3, 9, dtype=torch.long)}),
            "left padding": Call((), {"input_ids": tokens(3, 9), "attention_mask": padded(3, 9, "left")}),
            "right padding": Call((), {"input_ids": tokens(3, 9), "attention_mask": padded(3, 9, "right")}),
            "batch 1": Call((tokens(1, 9),)),
            "sequence 1": Call((tokens(3, 1),)),
            "batch 1, sequence 1, mask": Call(
                (), {"input_ids": tokens(1, 1), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
            ),
            "other sizes": Call((tokens(5, 14),)),
            "tuple": Call((tokens(2, 6),), {"return_dict": False}),
        }
        if kind in CAUSAL:
            found["labels"] = Call((), {"input_ids": tokens(3, 9), "labels": tokens(3, 9)})
            found["labels with padding"] = Call(
                (), {"input_ids": tokens(3, 9), "attention_mask": padded(3, 9, "right"), "labels": tokens(3, 9, 1)}
            )
        return found
    if kind == "vit":
        x = _normal(5, 3, 8, 8)
        return {
            "positional": Call((x[:3],)),
            "keyword": Call((), {"pixel_values": x[:3]}),
            "labels": Call((), {"pixel_values": x[:3], "labels": torch.tensor([0, 6, 3])}),
            "batch 1": Call((x[:1],)),
            "other sizes": Call((x,)),
            "tuple": Call((x[:2],), {"return_dict": False}),
        }
    if kind == "sequential":
        x = _normal(9, 40)
        return {
            "positional": Call((x[:4],)),
            "keyword": Call((), {"input": x[:4]}),
            "batch 1": Call((x[:1],)),
            "other sizes": Call((x,)),
        }
    mask = padded(3, 9, "left").float().sub(1).mul(1e4)
    return {
        "positional": Call((tokens(3, 9), mask)),
        "batch 1": Call((tokens(1, 9), torch.zeros(1, 9))),
        "sequence 1": Call((tokens(3, 1), torch.zeros(3, 1))),
        "other sizes": Call((tokens(5, 14), torch.zeros(5, 14))),
    }


def plain(kind: str) -> Call:
    return next(iter(calls(kind).values()))


def build(kind: str, attention: str = "eager", seed: int = _SEED) -> nn.Module:
    """A new model of the kind in evaluation mode; of "exported", the module its program is exported from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "sequential":
            layers = (nn.Linear(40, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Dropout(0.5), nn.Linear(48, VOCABULARY))
            return _with_statistics(nn.Sequential(*layers)).eval()
        if kind == "exported":
            return Attending().eval()
        return _transformer(kind, {"attn_implementation": attention, "initializer_range": 0.15}).eval()


def build_input(kind: str, attention: str = "eager", seed: int = _SEED) -> nn.Module | ExportedProgram:
    """What a user passes to ``optimize``: the model, or an ExportedProgram with free batch and sequence."""
    model = build(kind, attention, seed)
    if kind != "exported":
        return model
    batch, length = Dim("batch"), Dim("length")
    shapes = ({0: batch, 1: length}, {0: batch, 1: length})
    return torch.export.export(model, (tokens(3, 9), torch.zeros(3, 9)), dynamic_shapes=shapes, strict=False)


def passes(plan: str) -> list[Any]:
    if plan == "identity":
        return []
    if plan == "fuse":
        return ["fuse"]
    return [
        "fuse",
        rewriter.passes.ShiftAdd(bits=3, group=32, embeddings=True),
        rewriter.passes.VQLogits(structure="product"),
    ]


@functools.cache
def source(kind: str, plan: str) -> nn.Module | ExportedProgram:
    """The very object that ``optimized(kind, plan)`` was made from; never written to."""
    return build_input(kind)


@functools.cache
def optimized(kind: str, plan: str) -> Optimized:
    """Shared by all tests, in evaluation mode and float32: copy before writing, casting or switching modes."""
    return rewriter.optimize(source(kind, plan), passes(plan))


@functools.cache
def reference(kind: str, plan: str) -> nn.Module:
    """What ``optimized(kind, plan)`` must compute, on the model's own code; also shared.

    With no rewrite that is the model, else the user's class with rewritten sites as modules. An ExportedProgram has
    no class: there it is the module it was exported from, rewritten the same way.
    """
    if plan == "identity":
        return build(kind)
    if kind == "exported":
        return rewriter.optimize(build(kind), passes(plan), example_inputs=plain(kind).args).to_module()
    return optimized(kind, plan).to_module()


def tensors(output: Any) -> dict[str, Tensor]:
    """Tensors of an output by name, without the key/value cache, which a captured graph does not return."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        return {k: v for k, v in output.items() if isinstance(v, Tensor)}
    return {str(i): v for i, v in enumerate(output) if isinstance(v, Tensor)}


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    """The same type, the same fields, and close values (bit-equal without ``tolerance``: rtol = atol = 0)."""
    assert type(actual) is type(expected)
    a, e = tensors(actual), tensors(expected)
    assert list(a) == list(e)
    for name in a:
        torch.testing.assert_close(
            a[name], e[name], **(tolerance or {"rtol": 0.0, "atol": 0.0}), msg=lambda m, n=name: f"{n}: {m}"
        )


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _with_statistics(model: nn.Sequential) -> nn.Sequential:
    """Batch statistics other than the initial 0 and 1, so that using them wrongly shows."""
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return model


def _transformer(kind: str, options: dict[str, Any]) -> nn.Module:
    deep = {"num_hidden_layers": 2, "intermediate_size": 40, "hidden_size": 48, "num_attention_heads": 4}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
    dropped = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if kind == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 48, "n_layer": 2, "n_head": 4}
        dropout = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **dropout, **ends, **options))
    if kind == "llama":
        grouped = {"num_key_value_heads": 2, "attention_dropout": 0.5}
        return hf.LlamaForCausalLM(hf.LlamaConfig(**deep, **text, **grouped, **ends, **options))
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**deep, **text, **dropped, **options))
    patches = {"image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 7}
    return hf.ViTForImageClassification(hf.ViTConfig(**deep, **dropped, **patches, **options))
