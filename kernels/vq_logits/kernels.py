# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of codebook heads with whole rows: logits of codes, expansion to tokens, and sums over a code's tokens.

Code logits stand *transposed* between the kernels, ``[K, positions]``: then the tokens of a tile of logits read one
contiguous run of positions each, where ``[positions, K]`` would have them read single numbers all over a row.
"""

# mypy: ignore-errors
# The language of kernels has no types that Python knows.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def code_number(codes, place, inside, BYTES: tl.constexpr):
    """Σ over bytes of byte · 256^position; ``place`` counts numbers, of BYTES bytes each."""
    first = codes + place.to(tl.int64) * BYTES
    number = tl.load(first, mask=inside, other=0).to(tl.int32)
    for byte in tl.static_range(1, BYTES):
        number += tl.load(first + byte, mask=inside, other=0).to(tl.int32) << (8 * byte)
    return number


@triton.jit
def dot_tile(
    h, table, rows, columns, positions, entries, width,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """h[rows]·table[columns]ᵀ in float32; h ``[positions, width]``, table ``[entries, width]``, both contiguous."""
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    h_rows = h + rows.to(tl.int64)[:, None] * width
    table_rows = table + columns.to(tl.int64)[None, :] * width
    for start in range(0, width, WIDTH):
        features = start + tl.arange(0, WIDTH)
        x = tl.load(
            h_rows + features[None, :], mask=(rows < positions)[:, None] & (features < width)[None, :], other=0.0
        )
        # hook: prologue(x, rows, features)
        c = tl.load(
            table_rows + features[:, None],
            mask=(features < width)[:, None] & (columns < entries)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, c.to(x.dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def code_logits(
    h, codebook, out, positions, codes, width, stride,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out[j, n] = h_n·C_j; out ``[codes, stride]``, of which the first ``positions`` columns are written."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    acc = dot_tile(h, codebook, rows, columns, positions, codes, width, PRECISION, ROWS, COLUMNS, WIDTH)
    inside = (rows < positions)[:, None] & (columns < codes)[None, :]
    place = columns.to(tl.int64)[None, :] * stride + rows[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def expand(
    table, code_of, bias, log_z, out, positions, tokens, codes, stride,
    BYTES: tl.constexpr, STAGES: tl.constexpr, EXP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[n, i] = Σ_s table[s, a_s(i), n] + b_i − log Z_n, the last two optional, and e to that with EXP.

    table ``[STAGES, codes, stride]``, code_of ``[tokens, STAGES, BYTES]``, out ``[positions, tokens]``.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_token = columns < tokens
    inside = (rows < positions)[:, None] & is_token[None, :]
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for stage in tl.static_range(STAGES):
        code = code_number(code_of, columns.to(tl.int64) * STAGES + stage, is_token, BYTES) + stage * codes
        logits = tl.load(table + code.to(tl.int64)[None, :] * stride + rows[:, None], mask=inside, other=0.0)
        acc += logits.to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + columns, mask=is_token, other=0.0).to(tl.float32)[None, :]
    if log_z is not None:
        acc -= tl.load(log_z + rows, mask=rows < positions, other=0.0)[:, None]
    if EXP:
        acc = tl.exp(acc)
    # hook: epilogue(acc, rows, columns, inside)
    tl.store(out + rows.to(tl.int64)[:, None] * tokens + columns[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def code_top(code_of, bias, out, tokens, codes, BYTES: tl.constexpr, CODES: tl.constexpr, TOKENS: tl.constexpr):
    """out[j] = max b_i over the tokens of code j, ``[codes]``; -inf for a code without tokens."""
    mine = tl.program_id(0) * CODES + tl.arange(0, CODES)
    tops = tl.full((CODES, TOKENS), float("-inf"), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        code = code_number(code_of, token, token < tokens, BYTES)
        b = tl.load(bias + token, mask=token < tokens, other=float("-inf")).to(tl.float32)
        hit = (code[None, :] == mine[:, None]) & (token < tokens)[None, :]
        tops = tl.maximum(tops, tl.where(hit, b[None, :], float("-inf")))
    tl.store(out + mine, tl.max(tops, axis=1), mask=mine < codes)


@triton.jit
def code_total(
    code_of, values, top, out, tokens, codes,
    LOG: tl.constexpr, BYTES: tl.constexpr, CODES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out[j] = Σ over the tokens of code j, ``[codes]``; -inf with LOG for a code without tokens.

    Of 1 without values, of e^{value − top} with ``top``, else of the values; LOG: log of the sum, plus top. Every
    program looks at all tokens and picks those of its codes: K·V comparisons, but no order of additions that changes
    from run to run, as with atomics, and no sorting.
    """
    mine = tl.program_id(0) * CODES + tl.arange(0, CODES)
    totals = tl.zeros((CODES, TOKENS), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        is_token = token < tokens
        code = code_number(code_of, token, is_token, BYTES)
        if values is None:
            value = tl.full((TOKENS,), 1.0, dtype=tl.float32)
        else:
            value = tl.load(values + token, mask=is_token, other=0.0).to(tl.float32)
        if top is not None:
            high = tl.load(top + code, mask=is_token, other=0.0)
            value = tl.exp(value - tl.where(tl.abs(high) == float("inf"), 0.0, high))
        hit = (code[None, :] == mine[:, None]) & is_token[None, :]
        totals += tl.where(hit, value[None, :], 0.0)
    total = tl.sum(totals, axis=1)
    if LOG:
        used = total > 0
        total = tl.where(used, tl.log(tl.where(used, total, 1.0)), float("-inf"))
        if top is not None:
            high = tl.load(top + mine, mask=mine < codes, other=0.0)
            total += tl.where(tl.abs(high) == float("inf"), 0.0, high)
    tl.store(out + mine, total, mask=mine < codes)


@triton.jit
def _segment_add(first_code, first, second_code, second):
    """Sums that start anew with each code, over tokens ordered by code."""
    return second_code, tl.where(first_code == second_code, first + second, second)


@triton.jit
def segment_sums(
    grad, order, ordered_code, bounds, out, positions, tokens, codes, out_stride, per_part,
    ROWS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """out[n, j] = Σ over the tokens i of code j of grad[n, i]; out is zero before, ``[positions, out_stride]``.

    Args:
        order: tokens ordered by code, int64 ``[tokens]``.
        ordered_code: their codes, int32 ``[tokens]``.
        bounds: where the tokens of each code begin in that order, int32 ``[codes + 1]``.

    A program reads few rows again and again in another order, so that all but the first reads come from the cache.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first_code = tl.program_id(1) * per_part
    begin = tl.load(bounds + first_code)
    end = tl.load(bounds + tl.minimum(first_code + per_part, codes))
    grad_rows = grad + rows.to(tl.int64)[:, None] * tokens
    out_rows = out + rows.to(tl.int64)[:, None] * out_stride
    is_row = (rows < positions)[:, None]
    open_code = tl.full((1,), -1, dtype=tl.int32)
    carried = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(begin, end, PLACES):
        place = start + tl.arange(0, PLACES)
        is_place = place < end
        token = tl.load(order + place, mask=is_place, other=0)
        code = tl.load(ordered_code + place, mask=is_place, other=codes)
        x = tl.load(grad_rows + token[None, :], mask=is_row & is_place[None, :], other=0.0).to(tl.float32)
        columns = tl.broadcast_to(code[None, :], (ROWS, PLACES))
        columns, sums = tl.associative_scan((columns, x), 1, _segment_add)
        sums = tl.where(columns == open_code[None, :], sums + carried[:, None], sums)
        following = tl.load(ordered_code + place + 1, mask=place + 1 < end, other=codes)
        is_last = is_place & (code != following)
        tl.store(out_rows + code[None, :], sums, mask=is_row & is_last[None, :])
        # What the last place has so far belongs to a code that may go on in the next turn.
        at_end = tl.arange(0, PLACES) == PLACES - 1
        carried = tl.sum(tl.where(at_end[None, :], sums, 0.0), axis=1)
        open_code = tl.full((1,), 0, dtype=tl.int32) + tl.sum(tl.where(at_end, code, 0), axis=0)
