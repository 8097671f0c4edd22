# SPDX-License-Identifier: Apache-2.0
"""Which code runs at each rewritten site of a program, and why: for this processor, or for a GPU that is not here.

A program is run once on its example to see the arguments of every operator of ours. For a GPU the device implementation
is then called with tensors that have no data: it either says what it does not do, or asks for kernels, which are compiled
ahead of time. On the CPU the implementation is called and timed.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from rewriter.codegen import roofline
from rewriter.errors import PlanError
from rewriter.facts import path_of
from rewriter.kernels.launching import Request, Unsupported, recorded
from rewriter.kernels.spec import REGISTRY, KernelSpec
from rewriter.program import Program
from rewriter.rules import provenance

RUNS = 5  # timed calls per site, of which the fastest counts


@dataclass(frozen=True)
class Kernel:
    """A kernel of a site, compiled: what one of its programs takes."""

    name: str
    registers: int
    spills: int
    shared: int


@dataclass(frozen=True)
class Implementation:
    """What runs at a site.

    Attributes:
        site: path of the module it stands for.
        rule: what put it there; empty if the program came with it.
        operator: without namespace.
        target: "cpu", or a GPU of `ahead_of_time.TARGETS`.
        chosen: "Triton", "native" or "reference".
        why: the reason why it is the reference; empty otherwise.
        source: file of the code.
        kernels: what a GPU would start.
        bound: least seconds for the work at the device's peaks; on the CPU at the speed of memory.
        bound_by: "memory" or "compute".
        seconds: measured; None for a GPU that is not here.
    """

    site: str
    rule: str
    operator: str
    target: str
    chosen: str
    why: str
    source: str
    kernels: tuple[Kernel, ...]
    bound: float
    bound_by: str
    seconds: float | None

    @property
    def share(self) -> float | None:
        """Of the roofline: the bound over the measured time."""
        return None if not self.seconds else self.bound / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


def implementations(program: Program, target: str) -> list[Implementation]:
    """What would run at every site of a program on ``target``.

    Args:
        program: with its example.
        target: "cpu", or one of `ahead_of_time.TARGETS`.

    Raises:
        PlanError: no such target.
    """
    if target != "cpu" and target not in roofline.CHIPS:
        known = ", ".join(("cpu", *roofline.CHIPS))
        raise PlanError(f"kernels are made for {known}, not for {target!r}")
    return [
        _on_cpu(node, spec, args) if target == "cpu" else _on_gpu(node, spec, args, target)
        for node, spec, args in _calls(program)
    ]


def fallbacks(program: Program, device: str) -> list[str]:
    """Why sites would run their reference on a device, "cpu" or "cuda"; nothing is compiled for GPUs or timed."""
    found = []
    for node, spec, args in _calls(program):
        try:
            _call(spec, args, device)
        except Unsupported as reason:
            found.append(f"{_site(node) or 'root'}: {spec.name}: {reason}")
    return found


class _Recording(fx.Interpreter):
    """Runs a program and keeps the arguments of our operators."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.calls: list[tuple[fx.Node, KernelSpec, tuple[Any, ...]]] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target in REGISTRY:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            schema = n.target._schema.arguments
            named = {a.name: value for a, value in zip(schema, args, strict=False)} | dict(kwargs)
            full = tuple(named.get(a.name, a.default_value) for a in schema)
            self.calls.append((n, REGISTRY[n.target], full))
        return super().run_node(n)


def _calls(program: Program) -> list[tuple[fx.Node, KernelSpec, tuple[Any, ...]]]:
    running = _Recording(program.graph_module)
    with torch.no_grad():
        running.run(*(x.clone() if isinstance(x, Tensor) else x for x in program.example))
    return running.calls


def _call(spec: KernelSpec, args: tuple[Any, ...], device: str) -> tuple[Callable[..., Any], list[Request]]:
    """The implementation, and the kernels it asks for. Raises Unsupported where it would leave this to the reference."""
    function = spec.implementation(device)
    given = args if device == "cpu" else pytree.tree_map_only(Tensor, lambda t: t.to("meta"), args)
    with recorded() as requests, torch.no_grad():
        function(*given)
    return function, requests


def _on_gpu(node: fx.Node, spec: KernelSpec, args: tuple[Any, ...], target: str) -> Implementation:
    from rewriter.codegen import ahead_of_time

    chip = roofline.CHIPS[target]
    bound = roofline.bound(spec.cost(*args), chip.bandwidth, chip.flops)
    try:
        function, requests = _call(spec, args, "cuda")
    except Unsupported as reason:
        return _reference(node, spec, target, str(reason), bound, None)
    backend = ahead_of_time.TARGETS[target].gpu.backend
    compiled = [ahead_of_time.compile(r.start(r.choices(backend)[0]), target) for r in requests]
    kernels = tuple(Kernel(c.kernel, c.registers, c.spills, c.shared) for c in compiled)
    where = [*dict.fromkeys(_file(request.kernel.fn) for request in requests)] or [_file(function)]
    return _implementation(node, spec, target, "Triton", "", ", ".join(where), kernels, bound, None)


def _on_cpu(node: fx.Node, spec: KernelSpec, args: tuple[Any, ...]) -> Implementation:
    bound = roofline.bound(spec.cost(*args), _bandwidth(), float("inf"))
    try:
        function, _ = _call(spec, args, "cpu")
    except Unsupported as reason:
        return _reference(node, spec, "cpu", str(reason), bound, _seconds(spec.reference, args))
    return _implementation(node, spec, "cpu", "native", "", _file(function), (), bound, _seconds(function, args))


def _reference(
    node: fx.Node, spec: KernelSpec, target: str, why: str, bound: roofline.Bound, seconds: float | None
) -> Implementation:
    return _implementation(node, spec, target, "reference", why, _file(spec.reference), (), bound, seconds)


def _implementation(
    node: fx.Node,
    spec: KernelSpec,
    target: str,
    chosen: str,
    why: str,
    source: str,
    kernels: tuple[Kernel, ...],
    bound: roofline.Bound,
    seconds: float | None,
) -> Implementation:
    rule = str(provenance(node).get("rule", ""))
    return Implementation(
        _site(node), rule, spec.name, target, chosen, why, source, kernels, bound.seconds, bound.by, seconds
    )


def _site(node: fx.Node) -> str:
    return str(provenance(node).get("site") or path_of(node)).partition(":")[0]


def _seconds(function: Any, args: tuple[Any, ...]) -> float:
    with torch.no_grad():
        return min(_timed(function, args) for _ in range(RUNS))


def _timed(function: Any, args: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def _bandwidth() -> float:
    """Bytes per second of reading 64 MiB, the best of three."""
    data = torch.ones(1 << 24)
    return data.numel() * 4 / min(_timed(data.sum, ()) for _ in range(3))


def _file(function: Any) -> str:
    """Where code stands, from the package on."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    path = Path(inspect.getsourcefile(inspect.unwrap(function)) or "?")
    return "/".join(path.parts[-2:])
