# SPDX-License-Identifier: Apache-2.0
"""Text that breaks where names break, repeated layers as ranges, sizes for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewriter.layout import KEEP, Flowing, human_bytes, spans


def test_paths_break_at_dots_and_hang() -> None:
    assert Flowing("model.layers.0.self_attn").lines(14) == ["model.layers.", "  0.self_attn"]
    assert Flowing("model").lines(14) == ["model"]


def test_a_kept_space_is_no_place_to_break() -> None:
    assert Flowing(f"x = f(y) →{KEEP}f32[2,{KEEP}3]", after=" ").lines(14) == ["x = f(y)", "  → f32[2, 3]"]


@given(st.text("abc.", min_size=1, max_size=60), st.integers(4, 30))
def test_no_line_is_too_long_and_nothing_is_lost(text: str, width: int) -> None:
    lines = Flowing(text).lines(width)
    assert max(map(len, lines)) <= width
    assert "".join(line.strip() for line in lines) == text


def test_layers_become_ranges() -> None:
    paths = [*(f"h.{i}.attn" for i in range(12)), "h.0.mlp", "h.4.mlp", "lm_head"]
    assert spans(paths) == [("h.{0…11}.attn", 12), ("h.{0,4}.mlp", 2), ("lm_head", 1)]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (13_898_240, "13.90 MB"), (4 * 10**12, "4000.00 GB")],
)
def test_sizes(count: int, text: str) -> None:
    assert human_bytes(count) == text
