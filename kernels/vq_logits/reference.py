# SPDX-License-Identifier: Apache-2.0
"""Codebook heads in plain aten: the meaning of the operators, and what runs where no faster kernel is registered.

Notation: h hidden state, C codebook, M(i) the code of token i, b_i the bias of token i, l_j = h·C_j,
n_j = |{i: M(i) = j}|, B_j = log Σ_{M(i)=j} exp b_i (log n_j without bias; -inf for a code no token uses).

    logit_i = l_{M(i)} + b_i
    log Z   = log Σ_i exp logit_i = log Σ_j exp(l_j + B_j)          (K terms instead of V)
    NLL(y)  = log Z − l_{M(y)} − b_y

Product: the row of token i is put together from one code per group of dimensions. Exact: the same, with some rows kept.
Residual: the row is a sum of one code from each of S stages.

The tiers structure follows VQ-Logits (arXiv 2505.10202), with per-token biases added; the sums over codes are exact.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rewriter.kernels.vq_logits.codec import decode_exact, decode_product, unpack_codes

IGNORE_INDEX = -100


def tiers_logits(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """logit_i = h·C_{M(i)} + b_i. h ``[..., d]`` -> ``[..., V]`` in h's dtype."""
    logits = F.linear(h, codebook.to(h.dtype)).index_select(-1, unpack_codes(code_of))
    return logits if token_bias is None else logits + token_bias.to(h.dtype)


def tiers_logsumexp(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None) -> Tensor:
    """log Z = log Σ_j exp(l_j + B_j). h ``[..., d]`` -> ``[...]``, at least float32."""
    wide = loss_dtype(h)
    code_logits = F.linear(h, codebook.to(h.dtype)).to(wide)
    return _logsumexp(code_logits + code_log_mass(code_of, token_bias, codebook.shape[0], wide))


def tiers_nll(h: Tensor, codebook: Tensor, code_of: Tensor, token_bias: Tensor | None, target: Tensor) -> Tensor:
    """NLL(y) = log Z − l_{M(y)} − b_y; 0 where y is -100. h ``[..., d]``, target ``[...]`` -> ``[...]``."""
    wide = loss_dtype(h)
    code_logits = F.linear(h, codebook.to(h.dtype)).to(wide)
    log_z = _logsumexp(code_logits + code_log_mass(code_of, token_bias, codebook.shape[0], wide))
    counted = target != IGNORE_INDEX
    token = torch.where(counted, target, 0)
    code = F.embedding(token, unpack_codes(code_of).unsqueeze(-1))
    logit = code_logits.gather(-1, code).squeeze(-1)
    if token_bias is not None:
        logit = logit + F.embedding(token, token_bias.to(wide).unsqueeze(-1)).squeeze(-1)
    return torch.where(counted, log_z - logit, 0.0)


def product_logits(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """logit_i = Σ_g h_g·C[g, codes_ig] + bias_i, by decoding the head. h ``[..., d]`` -> ``[..., V]`` in h's dtype."""
    weight = decode_product(codebook.to(h.dtype), codes, h.shape[-1])
    return F.linear(h, weight, None if bias is None else bias.to(h.dtype))


def exact_logits(
    h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None, exact: Tensor, exact_of: Tensor
) -> Tensor:
    """`product_logits`, but logit_i = h·exact_r + bias_i for token i = exact_of[r]. h ``[..., d]`` -> ``[..., V]``.

    One matrix product over the decoded head: the logit of an exact token is the dense head's, bit for bit.
    """
    weight = decode_exact(codebook.to(h.dtype), codes, exact.to(h.dtype), exact_of)
    return F.linear(h, weight, None if bias is None else bias.to(h.dtype))


def residual_logits(h: Tensor, codebook: Tensor, codes: Tensor, bias: Tensor | None) -> Tensor:
    """logit_i = Σ_s h·C[s, a_s(i)] + bias_i, summed in at least float32. h ``[..., d]`` -> ``[..., V]`` in h's dtype."""
    stages, per_stage, width = codebook.shape
    by_code = F.linear(h, codebook.to(h.dtype).reshape(stages * per_stage, width)).to(loss_dtype(h))
    index = unpack_codes(codes)
    logits = by_code.index_select(-1, index[:, 0])
    for stage in range(1, stages):
        logits = logits + by_code.index_select(-1, index[:, stage] + stage * per_stage)
    return (logits if bias is None else logits + bias.to(logits.dtype)).to(h.dtype)


def code_logits(h: Tensor, codebook: Tensor) -> Tensor:
    """l = h Cᵀ in h's dtype, then at least float32. h ``[..., d]`` -> ``[..., K]``."""
    return F.linear(h, codebook.to(h.dtype)).to(loss_dtype(h))


def code_sums(values: Tensor, code: Tensor, codes: int) -> Tensor:
    """Σ over the tokens of each code. values ``[..., V]``, code int64 ``[V]`` -> ``[..., K]``."""
    rows = values.reshape(-1, values.shape[-1])
    # Along rows, because adding columns is slow.
    sums = rows.new_zeros((codes, rows.shape[0])).index_add(0, code, rows.t())
    return sums.t().reshape(*values.shape[:-1], codes)


def code_log_mass(code_of: Tensor, token_bias: Tensor | None, codes: int, dtype: torch.dtype) -> Tensor:
    """B_j = log Σ_{M(i)=j} exp b_i, ``[K]``; log n_j without bias; -inf (with zero gradient) for unused codes."""
    index = unpack_codes(code_of)
    if token_bias is None:
        ones = torch.ones(index.shape, dtype=dtype, device=index.device)
        return torch.zeros(codes, dtype=dtype, device=index.device).index_add(0, index, ones).log()
    bias = token_bias.to(dtype)
    # The largest bias of a code is only a shift that keeps exp in range: a constant, so it carries no gradient.
    top = torch.full((codes,), -torch.inf, dtype=dtype, device=bias.device)
    top = top.scatter_reduce(0, index, bias.detach(), "amax", include_self=True)
    top = torch.where(top.isfinite(), top, 0.0)
    mass = torch.zeros_like(top).index_add(0, index, (bias - top.index_select(0, index)).exp())
    used = mass > 0
    # log of a masked 1 instead of 0: log'(0) = inf would turn the zero gradient into NaN.
    return torch.where(used, torch.where(used, mass, 1.0).log() + top, -torch.inf)


def log_within(code: Tensor, token_bias: Tensor | None, mass: Tensor) -> Tensor:
    """log P(i | M(i)) = b_i − B_{M(i)}, ``[V]``."""
    own = mass.index_select(0, code)
    return -own if token_bias is None else token_bias.to(mass.dtype) - own


def loss_dtype(h: Tensor) -> torch.dtype:
    """Losses are float32 for half-precision hidden states (a sum over thousands of terms), else h's own dtype."""
    return torch.promote_types(h.dtype, torch.float32)


def _logsumexp(x: Tensor) -> Tensor:
    return torch.logsumexp(x, dim=-1)
