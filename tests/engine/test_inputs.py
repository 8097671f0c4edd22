# SPDX-License-Identifier: Apache-2.0
"""Example inputs: what a model says about itself, what tracing shows, and one spelling for one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rewriter import inputs
from rewriter.errors import CaptureError

from . import kinds

NAMES = ("x", "y", "z")


def test_transformers_models_say_what_they_take() -> None:
    for kind in kinds.LANGUAGE:
        args, kwargs = inputs.infer(kinds.build(kind))
        assert args == () and set(kwargs) == {"input_ids", "attention_mask"}
        assert int(kwargs["input_ids"].max()) < kinds.VOCABULARY
    _, kwargs = inputs.infer(kinds.build("vit").half())
    assert kwargs["pixel_values"].shape == (2, 3, 8, 8) and kwargs["pixel_values"].dtype == torch.float16


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (torch.zeros(2, 3), ((torch.zeros(2, 3),), {})),
        ((torch.zeros(2), 1), ((torch.zeros(2), 1), {})),
        ({"x": 1}, ((), {"x": 1})),
    ],
    ids=["tensor", "tuple", "dict"],
)
def test_lightnings_example_input_array(example: Any, expected: Any) -> None:
    model = nn.Identity()
    model.example_input_array = example
    assert str(inputs.infer(model)) == str(expected)


@pytest.mark.parametrize(
    ("first", "shape", "dtype"),
    [
        (nn.Linear(5, 3), (2, 5), torch.float32),
        (nn.Linear(5, 3).double(), (2, 5), torch.float64),
        (nn.Embedding(7, 3), (2, 2), torch.int64),
        (nn.Conv1d(4, 3, 3), (2, 4, 32), torch.float32),
        (nn.Conv2d(4, 3, (3, 50)), (2, 4, 32, 50), torch.float32),
    ],
)
def test_the_first_layer_shows_the_input(first: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = nn.Sequential(first, nn.ReLU())
    (x,), kwargs = inputs.infer(model)
    assert x.shape == shape and x.dtype == dtype and not kwargs
    model(x)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, features: Tensor, scale: float) -> Tensor:
        return self.layer(features) * scale


class ReadTwice(Branching):
    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        return features + self.layer(features)


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (Branching(), r"optimize\(model, example_inputs=\(features, scale,\)"),
        (ReadTwice(), r"optimize\(model, example_inputs=\(features,\)"),
        (nn.ReLU(), r"optimize\(model, example_inputs=\(input,\)"),
    ],
)
def test_otherwise_the_error_prints_the_call_to_write(model: nn.Module, call: str) -> None:
    with pytest.raises(CaptureError, match=call):
        inputs.infer(model)


@given(
    st.dictionaries(st.sampled_from(NAMES), st.integers(0, 3)), st.integers(0, 3), st.randoms(use_true_random=False)
)
def test_every_spelling_of_a_call_is_one(values: dict[str, int], positional: int, random: Any) -> None:
    """Positional or by keyword, in any order."""
    prefix = []
    for name in NAMES[:positional]:
        if name not in values:
            break
        prefix.append(name)
    rest = [name for name in values if name not in prefix]
    random.shuffle(rest)
    args, kwargs = inputs.by_name(NAMES, frozenset(), tuple(values[n] for n in prefix), {n: values[n] for n in rest})
    assert args == () and list(kwargs.items()) == [(n, values[n]) for n in NAMES if n in values]


def test_none_where_none_is_the_default_is_left_out() -> None:
    assert inputs.by_name(NAMES, frozenset({"y"}), (1,), {"y": None, "z": None}) == ((), {"x": 1, "z": None})


def test_more_positional_arguments_than_names_stay_positional() -> None:
    assert inputs.by_name(("x",), frozenset(), (1, 2), {"b": 3, "a": 4}) == ((1, 2), {"a": 4, "b": 3})


def test_an_argument_given_twice() -> None:
    with pytest.raises(TypeError, match="'x'"):
        inputs.by_name(NAMES, frozenset(), (1,), {"x": 2})


def test_examples_of_size_one_become_two() -> None:
    """Export would take a 1 for a constant of the model."""
    ids, image, scalar = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 3, 4, 4), torch.tensor(1.0)
    assert [tuple(t.shape) for t in inputs.enlarge([ids])] == [(2, 2)]
    assert [tuple(t.shape) for t in inputs.enlarge([image, scalar])] == [(2, 3, 4, 4), ()]


def test_a_one_beside_more_means_the_same_for_all() -> None:
    ids, mask = torch.zeros(4, 6, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)
    assert inputs.broadcast([ids, mask]) == ((1, 0),)
    assert [tuple(t.shape) for t in inputs.enlarge([ids, mask])] == [(4, 6), (1, 6)]
