# SPDX-License-Identifier: Apache-2.0
"""Codebook heads on a GPU: tiers and residual codebooks, forward and backward.

Logits over tokens take two kernels. The first multiplies h with the codebook, the second looks its results up. Between
them stand K code logits per position, K/V of the result and small enough to stay in the L2 cache; one kernel for both
would have to hold all K of its positions before it could write a token, and with few positions leave most of the
device idle. The result is written once and is what the time goes to.

Tensors are made contiguous first. float64 and empty tensors are left to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rewriter.kernels.launching import Config, Unsupported, launch, precision
from rewriter.kernels.vq_logits import kernels
from rewriter.kernels.vq_logits.codec import unpack_codes

HALF = (torch.bfloat16, torch.float16)
_EXPANSION = [Config({"ROWS": 32, "COLUMNS": 128}, 4, 1), Config({"ROWS": 64, "COLUMNS": 64}, 8, 1)]
_EXPANSION_OF_FEW = [Config({"COLUMNS": 256}, 4, 1)]
_SUMMING = [Config({"ROWS": 1, "PLACES": 1024}, 4, 1), Config({"ROWS": 4, "PLACES": 256}, 4, 1)]
# Programs that sum over codes, about: enough to keep any device busy.
PROGRAMS = 256


# -- common to all -----------------------------------------------------------------------------------------------


def require(*tensors: Tensor | None) -> None:
    """Refuse what the kernels do not do.

    Raises:
        Unsupported: a floating tensor of another type than float32, bfloat16 and float16, or an empty tensor.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, *HALF):
            raise Unsupported(f"kernels of codebook heads compute in float32 or less, not in {tensor.dtype}")
        if not tensor.numel():
            raise Unsupported("there is nothing to compute on an empty tensor")


def rows_of(h: Tensor) -> Tensor:
    """``[..., d]`` -> contiguous ``[positions, d]``."""
    return h.reshape(-1, h.shape[-1]).contiguous()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def dot_blocks(positions: int, dtype: torch.dtype) -> tuple[dict[str, int], list[Config]]:
    """Tile of a product ``[positions, columns]``, and ways to go along its width.

    Few positions leave the time to reading the table: short tiles, so that many programs read. Many want tiles that
    reuse what they read. float32 is multiplied without matrix instructions, from registers, of which it takes more.
    """
    narrow = dtype in HALF
    if positions <= 16:
        return {"ROWS": 16, "COLUMNS": 32}, [Config({"WIDTH": 128 if narrow else 32}, 4, 3)]
    if positions <= 256 or not narrow:
        return {"ROWS": 64, "COLUMNS": 64}, [Config({"WIDTH": 64 if narrow else 16}, 4, 3 if narrow else 2)]
    return {"ROWS": 128, "COLUMNS": 128}, [
        Config({"WIDTH": 64}, 8, 2),
        Config({"WIDTH": 64}, 8, 4, only="cuda"),
    ]


# -- tiers and residual stages -----------------------------------------------------------------------------------


def code_logits(flat: Tensor, codebook: Tensor, dtype: torch.dtype) -> Tensor:
    """h·C_j of flat h ``[N, d]`` and codebook ``[K, d]``, transposed: ``[K, N]``, N rounded up to a multiple of 16."""
    positions, width = flat.shape
    codes = codebook.shape[0]
    stride = 16 * cdiv(positions, 16)
    out = flat.new_empty((codes, stride), dtype=dtype)
    blocks, configs = dot_blocks(positions, flat.dtype)
    launch(
        kernels.code_logits,
        lambda c: (cdiv(codes, c["COLUMNS"]), cdiv(positions, c["ROWS"])),
        {"h": flat, "codebook": codebook, "out": out, "positions": positions, "codes": codes, "width": width,
         "stride": stride},
        {"PRECISION": precision(flat.dtype), **blocks},
        configs,
    )  # fmt: skip
    return out


