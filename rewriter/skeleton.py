# SPDX-License-Identifier: Apache-2.0
"""The skeleton of a model: the user's module tree with every tensor replaced by an empty one of its dtype and device.

It costs no memory, follows ``.half()`` and ``.to(device)`` like the model would, and can be captured again at any
time: export looks at shapes, never at the values of parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rewriter.errors import CaptureError

# Wrappers that only forward to a module inside: (class name, attribute that holds it).
_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
_REFUSED = {
    "FullyShardedDataParallel": "gather its parameters first (FullyShardedDataParallel.summon_full_params) and pass the inner module",
    "ScriptModule": "pass the eager module it was scripted from",
    "RecursiveScriptModule": "pass the eager module it was scripted from",
}


def unwrap(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The module that computes, below wrappers that only forward to it, and a note on each wrapper removed.

    Raises:
        CaptureError: a wrapper that changes what the module computes or holds.
    """
    notes: list[str] = []
    while True:
        kind = type(model).__name__
        if kind in _REFUSED:
            raise CaptureError(f"a {kind} cannot be captured: {_REFUSED[kind]}")
        if kind not in _WRAPPERS:
            return model, tuple(notes)
        notes.append(f"unwrapped {kind}")
        model = getattr(model, _WRAPPERS[kind])


def check(model: nn.Module) -> tuple[str, ...]:
    """Refuse models whose tensors or hooks a captured graph cannot stand for; return notes on what is baked in.

    Raises:
        CaptureError: names the module or tensor, and what to do.
    """
    for name, tensor in named_tensors(model):
        _check_tensor(name, tensor)
    notes = []
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(
                f"module {path or 'model'!r} has backward hooks, which a captured graph loses; remove them first"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            notes.append(f"forward hooks of {path or 'the model'!r} are part of the captured graph")
    return tuple(notes)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise CaptureError(f"{name!r} is not initialised (lazy module); run the model once first")
    if tensor.is_meta:
        raise CaptureError(f"{name!r} is on the meta device and has no values; load the checkpoint first")
    inner = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if is_traceable_wrapper_subclass(inner) or type(inner) is not Tensor:
        raise CaptureError(
            f"{name!r} is a {type(inner).__name__} (sharded, quantised or another tensor subclass); "
            "gather or dequantise it to a plain tensor first"
        )
    if tensor.layout is not torch.strided:
        raise CaptureError(f"{name!r} has layout {tensor.layout}; convert it with .to_dense() first")


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter and buffer, tied ones under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class Skeleton:
    """A model without its tensors.

    Attributes:
        module: the tree; its parameters and buffers have no elements but the right dtype and device.
        names: canonical name -> all names (ties).
        caching: paths of modules whose configuration asked for a key/value cache, which is off here: a cache object
            cannot leave a captured graph. One path per configuration; parts of a model may have their own.
    """

    def __init__(self, model: nn.Module) -> None:
        first: dict[int, str] = {}
        names: dict[str, list[str]] = {}
        self.sizes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        stubs: dict[int, Any] = {}
        for name, tensor in named_tensors(model):
            canonical = first.setdefault(id(tensor), name)
            names.setdefault(canonical, []).append(name)
            if canonical == name:
                self.sizes[name] = (tuple(tensor.shape), tuple(tensor.stride()))
                stubs[id(tensor)] = _like(tensor, torch.empty(0, dtype=tensor.dtype, device=tensor.device))
        self.names = {canonical: tuple(all_names) for canonical, all_names in names.items()}
        self.module = _copy(model, stubs)
        self.module.zero_grad()
        self.caching = tuple(_switch_caches_off(self.module))

    def materialise(self, values: Callable[[str], Tensor | None], *, parameters: bool = False) -> nn.Module:
        """The module with tensors of full shape.

        Buffers are what ``values`` gives for their name, and so are parameters if asked for; tensors it does not give
        are uninitialised memory, which tracing never touches.
        """
        held = dict(named_tensors(self.module))
        full: dict[int, Any] = {}
        for name, (shape, stride) in self.sizes.items():
            stub = held[name]
            value = values(name) if parameters or not isinstance(stub, nn.Parameter) else None
            if value is None:
                value = torch.empty_strided(shape, stride, dtype=stub.dtype, device=stub.device)
            full[id(stub)] = value if isinstance(value, nn.Parameter) else _like(stub, value)
        return _copy(self.module, full)

    def copy(self) -> Skeleton:
        """Another skeleton of the same model, with its own modes, dtypes and device."""
        return copy.deepcopy(self)


def _switch_caches_off(model: nn.Module) -> Iterator[str]:
    """Switch ``config.use_cache`` off wherever it is on; the paths. (The caller's configurations are other objects.)"""
    for path, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False
            yield path


def _like(original: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=original.requires_grad) if isinstance(original, nn.Parameter) else value


def _copy(model: nn.Module, replacement: dict[int, Any]) -> nn.Module:
    """Deep copy of the module tree in which tensors are replaced, by identity, instead of copied."""
    try:
        return copy.deepcopy(model, dict(replacement))
    except Exception as error:
        raise CaptureError(
            f"the module tree of {type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "remove what cannot be (locks, open files, process groups) from its attributes"
        ) from error
