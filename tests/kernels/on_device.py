# SPDX-License-Identifier: Apache-2.0
"""A device that is not there: operators called with CPU tensors run their GPU implementations, interpreted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from interpreter import interpreting
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.kernels.emitted.loading import LOADED
from rewriter.kernels.spec import REGISTRY


@contextmanager
def on_device(which: int = 0) -> Iterator[Counter[Any]]:
    """Inside, our operators and emitted ones run as they would on a GPU; counts how often each was called.

    Raises:
        Unsupported: inside, where an operator would run its reference instead.
    """
    mode = _Dispatching()
    with interpreting(which), mode:
        yield mode.calls


class _Dispatching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in LOADED and func not in REGISTRY:
            return func(*args, **kwargs)
        self.calls[func] += 1
        if func in LOADED:
            return LOADED[func].module.run(*args)
        given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        full = [given.get(a.name, a.default_value) for a in func._schema.arguments]
        return REGISTRY[func].implementation("cuda")(*full)