def expanded(
    table: Tensor, codes: Tensor, bias: Tensor | None, log_z: Tensor | None, out: Tensor, exp: bool = False
) -> Tensor:
    """Fill ``out`` ``[N, V]``: Σ_s table[s, a_s(i), n] + b_i − log Z_n; table as `code_logits` makes it, codes
    ``[V, S, bytes]``."""
    positions, tokens = out.shape
    _, stages, width = codes.shape
    few = positions <= 16
    rows = 1 << (positions - 1).bit_length()
    launch(
        kernels.expand,
        lambda c: (cdiv(tokens, c["COLUMNS"]), cdiv(positions, c["ROWS"])),
        {"table": table, "code_of": codes.contiguous(), "bias": bias, "log_z": log_z, "out": out,
         "positions": positions, "tokens": tokens, "codes": table.shape[0] // stages, "stride": table.shape[1]},
        {"BYTES": width, "STAGES": stages, "EXP": exp, **({"ROWS": rows} if few else {})},
        _EXPANSION_OF_FEW if few else _EXPANSION,
    )  # fmt: skip
    return out


def tiers(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """`vq_logits_tiers`: one residual stage."""
    return residual(h, codebook.unsqueeze(0), code_of.unsqueeze(1), token_bias)


def residual(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """`vq_logits_residual`; the logits of the stages are rounded to h's type, as by the reference, and added in
    float32."""
    require(h, codebook, codes, bias)
    flat = rows_of(h)
    table = code_logits(flat, codebook.reshape(-1, h.shape[-1]).contiguous(), h.dtype)
    out = h.new_empty((flat.shape[0], codes.shape[0]))
    expanded(table, codes, None if bias is None else bias.contiguous(), None, out)
    return out.reshape(*h.shape[:-1], -1)


# -- gradients ---------------------------------------------------------------------------------------------------


def sums_by_code(grad: Tensor, code: Tensor, codes: int, out: Tensor) -> None:
    """Σ over the tokens of each code: grad contiguous ``[N, V]``, code int64 ``[V]`` into out float32 ``[N, K]``, zero
    before, whose rows may be longer."""
    positions, tokens = grad.shape
    ordered, order = torch.sort(code.to(torch.int32), stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(codes + 1, dtype=torch.int32, device=code.device), out_int32=True)
    # A program reads all its rows' tokens unless there are too few rows to keep the device busy.
    parts = min(max(PROGRAMS // positions, 1), codes)
    per_part = cdiv(codes, parts)
    launch(
        kernels.segment_sums,
        lambda c: (cdiv(positions, c["ROWS"]), cdiv(codes, per_part)),
        {"grad": grad, "order": order, "ordered_code": ordered, "bounds": bounds, "out": out, "positions": positions,
         "tokens": tokens, "codes": codes, "out_stride": out.stride(0), "per_part": per_part},
        {},
        _SUMMING,
    )  # fmt: skip


def residual_backward(
    grad: Tensor, h: Tensor, codebook: Tensor, codes: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """`vq_logits_residual_backward`: sums over the tokens of each code; what is left are products of matrices."""
    require(grad, h, codebook, codes)
    stages, per_stage, width = codebook.shape
    flat, rows = rows_of(h), rows_of(grad)
    of_h, of_codebook, of_bias = h.new_empty(0), codebook.new_empty(0), codebook.new_empty(0, dtype=torch.float32)
    if wanted[0] or wanted[1]:
        sums = torch.zeros((rows.shape[0], stages * per_stage), dtype=torch.float32, device=h.device)
        index = unpack_codes(codes)
        for stage in range(stages):
            sums_by_code(rows, index[:, stage], per_stage, sums[:, stage * per_stage : (stage + 1) * per_stage])
        of_h, of_codebook = through_table(sums.to(h.dtype), flat, codebook.reshape(-1, width), wanted)
        of_h, of_codebook = (
            of_h.reshape(h.shape if wanted[0] else 0),
            of_codebook.reshape(codebook.shape if wanted[1] else 0),
        )
    if wanted[2]:
        of_bias = rows.sum(0, dtype=torch.float32)
    return of_h, of_codebook, of_bias


def tiers_backward(
    grad: Tensor, h: Tensor, codebook: Tensor, code_of: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """`vq_logits_tiers_backward`: one residual stage."""
    of_h, of_codebook, of_bias = residual_backward(grad, h, codebook.unsqueeze(0), code_of.unsqueeze(1), wanted)
    return of_h, of_codebook.squeeze(0), of_bias


def through_table(gradient: Tensor, flat: Tensor, table: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """Gradient at the logits of the table's rows ``[N, K]``, in h's dtype -> gradients of h ``[N, d]`` and of the table
    ``[K, d]`` in the table's dtype; empty what is not wanted. Plain products, which torch's library does best."""
    of_h = gradient @ table.to(flat.dtype) if wanted[0] else flat.new_empty(0)
    of_table = (gradient.t() @ flat).to(table.dtype) if wanted[1] else table.new_empty(0)
    return of_h, of_table
