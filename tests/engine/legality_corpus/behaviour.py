# SPDX-License-Identifier: Apache-2.0
"""What a caller can observe of a program: values, types, strides, storage, writes, gradients, random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

SEED = 11


@dataclass(frozen=True)
class Behaviour:
    """Two calls in a row, as their caller sees them.

    Attributes:
        outputs: tensors returned; again: by a second call with the same tensors.
        inputs, state: arguments, and parameters and buffers by name, after both.
        shared: pairs of (output, output, argument, parameter or buffer) with one storage, and whether they lie alike
            in it, after the first call.
        grads, gradients: requires_grad of the outputs, and gradients of a fixed projection of them, of the first call.
        random: state of the global generator after the first call.
    """

    outputs: tuple[Tensor, ...]
    again: tuple[Tensor, ...]
    inputs: tuple[Tensor, ...]
    state: Mapping[str, Tensor]
    shared: frozenset[tuple[str, str]]
    grads: tuple[bool, ...]
    gradients: Mapping[str, Tensor]
    random: Tensor


def observe(run: Callable[..., Any], inputs: Sequence[Tensor], state: Mapping[str, Tensor]) -> Behaviour:
    """Call twice from a fixed random state; the caller's generator is put back.

    ``inputs`` and ``state`` are what ``run`` reads and may write: make fresh ones for each observation.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(SEED)
        outputs = _leaves(run(*inputs))
        random = torch.get_rng_state()
        first = {
            "outputs": tuple(o.detach() for o in outputs),
            "shared": _shared(outputs, inputs, state),
            "grads": tuple(o.requires_grad for o in outputs),
            "gradients": _gradients(outputs, inputs, state),
            "random": random,
        }
        again = _leaves(run(*inputs))
    return Behaviour(
        again=tuple(o.detach() for o in again),
        inputs=tuple(t.detach() for t in inputs),
        state={name: t.detach() for name, t in state.items()},
        **first,
    )


def _leaves(result: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))


def difference(before: Behaviour, after: Behaviour) -> str | None:
    """The first thing a caller could tell two runs apart by; None if there is none."""
    return next(_differences(before, after), None)


def _differences(before: Behaviour, after: Behaviour) -> Iterator[str]:
    if len(before.outputs) != len(after.outputs):
        yield f"{len(after.outputs)} outputs instead of {len(before.outputs)}"
        return
    yield from _each("{}", _named("output", before.outputs), _named("output", after.outputs))
    yield from _each("{} of the second call", _named("output", before.again), _named("output", after.again))
    yield from _each("{} after the calls", _named("input", before.inputs), _named("input", after.inputs))
    yield from _each("{} after the calls", before.state, after.state)
    if before.shared != after.shared:
        yield f"storage shared by {sorted(after.shared)} instead of {sorted(before.shared)}"
    if before.grads != after.grads:
        yield f"requires_grad {after.grads} instead of {before.grads}"
    if not torch.equal(before.random, after.random):
        yield "another amount of random numbers is drawn"
    yield from _each("gradient of {}", before.gradients, after.gradients)


def _named(what: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{what} {i}": tensor for i, tensor in enumerate(tensors)}


def _each(title: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[str]:
    """Differences of tensors that both sides have under one name (a rewrite may rename parameters)."""
    for name in before:
        if name in after and (found := _differs(before[name], after[name])) is not None:
            yield f"{title.format(name)}: {found}"


def _differs(a: Tensor, b: Tensor) -> str | None:
    if a.dtype != b.dtype or a.device != b.device:
        return f"{b.dtype} on {b.device} instead of {a.dtype} on {a.device}"
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)} instead of {tuple(a.shape)}"
    if a.numel() and a.stride() != b.stride():
        return f"strides {b.stride()} instead of {a.stride()}"
    if a.is_meta:
        return None  # no values
    if not a.is_floating_point() and not a.is_complex():
        return None if torch.equal(a, b) else "other values"
    finite = a[a.isfinite()].abs()
    unit = float(finite.max()) if finite.numel() else 1.0
    allowed = (1e-10 if torch.finfo(a.dtype).eps < 1e-12 else 8 * torch.finfo(a.dtype).eps) * max(unit, 1e-30)
    if torch.allclose(a, b, rtol=0.0, atol=allowed, equal_nan=True):
        return None
    return f"off by {float((a - b).abs().max()):.2g} of {unit:.2g}"


def _shared(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], state: Mapping[str, Tensor]
) -> frozenset[tuple[str, str]]:
    named = [(f"output {i}", t) for i, t in enumerate(outputs)] + [(f"input {i}", t) for i, t in enumerate(inputs)]
    named += state.items()
    pairs = set()
    for i, (name, one) in enumerate(named[: len(outputs)]):
        for other_name, other in named[i + 1 :]:
            if one.untyped_storage()._cdata == other.untyped_storage()._cdata and one.numel():
                same = one.storage_offset() == other.storage_offset() and one.stride() == other.stride()
                pairs.add((name, other_name + ("" if same else " elsewhere")))
    return frozenset(pairs)


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of Σ ⟨c, output⟩ for fixed random c, with respect to every leaf that requires grad."""
    wanted = {f"input {i}": t for i, t in enumerate(inputs)} | dict(state)
    wanted = {name: t for name, t in wanted.items() if t.requires_grad and t.is_leaf}
    generator = torch.Generator().manual_seed(SEED)
    loss: Tensor | None = None
    for output in outputs:
        c = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        if output.requires_grad:
            value = torch.view_as_real(output).sum(-1) if output.is_complex() else output
            part = (value.double() * c).nansum()
            loss = part if loss is None else loss + part
    if loss is None or not wanted:
        return {}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return {name: g.detach().contiguous() for name, g in zip(wanted, found, strict=True)}
