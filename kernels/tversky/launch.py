# SPDX-License-Identifier: Apache-2.0
"""`tversky` and its gradient on a GPU.

Scores and memberships are float32, as in the reference. Beside 16-bit activations they are multiplied as TF32, whose ten
bits of mantissa are more than the activations have; beside float32 ones as float32, unless torch is told that TF32 will do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, Unsupported, launch, precision
from rewriter.kernels.tversky import gradient_kernels, kernels, reference
from rewriter.kernels.tversky.arguments import Arguments

_PRODUCT = (Config({"BM": 64, "BN": 64, "BK": 32}, 4, 3), Config({"BM": 128, "BN": 128, "BK": 32}, 8, 3, only="cuda"))
_SUMS = (Config({"BM": 64, "BN": 32, "BK": 32}, 8, 2),)  # several tiles of sums live at once
_SLOPES = (Config({"BN": 32, "BK": 32}, 8, 2),)
_MEMBERSHIPS = (Config({"BM": 64, "BN": 64, "BK": 32}, 8, 2),)
# Beside float32 activations products are no matrix instructions, and their operands take registers.
_PRODUCT_WIDE = (Config({"BM": 64, "BN": 32, "BK": 32}, 4, 2),)
_SUMS_WIDE = (Config({"BM": 64, "BN": 32, "BK": 16}, 8, 2),)
_SLOPES_WIDE = (Config({"BN": 16, "BK": 16}, 8, 2),)
_MEMBERSHIPS_WIDE = (Config({"BM": 32, "BN": 64, "BK": 16}, 8, 2),)
_ROWS = 64  # rows per program of `slopes`, which sums over them
_PROGRAMS = 256  # programs to aim at where a long sum can be dealt out


def tversky(*args: Any) -> Tensor:
    """As the reference, of the same arguments.

    Raises:
        Unsupported: float64.
        ValueError: as the reference.
    """
    a = Arguments.checked(*args)
    _refuse(a)
    z, b = _scores(_flat(a.x), a)
    out = a.x.new_empty((*a.x.shape[:-1], a.prototypes.shape[0]))
    given = {"z_ptr": z, "b_ptr": b, **_coefficients(a), "bias_ptr": _dense(a.bias)}
    sizes = {"out_ptr": out, "count": z.shape[0], "prototypes": b.shape[0], "width": z.shape[1]}
    bilinear = reference.is_bilinear(a.intersection, a.difference, a.form)
    launch(
        kernels.two_products if bilinear else kernels.similarity,
        _blocks(z.shape[0], b.shape[0]),
        {**given, **sizes},
        {**({} if bilinear else _naming(a)), "PRECISION": _precision(a.x)},
        _configs(a.x, *((_PRODUCT, _PRODUCT_WIDE) if bilinear else (_SUMS, _SUMS_WIDE))),
    )
    return out


def tversky_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """As `gradient.gradients`."""
    a = Arguments(*args)
    _refuse(a)
    flat, flat_grad = _flat(a.x), _flat(grad).contiguous()
    z, b = _scores(flat, a)
    to_z, to_b, *found = _branch(z, b, flat_grad, a, False)
    to_negative = None
    if a.negative is not None:
        more_z, less_b, *others, to_negative = _branch(z, b, flat_grad, a, True)
        to_z, to_b = to_z + more_z, to_b - less_b
        found = [None if one is None else one + other for one, other in zip(found[:3], others, strict=True)]
    if a.mirrored:
        to_z, to_b = (first - second for first, second in (t.chunk(2, 1) for t in (to_z, to_b)))
    to_bank = _multiply(to_z.t(), flat.t(), a.x)
    if not a.projected:
        to_bank = to_bank + _multiply(to_b.t(), a.prototypes.t(), a.x)
        to_b = _multiply(to_b, a.features.t(), a.x)
    to_theta, to_alpha, to_beta = (
        None if one is None or weight is None else (one if weight.dim() else one.sum())
        for one, weight in zip(found[:3], a.coefficients, strict=True)
    )
    results = (
        _multiply(to_z, a.features.t(), a.x).reshape(a.x.shape), to_bank, to_b, to_theta, to_alpha, to_beta,
        None if to_negative is None else -to_negative.sum(), None if a.bias is None else flat_grad.float().sum(0),
    )  # fmt: skip
    return tuple(
        a.x.new_empty(0) if one is None or like is None else one.to(like.dtype)
        for one, like in zip(results, a.tensors, strict=True)
    )


def _branch(
    z: Tensor,
    b: Tensor,
    grad: Tensor,
    a: Arguments,
    negative: bool,
) -> list[Any]:
    """Gradients of z, ±b, θ, α, β ``[P]`` and, for the negative branch, Σ G S ``[P]``; None for what has none."""
    count, prototypes, width = z.shape[0], b.shape[0], z.shape[1]
    paper, names = a.convention == "paper", _naming(a)
    surplus = not paper and a.difference == "subtractmatch" and not a.alpha is a.beta is None
    sided = surplus or (a.intersection in ("mean", "max") if paper else a.intersection != "product")
    whole = a.intersection == "product" or (paper and a.intersection != "mean")

    def matrix(wanted: bool, rows: int = count) -> Tensor | None:
        return z.new_empty(rows, prototypes) if wanted else None

    per_pair = {
        "common_ptr": matrix(whole), "first_ptr": matrix(sided), "second_ptr": matrix(sided),
        "only_a_ptr": matrix(a.alpha is not None), "only_b_ptr": matrix(a.beta is not None),
    }  # fmt: skip
    blocks_of_rows = triton.cdiv(count, _ROWS)
    per_prototype = {
        "to_theta_ptr": matrix(a.theta is not None and a.form == "contrast", blocks_of_rows),
        "to_alpha_ptr": matrix(a.alpha is not None, blocks_of_rows),
        "to_beta_ptr": matrix(a.beta is not None, blocks_of_rows),
        "value_ptr": matrix(negative, blocks_of_rows),
    }
    sizes = {"count": count, "prototypes": prototypes, "width": width}
    launch(
        gradient_kernels.slopes,
        _blocks(count, prototypes),
        {"z_ptr": z, "b_ptr": b, "grad_ptr": grad, **_coefficients(a), **per_pair, **per_prototype, **sizes},
        {**names, "NEGATIVE": negative, "BM": _ROWS, "PRECISION": _precision(a.x)},
        _configs(a.x, _SLOPES, _SLOPES_WIDE),
    )
    common, first, second, only_a, only_b = per_pair.values()
    sign = -1.0 if negative else 1.0
    rule = {name: names[name] for name in ("INTERSECTION", "CONVENTION", "DIFFERENCE")}
    to_z = _memberships(z, b, (1.0, sign), (common, first, only_a, only_b), (prototypes, 1), rule, a.x)
    to_b = _memberships(b, z, (sign, 1.0), (common, second, only_b, only_a), (1, prototypes), rule, a.x)
    return [to_z, to_b, *(None if t is None else t.sum(0) for t in per_prototype.values())]


def _memberships(
    own: Tensor,
    other: Tensor,
    signs: tuple[float, float],
    grads: tuple[Tensor | None, ...],
    strides: tuple[int, int],
    rule: dict[str, str],
    x: Tensor,
) -> Tensor:
    """Gradient of the scores ``own``, from what the sums of each row here and each row there receive."""
    (count, width), others = own.shape, other.shape[0]
    parts, share = _deal(count, width, others)
    out = own.new_empty(parts, count, width)
    names = ("common_ptr", "side_ptr", "own_only_ptr", "other_only_ptr")
    sizes = {"count": count, "others": others, "width": width, "share": share}
    ways = {"own_sign": signs[0], "other_sign": signs[1], "grad_row": strides[0], "grad_column": strides[1]}
    launch(
        gradient_kernels.memberships,
        _blocks(count, width, parts),
        {"own_ptr": own, "other_ptr": other, **dict(zip(names, grads, strict=True)), "out_ptr": out, **sizes, **ways},
        {**rule, "PRECISION": _precision(x)},
        _configs(x, _MEMBERSHIPS, _MEMBERSHIPS_WIDE),
    )
    return out[0] if parts == 1 else out.sum(0)


# -------------------------------------------------------------------------------------------------- parts of both


def _refuse(a: Arguments) -> None:
    if any(t.dtype is torch.float64 for t in (a.x, a.features, a.prototypes)):
        raise Unsupported("float64: the kernels compute in float32")


def _flat(x: Tensor) -> Tensor:
    """``[..., d]`` as ``[n, d]``, also without elements."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _scores(x: Tensor, a: Arguments) -> tuple[Tensor, Tensor]:
    """z ``[n, K]`` and b ``[P, K]`` in float32, contiguous; twice as wide for a mirrored bank."""
    z = _multiply(x, a.features, x)
    b = a.prototypes.to(torch.float32).contiguous() if a.projected else _multiply(a.prototypes, a.features, x)
    return (reference.mirror(z), reference.mirror(b)) if a.mirrored else (z, b)


