# SPDX-License-Identifier: Apache-2.0
"""`linear_cross_entropy` and its gradient on a GPU.

x and weight are read by their strides. A target that is no class makes the loss of its position NaN: a kernel cannot raise
an error without the host waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from rewriter.kernels.cross_entropy import kernels
from rewriter.kernels.cross_entropy.gradient import Gradients, Summed, no_gradients
from rewriter.kernels.cross_entropy.reference import Pair, block_rows, check, check_reduction, reduced
from rewriter.kernels.launching import Config, Grid, Shipped, Unsupported, launch, precision

_ROWS = 128  # positions per program
_SHARE = 256  # classes are dealt out in multiples of this
_PROGRAMS = 512  # programs to aim at: two or more for each multiprocessor of today's largest chips

_HALF = (
    Config({"BN": 128, "BK": 32}, 8, 2),
    Config({"BN": 128, "BK": 64}, 8, 3, only="cuda"),
)
# With a soft-cap, or sums for class weights, more values live beside each logit.
_HALF_NARROW = (
    Config({"BN": 64, "BK": 32}, 8, 2),
    Config({"BN": 64, "BK": 64}, 8, 3, only="cuda"),
)
# Products in float32 are no matrix instructions (unless TF32 is allowed): smaller tiles, more threads for each.
_SINGLE = (Config({"BN": 64, "BK": 32}, 8, 2),)
_WHOLE_ROWS = (Config({"BN": 4096}, 8, 2), Config({"BN": 2048}, 4, 2))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    chunk: int,
) -> Pair:
    """As the reference. ``chunk`` changes nothing: a tile of logits never leaves the chip."""
    check(x, weight, bias, target, class_weight, label_smoothing, softcap, chunk)
    _refuse(x, weight)
    flat, which = x.reshape(x.shape[:-1].numel(), x.shape[-1]), target.reshape(-1).contiguous()
    count, classes = flat.shape[0], weight.shape[0]
    share = _share(count, classes)
    programs = triton.cdiv(classes, share)
    parts = [flat.new_empty(programs, count, dtype=torch.float32) for _ in range(4 if label_smoothing else 3)]
    sums = dict(zip(("maximum_ptr", "total_ptr", "picked_ptr", "smooth_ptr"), (*parts, None), strict=False))
    shared = {"target_ptr": which, "class_weight_ptr": _dense(class_weight), "count": count, "classes": classes}
    launch(
        kernels.partial_losses,
        lambda constants: (triton.cdiv(count, constants["BM"]), programs),
        {**_product(flat, weight, bias, softcap), **shared, **sums, "share": share},
        {"BM": _ROWS, "PRECISION": precision(x.dtype)},
        _configs(x, softcap is not None),
    )
    loss, log_z = (flat.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    totals = {"weight_sum_ptr": _weight_sum(class_weight), "loss_ptr": loss, "log_z_ptr": log_z, "programs": programs}
    options = {"ignore_index": ignore_index, "smoothing": label_smoothing}
    launch(
        kernels.losses,
        lambda constants: (triton.cdiv(count, constants["BM"]),),
        {**shared, **sums, **totals, **options},
        {},
        (Config({"BM": 128}, 4, 1),),
    )
    return loss, log_z


def linear_cross_entropy_reduced(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    reduction: str,
    chunk: int,
) -> Tensor:
    """As the reference."""
    check_reduction(reduction)
    losses, _ = linear_cross_entropy(
        x, weight, bias, target, class_weight, ignore_index, label_smoothing, softcap, chunk
    )
    return reduced(losses.sum(), target, class_weight, ignore_index, reduction)


def linear_cross_entropy_backward(
    grad: Tensor,
    grad_log_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    log_z: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    chunk: int,
    needed: Sequence[bool],
) -> Gradients:
    """As `gradient.gradients`: ``chunk`` is how many classes' logit gradients exist at a time, in the dtype of x."""
    _refuse(x, weight)
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    count, classes = flat.shape[0], weight.shape[0]
    blocks = triton.cdiv(count, _ROWS)
    to_x = torch.zeros_like(flat, dtype=torch.float32) if needed[0] else None
    to_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needed[1] else None
    to_bias, to_class = (flat.new_empty(blocks, classes, dtype=torch.float32) if need else None for need in needed[2:])
    fixed = {
        **_product(flat, weight, bias, softcap), "target_ptr": target.reshape(-1).contiguous(),
        "class_weight_ptr": _dense(class_weight), "weight_sum_ptr": _weight_sum(class_weight),
        "log_z_ptr": log_z.contiguous(), "grad_ptr": grad.contiguous(), "grad_log_z_ptr": grad_log_z.contiguous(),
        "to_bias_ptr": to_bias, "to_class_ptr": to_class, "count": count, "classes": classes,
        "ignore_index": ignore_index, "smoothing": label_smoothing,
    }  # fmt: skip
    for first in range(0, classes, chunk):
        last = min(first + chunk, classes)
        part = flat.new_empty(count, last - first)
        launch(
            kernels.logit_gradients,
            _grid(blocks, last - first),
            {**fixed, "out_ptr": part, "first": first, "last": last},
            {"BM": _ROWS, "PRECISION": precision(x.dtype)},
            _configs(x, softcap is not None or to_class is not None),
        )
        if to_x is not None:
            to_x += part @ weight[first:last].to(x.dtype)
        if to_weight is not None:
            to_weight[first:last] = part.t() @ flat
    return (
        x.new_empty(0) if to_x is None else to_x.to(x.dtype).reshape(x.shape),
        x.new_empty(0) if to_weight is None else to_weight,
        x.new_empty(0) if to_bias is None or bias is None else to_bias.sum(0).to(bias.dtype),
        x.new_empty(0) if to_class is None or class_weight is None else to_class.sum(0).to(class_weight.dtype),
    )


