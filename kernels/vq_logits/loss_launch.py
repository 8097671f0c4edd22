# SPDX-License-Identifier: Apache-2.0
"""Losses of heads on a GPU: log Z, cross entropy and their gradients, from tiles of logits that are never stored.

Common to codebook heads, whose rows are codes that weigh B_j, and to heads with a row per token. What depends on the
parameters only (B_j, sums of class weights over codes) takes K·V comparisons, of which a GPU does trillions a second,
and is made anew at each call: the parameters may have changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.kernels.launching import Config, launch, precision
from rewriter.kernels.vq_logits import kernels, loss_kernels
from rewriter.kernels.vq_logits.codec import unpack_codes
from rewriter.kernels.vq_logits.reference import IGNORE_INDEX, log_within
from rewriter.kernels.vq_logits.tiers_launch import cdiv, dot_blocks, require, rows_of, sums_by_code, through_table

_BY_CODE = [Config({"CODES": 8, "TOKENS": 512}, 4, 1)]
_OVER_TILES = [Config({"ROWS": 32, "TILES": 16}, 4, 1)]
# Rows of a dense head whose gradients are alive at a time.
CHUNK = 8192


def loss_blocks(positions: int, dtype: torch.dtype) -> tuple[dict[str, int], list[Config]]:
    """Tiles of logits that are reduced where they are: the exponentials take registers beside the product."""
    blocks, configs = dot_blocks(positions, dtype)
    if blocks["ROWS"] == 128:
        return {"ROWS": 128, "COLUMNS": 128}, [Config({"WIDTH": 64}, 8, 2)]
    return blocks, configs


# -- sums over the tokens of each code, from parameters alone ---------------------------------------------------------


def log_mass(code_of: Tensor, token_bias: Tensor | None, codes: int) -> Tensor:
    """B_j = log Σ_{M(i)=j} exp b_i, float32 ``[K]``; log n_j without bias; -inf for unused codes."""
    if token_bias is None:
        return total_by_code(code_of, None, codes, log=True)
    top = torch.empty(codes, dtype=torch.float32, device=code_of.device)
    launch(
        kernels.code_top,
        lambda c: (cdiv(codes, c["CODES"]),),
        {"code_of": code_of.contiguous(), "bias": token_bias.contiguous(), "out": top, "tokens": code_of.shape[0],
         "codes": codes},
        {"BYTES": code_of.shape[1]},
        _BY_CODE,
    )  # fmt: skip
    return total_by_code(code_of, token_bias, codes, top=top, log=True)


def total_by_code(
    code_of: Tensor, values: Tensor | None, codes: int, *, top: Tensor | None = None, log: bool = False
) -> Tensor:
    """Σ over the tokens of each code, float32 ``[K]``: of 1, of values ``[V]``, or of e^{value − top}; see the kernel."""
    out = torch.empty(codes, dtype=torch.float32, device=code_of.device)
    launch(
        kernels.code_total,
        lambda c: (cdiv(codes, c["CODES"]),),
        {"code_of": code_of.contiguous(), "values": None if values is None else values.contiguous(), "top": top,
         "out": out, "tokens": code_of.shape[0], "codes": codes},
        {"BYTES": code_of.shape[1], "LOG": log},
        _BY_CODE,
    )  # fmt: skip
    return out


# -- forward -----------------------------------------------------------------------------------------------------


class Tiles:
    """Reductions of the tiles of x_nj = h_n·row_j + offset_j over their columns; see `loss_kernels.tile_losses`.

    Args:
        flat: ``[N, d]``.
        table: contiguous ``[K, d]``; its offset ``[K]``.
        code_of, target: with them the x of the targets' codes are kept; ``ignored`` is the target that has none.
        share: float32 ``[K]`` or ``[N, K]``: with it Σ_j share_j x_j is kept.
    """

    def __init__(
        self,
        flat: Tensor,
        table: Tensor,
        offset: Tensor | None,
        *,
        code_of: Tensor | None = None,
        target: Tensor | None = None,
        ignored: int = IGNORE_INDEX,
        share: Tensor | None = None,
    ) -> None:
        positions, width = flat.shape
        entries = table.shape[0]
        blocks, configs = loss_blocks(positions, flat.dtype)
        self.positions, self.number = positions, cdiv(entries, blocks["COLUMNS"])
        self.offset, self.code_of, self.target, self.ignored = offset, code_of, target, ignored
        self.tops = flat.new_empty((self.number, positions), dtype=torch.float32)
        self.sums = torch.empty_like(self.tops)
        self.picked = None if target is None else flat.new_empty(positions, dtype=torch.float32)
        self.shared = None if share is None else torch.empty_like(self.tops)
        self.shares = None if share is None else torch.empty_like(self.tops)
        launch(
            loss_kernels.tile_losses,
            lambda c: (self.number, cdiv(positions, c["ROWS"])),
            {"h": flat, "table": table, "offset": offset, "target": target, "code_of": code_of, "share": share,
             "tops": self.tops, "sums": self.sums, "picked": self.picked, "shared": self.shared, "shares": self.shares,
             "positions": positions, "entries": entries, "tokens": 0 if code_of is None else code_of.shape[0],
             "width": width, "share_stride": 0 if share is None or share.dim() == 1 else share.stride(0),
             "ignored": ignored},
            {"PRECISION": precision(flat.dtype), "BYTES": 1 if code_of is None else code_of.shape[1], **blocks},
            configs,
        )  # fmt: skip

    def log_z(self) -> Tensor:
        """log Z, float32 ``[N]``."""
        return self._total(None)

    def log_z_in_parts(self) -> tuple[Tensor, Tensor]:
        """The largest x, and log Z less it; float32 ``[N]`` both."""
        top = self.tops.new_empty(self.positions)
        return top, self._total(top)

    def _total(self, top: Tensor | None) -> Tensor:
        out = self.tops.new_empty(self.positions)
        launch(
            loss_kernels.total_logsumexp,
            lambda c: (cdiv(self.positions, c["ROWS"]),),
            {"tops": self.tops, "sums": self.sums, "out": out, "out_top": top, "positions": self.positions,
             "tiles": self.number},
            {},
            _OVER_TILES,
        )  # fmt: skip
        return out

    def loss(
        self,
        *,
        bias: Tensor | None = None,
        weight: Tensor | None = None,
        factors: tuple[float, float] = (1.0, 1.0),
        share_within: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy, float32 ``[N]``; see `loss_kernels.total_loss`."""
        out = self.tops.new_empty(self.positions)
        code_of = self.code_of
        launch(
            loss_kernels.total_loss,
            lambda c: (cdiv(self.positions, c["ROWS"]),),
            {"tops": self.tops, "sums": self.sums, "picked": self.picked, "shared": self.shared,
             "shares": self.shares, "target": self.target, "code_of": code_of, "offset": self.offset, "bias": bias,
             "weight": weight, "share_within": share_within, "out": out, "positions": self.positions,
             "tiles": self.number, "tokens": 0 if code_of is None else code_of.shape[0], "ignored": self.ignored,
             "own_factor": factors[0], "share_factor": factors[1]},
            {"HAS_TARGET": self.target is not None, "BYTES": 1 if code_of is None else code_of.shape[1]},
            _OVER_TILES,
        )  # fmt: skip
        return out


