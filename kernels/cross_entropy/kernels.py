# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""Linear and cross entropy in one kernel: logits exist as tiles only.

    l_i = cap(w_i·x + b_i)     cap(l) = c tanh(l / c)
    log Z = log Σ_i exp l_i    loss = (1 − ε) m_y (log Z − l_y) + ε/V Σ_i m_i (log Z − l_i), 0 where y is ignored

Few positions fill few programs, so the classes are dealt out to several (`partial_losses`), whose maximum, sum, l_y and
Σ m l a second kernel puts together in a fixed order (`losses`): the result does not depend on who came first. The way back
makes the gradient of the logits for some classes at a time (`logit_gradients`), from tiles computed anew; the two matrix
products that follow are the vendor's. Where the losses are summed, logits of some positions are the vendor's product, and
`losses_and_gradients` overwrites them with their gradients: nothing is computed twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rewriter.kernels.softmax.kernels import finite, logsumexp, running


@triton.jit
def tanh(x):
    """Relative error of a few units of 2⁻²⁴: by its series near 0, where (1 − e) / (1 + e) would cancel."""
    square = x * x
    series = x + x * square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    small = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -far, far))


@triton.jit
def tanh_slope(x):
    """1 − tanh² x, which would cancel, as 4 e / (1 + e)² with e = exp(−2 |x|)."""
    small = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * small / ((1.0 + small) * (1.0 + small))


@triton.jit
def capped(logits, softcap):
    """c tanh(l / c), or l without a cap."""
    if softcap is None:
        return logits
    else:
        return softcap * tanh(logits / softcap)


