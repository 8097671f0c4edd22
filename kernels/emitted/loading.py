# SPDX-License-Identifier: Apache-2.0
"""Emitted files as operators: a file is loaded, checked against its hash, and registered with torch.

The operator of a file is ``torch.ops.rewriter.emitted_<site>_<hash>``. It runs the file's kernel on a GPU, and the file's
reference, which is the replaced nodes in aten, everywhere else: on the CPU, under autocast, as its fake, and for its
gradients. Nothing here needs the generator.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from rewriter.kernels.launching import Unsupported
from rewriter.kernels.spec import NAMESPACE

_log = logging.getLogger("rewriter")
_lock = threading.Lock()
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
MARK = "# content: "  # the line that carries the hash of all other lines


@dataclass(frozen=True)
class Emitted:
    """A loaded file.

    Attributes:
        path: the file.
        module: its ``SCHEMA``, ``reference``, ``run`` and ``KERNELS``.
        operator: registered with torch.
        on_device: what the operator runs on a GPU: the kernel, or the reference for what it was not made for.
    """

    path: Path
    module: ModuleType
    operator: OpOverload
    on_device: Callable[..., Tensor]


# By operator, every file loaded in this process.
LOADED: dict[OpOverload, Emitted] = {}


def digest(text: str) -> str:
    """Hash of a file's content, the line that carries the hash left out."""
    lines = [line for line in text.splitlines() if not line.startswith(MARK)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def load(path: Path) -> Emitted:
    """The operator of an emitted file; registered at the first call in a process.

    Raises:
        ValueError: the file is not what was emitted: its content does not have the hash it carries.
        OSError: it cannot be read.
    """
    text = path.read_text()
    content = digest(text)
    if f"{MARK}{content}" not in text.splitlines():
        raise ValueError(f"{path} was changed after it was emitted, or is none; delete it, and it is emitted again")
    name = f"emitted_{path.stem}"
    with _lock:
        known = getattr(getattr(torch.ops, NAMESPACE), name, None)
        if known is not None:
            return replace(LOADED[known.default], path=path)  # the same content in another folder
        emitted = _register(path, _module(path), name)
        LOADED[emitted.operator] = emitted
    return emitted


def _module(path: Path) -> ModuleType:
    """Imported under a name of its own: Triton looks kernels' globals up in their module."""
    name = f"rewriter_emitted_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _register(path: Path, module: ModuleType, name: str) -> Emitted:
    def reference(*args: Any) -> Tensor:
        return module.reference(*args).contiguous()

    def on_device(*args: Any) -> Tensor:
        try:
            return module.run(*args)
        except Unsupported as reason:
            _log.debug("%s runs its reference: %s", name, reason)
            return reference(*args)

    op = torch.library.custom_op(f"{NAMESPACE}::{name}", reference, mutates_args=(), schema=module.SCHEMA)
    op.register_fake(reference)
    op.register_kernel("cuda")(on_device)
    op.register_autograd(_gradient(reference), setup_context=_save)
    op.register_vmap(_one_by_one(op))
    overload: OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    for device in ("CPU", "CUDA"):  # every replaced node under autocast's own rule
        _LIBRARY.impl(name, reference, f"Autocast{device}")
    return Emitted(path, module, overload, on_device)


def _one_by_one(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """A batching rule by a loop: shapes inside a file are those of its site, without another dimension."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        def at(i: int) -> list[Any]:
            return [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]

        return torch.stack([op(*at(i)) for i in range(info.batch_size)]), 0

    return rule


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))


def _gradient(reference: Callable[..., Tensor]) -> Callable[..., Any]:
    """The reference run again, and differentiated: nothing but the inputs is kept from the forward pass."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args = list(ctx.others)
        for i, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            args[i] = tensor
        wanted = [i for i in ctx.tensors if ctx.needs_input_grad[i]]
        again = torch.is_grad_enabled()  # a second derivative is asked for
        with torch.enable_grad():
            for i in wanted:
                args[i] = args[i] if again else args[i].detach().requires_grad_()
            results = torch.autograd.grad(
                reference(*args), [args[i] for i in wanted], grad, create_graph=again, allow_unused=True
            )
        found = dict(zip(wanted, results, strict=True))
        return tuple(found.get(i) for i in range(len(args)))

    return backward
