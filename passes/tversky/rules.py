# SPDX-License-Identifier: Apache-2.0
"""y = x Wᵀ + b  →  S(x, Π) − n S(x, −Π) + b: one rule per initialisation, for it is that which makes the promise."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from rewriter import legality
from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.kernels.tversky.op import tversky
from rewriter.matcher import Match, Miss
from rewriter.passes.tversky import exact, low_rank, single
from rewriter.passes.tversky.fits import Fit, output_error
from rewriter.passes.tversky.modules import Similarity, TverskyProjection
from rewriter.program import Program
from rewriter.rules import CALIBRATED, EXACT, LEARNED, Contract, Kept, Rule, Site, module_path
from rewriter.views import EMBEDDING, LINEAR, router
from rewriter.views.linear import features as sizes

if TYPE_CHECKING:
    from rewriter.passes.tversky import Tversky

Read = Callable[[str], Tensor]

_TENSORS = ("features", "prototypes", "theta", "alpha", "beta", "negative")
_BUFFERS = ("negative", "neutral")

SAVES_NOTHING = "nothing (the start of training)"  # what the report says of exact starts


class TverskyRule(Rule):
    """What all initialisations of a linear layer share: the site, its options, and what stands there afterwards.

    A tied head whose prototypes stay the token embeddings (``share="embeddings"``) replaces no tensor: the embedding is
    read where the weight was.
    """

    role: ClassVar[str] = "linear"
    parametric: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = _TENSORS  # those of the operator's tensors that this initialisation has

    def __init__(self, options: Tversky) -> None:
        self.options = options
        self._banks: dict[Any, Tensor] = {}  # of the sites that share one, for as long as the sites are initialised

    @property
    def similarity(self) -> Similarity:
        o = self.options
        return Similarity(o.intersection, o.convention, o.difference, o.form)

    # ------------------------------------------------------------------------------------------------- the site

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        tables = {match["weight"] for match in EMBEDDING.find(program)}
        matches = [_with(m, tied=m["weight"] in tables and not m["transposed"]) for m in LINEAR.find(program)]
        return matches, [m for m in LINEAR.explain(program) if m.node is not None]

    def refusal(self, program: Program, match: Match) -> str | None:
        if not self.contract.exact and router.is_router(program.facts, match):
            return router.MISS
        reason = legality.refusal(program.facts, match)
        return None if reason is None else str(reason)

    def prefix(self, match: Match) -> str:
        """The module's path; for a weight not called "weight", its own name, so that two of one module stay apart."""
        owner, _, leaf = str(match["weight"].target).rpartition(".")
        return module_path(match.root) if leaf == "weight" else f"{owner}.{leaf}" if owner else leaf

    def keeps_prototypes(self, match: Match) -> bool:
        """Whether the prototypes stay the token embeddings."""
        return self.options.share == "embeddings" and bool(match.captures.get("tied"))

    def replaced_tensors(self, match: Match) -> tuple[str, ...]:
        return () if self.keeps_prototypes(match) else (str(match["weight"].target),)

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        width, _ = sizes(program.facts, site.match)
        kept = {"prototypes": str(site.match["weight"].target)} if self.keeps_prototypes(site.match) else {}
        return {"in_features": width} | kept

    # ------------------------------------------------------------------------------------------------- parameters

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(t for t in self.terms if not (t == "prototypes" and t in choice))

    def initialise(
        self,
        site: Site,
        read: Read,
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        weight = as_rows(site.match, read)
        made = self.fit(weight.detach(), site, read, choice, statistics, generator)
        tensors = {name: getattr(made, name) for name in self.roles(site.match, choice)}
        trained = {
            k: self._shared(k, nn.Parameter(t, weight.requires_grad)) for k, t in tensors.items() if k not in _BUFFERS
        }
        return tensors | trained

    @abstractmethod
    def fit(
        self,
        weight: Tensor,
        site: Site,
        read: Read,
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> Fit:
        """The tensors for a dense weight ``[P, d]``; without values while an exact rule is being planned."""

    def _shared(self, role: str, tensor: Tensor) -> Tensor:
        """A bank that layers have in common is one parameter under the names of all of them."""
        if role != "features" or self.options.share != "features":
            return tensor
        key = (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.requires_grad, isinstance(tensor, FakeTensor))
        return self._banks.setdefault(key, tensor)

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        s, p = self.similarity, parameters
        prototypes = match["weight"] if "prototypes" in choice else p["prototypes"]
        new = edit.call(
            tversky, match["x"], p["features"], prototypes, p.get("theta"), p.get("alpha"), p.get("beta"),
            p.get("negative"), match["bias"], s.intersection, s.convention, s.difference, s.form, s.mirrored, s.projected,
        )  # fmt: skip
        return {match.root: new}

    def borrows(self, choice: Mapping[str, Any]) -> Mapping[str, str]:
        return {k: choice[k] for k in ("prototypes",) if k in choice}

    def module(self, tensors: Mapping[str, Tensor], original: nn.Module, choice: Mapping[str, Any]) -> nn.Module | None:
        t = tensors
        return TverskyProjection(
            t["features"], t["prototypes"], t.get("theta"), t.get("alpha"), t.get("beta"), t.get("negative"),
            t.get("bias"), similarity=self.similarity,
        )  # fmt: skip

    def measure(
        self,
        site: Site,
        before: Read,
        after: Mapping[str, Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
    ) -> dict[str, float]:
        return {"features": float(after["features"].shape[0])}


class SignedPairRule(TverskyRule):
    """S(x, W) − S(x, −W) = x Wᵀ on the bank [I; −I]."""

    name: ClassVar[str] = "tversky.signed_pair"
    contract: ClassVar[Contract] = EXACT

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        return super().settle(site, program, statistics, generator) | {"saves": SAVES_NOTHING}

    def fit(
        self,
        weight: Tensor,
        site: Site,
        read: Read,
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> Fit:
        return exact.signed_pair(weight)


class SignCodesRule(TverskyRule):
    """S(x, cS) = c Σ s_k z_k for a weight that is a sign code."""

    name: ClassVar[str] = "tversky.sign_codes"
    contract: ClassVar[Contract] = EXACT
    terms: ClassVar[tuple[str, ...]] = ("features", "prototypes", "theta", "alpha")

    @property
    def similarity(self) -> Similarity:
        return Similarity(mirrored=True, projected=True)

    def refusal(self, program: Program, match: Match) -> str | None:
        weight = as_rows(match, program.tensor)
        if isinstance(weight, FakeTensor):
            return "its weight is made by an earlier rule, and whether it is a sign code cannot be seen yet"
        found = exact.magnitudes(weight)
        return found if isinstance(found, str) else super().refusal(program, match)

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        by_row = exact.magnitudes(as_rows(site.match, program.tensor))
        return super().settle(site, program, statistics, generator) | {"scale": "row" if by_row is True else "column"}

    def fit(
        self,
        weight: Tensor,
        site: Site,
        read: Read,
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> Fit:
        return exact.sign_codes(weight, choice["scale"] == "row")


class LowRankRule(TverskyRule):
    """x Wᵀ ≈ (x Gᵀ) Bᵀ with fewer features, as a signed pair on [G; −G]."""

    name: ClassVar[str] = "tversky.low_rank"
    contract: ClassVar[Contract] = CALIBRATED("whitened SVD of the weight")
    terms: ClassVar[tuple[str, ...]] = ("features", "prototypes", "theta", "alpha", "negative")

    @property
    def similarity(self) -> Similarity:
        return Similarity(mirrored=True, projected=True)

    def needs(self, match: Match) -> Mapping[str, Node]:
        return {"second_moment": match["x"]}

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        choice = super().settle(site, program, statistics, generator)
        weight = as_rows(site.match, program.tensor)
        if isinstance(weight, FakeTensor) and self.options.features == "auto":
            raise Kept("its weight is made by an earlier rule, so its rank cannot be chosen yet; give features=")
        group = self._group(site, program) if self.options.share == "features" else [_described(site.match, site.paths)]
        if self.options.features == "auto":
            return choice | self._auto(site, program, statistics, group)
        count = int(self.options.features)
        if count >= min(weight.shape):
            raise Kept(
                f"{count} features are no fewer than its rank, at most {min(weight.shape)}; ask for fewer, or for "
                'init="signed_pair", which is exact'
            )
        return choice | {"features": count, "bank": group}

    def _auto(
        self, site: Site, program: Program, statistics: Statistics | None, group: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The fewest features within `max_error`. Raises Kept where they are no smaller than the weight."""
        if site.match.captures["tied"]:
            raise Kept(
                "its weight is the token embedding, which stays: nothing would be saved; give features= to untie it"
            )
        layers = _layers(group, program.tensor, statistics)
        count = low_rank.directions(layers).rank_for(self.options.max_error)
        outputs, inputs = as_rows(site.match, program.tensor).shape
        numbers = low_rank.stored(count, outputs, inputs, len(group))
        if numbers >= outputs * inputs:
            known = "" if all(layer.moment is not None for layer in layers) else " without calibration"
            raise Kept(
                f"an output error of {self.options.max_error:g} takes {count} features{known}, {numbers} numbers and not "
                f"fewer than the weight's {outputs * inputs}; raise max_error or give features="
            )
        return {"features": count, "bank": group}

    def _group(self, site: Site, program: Program) -> list[dict[str, Any]]:
        """This layer and those that share a bank with it: all of its input width that the rule may take."""
        width = sizes(program.facts, site.match)[0]
        others = [
            m for m in self.matches(program)
            if sizes(program.facts, m)[0] == width and self.refusal(program, m) is None
            and not isinstance(program.tensor(str(m["weight"].target)), FakeTensor)
        ]  # fmt: skip
        matches = others if any(m.root is site.match.root for m in others) else [site.match, *others]
        described = (_described(m, m.paths) for m in matches)
        return list({one["weight"]: one for one in described}.values())

    def fit(
        self,
        weight: Tensor,
        site: Site,
        read: Read,
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> Fit:
        # The first layer of a shared bank makes it; the next ones find it here, when the first one's weight is gone.
        key = choice["in_features"] if self.options.share == "features" else str(site.address)
        if key not in self._banks:
            self._banks[key] = low_rank.directions(_layers(choice["bank"], read, statistics)).features
        moment = statistics.get("second_moment", site.paths) if statistics is not None else None
        return low_rank.fit(low_rank.Layer(weight, moment), self._banks[key][: choice["features"]])

    def measure(
        self,
        site: Site,
        before: Read,
        after: Mapping[str, Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
    ) -> dict[str, float]:
        weight, tensors = as_rows(site.match, before), (after["features"], after["prototypes"])
        figures = super().measure(site, before, after, choice, statistics)
        figures["weight_error"] = output_error(weight, *tensors, None)
        moment = statistics.get("second_moment", site.paths) if statistics is not None else None
        if moment is not None:
            figures["output_error"] = output_error(weight, *tensors, moment)
        return figures


class SingleRule(TverskyRule):
    """x Wᵀ → S(x, W): what a Tversky layer is trained from where it must not be a pair."""

    name: ClassVar[str] = "tversky.single"
    contract: ClassVar[Contract] = LEARNED("distillation from the dense layer")
    terms: ClassVar[tuple[str, ...]] = ("features", "prototypes", "theta", "alpha", "beta")

    def needs(self, match: Match) -> Mapping[str, Node]:
        return {"sample": match["x"]}

    def fit(
        self,
        weight: Tensor,
        site: Site,
        read: Read,
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> Fit:
        width = weight.shape[1]
        features = 2 * width if self.options.features == "auto" else min(int(self.options.features), 2 * width)
        sample = statistics.get("sample", site.paths) if statistics is not None else None
        if sample is None:
            inputs = torch.randn(single.ROWS, width, generator=generator).to(weight.device)
        else:
            inputs = sample[:: max(1, len(sample) // single.ROWS)].to(weight.device)
        return single.fit(weight, features, inputs, self.similarity)

    def measure(
        self,
        site: Site,
        before: Read,
        after: Mapping[str, Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
    ) -> dict[str, float]:
        figures = super().measure(site, before, after, choice, statistics)
        sample = statistics.get("sample", site.paths) if statistics is not None else None
        if sample is not None and len(sample) > single.ROWS:  # inputs between those it was fitted to
            stride = len(sample) // single.ROWS
            weight = as_rows(site.match, before)
            inputs = sample[stride // 2 :: stride].to(weight)
            made = TverskyProjection(
                after["features"], after.get("prototypes", weight), after["theta"], after["alpha"], after["beta"],
                similarity=self.similarity,
            )  # fmt: skip
            dense = inputs @ weight.t()
            figures["output_error"] = float((made(inputs) - dense).norm() / dense.norm())
        return figures


def as_rows(match: Match, read: Read) -> Tensor:
    """The weight as ``[out, in]``; transformers' Conv1D stores it the other way round."""
    weight = read(str(match["weight"].target))
    return weight.t() if match["transposed"] else weight


def _described(match: Match, paths: Sequence[str]) -> dict[str, Any]:
    """A layer as JSON, for a plan."""
    weight, transposed = str(match["weight"].target), bool(match["transposed"])
    return {"weight": weight, "transposed": transposed, "paths": list(paths)}


def _layers(group: Sequence[Mapping[str, Any]], read: Read, statistics: Statistics | None) -> list[low_rank.Layer]:
    layers = []
    for one in group:
        weight = read(one["weight"]).detach()
        moment = statistics.get("second_moment", one["paths"]) if statistics is not None else None
        layers.append(low_rank.Layer(weight.t() if one["transposed"] else weight, moment))
    return layers


def _with(match: Match, **captures: Any) -> Match:
    return dataclasses.replace(match, captures=MappingProxyType({**match.captures, **captures}))
