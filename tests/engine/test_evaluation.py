# SPDX-License-Identifier: Apache-2.0
"""Perplexity, KL divergence and agreement: against direct computations, and as laws."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import evaluation
from rewriter.errors import PlanError
from rewriter.evaluation import Evaluation, evaluate

from .small_models import small_model


class Bigram(nn.Module):
    """Logits of the next token as a table of the present one."""

    def __init__(self, vocabulary: int, seed: int, scale: float = 2.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(scale * torch.randn(vocabulary, vocabulary, generator=g))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def stream(vocabulary: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, vocabulary, (n,), generator=torch.Generator().manual_seed(seed))


def direct(model: nn.Module, reference: nn.Module, windows: Tensor) -> Evaluation:
    """The definitions, token by token in Python."""
    nll, reference_nll, kl, agree, count = 0.0, 0.0, 0.0, 0, 0
    with torch.no_grad():
        for window in windows:
            p, q = (m(window[None])[0].double().softmax(-1) for m in (model, reference))
            for t in range(len(window) - 1):
                nll -= math.log(p[t, window[t + 1]])
                reference_nll -= math.log(q[t, window[t + 1]])
                kl += sum(float(b) * math.log(b / a) for a, b in zip(p[t], q[t], strict=True))
                agree += int(p[t].argmax() == q[t].argmax())
                count += 1
    mean, other = nll / count, reference_nll / count
    n, length = windows.shape
    return Evaluation(count, n, length, mean, math.exp(mean), other, math.exp(other), kl / count, agree / count)


@given(
    vocabulary=st.integers(2, 12),
    windows=st.integers(1, 5),
    length=st.integers(2, 6),
    batch=st.integers(1, 4),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_figures_are_their_definitions_for_every_batch_and_chunk(
    vocabulary: int, windows: int, length: int, batch: int, chunk: int, seed: int
) -> None:
    model, reference = Bigram(vocabulary, seed), Bigram(vocabulary, seed + 1)
    tokens = stream(vocabulary, windows * length, seed).reshape(windows, length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "_CHUNK", chunk)
        found = evaluate(model, tokens, reference=reference, batch=batch)
    expected = direct(model, reference, tokens)
    assert found.tokens == expected.tokens == windows * (length - 1)
    assert found.to_json().keys() == expected.to_json().keys()
    for name, value in expected.to_json().items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12, abs=1e-12), name


@given(st.integers(2, 30), st.integers(0, 99), st.floats(0, 30), st.sampled_from([0.0, 1e-9, 1e-4, 1.0]))
@settings(deadline=None, max_examples=50)
def test_kl_is_never_negative_and_zero_for_the_same_distribution(
    vocabulary: int, seed: int, scale: float, change: float
) -> None:
    model = Bigram(vocabulary, seed, scale).double()
    other = Bigram(vocabulary, seed, scale).double()
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(vocabulary, vocabulary, generator=g, dtype=torch.float64)
    other.table.data += change * noise
    tokens = stream(vocabulary, 40, seed)
    result = evaluate(other, tokens, reference=model, length=8)
    assert result.kl is not None and result.kl >= 0
    if change == 0:
        assert result.kl == 0 and result.top1 == 1 and result.nll == result.reference_nll
    # A shift of all logits is the same distribution.
    other.table.data = model.table.data + 1.5
    assert evaluate(other, tokens, reference=model, length=8).kl == pytest.approx(0, abs=1e-14)


def test_kl_is_of_the_reference_to_the_model() -> None:
    """KL(q ‖ p) = q·log(q/p) + (1−q)·log((1−q)/(1−p)) for two coins; KL(p ‖ q) is another number."""
    p, q = 0.9, 0.6
    coins = [torch.tensor([math.log(x), math.log(1 - x)]).expand(2, 2).clone() for x in (p, q)]
    model, reference = (lambda ids, t=t: t[ids] for t in coins)
    expected = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    tokens = torch.tensor([[0, 1, 1, 0]])
    assert evaluate(model, tokens, reference=reference).kl == pytest.approx(expected, rel=1e-6)
    assert evaluate(reference, tokens, reference=model).kl != pytest.approx(expected, rel=1e-2)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    result = evaluate(lambda ids: torch.zeros(*ids.shape, 37), stream(37, 60), length=10)
    assert result.perplexity == pytest.approx(37, rel=1e-14)
    assert (result.tokens, result.windows, result.length) == (54, 6, 10)
    assert (result.kl, result.top1, result.reference_nll) == (None, None, None)


def test_excluded_tokens_cost_the_reference_nothing_and_the_model_everything() -> None:
    some, all_of_them = torch.tensor([0.0, 0.0, -math.inf]), torch.zeros(3)
    tokens = torch.tensor([[0, 1, 0, 1]])
    fewer = evaluate(
        lambda ids: all_of_them.expand(*ids.shape, 3),
        tokens,
        reference=lambda ids: some.expand(*ids.shape, 3),
    )
    assert fewer.kl == pytest.approx(math.log(3 / 2), rel=1e-12)
    more = evaluate(
        lambda ids: some.expand(*ids.shape, 3),
        tokens,
        reference=lambda ids: all_of_them.expand(*ids.shape, 3),
    )
    assert more.kl == math.inf and more.to_json()["kl"] == "inf"
    json.dumps(more.to_json(), allow_nan=False)
    impossible = evaluate(lambda ids: some.expand(*ids.shape, 3), torch.tensor([[0, 2]]))
    assert impossible.nll == math.inf and impossible.perplexity == math.inf


def test_a_transformers_model_agrees_with_its_own_loss() -> None:
    model, _ = small_model("llama", "sdpa")
    tokens = stream(90, 96).reshape(4, 24)
    with torch.no_grad():
        loss = float(model(tokens, labels=tokens).loss)
    result = evaluate(model, tokens, batch=3)
    assert result.nll == pytest.approx(loss, rel=1e-5)
    assert result.tokens == 4 * 23


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: (t, None),
        lambda t: {"logits": t},
        lambda t: type("Output", (), {"logits": t})(),
    ],
)
def test_every_spelling_of_logits_is_read(wrap: Any) -> None:
    model, tokens = Bigram(5, 0), stream(5, 20)
    assert evaluate(lambda ids: wrap(model(ids)), tokens, length=5) == evaluate(model, tokens, length=5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_float64_whatever_the_logits_are(dtype: torch.dtype) -> None:
    low, tokens = Bigram(50, 0).to(dtype), stream(50, 4000)
    same = Bigram(50, 0).to(dtype).double()
    assert evaluate(low, tokens, length=100).nll == pytest.approx(evaluate(same, tokens, length=100).nll, rel=1e-14)


def test_streams_and_long_rows_are_cut_into_windows() -> None:
    model, tokens = Bigram(7, 0), stream(7, 47)
    cut = evaluate(model, tokens[:40].reshape(4, 10))
    assert evaluate(model, tokens, length=10) == cut
    assert evaluate(model, tokens[:46].reshape(2, 23), length=10) == evaluate(
        model, torch.cat([tokens[:20], tokens[23:43]]), length=10
    )
    assert evaluate(model, tokens.to(torch.int32), length=10) == cut
    assert evaluate(model, tokens.to(torch.uint8), length=10) == cut


class Noisy(Bigram):
    """Training mode is visible in the result, and some parts are never in training mode."""

    def __init__(self) -> None:
        super().__init__(6, 0)
        self.drop, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled() or (ids == 5).any():
            raise RuntimeError("gradients are on, or a five was seen")
        return self.drop(super().forward(ids))


def test_modes_and_gradients_are_put_back_also_after_errors() -> None:
    model, reference = Noisy().train(), Noisy().eval()
    model.frozen.eval()
    flags = [m.training for m in model.modules()]
    tokens = stream(5, 40)
    assert evaluate(model, tokens, reference=reference, length=8).kl == 0  # so no dropout was active
    for bad in (tokens, tokens.index_fill(0, torch.tensor([39]), 5)):
        if bad is not tokens:
            with pytest.raises(RuntimeError, match="a five was seen"):
                evaluate(model, bad, reference=reference, length=8)
        assert [m.training for m in model.modules()] == flags
        assert not any(m.training for m in reference.modules())
        assert torch.is_grad_enabled()


def test_progress_counts_windows() -> None:
    seen: list[tuple[int, int]] = []
    evaluate(Bigram(5, 0), stream(5, 35), length=5, batch=3, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.randn(2, 5), {}, "integer tensor of ids, not torch.float32"),
        ([[1, 2]], {}, "integer tensor of ids, not list"),
        (torch.ones(2, 5, dtype=torch.bool), {}, "integer tensor of ids, not torch.bool"),
        (stream(5, 8).reshape(2, 2, 2), {}, r"one stream \[N\], not \[2, 2, 2\]"),
        (stream(5, 8), {}, "needs length="),
        (stream(5, 8), {"length": 1}, "at least 2"),
        (stream(5, 8), {"length": 9}, r"\[8\] tokens make no window of 9"),
        (stream(5, 8), {"length": 4, "batch": 0}, "batch must be at least 1, not 0"),
        (torch.tensor([[1, -100]]), {}, "there is a -100"),
        (torch.tensor([[1, 5]]), {}, "cannot read windows of 2 tokens, ids up to 5"),
        (stream(5, 8), {"length": 4, "reference": Bigram(6, 0)}, "5 logits and the reference 6"),
    ],
)
def test_what_does_not_fit_is_refused(tokens: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        evaluate(Bigram(5, 0), tokens, **options)


def test_results_that_are_no_logits_are_refused() -> None:
    tokens = stream(5, 8).reshape(2, 4)
    with pytest.raises(PlanError, match=r"needs logits \[2, 4, V\] from the model, but got \[2, 5\]"):
        evaluate(lambda ids: torch.zeros(2, 5), tokens)
    with pytest.raises(PlanError, match="but got str"):
        evaluate(lambda ids: "logits", tokens)
    with pytest.raises(PlanError, match="the model has 3 logits"):
        evaluate(lambda ids: torch.zeros(2, 4, 3), torch.full((2, 4), 4))


def test_memory_beyond_the_logits_is_bounded() -> None:
    """The largest float64 working tensor has the size of a chunk, not of the logits."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype is torch.float64:
                largest = max(largest, out.numel())
            return out

    logits = torch.randn(4, 32, 1000)
    with pytest.MonkeyPatch.context() as patch, Watch():
        patch.setattr(evaluation, "_CHUNK", 5000)
        evaluate(lambda ids: logits, stream(1000, 128).reshape(4, 32), reference=lambda ids: logits)
    assert 0 < largest <= 5000
