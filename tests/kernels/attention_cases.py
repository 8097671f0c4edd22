# SPDX-License-Identifier: Apache-2.0
"""Random calls of the three operators of linear attention, by argument name, and their forms side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.linear_attention import additive, delta, hybrid, op
from rewriter.kernels.linear_attention.sequence import Inputs, Past, Setting
from rewriter.kernels.spec import decompositions

B, H, HK, D, F, DV = 2, 4, 2, 4, 3, 2
RULES = ("additive", "delta", "hybrid")
OPERATORS = {"additive": op.linear_attention, "delta": op.delta_attention, "hybrid": op.hybrid_attention}
STATES = {
    "additive": ("state", "normaliser"),
    "delta": ("state",),
    "hybrid": ("past_k", "past_v", "past_map", "past_keep", "seen", "state", "normaliser"),
}
Args = dict[str, Any]


def case(
    rule: str,
    length: int,
    seed: int = 0,
    *,
    decay: int | None = None,
    padding: str = "none",
    dtype: torch.dtype = torch.float64,
    batch: int = B,
    chunk: int = 4,
    **options: Any,
) -> Args:
    """Arguments of a call from the start of a sequence.

    Args:
        decay: number of dimensions of ``log_decay``, or None.
        padding: "none", "left" or "any".
        options: replace further arguments.
    """
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    shapes = {1: (H,), 3: (batch, HK, length), 4: (batch, HK, length, F)}
    log_decay = None if decay is None else -rand(*shapes[decay])
    keep = None
    if padding == "left":
        begin = torch.randint(0, length, (batch, 1), generator=g)
        keep = torch.arange(length) >= begin
    elif padding == "any":
        keep = torch.rand(batch, length, generator=g) < 0.6
    if rule == "additive":
        args = {"q": rand(batch, H, length, F), "k": rand(batch, HK, length, F), "v": randn(batch, HK, length, DV)}
        args |= {"log_decay": log_decay, "keep": keep, "state": None, "normaliser": None}
        args |= {"scale": 0.7, "causal": True, "normalise": "sum", "chunk": chunk}
    elif rule == "delta":
        k = torch.nn.functional.normalize(randn(batch, HK, length, F), dim=-1)
        args = {"q": randn(batch, H, length, F), "k": k, "v": randn(batch, HK, length, DV)}
        args |= {"beta": rand(batch, HK, length), "log_decay": log_decay, "keep": keep, "state": None}
        args |= {"scale": 0.7, "chunk": chunk}
    else:
        args = {"q": randn(batch, H, length, D), "k": randn(batch, HK, length, D), "v": randn(batch, HK, length, DV)}
        args |= {"q_map": rand(batch, H, length, F), "k_map": rand(batch, HK, length, F), "gate": rand(H) + 0.1}
        args |= {"map_scale": rand(H), "log_decay": log_decay, "keep": keep}
        args |= dict.fromkeys(STATES["hybrid"])
        args |= {"scale": 0.5, "window": 3, "block": "sliding", "sinks": 0, "anchor": "max", "with_state": True}
        args |= {"chunk": chunk}
    return args | options


def call(rule: str, args: Args) -> tuple[Tensor, ...]:
    """The operator: output and states."""
    return OPERATORS[rule](*args.values())


def after(rule: str, args: Args, results: tuple[Tensor, ...]) -> Args:
    """The arguments, going on from what an earlier call returned."""
    return args | dict(zip(STATES[rule], results[1:], strict=True))


def take(args: Args, index: Any) -> Args:
    """The arguments of the tokens at ``index`` (a slice or positions)."""

    def part(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or name.startswith("past_") or value.dim() < 2:
            return value
        if name == "keep":
            return value[:, index]
        return value[:, :, index] if name not in ("state", "normaliser") else value

    return {name: part(name, value) for name, value in args.items()}


def forms(rule: str) -> dict[str, Callable[[Args], tuple[Tensor, ...]]]:
    """Each returns what the operator returns; the parallel form of the hybrid its output only."""
    traced = decompositions()[OPERATORS[rule]]
    common: dict[str, Callable[[Args], tuple[Tensor, ...]]] = {"decomposition": lambda a: traced(*a.values())}
    if rule == "hybrid":
        return common | {
            "parallel": lambda a: (hybrid.parallel(*_hybrid(a)[::2]),),
            "recurrent": lambda a: _flat(*hybrid.recurrent(*_hybrid(a))),
        }
    module = additive if rule == "additive" else delta
    return common | {
        "parallel": lambda a: module.parallel(*_without_chunk(a)),
        "recurrent": lambda a: module.recurrent(*_without_chunk(a)),
    }


def _without_chunk(args: Args) -> list[Any]:
    return [value for name, value in args.items() if name != "chunk"]


def _hybrid(args: Args) -> tuple[Inputs, Past | None, Setting]:
    values = list(args.values())
    past = None if args["past_k"] is None else Past(*values[9:16])
    return Inputs(*values[:9]), past, Setting(*values[16:21])


def _flat(out: Tensor, past: Past) -> tuple[Tensor, ...]:
    return out, past.k, past.v, past.mapped, past.keep, past.seen, past.state, past.normaliser


def real(args: Args, out: Tensor) -> Tensor:
    """The output with zeros where the query is padding."""
    return out if args["keep"] is None else torch.where(args["keep"][:, None, :, None], out, 0.0)


def near(got: Tensor, want: Tensor, tolerance: float = 1e-11) -> None:
    """Equal up to ``tolerance`` of the largest magnitude."""
    assert got.shape == want.shape and got.dtype == want.dtype
    if want.numel():
        difference, size = (got.double() - want.double()).abs().max(), want.double().abs().max()
        assert float(difference) <= tolerance * max(float(size), 1.0), f"{difference} of {size}"
