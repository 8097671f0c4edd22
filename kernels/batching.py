# SPDX-License-Identifier: Apache-2.0
"""Batching rules (``torch.vmap``) of operators whose activations may have any leading dimensions.

The examples of a batched activation are one more leading dimension: one call for all of them. Another operand that is
batched, a codebook or a weight, is another layer for each example: one call each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

Results = Tensor | tuple[Tensor, ...]
InDims = Sequence[int | None]


def leading(overload: Callable[[], OpOverload], carriers: Collection[int] = (0,)) -> Callable[..., tuple[Results, Any]]:
    """The rule of an operator, which is registered after its rule and therefore given as a function.

    Args:
        overload: the operator; its result, or each of several, has the leading dimensions of the carriers.
        carriers: positions of the arguments that carry any leading dimensions; the others have none.
    """

    def rule(info: Any, in_dims: InDims, *args: Any) -> tuple[Results, Any]:
        operator = overload()
        if any(d is not None and i not in carriers for i, d in enumerate(in_dims)):
            return one_call_each(operator, info.batch_size, in_dims, args)
        whole = [
            _in_front(a, d, info.batch_size) if i in carriers and a is not None else a
            for i, (a, d) in enumerate(zip(args, in_dims, strict=True))
        ]
        return at_front(operator(*whole))

    return rule


def one_call_each(operator: OpOverload, count: int, in_dims: InDims, args: Sequence[Any]) -> tuple[Results, Any]:
    """Results of ``count`` calls, one per example, stacked.

    Raises:
        NotImplementedError: there is no example, so that no call tells the shape of a result.
    """
    if count == 0:
        name = operator.name().split("::")[1]
        raise NotImplementedError(f"{name}: vmap over more than its activations needs at least one example")
    results = [operator(*example) for example in examples(count, in_dims, args)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return at_front(tuple(torch.stack(parts) for parts in zip(*results, strict=True)))


def examples(count: int, in_dims: InDims, args: Sequence[Any]) -> Iterator[list[Any]]:
    """The arguments of each example."""
    for n in range(count):
        yield [a if d is None else a.select(d, n) for a, d in zip(args, in_dims, strict=True)]


def at_front(results: Results) -> tuple[Results, Any]:
    """Results that have their examples along the first dimension, as torch asks for them."""
    return results, 0 if isinstance(results, Tensor) else (0,) * len(results)


def _in_front(x: Tensor, dim: int | None, count: int) -> Tensor:
    return x.unsqueeze(0).expand(count, *x.shape) if dim is None else x.movedim(dim, 0)
