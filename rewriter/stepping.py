# SPDX-License-Identifier: Apache-2.0
"""`Steps`: a rewritten language model one token at a time, as straight code (`straightline`) from its own graph.

The model's class decodes as it was written: module by module, with masks and positions made anew for every token. Where
every attention was rewritten into an operator that goes on from a state (`rewriter.kernels.spec.Recurrence`), the
rewritten *graph* can do the same: captured with positions as an input, each such operator is given its state as a
further input and asked for the next one, and masks, which nothing reads any longer, fall away.

That holds only if no other operator looks from one position of the sequence to another, which `_check` finds by shapes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import sympy
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from rewriter import inputs, store
from rewriter.applying import replay
from rewriter.capturing import capture_skeleton
from rewriter.errors import PlanError, RewriterError
from rewriter.kernels.spec import REGISTRY, Recurrence
from rewriter.optimized import Optimized
from rewriter.rules import provenance
from rewriter.schemas import named_arguments
from rewriter.straightline import straight

# Operators besides pointwise ones and our own that may be told by the shapes of their results to compute each position
# from itself alone: a place that is moved keeps its size, and sums over the sequence, or parts of it, have another one.
_MOVING = frozenset(
    "alias cat chunk clone contiguous detach dropout expand expand_as flatten full_like ones_like permute repeat "
    "repeat_interleave reshape select slice split split_with_sizes squeeze stack t to transpose unbind unflatten unsqueeze "
    "view view_as zeros_like".split()
)
_ROWWISE = frozenset(
    "addmm amax amin baddbmm bmm embedding layer_norm linear matmul mean mm native_layer_norm rms_norm sum sym_size".split()
)
_ALONG = frozenset(("softmax", "_softmax", "log_softmax", "_log_softmax"))  # the same, but along one dimension

Layers = Mapping[int, tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Graph:
    """The graph of a step, without the model's tensors.

    Attributes:
        graph: ids, positions and states in; logits and new states out.
        mask: the placeholder of the attention mask.
        ids, positions: those of the tokens.
        states: placeholders of the states by path of the attention, in the order of the outputs.
        constants: tensors that belong to the graph.
    """

    graph: Graph
    mask: str
    ids: str
    positions: str
    states: Mapping[str, tuple[str, ...]]
    constants: store.Namespace


class Steps:
    """Single tokens of a rewritten model, on its parameters as they are when this is made.

    Args:
        opt: a causal language model.
        layers: index of every attention by its path; all of them are rewritten.
    """

    def __init__(self, opt: Optimized, layers: Mapping[str, int]) -> None:
        self._opt, self._state, self._indices = opt, opt._state, layers
        self._tensors = store.shared(opt)
        self._graph: _Graph | None = None
        self._layers: list[int] = []
        self._functions: dict[int, Callable[..., tuple[Tensor, ...]]] = {}

    def prepare(self) -> None:
        """Capture the graph, which takes as long as capturing the model did; once per model.

        Raises:
            RewriterError: there is none, with the reason.
        """
        if self._graph is not None:
            return
        if self._opt._state != self._state:
            raise PlanError("the model was cast or moved since")
        graph = _graph_of(self._opt)
        if graph.states.keys() != self._indices.keys():
            raise PlanError("not every attention of the model's modules has a state in the graph")
        self._graph, self._layers = graph, [self._indices[path] for path in graph.states]

    def run(self, ids: Tensor, position: int, layers: Layers) -> tuple[Tensor, dict[int, tuple[Tensor, ...]]]:
        """Logits ``[batch, 1, V]`` of int64 ids ``[batch, 1]``, and the states that follow ``layers``.

        Raises:
            RewriterError: as `prepare`, and `straightline.straight` at the first call with a batch size.
        """
        self.prepare()
        states = [s.contiguous() for index in self._layers for s in layers[index]]
        ids = ids.to(torch.int64).contiguous()
        given = (ids, torch.full_like(ids, position), *states)
        function = self._functions.get(len(ids))
        if function is None:
            function = self._functions[len(ids)] = self._written(given)
        logits, *left = function(*given)
        after, taken = {}, 0
        for index in self._layers:
            count = len(layers[index])
            after[index] = tuple(left[taken : taken + count])
            taken += count
        return logits, after

    def _written(self, given: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """The function for a batch size, from its first call."""
        step = cast(_Graph, self._graph)
        names = (step.ids, step.positions, *(name for held in step.states.values() for name in held))
        fixed: dict[str, Any] = {step.mask: torch.ones_like(given[0])}
        for node in step.graph.find_nodes(op="get_attr"):
            space, _, name = str(node.target).partition(".")
            own = space == store.CONSTANTS
            fixed[str(node.target)] = store.get(step.constants, name) if own else store.get(self._tensors, node.target)
        return straight(step.graph, dict(zip(names, given, strict=True)), fixed)


_graphs: WeakKeyDictionary[Optimized, dict[Any, _Graph | RewriterError]] = WeakKeyDictionary()


def _graph_of(opt: Optimized) -> _Graph:
    """The step's graph, captured once per model, dtype and device; why there is none, likewise."""
    with opt._lock:
        known = _graphs.setdefault(opt, {})
        if opt._state not in known:
            try:
                known[opt._state] = _captured(opt)
            except RewriterError as reason:
                known[opt._state] = reason.with_traceback(None)
        found = known[opt._state]
    if isinstance(found, RewriterError):
        raise found
    return found


