# SPDX-License-Identifier: Apache-2.0
"""`KernelSpec`: one declaration from which an operator gets everything torch asks of it.

The *reference* is plain aten and is the single source of truth: it is what runs where no faster kernel is
registered, what the operator decomposes into for Inductor, MLIR and ONNX, and what every kernel is tested against.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.launching import Unsupported

_log = logging.getLogger("rewriter")

NAMESPACE = "rewriter"


@dataclass(frozen=True)
class Cost:
    """What one call does: floating-point operations, bytes read and bytes written."""

    flops: int
    bytes_read: int
    bytes_written: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops, self.bytes_read + other.bytes_read, self.bytes_written + other.bytes_written
        )


def tensor_bytes(*tensors: Tensor | None) -> int:
    """Bytes the tensors that are there take as they are."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True)
class Recurrence:
    """How an operator over a sequence goes on from what earlier tokens left behind.

    Attributes:
        before: names of the arguments that take it; all None at the start of a sequence, or zeros.
        after: positions among the results of what the next call takes, in the same order.
        keep: name of the argument that says which new tokens are real and not padding; None where all are.
        switch: name of the bool argument that asks for those results; None where they always come.
    """

    before: tuple[str, ...]
    after: tuple[int, ...]
    keep: str = "keep"
    switch: str | None = None


@dataclass(frozen=True)
class KernelSpec:
    """Everything torch needs to know about one operator.

    Attributes:
        name: operator name; the operator is ``torch.ops.rewriter.<name>``. A schema never changes: a new one is
            ``<name>_v2``.
        schema: the torch schema without the name, e.g. ``"(Tensor x, Tensor codes, int group) -> Tensor"``.
        reference: plain aten; must return fresh tensors (no views of inputs). The dtype of every output is a
            function of the *activations'* dtypes only, the same in eager, fake and compiled execution.
        fake: shapes and dtypes without data.
        cost: work of one call, from the same arguments.
        setup_context: saves for backward (``ctx, inputs, output``).
        backward: gradient of the operator (``ctx, *grads``), one entry per input. None, like the two beside it, for
            an operator that is itself a gradient: it has no derivative and is not mapped.
        vmap: batching rule (``info, in_dims, *args``) -> (output, out_dims).
        autocast: names of the activation arguments that autocast casts to its dtype (as it does for ``linear``).
        implementations: faster code by device ("cpu"; "cuda", which is also HIP), as ``"module:function"`` with the
            reference's arguments and results. It is imported at the first call, and raises `Unsupported` for
            arguments it does not do: then the reference runs.
        decomposition: what compilers and exporters inline, tested equal to the reference. Needed only where the
            reference cannot be traced with dynamic sizes (a loop over chunks of the sequence); default: the reference.
        recurrence: how it goes on token by token; None where it does not.
        composite: what runs in place of all that, made of other registered operators, where what is computed depends on
            whether gradients are asked for: an operator itself runs below autograd and cannot see that. The spec's
            other entries then serve reports and exporters, and gradients are those of the parts.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    cost: Callable[..., Cost]
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    vmap: Callable[..., Any] | None = None
    autocast: tuple[str, ...] = ()
    implementations: Mapping[str, str] = field(default_factory=dict)
    decomposition: Callable[..., Any] | None = None
    recurrence: Recurrence | None = None
    composite: Callable[..., Any] | None = None

    def register(self) -> OpOverload:
        """Define the operator with torch (once per process) and return its overload."""
        if self.composite is None:
            self._define()
        else:
            _LIBRARY.define(self.name + self.schema, tags=torch.Tag.pt2_compliant_tag)
            # Batching has a key of its own, as it has for aten's composite operators.
            for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
                _LIBRARY.impl(self.name, self.composite, key)
        overload: OpOverload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        _register_autocast(overload, self.autocast)
        REGISTRY[overload] = self
        return overload

    def _define(self) -> None:
        op = torch.library.custom_op(f"{NAMESPACE}::{self.name}", self.reference, mutates_args=(), schema=self.schema)
        op.register_fake(self.fake)
        if self.backward is not None:
            op.register_autograd(self.backward, setup_context=self.setup_context)
        if self.vmap is not None:
            op.register_vmap(self.vmap)
        for device in self.implementations:
            op.register_kernel(device)(partial(self._run, device))

    def implementation(self, device: str) -> Callable[..., Any]:
        """The faster code for a device.

        Raises:
            Unsupported: there is none, or what it needs is not installed.
        """
        if device not in self.implementations:
            raise Unsupported(f"{self.name} has no implementation for {device}")
        return _function(self.implementations[device])

    def on(self, device: str) -> Callable[..., Any]:
        """What the operator runs on a device, without the dispatcher: no gradients, no autocast, no tracing."""
        return partial(self._run, device) if device in self.implementations else self.reference

    def _run(self, device: str, *args: Any) -> Any:
        try:
            return self.implementation(device)(*args)
        except Unsupported as reason:
            _log.debug("%s runs its reference on %s: %s", self.name, device, reason)
            return self.reference(*args)


@cache
def _function(address: str) -> Callable[..., Any]:
    """What ``"module:function"`` names."""
    module, _, name = address.partition(":")
    try:
        found: Callable[..., Any] = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("rewriter"):
            raise
        raise Unsupported(f"{error.name} is not installed") from error
    return found


# Every registered operator: the decomposition table, the cost model and the exporters read it.
REGISTRY: dict[OpOverload, KernelSpec] = {}

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """The project-wide decomposition table: operator -> plain aten, traceable with dynamic sizes."""
    return {op: spec.decomposition or spec.reference for op, spec in REGISTRY.items()}


def _register_autocast(op: OpOverload, names: tuple[str, ...]) -> None:
    """Under autocast cast the named activations to *its* dtype, then run below autocast.

    ``torch.library.register_autocast`` fixes one dtype at registration; autocast's own is chosen by the user.
    """
    positions = [i for i, argument in enumerate(op._schema.arguments) if argument.name in names]

    def rule(device: str) -> Callable[..., Any]:
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

        def cast_and_call(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = [_cast(a, dtype) if i in positions else a for i, a in enumerate(args)]
            named = {k: _cast(v, dtype) if k in names else v for k, v in kwargs.items()}
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return op(*cast, **named)

        return cast_and_call

    for device in ("cpu", "cuda"):
        _LIBRARY.impl(op.name().split("::")[1].removesuffix(".default"), rule(device), f"Autocast{device.upper()}")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    eligible = isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float64
    return value.to(dtype) if eligible else value
