# SPDX-License-Identifier: Apache-2.0
"""What follows a head in plain aten: softmax, losses and the largest logits, without logits over the vocabulary.

Notation as in ``kernels/vq_logits/reference.py``: l_j = h·C_j, B_j = log Σ_{M(i)=j} exp b_i, logit_i = l_{M(i)} + b_i,
log Z = log Σ_j exp(l_j + B_j). A token's probability has two factors, of which the second knows no context:

    p(i) = P(M(i)) · P(i | M(i))        log P(j) = l_j + B_j − log Z        log P(i | j) = b_i − B_j

A loss against weights t_i on the tokens needs their sums per code only, T_j = Σ_{M(i)=j} t_i:

    −Σ_i t_i log p(i) = −Σ_j T_j log P(j) − Σ_i t_i log P(i | M(i))

Heads whose tokens have rows of their own (dense, or decoded from product codes) have no such sums; there V is walked in
chunks, and no more than ``CHUNK`` columns of logits are alive.

Equal logits are ordered by token number, smallest first; ``topk`` of torch leaves that open.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.vq_logits.codec import unpack_codes
from rewriter.kernels.vq_logits.reference import code_log_mass, log_within, loss_dtype, tiers_logits
from rewriter.kernels.vq_logits.reference import code_logits as code_logits
from rewriter.kernels.vq_logits.reference import code_sums as code_sums

# Tokens whose logits are formed at a time where a head is walked row by row.
CHUNK = 2048
_LAST = torch.iinfo(torch.int64).max


# -- tiers -------------------------------------------------------------------------------------------------------


def log_posteriors(
    h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """log P(j) = l_j + B_j − log Z ``[..., K]``, log P(i | M(i)) = b_i − B_{M(i)} ``[V]``, and M int64 ``[V]``.

    Both are at most 0, so that sums of them lose nothing to cancellation. A code without tokens has log P = 0 here: it
    is multiplied by 0 wherever it is used.
    """
    logits, code = code_logits(h, codebook), unpack_codes(code_of)
    mass = code_log_mass(code_of, token_bias, codebook.shape[0], logits.dtype)
    by_code = torch.log_softmax(logits + mass, dim=-1)
    return torch.where(mass > -torch.inf, by_code, 0.0), log_within(code, token_bias, mass), code


def tiers_log_softmax(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """log p(i) = log P(M(i)) + log P(i | M(i)). h ``[..., d]`` -> ``[..., V]``, at least float32."""
    by_code, within, code = log_posteriors(h, codebook, code_of, token_bias)
    return by_code.index_select(-1, code) + within


def tiers_softmax(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """p(i) = P(M(i)) · P(i | M(i)). h ``[..., d]`` -> ``[..., V]``, at least float32."""
    by_code, within, code = log_posteriors(h, codebook, code_of, token_bias)
    return by_code.exp().index_select(-1, code) * within.exp()


def tiers_cross_entropy(
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """−(1 − ε) w_y log p(y) − ε/V Σ_i w_i log p(i), ε the smoothing; 0 where y is ignored.

    h ``[..., d]``, target int64 ``[...]``, weight ``[V]`` -> ``[...]``, at least float32: ``F.cross_entropy`` unreduced.
    """
    by_code, within, code = log_posteriors(h, codebook, code_of, token_bias)
    counted = target != ignore_index
    token = torch.where(counted, target, 0)
    own = F.embedding(token, code.unsqueeze(-1))
    loss = -by_code.gather(-1, own).squeeze(-1) - _of_token(within, token)
    if weight is not None:
        loss = loss * _of_token(weight.to(loss.dtype), token)
    if label_smoothing:
        share = torch.ones_like(within) if weight is None else weight.to(loss.dtype)
        everywhere = -(by_code @ code_sums(share, code, codebook.shape[0])) - (share * within).sum()
        loss = (1 - label_smoothing) * loss + (label_smoothing / code.shape[0]) * everywhere
    return torch.where(counted, loss, 0.0)


def tiers_soft_cross_entropy(
    h: Tensor,
    codebook: Tensor,
    code_of: Tensor,
    token_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
) -> Tensor:
    """−Σ_i t_i log p(i) = −Σ_j T_j log P(j) − Σ_i t_i log P(i | M(i)) with t_i = w_i ((1 − ε) target_i + ε/V).

    h ``[..., d]``, target probabilities ``[..., V]``, weight ``[V]`` -> ``[...]``, at least float32.
    """
    by_code, within, code = log_posteriors(h, codebook, code_of, token_bias)
    t = soft_weights(target.to(by_code.dtype), weight, label_smoothing)
    return -(code_sums(t, code, codebook.shape[0]) * by_code).sum(-1) - t @ within


def soft_weights(target: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """t_i = w_i ((1 − ε) target_i + ε/V), ``[..., V]``."""
    if label_smoothing:
        target = (1 - label_smoothing) * target + label_smoothing / target.shape[-1]
    return target if weight is None else target * weight.to(target.dtype)


def tiers_topk(
    h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, k: int, stable: bool = True
) -> tuple[Tensor, Tensor]:
    """The k largest logits and their tokens, largest first, of equals the smaller token first.

    Of each code only the k largest biases can be among them, and only of the k codes whose best token is best: k²
    candidates (all V tokens where that is not more). Tokens of one code whose logits differ only before they are rounded
    count as different here. h ``[..., d]`` -> values ``[..., k]`` in h's dtype, tokens int64.
    ``stable=False`` leaves the order of equals to a sort that is known to keep it (ONNX's, which has no such option).
    """
    tokens, codes = code_of.shape[0], codebook.shape[0]
    if k * min(k, codes) >= tokens:
        logits = tiers_logits(h, codebook, code_of, token_bias)
        place = largest(logits, torch.arange(tokens, device=h.device), k, stable)
        return logits.gather(-1, place), place
    code = unpack_codes(code_of)
    bias = torch.zeros_like(code, dtype=h.dtype) if token_bias is None else token_bias.to(h.dtype)
    order, first, count = by_code(code, bias, codes, stable)
    best = torch.where(count > 0, order[first.clamp(max=tokens - 1)], tokens)
    top = torch.where(count > 0, bias[best.clamp(max=tokens - 1)], -torch.inf)
    logits = F.linear(h, codebook.to(h.dtype))
    picked = largest(logits + top, best, min(k, codes), stable)
    rank = torch.arange(k, device=h.device)
    exists = rank < count[picked].unsqueeze(-1)
    token = torch.where(exists, order[(first[picked].unsqueeze(-1) + rank).clamp(max=tokens - 1)], _LAST)
    logit = logits.gather(-1, picked).unsqueeze(-1) + bias[torch.where(exists, token, 0)]
    token, logit = token.flatten(-2), torch.where(exists, logit, -torch.inf).flatten(-2)
    place = largest(logit, token, k, stable)
    return logit.gather(-1, place), token.gather(-1, place)


def by_code(code: Tensor, bias: Tensor, codes: int, stable: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens ordered by code, then largest bias, then number ``[V]``; first position ``[K]`` and number ``[K]`` of each
    code's."""
    order = _sorted(bias, stable, descending=True)
    order = order[_sorted(code[order], stable)]
    count = torch.zeros(codes, dtype=torch.int64, device=code.device).index_add(0, code, torch.ones_like(code))
    return order, count.cumsum(0) - count, count


def largest(values: Tensor, ids: Tensor, k: int, stable: bool = True) -> Tensor:
    """Positions ``[..., k]`` of the k largest values, largest first, of equals the smaller id first.

    values ``[..., n]``, ids ``[n]`` or ``[..., n]``.
    """
    ids = ids.expand(values.shape)
    threshold = values.topk(k).values[..., -1:]
    # All above the threshold are in; of those that equal it, the smallest ids.
    turn = torch.where(values > threshold, -1, torch.where(values == threshold, ids, _LAST))
    place = turn.topk(k, largest=False).indices
    place = place.gather(-1, ids.gather(-1, place).sort(-1).indices)
    return place.gather(-1, _sorted(values.gather(-1, place), stable, descending=True))


# -- heads with a row per token ----------------------------------------------------------------------------------


def linear_logsumexp(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """log Σ_i exp(h·w_i + b_i), chunk by chunk. h ``[..., d]``, weight ``[V, d]`` -> ``[...]``, at least float32."""
    parts = [torch.logsumexp(row_logits(h, weight, bias, start), dim=-1) for start in range(0, weight.shape[0], CHUNK)]
    return torch.logsumexp(torch.stack(parts), dim=0)


def linear_topk(h: Tensor, weight: Tensor, bias: Tensor | None, k: int, stable: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest of h·w_i + b_i and their tokens, chunk by chunk; order, shapes and dtypes as `tiers_topk`."""
    values = h.new_empty((*h.shape[:-1], 0))
    tokens = torch.empty((*h.shape[:-1], 0), dtype=torch.int64, device=h.device)
    for start in range(0, weight.shape[0], CHUNK):
        logits = row_logits(h, weight, bias, start).to(h.dtype)
        here = torch.arange(start, start + logits.shape[-1], device=h.device).expand(logits.shape)
        values, tokens = torch.cat([values, logits], -1), torch.cat([tokens, here], -1)
        place = largest(values, tokens, min(k, values.shape[-1]), stable)
        values, tokens = values.gather(-1, place), tokens.gather(-1, place)
    return values, tokens


def row_logits(h: Tensor, weight: Tensor, bias: Tensor | None, start: int) -> Tensor:
    """Logits of the tokens from ``start`` on, at most CHUNK of them: in h's dtype, then at least float32."""
    rows = weight[start : start + CHUNK].to(h.dtype)
    offsets = None if bias is None else bias[start : start + CHUNK].to(h.dtype)
    return F.linear(h, rows, offsets).to(loss_dtype(h))


# -- parts -------------------------------------------------------------------------------------------------------


def _of_token(values: Tensor, token: Tensor) -> Tensor:
    """values[token] for values ``[V]``; a token outside is an error, also where indexing would wrap around."""
    return F.embedding(token, values.unsqueeze(-1)).squeeze(-1)


def _sorted(values: Tensor, stable: bool, descending: bool = False) -> Tensor:
    """Positions that sort the last dimension."""
    if stable:
        return torch.sort(values, dim=-1, descending=descending, stable=True).indices
    return torch.sort(values, dim=-1, descending=descending).indices