def _multiply(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """``a bᵀ`` in float32, ``[M, N]`` of ``[M, K]`` and ``[N, K]`` with any strides, as precise as suits activations x."""
    count, outputs, width = a.shape[0], b.shape[0], a.shape[1]
    parts, share = _deal(count, outputs, width)
    out = a.new_empty(parts, count, outputs, dtype=torch.float32)
    strides = {"x_row": a.stride(0), "x_feature": a.stride(1), "weight_row": b.stride(0), "weight_feature": b.stride(1)}
    launch(
        kernels.product,
        _blocks(count, outputs, parts),
        {
            "x_ptr": a,
            "weight_ptr": b,
            "out_ptr": out,
            "count": count,
            "outputs": outputs,
            "width": width,
            "share": share,
        }
        | strides,
        {"WIDE": a.dtype is not b.dtype, "PRECISION": _precision(x)},
        _configs(x, _PRODUCT, _PRODUCT_WIDE),
    )
    return out[0] if parts == 1 else out.sum(0)


def _deal(rows: int, columns: int, length: int) -> tuple[int, int]:
    """Into how many parts to deal a sum, and the terms of each, where the results alone are too few programs."""
    programs = max(1, triton.cdiv(rows, 64) * triton.cdiv(columns, 64))
    parts = min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(length, 512))
    share = triton.cdiv(triton.cdiv(max(1, length), max(1, parts)), 32) * 32
    return max(1, triton.cdiv(length, share)), share


