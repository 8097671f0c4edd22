# SPDX-License-Identifier: Apache-2.0
"""Saving, loading, pickling an `Optimized`: what goes into the stored format, and how it comes back."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from rewriter import inputs, storage, store
from rewriter.errors import ExportError, LoadError, PlanError
from rewriter.graphio import graph_from_json, graph_to_json
from rewriter.optimized import Optimized, known_target
from rewriter.planner import Plan
from rewriter.program import Program
from rewriter.skeleton import Skeleton, check, unwrap
from rewriter.structure import classes_of, is_storable, register_result_class


def save(opt: Optimized, path: Path) -> None:
    """Write ``opt`` as a directory of safetensors and JSON (docs/format.md), atomically.

    Saved are the parameters, the plan, and every program captured so far; not the original tensors and not the user's
    code, so a loaded model knows the calls that were captured and cannot undo.

    Raises:
        ExportError: the path is not writable, or the graph has an operator the format does not know.
    """
    tensors = dict(store.tensors(opt))
    # Programs of other dtypes or devices belong to tensors that are no longer there.
    present = {key: program for key, program in opt._programs.items() if key[-1] == opt._state}
    if not present:
        raise ExportError("no program was captured since the model was cast; call it once, then save")
    foreign = sorted({name for p in present.values() for name in classes_of(p.result) if not is_storable(name)})
    if foreign:
        raise ExportError(
            f"results of type {', '.join(foreign)} cannot be stored, for loading would run its code; return a tuple or a dict"
        )
    for program in present.values():
        tensors |= {f"{store.CONSTANTS}.{name}": t for name, t in store.tensors(program.constants)}
    storage.write(
        path,
        tensors=tensors,
        parameters={name for name, t in tensors.items() if isinstance(t, nn.Parameter)},
        persistent={
            n for n, t in store.tensors(opt) if not isinstance(t, nn.Parameter) and store.is_persistent(opt, n)
        },
        programs=[_program_to_json(key, program) for key, program in present.items()],
        plan=opt.plan.to_json(),
        extra={
            "names": list(opt._names),
            "optional": sorted(opt._optional),
            "first": list(present).index(opt._first) if opt._first in present else 0,
            "original_bytes": opt.original_bytes,
            "training": opt.training,
            "target": opt.target,
            "report": opt.report.to_json() if opt.report is not None else None,
        },
    )


@store.outside_inference_mode
def load(path: str | Path, model: nn.Module | None = None) -> Optimized:
    """Read what :meth:`Optimized.save` wrote. Nothing in the files is executed or imported by name.

    Args:
        path: the directory.
        model: the original module, if calls other than the saved ones are wanted; its weights are not used.

    Raises:
        LoadError: truncated, foreign, hostile or newer files, or a model that does not fit the plan.
    """
    stored = storage.read(path)
    try:
        plan = Plan.from_json(stored.plan)
        extra = stored.extra
        names, optional = tuple(map(str, extra["names"])), frozenset(map(str, extra["optional"]))
        first, training, original_bytes = int(extra["first"]), bool(extra["training"]), int(extra["original_bytes"])
        target = known_target(extra.get("target"))  # older files have none
    except (KeyError, TypeError, ValueError, PlanError) as error:
        raise LoadError(f"{path}: plan.json or the manifest is not what this version writes: {error}") from error
    opt = Optimized.__new__(Optimized)
    nn.Module.__init__(opt)
    _fill(opt, stored.tensors, stored.persistent)
    opt.__dict__.update(
        plan=plan,
        report=None,
        target=target,
        original_bytes=original_bytes,
        _skeleton=None,
        _originals=None,
        _names=names,
        _optional=optional,
        _lock=threading.RLock(),
        _programs={},
        _lowered={},
        _bases={},
    )
    nn.Module.train(opt, training)
    for item in stored.programs:
        key, program = _program_from(item.key, item.call, item.result, item.graph_module, opt)
        program.aliases = dict(stored.aliases)
        opt._programs[key] = program
    if not 0 <= first < len(opt._programs):
        raise LoadError(f"{path}: the manifest names program {first} of {len(opt._programs)}")
    opt._first = list(opt._programs)[first]
    for key in opt._programs:
        opt._lower(key)
    if model is not None:
        _attach(opt, model)
    opt._refresh()
    return opt


def _attach(opt: Optimized, model: nn.Module) -> None:
    """Let ``opt`` capture further calls from the skeleton of ``model``."""
    inner, _ = unwrap(model)
    check(inner)
    skeleton = Skeleton(inner)
    _check_fit(opt, skeleton)
    kinds = {p.dtype for p in opt.parameters() if p.is_floating_point()}
    if len(kinds) == 1:
        skeleton.module.to(next(iter(kinds)))
    skeleton.module.train(opt.training)
    opt._skeleton = skeleton
    opt._names, opt._optional = inputs.signature(inner)


def _check_fit(opt: Optimized, skeleton: Skeleton) -> None:
    """Every tensor that no rewrite made is one of the model's, in the model's shape. Raises LoadError."""
    made_at = tuple(f"{site.address.path}." for site in opt.plan.sites if site.address.path)
    canonical = {other: name for name, names in skeleton.names.items() for other in names}
    for name, tensor in store.tensors(opt):
        if made_at and name.startswith(made_at):
            continue
        shape = skeleton.sizes.get(canonical.get(name, ""), (None,))[0]
        if shape != tuple(tensor.shape):
            has = "no such tensor" if shape is None else f"one of shape {list(shape)}"
            raise LoadError(
                f"the model does not fit what was saved: {name!r} is {list(tensor.shape)} in the files, and a "
                f"{type(skeleton.module).__name__} has {has}; pass the model that was optimised"
            )


def _fill(root: nn.Module, tensors: Mapping[str, Tensor], persistent: frozenset[str]) -> None:
    for name, tensor in tensors.items():
        if not name.startswith(store.CONSTANTS + "."):
            store.put(root, name, tensor, persistent=isinstance(tensor, nn.Parameter) or name in persistent)


# ------------------------------------------------------------------------------------------------------ programs


def _program_to_json(key: Any, program: Program) -> dict[str, Any]:
    return {
        "key": _encode(key),
        "call": program.call,
        "result": program.result,
        "graph": graph_to_json(program.graph_module),
    }


def _program_from(key: Any, call: Any, result: Any, module: GraphModule, root: nn.Module) -> tuple[Any, Program]:
    constants, bodies = store.Namespace(), {}
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = getattr(module, name, None)
        if isinstance(value, GraphModule):
            bodies[name] = value
        elif name.startswith(store.CONSTANTS + "."):
            store.put(constants, name.removeprefix(store.CONSTANTS + "."), store.get(module, name), persistent=False)
    bound = store.bind(module.graph, root, constants, bodies)
    program = Program(bound, root, call, result, {}, constants, bodies, _example(module))
    decoded = _decode(key)
    program.training = bool(decoded[3])
    return decoded, program


def _example(module: GraphModule) -> tuple[Tensor, ...]:
    """Inputs of the shapes the program was captured with: ones, which are valid ids, masks and pixels alike.

    They take no memory whatever sizes a file claims: one element, expanded.
    """
    values = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    return tuple(torch.ones((), dtype=v.dtype).expand([_hint(s) for s in v.shape]) for v in values)


def _hint(size: int | torch.SymInt) -> int:
    """The size it was captured with. int() would do too, but fix the symbol to it for ever."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _encode(key: Any) -> Any:
    """A program key as JSON: tuples as lists, dtypes by name."""
    if isinstance(key, tuple):
        return [_encode(k) for k in key]
    return {"dtype": str(key).removeprefix("torch.")} if isinstance(key, torch.dtype) else key


