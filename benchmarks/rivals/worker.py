# SPDX-License-Identifier: Apache-2.0
"""A process per side: it holds the graph, runs one task when told to, and can be stopped where it takes too long.

Reported times are processor time, so that other work on the machine does not count; wall time is kept beside it. The
garbage collector is off while a task runs. Recompiling (`GraphModule.recompile`) is timed apart, whoever calls it.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing as mp
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import psutil

SIDES = {  # name -> module and class; modules are imported in the side's own process only
    "rewriter": ("rivals.ours", "Ours"),
    "torch.fx": ("rivals.torch_fx", "TorchFx"),
    "Inductor": ("rivals.inductor", "Inductor"),
    "Inductor, replace_by_example": ("rivals.inductor", "InductorExample"),
    "Inductor, register_replacement": ("rivals.inductor", "InductorReplacement"),
    "onnxscript": ("rivals.onnx_rewriter", "OnnxScript"),
}


@dataclass(frozen=True)
class Sample:
    """One run: processor and wall seconds, those of recompiling among them, and what the task returned."""

    seconds: float
    wall: float
    recompiling: float
    result: Any


class Stopped(Exception):
    """A task took longer than it may."""


class Worker:
    """The parent's end of one side."""

    def __init__(self, side: str) -> None:
        self.side = side
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(self.side, there), daemon=True)
        self._process.start()

    def ask(self, task: str, *args: Any, limit: float | None = None) -> Sample:
        """Run a method of the side.

        Raises:
            Stopped: it took more than ``limit`` seconds of processor time; the process is then a fresh one.
        """
        start = self._spent()
        self._here.send((task, args))
        while not self._here.poll(0.2):
            if limit is not None and self._spent() - start > limit:
                self.close()
                self._start()
                raise Stopped(f"{self.side}: {task} took more than {limit:g} s")
        answer = self._here.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.side}: {task} failed\n{answer}")
        sample: Sample = answer
        return sample

    def _spent(self) -> float:
        used = psutil.Process(self._process.pid).cpu_times()
        return float(used.user + used.system)

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(side: str, pipe: Connection) -> None:
    import torch
    from torch.fx import GraphModule

    from rewriter.flatcode import FlatModule

    torch.set_num_threads(1)
    spent, depth = 0.0, 0

    def timed(recompile: Callable[[GraphModule], Any]) -> Callable[[GraphModule], Any]:
        def call(self: GraphModule) -> Any:
            nonlocal spent, depth
            depth += 1
            start = time.process_time()
            try:
                return recompile(self)
            finally:
                depth -= 1
                spent += 0.0 if depth else time.process_time() - start

        return call

    for kind in (GraphModule, FlatModule):
        kind.recompile = timed(kind.recompile)  # type: ignore[method-assign]
    module, name = SIDES[side]
    one = getattr(importlib.import_module(module), name)()
    while True:
        task, args = pipe.recv()
        try:
            spent = 0.0
            gc.collect()
            gc.disable()
            wall, start = time.perf_counter(), time.process_time()
            result = getattr(one, task)(*args)
            seconds, wall = time.process_time() - start, time.perf_counter() - wall
            gc.enable()
            pipe.send(Sample(seconds, wall, spent, result))
        except Exception:
            pipe.send(traceback.format_exc())