def linear_cross_entropy_sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    chunk: int,
    needed: Sequence[bool],
) -> Summed:
    """As the reference; logits of `block_rows` positions exist at a time, in the dtype of x."""
    check(x, weight, bias, target, class_weight, label_smoothing, softcap, chunk)
    _refuse(x, weight)
    if not any(needed):  # then no logits need to exist
        options = (ignore_index, label_smoothing, softcap, chunk)
        return linear_cross_entropy(x, weight, bias, target, class_weight, *options)[0].sum(), *no_gradients(x)
    flat, which = x.reshape(x.shape[:-1].numel(), x.shape[-1]), target.reshape(-1).contiguous()
    count, classes = flat.shape[0], weight.shape[0]
    narrow, offsets = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    losses = flat.new_empty(count, dtype=torch.float32)
    to_x = flat.new_empty(flat.shape, dtype=torch.float32) if needed[0] else None
    to_weight = flat.new_zeros(weight.shape, dtype=torch.float32) if needed[1] else None
    to_bias = flat.new_zeros(classes, dtype=torch.float32) if needed[2] else None
    fixed = {
        "class_weight_ptr": _dense(class_weight), "weight_sum_ptr": _weight_sum(class_weight), "classes": classes,
        "ignore_index": ignore_index, "smoothing": label_smoothing, "softcap": softcap,
    }  # fmt: skip
    rows = block_rows(classes, chunk)
    for first in range(0, count, rows):
        block = slice(first, min(first + rows, count))
        part = F.linear(flat[block], narrow, offsets)
        launch(
            kernels.losses_and_gradients,
            _one_each(block.stop - first),
            {**fixed, "logits_ptr": part, "target_ptr": which[block], "loss_ptr": losses[block]},
            {"BM": 1},
            _WHOLE_ROWS,
        )
        if to_x is not None:
            to_x[block] = part @ narrow
        if to_weight is not None:
            to_weight += part.t() @ flat[block]
        if to_bias is not None:
            to_bias += part.sum(0, dtype=torch.float32)
    return (
        losses.sum(),
        flat.new_empty(0, dtype=torch.float32) if to_x is None else to_x.reshape(x.shape),
        flat.new_empty(0, dtype=torch.float32) if to_weight is None else to_weight,
        flat.new_empty(0, dtype=torch.float32) if to_bias is None else to_bias,
    )


