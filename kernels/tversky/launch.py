# SPDX-License-Identifier: Apache-2.0
"""`tversky` and its gradient on a GPU.

Scores and memberships are float32, as in the reference. Beside 16-bit activations they are multiplied as TF32, whose ten
bits of mantissa are more than the activations have; beside float32 ones as float32, unless torch is told that TF32 will do.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, Unsupported, launch, precision
from rewriter.kernels.tversky import kernels, reference

_PRODUCT = (Config({"BM": 64, "BN": 64, "BK": 32}, 4, 3), Config({"BM": 128, "BN": 128, "BK": 32}, 8, 3, only="cuda"))
_SINGLE = (Config({"BM": 64, "BN": 32, "BK": 32}, 4, 2),)  # products without matrix instructions
_SUMS = (Config({"BM": 64, "BN": 32, "BK": 32}, 8, 2),)  # several tiles of sums live at once
_PROGRAMS = 256  # programs to aim at where a long sum can be dealt out


def tversky(
    x: Tensor,
    features: Tensor,
    prototypes: Tensor,
    theta: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    negative: Tensor | None,
    bias: Tensor | None,
    intersection: str,
    convention: str,
    difference: str,
    form: str,
    mirrored: bool,
    projected: bool,
) -> Tensor:
    """As the reference."""
    reference.check(x, features, prototypes, theta, alpha, beta, negative, bias, projected)
    reference.check_names(intersection, convention, difference, form)
    refuse(x, features, prototypes)
    flat = x.reshape(-1, x.shape[-1])
    z, b = scores(flat, features, prototypes, mirrored, projected)
    out = x.new_empty((*x.shape[:-1], prototypes.shape[0]))
    given = {"z_ptr": z, "b_ptr": b, **coefficients(theta, alpha, beta, negative), "bias_ptr": dense(bias)}
    sizes = {"out_ptr": out, "count": z.shape[0], "prototypes": b.shape[0], "width": z.shape[1]}
    bilinear = reference.is_bilinear(intersection, difference, form)
    names = {} if bilinear else naming(intersection, convention, difference, form)
    launch(
        kernels.two_products if bilinear else kernels.similarity,
        blocks(z.shape[0], b.shape[0]),
        {**given, **sizes},
        {**names, "PRECISION": matrix_precision(x)},
        product_configs(x) if bilinear else _SUMS,
    )
    return out


# ---------------------------------------------------------------------------------------- shared with the gradient


def refuse(*tensors: Tensor) -> None:
    if any(t.dtype is torch.float64 for t in tensors):
        raise Unsupported("float64: the kernels compute in float32")


def scores(x: Tensor, features: Tensor, prototypes: Tensor, mirrored: bool, projected: bool) -> tuple[Tensor, Tensor]:
    """z ``[n, K]`` and b ``[P, K]`` in float32, contiguous; twice as wide for a mirrored bank."""
    z = multiply(x, features, x)
    b = prototypes.to(torch.float32).contiguous() if projected else multiply(prototypes, features, x)
    return (reference.mirror(z), reference.mirror(b)) if mirrored else (z, b)


def multiply(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """``a bᵀ`` in float32, ``[M, N]`` of ``[M, K]`` and ``[N, K]`` with any strides, as precise as suits activations x."""
    count, outputs, width = a.shape[0], b.shape[0], a.shape[1]
    parts, share = deal(count, outputs, width)
    out = a.new_empty(parts, count, outputs, dtype=torch.float32)
    strides = {"x_row": a.stride(0), "x_feature": a.stride(1), "weight_row": b.stride(0), "weight_feature": b.stride(1)}
    launch(
        kernels.product,
        blocks(count, outputs, parts),
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
        {"WIDE": a.dtype is not b.dtype, "PRECISION": matrix_precision(x)},
        product_configs(x),
    )
    return out[0] if parts == 1 else out.sum(0)


def deal(rows: int, columns: int, length: int) -> tuple[int, int]:
    """Into how many parts to deal a sum, and the terms of each, where the results alone are too few programs."""
    programs = max(1, triton.cdiv(rows, 64) * triton.cdiv(columns, 64))
    parts = min(triton.cdiv(_PROGRAMS, programs), triton.cdiv(length, 512))
    share = triton.cdiv(triton.cdiv(max(1, length), max(1, parts)), 32) * 32
    return max(1, triton.cdiv(length, share)), share


def coefficients(
    theta: Tensor | None, alpha: Tensor | None, beta: Tensor | None, negative: Tensor | None
) -> dict[str, Any]:
    """Pointers, and strides over the prototypes: 0 for a coefficient that all share."""
    found: dict[str, Any] = {"negative_ptr": negative}
    for name, values in (("theta", theta), ("alpha", alpha), ("beta", beta)):
        found[f"{name}_ptr"] = dense(values)
        found[f"{name}_stride"] = 0 if values is None or not values.dim() else 1
    return found


def dense(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


def naming(intersection: str, convention: str, difference: str, form: str) -> dict[str, str]:
    return {"INTERSECTION": intersection, "CONVENTION": convention, "DIFFERENCE": difference, "FORM": form}


def blocks(rows: int, columns: int, parts: int = 1) -> Any:
    """The grid over a matrix of results."""
    return lambda constants: (triton.cdiv(rows, constants["BM"]), triton.cdiv(columns, constants["BN"]), parts)


def product_configs(x: Tensor) -> tuple[Config, ...]:
    return _PRODUCT if x.element_size() == 2 else _SINGLE


def matrix_precision(x: Tensor) -> str:
    return "tf32" if x.element_size() == 2 else precision(torch.float32)


# ------------------------------------------------------------------------------------------ what is compiled in CI

_NAMES = {
    "product": ("product", "paper", "ignorematch", "contrast"),
    "product ratio": ("product", "paper", "ignorematch", "ratio"),
    "min": ("min", "paper", "subtractmatch", "contrast"),
    "softmin": ("softmin", "paper", "ignorematch", "contrast"),
    "sums": ("gmean", "code", "subtractmatch", "ratio"),
}


def arguments(names: str, dtype: torch.dtype, pair: bool = False) -> list[Any]:
    """4096 rows of width 1024, 256 features, 4096 prototypes; ``pair`` with everything that is optional."""
    x, bank, prototypes = (torch.empty(rows, 1024, dtype=dtype, device="meta") for rows in (4096, 256, 4096))
    each = torch.empty(4096, dtype=dtype, device="meta")
    one = torch.empty((), dtype=dtype, device="meta")
    return [x, bank, prototypes, each, each, each, one if pair else None, each if pair else None, *_NAMES[names],
            pair, False]  # fmt: skip


SHIPPED: tuple[Shipped, ...] = (
    Shipped("tversky product bf16", tversky, lambda: arguments("product", torch.bfloat16)),
    Shipped("tversky product, signed pair fp16", tversky, lambda: arguments("product", torch.float16, True)),
    Shipped("tversky product fp32", tversky, lambda: arguments("product", torch.float32), "none"),
    *(
        Shipped(f"tversky {name} bf16", tversky, lambda name=name: arguments(name, torch.bfloat16))
        for name in _NAMES
        if name != "product"
    ),
    Shipped("tversky sums, pair bf16", tversky, lambda: arguments("sums", torch.bfloat16, True)),
)
