# SPDX-License-Identifier: Apache-2.0
"""Methods of codebook heads: losses, best tokens and draws, against the same on all V logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rewriter.kernels.after_head import reference
from rewriter.kernels.spec import REGISTRY
from rewriter.kernels.vq_logits.codec import pack_codes
from rewriter.passes.vq_logits import modules
from rewriter.passes.vq_logits.heads import ExactHead, ProductHead, ProjectedHead, ResidualHead, TiersHead
from rewriter.passes.vq_logits.methods import AfterHead
from rewriter.passes.vq_logits.sampling import just_above

D = 6
KINDS = ("tiers", "pure", "product", "exact", "projected", "residual")


def head(kind: str, *, v: int = 29, k: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64) -> AfterHead:
    """A random head; one code of the tiers has no token."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    code_of = pack_codes(torch.randint(0, max(1, k - 1), (v,), generator=g), k)
    bias = normal(v)
    product = (normal(2, 5, 3), torch.randint(0, 5, (v, 2), generator=g).to(torch.uint8), bias)
    fitted: Any = {
        "tiers": lambda: TiersHead(normal(k, D), code_of, bias),
        "pure": lambda: TiersHead(normal(k, D), code_of, None),
        "product": lambda: ProductHead(*product),
        "exact": lambda: ExactHead(*product, normal(2, D), pack_codes(torch.tensor([3, 8]), v)),
        "projected": lambda: ProjectedHead(normal(D, D), *product),
        "residual": lambda: ResidualHead(
            normal(2, k, D), pack_codes(torch.randint(0, k, (v, 2), generator=g), k), bias
        ),
    }
    made = modules.of(fitted[kind](), D)
    assert isinstance(made, AfterHead)
    return made


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 8)