def logsumexp(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """`vq_tiers_logsumexp`."""
    require(h, codebook, code_of, token_bias)
    mass = log_mass(code_of, token_bias, codebook.shape[0])
    return Tiles(rows_of(h), codebook.contiguous(), mass).log_z().reshape(h.shape[:-1])


def nll(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, target: Tensor) -> Tensor:
    """`vq_tiers_nll`; NaN for a target that is no token, which the reference refuses."""
    return cross_entropy(h, codebook, code_of, token_bias, target, None, 0.0, IGNORE_INDEX)


def cross_entropy(
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """`vq_tiers_cross_entropy`; NaN for a target that is no token, which the reference refuses."""
    require(h, codebook, code_of, token_bias, weight)
    codes, tokens = codebook.shape[0], code_of.shape[0]
    mass, code_of, target = log_mass(code_of, token_bias, codes), code_of.contiguous(), target.reshape(-1).contiguous()
    share = within = None
    if label_smoothing:
        share = total_by_code(code_of, weight, codes)
        log_within = within_codes(code_of, token_bias, mass)
        within = (log_within if weight is None else log_within * weight.float()).sum()
    tiles = Tiles(
        rows_of(h), codebook.contiguous(), mass, code_of=code_of, target=target, ignored=ignore_index, share=share
    )
    loss = tiles.loss(
        bias=None if token_bias is None else token_bias.contiguous(),
        weight=None if weight is None else weight.contiguous(),
        factors=(1 - label_smoothing, label_smoothing / tokens),
        share_within=within,
    )
    return loss.reshape(h.shape[:-1])


def within_codes(code_of: Tensor, token_bias: Tensor | None, mass: Tensor) -> Tensor:
    """log P(i | M(i)) = b_i − B_{M(i)}, float32 ``[V]``."""
    return log_within(unpack_codes(code_of), token_bias, mass)


# -- gradients ---------------------------------------------------------------------------------------------------


def gradient(
    flat: Tensor,
    table: Tensor,
    offset: Tensor | None,
    log_z: Tensor,
    total: Tensor,
    *,
    top: Tensor | None = None,
    sums: Tensor | None = None,
    share: tuple[Tensor, Tensor] | None = None,
    own: tuple[Tensor, Tensor, Tensor, int] | None = None,
    columns: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradient at the logits of the table's rows, ``[N, K]`` in h's dtype, and Σ_n total_n p_nj, ``[K]``.

    Args:
        flat: ``[N, d]``.
        table: contiguous ``[K, d]``; its offset ``[K]``.
        log_z, total: float32 ``[N]``; total is the factor of the probabilities.
        top: what log_z is short of, float32 ``[N]``, where it is in two parts.
        sums: float32 ``[N, K]`` to be added.
        share: per row of the table ``[K]``, and its factor per position ``[N]``.
        own: target int64 ``[N]``, value at its code ``[N]``, code_of, and the target that is ignored.
        columns: whether the sums over positions are wanted.
    """
    positions, width = flat.shape
    entries = table.shape[0]
    blocks, configs = loss_blocks(positions, flat.dtype)
    row_tiles = cdiv(positions, blocks["ROWS"])
    out = flat.new_empty((positions, entries))
    partial = flat.new_empty((row_tiles, entries), dtype=torch.float32) if columns else None
    target, own_of, code_of, ignored = own or (None, None, None, 0)
    launch(
        loss_kernels.tile_gradients,
        lambda c: (cdiv(entries, c["COLUMNS"]), row_tiles),
        {"h": flat, "table": table, "offset": offset, "top": top, "log_z": log_z, "total": total, "sums": sums,
         "share": share[0] if share else None, "share_of": share[1] if share else None, "target": target,
         "own_of": own_of, "code_of": code_of, "out": out, "column_sums": partial, "positions": positions,
         "entries": entries, "tokens": 0 if code_of is None else code_of.shape[0], "width": width, "ignored": ignored},
        {"PRECISION": precision(flat.dtype), "BYTES": 1 if code_of is None else code_of.shape[1], **blocks},
        configs,
    )  # fmt: skip
    return out, None if partial is None else partial.sum(0)


def loss_backward(
    grad: Tensor,
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    target: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """`vq_tiers_loss_backward`: of log Z without target, of cross entropy with one."""
    require(grad, h, codebook, code_of, token_bias, weight)
    codes, tokens = codebook.shape[0], code_of.shape[0]
    flat, table, code_of = rows_of(h), codebook.contiguous(), code_of.contiguous()
    mass = log_mass(code_of, token_bias, codes)
    top, log_z = Tiles(flat, table, mass).log_z_in_parts()
    kept = grad.reshape(-1).float().contiguous()
    share = own = None
    per_token = None  # gradient at the biases except for the part through log Z
    total = kept
    if target is not None:
        target = target.reshape(-1).contiguous()
        counted = target != ignore_index
        y = torch.where(counted, target, 0)
        kept = torch.where(counted, kept, 0.0)
        at_target = kept if weight is None else kept * weight.float().index_select(0, y)
        at_target = at_target * (1 - label_smoothing)
        total = at_target
        own = (target, -at_target, code_of, ignore_index)
        per_token = torch.zeros(tokens, dtype=torch.float32, device=h.device)
        per_token = per_token.index_put((y,), -at_target, accumulate=True)
        if label_smoothing:
            per_code = total_by_code(code_of, weight, codes)
            scaled = kept * (label_smoothing / tokens)
            share, total = (per_code, -scaled), total + scaled * per_code.sum()
            per_token = per_token - scaled.sum() * (1.0 if weight is None else weight.float())
    of_logits, columns = gradient(flat, table, mass, log_z, total, top=top, share=share, own=own, columns=wanted[2])
    of_h, of_codebook = through_table(of_logits, flat, codebook, wanted)
    of_bias = h.new_empty(0, dtype=torch.float32)
    if wanted[2] and token_bias is not None and columns is not None:
        of_bias = bias_gradient(columns, mass, code_of, token_bias, per_token)
    return of_h.reshape(h.shape if wanted[0] else 0), of_codebook, of_bias


def weighted_backward(
    grad: Tensor,
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """`vq_tiers_log_softmax_backward`: grad ``[..., V]`` at log p."""
    require(grad, h, codebook, code_of, token_bias)
    codes = codebook.shape[0]
    flat, rows, table = rows_of(h), rows_of(grad), codebook.contiguous()
    mass = log_mass(code_of, token_bias, codes)
    top, log_z = Tiles(flat, table, mass).log_z_in_parts()
    sums = torch.zeros((rows.shape[0], codes), dtype=torch.float32, device=h.device)
    sums_by_code(rows, unpack_codes(code_of), codes, sums)
    of_logits, columns = gradient(flat, table, mass, log_z, -sums.sum(-1), top=top, sums=sums, columns=wanted[2])
    of_h, of_codebook = through_table(of_logits, flat, codebook, wanted)
    of_bias = h.new_empty(0, dtype=torch.float32)
    if wanted[2] and token_bias is not None and columns is not None:
        of_bias = bias_gradient(columns, mass, code_of, token_bias, rows.sum(0, dtype=torch.float32))
    return of_h.reshape(h.shape if wanted[0] else 0), of_codebook, of_bias


def bias_gradient(
    columns: Tensor, mass: Tensor, code_of: Tensor, token_bias: Tensor, per_token: Tensor | None
) -> Tensor:
    """P_{M(i)} exp(b_i − B_{M(i)}) with P_j = Σ_n total_n p_nj, plus what else falls on the tokens; float32 ``[V]``."""
    code = unpack_codes(code_of)
    through = columns.index_select(0, code) * log_within(code, token_bias, mass).exp()
    return through if per_token is None else through + per_token


def linear_logsumexp(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_logsumexp`."""
    require(h, weight, bias)
    offset = None if bias is None else bias.contiguous()
    return Tiles(rows_of(h), weight.contiguous(), offset).log_z().reshape(h.shape[:-1])


def linear_logsumexp_backward(
    grad: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, log_z: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_logsumexp_backward`, a chunk of the vocabulary after the other."""
    require(grad, h, weight, bias)
    flat, weight = rows_of(h), weight.contiguous()
    log_z, total = log_z.reshape(-1).contiguous(), grad.reshape(-1).float().contiguous()
    of_h = torch.zeros(flat.shape, dtype=torch.float32, device=h.device) if wanted[0] else None
    rows, offsets = [], []
    for start in range(0, weight.shape[0], CHUNK):
        part = weight[start : start + CHUNK]
        offset = None if bias is None else bias[start : start + CHUNK].contiguous()
        of_logits, columns = gradient(flat, part, offset, log_z, total, columns=wanted[2])
        part_of_h, part_of_weight = through_table(of_logits, flat, part, wanted)
        if of_h is not None:
            of_h += part_of_h
        rows.append(part_of_weight)
        if columns is not None:
            offsets.append(columns)
    return (
        h.new_empty(0) if of_h is None else of_h.to(h.dtype).reshape(h.shape),
        torch.cat(rows),
        torch.cat(offsets) if offsets else h.new_empty(0, dtype=torch.float32),
    )
