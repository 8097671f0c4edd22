# SPDX-License-Identifier: Apache-2.0
"""Masks by evaluation: the kinds, every spelling, and what must never be taken for one of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from zoo.configs import ZOO

import rewriter
from rewriter.facts import Facts
from rewriter.masks import MaskKind, classify
from rewriter.views import ATTENTION

from .helpers import capture_graph

LOWEST = torch.finfo(torch.float32).min
AUTO = torch.export.Dim.AUTO
Make = Callable[[Tensor, Tensor], Tensor]


class Masked(nn.Module):
    """One attention under a mask that a function makes from the scores and the padding input."""

    def __init__(self, make: Make, **buffers: Tensor) -> None:
        super().__init__()
        self.make = make
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        scores = x @ x.mT
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], self.make(scores, padding, **self.extra()))

    def extra(self) -> dict[str, Tensor]:
        return dict(self.named_buffers())


def mask_of(
    make: Callable[..., Tensor], *, static: bool = False, dtype: torch.dtype = torch.long, **buffers: Tensor
) -> tuple[Facts, fx.Node]:
    x, padding = torch.rand(3, 6, 4), torch.ones(3, 6, dtype=dtype)
    shapes: Any = None if static else {"x": {0: AUTO, 1: AUTO}, "padding": {0: AUTO, 1: AUTO}}
    graph = capture_graph(Masked(make, **buffers).eval(), (x, padding), dynamic_shapes=shapes)
    (attention,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    return Facts(graph), attention.args[3]


def kind_of(make: Callable[..., Tensor], **options: Any) -> MaskKind:
    return classify(*mask_of(make, **options))


def at(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of queries [q, 1] and keys [1, k]."""
    n = scores.shape[-1]
    return torch.arange(n)[:, None], torch.arange(n)[None]


def added(seen: Tensor, lowest: float = LOWEST) -> Tensor:
    return torch.zeros(()).masked_fill(~seen, lowest)


def causal(scores: Tensor) -> Tensor:
    q, k = at(scores)
    return k <= q


def window(scores: Tensor, size: int) -> Tensor:
    q, k = at(scores)
    return (k <= q) & (k > q - size)


def keys(padding: Tensor) -> Tensor:
    return padding.bool()[:, None, None, :]


KINDS: dict[str, tuple[Make, str]] = {
    "causal, boolean": (lambda s, p: causal(s), "causal"),
    "causal, tril": (lambda s, p: torch.ones(s.shape[-1], s.shape[-1], dtype=torch.bool).tril(), "causal"),
    "causal, triu of -inf": (lambda s, p: torch.full(s.shape[-2:], -math.inf).triu(1), "causal"),
    "causal, like the scores": (lambda s, p: torch.full_like(s, LOWEST).triu(1)[:, None], "causal"),
    "causal, new_ones": (lambda s, p: s.new_ones(s.shape[-1], s.shape[-1]).tril().bool(), "causal"),
    "causal, cumsum": (lambda s, p: torch.ones_like(s[0]).cumsum(0).cumsum(1) > 0, "full"),
    "causal, times a number": (lambda s, p: (1.0 - causal(s).float()) * -10000.0, "causal"),
    "causal, in place": (lambda s, p: added_in_place(s), "causal"),
    "causal and padding": (lambda s, p: causal(s) & keys(p), "causal+padding"),
    "causal plus padding": (lambda s, p: added(causal(s)) + added(keys(p)), "causal+padding"),
    "padding": (lambda s, p: keys(p), "padding"),
    "padding, times a number": (lambda s, p: (1.0 - p[:, None, None, :].float()) * LOWEST, "padding"),
    "padding, expanded": (lambda s, p: keys(p).expand(-1, 1, s.shape[-1], -1), "padding"),
    "window of 1": (lambda s, p: window(s, 1), "window(1)"),
    "window of 3": (lambda s, p: window(s, 3), "window(3)"),
    "window of 3, by band": (lambda s, p: causal(s).triu(-2), "window(3)"),
    "window of 3 and padding": (lambda s, p: added(window(s, 3) & keys(p)), "window(3)+padding"),
    "window, one more": (lambda s, p: causal(s) & (at(s)[1] >= at(s)[0] - 3), "window(4)"),
    "window of 7": (lambda s, p: window(s, 7), "window(7)"),
    "window of 13": (lambda s, p: window(s, 13), "window(13)"),
    "window of 40": (lambda s, p: window(s, 40), "window(40)"),
    "window of 4096": (lambda s, p: added(window(s, 4096) & keys(p)), "window(4096)+padding"),
    "window of 4096, one more": (lambda s, p: causal(s) & (at(s)[0] - at(s)[1] <= 4096), "window(4097)"),
    "window of 4096 as a quotient": (lambda s, p: causal(s) & ((at(s)[0] - at(s)[1]) / 4096 < 1.0), "window(4096)"),
    "full": (lambda s, p: causal(s) | ~causal(s), "full"),
    "full, added": (lambda s, p: torch.zeros_like(s)[:, None], "full"),
    "a number that hides nothing": (lambda s, p: causal(s) & (at(s)[1] > -1000), "causal"),
}  # fmt: skip


