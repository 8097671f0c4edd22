# SPDX-License-Identifier: Apache-2.0
"""`delta_attention` on a GPU, from the kernels of `delta_kernels`; the gradient is in `launch_delta_backward`.

q and k are brought to the widest dtype of q, k and v, and v too, which is copied for it; all else is read in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from rewriter.kernels.launching import Config, Shipped, Unsupported, launch, precision
from rewriter.kernels.linear_attention import delta, delta_kernels, kernels
from rewriter.kernels.linear_attention.launch_common import (
    WIDEST_FEATURES,
    block,
    decay_of,
    keep_arguments,
    only,
    operands,
    pointer,
)

RECURRENT = 8
# The inverse of a chunk is made of float32 products, which for 64 × 64 do not fit into registers.
CHUNK = 32
# Nor do products over more features, without tensor cores.
WIDEST_FLOAT32 = 64


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    scale: float,
    chunk: int,
) -> delta.Outputs:
    """`delta_attention`: arguments and results are those of the reference.

    Raises:
        Unsupported: float64, empty tensors, more than 256 features, or in chunks more than 64 multiplied as float32.
    """
    call = prepared(q, k, v, beta, log_decay, keep, state, scale, chunk)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    last = q.new_empty((q.shape[0], call.heads, q.shape[3], v.shape[3]), dtype=torch.float32)
    if k.shape[2] <= RECURRENT:
        call.step(out, last)
    else:
        inverses, _ = call.inverses(raw=False)
        states, written, _ = call.states(inverses, last)
        call.outputs(states, written, out)
    return out, last


def prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    keep: Tensor | None,
    state: Tensor | None,
    scale: float,
    chunk: int,
    steps: bool = True,
) -> Call:
    """Check and prepare the arguments; see `forward`. Without ``steps`` a few tokens are a chunk too."""
    if q.shape[3] > WIDEST_FEATURES:
        raise Unsupported(f"{q.shape[3]} features: more than {WIDEST_FEATURES} run the reference")
    if beta.dtype is torch.float64:
        raise Unsupported("float64 runs the reference")
    heads = delta.state_heads(k, v, beta, log_decay)
    q, k, v = operands(q, k, v)
    chunked = k.shape[2] > RECURRENT or not steps
    if k.dtype is torch.float32 and chunked and k.shape[3] > WIDEST_FLOAT32:
        raise Unsupported(f"{k.shape[3]} features in float32: more than {WIDEST_FLOAT32} run the reference")
    return Call(q, k, v, beta, log_decay, keep, state, scale, heads, block(chunk, CHUNK))


@dataclass(frozen=True)
class Call:
    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    keep: Tensor | None
    state: Tensor | None
    scale: float
    heads: int
    size: int

    @property
    def chunks(self) -> int:
        return int(triton.cdiv(self.k.shape[2], self.size))

    @property
    def rows(self) -> int:
        return self.k.shape[0] * self.heads

    def arguments(self) -> dict[str, Any]:
        """Of all kernels, by name."""
        decay = decay_of(self.log_decay, self.k.shape[0], self.k.shape[2])
        beta = self.beta
        return {
            **pointer("q", self.q), **pointer("k", self.k), **pointer("v", self.v), **pointer("beta", beta),
            **decay.arguments(), **keep_arguments(self.keep),
            "first_ptr": None if self.state is None else self.state.contiguous(),
            "heads": self.heads, "group": self.q.shape[1] // self.heads, "length": self.k.shape[2],
            "chunks": self.chunks, "features": self.k.shape[3], "values": self.v.shape[3], "scale": self.scale,
            "k_share": self.heads // self.k.shape[1], "v_share": self.heads // self.v.shape[1],
            "beta_share": self.heads // beta.shape[1], "g_share": self.heads // decay.heads,
        }  # fmt: skip

    def start(self, kernel: Any, grid: Any, config: Config, **more: Any) -> None:
        constants = {
            "DECAY": int(self.log_decay is not None), "CAUSAL": True, "NORMALISE": False, "BT": self.size,
            "DOUBLINGS": self.size.bit_length() - 1, "PRECISION": precision(self.k.dtype),
        }  # fmt: skip
        launch(kernel, grid, only({**self.arguments(), **more}, kernel), only(constants, kernel), [config])

    def step(self, out: Tensor, last: Tensor) -> None:
        """A few tokens through the state, one by one."""
        sizes = {"BF": block(self.k.shape[3], WIDEST_FEATURES), "BV": 16}
        values = self.v.shape[3]
        self.start(
            delta_kernels.delta_recurrent_kernel,
            lambda c: (self.rows, triton.cdiv(values, c["BV"])),
            Config(sizes),
            out_ptr=out,
            last_ptr=last,
        )

    def inverses(self, raw: bool) -> tuple[Tensor, Tensor | None]:
        """T of every chunk, ``[B, Hs, N, BT, BT]``; with ``raw`` also the inverse in it, without β."""
        batch, features = self.k.shape[0], self.k.shape[3]
        inverses = self.k.new_empty((batch, self.heads, self.chunks, self.size, self.size), dtype=torch.float32)
        without = torch.empty_like(inverses) if raw else None
        self.start(
            delta_kernels.chunk_inverses_kernel,
            lambda c: (self.rows, self.chunks),
            Config({"BF": block(features, 32)}, num_warps=8),
            inverses_ptr=inverses,
            raw_ptr=without,
        )
        return inverses, without

    def states(self, inverses: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state at the start of every chunk, after the last into ``last``; what the tokens write; and W."""
        (batch, _, length, features), values = self.k.shape, self.v.shape[3]
        new, old = (self._written(x, inverses, name) for x, name in ((self.v, "v"), (self.k, "k")))
        dtype = torch.bfloat16 if self.k.dtype is torch.bfloat16 else torch.float32
        states = self.k.new_empty((batch, self.heads, self.chunks, features, values), dtype=dtype)
        written = self.k.new_empty((batch, self.heads, length, values))
        self.start(
            delta_kernels.delta_states_kernel,
            lambda c: (self.rows, triton.cdiv(values, c["BV"])),
            Config({"BF": block(features, WIDEST_FEATURES), "BV": 16}, num_warps=8 if self.k.dtype is torch.float32 else 4),
            new_ptr=new,
            old_ptr=old,
            states_ptr=states,
            written_ptr=written,
            last_ptr=last,
        )
        return states, written, old

    def _written(self, x: Tensor, inverses: Tensor, name: str) -> Tensor:
        """T V, or T (K ⊙ e^b)."""
        (batch, _, length, width), arguments = x.shape, pointer("x", x)
        made = x.new_empty((batch, self.heads, length, width), dtype=torch.float32 if name == "v" else x.dtype)
        decays = int(self.log_decay is not None and name == "k")
        kernel = delta_kernels.written_kernel
        launch(
            kernel,
            lambda c: (self.rows, self.chunks, triton.cdiv(width, c["BX"])),
            only({**self.arguments(), **arguments, "inverses_ptr": inverses, "out_ptr": made, "width": width,
                  "x_share": self.heads // x.shape[1]}, kernel),
            {"DECAY": decays, "BT": self.size, "PRECISION": precision(x.dtype)},
            [Config({"BX": block(width, 32 if x.dtype is torch.float32 else 64)})],
        )  # fmt: skip
        return made

    def outputs(self, states: Tensor, written: Tensor, out: Tensor) -> None:
        """The additive rule's outputs, with what was written for the values."""
        most = 32 if self.k.dtype is torch.float32 else 64
        sizes = {"BF": block(self.k.shape[3], most), "BV": block(self.v.shape[3], most)}
        values, rows = self.v.shape[3], self.q.shape[0] * self.q.shape[1]
        self.start(
            kernels.outputs_kernel,
            lambda c: (rows, self.chunks, triton.cdiv(values, c["BV"])),
            Config(sizes, num_warps=8),
            **pointer("v", written),
            v_share=1,
            states_ptr=states,
            zs_ptr=None,
            out_ptr=out,
            weight_ptr=None,
        )


def example(dtype: torch.dtype, length: int = 4096, decay: bool = False, features: int = 128) -> tuple[Any, ...]:
    """A call of a model with 16 heads of 128 and 8 states, on the meta device."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    q, k, v = empty(2, 16, length, features), empty(2, 8, length, features), empty(2, 8, length, 128)
    g = empty(2, 8, length, of=torch.float32) if decay else None
    return q, k, v, empty(2, 8, length), g, empty(2, length, of=torch.bool), None, 1.0, 64


SHIPPED = (
    Shipped("delta_attention bf16", forward, partial(example, torch.bfloat16)),
    Shipped("delta_attention gated bf16", forward, partial(example, torch.bfloat16, decay=True)),
    Shipped("delta_attention fp32", forward, partial(example, torch.float32, features=64), matrix="none"),
    Shipped("delta_attention step bf16", forward, partial(example, torch.bfloat16, 1, True), matrix="none"),
)
