# SPDX-License-Identifier: Apache-2.0
"""softmax(scale · q kᵀ + mask) v  ≈  Σ_{window} e^s v + m Σ_{before} φ_q(q)·φ_k(k) v, over the same without v."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from rewriter import legality
from rewriter.calibration import Statistics
from rewriter.editing import Editor
from rewriter.errors import PlanError
from rewriter.facts import Facts, same_size
from rewriter.masks import MaskKind, classify
from rewriter.matcher import Match, Miss
from rewriter.operators import ALIAS, CONTIGUOUS, NOOP_CAST, NOOP_SHAPE
from rewriter.passes.linear_attention import fitting, modules
from rewriter.passes.linear_attention.fitting import Sequences, Shape
from rewriter.passes.linear_attention.form import Form
from rewriter.passes.linear_attention.gate import pays_from
from rewriter.passes.linear_attention.maps import MAPS
from rewriter.program import Program
from rewriter.rewriting import generator as generator_of
from rewriter.rules import CALIBRATED, LEARNED, Contract, Kept, Rule, Site, locate, module_path
from rewriter.views import ATTENTION, ROTARY
from rewriter.views.base import with_captures

if TYPE_CHECKING:
    from rewriter.passes.linear_attention import LinearAttention

aten = torch.ops.aten
_CAUSAL = ("causal", "causal+padding")
_OPEN = ("full", "padding")
_KEEPING = (NOOP_CAST, CONTIGUOUS, NOOP_SHAPE, ALIAS)


class LinearAttentionRule(Rule):
    """Attention sites whose mask is causal, full, or either with padding."""

    name = "linear_attention.attention"
    role = "attention"
    contract: ClassVar[Contract] = CALIBRATED("per head in closed form from calibration sequences")
    parametric = True
    specificity = 1

    def __init__(self, options: LinearAttention) -> None:
        self.options = options
        self._ranks: tuple[Program, dict[Node, int]] | None = None
        self._fits: dict[str, tuple[Statistics, fitting.SiteFit]] = {}

    # ------------------------------------------------------------------------------------------------ where

    def find(self, program: Program) -> tuple[Sequence[Match], Sequence[Miss]]:
        kinds: dict[Node | None, MaskKind] = {}
        found = ATTENTION.find(program)
        rotated = {rotary.root: rotary["x"] for rotary in ROTARY.find(program)} if self.options.gate == "key" else {}
        calls = Counter(module_path(match.root) for match in found)
        matches = []
        for match in found:
            mask = match["mask"]
            if mask not in kinds:  # layers share their masks
                kinds[mask] = (
                    MaskKind("full") if mask is None else classify(program.facts, mask, match["mask_form"], match.root)
                )
            kind = kinds[mask]
            more: dict[str, Any] = {"kind": kind, "padding": kind.padding, "calls": calls[module_path(match.root)]}
            for name, whole in (("plain_q", match["q"]), ("plain_k", match["k_base"])):
                more[name] = rotated.get(_unchanged(program.facts, whole), whole)
            matches.append(with_captures(match, {**match.captures, **more}, match.name))
        return matches, [m for m in ATTENTION.explain(program) if m.node is not None]

    def refusal(self, program: Program, match: Match) -> str | None:
        reason = _form_refusal(program, match) or _mask_refusal(program, match) or self._legality(program, match)
        if reason is None and not _is_causal(match) and (self.options.gate or self.options.rule == "delta"):
            return "is bidirectional, where gates and the delta rule have no order to follow"
        if reason is None and not MAPS[self.options.feature_map].causal:
            return _mean_query_refusal(program, match, self.options.feature_map)
        return reason

    def _legality(self, program: Program, match: Match) -> str | None:
        if match["calls"] > 1:
            return "its module is called more than once, and each call would need parameters of its own"
        reason = legality.refusal(program.facts, match)
        # Dropped attention weights become a dropped output (see `rewrite`), so that random numbers are expected.
        if reason is None or (reason.kind == "random" and match["dropout_p"] > 0):
            return None
        return str(reason)

    # ---------------------------------------------------------------------------------------------- whether

    def settle(
        self, site: Site, program: Program, statistics: Statistics | None, generator: torch.Generator
    ) -> dict[str, Any]:
        """What of the form depends on the site. Raises Kept where softmax is the better choice, PlanError."""
        match, o = site.match, self.options
        if o.calibrate and statistics is None:
            raise Kept(
                f"linear_attention with feature_map={o.feature_map!r} is placed from data, and there is none: give "
                "calibration= (sequences as long as those the model will see), or calibrate=False to train from scratch"
            )
        data = self._sequences(site, statistics) if statistics is not None else None
        causal = _is_causal(match)
        form = self._form(match, causal)
        self._keep_short(match, form, data)
        self._keep_some(site, program, statistics)
        choice = dataclasses.asdict(form)
        choice["rotary"] = match["plain_k"] is not match["k_base"]
        choice["key_heads"], choice["head_dim"] = (
            int(s) for s in (match["k_base"].meta["val"].shape[i] for i in (1, 3))
        )
        return choice

    def _form(self, match: Match, causal: bool) -> Form:
        o, q = self.options, match["q"].meta["val"]
        window = (o.window or 0) if causal else 0
        return Form(
            o.feature_map, float(match["scale"]), window, o.block, o.sinks if window else 0, o.anchor, causal,
            int(q.shape[1]), o.gate, o.rule, o.horizon or 0,
        )  # fmt: skip

    def _keep_short(self, match: Match, form: Form, data: Sequences | None) -> None:
        o = self.options
        length = max(_hint(match["k"].meta["val"].shape[-2]), 0 if data is None else data.k.shape[2])
        if o.horizon is not None and length > o.horizon:
            raise PlanError(
                f"linear_attention: horizon={o.horizon} is less than the {length} tokens of the example or calibration "
                "inputs; it must be the longest sequence the model will see"
            )
        if o.min_length is None:
            return
        if o.min_length == "auto":
            shape = match["k_base"].meta["val"].shape
            features = o.features or MAPS[o.feature_map].width(int(shape[3]))
            needed = pays_from(form, int(shape[1]), int(shape[3]), features, match["q"].meta["val"].device.type)
        else:
            needed = int(o.min_length)
        if length < needed:
            raise Kept(
                f"softmax is kept: the rewrite pays from {needed} tokens on, and the example and calibration inputs have "
                f"{length}; min_length=None rewrites whatever the length"
            )

    def _keep_some(self, site: Site, program: Program, statistics: Statistics | None) -> None:
        every = self.options.keep_softmax_every
        if every is None:
            return
        rank = self._rank(program, statistics)[site.match.root]
        total = len(self._rank(program, statistics))
        if self.options.keep == "position" and rank % every == every - 1:
            raise Kept(f"softmax is kept at every {every}th attention (keep_softmax_every={every})")
        if self.options.keep == "sensitivity" and rank < total // every:
            raise Kept(
                f"softmax is kept at the {total // every} of {total} attentions with the largest error (keep_softmax_every="
                f"{every}, keep='sensitivity'); this one is number {rank + 1}"
            )

    def _rank(self, program: Program, statistics: Statistics | None) -> dict[Node, int]:
        """Site (by root) -> its number: in graph order, or from the most sensitive down."""
        if self._ranks is None or self._ranks[0] is not program:
            sites = list(locate(self, program, explain=False).sites)
            if self.options.keep == "sensitivity":
                draw = {site.match.root: generator_of(0, site.address, self.name) for site in sites}
                errors = {
                    root: self._fit(site, statistics, draw[root]).error for site in sites for root in [site.match.root]
                }
                sites.sort(key=lambda site: -errors[site.match.root])
            self._ranks = program, {site.match.root: number for number, site in enumerate(sites)}
        return self._ranks[1]

    # ------------------------------------------------------------------------------------------- parameters

    def needs(self, match: Match) -> Mapping[str, Node]:
        wanted = {"sequences:q": match["q"], "sequences:k": match["k_base"], "sequences:v": match["v_base"]}
        return wanted | ({} if match["padding"] is None else {"sequences:keep": match["padding"]})

    def roles(self, match: Match, choice: Mapping[str, Any]) -> tuple[str, ...]:
        return _form_of(choice).roles

    def initialise(
        self,
        site: Site,
        read: Callable[[str], Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        form, value = _form_of(choice), site.match["q"].meta["val"]
        if statistics is None or not self.options.calibrate:
            tensors = fitting.start(form, choice["key_heads"], choice["head_dim"], generator)
        else:
            tensors = dict(self._fit(site, statistics, generator).tensors)
        tensors["window_gate"] = torch.ones(form.heads)
        placed = {role: tensors[role].to(value.device, value.dtype).contiguous() for role in form.roles}
        return {role: x if role in form.buffers else nn.Parameter(x) for role, x in placed.items()}

    def measure(
        self,
        site: Site,
        before: Callable[[str], Tensor],
        after: Mapping[str, Tensor],
        choice: Mapping[str, Any],
        statistics: Statistics | None,
    ) -> dict[str, float]:
        if statistics is None or not self.options.calibrate:
            return {}
        return dict(self._fits[str(site.address)][1].figures)

    def _fit(self, site: Site, statistics: Statistics | None, generator: torch.Generator) -> fitting.SiteFit:
        """The calibration of a site; kept, since it is measured after it was made."""
        if statistics is None:
            raise PlanError(
                "linear_attention: keep='sensitivity' measures errors on calibration data; give calibration="
            )
        form = self._form(site.match, _is_causal(site.match))
        dim = int(site.match["k_base"].meta["val"].shape[3])
        data = self._sequences(site, statistics)
        found = fitting.fit(data, self._shape(form), form.feature_map, self.options.features or 2 * dim, generator)
        self._fits[str(site.address)] = statistics, found
        return found

    def _shape(self, form: Form) -> Shape:
        decays = form.gate == "fixed"
        return Shape(
            form.scale, form.window, form.block, form.sinks, form.causal, decays, form.anchor, form.horizon
        )  # fmt: skip

    def _sequences(self, site: Site, statistics: Statistics) -> Sequences:
        """Calibration sequences without padding. Raises PlanError."""
        found = {name: statistics.get(f"sequences:{name}", site.paths) for name in ("q", "k", "v", "keep")}
        if any(found[name] is None for name in ("q", "k", "v")):
            raise PlanError(
                f"linear_attention at {site.address.path}: the statistics hold no sequences of this site; collect them "
                "again with this pass (rewriter.calibrate)"
            )
        q, k, v = (found[name].float() for name in ("q", "k", "v"))  # type: ignore[union-attr]
        keep = found["keep"]
        whole = torch.ones(len(q), dtype=torch.bool) if keep is None else keep.bool().all(-1)
        if not bool(whole.any()):
            raise PlanError(
                f"linear_attention at {site.address.path}: every calibration sequence is padded; give some without padding"
            )
        return Sequences(q[whole], k[whole], v[whole])

    # ---------------------------------------------------------------------------------------------- rewriting

    def rewrite(
        self, edit: Editor, match: Match, parameters: Mapping[str, Node], choice: Mapping[str, Any]
    ) -> Mapping[Node, Node]:
        form = _form_of(choice)
        operands = {"q": match["q"], "k": match["k_base"], "v": match["v_base"]}
        if match["padding"] is not None:
            operands["keep"] = edit.call(aten.ne.Scalar, match["padding"], 0)
        if form.gate == "key":
            operands |= {"plain_q": match["plain_q"], "plain_k": match["plain_k"]}
        names = (*operands, *form.roles)

        def run(*values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=True))
            plain = (given["plain_q"], given["plain_k"]) if "plain_q" in given else None
            return form.call(given["q"], given["k"], given["v"], given.get("keep"), given, plain)[0]

        out = _inlined(edit, run, *operands.values(), *(parameters[role] for role in form.roles))
        if match["dropout_p"] > 0:
            out = edit.call(aten.dropout.default, out, match["dropout_p"], True)
        return {match.root: out}

    def module(self, tensors: Mapping[str, Tensor], original: nn.Module, choice: Mapping[str, Any]) -> nn.Module | None:
        if choice["rotary"] and choice["gate"] == "key":
            return None  # a model's attention function is given q and k after rotary only
        return modules.LinearAttentionCore(_form_of(choice), tensors)

    def attach(self, root: nn.Module, path: str, module: nn.Module) -> bool:
        return modules.attach(root, path, module)


class UntrainedRule(LinearAttentionRule):
    """The same with parameters that are to be trained: ``calibrate=False``."""

    contract: ClassVar[Contract] = LEARNED("feature maps and branch weights trained by distillation")


# ---------------------------------------------------------------------------------------------------- conditions


def _form_refusal(program: Program, match: Match) -> str | None:
    """Why the scores cannot be those of linear attention."""
    if match["softcap"] is not None:
        return (
            f"caps the scores with {match['softcap']:g} · tanh: exp of a capped score is no product of two feature maps, "
            "and the calibrated range would be wrong"
        )
    if match["bias"] is not None:
        return "adds a position bias to the scores, which a state that forgets positions cannot hold"
    if match["scale"] is None:
        return "the scale of the scores depends on a size that is not fixed"
    if match["groups"] is None:
        return "queries do not divide among the heads of keys and values"
    shapes = [program.facts.shape(match[name]) or () for name in ("q", "k_base", "v_base")]
    if any(len(shape) != 4 for shape in shapes):
        return "q, k and v are not [batch, heads, length, head dim]"
    if any(not isinstance(size, int) for shape in shapes for size in (shape[1], shape[3])):
        return "the number of heads or the head dim is not fixed"
    return None


def _mask_refusal(program: Program, match: Match) -> str | None:
    kind: MaskKind = match["kind"]
    if match["is_causal"] and match["mask"] is not None:
        return "is causal and has a mask, too"
    if match["mask"] is not None and kind.kind not in (*_CAUSAL, *_OPEN):
        already = "; a window is linear in the length as it is" if "window" in kind.kind else ""
        return f"the mask is {kind}{already}"
    if _is_causal(match):
        q, k = (program.facts.shape(match[name]) or () for name in ("q", "k"))
        if not same_size(q[-2], k[-2]):
            return "there may be more keys than queries, so that causal is not defined by the mask alone"
    return None


def _mean_query_refusal(program: Program, match: Match, name: str) -> str | None:
    """Why a map that weighs every key by the mean query cannot be used."""
    if _is_causal(match):
        return f"is causal, and the map {name!r} weighs every key by all queries, later ones too; take another map"
    q, k = (program.facts.shape(match[name]) or () for name in ("q", "k"))
    if not same_size(q[-2], k[-2]):
        return f"queries and keys are of different sequences, and the map {name!r} needs one mask for both"
    return None


def _is_causal(match: Match) -> bool:
    return bool(match["is_causal"]) or match["kind"].kind in _CAUSAL


def _unchanged(facts: Facts, node: Node) -> Node:
    """What the node is but another name of: before copies and slices that keep everything."""
    while any(node.target in kind.targets and kind.test(facts, node) for kind in _KEEPING):
        node = node.all_input_nodes[0]
    return node


def _form_of(choice: Mapping[str, Any]) -> Form:
    known = [field.name for field in dataclasses.fields(Form)]
    return Form(**{name: choice[name] for name in known if name in choice})  # plans name what they were made with


def _hint(size: Any) -> int:
    """A length as the example call has it."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _inlined(edit: Editor, function: Callable[..., Tensor], *operands: Node) -> Node:
    """``function(*operands)`` as single aten calls of the graph."""
    values = [edit.resolve(node).meta["val"] for node in operands]
    with edit.fake_mode:
        # pre_dispatch keeps composite operators whole (softmax, matmul), as the training IR does.
        traced = make_fx(function, tracing_mode="real", pre_dispatch=True)(*values).graph
    known: dict[Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), operands, strict=True))
    for node in traced.nodes:
        if node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = edit.call(node.target, *args, **kwargs)
    result: Node = known[traced.output_node().args[0]]  # type: ignore[index]
    return result
