# SPDX-License-Identifier: Apache-2.0
"""What one wants of a head besides logits, as methods of its module: losses, the best tokens, draws.

A tiers head answers from K code logits; other heads have a row per token, decoded for the call and walked in chunks.
Either way no tensor of positions times vocabulary is made where the result is none. Everything is exact with respect to
the head: equal to the same thing done to its logits, gradients included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewriter.kernels.after_head import reference
from rewriter.kernels.after_head.op import (
    linear_logsumexp,
    linear_topk,
    vq_tiers_cross_entropy,
    vq_tiers_log_softmax,
    vq_tiers_soft_cross_entropy,
    vq_tiers_softmax,
    vq_tiers_topk,
)
from rewriter.kernels.cross_entropy.op import linear_cross_entropy
from rewriter.kernels.vq_logits.op import vq_tiers_logsumexp, vq_tiers_nll
from rewriter.kernels.vq_logits.reference import loss_dtype
from rewriter.passes.vq_logits.sampling import Distribution, RowDistribution, Sampling
from rewriter.passes.vq_logits.sampling_codes import CodeDistribution, CodeTable


@dataclass(frozen=True)
class Sampler:
    """Draws tokens of one head in one way; made once, used for every step.

    The head is read when the sampler is made: after training it, make another.
    """

    how: Sampling
    width: int
    head: CodeTable | tuple[Tensor, Tensor | None]

    @torch.no_grad()
    def __call__(self, h: Tensor, *, generator: torch.Generator, previous: Tensor | None = None) -> Tensor:
        """Tokens int64 ``[...]`` for hidden states ``[..., d]``.

        Args:
            h: hidden states.
            generator: the only source of randomness, on h's device.
            previous: int64 ``[..., P]``, the tokens a repetition penalty is for; negative ones are none.

        Raises:
            ValueError: shapes that do not fit, or a repetition penalty without ``previous``.
        """
        return self.distribution(h, previous).sample(self.how, generator).reshape(h.shape[:-1])

    def distribution(self, h: Tensor, previous: Tensor | None = None) -> Distribution:
        """What is drawn from, for ``h`` flattened to ``[N, d]``."""
        if h.shape[-1:] != (self.width,):
            raise ValueError(f"h is {tuple(h.shape)}; the head's width is {self.width}")
        if self.how.repetition_penalty != 1 and previous is None:
            raise ValueError("a repetition penalty needs previous=, the tokens seen so far, [..., P]")
        if previous is not None:
            if previous.shape[:-1] != h.shape[:-1] or previous.dtype != torch.int64:
                raise ValueError(
                    f"previous must be int64 {[*h.shape[:-1], 'P']}, not {previous.dtype} {list(previous.shape)}"
                )
            previous = previous.reshape(-1, previous.shape[-1])
        flat = h.detach().reshape(-1, self.width)
        if isinstance(self.head, CodeTable):
            return CodeDistribution(flat, self.head, self.how, previous)
        return RowDistribution(flat, *self.head, self.how, previous)


class AfterHead(nn.Module, ABC):
    """A head's module with methods for what follows it. h is ``[..., d]`` throughout; losses are at least float32."""

    in_features: int
    out_features: int

    @abstractmethod
    def logsumexp(self, h: Tensor) -> Tensor:
        """log Z = log Σ_i exp logit_i per position, ``[...]``."""

    @abstractmethod
    def nll(
        self,
        h: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> Tensor:
        """Cross entropy per position, ``[...]``: ``F.cross_entropy(logits, target, ..., reduction="none")``.

        Args:
            h: hidden states ``[..., d]``.
            target: tokens int64 ``[...]``, or probabilities ``[..., V]``.
            weight: ``[V]``, of the classes; has no gradient.
            label_smoothing: in [0, 1].
            ignore_index: target with loss 0; not for probabilities.
        """

    @abstractmethod
    def log_softmax(self, h: Tensor) -> Tensor:
        """log p(i), ``[..., V]``, at least float32."""

    @abstractmethod
    def softmax(self, h: Tensor) -> Tensor:
        """p(i), ``[..., V]``, at least float32."""

    @abstractmethod
    def topk(self, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits and their tokens, ``[..., k]`` each: largest first, of equals the smaller token first."""

    @abstractmethod
    def _drawn_from(self, how: Sampling) -> CodeTable | tuple[Tensor, Tensor | None]:
        """The head as a sampler keeps it."""

    def argmax(self, h: Tensor) -> Tensor:
        """The most likely token, int64 ``[...]``; of equals the smaller."""
        return self.topk(h, 1)[1].squeeze(-1)

    @torch.no_grad()
    def sampler(
        self,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
    ) -> Sampler:
        """A sampler to be used for many steps; see :class:`rewriter.passes.vq_logits.sampling.Sampling`.

        Raises:
            ValueError: a value outside its range.
        """
        how = Sampling(temperature, top_k, top_p, repetition_penalty)
        return Sampler(how, self.in_features, self._drawn_from(how))

    def sample(
        self, h: Tensor, *, generator: torch.Generator, previous: Tensor | None = None, **options: Any
    ) -> Tensor:
        """One token int64 ``[...]`` for each position; options are those of `sampler`."""
        return self.sampler(**options)(h, generator=generator, previous=previous)


class AfterTiers(AfterHead):
    """Of a module with ``codebook``, ``code_of`` and ``token_bias``."""

    codebook: nn.Parameter
    code_of: Tensor
    token_bias: nn.Parameter | None

    def logsumexp(self, h: Tensor) -> Tensor:
        return vq_tiers_logsumexp(h, self.codebook, self.code_of, self.token_bias)

    def nll(
        self,
        h: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> Tensor:
        head = (self.codebook, self.code_of, self.token_bias)
        if target.is_floating_point():
            return vq_tiers_soft_cross_entropy(h, *head, target, weight, label_smoothing)
        if weight is None and not label_smoothing and ignore_index == -100:
            return vq_tiers_nll(h, *head, target)
        return vq_tiers_cross_entropy(h, *head, target, weight, label_smoothing, ignore_index)

    def log_softmax(self, h: Tensor) -> Tensor:
        return vq_tiers_log_softmax(h, self.codebook, self.code_of, self.token_bias)

    def softmax(self, h: Tensor) -> Tensor:
        return vq_tiers_softmax(h, self.codebook, self.code_of, self.token_bias)

    def topk(self, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, tokens = vq_tiers_topk(h, self.codebook, self.code_of, self.token_bias, k)
        return values, tokens

    def _drawn_from(self, how: Sampling) -> CodeTable:
        return CodeTable.of(self.codebook, self.code_of, self.token_bias, how.temperature)


class AfterRows(AfterHead):
    """Of a module whose ``weight`` decodes to ``[V, d]``, and whose ``bias`` is ``[V]`` or None."""

    def logsumexp(self, h: Tensor) -> Tensor:
        return linear_logsumexp(h, *self._rows())

    def nll(
        self,
        h: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> Tensor:
        rows, bias = self._rows()
        if not target.is_floating_point():
            options = weight, ignore_index, label_smoothing, None, reference.CHUNK
            loss: Tensor = linear_cross_entropy(h, rows, bias, target, *options)[0]
            return loss
        log_z = linear_logsumexp(h, rows, bias)
        t = reference.soft_weights(target.to(log_z.dtype), weight, label_smoothing)
        return log_z * t.sum(-1) - _expected(h, t, rows, bias)

    def log_softmax(self, h: Tensor) -> Tensor:
        return F.log_softmax(self(h).to(loss_dtype(h)), dim=-1)

    def softmax(self, h: Tensor) -> Tensor:
        return F.softmax(self(h).to(loss_dtype(h)), dim=-1)

    def topk(self, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, tokens = linear_topk(h, *self._rows(), k)
        return values, tokens

    def _rows(self) -> tuple[Tensor, Tensor | None]:
        module: Any = self
        return module.weight, module.bias

    def _drawn_from(self, how: Sampling) -> tuple[Tensor, Tensor | None]:
        rows, bias = self._rows()
        return rows.detach(), None if bias is None else bias.detach()


def _expected(h: Tensor, t: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """Σ_i t_i (h·w_i + b_i) = h·(Σ_i t_i w_i) + Σ_i t_i b_i, for t ``[..., V]``: no logits needed."""
    wide = loss_dtype(h)
    total = (h.to(wide) * (t @ rows.to(wide))).sum(-1)
    return total if bias is None else total + t @ bias.to(wide)
