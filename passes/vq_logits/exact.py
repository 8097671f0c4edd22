# SPDX-License-Identifier: Apache-2.0
"""Exact rows beside a product code: the tokens whose coded rows would cost most keep the dense head's rows.

The cost of token i in a fitted codebook, a_i e_iᵀ(S + μ_iμ_iᵀ)e_i (see `metric`), is what its error adds to the KL. With
calibration a_i is how often the token is a likely one, so these are mostly the frequent tokens, and the few of them that
happen to be well coded stay coded. One row of 2d bytes then buys the largest share of the KL there is to buy. Rows that
are kept no longer pull at the codebooks: the rest is fitted once more without them.

    fit  ->  the m tokens of largest cost  ->  their weight a_i := 0  ->  fit on from there
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewriter.errors import PlanError
from rewriter.kernels.vq_logits.codec import pack_codes
from rewriter.passes.vq_logits.heads import ExactHead
from rewriter.passes.vq_logits.metric import head_metric
from rewriter.passes.vq_logits.product import ProductFit, check_product_options

# Visits of every group after the rows were taken out.
SWEEPS_AFTER = 4
# Weight of a row that needs no code, next to a mean weight of 1: the least-squares problems must stay solvable.
NOTHING = 1e-6


@torch.no_grad()
def fit_exact(
    weight: Tensor,
    *,
    rows: int,
    dims: int = 4,
    codes: int = 256,
    counts: Tensor | None = None,
    second_moment: Tensor | None = None,
    hidden: Tensor | None = None,
    metric: str = "auto",
    head_bias: Tensor | None = None,
    sweeps: int = 6,
    generator: torch.Generator,
) -> ExactHead:
    """Product codebook of a dense head in which ``rows`` tokens keep their own row ``[d]``, bit for bit.

    Args:
        rows: m, from 1 to V.
        weight, dims, codes, counts, second_moment, hidden, metric, head_bias, sweeps, generator: as `fit_product`'s.

    Raises:
        PlanError: as `fit_product`, and for more rows than tokens or none.
    """
    check_product_options(weight, dims, codes)
    tokens = weight.shape[0]
    if not 1 <= rows <= tokens:
        raise PlanError(f"exact_rows={rows} of a head of {tokens} tokens: give at least 1 and at most all of them")
    form = head_metric(metric, weight, head_bias=head_bias, counts=counts, second_moment=second_moment, hidden=hidden)
    fit = ProductFit(weight, dims, form)
    fit.start(codes, generator)
    fit.descend(sweeps)
    # Equal costs (a head that the codebook holds exactly) are settled by token id, in a stable sort.
    kept = fit.cost_per_token().argsort(descending=True, stable=True)[:rows].sort().values
    fit.a = fit.a.index_fill(0, kept, NOTHING)
    for _ in range(min(sweeps, SWEEPS_AFTER)):
        fit.sweep()
    coded = fit.head(weight.dtype, head_bias)
    exact = weight.detach().index_select(0, kept)
    return ExactHead(coded.codebook, coded.codes, coded.bias, exact, pack_codes(kept, tokens))