def hidden(n: int = 4, seed: int = 1, scale: float = 1.0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_probabilities_are_those_of_the_logits_with_their_gradients(kind: str) -> None:
    module, h = head(kind), hidden().requires_grad_()
    g = torch.Generator().manual_seed(2)
    target = torch.tensor([3, -100, 28, 0])
    weight = torch.rand(29, generator=g, dtype=torch.float64)
    soft = torch.rand(4, 29, generator=g, dtype=torch.float64).softmax(-1)
    logits = module(h)
    pairs = [
        (module.logsumexp(h), logits.logsumexp(-1)),
        (module.log_softmax(h), F.log_softmax(logits, -1)),
        (module.softmax(h), F.softmax(logits, -1)),
        (module.nll(h, target), F.cross_entropy(logits, target, reduction="none")),
    ]
    for options in ({"label_smoothing": 0.1}, {"weight": weight}, {"weight": weight, "label_smoothing": 0.3}):
        for t in (target, soft):
            pairs.append((module.nll(h, t, **options), F.cross_entropy(logits, t, reduction="none", **options)))
    other = {"ignore_index": 3, "label_smoothing": 0.1}
    target = target.clamp(min=0)
    pairs.append((module.nll(h, target, **other), F.cross_entropy(logits, target, reduction="none", **other)))
    learnt = [h, *module.parameters()]
    for ours, dense in pairs:
        close(ours, dense)
        seed = torch.linspace(-1, 1, dense.numel(), dtype=dense.dtype).reshape(dense.shape)
        got, want = (torch.autograd.grad(y, learnt, seed, retain_graph=True, allow_unused=True) for y in (ours, dense))
        for a, b in zip(got, want, strict=True):
            close(torch.zeros_like(b) if a is None else a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_best_tokens_are_those_of_the_logits(kind: str) -> None:
    module, h = head(kind), hidden().reshape(2, 2, D)
    logits = module(h)
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    for k in (1, 3, 29):
        values, tokens = module.topk(h, k)
        close(values, logits.topk(k).values)
        assert torch.equal(tokens, order[..., :k])
    assert torch.equal(module.argmax(h), order[..., 0])


def test_argmax_of_a_whole_cluster_that_ties_is_its_smallest_token() -> None:
    module = modules.VQLogitsTiers(TiersHead(torch.eye(2), pack_codes(torch.tensor([1, 0, 1, 0]), 2), None))
    assert module.argmax(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist() == [1, 0]


# -- sampling ----------------------------------------------------------------------------------------------------


def expected(module: AfterHead, h: Tensor, previous: Tensor | None, how: dict[str, Any]) -> Tensor:
    """Probabilities as transformers makes them from logits, `[N, V]`."""
    scores = module(h).detach()
    if "repetition_penalty" in how:
        scores = RepetitionPenaltyLogitsProcessor(how["repetition_penalty"])(previous, scores)
    if "temperature" in how:
        scores = TemperatureLogitsWarper(how["temperature"])(None, scores)
    if "top_k" in how:
        scores = TopKLogitsWarper(how["top_k"])(None, scores)
    if "top_p" in how:
        scores = TopPLogitsWarper(how["top_p"])(None, scores)
    return scores.softmax(-1)


def probabilities(module: AfterHead, h: Tensor, previous: Tensor | None, how: dict[str, Any]) -> Tensor:
    """Probabilities with which the sampler draws, from the same floor, limit and masses, `[N, V]`."""
    sampler = module.sampler(**how)
    drawn_from = sampler.distribution(h, previous)
    low, limit = drawn_from.kept(sampler.how)
    scores = module(h).detach()
    z = scores / sampler.how.temperature
    if previous is not None:
        seen = F.one_hot(previous, scores.shape[-1]).any(-2)
        z = torch.where(seen, sampler.how.penalised(scores), z)
    nudge = 1e-12 * (1 + z.abs())  # z is computed in another order here
    above = torch.stack([drawn_from.log_mass(just_above(z[:, i] + nudge[:, i])) for i in range(z.shape[-1])], -1)
    kept = (z + nudge >= low.unsqueeze(-1)) & (above < limit.unsqueeze(-1))
    floor = torch.where(kept, z - nudge, torch.inf).amin(-1)
    return torch.where(kept, (z - drawn_from.log_mass(floor).unsqueeze(-1)).exp(), 0.0)


def chance(counts: Tensor, p: Tensor) -> float:
    """Of a χ² at least as large, by draws from p. The seeds are fixed; one in 10⁴ would fail a right sampler."""
    n = counts.sum()
    enough = p * n >= 5
    found, wanted = counts[enough].double(), p[enough] * n
    wanted = wanted * found.sum() / wanted.sum()
    statistic, freedom = ((found - wanted).square() / wanted).sum(), torch.tensor(float(enough.sum() - 1)).double()
    return 1.0 if freedom == 0 else float(torch.special.gammaincc(freedom / 2, statistic / 2))


SETTINGS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1},
    {"top_k": 100},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"top_k": 10, "top_p": 0.6, "temperature": 1.7},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.6, "top_k": 4},
    {"repetition_penalty": 3.0, "temperature": 0.5, "top_k": 12, "top_p": 0.9},
]


@pytest.mark.parametrize("how", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "pure"])
def test_probabilities_of_draws_are_those_of_transformers(kind: str, how: dict[str, Any]) -> None:
    module, h = head(kind), hidden(6, scale=1.5)
    previous = torch.randint(0, 29, (6, 9), generator=torch.Generator().manual_seed(5))
    previous = previous if "repetition_penalty" in how else None
    close(probabilities(module, h, previous, how), expected(module, h, previous, how))


@given(st.integers(0, 2**31), st.sampled_from([0.1, 1.0, 8.0]), st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=40)
def test_probabilities_of_tiers_are_those_of_transformers(seed: int, scale: float, v: int, data: st.DataObject) -> None:
    module, h = head("tiers", v=v, k=data.draw(st.integers(1, v)), seed=seed), hidden(3, seed, scale)
    how = {"temperature": data.draw(st.sampled_from([0.3, 1.0, 2.0]))}
    how |= {"top_k": data.draw(st.integers(1, v))} if data.draw(st.booleans()) else {}
    how |= {"top_p": data.draw(st.floats(0.05, 0.95))} if data.draw(st.booleans()) else {}
    previous = None
    if data.draw(st.booleans()):
        how |= {"repetition_penalty": data.draw(st.sampled_from([0.5, 1.3, 4.0]))}
        previous = torch.randint(0, v, (3, 5), generator=torch.Generator().manual_seed(seed))
    close(probabilities(module, h, previous, how), expected(module, h, previous, how))


