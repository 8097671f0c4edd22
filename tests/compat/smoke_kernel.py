# SPDX-License-Identifier: Apache-2.0
"""The kernel of the smoke test; in a file of its own, so that a Triton that does not import fails one check only."""

import triton
import triton.language as tl


@triton.jit
def row_dots(x_ptr, y_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * columns + lane, mask=lane < columns, other=0.0)
        y = tl.load(y_ptr + row * columns + lane, mask=lane < columns, other=0.0)
        total += x.to(tl.float32) * y.to(tl.float32)
    tl.store(out_ptr + row, tl.sum(total, axis=0))
