# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of losses over a table of rows: log Z, cross entropy and their gradients without logits in memory.

The table is a codebook with B_j beside it, or a dense head with its bias: x_nj = h_n·row_j + offset_j. A program forms
one tile of x, reduces it over its columns and forgets it; another kernel reduces over the tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rewriter.kernels.vq_logits.kernels import code_number, dot_tile


@triton.jit
def _finite(x):
    """Something to subtract before the exponential: x, or 0 where that is infinite."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def code_of_target(target, code_of, rows, positions, tokens, ignored, BYTES: tl.constexpr):
    """Code of each position's target int32, -1 for a target that is ignored or no token; and the target."""
    y = tl.load(target + rows, mask=rows < positions, other=ignored)
    is_token = (y != ignored) & (y >= 0) & (y < tokens)
    code = code_number(code_of, tl.where(is_token, y, 0), is_token, BYTES)
    return tl.where(is_token, code, -1), y


@triton.jit
def tile_losses(
    h, table, offset, target, code_of, share, log_z, picked, shared,
    positions, entries, tokens, width, share_stride, ignored,
    PRECISION: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Per tile t of columns: log_z[t, n] = log Σ_j e^{x_nj}; optional are

    * with a target: picked[n] = h_n·row_j of the target's code j (written by the one tile that has it);
    * with a share: shared[t, n] = Σ_j share_nj (h_n·row_j), share ``[positions, share_stride]`` (stride 0: one row for
      all). Without offset, as everything but log Z is.
    """
    tile = tl.program_id(0)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row, is_entry = rows < positions, columns < entries
    logits = dot_tile(h, table, rows, columns, positions, entries, width, PRECISION, ROWS, COLUMNS, WIDTH)
    x = logits
    if offset is not None:
        x += tl.load(offset + columns, mask=is_entry, other=0.0).to(tl.float32)[None, :]
    x = tl.where(is_entry[None, :], x, float("-inf"))
    # log Σ_j e^{x_j} = m + log Σ_j e^{x_j − m}
    top = _finite(tl.max(x, axis=1))
    total = tl.log(tl.sum(tl.exp(x - top[:, None]), axis=1)) + top
    tl.store(log_z + tile.to(tl.int64) * positions + rows, total, mask=is_row)
    if target is not None:
        own, _ = code_of_target(target, code_of, rows, positions, tokens, ignored, BYTES)
        logit = tl.sum(tl.where(columns[None, :] == own[:, None], logits, 0.0), axis=1)
        here = (own >= tile * COLUMNS) & (own < tile * COLUMNS + COLUMNS)
        tl.store(picked + rows, logit, mask=is_row & here)
    if share is not None:
        place = rows.to(tl.int64)[:, None] * share_stride + columns[None, :]
        s = tl.load(share + place, mask=is_row[:, None] & is_entry[None, :], other=0.0)
        part = tl.sum(tl.where(s == 0, 0.0, s * logits), axis=1)  # nothing is on a code without tokens
        tl.store(shared + tile.to(tl.int64) * positions + rows, part, mask=is_row)


@triton.jit
def _over_tiles(log_z, rows, positions, tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    """log Σ_t e^{log_z[t, n]}. Tiles are reduced once, at the end."""
    is_row = (rows < positions)[:, None]
    tops = tl.full((ROWS, TILES), float("-inf"), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        place = tile.to(tl.int64)[None, :] * positions + rows[:, None]
        tops = tl.maximum(tops, tl.load(log_z + place, mask=is_row & (tile < tiles)[None, :], other=float("-inf")))
    top = _finite(tl.max(tops, axis=1))
    totals = tl.zeros((ROWS, TILES), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        place = tile.to(tl.int64)[None, :] * positions + rows[:, None]
        x = tl.load(log_z + place, mask=is_row & (tile < tiles)[None, :], other=float("-inf"))
        totals += tl.exp(x - top[:, None])
    return tl.log(tl.sum(totals, axis=1)) + top


@triton.jit
def total_logsumexp(log_z, out, positions, tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    """out[n] = log Σ_t e^{log_z[t, n]}, over the tiles."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = _over_tiles(log_z, rows, positions, tiles, ROWS, TILES)
    tl.store(out + rows, total, mask=rows < positions)


@triton.jit
def total_loss(
    log_z, picked, shared, target, bias, weight, share_total, share_bias, out_log_z, out,
    positions, tiles, tokens, ignored, own_factor, share_factor,
    HAS_TARGET: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Cross entropy from what the tiles found, and log Z with it.

        out = f w_y (log Z − l_{M(y)} − b_y) + g Σ_i t_i (log Z − l_{M(i)} − b_i)

    with f = own_factor, g = share_factor; Σ_i t_i l_{M(i)} = Σ_tiles shared, Σ_i t_i = share_total and
    Σ_i t_i b_i = share_bias, of one number (HAS_TARGET) or one per position. 0 where the target is ignored, NaN where
    it is no token.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < positions
    total = _over_tiles(log_z, rows, positions, tiles, ROWS, TILES)
    tl.store(out_log_z + rows, total, mask=is_row)
    loss = tl.zeros((ROWS,), dtype=tl.float32)
    if shared is not None:
        parts = tl.zeros((ROWS, TILES), dtype=tl.float32)
        for start in range(0, tiles, TILES):
            tile = start + tl.arange(0, TILES)
            inside = (tile < tiles)[None, :] & is_row[:, None]
            place = tile.to(tl.int64)[None, :] * positions + rows[:, None]
            parts += tl.load(shared + place, mask=inside, other=0.0)
        part = tl.sum(parts, axis=1)
        if HAS_TARGET:
            mass, biases = tl.load(share_total), tl.load(share_bias)
        else:
            mass = tl.load(share_total + rows, mask=is_row, other=0.0)
            biases = tl.load(share_bias + rows, mask=is_row, other=0.0)
        loss = share_factor * (mass * total - part - biases)
    if HAS_TARGET:
        y = tl.load(target + rows, mask=is_row, other=ignored)
        is_token = (y != ignored) & (y >= 0) & (y < tokens)
        own = total - tl.load(picked + rows, mask=is_token, other=0.0)
        if bias is not None:
            own -= tl.load(bias + y, mask=is_token, other=0.0).to(tl.float32)
        own *= own_factor
        if weight is not None:
            own *= tl.load(weight + y, mask=is_token, other=0.0).to(tl.float32)
        loss = tl.where(is_token, loss + own, tl.where(y == ignored, 0.0, float("nan")))
    tl.store(out + rows, loss, mask=is_row)


@triton.jit
def tile_gradients(
    h, table, offset, log_z, total, sums, share, share_of, target, own_of, code_of, out, column_sums,
    positions, entries, tokens, width, ignored,
    PRECISION: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradient at the logits of the table's rows, ``[positions, entries]`` in out's dtype:

        out_nj = total_n p_nj + sums_nj + share_of_n share_j + own_of_n [j is the code of target n],   p = e^{x − log Z}

    the last three optional. column_sums ``[row tiles, entries]``, optional: Σ_n total_n p_nj of the tile's positions.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row, is_entry = rows < positions, columns < entries
    inside = is_row[:, None] & is_entry[None, :]
    place = rows.to(tl.int64)[:, None] * entries + columns[None, :]
    x = dot_tile(h, table, rows, columns, positions, entries, width, PRECISION, ROWS, COLUMNS, WIDTH)
    if offset is not None:
        x += tl.load(offset + columns, mask=is_entry, other=float("-inf")).to(tl.float32)[None, :]
    # p_j = exp(l_j + B_j − log Z)
    z = tl.load(log_z + rows, mask=is_row, other=0.0)
    factor = tl.load(total + rows, mask=is_row, other=0.0)
    gradient = tl.where(inside, tl.exp(x - z[:, None]) * factor[:, None], 0.0)
    if column_sums is not None:
        tl.store(
            column_sums + tl.program_id(1).to(tl.int64) * entries + columns, tl.sum(gradient, axis=0), mask=is_entry
        )
    if sums is not None:
        gradient += tl.load(sums + place, mask=inside, other=0.0)
    if share is not None:
        part = tl.load(share + columns, mask=is_entry, other=0.0)[None, :]
        gradient += tl.load(share_of + rows, mask=is_row, other=0.0)[:, None] * part
    if target is not None:
        own, _ = code_of_target(target, code_of, rows, positions, tokens, ignored, BYTES)
        value = tl.load(own_of + rows, mask=is_row, other=0.0)
        gradient += tl.where(columns[None, :] == own[:, None], value[:, None], 0.0)
    tl.store(out + place, gradient.to(out.dtype.element_ty), mask=inside)
