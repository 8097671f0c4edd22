# SPDX-License-Identifier: Apache-2.0
"""The parameter store: a tree of nameless modules that hold tensors under their dotted names, and nothing else.

Several programs compute on one store. Every program's graph module hangs the store's *own* namespaces below its
root, so that ``.half()``, ``.to(device)``, ``load_state_dict`` and optimiser steps on the store reach all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from rewriter.flatcode import FlatCode, FlatModule

CONSTANTS = "_constants"  # namespace of the tensors a program lifted out of the model's code; one per program

# Decorates what makes tensors that stay: made in inference mode they could never be trained.
outside_inference_mode = torch.inference_mode(False)


class Namespace(nn.Module):
    """Tensors below one module path."""

    def extra_repr(self) -> str:
        own = [*self._parameters.items(), *self._buffers.items()]
        return ", ".join(f"{name}: {tuple(t.shape)} {str(t.dtype)[6:]}" for name, t in own if t is not None)


def put(root: nn.Module, name: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Store ``tensor`` under the dotted ``name``: a Parameter as parameter, anything else as buffer."""
    path, _, leaf = name.rpartition(".")
    module = root
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module._modules[part] = Namespace()
        module = module._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        module._buffers.pop(leaf, None)
        module._parameters[leaf] = tensor
        return
    module._parameters.pop(leaf, None)
    module._buffers[leaf] = tensor
    (module._non_persistent_buffers_set.discard if persistent else module._non_persistent_buffers_set.add)(leaf)


def get(root: nn.Module, name: str) -> Tensor:
    """The tensor under ``name``.

    Raises:
        KeyError: there is none.
    """
    path, _, leaf = name.rpartition(".")
    module: nn.Module | None = root
    for part in path.split(".") if path else ():
        module = module._modules.get(part) if module is not None else None
    if module is not None:
        for held in (module._parameters, module._buffers):
            if (tensor := held.get(leaf)) is not None:
                return tensor
    raise KeyError(name)


def has(root: nn.Module, name: str) -> bool:
    try:
        get(root, name)
    except KeyError:
        return False
    return True


def remove(root: nn.Module, name: str) -> None:
    """Forget the tensor under ``name`` and the namespaces that became empty."""
    parts = name.split(".")
    chain = [root]
    for part in parts[:-1]:
        chain.append(chain[-1]._modules[part])  # type: ignore[arg-type]
    chain[-1]._parameters.pop(parts[-1], None)
    chain[-1]._buffers.pop(parts[-1], None)
    chain[-1]._non_persistent_buffers_set.discard(parts[-1])
    for parent, part in reversed(list(zip(chain, parts[:-1], strict=False))):
        child = parent._modules[part]
        if child is not None and not (child._parameters or child._buffers or child._modules):
            del parent._modules[part]


def tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of the store, parameters and buffers, persistent or not."""
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)


def is_persistent(root: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf not in root.get_submodule(path)._non_persistent_buffers_set


def share(tensor: Tensor, *, parameter: bool | None = None) -> Tensor:
    """A tensor of one's own that shares memory with ``tensor`` until either is written (copy on write).

    Memory that torch did not allocate itself, as a file mapped by safetensors, cannot be shared so, and is copied.
    """
    own = _lazy_clone(tensor.detach())
    is_parameter = isinstance(tensor, nn.Parameter) if parameter is None else parameter
    return nn.Parameter(own, requires_grad=tensor.requires_grad) if is_parameter else own


def _lazy_clone(tensor: Tensor) -> Tensor:
    try:
        lazy: Tensor = torch._lazy_clone(tensor)
    except RuntimeError as error:
        if "storage != nullptr" not in str(error):
            raise
        return tensor.clone()
    return lazy


def shared(root: nn.Module) -> Namespace:
    """A store of one's own with the tensors of ``root``, shared until either is written; ties stay ties."""
    copied = Namespace()
    held: dict[int, Tensor] = {}
    for name, tensor in tensors(root):
        put(copied, name, held.setdefault(id(tensor), share(tensor)), persistent=is_persistent(root, name))
    copied.train(root.training)
    return copied


def bind(
    graph: Graph, root: nn.Module, constants: Namespace, bodies: dict[str, GraphModule], *, compile: bool = True
) -> GraphModule:
    """A graph module that computes ``graph`` on the tensors of ``root``, which stay the root's.

    Without ``compile`` it can be searched and edited, not called: compiling takes as long as everything else together.
    """
    module = FlatModule(nn.Module(), Graph())
    module.__dict__["_parameters"] = root._parameters
    module.__dict__["_buffers"] = root._buffers
    for name, child in root._modules.items():
        module._modules[name] = child
    module._modules[CONSTANTS] = constants
    module._modules.update(bodies)
    graph.set_codegen(FlatCode())
    if compile:
        module.graph = graph
    else:
        module._graph = graph
        graph.owning_module = module
    return module
