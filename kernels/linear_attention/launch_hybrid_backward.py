# SPDX-License-Identifier: Apache-2.0
"""The gradient of `hybrid_attention` on a GPU: the forward again, then the kernels of `hybrid_gradient_kernels`.

Three numbers per query lead from one kernel to the next: c, the sum of weights, and e, the window's share of the
gradient. Where the forward joined a past with new tokens, gradients of the joined rows are taken apart again here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, launch, precision
from rewriter.kernels.linear_attention import hybrid_gradient_kernels as of_queries
from rewriter.kernels.linear_attention import hybrid_key_gradient_kernels as of_keys
from rewriter.kernels.linear_attention import launch_hybrid, layout
from rewriter.kernels.linear_attention.hybrid import LARGEST_EXPONENT
from rewriter.kernels.linear_attention.launch_common import block, dense, only, pointer, summed
from rewriter.kernels.linear_attention.launch_hybrid import WITH_STATE, Call
from rewriter.kernels.linear_attention.sequence import Sequence as Joined

# Programs that share the queries of a head where a sink, which all of them see, adds its gradient up.
SINK_PARTS = 16


def backward(grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """``hybrid_attention_backward``: gradients of the inputs that need one, in their dtypes.

    Args:
        grads: of the results that are floating: the output, the caches of keys, values and features, the state and the
            normaliser.
        rest: the operator's arguments, and for each whether its gradient is wanted.

    Raises:
        Unsupported: as the forward.
    """
    *inputs, needs = rest
    call = launch_hybrid.prepared(*inputs)
    work = _Work(call, *_of_queries(call, grads[0]), *grads[4:] if inputs[WITH_STATE] else (None, None))
    found = _taken_apart(work, needs, grads[1:4] if inputs[WITH_STATE] else None)
    return [
        torch.zeros_like(x, memory_format=torch.contiguous_format) if dx is None else dx.to(x.dtype).contiguous()
        for x, dx, needed in zip(inputs, found, needs, strict=True)
        if needed
    ]


def _of_queries(call: Call, grad: Tensor) -> tuple[Tensor, Tensor, dict[str, Any], dict[str, Any]]:
    """The states before the windows, and the arguments that describe queries: of the window's and the state's part."""
    states, zs, *_ = call.states()
    out = call.q.new_empty((*call.q.shape[:3], call.x.v.shape[3]), dtype=torch.float32)
    top, total = (call.q.new_empty(call.q.shape[:3], dtype=torch.float32) for _ in range(2))
    relative = call.setting.anchor == "max"
    best = torch.empty_like(top, dtype=torch.int32) if relative else None
    call.outputs(states, zs, out, top_ptr=top, total_ptr=total, best_ptr=best)
    # A row without weights is 0 whatever its values are: δ_ij = G·v_j.
    empty = total == 0
    rho = 1 / total.masked_fill(empty, 1.0)
    omega = (-rho * (grad.float() * out).sum(-1)).masked_fill_(empty, 0.0)
    window = {**pointer("do", dense(grad)), "top_ptr": top, "best_ptr": best, "rho_ptr": rho, "omega_ptr": omega}
    anchor = 1.0 if relative else (-top).clamp(max=LARGEST_EXPONENT).exp()
    return states, zs, window, {**window, "rho_ptr": rho * anchor, "omega_ptr": omega * anchor}


@dataclass(frozen=True)
class _Work:
    """One call, what its kernels share, and the gradients they find."""

    call: Call
    states: Tensor
    zs: Tensor
    window: dict[str, Any]
    linear: dict[str, Any]
    dlast: Tensor | None
    dlast_z: Tensor | None

    @property
    def features(self) -> int:
        return self.states.shape[3]

    @property
    def wide(self) -> bool:
        return self.call.q.dtype is torch.float32

    @property
    def rows(self) -> int:
        """Positions of keys in memory: those of a past, and the new ones."""
        return self.call.keys.offset + self.call.q.shape[2]

    @property
    def blocks(self) -> int:
        """Blocks of keys, the first beginning one reach before the first query."""
        return int(triton.cdiv(self.call.setting.reach + self.call.q.shape[2], self.call.size))

    def made(self, *shape: int) -> Tensor:
        return self.call.q.new_empty(shape, dtype=torch.float32)

    def start(self, kernel: Any, grid: Any, sizes: dict[str, int], warps: int, stages: int, **more: Any) -> None:
        call = self.call
        constants = {
            "MAPS": self.features > 0, "TERRACE": call.setting.block == "terrace", "SINKS": call.setting.sinks > 0,
            "BT": call.size, "BF16": call.narrow, "PRECISION": precision(call.q.dtype),
        }  # fmt: skip
        config = Config(only(sizes, kernel), num_warps=warps, num_stages=stages)
        launch(kernel, grid, only({**call.arguments, **more}, kernel), only(constants, kernel), [config])

    @property
    def sizes(self) -> dict[str, int]:
        """Tiles of keys, widths, features and values: as large as registers allow on every chip."""
        return self._tiles(32 if self.wide else 64)

    @property
    def small(self) -> dict[str, int]:
        """Where there are two kinds of scores at a time: smaller in float32; fewer values where ranks come on top."""
        tiles = self._tiles(16 if self.wide else 64)
        return {**tiles, "BV": min(tiles["BV"], 32)} if self.call.setting.counts_ranks else tiles

    def _tiles(self, most: int) -> dict[str, int]:
        width, values = self.call.q.shape[3], self.call.x.v.shape[3]
        return {
            "BK": 16 if self.wide else 32, "BD": block(width, most), "BF": block(self.features, most),
            "BV": block(values, most),
        }  # fmt: skip

    @property
    def warps(self) -> int:
        return 4 if self.wide else 8

    # ------------------------------------------------------------------------------------------------ the window

    def queries(self) -> tuple[Tensor, Tensor]:
        """dq, and e of each query."""
        call = self.call
        (batch, heads, length, width) = call.q.shape
        dq, soft = self.made(batch, heads, length, width), self.made(batch, heads, length)
        self.start(
            of_queries.hybrid_query_gradients_kernel,
            lambda c: (batch * heads, call.chunks, triton.cdiv(width, c["BD"])),
            self.sizes, 4 if call.setting.counts_ranks else self.warps, 1, **self.window, dq_ptr=dq, soft_ptr=soft,
        )  # fmt: skip
        return dq, soft

    def keys(self, soft: Tensor) -> Tensor:
        """dk of all positions, ``[B, Hs, rows, D]``."""
        call, width = self.call, self.call.q.shape[3]
        dk = self.made(call.q.shape[0], call.heads, self.rows, width)
        self.start(
            of_keys.hybrid_key_gradients_kernel,
            lambda c: (dk.shape[0] * call.heads, self.blocks, triton.cdiv(width, c["BD"])),
            self.small, self.warps, 1, **self.window, soft_ptr=soft, dk_ptr=dk,
        )  # fmt: skip
        return dk

    def values(self, dstates: Tensor | None) -> Tensor:
        """dv of all positions, ``[B, Hs, rows, Dv]``."""
        call, values = self.call, self.call.x.v.shape[3]
        dv = self.made(call.q.shape[0], call.heads, self.rows, values)
        self.start(
            of_keys.hybrid_value_gradients_kernel,
            lambda c: (dv.shape[0] * call.heads, self.blocks, triton.cdiv(values, c["BV"])),
            self.small, self.warps, 1, **self.window, linear_rho_ptr=self.linear["rho_ptr"], dstates_ptr=dstates, dv_ptr=dv,
        )  # fmt: skip
        return dv

    def sinks(self, soft: Tensor) -> tuple[Tensor, Tensor]:
        """dk and dv of the sinks, ``[B, Hs, s, ·]``."""
        call, number = self.call, self.call.setting.sinks
        parts = min(SINK_PARTS, call.chunks)
        per_part = triton.cdiv(call.chunks, parts)
        shape, width, values = (call.q.shape[0], call.heads, parts, number), call.q.shape[3], call.x.v.shape[3]
        dk, dv = self.made(*shape, width), self.made(*shape, values)
        sizes = {"BS": 16, "BD": block(width, launch_hybrid.WIDEST_HEAD), "BV": triton.next_power_of_2(max(16, values))}
        self.start(
            of_keys.hybrid_sink_gradients_kernel,
            lambda c: (shape[0] * call.heads, parts, triton.cdiv(number, c["BS"])),
            sizes, 8, 1, **self.window, soft_ptr=soft, per_part=per_part, dsink_k_ptr=dk, dsink_v_ptr=dv,
        )  # fmt: skip
        return dk.sum(2), dv.sum(2)

    # ----------------------------------------------------------------------------------------------- what is before

    def state_gradients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dS and dz after every chunk, and before the first."""
        call, values = self.call, self.call.x.v.shape[3]
        dstates, dzs = torch.empty_like(self.states), torch.empty_like(self.zs)
        first = self.made(call.q.shape[0], call.heads, self.features, values)
        first_z = self.made(*first.shape[:3])
        self.start(
            of_queries.hybrid_state_gradients_kernel,
            lambda c: (first.shape[0] * call.heads, triton.cdiv(self.features, c["BF"]), triton.cdiv(values, c["BV"])),
            self.sizes, 4, 1,
            **self.linear,
            dlast_ptr=None if self.dlast is None else self.dlast.float().contiguous(),
            dlast_z_ptr=None if self.dlast_z is None else self.dlast_z.float().contiguous(),
            dstates_ptr=dstates, dzs_ptr=dzs, dfirst_ptr=first, dfirst_z_ptr=first_z,
        )  # fmt: skip
        return dstates, dzs, first, first_z

    def query_maps(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """dφ_q, and of each head dm and the queries' part of dλ."""
        call, count = self.call, self.features
        batch, heads, length, _ = call.q.shape
        dq = self.made(batch, heads, length, count)
        parts = triton.cdiv(count, self.sizes["BF"])
        scaled = None if call.x.map_scale is None else self.made(parts, batch, heads, length)
        shifted = None if call.x.log_decay is None else self.made(parts, batch, heads, length)
        self.start(
            of_queries.hybrid_query_map_gradients_kernel,
            lambda c: (batch * heads, call.chunks, parts),
            self.sizes, 8, 1, **self.linear, states_ptr=self.states, zs_ptr=self.zs, dq_map_ptr=dq, scaled_ptr=scaled,
            shifted_ptr=shifted,
        )  # fmt: skip
        dm, dg = (None if x is None else x.sum((0, 1, 3)) for x in (scaled, shifted))
        return dq, dm, dg

    def key_maps(self, dstates: Tensor, dzs: Tensor) -> tuple[Tensor, Tensor | None]:
        """dφ_k of all positions ``[B, Hs, rows, F]``, and of each state its part of dλ."""
        call, count = self.call, self.features
        batch, parts = call.q.shape[0], triton.cdiv(count, self.sizes["BF"])
        dk = self.made(batch, call.heads, self.rows, count)
        passed = None if call.x.log_decay is None else self.made(batch, call.heads, self.blocks, parts)
        self.start(
            of_keys.hybrid_key_map_gradients_kernel,
            lambda c: (batch * call.heads, self.blocks, parts),
            self.sizes if self.wide else self.small, 8, 1,
            **self.linear, states_ptr=self.states, zs_ptr=self.zs, dstates_ptr=dstates, dzs_ptr=dzs,
            dk_map_ptr=dk, passed_ptr=passed,
        )  # fmt: skip
        return dk, None if passed is None else passed.sum((0, 2, 3))


def _taken_apart(work: _Work, needs: Sequence[bool], cached: Sequence[Tensor] | None) -> list[Tensor | None]:
    """The gradient of every argument that is wanted and has one."""
    call, x = work.call, work.call.x
    found: list[Tensor | None] = [None] * len(needs)
    caches = (None, None, None) if cached is None else cached
    dstates = dzs = None
    if work.features:
        dstates, dzs, found[14], found[15] = work.state_gradients()
    soft = dsink_k = dsink_v = None
    if any(needs[i] for i in (0, 1, 2, 5, 9, 10)):
        found[0], soft = work.queries()
        found[5] = soft.sum((0, 2))
        if call.setting.sinks:
            dsink_k, dsink_v = work.sinks(soft)
        if needs[1] or needs[9]:
            found[1], found[9] = _rows(call, work.keys(soft), dsink_k, caches[0], x.k.shape[1])
        if needs[2] or needs[10]:
            found[2], found[10] = _rows(call, work.values(dstates), dsink_v, caches[1], x.v.shape[1])
    if x.k_map is None or dstates is None or dzs is None:
        return found
    shifted = passed = None
    if needs[3] or needs[6] or needs[7]:
        found[3], found[6], shifted = work.query_maps()
    if needs[4] or needs[7] or needs[11]:
        dmap, passed = work.key_maps(dstates, dzs)
        found[4], found[11] = _rows(call, dmap, None, caches[2], x.k_map.shape[1])
    if x.log_decay is not None and shifted is not None and passed is not None:
        total = passed + shifted.unflatten(0, (call.heads, -1)).sum(1)
        total = total.unflatten(0, (len(x.log_decay), -1)).sum(1)
        # Lower decays are taken for the lowest, and have no gradient.
        found[7] = torch.where(x.log_decay >= layout.LOWEST_LOG_DECAY, total, 0.0)
    return found


def _rows(
    call: Call, dx: Tensor, dsink: Tensor | None, cached: Tensor | None, heads: int
) -> tuple[Tensor, Tensor | None]:
    """From gradients by state to those of the new tokens ``[B, h, T, ·]`` and of a past's slots.

    Args:
        dx: ``[B, Hs, rows, ·]``.
        dsink: ``[B, Hs, s, ·]``.
        cached: gradient of the slots left behind, ``[B, h, s + R, ·]``.
    """
    dx, whole, setting = summed(dx, heads, torch.float32), call.keys.whole, call.setting
    if whole is None:
        return dx, None
    length, (slots, number) = call.q.shape[2], (call.keys.offset, setting.sinks)
    sinks = dx.new_zeros((*dx.shape[:2], number, dx.shape[3]))
    if dsink is not None:
        sinks += summed(dsink, heads, torch.float32)
    if cached is not None:
        sinks += cached[:, :, :number]
        dx[:, :, length:] += cached[:, :, number:]
    new = dx[:, :, slots:]
    if number:
        new = new + _of_new_sinks(whole, sinks, slots)
    past = None if call.past is None else torch.cat([sinks, dx[:, :, :slots]], dim=2)
    return layout.only(call.x.keep, new), past


def _of_new_sinks(whole: Joined, sinks: Tensor, slots: int) -> Tensor:
    """The gradients of sinks at the tokens that became one, ``[B, h, T, ·]``."""
    rank, number = whole.rank[:, slots:], sinks.shape[2]
    index = rank.clamp(0, number - 1)[:, None, :, None].expand(-1, sinks.shape[1], -1, sinks.shape[3])
    here = whole.keep[:, slots:] & (rank >= 0) & (rank < number)
    return layout.only(here, sinks.gather(2, index))


def _example(**options: Any) -> tuple[Any, ...]:
    """A call that wants all gradients, on the meta device."""
    inputs = launch_hybrid.example(**options)
    q, _, v, *_ = inputs
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    grads = [out] * 6 if inputs[14] is None else [out, *inputs[9:12], *inputs[14:16]]
    return grads, *inputs, [isinstance(a, Tensor) and a.is_floating_point() for a in inputs]


_BF16 = {"dtype": torch.bfloat16}
SHIPPED = (
    Shipped("hybrid_attention_backward bf16", backward, partial(_example, **_BF16)),
    Shipped("hybrid_attention_backward fp32", backward, partial(_example, dtype=torch.float32), matrix="none"),
    Shipped(
        "hybrid_attention_backward terrace sinks bf16", backward, partial(_example, **_BF16, kind="terrace", sinks=4)
    ),
)
