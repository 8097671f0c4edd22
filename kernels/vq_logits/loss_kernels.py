# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of losses over a table of rows: log Z, cross entropy and their gradients without logits in memory.

The table is a codebook with B_j beside it, or a dense head with its bias: x_nj = h_n·row_j + offset_j. A program forms
one tile of x, reduces it over its columns and forgets it; another kernel reduces over the tiles.
"""

# mypy: ignore-errors
# The language of kernels has no types that Python knows.

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
    h, table, offset, target, code_of, share, tops, sums, picked, shared, shares,
    positions, entries, tokens, width, share_stride, ignored,
    PRECISION: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Per tile t of columns, all ``[tiles, positions]``: tops[t, n] = max_j x_nj and sums[t, n] = Σ_j e^{x_nj − top}.
    Optional are

    * with a target: picked[n] = x_nj of the target's code j (written by the one tile that has it);
    * with a share: shared[t, n] = Σ_j share_nj (x_nj − top) and shares[t, n] = Σ_j share_nj, where share is
      ``[positions, share_stride]`` (stride 0: one row for all).

    Everything is relative to the tile's largest x, since what follows are differences: log Z as one number would be
    rounded to the precision of x, not to that of a loss.
    """
    tile = tl.program_id(0)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row, is_entry = rows < positions, columns < entries
    x = dot_tile(h, table, rows, columns, positions, entries, width, PRECISION, ROWS, COLUMNS, WIDTH)
    if offset is not None:
        x += tl.load(offset + columns, mask=is_entry, other=0.0).to(tl.float32)[None, :]
    x = tl.where(is_entry[None, :], x, float("-inf"))
    place = tile.to(tl.int64) * positions + rows
    top = tl.max(x, axis=1)
    shift = _finite(top)[:, None]
    tl.store(tops + place, top, mask=is_row)
    tl.store(sums + place, tl.sum(tl.exp(x - shift), axis=1), mask=is_row)
    if target is not None:
        own, _ = code_of_target(target, code_of, rows, positions, tokens, ignored, BYTES)
        mine = tl.sum(tl.where(columns[None, :] == own[:, None], x, 0.0), axis=1)
        here = (own >= tile * COLUMNS) & (own < tile * COLUMNS + COLUMNS)
        tl.store(picked + rows, mine, mask=is_row & here)
    if share is not None:
        at = rows.to(tl.int64)[:, None] * share_stride + columns[None, :]
        s = tl.load(share + at, mask=is_row[:, None] & is_entry[None, :], other=0.0)
        part = tl.sum(tl.where(s == 0, 0.0, s * (x - shift)), axis=1)  # nothing is on a code without tokens
        tl.store(shared + place, part, mask=is_row)
        tl.store(shares + place, tl.sum(s, axis=1), mask=is_row)


@triton.jit
def _over_tiles(tops, sums, rows, positions, tiles, ROWS: tl.constexpr, TILES: tl.constexpr):
    """The largest x, 0 if that is infinite, and Σ e^{x − it}. Tiles are reduced once, at the end."""
    is_row = (rows < positions)[:, None]
    highest = tl.full((ROWS, TILES), float("-inf"), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        place = tile.to(tl.int64)[None, :] * positions + rows[:, None]
        high = tl.load(tops + place, mask=is_row & (tile < tiles)[None, :], other=float("-inf"))
        highest = tl.maximum(highest, high)
    top = _finite(tl.max(highest, axis=1))
    totals = tl.zeros((ROWS, TILES), dtype=tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = is_row & (tile < tiles)[None, :]
        place = tile.to(tl.int64)[None, :] * positions + rows[:, None]
        high = tl.load(tops + place, mask=inside, other=float("-inf"))  # as of a tile of codes without tokens
        totals += tl.load(sums + place, mask=inside, other=0.0) * tl.exp(high - top[:, None])
    return top, tl.sum(totals, axis=1)


@triton.jit
def total_logsumexp(
    tops, sums, out, out_top, positions, tiles, ROWS: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """out[n] = log Z_n; with out_top ``[positions]`` in two parts, the largest x there and log Z less it in out."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    top, total = _over_tiles(tops, sums, rows, positions, tiles, ROWS, TILES)
    log_z = tl.log(total)
    if out_top is None:
        log_z += top
    else:
        tl.store(out_top + rows, top, mask=rows < positions)
    tl.store(out + rows, log_z, mask=rows < positions)


@triton.jit
def total_loss(
    tops, sums, picked, shared, shares, target, code_of, offset, bias, weight, share_within, out,
    positions, tiles, tokens, ignored, own_factor, share_factor,
    HAS_TARGET: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Cross entropy from what the tiles found:

        out = −f w_y log p(y) − g Σ_i t_i log p(i),   log p(i) = (x_{M(i)} − log Z) + (b_i − offset_{M(i)})

    with f = own_factor, g = share_factor; t summed per code is what the tiles had as share, and share_within is
    Σ_i t_i (b_i − offset_{M(i)}), one number (HAS_TARGET) or one per position. 0 where the target is ignored, NaN where
    it is no token.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < positions
    top, total = _over_tiles(tops, sums, rows, positions, tiles, ROWS, TILES)
    log_total = tl.log(total)
    loss = tl.zeros((ROWS,), dtype=tl.float32)
    if shared is not None:
        parts = tl.zeros((ROWS, TILES), dtype=tl.float32)
        for start in range(0, tiles, TILES):
            tile = start + tl.arange(0, TILES)
            inside = (tile < tiles)[None, :] & is_row[:, None]
            place = tile.to(tl.int64)[None, :] * positions + rows[:, None]
            # Σ_j t_j (x_j − log Z) of a tile, from sums relative to its own largest x
            high = _finite(tl.load(tops + place, mask=inside, other=0.0))
            mass = tl.load(shares + place, mask=inside, other=0.0)
            parts += tl.load(shared + place, mask=inside, other=0.0) + mass * (
                (high - top[:, None]) - log_total[:, None]
            )
        part = tl.sum(parts, axis=1)
        if HAS_TARGET:
            within = tl.load(share_within)
        else:
            within = tl.load(share_within + rows, mask=is_row, other=0.0)
        loss = -share_factor * (part + within)
    if HAS_TARGET:
        code, y = code_of_target(target, code_of, rows, positions, tokens, ignored, BYTES)
        is_token = code >= 0
        within = -tl.load(offset + code, mask=is_token, other=0.0)
        if bias is not None:
            within += tl.load(bias + y, mask=is_token, other=0.0).to(tl.float32)
        own = (tl.load(picked + rows, mask=is_token, other=0.0) - top - log_total) + within
        own *= own_factor
        if weight is not None:
            own *= tl.load(weight + y, mask=is_token, other=0.0).to(tl.float32)
        loss = tl.where(is_token, loss - own, tl.where(y == ignored, 0.0, float("nan")))
    tl.store(out + rows, loss, mask=is_row)


@triton.jit
def tile_gradients(
    h, table, offset, top, log_z, total, sums, share, share_of, target, own_of, code_of, out, column_sums,
    positions, entries, tokens, width, ignored,
    PRECISION: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradient at the logits of the table's rows, ``[positions, entries]`` in out's dtype:

        out_nj = total_n p_nj + sums_nj + share_of_n share_j + own_of_n [j is the code of target n]

    the last three optional; p = e^{x − top − log_z}, where top is optional too (0). column_sums ``[row tiles, entries]``,
    optional: Σ_n total_n p_nj of the tile's positions.
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
    if top is not None:
        x -= tl.load(top + rows, mask=is_row, other=0.0)[:, None]
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
