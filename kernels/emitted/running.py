# SPDX-License-Identifier: Apache-2.0
"""How an emitted kernel is started: as the kernel it was made from, with its own arguments besides.

An emitted file holds kernels that are copies of an operator's, specialised to a site. The operator's own device
implementation checks, allocates and says what it would start; here those starts are carried out with the copies in place
of the originals. So sizes, grids and the choice between several kernels of one operator are written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter.kernels.launching import Config, Request, Unsupported, launch, recorded


@dataclass(frozen=True)
class Specialised:
    """A kernel made from an operator's.

    Attributes:
        kernel: the copy, a function under ``@triton.jit``.
        folded: arguments of the original that are constants in the copy. A call with other values is `Unsupported`.
        configs: those of the original's ways to compile it that leave room for what was added.
    """

    kernel: Any
    folded: Mapping[str, Any]
    configs: Sequence[Config]


def fused(
    implementation: Callable[..., Tensor],
    args: Sequence[Any],
    kernels: Mapping[str, Specialised],
    operands: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    standing_in: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What ``implementation(*args)`` computes, continued by what its kernel's copy has at the hooks.

    Args:
        implementation: device implementation of an operator with one result, which its last kernel stores.
        args: its arguments.
        kernels: name of the original kernel -> its copy.
        operands: arguments the copies have besides: tensors and numbers by name.
        dtype: of the result, where it is not that of the operator.
        standing_in: ``(placeholder, x)``: the argument ``placeholder`` only has the dtype and shape the operator is to
            see; the kernel reads ``x`` instead.

    Returns:
        the result, in the operator's shape.

    Raises:
        Unsupported: the operator would start something the copies were not made for.
    """
    with recorded() as requests:
        result = implementation(*args)
    out = result if dtype in (None, result.dtype) else torch.empty_like(result, dtype=dtype)
    if not result.numel():
        return out
    _check(requests, kernels, result)
    for request in requests:
        copy = kernels.get(request.kernel.__name__)
        if copy is None:
            launch(request.kernel, request.grid, request.args, request.constants, request.configs)
            continue
        given = {**_without(request.args, copy.folded), **operands}
        given = {name: out if _shared(a, result) else a for name, a in given.items()}
        if standing_in is not None:
            given = _replaced(given, *standing_in)
        configs = [config for config in request.configs if config in copy.configs]
        if not configs:
            raise Unsupported(f"none of the configurations of {request.kernel.__name__} fits")
        launch(copy.kernel, _whole(request, copy), given, _without(request.constants, copy.folded), configs)
    return out


def flat(tensor: Tensor, columns: int) -> Tensor:
    """``[rows, columns]`` of a tensor ``[..., columns]``, its last dimension contiguous; a view where that can be had."""
    rows = tensor.reshape(-1, columns)
    return rows if columns == 1 or rows.stride(1) == 1 else rows.contiguous()


def _check(requests: Sequence[Request], kernels: Mapping[str, Specialised], result: Tensor) -> None:
    started = [request.kernel.__name__ for request in requests]
    if sum(name in kernels for name in started) != 1 or started[-1] not in kernels:
        raise Unsupported(f"it would start {', '.join(started)}; emitted are {', '.join(kernels)}")
    if not result.is_contiguous() or not any(_shared(a, result) for a in requests[-1].args.values()):
        raise Unsupported(f"{started[-1]} does not store the contiguous result")


def _without(given: Mapping[str, Any], folded: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if name in folded and folded[name] != value:
            raise Unsupported(f"emitted for {name}={folded[name]}, called with {value}")
    return {name: value for name, value in given.items() if name not in folded}


def _whole(request: Request, copy: Specialised) -> Callable[[Mapping[str, Any]], tuple[int, ...]]:
    """The grid, which may depend on constants that the copy has no arguments for."""
    return lambda constants: request.grid({**request.constants, **constants})


def _replaced(given: Mapping[str, Any], placeholder: Tensor, x: Tensor) -> dict[str, Any]:
    if not any(_shared(a, placeholder) for a in given.values()):
        raise Unsupported("the operator converts its activations before the kernel reads them")
    return {name: x if _shared(a, placeholder) else a for name, a in given.items()}


def _shared(value: Any, tensor: Tensor) -> bool:
    """Whether an argument is a tensor on the storage of another."""
    return isinstance(value, Tensor) and value.untyped_storage()._cdata == tensor.untyped_storage()._cdata