def added_in_place(scores: Tensor) -> Tensor:
    mask = torch.zeros(scores.shape[-2:])
    mask.masked_fill_(~causal(scores), LOWEST)
    return mask


@pytest.mark.parametrize("name", KINDS)
def test_kinds_under_many_spellings(name: str) -> None:
    make, expected = KINDS[name]
    facts, mask = mask_of(make)
    found = classify(facts, mask)
    assert str(found) == expected
    assert (found.padding is None) is ("padding" not in expected)
    assert found.padding is None or found.padding.name == "padding"


UNKNOWN: dict[str, tuple[Make, str]] = {
    "prefix LM": (lambda s, p: causal(s) | (at(s)[1] < 3), "later keys"),
    "prefix LM with a long prefix": (lambda s, p: causal(s) | (at(s)[1] < 100), "depends on the number 100"),
    "ALiBi": (lambda s, p: added(causal(s)) - (at(s)[0] - at(s)[1]).abs() * 0.5, "it is a bias, too"),
    "ALiBi, a gentle slope": (lambda s, p: added(causal(s)) + (at(s)[1] - at(s)[0]) * 2**-8, "scales by 0.00390625"),
    "packed sequences": (lambda s, p: causal(s) & (p[:, None, :, None] == p[:, None, None, :]), "another way"),
    "a window on both sides": (lambda s, p: (at(s)[0] - at(s)[1]).abs() < 3, "later keys"),
    "chunks": (lambda s, p: causal(s) & (at(s)[0] // 3 == at(s)[1] // 3), "neither causal nor a window"),
    "large chunks": (lambda s, p: causal(s) & (at(s)[0] // 512 == at(s)[1] // 512), "depends on the number 512"),
    "strictly earlier keys": (lambda s, p: at(s)[1] < at(s)[0], "neither causal nor a window"),
    "anti-causal": (lambda s, p: at(s)[1] >= at(s)[0], "later keys"),
    "dilated": (lambda s, p: causal(s) & ((at(s)[0] - at(s)[1]) % 2 == 0), "neither causal nor a window"),
    "random": (lambda s, p: torch.rand(s.shape[-2:]) > 0.5, "draws random numbers"),
    "content": (lambda s, p: (s > 0)[:, None], "is not among the operators"),
    "padded queries": (lambda s, p: causal(s) & p.bool()[:, None, :, None], "another way"),
    "queries and keys padded": (lambda s, p: keys(p) & p.bool()[:, None, :, None], "another way"),
    "rows that see nothing see all": (lambda s, p: opened(causal(s) & keys(p)), "another way"),
    "padding the wrong way round": (lambda s, p: ~keys(p), "another way"),
    "padding that counts": (lambda s, p: causal(s) & (p.cumsum(-1) > 0)[:, None, None, :], "another way"),
    "a soft mask": (lambda s, p: added(causal(s), -10.0), "adds -10"),
    "not a number": (lambda s, p: torch.zeros(s.shape[-2:]) / 0, "adds nan"),
    "two windows": (lambda s, p: window(s, 100) & window(s, 1000), "too large to be evaluated"),
}  # fmt: skip


def opened(seen: Tensor) -> Tensor:
    return seen | ~seen.any(-1, keepdim=True)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_none_of_the_kinds_is_unknown_with_the_reason(name: str) -> None:
    make, reason = UNKNOWN[name]
    found = kind_of(make)
    assert found.kind == "unknown" and found.window is None and found.padding is None
    assert reason in found.reason


def test_a_mask_of_the_right_kind_at_another_size_is_not_that_kind() -> None:
    """Causal up to 8 positions, then it forgets the first: agreement at a few sizes would not do."""
    found = kind_of(lambda s, p: causal(s) & (at(s)[1] >= at(s)[0] - 8))
    assert str(found) == "window(9)"
    found = kind_of(lambda s, p: causal(s) & ((at(s)[1] >= 1) | (at(s)[0] < 12)))
    assert found.kind == "unknown"


def test_dropped_keys_and_static_sizes() -> None:
    facts, mask = mask_of(lambda s, p: ~causal(s))
    assert classify(facts, mask, "drop").kind == "causal"
    assert classify(facts, mask, "keep").kind == "unknown"
    assert "cannot be one that is 'added'" in classify(facts, mask, "added").reason
    assert str(kind_of(lambda s, p: window(s, 2) & keys(p), static=True)) == "window(2)+padding"
    assert str(kind_of(lambda s, p: window(s, 6) & keys(p), static=True)) == "causal+padding"  # of six positions


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.int32, torch.float32])
def test_padding_of_any_dtype(dtype: torch.dtype) -> None:
    assert str(kind_of(lambda s, p: causal(s) & keys(p), dtype=dtype)) == "causal+padding"


def test_buffers_are_read_and_parameters_are_not() -> None:
    def sliced(scores: Tensor, padding: Tensor, band: Tensor) -> Tensor:
        return band[: scores.shape[-2], : scores.shape[-1]]

    ones = torch.ones(32, 32, dtype=torch.bool)
    assert str(kind_of(sliced, band=ones.tril())) == "causal"
    assert str(kind_of(sliced, band=ones.tril().triu(-2))) == "window(3)"
    facts, mask = mask_of(lambda s, p, bias: bias[: s.shape[-2], : s.shape[-1]], bias=nn.Parameter(torch.zeros(32, 32)))
    assert "reads parameter bias" in classify(facts, mask).reason
    short = kind_of(sliced, band=torch.ones(6, 6, dtype=torch.bool).tril(), static=True)
    assert short.kind == "causal"


@pytest.mark.parametrize("size", [7, 40, 900])
def test_a_window_stored_in_a_buffer_is_read_to_its_end(size: int) -> None:
    band = torch.ones(1000, 1000, dtype=torch.bool).tril().triu(1 - size)
    found = kind_of(lambda s, p, band: band[: s.shape[-1], : s.shape[-1]], band=band)
    assert str(found) == f"window({size})"


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_numbers_in_buffers(dtype: torch.dtype) -> None:
    """A number that positions are compared with is a length; one that scores are filled with is not."""
    size = torch.tensor(1000, dtype=dtype)
    found = kind_of(lambda s, p, size: causal(s) & (at(s)[0] - at(s)[1] < size), size=size)
    assert str(found) == "window(1000)"
    lowest = torch.tensor(-20000.0)
    assert kind_of(lambda s, p, lowest: torch.where(causal(s), 0.0, lowest), lowest=lowest).kind == "causal"


def test_a_constant_beyond_reason_is_not_read() -> None:
    found = kind_of(lambda s, p, row: row[None, : s.shape[-1]], row=torch.ones(5000, dtype=torch.bool))
    assert "dimension of 5000" in found.reason


def test_writes_count() -> None:
    def filled(scores: Tensor, padding: Tensor) -> Tensor:
        seen = causal(scores).clone()
        seen[:, :2] = True
        return seen

    facts, mask = mask_of(filled)
    assert "after clone" in classify(facts, mask).reason
    assert "later keys" in classify(facts, mask, at=max(mask.users)).reason

    class Later(Masked):
        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            mask = added(causal(x @ x.mT))
            kept = mask[None]
            mask.zero_()
            return F.scaled_dot_product_attention(x, x, x, kept)

    shapes = {"x": {1: AUTO}, "padding": {1: AUTO}}
    graph = capture_graph(Later(lambda s, p: s).eval(), (torch.rand(2, 5, 4), torch.ones(2, 5)), dynamic_shapes=shapes)
    (match,) = ATTENTION.find(graph)
    assert "is written by zero_ (zero_) after" in classify(Facts(graph), match["mask"]).reason


def test_masks_given_by_the_caller_are_unknown() -> None:
    class Given(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x, mask)

    graph = capture_graph(Given(), (torch.rand(2, 1, 5, 4), torch.rand(2, 1, 5, 5)))
    (match,) = ATTENTION.find(graph)
    assert "with 4 dimensions, which is no padding mask" in classify(Facts(graph), match["mask"]).reason


def test_token_ids_are_no_padding_mask() -> None:
    class FromTokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)[:, None]
            return F.scaled_dot_product_attention(x, x, x, (ids != 0)[:, None, None, :])

    graph = capture_graph(FromTokens(), (torch.ones(2, 5, dtype=torch.long),))
    (match,) = ATTENTION.find(graph)
    assert "looked up in an embedding" in classify(Facts(graph), match["mask"]).reason


def test_cross_attention_may_be_full_or_padded_but_not_causal() -> None:
    class Cross(nn.Module):
        def __init__(self, make: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
            super().__init__()
            self.make = make

        def forward(self, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
            q, k = x[:, None], memory[:, None]
            return F.scaled_dot_product_attention(q, k, k, self.make(x, memory, padding))

    def cross(make: Callable[[Tensor, Tensor, Tensor], Tensor]) -> MaskKind:
        inputs = (torch.rand(3, 4, 4), torch.rand(3, 6, 4), torch.ones(3, 6, dtype=torch.long))
        shapes = {name: {0: AUTO, 1: AUTO} for name in ("x", "memory", "padding")}
        graph = capture_graph(Cross(make), inputs, dynamic_shapes=shapes)
        (match,) = ATTENTION.find(graph)
        return classify(Facts(graph), match["mask"])

    def rows(x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(x.shape[1])[:, None], torch.arange(memory.shape[1])[None]

    assert str(cross(lambda x, m, p: keys(p).expand(-1, -1, x.shape[1], -1))) == "padding"
    assert str(cross(lambda x, m, p: torch.zeros(1, 1, x.shape[1], m.shape[1]))) == "full"
    assert "counted apart" in cross(lambda x, m, p: rows(x, m)[1] <= rows(x, m)[0]).reason


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 12), st.booleans(), st.booleans(), st.sampled_from([LOWEST, -math.inf, -1e9, -1e4]))
def test_any_window_is_found_exactly(size: int, padded: bool, additive: bool, lowest: float) -> None:
    def make(scores: Tensor, padding: Tensor) -> Tensor:
        seen = window(scores, size) & keys(padding) if padded else window(scores, size)
        return added(seen, lowest) if additive else seen

    found = kind_of(make)
    assert (found.kind, found.window) == ("window+padding" if padded else "window", size)
    assert found.every_row_sees_a_key is not padded


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.integers(-3, 9), st.booleans())
def test_bands_are_what_their_definition_says(below: int, above: int, padded: bool) -> None:
    """Keys from q - below to q + above: a window exactly if above is 0, unknown otherwise."""

    def make(scores: Tensor, padding: Tensor) -> Tensor:
        q, k = at(scores)
        band = (k >= q - below) & (k <= q + above)
        return band & keys(padding) if padded else band

    found = kind_of(make)
    if above == 0:
        assert found.kind.startswith("window") and found.window == below + 1
    else:
        assert found.kind == "unknown"


# Every attention of the zoo, in graph order: what its configuration says it may see. Sliding windows are of 4.
CAUSAL, PADDING, WINDOW = "causal+padding", "padding", "window(4)+padding"
ARCHITECTURES: dict[str, list[str]] = {
    "llama": [CAUSAL] * 2,
    "mistral": [WINDOW] * 2,
    "phi3": [CAUSAL] * 2,
    "gemma2": [WINDOW, CAUSAL],
    "gpt_neox": [CAUSAL] * 2,
    "gptj": [CAUSAL] * 2,
    "gpt2": [CAUSAL] * 2,
    "opt": [CAUSAL] * 2,
    "bloom": [CAUSAL] * 2,
    "bert": [PADDING] * 2,
    "vit": ["full"] * 2,
    "whisper": ["none"] * 2 + ["causal", "none"] * 3,
    "clip": ["none"] * 2 + [CAUSAL] * 2,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masks_of_current_transformers(name: str) -> None:
    for implementation in ZOO[name].implementations:
        program = rewriter.capture(ZOO[name].build(implementation), None, ZOO[name].call())
        found = [
            "none" if match["mask"] is None else str(classify(program.facts, match["mask"]))
            for match in ATTENTION.find(program)
        ]
        assert sorted(found) == sorted(ARCHITECTURES[name]), implementation


def test_position_ids_may_pack_sequences() -> None:
    call = {**ZOO["llama"].call(), "position_ids": torch.arange(9).expand(3, -1)}
    del call["attention_mask"]
    model = ZOO["llama"].build("sdpa")
    graph = capture_graph(model, (), {**call, "use_cache": False}, {name: {0: AUTO, 1: AUTO} for name in call} | {"use_cache": None})
    kinds = {str(classify(Facts(graph), match["mask"])) for match in ATTENTION.find(graph)}
    assert kinds == {"unknown: reads placeholder position_ids in another way than as a padding mask"}
