# SPDX-License-Identifier: Apache-2.0
"""Norms, GELU and losses of transformers' models: how many there are of which spelling, from the configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from zoo.configs import ZOO

import rewriter
from rewriter.legality import refusal
from rewriter.views import CROSS_ENTROPY, GELU, GLU, LAYER_NORM, RMS_NORM, SOFTMAX

NEW, TANH, ERF = ("tanh", "written"), ("tanh", "gelu"), ("none", "gelu")

# What the activation function named in the configuration looks like, and how often it is called.
GELUS: dict[str, tuple[tuple[str, str], Callable[[Any], int]]] = {
    "gpt2": (NEW, lambda c: c.n_layer),
    "gptj": (NEW, lambda c: c.n_layer),
    "bloom": (NEW, lambda c: c.n_layer),
    "albert": (NEW, lambda c: c.num_hidden_layers + 1),  # and the head's
    "mt5": (NEW, lambda c: c.num_layers + c.num_decoder_layers),
    "gemma2": (TANH, lambda c: c.num_hidden_layers),
    "bert": (ERF, lambda c: c.num_hidden_layers + 1),  # and the head's
    "vit": (ERF, lambda c: c.num_hidden_layers),
    "whisper": (ERF, lambda c: c.encoder_layers + c.decoder_layers + 2),  # and the two convolutions'
    "llama": (ERF, lambda c: 0),  # silu
    "clip": (ERF, lambda c: 0),  # x · σ(1.702 x) is no GELU
    "phi3": (ERF, lambda c: 0),
    "mixtral": (ERF, lambda c: 0),
}
RMS = {"llama", "phi3", "mixtral", "gemma2", "mt5"}
GATES = {"llama": "silu", "phi3": "silu", "gemma2": "gelu_tanh", "mt5": "gelu_tanh"}


@cache
def captured(name: str) -> rewriter.Program:
    architecture = ZOO[name]
    return rewriter.capture(architecture.build(architecture.implementations[-1]), example_kwargs=architecture.call())


@pytest.mark.parametrize("name", GELUS)
def test_gelus_are_as_many_and_as_the_configuration_says(name: str) -> None:
    form, count = GELUS[name]
    matches = GELU.find(captured(name))
    spellings = Counter((match["approximate"], match["spelling"]) for match in matches)
    assert spellings == Counter({form: count(ZOO[name].configuration())})
    assert all(refusal(captured(name).facts, match) is None for match in matches)


@pytest.mark.parametrize("name", GELUS)
def test_norms_are_of_the_models_kind(name: str) -> None:
    architecture = ZOO[name]
    program, count = captured(name), architecture.implied(architecture.configuration()).norm
    rms, layer = RMS_NORM.find(program), LAYER_NORM.find(program)
    assert (len(rms), len(layer)) == ((count, 0) if name in RMS else (0, count))
    assert {match["spelling"] for match in (*rms, *layer)} == {"written" if name in RMS else "layer_norm"}
    assert {match["unit_offset"] for match in rms} <= {name == "gemma2"}
    assert all(program.facts.is_parameter(match["weight"]) for match in (*rms, *layer))
    assert all(refusal(program.facts, match) is None for match in (*rms, *layer))


@pytest.mark.parametrize("name", GELUS)
def test_gated_units(name: str) -> None:
    architecture = ZOO[name]
    matches = GLU.find(captured(name))
    assert len(matches) == architecture.implied(architecture.configuration()).glu
    assert {match["activation"] for match in matches} == ({GATES[name]} if name in GATES else set())
    assert all((match["packed"] is not None) is (name == "phi3") for match in matches)
    if name == "mixtral":  # the experts' gates come from a grouped product, which is no linear
        assert all("is not a linear" in miss.reason for miss in GLU.explain(captured(name)))
        assert len(SOFTMAX.find(captured(name))) >= architecture.configuration().num_hidden_layers  # the routers


def test_the_loss_of_a_language_model() -> None:
    call = ZOO["llama"].call()
    model = ZOO["llama"].build("sdpa")
    program = rewriter.capture(model, example_kwargs=call | {"labels": call["input_ids"].clone()})
    (match,) = CROSS_ENTROPY.find(program)
    assert match["spelling"] == "cross_entropy" and match["reduction"] == "mean" and match["class_dim"] == 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_sixteen_bits_change_nothing(name: str) -> None:
    model, call = ZOO[name].build(ZOO[name].implementations[-1]), ZOO[name].call()
    for dtype in (torch.float16, torch.bfloat16):
        program = rewriter.capture(model.to(dtype), example_kwargs=call)
        for view in (RMS_NORM, LAYER_NORM, GELU, GLU):
            matches = view.find(program)
            assert len(matches) == len(view.find(captured(name)))
            assert all(refusal(program.facts, match) is None for match in matches)
