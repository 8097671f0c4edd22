# SPDX-License-Identifier: Apache-2.0
"""The additive rule on a GPU: `linear_attention` and its gradient, from the kernels of `kernels` and `gradient_kernels`.

q, k and v are read through their strides. Where their dtypes differ, q and k are brought to the wider one of all three
and v is cast tile by tile. States between chunks are kept in the dtype of the products, float32 for float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import triton
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, Unsupported, launch, precision
from rewriter.kernels.linear_attention import additive, kernels
from rewriter.kernels.linear_attention.launch_common import (
    WIDEST_FEATURES,
    Decay,
    block,
    decay_of,
    dense,
    keep_arguments,
    only,
    operands,
    pointer,
)

# Steps that are taken one by one instead of as a chunk: below this a chunk would be mostly empty.
RECURRENT = 8
# Positions of a chunk: with float32 products fewer fit into registers; a gate per feature compares all pairs by feature.
CHUNK, CHUNK_FLOAT32, CHUNK_PAIRWISE = 64, 32, 16


@dataclass(frozen=True)
class Call:
    """The arguments of the operator as the kernels take them."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    keep: Tensor | None
    state: Tensor | None
    normaliser: Tensor | None
    scale: float
    causal: bool
    normalise: bool
    chunk: int

    @cached_property
    def heads(self) -> int:
        return additive.state_heads(self.k, self.v, self.log_decay)

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, features, values."""
        return self.q.shape[0], self.q.shape[3], self.v.shape[3]

    @cached_property
    def decay(self) -> Decay:
        return decay_of(self.log_decay, self.k.shape[0], self.k.shape[2])

    @cached_property
    def size(self) -> int:
        """Positions per chunk."""
        most = CHUNK_PAIRWISE if self.decay.form == 2 else CHUNK_FLOAT32 if self.wide else CHUNK
        return block(self.chunk, most)

    @property
    def wide(self) -> bool:
        return self.k.dtype is torch.float32

    @cached_property
    def chunks(self) -> int:
        return int(triton.cdiv(self.k.shape[2], self.size))

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Of all kernels, by name."""
        q, k, v = self.q, self.k, self.v
        return {
            **pointer("q", q), **pointer("k", k), **pointer("v", v), **self.decay.arguments(),
            **keep_arguments(self.keep),
            "first_ptr": None if self.state is None else self.state.contiguous(),
            "first_z_ptr": None if self.normaliser is None else self.normaliser.contiguous(),
            "heads": self.heads, "group": q.shape[1] // self.heads, "length": k.shape[2], "chunks": self.chunks,
            "features": q.shape[3], "values": v.shape[3], "scale": self.scale,
            "k_share": self.heads // k.shape[1], "v_share": self.heads // v.shape[1],
            "g_share": self.heads // self.decay.heads,
        }  # fmt: skip

    @cached_property
    def constants(self) -> dict[str, Any]:
        return {"DECAY": self.decay.form, "CAUSAL": self.causal, "BT": self.size, "PRECISION": precision(self.k.dtype)}

    def kept(self) -> tuple[Tensor, Tensor]:
        """Room for the states and normalisers at the start of every chunk."""
        (batch, features, values), chunks = self.sizes, self.chunks if self.causal else 0
        dtype = torch.bfloat16 if self.k.dtype is torch.bfloat16 else torch.float32
        states = self.k.new_empty((batch, self.heads, chunks, features, values), dtype=dtype)
        return states, self.k.new_empty((batch, self.heads, chunks, features), dtype=torch.float32)

    def start(self, kernel: Any, grid: Any, configs: Sequence[Config], **more: Any) -> None:
        """Launch a kernel with these arguments and those in ``more``; upper case is compiled in."""
        constants = {**self.constants, **{name: value for name, value in more.items() if name.isupper()}}
        arguments = {**self.arguments, **{name: value for name, value in more.items() if not name.isupper()}}
        launch(kernel, grid, only(arguments, kernel), only(constants, kernel), configs)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    normaliser: Tensor | None,
    scale: float,
    causal: bool,
    normalise: str,
    chunk: int,
) -> additive.Outputs:
    """`linear_attention`: arguments and results are those of the reference.

    Raises:
        Unsupported: float64, empty tensors, or more than 256 features.
    """
    x = call(q, k, v, log_decay, keep, state, normaliser, scale, causal, normalise, chunk)
    batch, features, values = x.sizes
    out = q.new_empty((*q.shape[:3], values))
    last = q.new_empty((batch, x.heads, features, values), dtype=torch.float32)
    last_z = q.new_empty((batch, x.heads, features), dtype=torch.float32)
    if causal and k.shape[2] <= RECURRENT:
        step(x, out, last, last_z)
    else:
        states, zs = states_of(x, last, last_z)
        outputs_of(x, states, zs, out, None)
    return out, last, last_z


