# SPDX-License-Identifier: Apache-2.0
"""Energy of one token through a layer, estimated from the 45 nm table: an estimate of hardware that has these units.

    fp16 multiply 1.1 pJ, fp16 add 0.4 pJ, shift (an add to the exponent) 0.15 pJ, query of an 8-bit table 0.37 pJ,
    DRAM 200 pJ per 16 bits

(`energy/hw_utils.py` of ShiftAddLLM, after Horowitz, "Computing's energy problem", 2014.) Arithmetic and the reading of
weights are kept apart, because which of them matters depends on the batch: weights are read once per batch.

    dense           in · out · (multiply + add)
    binary bases    per 8 inputs, row and basis: query + add, with a shared scale also a shift (as ShiftAddLLM counts:
                    3 bits take 2.76 pJ where 8 dense products take 12.0); the table of the 256 signed sums of 8 inputs
                    is shared by all rows: 255 adds
    powers of two   per weight and term: shift + add
    scales          per group, row and (free bases) basis: multiply + add; a shift instead where scales are powers of two

A CPU or GPU of today multiplies as cheaply as it shifts; there the saving is the weights' bytes alone.
"""

from __future__ import annotations

from rewriter.kernels.shift_add.codec import ceil_div
from rewriter.passes.shift_add.modes import Mode
from rewriter.passes.shift_add.tables import TableMode

MULTIPLY, ADD, SHIFT, QUERY = 1.1, 0.4, 0.15, 0.37  # pJ, 45 nm, fp16
DRAM_PER_BIT = 200 / 16  # pJ
DENSE_BITS = 16
TABLE_INPUTS = 8


def linear(mode: Mode, rows: int, width: int, group: int, bits: float) -> dict[str, float]:
    """Picojoules per token of a layer ``[rows, width]``.

    Args:
        mode: how the weight is spelled.
        rows: outputs.
        width: inputs.
        group: weights per scale.
        bits: stored bits per weight, scales included.

    Returns:
        ``pj_arithmetic`` and ``pj_weights`` of the rewritten layer, ``pj_arithmetic_dense`` and ``pj_weights_dense`` of
        the layer in fp16.
    """
    weights = rows * width
    return {
        "pj_arithmetic": _arithmetic(mode, rows, width, group),
        "pj_arithmetic_dense": weights * (MULTIPLY + ADD),
        "pj_weights": weights * bits * DRAM_PER_BIT,
        "pj_weights_dense": weights * DENSE_BITS * DRAM_PER_BIT,
    }


def lookup(width: int, bits: float) -> dict[str, float]:
    """Picojoules per token of reading one row of an embedding: no arithmetic worth counting."""
    return {"pj_weights": width * bits * DRAM_PER_BIT, "pj_weights_dense": width * DENSE_BITS * DRAM_PER_BIT}


def _arithmetic(mode: Mode, rows: int, width: int, group: int) -> float:
    groups = rows * ceil_div(width, group)
    scaling = groups * ((SHIFT if mode.power_of_two else MULTIPLY) + ADD)
    if isinstance(mode, TableMode):
        return rows * width * mode.powers * (SHIFT + ADD) + scaling
    octets = ceil_div(width, TABLE_INPUTS)
    tables = octets * (2**TABLE_INPUTS - 1) * ADD
    per_query = QUERY + ADD + (0.0 if mode.coefficients > 1 else SHIFT)
    return tables + rows * octets * mode.bits * per_query + mode.coefficients * scaling