def _refuse(x: Tensor, weight: Tensor) -> None:
    if torch.float64 in (x.dtype, weight.dtype):
        raise Unsupported("float64: the kernels compute in float32")


def _share(count: int, classes: int) -> int:
    """Classes per program, such that there are about `_PROGRAMS` of them, and not fewer than `_SHARE` classes for each."""
    wanted = triton.cdiv(_PROGRAMS, max(1, triton.cdiv(count, _ROWS)))
    return int(triton.cdiv(triton.cdiv(classes, wanted), _SHARE) * _SHARE)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> dict[str, Any]:
    """What a tile of logits needs."""
    strides = {"x_row": x.stride(0), "x_feature": x.stride(1)}
    strides |= {"weight_row": weight.stride(0), "weight_feature": weight.stride(1)}
    tensors = {"x_ptr": x, "weight_ptr": weight, "bias_ptr": _dense(bias)}
    return {**tensors, **strides, "width": x.shape[1], "softcap": softcap}


def _grid(blocks: int, classes: int) -> Callable[[Mapping[str, Any]], Grid]:
    return lambda constants: (blocks, triton.cdiv(classes, constants["BN"]))


def _one_each(count: int) -> Callable[[Mapping[str, Any]], Grid]:
    return lambda constants: (count,)


def _dense(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _weight_sum(class_weight: Tensor | None) -> Tensor | None:
    return None if class_weight is None else class_weight.sum(dtype=torch.float32)


def _configs(x: Tensor, narrow: bool) -> tuple[Config, ...]:
    if x.dtype is torch.float32:
        return _SINGLE
    return _HALF_NARROW if narrow else _HALF


# ------------------------------------------------------------------------------------- what is compiled in CI


def _arguments(dtype: torch.dtype, full: bool = False) -> list[Any]:
    """A language model's head: 4096 positions, 32000 classes; ``full`` with every option."""
    x, weight = (torch.empty(rows, 4096, dtype=dtype, device="meta") for rows in (4096, 32000))
    target = torch.empty(4096, dtype=torch.int64, device="meta")
    one_each = torch.empty(32000, device="meta") if full else None
    return [x, weight, one_each, target, one_each, -100, 0.1 if full else 0.0, 30.0 if full else None, 32768]


def _gradient_arguments(dtype: torch.dtype, full: bool = False) -> list[Any]:
    per_position = torch.empty(4096, device="meta")
    args = _arguments(dtype, full)
    return [per_position, per_position, *args[:5], per_position, *args[5:], [True, True, full, full]]


def _sum_arguments(dtype: torch.dtype, full: bool = False) -> list[Any]:
    return [*_arguments(dtype, full), [True, True, full]]


SHIPPED: tuple[Shipped, ...] = (
    Shipped("linear_cross_entropy bf16", linear_cross_entropy, lambda: _arguments(torch.bfloat16)),
    Shipped("linear_cross_entropy fp16, every option", linear_cross_entropy, lambda: _arguments(torch.float16, True)),
    Shipped("linear_cross_entropy fp32", linear_cross_entropy, lambda: _arguments(torch.float32), "none"),
    Shipped(
        "linear_cross_entropy_backward bf16", linear_cross_entropy_backward, lambda: _gradient_arguments(torch.bfloat16)
    ),
    Shipped(
        "linear_cross_entropy_backward fp16, every option",
        linear_cross_entropy_backward,
        lambda: _gradient_arguments(torch.float16, True),
    ),
    Shipped(
        "linear_cross_entropy_backward fp32",
        linear_cross_entropy_backward,
        lambda: _gradient_arguments(torch.float32),
        "none",
    ),
    Shipped("linear_cross_entropy_sum bf16", linear_cross_entropy_sum, lambda: _sum_arguments(torch.bfloat16), "none"),
    Shipped(
        "linear_cross_entropy_sum fp16, every option",
        linear_cross_entropy_sum,
        lambda: _sum_arguments(torch.float16, True),
        "none",
    ),
    Shipped("linear_cross_entropy_sum fp32", linear_cross_entropy_sum, lambda: _sum_arguments(torch.float32), "none"),
)
