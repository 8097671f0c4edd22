# SPDX-License-Identifier: Apache-2.0
"""What follows a codebook head: losses, softmaxes and the largest logits without logits over the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rewriter.passes.after_head.rules import (
    CrossEntropyAfterHead,
    LargestAfterHead,
    LogSoftmaxAfterHead,
    SoftmaxAfterHead,
)
from rewriter.registry import register
from rewriter.rules import EXACT, Contract, Pass, Rule


@register
@dataclass(frozen=True)
class AfterHead(Pass):
    """Let what follows a codebook head read its codes. For models that have such a head; ``vq_logits`` does the same to
    what follows the heads it makes.

    Attributes:
        cross_entropy: losses against tokens or probabilities, with weights, smoothing and ignored targets.
        log_softmax: of tiers.
        softmax: of tiers.
        largest: argmax, max and topk.
    """

    name: ClassVar[str] = "after_head"
    contract: ClassVar[Contract] = EXACT
    cross_entropy: bool = True
    log_softmax: bool = True
    softmax: bool = True
    largest: bool = True

    def rules(self) -> tuple[Rule, ...]:
        wanted: tuple[tuple[bool, Rule], ...] = (
            (self.cross_entropy, CrossEntropyAfterHead()),
            (self.log_softmax, LogSoftmaxAfterHead()),
            (self.softmax, SoftmaxAfterHead()),
            (self.largest, LargestAfterHead()),
        )
        return tuple(rule for is_wanted, rule in wanted if is_wanted)
