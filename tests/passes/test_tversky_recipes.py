# SPDX-License-Identifier: Apache-2.0
"""What a Tversky layer is for: it learns XOR, explains itself, and becomes a single pass by annealing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import rewriter
from rewriter.passes import Tversky
from rewriter.passes.tversky.annealing import Annealing, distillation, exact_pair, negatives, single_pass
from rewriter.passes.tversky.modules import Similarity, TverskyProjection
from rewriter.passes.tversky.salience import (
    FeatureSet,
    common_features,
    contributions,
    distinctive_features,
    exemplars,
    features_of,
    features_of_prototype,
    nearest_rows,
    prototype_vectors,
    render,
    salience,
    similar_prototypes,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------------------------- XOR

XOR = torch.tensor([[-1.0, -1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, 1]])  # the third coordinate is constant
LABELS = torch.tensor([0, 1, 1, 0])


def learns_xor(features: int, seed: int) -> bool:
    layer = TverskyProjection.fresh(3, 2, features, generator=generator(seed))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(XOR), LABELS).backward()
        optimizer.step()
    return bool((layer(XOR).argmax(-1) == LABELS).all())


def test_one_layer_learns_xor_from_most_starts() -> None:
    assert sum(learns_xor(16, seed) for seed in range(5)) >= 3


def test_one_feature_is_too_few_for_xor() -> None:
    assert not any(learns_xor(1, seed) for seed in range(2))


# -------------------------------------------------------------------------------------------------- feature sets


@pytest.fixture
def hand_made() -> TverskyProjection:
    """Features are the coordinates; prototype 0 has 0 and 1, prototype 1 has 1 and 2."""
    prototypes = torch.tensor([[2.0, 1.0, -1.0, 0.0], [-1.0, 3.0, 1.0, 0.0]])
    half = torch.tensor(0.5)
    return TverskyProjection(torch.eye(4), prototypes, torch.tensor(1.0), half, half.clone())


def test_salience_sums_the_features_an_input_has(hand_made: TverskyProjection) -> None:
    x = torch.tensor([[1.0, -2.0, 3.0, 0.0], [-1.0, -1.0, -1.0, -1.0]])
    assert salience(hand_made, x).tolist() == [4.0, 0.0]


def test_common_and_distinctive_features(hand_made: TverskyProjection) -> None:
    x = torch.tensor([1.0, 2.0, -1.0, 4.0])
    assert [(f.index, f.weight) for f in common_features(hand_made, x, 0)] == [(0, 2.0), (1, 2.0)]
    assert [(f.index, f.weight) for f in common_features(hand_made, x, 1)] == [(1, 6.0)]
    assert [(f.index, f.weight) for f in distinctive_features(hand_made, x, 0)] == [(3, 4.0)]
    assert [(f.index, f.weight) for f in distinctive_features(hand_made, x, 1)] == [(3, 4.0), (0, 1.0)]
    assert [(f.index, f.weight) for f in distinctive_features(hand_made, x, 1, of_prototype=True)] == [(2, 1.0)]
    assert len(distinctive_features(hand_made, x, 1, count=1)) == 1


def test_queries_are_set_algebra(hand_made: TverskyProjection) -> None:
    a, b = (features_of_prototype(hand_made, p) for p in (0, 1))
    x = features_of(hand_made, torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert len(a & b) == 1 and 1 in (a & b) and 0 not in (a & b)
    assert (a | b).weights.tolist() == [2.0, 3.0, 1.0, 0.0]
    assert len((a & b) - x) == 0  # A ∩ B − C
    assert ((a | b) - x).salience() == 3.0
    assert [p.index for p in similar_prototypes(hand_made, a)] == [0, 1]
    assert [p.index for p in similar_prototypes(hand_made, b - a)] == [1]


def test_sets_obey_their_laws() -> None:
    a, b, c = (FeatureSet(drawn(12, seed=s).relu()) for s in range(3))
    assert torch.equal((a & b).weights, (b & a).weights)
    assert torch.equal(((a & b) | (a & c)).weights, (a & (b | c)).weights)
    assert torch.equal(((a & b) - c).weights, ((a - c) & (b - c)).weights)
    assert len(a - a) == 0
    with pytest.raises(ValueError, match="one weight ≥ 0"):
        FeatureSet(torch.tensor([-1.0]))


@pytest.mark.parametrize("difference", ["ignorematch", "subtractmatch"])
@pytest.mark.parametrize("intersection", ["product", "min", "max", "mean", "gmean", "softmin"])
@pytest.mark.parametrize("pair", [False, True])
def test_contributions_add_up_to_the_similarity(intersection: str, difference: str, pair: bool) -> None:
    similarity = Similarity(intersection, difference=difference, mirrored=pair)
    alpha = drawn(6, seed=4).abs()
    one, negative = torch.tensor(1.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    projection = TverskyProjection(
        drawn(5, 3), drawn(6, 3, seed=1), one, alpha, one * 0.4, negative if pair else None, similarity=similarity
    )
    for x in drawn(4, 3, seed=2):
        expected = projection(x).detach()
        for prototype in range(6):
            parts = contributions(projection, x, prototype).detach()
            assert parts.shape == ((10,) if pair else (5,))
            assert math.isclose(float(parts.sum()), float(expected[prototype]), rel_tol=1e-12, abs_tol=1e-12)


@pytest.mark.parametrize("similarity", [Similarity(form="ratio"), Similarity("min", "code")])
def test_what_is_no_sum_over_features_says_so(similarity: Similarity) -> None:
    projection = TverskyProjection.fresh(3, 4, 5, similarity=similarity, generator=generator())
    with pytest.raises(ValueError, match="no sum over features"):
        contributions(projection, torch.ones(3), 0)
    assert common_features(projection, torch.ones(3), 0)  # the sets are there all the same


def test_prototypes_in_data_space() -> None:
    bank, vectors = drawn(3, 5), drawn(4, 3, seed=1) @ torch.linalg.pinv(drawn(3, 5)).t()
    stored = TverskyProjection(bank, vectors @ bank.t(), similarity=Similarity(projected=True))
    assert torch.allclose(prototype_vectors(stored), vectors, atol=1e-12)
    images = render(vectors, lambda v: v[:4].reshape(2, 2))
    assert len(images) == 4 and torch.equal(images[1], vectors[1, :4].reshape(2, 2))
    table = drawn(9, 5, seed=3)
    found = render(3.0 * table, nearest_rows(table, count=2))
    assert [rows[0].index for rows in found] == list(range(9))
    assert all(math.isclose(rows[0].weight, 1.0, abs_tol=1e-5) and len(rows) == 2 for rows in found)


def test_exemplars_are_the_most_similar_inputs(hand_made: TverskyProjection) -> None:
    inputs = drawn(50, 4, dtype=torch.float32)
    values = hand_made(inputs)[:, 1]
    found = exemplars(hand_made, inputs, 1, count=3)
    assert [e.index for e in found] == values.argsort(descending=True)[:3].tolist()
    with pytest.raises(IndexError, match="prototype 2 of 2"):
        exemplars(hand_made, inputs, 2)


# ------------------------------------------------------------------------------------------------------ annealing


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_coefficient_falls_from_one_to_zero(schedule: str) -> None:
    annealing = Annealing(40, schedule)
    values = [annealing.coefficient(step) for step in range(50)]
    assert values[0] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(values))
    assert values[29] > 0.0 and set(values[30:]) == {0.0}


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"steps": 5, "schedule": "cos"}, {"steps": 5, "settle": 1.0}])
def test_wrong_schedules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"steps=0|unknown schedule|settle=1"):
        Annealing(**wrong)  # type: ignore[arg-type]


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.5 * drawn(*parameter.shape, seed=i, dtype=torch.float32))
    return model


def with_pairs(teacher: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*(exact_pair(m) if isinstance(m, nn.Linear) else m for m in teacher))


def test_a_pair_is_the_linear_layer() -> None:
    teacher = two_layers().double()
    x = drawn(20, 6)
    assert torch.allclose(with_pairs(teacher)(x), teacher(x), rtol=0, atol=1e-14)


def test_annealing_ends_in_a_single_pass_close_to_the_teacher() -> None:
    teacher = two_layers()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student, annealing = with_pairs(teacher), Annealing(120)
    batches = [drawn(64, 6, seed=100 + step, dtype=torch.float32) for step in range(120)]
    x = drawn(256, 6, seed=99, dtype=torch.float32)

    abrupt = with_pairs(teacher)
    annealing.set(abrupt, annealing.steps)
    untrained = float((abrupt(x) - teacher(x)).square().mean() / teacher(x).square().mean())

    losses = annealing.run(student, teacher, batches, torch.optim.Adam(student.parameters(), lr=1e-2))
    assert losses[0] < 1e-12  # step 0 is the linear layer
    annealed = student(x)
    single_pass(student)
    assert torch.allclose(student(x), annealed, atol=1e-6)
    assert all(m.negative is None for m in student.modules() if isinstance(m, TverskyProjection))
    trained = float((student(x) - teacher(x)).square().mean() / teacher(x).square().mean())
    assert untrained > 0.3 and trained < 0.2 * untrained
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_distillation_of_logits() -> None:
    teacher = two_layers()
    student = with_pairs(teacher)
    x = drawn(7, 6, dtype=torch.float32)
    Annealing(4).run(student, teacher, [x] * 4, torch.optim.SGD(student.parameters(), lr=0.1), distillation)
    p, q = (model(x).log_softmax(-1) for model in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    assert torch.allclose(distillation(student(x), teacher(x)), expected, atol=1e-6) and float(expected) > 0


def test_annealing_needs_pairs_and_batches() -> None:
    teacher = two_layers()
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no negative branch"):
        Annealing(2).run(teacher, teacher, [], optimizer)
    student = with_pairs(teacher)
    with pytest.raises(ValueError, match="as many batches, and there were 1"):
        Annealing(2).run(student, teacher, [torch.ones(1, 6)], optimizer)
    with pytest.raises(ValueError, match="still has c = 1"):
        single_pass(with_pairs(teacher))
    assert len(negatives(student)) == 2


def test_annealing_a_rewritten_model_and_its_module() -> None:
    teacher = two_layers()
    x = drawn(64, 6, dtype=torch.float32)
    opt = rewriter.optimize(teacher, passes=[Tversky(init="signed_pair")], example_inputs=(x,))
    assert torch.allclose(opt(x), teacher(x), atol=1e-6)
    Annealing(30).run(opt, teacher, [x] * 30, torch.optim.Adam(opt.parameters(), lr=1e-2))
    assert [float(c) for c in negatives(opt)] == [0.0, 0.0]
    module = opt.to_module()
    single_pass(module)
    assert torch.allclose(module(x), opt(x), atol=1e-6)
