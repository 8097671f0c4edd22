# SPDX-License-Identifier: Apache-2.0
"""Exact fusions: attention written out becomes one operator; q, k, v and gate, up of one input become one linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.passes.fuse.attention import FuseAttention
from rewriter.passes.fuse.gate_up import FuseGateUp
from rewriter.passes.fuse.loss import FuseLoss
from rewriter.passes.fuse.masks import FuseMask
from rewriter.passes.fuse.qkv import FuseQKV
from rewriter.registry import register
from rewriter.rules import EXACT, Contract, Pass, Rule


@register
@dataclass(frozen=True)
class Fuse(Pass):
    """Fuse written-out attention into one operator, and q, k, v or gate, up linears of one input into one.

    Attributes:
        attention: matmul–scale–mask–softmax–matmul → ``scaled_dot_product_attention``, the mask as found.
        qkv: linears of one input that feed one attention → one linear and a split.
        gate_up: the two linears of a gated linear unit (SwiGLU, GeGLU) → one linear and a split.
        masks: a mask that is causal or full at every size it was evaluated at → ``is_causal=True``
            or none. Off by default: unlike the others it rests on evaluation, not on the mask's text.
        loss: a linear read by a cross entropy alone → ``linear_cross_entropy``, without a tensor of positions times
            classes. Off by default: other passes look for heads as linear layers.
    """

    name: ClassVar[str] = "fuse"
    contract: ClassVar[Contract] = EXACT
    attention: bool = True
    qkv: bool = True
    gate_up: bool = True
    masks: bool = False
    loss: bool = False

    def rules(self) -> tuple[Rule, ...]:
        chosen: tuple[tuple[bool, Rule], ...] = (
            (self.attention, FuseAttention()),
            (self.qkv, FuseQKV()),
            (self.gate_up, FuseGateUp()),
            (self.masks, FuseMask()),
            (self.loss, FuseLoss()),
        )
        return tuple(rule for wanted, rule in chosen if wanted)