@store.outside_inference_mode
def _captured(opt: Optimized) -> _Graph:
    if opt.training or opt._skeleton is None:
        raise PlanError("a step's graph is captured from a model in evaluation mode")
    if "position_ids" not in opt._names:
        raise PlanError("the model takes no position_ids, and would number every step's token 0")
    device = next(p.device for p in opt.parameters())
    ids = torch.zeros((2, 3), dtype=torch.int64, device=device)
    positions = torch.arange(3, device=device).repeat(2, 1)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    args, kwargs = inputs.by_name(opt._names, opt._optional, (), call)
    root = store.shared(opt)
    program = replay(capture_skeleton(opt._skeleton, root, args, kwargs).fork(root, compile=False), opt.plan)
    if "logits" not in program.output_names():
        raise PlanError(f"the model yields {', '.join(program.output_names())} and no logits")
    named = dict(zip(program.input_names(), program.graph.find_nodes(op="placeholder"), strict=True))
    outputs = cast(Sequence[Node], program.graph.output_node().args[0])
    logits = outputs[program.output_names().index("logits")]
    states = _wired(program.graph, logits)
    _check(program.graph, named["input_ids"].meta["val"].shape[1])
    mask, token, position = (named[name].name for name in ("attention_mask", "input_ids", "position_ids"))
    return _Graph(program.graph, mask, token, position, states, program.constants)


def _wired(graph: Graph, logits: Node) -> dict[str, tuple[str, ...]]:
    """Give every recurrence its state; the graph's outputs become logits and new states, and the rest falls away."""
    states: dict[str, tuple[str, ...]] = {}
    results = [logits]
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        recurrence = _recurrence(node)
        if recurrence is None:
            continue
        site = str(provenance(node).get("site", "")).partition(":")[0]
        if site in states:
            raise PlanError(f"{site}: more than one operator of it has a state")
        values = named_arguments(node)
        if any(values[name] is not None for name in recurrence.before) or values.get("causal") is False:
            raise PlanError(f"{site}: its operator does not start from nothing and go on")
        with graph.inserting_before(first):
            given = [graph.placeholder(f"{name}_{len(states)}") for name in recurrence.before]
        values |= dict(zip(recurrence.before, given, strict=True)) | {recurrence.keep: None}
        if recurrence.switch is not None:
            values[recurrence.switch] = True
        node.args, node.kwargs = tuple(values[a.name] for a in node.target._schema.arguments), {}
        with graph.inserting_before(graph.output_node()):
            results += [graph.call_function(operator.getitem, (node, index)) for index in recurrence.after]
        states[site] = tuple(placeholder.name for placeholder in given)
    graph.output_node().args = (tuple(results),)
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
    return states


def _recurrence(node: Node) -> Recurrence | None:
    spec = REGISTRY.get(node.target) if isinstance(node.target, OpOverload) else None
    return None if spec is None else spec.recurrence


def _check(graph: Graph, length: Any) -> None:
    """Every operator without a state computes each position of the sequence from that position alone, by its shapes.

    Raises:
        PlanError: names the first that is not known to.
    """
    if isinstance(length, int):
        raise PlanError(f"the model was captured for sequences of {length} tokens and no others")
    symbol = length.node.expr
    for node in graph.nodes:
        if node.op == "call_function" and _recurrence(node) is None and not _is_apart(node, symbol):
            raise PlanError(f"{node.name} ({node.target}) may look from one token to another and has no state")


def _is_apart(node: Node, symbol: Any) -> bool:
    if not isinstance(node.target, OpOverload):
        return True  # sizes, and results taken apart
    value, name = node.meta.get("val"), node.target._schema.name.partition("::")[2]
    known = torch.Tag.pointwise in node.target.tags or node.target in REGISTRY or name in _MOVING | _ROWWISE | _ALONG
    reads = any(_places(x.meta.get("val"), symbol) for x in node.all_input_nodes)
    if not reads and symbol not in _symbols(value):
        return True  # nothing of the sequence
    for tensor in (t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, Tensor)):
        along = _places(tensor, symbol)
        if len(along) != 1 or _expression(tensor.shape[along[0]]).is_Add:
            return False
        if name in _ALONG and int(named_arguments(node)["dim"]) % tensor.dim() in along:
            return False
    return known


def _places(value: Any, symbol: Any) -> list[int]:
    """Dimensions whose size depends on the sequence's length."""
    if not isinstance(value, Tensor):
        return []
    return [d for d, size in enumerate(value.shape) if symbol in _expression(size).free_symbols]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def _symbols(value: Any) -> set[Any]:
    tensors = [t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, Tensor)]
    return {symbol for t in tensors for size in t.shape for symbol in _expression(size).free_symbols}