def call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    normaliser: Tensor | None,
    scale: float,
    causal: bool,
    normalise: str,
    chunk: int,
) -> Call:
    """Check and prepare the arguments; see `forward`."""
    if q.shape[3] > WIDEST_FEATURES:
        raise Unsupported(f"{q.shape[3]} features: more than {WIDEST_FEATURES} run the reference")
    if log_decay is not None and log_decay.dim() > 1 and log_decay.dtype is torch.float64:
        raise Unsupported("float64 runs the reference")
    wide_q, wide_k, _ = operands(q, k, v)
    v = dense(v)
    return Call(wide_q, wide_k, v, log_decay, keep, state, normaliser, scale, causal, normalise == "sum", chunk)


def step(x: Call, out: Tensor, last: Tensor, last_z: Tensor) -> None:
    """A few tokens through the state, one by one."""
    batch, features, values = x.sizes
    configs = [Config({"BV": 16}, num_warps=4), Config({"BV": 32}, num_warps=8)]
    more = {"BF": block(features, WIDEST_FEATURES), "NORMALISE": x.normalise}
    results = {"out_ptr": out, "last_ptr": last, "last_z_ptr": last_z}
    rows = batch * x.heads
    x.start(kernels.recurrent_kernel, lambda c: (rows, triton.cdiv(values, c["BV"])), configs, **results, **more)


def states_of(x: Call, last: Tensor, last_z: Tensor) -> tuple[Tensor, Tensor]:
    """The states at the start of every chunk, and after the last into ``last``; without causality that one only."""
    batch, features, values = x.sizes
    states, zs = x.kept()
    more = {"states_ptr": states, "zs_ptr": zs, "last_ptr": last, "last_z_ptr": last_z, "start": 0}
    rows = batch * x.heads
    x.start(
        kernels.states_kernel,
        lambda c: (rows, triton.cdiv(features, c["BF"]), triton.cdiv(values, c["BV"])),
        tiles(x),
        **more,
        STORE=x.causal,
        BF16=False,
    )
    return (states, zs) if x.causal else (last, last_z)


def outputs_of(x: Call, states: Tensor, zs: Tensor, out: Tensor, weight: Tensor | None) -> None:
    """Outputs from the states at the chunks' starts; the normalisers' sums too if ``weight`` is given."""
    rows, length, values = x.q.shape[0] * x.q.shape[1], x.q.shape[2], x.sizes[2]
    more = {"states_ptr": states, "zs_ptr": zs, "out_ptr": out, "weight_ptr": weight, "length": length}
    x.start(
        kernels.outputs_kernel,
        lambda c: (rows, triton.cdiv(length, c["BT"]), triton.cdiv(values, c["BV"])),
        tiles(x, warps=8),
        **more,
        NORMALISE=x.normalise,
    )


def tiles(x: Call, warps: int = 4, stages: int = 2, most_values: int = 64) -> list[Config]:
    """Tiles of features and values: up to 64 × 64 where products are narrow, half of each in float32."""
    _, features, values = x.sizes
    most = 32 if x.wide else 64
    sizes = {"BF": block(features, 16 if x.decay.form == 2 else most), "BV": block(values, min(most, most_values))}
    return [Config(sizes, num_warps=warps, num_stages=stages)]


def example(
    dtype: torch.dtype, length: int = 4096, decay: int | None = None, causal: bool = True, features: int = 128
) -> tuple[Any, ...]:
    """A call of a model with 32 heads of 64 and 8 states, on the meta device."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    g = {None: None, 1: empty(32, of=torch.float32), 3: empty(2, 8, length), 4: empty(2, 8, length, features)}[decay]
    heads = 32 if decay == 1 else 8
    state = (empty(2, heads, features, 64, of=torch.float32), empty(2, heads, features, of=torch.float32))
    q, k, v = empty(2, 32, length, features), empty(2, 8, length, features), empty(2, 8, length, 64)
    return q, k, v, g, empty(2, length, of=torch.bool), *state, 1.0, causal, "sum", 128


SHIPPED = (
    Shipped("linear_attention bf16", forward, partial(example, torch.bfloat16)),
    Shipped("linear_attention fp16", forward, partial(example, torch.float16)),
    Shipped("linear_attention fp32", forward, partial(example, torch.float32), matrix="none"),
    Shipped("linear_attention both ways bf16", forward, partial(example, torch.bfloat16, causal=False)),
    Shipped("linear_attention fixed decay bf16", forward, partial(example, torch.bfloat16, decay=1)),
    Shipped("linear_attention gate bf16", forward, partial(example, torch.bfloat16, decay=4), matrix="mma"),
    Shipped("linear_attention gate fp32", forward, partial(example, torch.float32, decay=4), matrix="none"),
    Shipped("linear_attention step bf16", forward, partial(example, torch.bfloat16, length=1), matrix="none"),
    Shipped("linear_attention step gate fp32", forward, partial(example, torch.float32, 1, 4), matrix="none"),
)
