# SPDX-License-Identifier: Apache-2.0
"""Capturing: a model and example inputs become a `Program`.

The model is exported from its skeleton, so its own state is never touched; then the exported graph is brought into the
dialect the rest of the package works on (:mod:`rewriter.program`).
"""

from __future__ import annotations

import hashlib
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from rewriter import inputs, store
from rewriter.errors import CaptureError
from rewriter.modes import neutral
from rewriter.program import Program
from rewriter.skeleton import Skeleton, check, named_tensors, unwrap
from rewriter.structure import Template, flatten, rebuild

aten = torch.ops.aten
_WRAPPED = "wrapped"
# torch.export keeps process-wide state while it traces; captures of several threads take turns.
_lock = threading.RLock()


class _Flat(nn.Module):
    """The model with flat tensor inputs and outputs; ``on_result`` is told the structure of the result.

    (A callback, because export puts attributes that change while it traces back to what they were.)
    """

    def __init__(self, model: nn.Module, call: Template, on_result: Callable[[Template], None]) -> None:
        super().__init__()
        self.wrapped: nn.Module = model
        self.call = call
        self.on_result = on_result
        self.training = model.training  # `.train()` would reach into the model and overrule its submodules' modes

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = rebuild(self.call, tensors)
        flat: list[Tensor] = []
        self.on_result(flatten(self.wrapped(*args, **kwargs), flat))
        return tuple(flat)


@store.outside_inference_mode
def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: str = "auto",
) -> Program:
    """Capture ``model`` as a program that shares its tensors until either side writes to them.

    Args:
        model: any module ``torch.export`` accepts, or an ``ExportedProgram``.
        example_inputs: a tensor or tuple of positional arguments; inferred if missing (see :func:`rewriter.inputs.infer`).
        example_kwargs: keyword arguments.
        dynamic_shapes: ``"auto"``: every dimension the model does not fix is free; ``"static"``: all are fixed.

    Raises:
        CaptureError: inputs cannot be inferred, or export refuses the model; names the user's source line.
    """
    if isinstance(model, ExportedProgram):
        return from_exported(model)
    inner, notes = unwrap(model)
    notes += check(inner)
    args, kwargs = example_call(inner, example_inputs, example_kwargs)
    skeleton = Skeleton(inner)
    root = share_tensors(inner)
    program = capture_skeleton(skeleton, root, args, kwargs, dynamic_shapes)
    program.notes = notes + program.notes
    return program


