# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of hybrid attention: softmax over a window and linear attention over the rest in one sweep.

A program has a chunk of queries. It takes the linear terms of all keys before its window from the state there (made by
`kernels.states_kernel`), then walks the keys that the windows of its queries reach, once: each is either in a query's
window, then its exponential joins a running softmax (as in FlashAttention, arXiv 2205.14135), or before it, then it has
a linear weight. The two sums meet at the end, since the linear one is measured against the largest exponential:

    o = (γ Σ e^{s − c} v + a Σ ℓ v) / (γ Σ e^{s − c} + a Σ ℓ)

Rows of keys are counted from the first in memory; query i stands at row ``offset + i``, behind what a cache holds.
"""

# mypy: ignore-errors
# (Device code: the syntax of Python, the types of Triton.)

from __future__ import annotations

import triton
import triton.language as tl

from rewriter.kernels.linear_attention.hybrid import LARGEST_EXPONENT
from rewriter.kernels.linear_attention.kernels import LOWEST, place, power_of, real_rows, tile

LARGEST = tl.constexpr(LARGEST_EXPONENT)


@triton.jit
def softmax_step(acc, total, top, scores, v, PRECISION: tl.constexpr):
    """Add keys with ``scores`` (−∞ where there is none) to Σ e^{s − top} v and Σ e^{s − top}."""
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher == -float("inf"), 0.0, higher)
    fade, weights = tl.exp(top - base), tl.exp(scores - base[:, None])
    weights = weights.to(v.dtype)
    total = total * fade + tl.sum(weights.to(tl.float32), 1)
    acc = acc * fade[:, None] + tl.dot(weights, v, input_precision=PRECISION)
    return acc, total, higher


@triton.jit
def best_of(scores, keys):
    """The last of the keys whose score is the largest of its row."""
    return tl.max(tl.where(scores == tl.max(scores, 1)[:, None], keys[None, :], -1), 1)


@triton.jit
def pair_masks(rows, valid, own, keys, real, rank, window, sinks, TERRACE: tl.constexpr, SINKS: tl.constexpr):
    """Distances ``[queries, keys]``, and which pairs are in the window and which before it; of ``valid`` queries only
    where that matters."""
    distance = rows[:, None] - keys[None, :]
    visible = (distance >= 0) & real[None, :]
    if valid is not None:
        visible = visible & valid[:, None]
    near = distance < window
    if SINKS:
        visible = visible & (rank >= sinks)[None, :]
    if TERRACE:
        near = ((rank // window)[None, :] >= (own // window)[:, None] - 1) & (distance < 2 * window)
    return distance, visible & near, visible & (near == 0)


@triton.jit
def hybrid_kernel(  # noqa: C901 - a branch for each option
    q_ptr, k_ptr, v_ptr, q_map_ptr, k_map_ptr, gate_ptr, map_scale_ptr, decay_ptr, keep_ptr, rank_ptr,
    sink_k_ptr, sink_v_ptr, sink_keep_ptr, states_ptr, zs_ptr, out_ptr, top_ptr, total_ptr, best_ptr,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, q_map_b, q_map_h, q_map_t, k_map_b, k_map_h, k_map_t,
    sink_k_b, sink_k_h, sink_k_t, sink_v_b, sink_v_h, sink_v_t, keep_b, rank_b, sink_keep_b,
    heads, group, length, offset, reach, window, sinks, chunks, width, features, values,
    k_share, v_share, map_share, decay_share, scale,
    MAPS: tl.constexpr, TERRACE: tl.constexpr, SINKS: tl.constexpr, ABSOLUTE: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs ``[B, H, T, Dv]``. Grid: (B · H, chunks of queries, tiles of Dv); BD ≥ D.

    Of each query, for the gradient, if ``top_ptr`` is given (``[B, H, T]``): c, the sum of weights, and with
    ``best_ptr`` the row of the key with the largest score, sinks counted on after the last row.
    """
    row, batch, query = place(tl.program_id(0), heads * group)
    n, head = tl.program_id(1), query // group
    columns, at = tl.program_id(2) * BV + tl.arange(0, BV), tl.arange(0, BD)
    rows = n * BT + tl.arange(0, BT)
    valid = rows < length
    q_ptr += batch * q_b + query.to(tl.int64) * q_h
    k_ptr += batch * k_b + (head // k_share).to(tl.int64) * k_h
    v_ptr += batch * v_b + (head // v_share).to(tl.int64) * v_h
    q = tile(q_ptr, q_t, rows, valid, at, width)
    own = rows
    if TERRACE or SINKS:
        own = tl.load(rank_ptr + batch * rank_b + offset + rows, mask=valid, other=0)

    soft = tl.zeros([BT, BV], tl.float32)
    soft_sum = tl.zeros([BT], tl.float32)
    top = tl.full([BT], -float("inf"), tl.float32)
    best = tl.full([BT], -1, tl.int32)
    linear = tl.zeros([BT, BV], tl.float32)
    mass = tl.zeros([BT], tl.float32)
    if MAPS:
        q_map_ptr += batch * q_map_b + query.to(tl.int64) * q_map_h
        k_map_ptr += batch * k_map_b + (head // map_share).to(tl.int64) * k_map_h
        chunk = (batch * heads + head) * chunks + n
        states_ptr += chunk * features * values
        for begin in range(0, features, BF):
            feature = begin + tl.arange(0, BF)
            mapped = tile(q_map_ptr, q_map_t, rows, valid, feature, features).to(states_ptr.dtype.element_ty)
            s = tile(states_ptr, values, feature, feature < features, columns, values)
            linear += tl.dot(mapped, s, input_precision=PRECISION)
            z = tl.load(zs_ptr + chunk * features + feature, mask=feature < features, other=0.0)
            mass += tl.sum(mapped.to(tl.float32) * z[None, :], 1)
        if decay_ptr is not None:
            decay = tl.load(decay_ptr + head // decay_share).to(tl.float32)
            decay = tl.where(decay < LOWEST, LOWEST, decay)
            since = tl.exp(decay * (tl.arange(0, BT) + reach + 1))
            linear *= since[:, None]
            mass *= since

    first = offset - reach + n * BT
    for begin in range(0, reach + BT, BK):
        keys = first + begin + tl.arange(0, BK)
        real = real_rows(keep_ptr, batch * keep_b, keys, offset + length)
        rank = keys
        if TERRACE or SINKS:
            rank = tl.load(rank_ptr + batch * rank_b + keys, mask=real, other=0)
        distance, near, far = pair_masks(rows + offset, None, own, keys, real, rank, window, sinks, TERRACE, SINKS)
        k = tile(k_ptr, k_t, keys, real, at, width).to(q.dtype)
        v = tile(v_ptr, v_t, keys, real, columns, values).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(near, scores, -float("inf"))
        if best_ptr is not None:
            best = tl.where(tl.max(scores, 1) > top, best_of(scores, keys), best)
        soft, soft_sum, top = softmax_step(soft, soft_sum, top, scores, v, PRECISION)
        if MAPS:
            weights = tl.zeros([BT, BK], tl.float32)
            for part in range(0, features, BF):
                feature = part + tl.arange(0, BF)
                mapped = tile(q_map_ptr, q_map_t, rows, valid, feature, features).to(states_ptr.dtype.element_ty)
                k_mapped = tile(k_map_ptr, k_map_t, keys, real, feature, features).to(mapped.dtype)
                weights += tl.dot(mapped, tl.trans(k_mapped), input_precision=PRECISION)
            if decay_ptr is not None:
                weights *= tl.exp(decay * tl.maximum(distance, 0))
            weights = tl.where(far, weights, 0.0)
            power = power_of(weights, v, 1)
            weights = (weights / power).to(v.dtype)
            mass += tl.sum(weights.to(tl.float32) * power, 1)
            linear += tl.dot(weights, v, input_precision=PRECISION) * power
    if SINKS:
        sink_k_ptr += batch * sink_k_b + (head // k_share).to(tl.int64) * sink_k_h
        sink_v_ptr += batch * sink_v_b + (head // v_share).to(tl.int64) * sink_v_h
        for begin in range(0, sinks, BK):
            number = begin + tl.arange(0, BK)
            real = real_rows(sink_keep_ptr, batch * sink_keep_b, number, sinks)
            k = tile(sink_k_ptr, sink_k_t, number, real, at, width).to(q.dtype)
            v = tile(sink_v_ptr, sink_v_t, number, real, columns, values).to(q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
            scores = tl.where((own[:, None] >= number[None, :]) & real[None, :], scores, -float("inf"))
            if best_ptr is not None:
                best = tl.where(tl.max(scores, 1) > top, best_of(scores, offset + length + number), best)
            soft, soft_sum, top = softmax_step(soft, soft_sum, top, scores, v, PRECISION)

    gate = tl.load(gate_ptr + query).to(tl.float32)
    if MAPS:
        if map_scale_ptr is not None:
            factor = tl.load(map_scale_ptr + query).to(tl.float32)
            linear *= factor
            mass *= factor
        if ABSOLUTE:
            # Both sums relative to the larger of them, so that neither leaves the range.
            positive = mass > 0.0
            ceiling = tl.maximum(top, tl.where(positive, tl.log(tl.where(positive, mass, 1.0)), -float("inf")))
            ceiling = tl.where(ceiling == -float("inf"), 0.0, ceiling)
            fade, anchor = tl.exp(top - ceiling), tl.exp(tl.minimum(-ceiling, LARGEST))
            soft *= fade[:, None]
            soft_sum *= fade
            linear *= anchor[:, None]
            mass *= anchor
    total = gate * soft_sum + mass
    if top_ptr is not None:
        base = tl.where(top == -float("inf"), 0.0, top)
        if MAPS and ABSOLUTE:
            base = ceiling
        first_tile = valid & (tl.program_id(2) == 0)
        tl.store(top_ptr + row * length + rows, base, mask=first_tile)
        tl.store(total_ptr + row * length + rows, total, mask=first_tile)
        if best_ptr is not None:
            tl.store(best_ptr + row * length + rows, best, mask=first_tile)
    acc = (gate * soft + linear) / tl.where(total == 0.0, 1.0, total)[:, None]
    inside = valid[:, None] & (columns < values)[None, :]
    # hook: epilogue(acc, rows, columns, inside)
    offsets = (row * length + rows)[:, None] * values + columns[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)
