# SPDX-License-Identifier: Apache-2.0
"""The operator ``rewriter::attention_features``: feature maps of linear attention as one pass over the tokens.

    elu        elu(s x) + 1                                      Katharopoulos et al. (arXiv 2006.16236)
    hedgehog   softmax(s x W) ⊕ softmax(−s x W)                  LoLCATs' form of Hedgehog (2410.10254)
    exp        e^min(s x W + b, 60)                              keys seen by landmarks
    landmark   e^min(log softmax(s x W + b) + s x G + g, 60)     queries near landmarks, `rewriter.passes.linear_attention.maps`

Features are as wide as the queries' and keys' results and are made of several steps; as one operator nothing between
them is written to memory, which on a CPU costs more than the arithmetic. Other maps are plain aten (`feature_maps`).
Autocast leaves it alone: features are exponentials, whose range float16 has not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.batching import one_call_each
from rewriter.kernels.linear_attention import checks, feature_maps, layout
from rewriter.kernels.linear_attention.feature_maps import LARGEST, widened
from rewriter.kernels.linear_attention.transforms import backward_of
from rewriter.kernels.spec import Cost, KernelSpec, tensor_bytes

# kind -> how many of weight, bias, gain_weight, gain_bias it has
KINDS = {"elu": 0, "hedgehog": 1, "exp": 2, "landmark": 4}
_NAMES = ("weight", "bias", "gain_weight", "gain_bias")


def check_features(x: Tensor, *rest: Any) -> None:
    """ValueError unless the arguments of the operator fit each other."""
    *parameters, kind, _ = rest
    checks.activations(x=x)
    checks.check(kind in KINDS, f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    given = [p is not None for p in parameters]
    expected = [i < KINDS[kind] for i in range(len(_NAMES))]
    checks.check(given == expected, f"{kind} has {', '.join(_NAMES[: KINDS[kind]]) or 'no parameters'}, and no others")
    if parameters[0] is None:
        return
    checks.check(parameters[0].dim() == 3, f"weight must be [heads, D, M], not {list(parameters[0].shape)}")
    heads, width, columns = x.shape[1], x.shape[3], parameters[0].shape[2]
    for name, p in zip(_NAMES, parameters, strict=True):
        checks.shape(name, p, (heads, width, columns) if name.endswith("weight") else (heads, columns))


def feature_count(x: Tensor, weight: Tensor | None, kind: str) -> Any:
    """F of the features ``[B, H, T, F]``."""
    if weight is None:
        return x.shape[3]
    return weight.shape[2] * (2 if kind == "hedgehog" else 1)


def _features(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gain_weight: Tensor | None,
    gain_bias: Tensor | None,
    kind: str,
    scale: float,
) -> Tensor:
    check_features(x, weight, bias, gain_weight, gain_bias, kind, scale)
    x = widened(x) if scale == 1.0 else widened(x) * scale
    if weight is None:
        return feature_maps.elu(x).contiguous()
    if bias is None:
        return feature_maps.hedgehog(x, weight).contiguous()
    y = _affine(x, weight, bias)
    if gain_weight is not None and gain_bias is not None:
        y = torch.log_softmax(y, -1) + _affine(x, gain_weight, gain_bias)
    return y.clamp(max=LARGEST).exp().contiguous()


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b per head."""
    return x @ weight.to(x.dtype) + bias.to(x.dtype).unsqueeze(-2)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    check_features(x, *rest)
    weight, *_, kind, _ = rest
    return x.new_empty((*x.shape[:3], feature_count(x, weight, kind)), dtype=layout.wide(x.dtype))


def _cost(x: Tensor, *rest: Any) -> Cost:
    *parameters, kind, _ = rest
    made = x[..., 0].numel() * feature_count(x, parameters[0], kind)
    products = sum(2 * x.numel() * p.shape[2] for p in parameters[::2] if p is not None)
    return Cost(products + made, tensor_bytes(x, *parameters), made * layout.wide(x.dtype).itemsize)


def _batched(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Any, Any]:
    """Examples become rows of the batch where they share their parameters, else one call each."""
    if in_dims[0] is not None and all(d is None for d in in_dims[1:]):
        rows = x.movedim(in_dims[0], 0)
        return attention_features(rows.flatten(0, 1), *rest).unflatten(0, rows.shape[:2]), 0
    return one_call_each(attention_features, info.batch_size, in_dims, (x, *rest))


_SCHEMA = (
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? gain_weight, Tensor? gain_bias, str kind, float scale) -> Tensor"
)
_setup, _backward = backward_of(
    "attention_features",
    _SCHEMA,
    lambda *arguments: (_features(*arguments),),
    _cost,
    {"cuda": "rewriter.kernels.linear_attention.launch:attention_features_backward"},
)
attention_features: OpOverload = KernelSpec(
    name="attention_features",
    schema=_SCHEMA,
    reference=_features,
    fake=_fake,
    setup_context=lambda ctx, inputs, output: _setup(ctx, inputs, (output,)),
    backward=_backward,
    vmap=_batched,
    cost=_cost,
    implementations={
        "cpu": "rewriter.kernels.linear_attention.native:attention_features",
        "cuda": "rewriter.kernels.linear_attention.launch:attention_features",
    },
).register()
