# SPDX-License-Identifier: Apache-2.0
"""logits = h Wᵀ + b  ≈  Σ_g ⟨h_g, C_g[a_g(i)]⟩ + b_i  (product; h projected first: rotation, low rank)

or (h Cᵀ)[M(i)] + b_i (tiers, pure) or Σ_s (h C_sᵀ)[a_s(i)] + b_i (residual).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node

from rewriter import legality
from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.kernels.vq_logits import op as operators
from rewriter.matcher import Match, Miss
from rewriter.passes.after_head.building import build
from rewriter.passes.after_head.joining import joined
from rewriter.passes.vq_logits import choosing, modules, structures
from rewriter.passes.vq_logits.heads import CodebookHead, TiersHead
from rewriter.passes.vq_logits.tiers import floor
from rewriter.program import Program
from rewriter.rules import CALIBRATED, Contract, Rule, Site
from rewriter.views import EMBEDDING, HEAD

if TYPE_CHECKING:
    from rewriter.passes.vq_logits import VQLogits

_OPERATORS = {
    "TiersHead": operators.vq_logits_tiers,
    "ProductHead": operators.vq_logits_product,
    "ProjectedHead": operators.vq_logits_product,
    "ExactHead": operators.vq_logits_product_exact,
    "ResidualHead": operators.vq_logits_residual,
}


class HeadRule(Rule):
    """The head gets parameters of its own: one that was tied to the embedding is untied by that."""

    name: ClassVar[str] = "vq_logits.head"
    role: ClassVar[str] = "head"
    contract: ClassVar[Contract] = CALIBRATED("clustering of the head's rows")
    parametric: ClassVar[bool] = True
    specificity: ClassVar[int] = 1
    apart: ClassVar[bool] = True  # the loss stands where it stood, far from the logits

    def __init__(self, options: VQLogits) -> None:
        self.options = options

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        head = operators.vq_logits_tiers if self.options.structure in ("tiers", "pure") else operators.vq_logits_product
        found = [joined(program.facts, _with_tokens(program, m), head, self.name) for m in HEAD.find(program)]
        misses = [m for m in HEAD.explain(program) if m.node is not None]
        return [match for match, _ in found], [*misses, *(miss for _, left in found for miss in left)]

    def refusal(self, program: Program, match: Match) -> str | None:
        reason = legality.refusal(program.facts, match["head"])  # what follows it has been judged
        return None if reason is None else str(reason)

    def replaced_nodes(self, match: Match) -> tuple[Node, ...]:
        return (match.root, *(root for one in match["followers"] for root in one.roots))

    def replaced_tensors(self, match: Match) -> tuple[str, ...]:
        return tuple(str(n.target) for n in (match["weight"], match["bias"]) if n is not None)

    def needs(self, match: Match) -> Mapping[str, Node]:
        wanted = {"sample": match["x"], "second_moment": match["x"]}
        return wanted | ({"counts": match["ids"]} if match["ids"] is not None else {})

    # ------------------------------------------------------------------------------------------------- choices

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        o = self.options
        weight, bias = _dense(site.match, program.tensor)
        tokens, width = weight.shape
        common = {"in_features": width, "has_bias": bias is not None}
        settled = structures.settle(o, tokens, width)
        if o.structure != "auto" or statistics is None:
            return common | settled
        chosen = choosing.choose(
            weight.detach(), head_bias=bias, hidden=statistics.get("sample", site.paths),
            second_moment=statistics.get("second_moment", site.paths), counts=_counts(statistics, site, tokens),
            max_kl=o.max_kl, metric=o.metric, exact_rows=structures.exact_rows_to_try(o, tokens), generator=generator,
        )  # fmt: skip
        tried = [dataclasses.asdict(c) for c in chosen.tried]
        rows = chosen.chosen.exact_rows
        picked = {"structure": "product", "codes": chosen.chosen.codes, "dims": chosen.chosen.dims}
        picked |= {"exact_rows": rows} if rows else {}
        return common | picked | {"max_kl": o.max_kl, "kept": chosen.kept, "tried": tried}

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        return structures.roles(self.options, choice)

    def initialise(
        self,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        weight, bias = _dense(site.match, read)
        head = self._fit(weight.detach(), bias, site, choice, statistics, generator)
        trained = weight.requires_grad
        return {
            role: tensor if role in head.buffers else nn.Parameter(tensor.detach(), requires_grad=trained)
            for role, tensor in head.tensors().items()
        }

    def _fit(
        self,
        weight: Tensor,
        bias: Tensor | None,
        site: Site,
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> CodebookHead:
        known: dict[str, Any] = {"head_bias": None if bias is None else bias.detach(), "generator": generator}
        if statistics is not None:
            sample = statistics.get("sample", site.paths)
            known |= {
                "hidden": None if sample is None else choosing.split_sample(sample)[0],  # the rest judges the result
                "second_moment": statistics.get("second_moment", site.paths),
                "counts": _counts(statistics, site, weight.shape[0]),
            }
        return structures.fit(self.options, choice, weight, known)

    # ------------------------------------------------------------------------------------------------- rewrite

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        kind = structures.head_type(choice)
        inputs = {f.name: parameters.get(f.name) for f in dataclasses.fields(kind) if f.name != "singletons"}
        x = match["x"]
        projection = inputs.pop("projection", None)
        if projection is not None:
            x = edit.call(torch.ops.aten.linear.default, x, projection)
        head, tensors = _OPERATORS[kind.__name__], tuple(inputs.values())
        replacement = {match.root: edit.call(head, x, *tensors)}
        for one in match["followers"]:
            with edit.before(min(one.roots)):
                replacement |= build(edit, head, x, tensors, one)
        return replacement

    def measure(
        self,
        site: Site,
        before: Callable[[str], Tensor],
        after: Mapping[str, Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
    ) -> dict[str, float]:
        weight, bias = _dense(site.match, before)
        sample = statistics.get("sample", site.paths) if statistics is not None else None
        counts = _counts(statistics, site, weight.shape[0])
        figures: dict[str, float] = {}
        if sample is not None:
            figures["head_kl"] = choosing.head_kl(weight, bias, _head(after, choice), choosing.split_sample(sample)[1])
        if structures.head_type(choice) is TiersHead:
            uniform = torch.ones(weight.shape[0])
            figures["floor_nats"] = floor(
                uniform if counts is None else counts, after["code_of"], bias="token_bias" in after
            )
        return figures

    def module(self, tensors: Mapping[str, Tensor], original: nn.Module, choice: Mapping[str, Any]) -> nn.Module | None:
        return modules.of(_head(tensors, choice), choice["in_features"])


def _head(tensors: Mapping[str, Tensor], choice: Mapping[str, Any]) -> CodebookHead:
    return structures.head_type(choice).of(tensors)


def _with_tokens(program: Program, match: Match) -> Match:
    """The head with the input that carries token ids of its vocabulary, if there is one: their counts matter."""
    size = match["weight"].meta["val"].shape[1 if match["transposed"] else 0]
    ids = None
    for embedding in EMBEDDING.find(program):
        if embedding["weight"].meta["val"].shape[0] == size and embedding["ids"].op == "placeholder":
            ids = embedding["ids"]
    return dataclasses.replace(match, captures=MappingProxyType({**match.captures, "ids": ids}))


def _dense(match: Match, read: Callable[[str], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Weight [V, d] and bias [V]."""
    weight = read(str(match["weight"].target))
    bias = None if match["bias"] is None else read(str(match["bias"].target))
    return (weight.t() if match["transposed"] else weight), bias


def _counts(statistics: Statistics | None, site: Site, tokens: int) -> Tensor | None:
    counts = statistics.get("counts", site.paths) if statistics is not None else None
    return None if counts is None else torch.nn.functional.pad(counts, (0, tokens - len(counts)))