@triton.jit
def logit_tile(
    x_ptr, weight_ptr, bias_ptr, rows, columns, row_inside, column_inside, width,
    x_row, x_feature, weight_row, weight_feature,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w_i·x + b_i ``[BM, BN]`` in float32; 0 outside. Weight and bias are read in the dtype of x."""
    acc = tl.zeros([BM, BN], tl.float32)
    row_places = rows.to(tl.int64)[:, None] * x_row
    column_places = columns.to(tl.int64)[None, :] * weight_row
    for start in range(0, width, BK):
        features = start + tl.arange(0, BK)
        known = features < width
        x = tl.load(
            x_ptr + row_places + features[None, :] * x_feature, mask=row_inside[:, None] & known[None, :], other=0.0
        )
        # hook: prologue(x, rows, features)
        w = tl.load(
            weight_ptr + column_places + features.to(tl.int64)[:, None] * weight_feature,
            mask=known[:, None] & column_inside[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=column_inside, other=0.0)
        acc += bias.to(x_ptr.dtype.element_ty).to(tl.float32)[None, :]
    return acc


@triton.jit
def partial_losses(
    x_ptr, weight_ptr, bias_ptr, target_ptr, class_weight_ptr, maximum_ptr, total_ptr, picked_ptr, smooth_ptr,
    count, classes, share, width, softcap, x_row, x_feature, weight_row, weight_feature,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Maximum, Σ exp(l − maximum), l_y and Σ m l over ``share`` classes; each ``[programs, count]`` in float32.

    Grid: blocks of BM positions, shares of the classes. ``smooth_ptr`` is None without smoothing.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_inside = rows < count
    target = tl.load(target_ptr + rows, mask=row_inside, other=-1)
    maximum = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    picked = tl.zeros([BM], tl.float32)
    smooth = tl.zeros([BM], tl.float32)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, classes)
    for start in range(first, last, BN):
        columns = start + tl.arange(0, BN)
        column_inside = columns < last
        tile = logit_tile(
            x_ptr, weight_ptr, bias_ptr, rows, columns, row_inside, column_inside, width,
            x_row, x_feature, weight_row, weight_feature, BM, BN, BK, PRECISION,
        )  # fmt: skip
        logits = capped(tile, softcap)
        maximum, total = running(maximum, total, tl.where(column_inside[None, :], logits, float("-inf")))
        own = (columns[None, :] == target[:, None]) & column_inside[None, :]
        picked += tl.sum(tl.where(own, logits, 0.0), 1)
        if smooth_ptr is not None:
            weighted = tl.where(column_inside[None, :], logits, 0.0)
            if class_weight_ptr is not None:
                m = tl.load(class_weight_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
                weighted *= m[None, :]
            smooth += tl.sum(weighted, 1)
    place = tl.program_id(1).to(tl.int64) * count + rows
    tl.store(maximum_ptr + place, maximum, mask=row_inside)
    tl.store(total_ptr + place, total, mask=row_inside)
    tl.store(picked_ptr + place, picked, mask=row_inside)
    if smooth_ptr is not None:
        tl.store(smooth_ptr + place, smooth, mask=row_inside)


@triton.jit
def class_weights(class_weight_ptr, target, classes, counted):
    """m_y ``[BM]``: 1 without class weights, 0 where the target is ignored, NaN where it is no class."""
    known = (target >= 0) & (target < classes)
    m = tl.where(known, 1.0, float("nan"))
    if class_weight_ptr is not None:
        m *= tl.load(class_weight_ptr + target, mask=known & counted, other=0.0).to(tl.float32)
    return tl.where(counted, m, 0.0)


@triton.jit
def all_weights(weight_sum_ptr, classes):
    """Σ m, which is V without class weights."""
    if weight_sum_ptr is None:
        return classes
    else:
        return tl.load(weight_sum_ptr)


@triton.jit
def losses(
    target_ptr, class_weight_ptr, weight_sum_ptr, maximum_ptr, total_ptr, picked_ptr, smooth_ptr, loss_ptr, log_z_ptr,
    count, classes, programs, ignore_index, smoothing, BM: tl.constexpr,
):  # fmt: skip
    """Loss and log Z ``[count]`` from what ``programs`` shares of the classes gave. Grid: blocks of BM positions."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < count
    maximum = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    picked = tl.zeros([BM], tl.float32)
    smooth = tl.zeros([BM], tl.float32)
    place = rows.to(tl.int64)
    for _ in range(programs):
        its = tl.load(maximum_ptr + place, mask=inside, other=0.0)
        larger = tl.maximum(maximum, its)
        base = finite(larger)
        part = tl.load(total_ptr + place, mask=inside, other=0.0) * tl.exp(its - base)
        total = total * tl.exp(maximum - base) + part
        maximum = larger
        picked += tl.load(picked_ptr + place, mask=inside, other=0.0)
        if smooth_ptr is not None:
            smooth += tl.load(smooth_ptr + place, mask=inside, other=0.0)
        place += count
    log_z = logsumexp(maximum, total)
    target = tl.load(target_ptr + rows, mask=inside, other=ignore_index)
    counted = target != ignore_index
    loss = class_weights(class_weight_ptr, target, classes, counted) * (log_z - picked)
    if smooth_ptr is not None:
        rest = log_z * all_weights(weight_sum_ptr, classes) - smooth
        loss = (1.0 - smoothing) * loss + smoothing * rest / classes
    tl.store(loss_ptr + rows, tl.where(counted, loss, 0.0), mask=inside)
    tl.store(log_z_ptr + rows, log_z, mask=inside)


@triton.jit
def logit_gradients(
    x_ptr, weight_ptr, bias_ptr, target_ptr, class_weight_ptr, weight_sum_ptr, log_z_ptr, grad_ptr, grad_log_z_ptr,
    out_ptr, to_bias_ptr, to_class_ptr,
    count, classes, first, last, width, ignore_index, smoothing, softcap,
    x_row, x_feature, weight_row, weight_feature,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """∂w_i·x for the classes ``first`` to ``last``, ``[count, last − first]`` in the dtype of ``out_ptr``.

    ``to_bias_ptr`` and ``to_class_ptr``, if they are not None, get the sums over each block of positions of what bias and
    class weights receive, ``[blocks, classes]``. Grid: blocks of BM positions, blocks of BN classes.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row_inside = rows < count
    columns = first + tl.program_id(1) * BN + tl.arange(0, BN)
    column_inside = columns < last
    inside = row_inside[:, None] & column_inside[None, :]
    tile = logit_tile(
        x_ptr, weight_ptr, bias_ptr, rows, columns, row_inside, column_inside, width,
        x_row, x_feature, weight_row, weight_feature, BM, BN, BK, PRECISION,
    )  # fmt: skip
    logits = capped(tile, softcap)
    target = tl.load(target_ptr + rows, mask=row_inside, other=ignore_index)
    counted = target != ignore_index  # nothing is outside
    kept = tl.load(grad_ptr + rows, mask=counted, other=0.0)
    log_z = tl.load(log_z_ptr + rows, mask=row_inside, other=0.0)
    # ∂l_i = (g ((1 − ε) m_y + ε/V Σ_j m_j) + z) exp(l_i − log Z) − g (1 − ε) m_y [i = y] − g ε/V m_i
    to_loss = (1.0 - smoothing) * kept
    to_own = to_loss * class_weights(class_weight_ptr, target, classes, counted)
    to_each = smoothing / classes * kept
    to_share = to_own + to_each * all_weights(weight_sum_ptr, classes)
    to_share += tl.load(grad_log_z_ptr + rows, mask=row_inside, other=0.0)
    own = columns[None, :] == target[:, None]
    acc = to_share[:, None] * tl.exp(logits - log_z[:, None]) - tl.where(own, to_own[:, None], 0.0)
    if class_weight_ptr is None:
        acc -= to_each[:, None]
    else:
        m = tl.load(class_weight_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
        acc -= to_each[:, None] * m[None, :]
    if softcap is not None:
        acc *= tanh_slope(tile / softcap)
    block = tl.program_id(0).to(tl.int64) * classes
    if to_bias_ptr is not None:
        tl.store(to_bias_ptr + block + columns, tl.sum(tl.where(inside, acc, 0.0), 0), mask=column_inside)
    if to_class_ptr is not None:
        # Σ over positions of g (1 − ε) [i = y] (log Z − l_i) + g ε/V (log Z − l_i)
        each = tl.where(own, to_loss[:, None], 0.0) + to_each[:, None]
        missing = tl.where(inside, log_z[:, None] - logits, 0.0)
        tl.store(to_class_ptr + block + columns, tl.sum(each * missing, 0), mask=column_inside)
    place = rows.to(tl.int64)[:, None] * (last - first) + (columns - first)[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def losses_and_gradients(
    logits_ptr, target_ptr, class_weight_ptr, weight_sum_ptr, loss_ptr,
    classes, ignore_index, smoothing, softcap, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Losses, and the gradient of their sum in place of the logits ``[positions, classes]``. Grid: one position each.

    A row is read twice, for what it sums to and for its gradients; BM is 1, for the sake of `running`.
    """
    row = tl.program_id(0)
    logits_row = logits_ptr + row.to(tl.int64) * classes
    target = tl.load(target_ptr + row)
    counted = target != ignore_index
    maximum = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    picked = tl.zeros([BM], tl.float32)
    smooth = tl.zeros([BM], tl.float32)
    for start in range(0, classes, BN):
        columns = start + tl.arange(0, BN)
        inside = columns < classes
        logits = capped(tl.load(logits_row + columns, mask=inside, other=0.0).to(tl.float32), softcap)[None, :]
        maximum, total = running(maximum, total, tl.where(inside[None, :], logits, float("-inf")))
        picked += tl.sum(tl.where((columns == target)[None, :], logits, 0.0), 1)
        if smoothing > 0:
            weighted = logits  # 0 outside
            if class_weight_ptr is not None:
                weighted *= tl.load(class_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
            smooth += tl.sum(weighted, 1)
    log_z = logsumexp(maximum, total)
    m = class_weights(class_weight_ptr, target, classes, counted)
    every = all_weights(weight_sum_ptr, classes)
    loss = (1.0 - smoothing) * m * (log_z - picked) + smoothing * (log_z * every - smooth) / classes
    tl.store(loss_ptr + row + tl.arange(0, BM), tl.where(counted, loss, 0.0))
    # ∂l_i = ((1 − ε) m_y + ε/V Σ_j m_j) exp(l_i − log Z) − (1 − ε) m_y [i = y] − ε/V m_i
    to_own = (1.0 - smoothing) * m
    to_each = smoothing / classes
    base = finite(maximum)
    to_share = (to_own + to_each * every) / total  # exp(l − m) / s is more exact than exp(l − log Z)
    for start in range(0, classes, BN):
        columns = start + tl.arange(0, BN)
        inside = columns < classes
        tile = tl.load(logits_row + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        logits = capped(tile, softcap)
        acc = to_share[:, None] * tl.exp(logits - base[:, None])
        acc -= tl.where((columns == target)[None, :], to_own, 0.0)
        if class_weight_ptr is None:
            acc -= to_each
        else:
            acc -= to_each * tl.load(class_weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if softcap is not None:
            acc *= tanh_slope(tile / softcap)
        acc = tl.where(counted, acc, 0.0).to(logits_ptr.dtype.element_ty)
        tl.store(logits_row[None, None] + columns[None, :], acc, mask=inside[None, :])