def example_call(
    model: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The normalised example call: given or inferred, with an attention mask where the model takes one."""
    names, optional = inputs.signature(model)
    if example_inputs is None and not example_kwargs:
        args, kwargs = inputs.infer(model)
    else:
        args = (
            () if example_inputs is None else example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        )
        kwargs = dict(example_kwargs or {})
    args, kwargs = inputs.by_name(names, optional, args, kwargs)
    return args, inputs.add_mask(names, kwargs)


def share_tensors(model: nn.Module) -> nn.Module:
    """A store with the model's tensors, shared with it until either side writes (copy on write); ties stay ties."""
    root = store.Namespace()
    held: dict[int, Tensor] = {}
    for name, tensor in named_tensors(model):
        own = held.setdefault(id(tensor), store.share(tensor))
        path, _, leaf = name.rpartition(".")
        store.put(root, name, own, persistent=leaf not in model.get_submodule(path)._non_persistent_buffers_set)
    root.train(model.training)
    return root


def capture_skeleton(
    skeleton: Skeleton, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic_shapes: str = "auto"
) -> Program:
    """Export the skeleton for one call signature. Raises CaptureError."""
    if dynamic_shapes not in ("auto", "static"):
        raise CaptureError(f'dynamic_shapes must be "auto" or "static", not {dynamic_shapes!r}')
    flat: list[Tensor] = []
    call = flatten((tuple(args), dict(kwargs)), flat)
    if not flat:
        raise CaptureError("the example call has no tensor; give tensors of the real shapes and dtypes")
    with torch.inference_mode(False):
        flat = [t.clone() if t.is_inference() else t for t in flat]  # autograd, which export runs under, refuses them
        flat = _distinct(flat)
        example = inputs.enlarge(flat) if dynamic_shapes == "auto" else tuple(flat)
    results: list[Template] = []
    model = skeleton.materialise(lambda name: store.get(root, name) if store.has(root, name) else None)
    module = _Flat(model, call, results.append)
    dims = tuple({d: Dim.AUTO for d in range(t.dim())} for t in example) if dynamic_shapes == "auto" else None
    exported = _export(module, example, None if dims is None else (dims,))
    graph_module = exported.module(check_guards=False)
    notes = ("config.use_cache was off while capturing",) if skeleton.caching else ()
    aliases = {name: names for name, names in skeleton.names.items() if len(names) > 1}
    canonical = {other: name for name, names in skeleton.names.items() for other in names}
    program = _program(graph_module, root, call, results[-1], example, canonical)
    program.aliases, program.notes, program.training = aliases, notes, skeleton.module.training
    return program


def _distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A tensor given twice (``input_ids=ids, labels=ids``) as two: export would make one input of it."""
    seen: set[int] = set()
    distinct = []
    for tensor in tensors:
        again = id(tensor) in seen
        seen.add(id(tensor))
        distinct.append(tensor.detach().clone().requires_grad_(tensor.requires_grad) if again else tensor)
    return distinct


def _export(module: _Flat, example: Sequence[Tensor], dynamic_shapes: Any) -> ExportedProgram:
    try:
        # The caller may be in no_grad, inference mode or autocast; the graph must not depend on it.
        with _lock, neutral(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            return torch.export.export(module, tuple(example), dynamic_shapes=dynamic_shapes, strict=False)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(_refusal(module.wrapped, error)) from error


def _refusal(model: nn.Module, error: Exception) -> str:
    line = _user_line(error)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    at = f"\n  at {line}" if line else ""
    return (
        f"torch.export refuses {type(model).__name__}: {reason}{at}\n  make that line traceable "
        "(no Python branch on tensor values, no .item() or numpy), or pass the submodule that is"
    )


def _user_line(error: Exception) -> str | None:
    """The deepest frame that is neither torch's nor ours: the line of the model where tracing stopped."""
    ours, torchs = Path(__file__).parent, Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not path.is_relative_to(ours) and not path.is_relative_to(torchs) and path.suffix == ".py":
            return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return None


def from_exported(exported: ExportedProgram) -> Program:
    """The program of an ``ExportedProgram``: one signature, its tensors shared until written."""
    graph_module = exported.module(check_guards=False)
    args, kwargs = exported.example_inputs or ((), {})
    _bake_constants(graph_module.graph, args, kwargs)
    _sort_keywords(graph_module.graph, args, kwargs)
    flat: list[Tensor] = []
    call = flatten(inputs.by_name((), frozenset(), tuple(args), kwargs), flat)
    out_spec = exported.module_call_graph[0].signature.out_spec
    outputs = [n.meta.get("val") if isinstance(n, Node) else n for n in _flat_outputs(graph_module.graph)]
    if not all(isinstance(o, Tensor) or o is None for o in outputs):
        raise CaptureError("an output of the exported program is not a tensor; return tensors only")
    result = flatten(pytree.tree_unflatten(outputs, out_spec), [])
    root = share_tensors(graph_module)
    return _program(graph_module, root, call, result, tuple(flat), {})


def _tensor_leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _bake_constants(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Export gives constants a placeholder of their own; their values are in the graph, and in the call's template."""
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
    for node, leaf in zip(graph.find_nodes(op="placeholder"), leaves, strict=True):
        if isinstance(leaf, Tensor):
            continue
        if node.users:
            raise CaptureError(
                f"argument {node.name!r} of the exported program is a free number; export it with a tensor or a constant"
            )
        graph.erase_node(node)


def _sort_keywords(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Placeholders in the order of :func:`rewriter.inputs.by_name`: positional ones, then keywords by name."""
    nodes = iter(graph.find_nodes(op="placeholder"))
    positional = [next(nodes) for _ in _tensor_leaves(tuple(args))]
    by_name = {name: [next(nodes) for _ in _tensor_leaves(value)] for name, value in kwargs.items()}
    ordered = [*positional, *(node for name in sorted(by_name) for node in by_name[name])]
    for node in reversed(ordered):
        next(iter(graph.nodes)).prepend(node)


def program_of_graph(graph_module: GraphModule, example: tuple[Tensor, ...]) -> Program:
    """See :meth:`Program.from_graph_module`."""
    root = share_tensors(graph_module)
    names = [n.name for n in graph_module.graph.nodes if n.op == "placeholder"]
    call: Template = {"tuple": [{"tuple": [{"tensor": i} for i in range(len(names))]}, {"dict": {}}]}
    outputs = _flat_outputs(graph_module.graph)
    single = isinstance(next(iter(graph_module.graph.find_nodes(op="output"))).args[0], Node)
    result: Template = {"tensor": 0} if single else {"tuple": [{"tensor": i} for i in range(len(outputs))]}
    copied = GraphModule(graph_module, graph_module.graph)
    return _program(copied, root, call, result, example, {})


def _flat_outputs(graph: Graph) -> list[Any]:
    return list(
        pytree.tree_leaves(next(iter(graph.find_nodes(op="output"))).args[0], is_leaf=lambda x: isinstance(x, Node))
    )


# ----------------------------------------------------------------------------------------------- one dialect


def _program(
    graph_module: GraphModule,
    root: nn.Module,
    call: Template,
    result: Template,
    example: tuple[Tensor, ...],
    canonical: Mapping[str, str],
) -> Program:
    graph = graph_module.graph
    graph.set_codegen(CodeGen())
    _inline_grad_regions(graph_module)
    _drop_assertions(graph)
    graph.lint()  # from here on names may be those of tensors the store no longer has
    _rename(graph_module, canonical)
    constants, bodies = _lift_constants(graph_module, root, frozenset(canonical.values()))
    _flatten_output(graph)
    _drop_unused_reads(graph)
    bound = store.bind(graph, root, constants, bodies)
    return Program(bound, root, call, result, {}, constants, bodies, example)


def _drop_assertions(graph: Graph) -> None:
    """Assertions on dtypes and devices would refuse ``.half()``; those on sizes repeat what export has proven."""
    for node in reversed(list(graph.nodes)):
        is_guard = node.op == "call_module" and str(node.target) == "_guards_fn"
        if is_guard or node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def _inline_grad_regions(graph_module: GraphModule) -> None:
    """``with no_grad():`` regions become plain nodes whose results are detached: the same values and gradients."""
    wrap = torch.ops.higher_order.wrap_with_set_grad_enabled
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=wrap):
        enabled, body, *operands = node.args
        if enabled:
            continue  # a gradient island inside no_grad has no equivalent among plain nodes
        inner = getattr(graph_module, str(body.target))
        _inline_grad_regions(inner)
        values: dict[Node, Any] = dict(zip(inner.graph.find_nodes(op="placeholder"), operands, strict=True))
        with graph.inserting_before(node):
            for n in inner.graph.nodes:
                if n.op == "get_attr":
                    setattr(graph_module, str(n.target).replace(".", "_"), _attribute(inner, str(n.target)))
                if n.op not in ("placeholder", "output"):
                    values[n] = graph.node_copy(n, values.__getitem__)
            outputs = inner.graph.output_node().args[0]
            many = isinstance(outputs, list | tuple)
            detached = [_detach(graph, values[o]) for o in (outputs if many else [outputs])]
        for user in list(node.users):
            if many:
                user.replace_all_uses_with(detached[user.args[1]])
                graph.erase_node(user)
        if not many:
            node.replace_all_uses_with(detached[0])
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)


def _detach(graph: Graph, node: Node) -> Node:
    if not node.meta["val"].is_floating_point():
        return node
    new = graph.call_function(aten.detach.default, (node,))
    new.meta = {k: v for k, v in node.meta.items() if k in ("val", "stack_trace", "nn_module_stack", "from_node")}
    return new


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _rename(graph_module: GraphModule, canonical: Mapping[str, str]) -> None:
    """Take the wrapper out of names and paths, and give tied tensors their one canonical name."""
    prefix = _WRAPPED + "."
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith(prefix):
            name = str(node.target).removeprefix(prefix)
            node.meta["rewriter_name"] = canonical.get(name, name)
        if (stack := node.meta.get("nn_module_stack")) is not None:
            node.meta["nn_module_stack"] = {
                k: (path.removeprefix(prefix).removeprefix(_WRAPPED), kind)
                for k, (path, kind) in stack.items()
                if not str(kind).endswith("capturing._Flat")
            }


def _lift_constants(
    graph_module: GraphModule, root: nn.Module, known: frozenset[str]
) -> tuple[store.Namespace, dict[str, GraphModule]]:
    """One ``get_attr`` node per tensor, at the top; tensors that are no parameter or buffer go to the constants.

    ``known`` names belong to the model even if the store has them no longer (a rewrite replaced them).
    """
    graph = graph_module.graph
    constants, bodies = store.Namespace(), {}
    first: dict[str, Node] = {}
    top = next(iter(graph.nodes))
    for node in graph.find_nodes(op="get_attr"):
        value = _attribute(graph_module, str(node.target))
        if isinstance(value, GraphModule):
            bodies[str(node.target)] = value
            continue
        if not isinstance(value, Tensor):
            raise CaptureError(_not_a_tensor(node, value))
        name = node.meta.pop("rewriter_name", str(node.target))
        if name not in known and not store.has(root, name):
            leaf = _constant_name(value)
            name = f"{store.CONSTANTS}.{leaf}"
            store.put(constants, leaf, value.detach(), persistent=False)
        node.target = name
        if name in first:
            node.replace_all_uses_with(first[name])
            graph.erase_node(node)
            continue
        first[name] = node
        node.meta.setdefault("val", value)
        if node is not top:
            top.prepend(node)
    return constants, bodies


def _not_a_tensor(node: Node, value: Any) -> str:
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    at = f"\n  at {' '.join(line.strip() for line in trace[-2:])}" if trace else ""
    return (
        f"torch.export left a {type(value).__name__} in the graph ({node.target}), and only tensors can be constants of a "
        f"program{at}\n  usual cause: torch.vmap over Python functions, with which old releases of transformers make masks"
    )


def _constant_name(value: Tensor) -> str:
    """A name by content: equal constants of several programs share it, different ones never do."""
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return "c" + hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode() + raw).hexdigest()[:12]


def _flatten_output(graph: Graph) -> None:
    output = graph.output_node()
    output.args = (tuple(o for o in _flat_outputs(graph) if isinstance(o, Node)),)  # None is in the result's template


def _drop_unused_reads(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        pure = node.op == "get_attr" or (
            isinstance(node.target, torch._ops.OpOverload)
            and not node.target._schema.is_mutable
            and torch.Tag.nondeterministic_seeded not in node.target.tags
            and node.target.namespace != "profiler"
        )
        if pure and not node.users and "assert" not in str(node.target) and "constrain" not in str(node.target):
            graph.erase_node(node)