@pytest.mark.parametrize("kind", ["tiers", "pure", "product"])
@pytest.mark.parametrize("how", [SETTINGS[i] for i in (0, 1, 4, 6, 9)], ids=str)
def test_draws_follow_their_probabilities(kind: str, how: dict[str, Any]) -> None:
    module, h, n = head(kind), hidden(1), 20_000
    previous = torch.tensor([[1, 5, 5, 17, 28]]) if "repetition_penalty" in how else None
    p = probabilities(module, h, previous, how)[0]
    many = None if previous is None else previous.expand(n, -1)
    tokens = module.sample(h.expand(n, -1), generator=torch.Generator().manual_seed(0), previous=many, **how)
    counts = tokens.bincount(minlength=29)
    assert counts[p == 0].sum() == 0  # exactly what is kept is drawn
    assert chance(counts, p) > 1e-4


def test_equal_tokens_are_kept_or_dropped_together() -> None:
    module, h = head("pure"), hidden(1)
    logits = module(h)[0]
    for how in ({"top_k": 1}, {"top_p": 0.01}):
        tokens = module.sample(h.expand(500, -1), generator=torch.Generator().manual_seed(1), **how)
        assert set(tokens.tolist()) == set((logits == logits.max()).nonzero().flatten().tolist())


def test_the_same_seed_draws_the_same_tokens_and_the_global_generator_is_left_alone() -> None:
    for kind in ("tiers", "product"):
        sampler = head(kind).sampler(top_p=0.9)
        state = torch.get_rng_state()
        one, two = (sampler(hidden(50), generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(one, two) and torch.equal(state, torch.get_rng_state())


def test_penalised_tokens_that_filled_their_code_leave_nothing_behind() -> None:
    """A code whose only tokens were seen has no mass of its own left, however large it was."""
    book = torch.tensor([[40.0], [1.0]], dtype=torch.float64)
    module = modules.VQLogitsTiers(TiersHead(book, pack_codes(torch.tensor([0, 1, 1]), 2), None))
    h, seen = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0, -1, 0]])
    p = expected(module, h, torch.tensor([[0]]), {"repetition_penalty": 80.0})
    counts = module.sample(
        h.expand(4000, 1), generator=torch.Generator().manual_seed(0), previous=seen.expand(4000, 3),
        repetition_penalty=80.0,
    ).bincount(minlength=3)  # fmt: skip
    assert chance(counts, p[0]) > 1e-4


def test_prompts_may_have_any_leading_dimensions() -> None:
    for kind in ("tiers", "product"):
        module, g = head(kind), torch.Generator().manual_seed(0)
        assert module.sample(hidden(6).reshape(2, 3, D), generator=g, top_k=3).shape == (2, 3)
        assert module.sample(hidden(1)[0], generator=g).shape == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 2.0}, "previous="),
        ({"repetition_penalty": 2.0, "previous": torch.zeros(3, 1, dtype=torch.int64)}, "previous must be"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    for kind in ("tiers", "product"):
        with pytest.raises(ValueError, match=message):
            head(kind).sample(hidden(2), generator=torch.Generator(), **options)


# -- memory ------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements any operator's result had, inside our own operators as well."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in REGISTRY:
            with self:
                return REGISTRY[func].reference(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out


CALLS = {
    "nll": lambda m, h: m.nll(h, torch.zeros(h.shape[0], dtype=torch.int64)).sum().backward(),
    "smoothed": lambda m, h: m.nll(h, torch.zeros(h.shape[0], dtype=torch.int64), label_smoothing=0.1).sum().backward(),
    "argmax": lambda m, h: m.argmax(h),
    "topk": lambda m, h: m.topk(h, 5),
    "sample": lambda m, h: m.sample(h, generator=torch.Generator()),
    "nucleus": lambda m, h: m.sample(
        h, generator=torch.Generator(), top_k=20, top_p=0.9, repetition_penalty=1.2,
        previous=torch.zeros(h.shape[0], 3, dtype=torch.int64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["tiers", "product"])
def test_no_tensor_of_positions_times_vocabulary(kind: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 128)
    v, n = 3000, 64
    module, h = head(kind, v=v, k=16), hidden(n).requires_grad_()
    with Largest() as recorded:
        CALLS[call](module, h)
    # V·d (decoded rows) is the most; of chunks the positions see 128 columns, and the tokens kept from before.
    assert v <= recorded.elements <= max(v * D, n * (128 + 20)) < n * v // 8