def _decode(key: Any) -> Any:
    if isinstance(key, list):
        return tuple(_decode(k) for k in key)
    if isinstance(key, dict):
        found = getattr(torch, str(key.get("dtype")), None)
        if not isinstance(found, torch.dtype):
            raise LoadError(f"program key names {key!r}, which is no dtype")
        return found
    return key


# -------------------------------------------------------------------------------------------------------- pickle


def pack(opt: Optimized) -> dict[str, Any]:
    """State for pickle: plain data and tensors; graphs in the stored format's JSON."""
    tensors = dict(store.tensors(opt))
    bases = opt._bases if opt._originals is not None else {}
    originals = opt.original_program().root if bases else None
    constants = {
        f"{store.CONSTANTS}.{name}": t
        for program in opt._programs.values()
        for name, t in store.tensors(program.constants)
    }
    return {
        "tensors": tensors,
        "constants": constants,
        "originals": opt._originals,
        "persistent": frozenset(
            n for n, t in tensors.items() if not isinstance(t, nn.Parameter) and store.is_persistent(opt, n)
        ),
        "programs": [(_program_to_json(k, p), p.example, p.notes, p.aliases) for k, p in opt._programs.items()],
        "bases": [(_program_to_json(k, p.fork(originals)), p.example, p.notes, p.aliases) for k, p in bases.items()],
        "first": opt._first,
        "plan": opt.plan,
        "report": opt.report,
        "target": opt.target,
        "original_bytes": opt.original_bytes,
        "skeleton": opt._skeleton,
        "classes": tuple({c for p in opt._programs.values() for c in classes_of(p.result).values()}),
        "names": opt._names,
        "optional": opt._optional,
        "training": opt.training,
    }


def unpack(opt: Optimized, state: Mapping[str, Any]) -> None:
    """Inverse of :func:`pack`, into a bare ``opt``."""
    nn.Module.__init__(opt)
    for cls in state["classes"]:
        register_result_class(cls)
    _fill(opt, state["tensors"], state["persistent"])
    opt.__dict__.update(
        plan=state["plan"],
        report=state["report"],
        target=state["target"],
        original_bytes=state["original_bytes"],
        _skeleton=state["skeleton"],
        _originals=state["originals"],
        _names=state["names"],
        _optional=state["optional"],
        _lock=threading.RLock(),
        _lowered={},
        _first=state["first"],
    )
    nn.Module.train(opt, state["training"])
    held = {**(state["originals"] or {}), **state["tensors"], **state["constants"]}
    for kind in ("programs", "bases"):
        found = {}
        for data, example, notes, aliases in state[kind]:
            module = graph_from_json(data["graph"], held.__getitem__)
            key, program = _program_from(data["key"], data["call"], data["result"], module, opt)
            program.example, program.notes, program.aliases = example, notes, aliases
            found[key] = program
        opt.__dict__[f"_{kind}"] = found
    for key in opt._programs:
        opt._lower(key)
    opt._refresh()