def _coefficients(a: Arguments) -> dict[str, Any]:
    """Pointers, and strides over the prototypes: 0 for a coefficient that all share."""
    found: dict[str, Any] = {"negative_ptr": a.negative}
    for name, values in zip(("theta", "alpha", "beta"), a.coefficients, strict=True):
        found[f"{name}_ptr"] = _dense(values)
        found[f"{name}_stride"] = 0 if values is None or not values.dim() else 1
    return found


def _dense(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def _naming(a: Arguments) -> dict[str, str]:
    """The names as the kernels take them."""
    return {name.upper(): value for name, value in a.names._asdict().items()}


def _blocks(rows: int, columns: int, parts: int = 1) -> Any:
    """The grid over a matrix of results."""
    return lambda constants: (triton.cdiv(rows, constants["BM"]), triton.cdiv(columns, constants["BN"]), parts)


def _configs(x: Tensor, half: tuple[Config, ...], wide: tuple[Config, ...]) -> tuple[Config, ...]:
    return half if x.element_size() == 2 else wide


def _precision(x: Tensor) -> str:
    return "tf32" if x.element_size() == 2 else precision(torch.float32)


# ------------------------------------------------------------------------------------------ what is compiled in CI

_NAMES = {
    "product": ("product", "paper", "ignorematch", "contrast"),
    "product ratio": ("product", "paper", "ignorematch", "ratio"),
    "min": ("min", "paper", "subtractmatch", "contrast"),
    "softmin": ("softmin", "paper", "ignorematch", "contrast"),
    "sums": ("gmean", "code", "subtractmatch", "ratio"),
}


def _gradient_arguments(names: str, dtype: torch.dtype, pair: bool = False) -> list[Any]:
    return [torch.empty(4096, 4096, dtype=dtype, device="meta"), *_arguments(names, dtype, pair)]


def _arguments(names: str, dtype: torch.dtype, pair: bool = False) -> list[Any]:
    """4096 rows of width 1024, 256 features, 4096 prototypes; ``pair`` with everything that is optional."""
    x, bank, prototypes = (torch.empty(rows, 1024, dtype=dtype, device="meta") for rows in (4096, 256, 4096))
    each = torch.empty(4096, dtype=dtype, device="meta")
    one = torch.empty((), dtype=dtype, device="meta")
    return [x, bank, prototypes, each, each, each, one if pair else None, each if pair else None, *_NAMES[names],
            pair, False]  # fmt: skip


SHIPPED: tuple[Shipped, ...] = (
    Shipped("tversky product bf16", tversky, lambda: _arguments("product", torch.bfloat16)),
    Shipped("tversky product, signed pair fp16", tversky, lambda: _arguments("product", torch.float16, True)),
    Shipped("tversky product fp32", tversky, lambda: _arguments("product", torch.float32), "none"),
    *(
        Shipped(f"tversky {name} bf16", tversky, partial(_arguments, name, torch.bfloat16))
        for name in _NAMES
        if name != "product"
    ),
    Shipped("tversky sums, pair bf16", tversky, lambda: _arguments("sums", torch.bfloat16, True)),
    *(
        Shipped(
            f"tversky_backward {name} bf16",
            tversky_backward,
            partial(_gradient_arguments, name, torch.bfloat16),
        )
        for name in _NAMES
    ),
    Shipped(
        "tversky_backward sums, pair fp32",
        tversky_backward,
        lambda: _gradient_arguments("sums", torch.float32, True),
        "none",
    ),
)
