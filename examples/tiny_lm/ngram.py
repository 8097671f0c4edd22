# SPDX-License-Identifier: Apache-2.0
"""The baselines: a unigram model, and an interpolated 5-gram model with Kneser–Ney counts.

Interpolated, modified Kneser–Ney (Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language
Modeling", 1999), for an n-gram h·w with context h and the shorter context h' (h without its first token):

    p_n(w | h) = (C(hw) − D_n[C(hw)]) / C(h·)  +  γ(h) p_{n−1}(w | h')
    γ(h)       = (D_n[1] N1(h) + D_n[2] N2(h) + D_n[3] N3+(h)) / C(h·)          p_0 = 1 / V

C is the count at the highest order and, below it, the number of distinct tokens seen before the n-gram.
C(h·) sums C(hw) over w; Nc(h) counts the w with C(hw) = c (3+: at least 3). Where h was never seen,
p_n = p_{n−1}. For 0 ≤ D_n[c] ≤ c every p_n sums to one. The published closed form of the discounts D is the
starting point; they are then fitted by gradient descent to another split, since text of *other files* repeats
the training text less than the closed form assumes.

Every distinct n-gram has an id: its index among the sorted keys (id of its first n − 1 tokens) · V + (last
token). Looking up a stream is then one binary search per token and order, without hashing and so exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

Ints = NDArray[np.int64]
UNSEEN = -1
DISCOUNTS = 3  # for counts 1, 2 and at least 3
FIT_STEPS = 60


def unigram_log_probabilities(train: Ints, tokens: Ints, vocabulary: int) -> NDArray[np.float64]:
    """Natural log-probabilities of `tokens` under the add-one relative frequencies of `train`."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    log_frequencies: NDArray[np.float64] = np.log(counts / counts.sum())
    return log_frequencies[tokens]


@dataclass(frozen=True)
class _Order:
    """The distinct n-grams of one order n, by id, and what follows each (n − 1)-gram, by that one's id."""

    keys: Ints  # [n-grams], sorted
    counts: Ints  # [n-grams]: C(hw)
    totals: Ints  # [contexts]: C(h·)
    kinds: Ints  # [DISCOUNTS, contexts]: N1, N2, N3+

    def find(self, keys: Ints) -> Ints:
        """The ids of n-grams given by key; UNSEEN where there is none."""
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, places, UNSEEN)


@dataclass(frozen=True)
class _Features:
    """What one order contributes to the prediction of each token of a stream (see `interpolate`)."""

    count: torch.Tensor  # float64 [T]: C(hw)
    kind: torch.Tensor  # int64 [T]: which discount C(hw) takes; DISCOUNTS where it is 0
    total: torch.Tensor  # float64 [T]: C(h·), 1 where h is unseen
    followers: torch.Tensor  # float64 [T, DISCOUNTS]: N1, N2, N3+ of h
    seen: torch.Tensor  # bool [T]: h occurs in the training stream


