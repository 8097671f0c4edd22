# SPDX-License-Identifier: Apache-2.0
"""Backward by recomputation, and vmap, for operators given by a chunked reference.

The forward saves its inputs only; the backward runs the reference again and differentiates it, so that what lives
between the two is the inputs. It is an operator of its own, ``rewriter::<name>_backward``: a compiler that traces the
backward sees one node of known shapes and no loop over chunks, and a device may have kernels for it. It has no
derivative itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload

from rewriter.kernels.batching import one_call_each
from rewriter.kernels.spec import NAMESPACE, Cost, KernelSpec

_AUTOGRAD_KEYS = (
    DispatchKey.AutogradFunctionality,
    DispatchKey.AutogradCPU,
    DispatchKey.AutogradCUDA,
    DispatchKey.AutogradOther,
    DispatchKey.ADInplaceOrView,
)


def backward_of(
    name: str,
    schema: str,
    reference: Callable[..., Sequence[Tensor]],
    cost: Callable[..., Cost],
    implementations: Mapping[str, str] | None = None,
) -> tuple[Callable[..., None], Callable[..., tuple[Any, ...]]]:
    """Register ``<name>_backward``; returns ``setup_context`` and ``backward`` for the `KernelSpec`.

    Args:
        name: of the operator, without namespace.
        schema: its schema without the name; every result a tensor.
        reference: its implementation in differentiable aten.
        cost: of the operator; its gradient is counted as three times that, the forward again and two products for each.
        implementations: of the gradient, as in `KernelSpec`: ``(grads, *inputs, needs)`` to the list of gradients of
            the inputs that need one.
    """
    arguments = torch._C.parse_schema(f"{NAMESPACE}::{name}{schema}").arguments
    is_tensor = ["Tensor" in str(a.type) for a in arguments]
    overload = KernelSpec(
        name=f"{name}_backward",
        schema=f"(Tensor[] grads, {schema[1 : schema.index(') ->')]}, bool[] needs) -> Tensor[]",
        reference=lambda grads, *rest: _recompute(reference, grads, *rest),
        fake=lambda grads, *rest: [x.new_empty(x.shape) for x, n in zip(rest[:-1], rest[-1], strict=True) if n],
        cost=lambda grads, *rest: _times(3, cost(*rest[:-1])),
        implementations=implementations or {},
    ).register()

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*(x for x, t in zip(inputs, is_tensor, strict=True) if t))
        ctx.options = [None if t else x for x, t in zip(inputs, is_tensor, strict=True)]
        ctx.floating = [o.is_floating_point() for o in output]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if t else x for x, t in zip(ctx.options, is_tensor, strict=True)]
        needs = [bool(n) for n in ctx.needs_input_grad]
        floating = [g for g, f in zip(grads, ctx.floating, strict=True) if f]
        found = iter(overload(floating, *inputs, needs))
        return tuple(next(found) if n else None for n in needs)

    return setup_context, backward


def _times(n: int, cost: Cost) -> Cost:
    return Cost(n * cost.flops, n * cost.bytes_read, n * cost.bytes_written)


def _recompute(reference: Callable[..., Sequence[Tensor]], grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """Gradients of the inputs that need one; ``rest`` is the operator's inputs and the flags."""
    *inputs, needs = rest
    with _recording():
        inputs = [x.detach().requires_grad_() if n else x for x, n in zip(inputs, needs, strict=True)]
        outputs = [o for o in reference(*inputs) if o.is_floating_point()]
        paths = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        wanted = [x for x, n in zip(inputs, needs, strict=True) if n]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if wanted and paths:
            ends, seeds = zip(*paths, strict=True)
            found = torch.autograd.grad(ends, wanted, seeds, allow_unused=True)
    # Tensors of their own: autograd may hand out an incoming gradient, or none where an input had no influence.
    dense = torch.contiguous_format
    return [
        torch.zeros_like(x, memory_format=dense) if g is None else g.clone(memory_format=dense)
        for x, g in zip(wanted, found, strict=True)
    ]


@contextmanager
def _recording() -> Iterator[None]:
    """Record for autograd: torch runs an operator's implementation with the recording keys switched off."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD_KEYS:
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude), torch.enable_grad():
        yield


def batched_by(
    overload: Callable[[], OpOverload], per_row: frozenset[int], decay: int
) -> Callable[..., tuple[Any, ...]]:
    """A vmap rule: examples become rows of the batch where only inputs that have a batch are mapped, else one call each.

    Args:
        overload: the operator.
        per_row: positions of the inputs whose first dimension is the batch. All results have it too.
        decay: position of the decay, which has a batch unless it is one number per head.
    """

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, ...]:
        examples = info.batch_size
        moved = [a if d is None else a.movedim(d, 0) for a, d in zip(args, in_dims, strict=True)]
        by_step = args[decay] is not None and args[decay].dim() - (in_dims[decay] is not None) > 1
        in_rows = per_row | {decay} if by_step else per_row
        if any(d is not None and i not in in_rows for i, d in enumerate(in_dims)):
            return one_call_each(overload(), examples, in_dims, args)
        rows = [
            _rows(a, d is not None, examples) if i in in_rows and a is not None else a
            for i, (a, d) in enumerate(zip(moved, in_dims, strict=True))
        ]
        results = tuple(r.unflatten(0, (examples, -1)) for r in overload()(*rows))
        return results, (0,) * len(results)

    return rule


def _rows(x: Tensor, mapped: bool, examples: int) -> Tensor:
    """``[examples, B, ...]``, or ``[B, ...]`` for all examples alike -> ``[examples · B, ...]``."""
    return (x if mapped else x.expand(examples, *x.shape)).flatten(0, 1)
