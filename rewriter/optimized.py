# SPDX-License-Identifier: Apache-2.0
"""`Optimized`: used in place of the model — one parameter store and a program for each way it is called."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rewriter import inputs, store
from rewriter.applying import replay
from rewriter.capturing import capture_skeleton
from rewriter.errors import CaptureError, PlanError
from rewriter.program import Program
from rewriter.recasting import recast
from rewriter.skeleton import Skeleton
from rewriter.structure import call_text, flatten, key, rebuild

if TYPE_CHECKING:
    from rewriter.codegen.lowering import Lowered
    from rewriter.planner import Plan
    from rewriter.reports import Report

Key = tuple[Any, ...]
TARGETS = (None, "cpu", "cuda", "hip")


def known_target(target: Any) -> str | None:
    """``target``, if it is one a model can be lowered for. Raises PlanError."""
    if target not in TARGETS:
        raise PlanError(f"target must be one of {', '.join(map(repr, TARGETS))}, not {target!r}")
    return cast(str | None, target)


class Optimized(nn.Module):
    """The rewritten model.

    Its parameters and buffers are the store; a call looks up the program for its signature (structure of the
    arguments, training mode, dtypes, device), captures it from the model's skeleton on first need, and replays the same
    plan onto the same parameters. Outputs have the model's own type.

    Attributes:
        plan: the decisions (:class:`rewriter.Plan`).
        report: what was done, and what it costs.
        program: the rewritten program of the example call.
        lowered: the same as it runs: on a GPU with kernels emitted for its sites.
        target: where it is to run: "cpu", "cuda" or "hip"; None: where its parameters are.
    """

    plan: Plan
    report: Report | None
    target: str | None

    def __init__(
        self,
        base: Program,
        plan: Plan,
        *,
        skeleton: Skeleton | None,
        originals: dict[str, Tensor] | None,
        names: tuple[str, ...] = (),
        optional: frozenset[str] = frozenset(),
        original_bytes: int = 0,
        target: str | None = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.report = None
        self.target = target
        self.original_bytes = original_bytes
        self._skeleton = skeleton
        self._originals = originals
        self._names = names
        self._optional = optional
        self._programs: dict[Key, Program] = {}
        self._lowered: dict[Key, Lowered] = {}
        self._bases: dict[Key, Program] = {}
        self._lock = threading.RLock()
        self._adopt(base.root)
        self.training = base.training
        self._refresh()
        self._first = self._add(base)

    # ------------------------------------------------------------------------------------------------ calling

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = inputs.by_name(self._names, self._optional, args, kwargs)
        flat: list[Tensor] = []
        template = flatten((args, kwargs), flat)
        lowered = self._lowered.get(self._key(template, flat))
        program = self._capture(args, kwargs, template, flat) if lowered is None else lowered.program
        return rebuild(program.result, program.graph_module(*flat))

    def _key(self, template: dict[str, Any], flat: list[Tensor]) -> Key:
        kinds = tuple([(t.dtype, t.dim()) for t in flat])
        return (key(template), kinds, inputs.broadcast(flat), self.training, self._state)

    @store.outside_inference_mode
    def _capture(self, args: Any, kwargs: Mapping[str, Any], template: dict[str, Any], flat: list[Tensor]) -> Program:
        if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
            raise CaptureError("a key/value cache cannot leave a captured graph; call opt.to_module(), which caches")
        with self._lock:
            known = self._key(template, flat)
            if known not in self._lowered:
                if self._skeleton is None:
                    known = self._add(self._recast(template, flat))
                else:
                    known = self._add(capture_skeleton(self._skeleton, self, args, kwargs))
            return self._lowered[known].program

    def _recast(self, template: dict[str, Any], flat: list[Tensor]) -> Program:
        """With no model to capture from: the same call of an ExportedProgram in other dtypes. Raises CaptureError."""

        def spelling(call: dict[str, Any], tensors: Sequence[Tensor], training: bool) -> Key:
            return (key(call), tuple(t.dim() for t in tensors), inputs.broadcast(tensors), training)

        for base in self._bases.values():
            if spelling(base.call, base.example, base.training) == spelling(template, flat, self.training):
                return recast(base.fork(self._with_originals()), flat)
        known = "; ".join(sorted({f"{call_text(p.call)} training={p.training}" for p in self._programs.values()}))
        dtypes = ", ".join(str(t.dtype) for t in flat)
        raise CaptureError(
            f"no program for the call {call_text(template)} (training={self.training}, {dtypes}) and no model to capture "
            f"it from; this one knows: {known}. Load with rewriter.load(path, model=…) or optimise the nn.Module"
        )

    def _add(self, base: Program) -> Key:
        """Register a captured program and its rewriting under the present state."""
        new = self._key(base.call, list(base.example))
        rewritten = replay(base.fork(self, compile=False), self.plan)
        self._bases[new] = base
        self._programs[new] = rewritten
        self._lower(new)
        return new

    def _lower(self, known: Key) -> None:
        """Make what runs of a rewritten program. Raises PlanError."""
        from rewriter.codegen.lowering import lower

        device = self.target or next((tensor.device.type for _, tensor in store.tensors(self)), "cpu")
        self._lowered[known] = lower(self._programs[known], device)

    # -------------------------------------------------------------------------------------------- module state

    def _adopt(self, root: nn.Module) -> None:
        """Become the root of the store."""
        self._parameters.update(root._parameters)
        self._buffers.update(root._buffers)
        self._non_persistent_buffers_set |= root._non_persistent_buffers_set
        self._modules.update(root._modules)

    def _refresh(self) -> None:
        """Recompute the part of every key that depends on dtypes and devices."""
        held = self._skeleton.module if self._skeleton is not None else self
        kinds = {(p.dtype, p.device) for _, p in held.named_parameters()}
        self._state = tuple(sorted((str(dtype), str(device)) for dtype, device in kinds))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Optimized:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._skeleton is not None:
            self._skeleton.module._apply(fn)
        self._refresh()
        return self

    def train(self, mode: bool = True) -> Optimized:
        """Training or evaluation mode; programs with real dropout and batch statistics are captured on first call.

        Raises:
            CaptureError: there is no module to capture a training program from.
        """
        if "_skeleton" in self.__dict__:
            if self._skeleton is not None:
                self._skeleton.module.train(mode)
            elif mode != self.training and not any(p.training == mode for p in self._programs.values()):
                raise CaptureError(
                    "this model was captured from an ExportedProgram or a file and has no other mode; optimise the nn.Module"
                )
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            skeleton = self.__dict__.get("_skeleton")
            if skeleton is None or name.startswith("__") or not hasattr(skeleton.module, name):
                raise
        value = getattr(skeleton.module, name)
        if callable(value) and getattr(value, "__self__", None) is skeleton.module:
            raise AttributeError(
                f"{name} is a method of {type(skeleton.module).__name__} and would run on the original's code; "
                f"use opt.to_module().{name}(…)"
            )
        return value

    def extra_repr(self) -> str:
        return f"{len(self.plan.sites)} rewritten sites, {len(self._programs)} programs"

    # ------------------------------------------------------------------------------------------------- copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Optimized:
        return self._replicate(lambda tensor: copy.deepcopy(tensor, memo), memo)

    def _replicate(self, duplicate: Callable[[Tensor], Tensor], memo: dict[int, Any] | None = None) -> Optimized:
        """Another Optimized with its own store and the same programs."""
        other = Optimized.__new__(Optimized)
        nn.Module.__init__(other)
        if memo is not None:
            memo[id(self)] = other
        own: dict[int, Tensor] = {}
        for name, tensor in store.tensors(self):
            if id(tensor) not in own:
                own[id(tensor)] = duplicate(tensor)
            store.put(other, name, own[id(tensor)], persistent=store.is_persistent(self, name))
        other.__dict__.update(
            plan=self.plan,
            report=self.report,
            target=self.target,
            original_bytes=self.original_bytes,
            _skeleton=copy.deepcopy(self._skeleton),
            _originals=None if self._originals is None else dict(self._originals),
            _names=self._names,
            _optional=self._optional,
            _lock=threading.RLock(),
            _state=self._state,
            _first=self._first,
        )
        nn.Module.train(other, self.training)
        with self._lock:
            other._bases = {k: p.fork(other) for k, p in self._bases.items()}
            other._programs = {k: p.fork(other) for k, p in self._programs.items()}
            other._lowered = {k: low.moved(other._programs[k], other) for k, low in self._lowered.items()}
        return other

    def __getstate__(self) -> dict[str, Any]:
        from rewriter.saving import pack  # saving knows the file format, and Optimized

        return pack(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        from rewriter.saving import unpack

        unpack(self, state)

    # ------------------------------------------------------------------------------------------------ results

    @property
    def program(self) -> Program:
        return self._programs[self._first]

    @property
    def lowered(self) -> Lowered:
        return self._lowered[self._first]

    @property
    def original(self) -> Program:
        """The program of the example call before any rewrite (its tensors: see ``keep_original``). Raises PlanError."""
        if self._first not in self._bases:
            raise PlanError("a loaded model has no original program; compare before saving, or optimise again")
        return self._bases[self._first]

    def original_program(self) -> Program:
        """The program of the example call with the original tensors, to run or compare. Raises PlanError."""
        self.originals()
        return self.original.fork(self._with_originals())

    def _with_originals(self) -> nn.Module:
        """The present tensors and those that rewrites replaced, as far as they were kept."""
        merged = store.Namespace()
        for name, tensor in [*store.tensors(self), *self.present_originals().items()]:
            store.put(merged, name, tensor)
        merged.train(self.training)
        return merged

    def present_originals(self) -> dict[str, Tensor]:
        """The replaced tensors that were kept, in the present dtype and on the present device."""
        like = next((p for p in self.parameters() if p.is_floating_point()), None)
        moved = {}
        for name, tensor in (self._originals or {}).items():
            here = tensor if like is None or not tensor.is_floating_point() else tensor.to(like.device, like.dtype)
            own = store.share(here, parameter=isinstance(tensor, nn.Parameter))
            moved[name] = own.requires_grad_(tensor.requires_grad)
        return moved

    def present_base(self) -> Program:
        """The unrewritten program of the example call in the present mode, dtype and device."""
        for key_, base in self._bases.items():
            if key_[-2:] == (self.training, self._state):
                return base
        first = self.original
        held = self if self._skeleton is None else self._skeleton.module
        dtype = next((p.dtype for p in held.parameters() if p.is_floating_point()), torch.float32)
        example = [t.to(dtype) if t.is_floating_point() else t for t in first.example]
        if self._skeleton is None:
            return self._recast(first.call, example)
        args, kwargs = rebuild(first.call, example)
        return capture_skeleton(self._skeleton, self, args, kwargs)

    def originals(self) -> dict[str, Tensor]:
        """Tensors that rewrites replaced. Raises PlanError where they were freed (``keep_original=False``)."""
        if self._originals is None:
            raise PlanError(
                "the original tensors were freed (keep_original=False); optimise the model again to undo or compare"
            )
        return self._originals

    def diff(self) -> Any:
        """The original and the rewritten program side by side (a rich renderable with ``.to_json()``)."""
        from rewriter.diffing import Diff

        return Diff.between(self.original, self.program)

    def undo(self, site_or_rule: str, *, cascade: bool = False) -> Optimized:
        """A new Optimized without the sites of one rule, pass or address; see :func:`rewriter.undoing.undo`."""
        from rewriter.undoing import undo

        return undo(self, site_or_rule, cascade=cascade)

    def to_module(self) -> nn.Module:
        """The user's own class with rewritten sites as modules; see :func:`rewriter.restoring.to_module`."""
        from rewriter.restoring import to_module

        return to_module(self)

    def save(self, path: str | Path) -> None:
        """Write a directory of safetensors and JSON; see docs/format.md. Raises ExportError."""
        from rewriter.saving import save

        save(self, Path(path))

    def export_onnx(self, path: str | Path, opset: int = 24, *, contrib: bool = False) -> Any:
        """Write ONNX that plain ONNX Runtime runs; see :func:`rewriter.export_onnx`."""
        from rewriter.exporting import export_onnx

        return export_onnx(self, path, opset=opset, contrib=contrib)

    def export_mlir(self, path: str | Path, dialect: str = "torch", *, static: bool = False) -> Any:
        """Write MLIR by torch-mlir (extra ``mlir``); see :func:`rewriter.export_mlir`."""
        from rewriter.exporting import export_mlir

        return export_mlir(self, path, dialect, static=static)

    def export_pt2(self, path: str | Path) -> None:
        """Write a ``.pt2`` archive for others. Reading one is trusting its author (it unpickles)."""
        from rewriter.exporting import export_pt2

        export_pt2(self, path)