@dataclass(frozen=True)
class KneserNey:
    """An interpolated n-gram model. Build with `KneserNey.fit(...)`, then `.tuned(...)` on another split."""

    vocabulary: int
    orders: tuple[_Order, ...]
    discounts: torch.Tensor  # float64 [orders, DISCOUNTS]

    @staticmethod
    def fit(tokens: Ints, order: int, vocabulary: int) -> KneserNey:
        """Counts the n-grams of a stream up to `order`. Raises ValueError where the stream is too short."""
        if order < 1 or len(tokens) <= order:
            raise ValueError(f"order {order} needs at least one and fewer than {len(tokens)} tokens")
        keys_of, ids_of, first_of = _distinct_ngrams(tokens, order, vocabulary)
        orders = []
        for n in range(1, order + 1):
            if n == order:
                counts = np.bincount(ids_of[n - 1][n - 1 :], minlength=len(keys_of[n - 1]))
            else:  # each distinct (n + 1)-gram adds one to the n-gram it ends with
                endings = ids_of[n - 1][first_of[n]]
                counts = np.bincount(endings, minlength=len(keys_of[n - 1]))
            contexts = len(keys_of[n - 2]) if n > 1 else 1
            orders.append(_order(keys_of[n - 1], counts, contexts, vocabulary))
        closed_form = [_closed_form_discounts(item.counts) for item in orders]
        return KneserNey(vocabulary, tuple(orders), torch.tensor(closed_form, dtype=torch.float64))

    def tuned(self, tokens: Ints) -> KneserNey:
        """The same counts with the discounts that minimise the cross entropy of `tokens` (L-BFGS)."""
        features = self._features(tokens)
        limits = torch.arange(1, DISCOUNTS + 1, dtype=torch.float64)  # 0 < D[c] < c
        share = (self.discounts / limits).clamp(0.01, 0.99)
        free = torch.log(share / (1 - share)).requires_grad_()
        optimizer = torch.optim.LBFGS([free], max_iter=FIT_STEPS, line_search_fn="strong_wolfe")

        def closure() -> float:
            optimizer.zero_grad()
            loss = -_interpolate(features, free.sigmoid() * limits, self.vocabulary).log().mean()
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
        return replace(self, discounts=(free.detach().sigmoid() * limits))

    def log_probabilities(self, tokens: Ints) -> NDArray[np.float64]:
        """Natural log-probabilities of each token of a stream given up to order − 1 tokens before it, [T]."""
        found = _interpolate(self._features(tokens), self.discounts, self.vocabulary)
        return found.log().numpy()

    def _features(self, tokens: Ints) -> list[_Features]:
        before = np.zeros(len(tokens), dtype=np.int64)  # the id of the empty context
        features = []
        for order in self.orders:
            keys = before * self.vocabulary + tokens
            ids = np.where(before == UNSEEN, UNSEEN, order.find(keys))
            seen = (before != UNSEEN) & (order.totals[before] > 0)
            count = np.where(ids == UNSEEN, 0, order.counts[ids])
            features.append(
                _Features(
                    count=torch.from_numpy(count.astype(np.float64)),
                    kind=torch.from_numpy(np.where(count == 0, DISCOUNTS, np.minimum(count, DISCOUNTS) - 1)),
                    total=torch.from_numpy(np.where(seen, order.totals[before], 1).astype(np.float64)),
                    followers=torch.from_numpy(order.kinds[:, before].T.astype(np.float64)),
                    seen=torch.from_numpy(seen),
                )
            )
            before = np.concatenate(([UNSEEN], ids[:-1]))  # this n-gram is the next order's context, one on
        return features


def _distinct_ngrams(tokens: Ints, order: int, vocabulary: int) -> tuple[list[Ints], list[Ints], list[Ints]]:
    """Per order: the sorted keys, the id of the n-gram ending at each place, a place where each one ends."""
    keys_of, ids_of, first_of = [], [], []
    before = np.zeros(len(tokens), dtype=np.int64)
    for n in range(1, order + 1):
        keys = before[n - 1 :] * vocabulary + tokens[n - 1 :]
        distinct, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        ids = np.full(len(tokens), UNSEEN, dtype=np.int64)
        ids[n - 1 :] = inverse
        keys_of.append(distinct)
        ids_of.append(ids)
        first_of.append(first + n - 1)
        before = np.concatenate(([UNSEEN], ids[:-1]))
    return keys_of, ids_of, first_of


def _order(keys: Ints, counts: Ints, contexts: int, vocabulary: int) -> _Order:
    context = keys // vocabulary
    totals = np.bincount(context, weights=counts, minlength=contexts).astype(np.int64)
    kinds = [
        np.bincount(context[chosen], minlength=contexts) for chosen in (counts == 1, counts == 2, counts >= DISCOUNTS)
    ]
    return _Order(keys, counts, totals, np.stack(kinds))


def _closed_form_discounts(counts: Ints) -> list[float]:
    """D[c] = c − (c + 1) Y n_{c+1} / n_c with Y = n_1 / (n_1 + 2 n_2), where n_c n-grams have count c."""
    n = [np.count_nonzero(counts == c) for c in range(DISCOUNTS + 2)]
    if min(n[1:]) == 0:  # too little text for the estimate: a plain absolute discount
        return [0.75] * DISCOUNTS
    y = n[1] / (n[1] + 2 * n[2])
    return [min(max(c - (c + 1) * y * n[c + 1] / n[c], 0.0), float(c)) for c in range(1, DISCOUNTS + 1)]


def _interpolate(features: list[_Features], discounts: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The probabilities of a stream's tokens, float64 [T]; differentiable in `discounts`."""
    probability = torch.full_like(features[0].count, 1 / vocabulary)
    for order, discount in zip(features, discounts, strict=True):
        taken = torch.cat((discount, discount.new_zeros(1)))[order.kind]
        weight = order.followers @ discount / order.total
        mixed = (order.count - taken) / order.total + weight * probability
        probability = torch.where(order.seen, mixed, probability)
    return probability
