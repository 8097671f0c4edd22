# SPDX-License-Identifier: Apache-2.0
"""Language-model quality: the one place that defines perplexity, KL divergence and top-1 agreement.

For tokens x_1 … x_L of one window, the model's logits at position t give p_t, its distribution of x_{t+1}:

    nll        = −mean_t log p_t(x_{t+1})                      nats per token
    perplexity = exp(nll)
    kl         = mean_t Σ_v q_t(v) · (log q_t(v) − log p_t(v))   nats per token, q: the reference model
    top1       = mean_t [argmax q_t = argmax p_t]

Means run over all predicted tokens of all windows, each counted once: positions 1 … L−1 predict 2 … L, and
the first token of a window is never predicted. Logits are taken as the model gives them; everything after is
float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.errors import PlanError

Model = Callable[[Tensor], Any]
Progress = Callable[[int, int], None]

# Elements of one float64 working tensor: 2 MB, which stays in the cache (measured: 4 × faster than 32 MB).
_CHUNK = 1 << 18


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts tokens, and how far it is from a reference.

    Attributes:
        tokens: predicted tokens, the number every mean is over.
        windows: number of windows; length: tokens per window, of which length − 1 are predicted.
        nll: mean negative log-likelihood in nats per token.
        perplexity: exp(nll).
        reference_nll, reference_perplexity: the same of the reference; None without one.
        kl: mean KL(reference ‖ model) in nats per token; None without a reference.
        top1: share of tokens where both models' most likely token is the same; None without a reference.
    """

    tokens: int
    windows: int
    length: int
    nll: float
    perplexity: float
    reference_nll: float | None = None
    reference_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinities as text, since JSON has none."""
        return {k: v if v is None or math.isfinite(v) else str(v) for k, v in asdict(self).items()}


def evaluate(
    model: Model,
    tokens: Tensor,
    *,
    reference: Model | None = None,
    length: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a causal language model, and its KL divergence and top-1 agreement with a reference.

    Modules are run in evaluation mode and without gradients; training flags and the grad mode are restored,
    also on errors. Memory beyond the models' own logits is bounded whatever the vocabulary.

    Args:
        model: called with int64 ids [batch, length]; returns logits [batch, length, V] as a tensor, as
            ``.logits`` or ``["logits"]``, or first in a tuple.
        tokens: integer ids [n, L], or [N] to be cut into consecutive windows of ``length`` (a last, shorter
            piece is left out; ``Evaluation.tokens`` says what was counted).
        reference: the original model, with the same vocabulary.
        length: tokens per window; rows of [n, L] longer than it are cut too. Default: L.
        batch: windows per call of a model.
        progress: called with (windows done, windows in all) after each batch.

    Raises:
        PlanError: tokens, lengths or logits that do not fit each other; says which.
    """
    windows = _windows(tokens, length)
    if batch < 1:
        raise PlanError(f"batch must be at least 1, not {batch}")
    models = (model,) if reference is None else (model, reference)
    total = _Sums()
    with ExitStack() as stack:
        for each in models:
            stack.enter_context(_evaluating(each))
        stack.enter_context(torch.no_grad())
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch]
            total += _batch_sums([_logits(each, ids) for each in models], ids)
            if progress is not None:
                progress(min(start + batch, len(windows)), len(windows))
    return total.evaluation(len(windows), windows.shape[1], reference is not None)


# --- sums over tokens ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sums:
    """Sums over predicted tokens, in float64."""

    tokens: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    agree: int = 0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.tokens + other.tokens,
            self.nll + other.nll,
            self.reference_nll + other.reference_nll,
            self.kl + other.kl,
            self.agree + other.agree,
        )

    def evaluation(self, windows: int, length: int, compared: bool) -> Evaluation:
        nll = self.nll / self.tokens
        if not compared:
            return Evaluation(self.tokens, windows, length, nll, _exp(nll))
        reference_nll = self.reference_nll / self.tokens
        return Evaluation(
            self.tokens,
            windows,
            length,
            nll,
            _exp(nll),
            reference_nll,
            _exp(reference_nll),
            self.kl / self.tokens,
            self.agree / self.tokens,
        )


