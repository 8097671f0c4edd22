# SPDX-License-Identifier: Apache-2.0
"""Linear attention in ONNX.

Into standard operators it goes as its decomposition: chunks, for every length, with no tensor of T × T. With
``contrib=True`` the causal rules become ``com.microsoft::LinearAttention``, which ONNX Runtime runs step by step and
which takes a state. It means the same as `rewriter.kernels.linear_attention` and has

    linear, gated              the additive rule, decays per head or per feature
    delta, gated_delta         the delta rule, decays per head

but neither normaliser nor padding: values carry a column of ones, whose result is the sum of weights, and padding is
taken out of keys, values, rates and decays before. What it has not stays standard: both directions, the window of
the hybrid, and float64, for which there is no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.codegen.onnx_operator import CONTRIB_DOMAIN, Operator
from rewriter.kernels.linear_attention import additive, delta, layout, op
from rewriter.kernels.spec import REGISTRY

OPERATORS: Mapping[str, Operator] = {}
HELPERS: Mapping[str, str] = {}
LOWERINGS: Mapping[str, Callable[..., Any]] = {}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    normaliser: Tensor | None,
    scale: float,
    causal: bool,
    normalise: str,
    chunk: int,
) -> tuple[Tensor, ...]:
    """The additive rule; the normaliser travels as the last column of values and state."""
    if not causal or q.dtype is torch.float64:
        arguments = (q, k, v, log_decay, keep, state, normaliser, scale, causal, normalise, chunk)
        return _standard(op.linear_attention, *arguments)
    heads = additive.state_heads(k, v, log_decay)
    values = F.pad(v.float(), (0, 1), value=1.0)
    past = None if state is None or normaliser is None else torch.cat([state, normaliser.unsqueeze(-1)], dim=-1)
    decay = None if log_decay is None else layout.decays(log_decay, keep, k.float(), heads)
    rule = "linear" if decay is None else "gated"
    out, memory = _node(rule, q.float() * scale, k, values, keep, past, decay, None, heads)
    if normalise == "sum":
        weight = out[..., -1:]
        out = out / torch.where(weight == 0, 1.0, weight)
    return out[..., :-1].to(q.dtype).contiguous(), memory[..., :-1].contiguous(), memory[..., -1].contiguous()


def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, ...]:
    """The delta rule and the gated one."""
    if q.dtype is torch.float64:
        return _standard(op.delta_attention, q, k, v, beta, log_decay, keep, state, scale, chunk)
    heads = delta.state_heads(k, v, beta, log_decay)
    rate = layout.spread(layout.only(keep, beta.float().unsqueeze(-1)), heads)
    decay = None if log_decay is None else layout.decays(log_decay, keep, k.float(), heads)
    rule = "delta" if decay is None else "gated_delta"
    out, memory = _node(rule, q.float() * scale, k, v.float(), keep, state, decay, rate, heads)
    return out.to(q.dtype), memory


def _standard(operator: torch._ops.OpOverload, *arguments: Any) -> tuple[Tensor, ...]:
    spec = REGISTRY[operator]
    return (spec.decomposition or spec.reference)(*arguments)


def _node(
    rule: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    past: Tensor | None,
    decay: Tensor | None,
    rate: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """One node in float32: output ``[B, H, T, Dv]`` and state ``[B, heads, F, Dv]``."""
    batch, queries, length, features = q.shape
    keys, values = (layout.spread(layout.only(keep, x.float()), heads) for x in (k, v))
    packed = [None if x is None else _packed(x.squeeze(2)) for x in (keys, values, decay, rate)]
    attributes: dict[str, Any] = {"q_num_heads": queries, "kv_num_heads": heads, "update_rule": rule, "scale": 1.0}
    out, memory = torch.onnx.ops.symbolic_multi_out(
        f"{CONTRIB_DOMAIN}::LinearAttention",
        (_packed(q), *packed[:2], None if past is None else past.float(), *packed[2:]),
        attributes,
        dtypes=(torch.float32, torch.float32),
        shapes=((batch, length, queries * v.shape[3]), (batch, heads, features, v.shape[3])),
        version=1,
    )
    return out.unflatten(-1, (queries, v.shape[3])).transpose(1, 2), memory


def _packed(x: Tensor) -> Tensor:
    """``[B, H, T, F]`` -> ``[B, T, H · F]``."""
    return x.transpose(1, 2).flatten(2)


CONTRIB_LOWERINGS: Mapping[str, Callable[..., tuple[Tensor, ...]]] = {
    "linear_attention": linear_attention,
    "delta_attention": delta_attention,
}
