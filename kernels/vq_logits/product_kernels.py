# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of product codebooks: look-up tables for few positions, products with decoded tiles for more.

A code stands for ``dims`` numbers that lie together, so a tile of rows is loaded with one run per code, ``[tokens,
groups, DIMS]``, DIMS being dims rounded up to a power of two. Features of h are put in the same order.
"""

# mypy: ignore-errors
# The language of kernels has no types that Python knows.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def build_tables(
    h, codebook, out, positions, codes, dims, width,
    ROWS: tl.constexpr, CODES: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """out[g, c, n] = h_n's group g · C[g, c], float32 ``[groups, codes, ROWS]``; 0 for rows that are no positions."""
    group = tl.program_id(0)
    code = tl.program_id(1) * CODES + tl.arange(0, CODES)
    rows = tl.arange(0, ROWS)
    r = tl.arange(0, DIMS)
    feature = group * dims + r
    is_feature = (r < dims) & (feature < width)
    x = tl.load(
        h + rows[:, None] * width + feature[None, :], mask=(rows < positions)[:, None] & is_feature[None, :], other=0.0
    )
    entry = (group.to(tl.int64) * codes + code) * dims
    c = tl.load(
        codebook + entry[:, None] + r[None, :], mask=(code < codes)[:, None] & is_feature[None, :], other=0.0
    ).to(x.dtype)  # as the reference rounds it
    products = c.to(tl.float32)[:, None, :] * x.to(tl.float32)[None, :, :]
    place = (group.to(tl.int64) * codes + code)[:, None] * ROWS + rows[None, :]
    tl.store(out + place, tl.sum(products, axis=2), mask=(code < codes)[:, None])


@triton.jit
def sum_tables(
    tables, codes_of, bias, out, positions, tokens, groups, codes,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """out[n, i] = Σ_g tables[g, codes_of[i, g], n] + bias_i; tables as `build_tables` leaves them.

    All programs go through the groups in the same order, so that the few tables in use stay in the nearest cache.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.arange(0, ROWS)
    is_token = columns < tokens
    total = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for start in range(0, groups, GROUPS):
        group = start + tl.arange(0, GROUPS)
        listed = is_token[:, None] & (group < groups)[None, :]
        code = tl.load(codes_of + columns.to(tl.int64)[:, None] * groups + group[None, :], mask=listed, other=0)
        entry = (group[None, :] * codes + code.to(tl.int32)) * ROWS
        total += tl.sum(
            tl.load(tables + entry[:, :, None] + rows[None, None, :], mask=listed[:, :, None], other=0.0), axis=1
        )
    acc = tl.trans(total)
    if bias is not None:
        acc += tl.load(bias + columns, mask=is_token, other=0.0).to(tl.float32)[None, :]
    inside = (rows < positions)[:, None] & is_token[None, :]
    # hook: epilogue(acc, rows, columns, inside)
    place = rows.to(tl.int64)[:, None] * tokens + columns[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decoded_tile(
    codebook, codes_of, columns, start, tokens, groups, codes, dims, width,
    COLUMNS: tl.constexpr, GROUPS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Rows ``columns`` of the head in the groups from ``start`` on: ``[COLUMNS, GROUPS·DIMS]`` in the codebook's dtype;
    0 beyond a group's dims and beyond the width."""
    group = start + tl.arange(0, GROUPS)
    r = tl.arange(0, DIMS)
    listed = (columns < tokens)[:, None] & (group < groups)[None, :]
    code = tl.load(codes_of + columns.to(tl.int64)[:, None] * groups + group[None, :], mask=listed, other=0)
    entry = (group[None, :] * codes + code.to(tl.int32)) * dims
    is_feature = (r < dims)[None, :] & (group[:, None] * dims + r[None, :] < width)
    tile = tl.load(
        codebook + entry[:, :, None] + r[None, None, :], mask=listed[:, :, None] & is_feature[None, :, :], other=0.0
    )
    return tl.reshape(tile, (COLUMNS, GROUPS * DIMS))


@triton.jit
def product_logits(
    h, codebook, codes_of, bias, out, positions, tokens, groups, codes, dims, width,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """out[n, i] = h_n·ŵ_i + bias_i, ``[positions, tokens]``, decoding the rows ŵ tile by tile."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, GROUPS * DIMS)
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, groups, GROUPS):
        features = (start + inner // DIMS) * dims + inner % DIMS
        is_feature = (inner % DIMS < dims) & (features < width)
        x = tl.load(
            h + rows.to(tl.int64)[:, None] * width + features[None, :],
            mask=(rows < positions)[:, None] & is_feature[None, :],
            other=0.0,
        )
        # hook: prologue(x, rows, features)
        w = decoded_tile(codebook, codes_of, columns, start, tokens, groups, codes, dims, width, COLUMNS, GROUPS, DIMS)
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + columns, mask=columns < tokens, other=0.0).to(tl.float32)[None, :]
    inside = (rows < positions)[:, None] & (columns < tokens)[None, :]
    # hook: epilogue(acc, rows, columns, inside)
    place = rows.to(tl.int64)[:, None] * tokens + columns[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def decode_rows(
    codebook, codes_of, out, tokens, groups, codes, dims, width,
    COLUMNS: tl.constexpr, GROUPS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """The rows themselves, ``[tokens, width]`` in out's dtype."""
    token = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.program_id(1) * GROUPS
    inner = tl.arange(0, GROUPS * DIMS)
    features = (start + inner // DIMS) * dims + inner % DIMS
    is_feature = (inner % DIMS < dims) & (features < width)
    tile = decoded_tile(codebook, codes_of, token, start, tokens, groups, codes, dims, width, COLUMNS, GROUPS, DIMS)
    place = token.to(tl.int64)[:, None] * width + features[None, :]
    tl.store(out + place, tile.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & is_feature[None, :])


@triton.jit
def add_to_codebook(
    dense, codes_of, out, tokens, groups, codes, dims, width,
    TOKENS: tl.constexpr, CODES: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """out[g, c] += Σ over the tokens i with codes_of[i, g] = c of dense[i]'s group g; float32 ``[groups, codes, dims]``.

    A program picks the tokens of its codes from all of them, in one order, where atomic additions would have none.
    """
    group = tl.program_id(0)
    mine = tl.program_id(1) * CODES + tl.arange(0, CODES)
    r = tl.arange(0, DIMS)
    feature = group * dims + r
    is_feature = (r < dims) & (feature < width)
    total = tl.zeros((CODES, DIMS), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        is_token = token < tokens
        code = tl.load(codes_of + token.to(tl.int64) * groups + group, mask=is_token, other=0).to(tl.int32)
        x = tl.load(
            dense + token.to(tl.int64)[:, None] * width + feature[None, :],
            mask=is_token[:, None] & is_feature[None, :],
            other=0.0,
        ).to(tl.float32)
        hit = (code[:, None] == mine[None, :]) & is_token[:, None]
        total += tl.sum(tl.where(hit[:, :, None], x[:, None, :], 0.0), axis=0)
    place = out + (group.to(tl.int64) * codes + mine)[:, None] * dims + r[None, :]
    inside = (mine < codes)[:, None] & (r < dims)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)