def _batch_sums(logits: list[Tensor], ids: Tensor) -> _Sums:
    """Sums over one batch; float64 distributions exist for a few rows at a time only."""
    vocabulary = {each.shape[-1] for each in logits}
    if len(vocabulary) > 1:
        raise PlanError(
            f"the model has {logits[0].shape[-1]} logits and the reference {logits[1].shape[-1]}; KL and "
            "agreement compare distributions over the same tokens"
        )
    length = ids.shape[1]
    flat = ids.reshape(-1)
    rows = [each.reshape(-1, each.shape[-1]) for each in logits]
    is_last = torch.arange(len(flat)) % length == length - 1  # the last token of a window predicts nothing
    predicting = torch.nonzero(~is_last)[:, 0]
    total = _Sums()
    for part in torch.split(predicting, max(1, _CHUNK // max(vocabulary))):
        log_probabilities = [torch.log_softmax(r[part.to(r.device)].double(), -1) for r in rows]
        total += _row_sums(log_probabilities, flat[part.to(flat.device) + 1])
    return total


def _row_sums(log_probabilities: list[Tensor], targets: Tensor) -> _Sums:
    """Sums over rows of log-probabilities [rows, V] of the model (p) and, if given, the reference (q)."""
    log_p, *others = log_probabilities
    index = targets.to(log_p.device)[:, None]
    nll = -float(log_p.gather(1, index).sum())
    if not others:
        return _Sums(len(targets), nll)
    log_q = others[0].to(log_p.device)
    # 0 · log 0 = 0: a token the reference excludes costs nothing. KL is never negative; what rounding leaves
    # below zero is cut row by row.
    terms = torch.where((log_q == -math.inf) | (log_q == log_p), 0.0, log_q.exp() * (log_q - log_p))
    kl = terms.sum(-1).clamp_min(0.0)
    agree = int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return _Sums(len(targets), nll, -float(log_q.gather(1, index).sum()), float(kl.sum()), agree)


def _exp(nll: float) -> float:
    """exp, infinite where float64 overflows."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


# --- tokens and models --------------------------------------------------------------------------------------


def _windows(tokens: Tensor, length: int | None) -> Tensor:
    """int64 windows [n, length]. Raises PlanError."""
    dtype = tokens.dtype if isinstance(tokens, Tensor) else None
    if dtype is None or dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        raise PlanError(f"tokens must be an integer tensor of ids, not {dtype or type(tokens).__name__}")
    if tokens.dim() not in (1, 2):
        raise PlanError(f"tokens must be [n, length] or one stream [N], not {list(tokens.shape)}")
    if length is None and tokens.dim() == 1:
        raise PlanError("a stream of tokens needs length=, the tokens per window (the model's context, or less)")
    length = tokens.shape[1] if length is None else length
    if length < 2:
        raise PlanError(f"length must be at least 2 (one token to see, one to predict), not {length}")
    usable = tokens.shape[-1] // length * length
    windows = tokens.long()[..., :usable].reshape(-1, length)
    if not len(windows):
        raise PlanError(f"{list(tokens.shape)} tokens make no window of {length}")
    if int(windows.min()) < 0:
        raise PlanError(f"tokens must be ids, but there is a {int(windows.min())} (an ignore index?)")
    return windows


def _logits(model: Model, ids: Tensor) -> Tensor:
    """Logits [batch, length, V] for every position of the ids. Raises PlanError."""
    try:
        result = model(ids.to(_device(model, ids)))
    except IndexError as error:  # what an embedding raises for an id, or a position, it has no row for
        raise PlanError(
            f"the model cannot read windows of {ids.shape[1]} tokens, ids up to {int(ids.max())}: {error}. "
            "They were made with another tokenizer, or length= is longer than the model's context"
        ) from error
    if isinstance(result, Mapping) and "logits" in result:
        result = result["logits"]
    elif hasattr(result, "logits"):
        result = result.logits
    elif isinstance(result, tuple | list) and result:
        result = result[0]
    if not isinstance(result, Tensor) or result.dim() != 3 or result.shape[:2] != ids.shape:
        what = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise PlanError(f"evaluate() needs logits [{ids.shape[0]}, {ids.shape[1]}, V] from the model, but got {what}")
    if int(ids.max()) >= result.shape[-1]:
        raise PlanError(
            f"tokens reach up to {int(ids.max())}, but the model has {result.shape[-1]} logits; they were "
            "made with another tokenizer"
        )
    return result


def _device(model: Model, ids: Tensor) -> torch.device:
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), ids.device)


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Evaluation mode inside, every module's own training flag back afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [module.training for module in modules]
    if not any(flags):
        yield
        return
    try:
        model.eval()  # type: ignore[attr-defined]
        yield
    finally:
        model.train(flags[0])  # type: ignore[attr-defined]
        for module, training in zip(modules, flags, strict=True):
            module.training = training
