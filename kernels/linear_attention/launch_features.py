# SPDX-License-Identifier: Apache-2.0
"""`attention_features` and its gradient on a GPU, from the kernels of `features_kernels`.

x is read through its strides; parameters are read densely, in their own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, Unsupported, launch, precision
from rewriter.kernels.linear_attention import features_kernels, features_op
from rewriter.kernels.linear_attention.launch_common import SMALLEST, block, dense, only, operands, pointer

WIDEST = 128  # columns of W, which are in registers at once
PARTS = 32  # programs per head that share the tokens in the gradients of parameters
_NAMES = ("weight", "bias", "gain", "gain_bias")
_KINDS = {"elu": 0, "hedgehog": 1, "exp": 2, "landmark": 3}


def forward(x: Tensor, *rest: Any) -> Tensor:
    """`attention_features`: arguments and result are those of the reference.

    Raises:
        Unsupported: float64, empty tensors, or more than 128 columns of W (without W: of x).
    """
    [x], arguments = operands(x), _arguments(x, *rest)
    weight, *_, kind, _ = rest
    out = x.new_empty((*x.shape[:3], features_op.feature_count(x, weight, kind)), dtype=torch.float32)
    _start(features_kernels.features_kernel, x, kind, 4, lambda rows, tiles: (rows, tiles), **arguments, out_ptr=out)
    return out


def backward(grads: Sequence[Tensor], x: Tensor, *rest: Any) -> list[Tensor]:
    """``attention_features_backward``: gradients of the inputs that need one, in their dtypes.

    Args:
        grads: of the features.
        x, rest: the operator's arguments, and for each whether its gradient is wanted.

    Raises:
        Unsupported: as the forward.
    """
    *options, needs = rest
    *parameters, kind, _ = options
    inputs = (x, *parameters)
    [x], arguments = operands(x), _arguments(x, *options)
    arguments["grad_ptr"] = grads[0].float().contiguous()
    found: list[Tensor | None] = [None] * len(inputs)
    if needs[0]:
        found[0] = dx = x.new_empty(x.shape)
        _start(
            features_kernels.token_gradients_kernel, x, kind, 4, lambda rows, tiles: (rows, tiles), kind == "landmark",
            **arguments, dx_ptr=dx,
        )  # fmt: skip
    if any(needs[1:5]):
        found[1:] = _parameter_gradients(x, kind, arguments, parameters)
    return [
        dx.to(argument.dtype)
        for dx, argument, needed in zip(found, inputs, needs[:5], strict=True)
        if needed and dx is not None and argument is not None
    ]


def _parameter_gradients(
    x: Tensor, kind: str, arguments: dict[str, Any], parameters: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Of weight, bias, gain and the gain's bias, as far as there are any: a matrix and its bias at a time."""
    (batch, heads, length, width), small = x.shape, kind == "landmark"
    tiles = triton.cdiv(length, _rows(x, small))
    parts = min(PARTS, tiles * batch)
    blocks = triton.cdiv(width, _width(x, small))
    found: list[Tensor | None] = [None] * len(parameters)
    for gain in (False, True):
        at = 2 * gain
        made = [
            None if p is None else p.new_empty((parts, *p.shape), dtype=torch.float32) for p in parameters[at : at + 2]
        ]
        if made[0] is None:
            continue
        more = {"dweight_ptr": made[0], "dbias_ptr": made[1], "batches": batch, "tiles": tiles}
        _start(
            features_kernels.parameter_gradients_kernel, x, kind, 4 if small else 8, lambda rows, _: (heads, parts, blocks), small,
            **arguments, **more, per_part=triton.cdiv(tiles * batch, parts), gain=gain,
        )  # fmt: skip
        found[at : at + 2] = [None if p is None else p.sum(0) for p in made]
    return found


def _arguments(x: Tensor, *rest: Any) -> dict[str, Any]:
    """Arguments by name that all kernels share; see `forward`."""
    *parameters, _, scale = rest
    features_op.check_features(x, *rest)
    count = x.shape[3] if parameters[0] is None else parameters[0].shape[2]
    if count > WIDEST:
        raise Unsupported(f"{count} columns of features: more than {WIDEST} run the reference")
    if any(p is not None and p.dtype is torch.float64 for p in parameters):
        raise Unsupported("float64 runs the reference")
    given = {f"{name}_ptr": None if p is None else p.contiguous() for name, p in zip(_NAMES, parameters, strict=True)}
    return {
        **given, **pointer("x", dense(x)), "heads": x.shape[1], "length": x.shape[2], "width": x.shape[3],
        "count": count, "scale": scale,
    }  # fmt: skip


def _rows(x: Tensor, small: bool = False) -> int:
    """Tokens of a tile."""
    return (64 if x.dtype is not torch.float32 else 32) // (2 if small else 1)


def _width(x: Tensor, small: bool = False) -> int:
    """Columns of x that are multiplied at a time."""
    return block(x.shape[3], (64 if x.dtype is not torch.float32 else 32) // (2 if small else 1))


def _start(
    kernel: Any, x: Tensor, kind: str, warps: int, grid: Any, small: bool = False, gain: bool = False, **arguments: Any
) -> None:
    """Start a kernel; ``grid`` makes its programs from rows of heads and tiles of tokens."""
    constants = {
        "KIND": _KINDS[kind], "GAIN": gain, "BT": _rows(x, small), "BD": _width(x, small),
        "BM": max(SMALLEST, triton.next_power_of_2(arguments["count"])), "PRECISION": precision(x.dtype),
    }  # fmt: skip
    programs = grid(x.shape[0] * x.shape[1], triton.cdiv(x.shape[2], _rows(x, small)))
    config = Config({}, num_warps=warps, num_stages=1)
    launch(kernel, lambda c: programs, only(arguments, kernel), only(constants, kernel), [config])


def _example(dtype: torch.dtype, kind: str, columns: int = 64) -> tuple[Any, ...]:
    """The features of 32 heads of 64, on the meta device."""
    x = torch.empty((2, 32, 4096, 64), dtype=dtype, device="meta")
    weight, bias = x.new_empty((32, 64, columns), dtype=torch.float32), x.new_empty((32, columns), dtype=torch.float32)
    parameters = [weight, bias, weight, bias][: features_op.KINDS[kind]]
    return x, *parameters, *(None,) * (4 - len(parameters)), kind, 0.5


def _gradient_example(*arguments: Any) -> tuple[Any, ...]:
    x, *parameters, kind, scale = _example(*arguments)
    features = features_op.feature_count(x, parameters[0], kind)
    needs = [True, *(p is not None for p in parameters), False, False]
    return [x.new_empty((*x.shape[:3], features), dtype=torch.float32)], x, *parameters, kind, scale, needs


SHIPPED = (
    Shipped("attention_features elu bf16", forward, partial(_example, torch.bfloat16, "elu"), matrix="none"),
    Shipped("attention_features hedgehog bf16", forward, partial(_example, torch.bfloat16, "hedgehog")),
    Shipped("attention_features landmark bf16", forward, partial(_example, torch.bfloat16, "landmark")),
    Shipped("attention_features landmark fp32", forward, partial(_example, torch.float32, "landmark"), matrix="none"),
    Shipped("attention_features_backward hedgehog bf16", backward, partial(_gradient_example, torch.bfloat16, "hedgehog")),
    Shipped(
        "attention_features_backward landmark bf16", backward, partial(_gradient_example, torch.bfloat16, "landmark"),
        matrix="mma",
    ),
    Shipped(
        "attention_features_backward landmark fp32", backward, partial(_gradient_example, torch.float32, "landmark"),
        matrix="none",
    ),
)  # fmt: skip
