# SPDX-License-Identifier: Apache-2.0
"""Calibration: one pass over data collects the moments, samples and counts that the chosen passes ask for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import Interpreter, Node

from rewriter import curvature, store
from rewriter.errors import LoadError, PlanError
from rewriter.files import atomic_file
from rewriter.program import Program
from rewriter.rules import Pass, locate

if TYPE_CHECKING:
    from rewriter.applying import Progress

FORMAT = 1
SAMPLE_ROWS = 16384

# What a rule can ask for at a node, and how one observed value adds to it.
#   second_moment  E[x xᵀ] over all rows of x [..., d]: float64 [d, d]
#   channel_moment  the same over all places of x [n, d, ...], channels second
#   gradient_moment  E[g gᵀ] of the gradient at x: what errors of x cost at the outputs (see `rewriter.curvature`)
#   sample         up to SAMPLE_ROWS rows of x, evenly thinned: [n, d]
#   counts         how often each integer value occurred: int64 [max + 1]
#   sequences      whole inputs of the batch, evenly thinned to SEQUENCE_TOKENS tokens: [n, ..., length, d] or [n, length]
# A rule that asks for several values at one site tells them apart after a colon: "sequences:q", "sequences:k".
KINDS = ("second_moment", "channel_moment", "gradient_moment", "sample", "counts", "sequences")
SEQUENCE_TOKENS = 32768
_OF_GRADIENT = frozenset({"gradient_moment"})  # these observe the gradient at a node, not its value


@dataclass
class _Moment:
    total: Tensor | None = None
    rows: int = 0

    def add(self, value: Tensor) -> None:
        x = value.detach().reshape(-1, value.shape[-1]).float()
        product = (x.T @ x).double()  # a batch in float32, the sum over batches in float64
        self.total = product if self.total is None else self.total + product
        self.rows += x.shape[0]

    def result(self) -> Tensor:
        if self.total is None:
            raise PlanError("calibration data is empty; give at least one input")
        return self.total / self.rows


class _ChannelMoment(_Moment):
    def add(self, value: Tensor) -> None:
        super().add(value.movedim(1, -1))


@dataclass
class _Sample:
    parts: list[Tensor] = field(default_factory=list)
    stride: int = 1
    seen: int = 0

    def add(self, value: Tensor) -> None:
        """Keep every ``stride``-th row; when full, every second of those: bounded, and the same for the same data."""
        x = value.detach().reshape(-1, value.shape[-1])
        first = -self.seen % self.stride
        self.seen += x.shape[0]
        self.parts.append(x[first :: self.stride].float().clone())  # a view would keep the whole activation alive
        while sum(map(len, self.parts)) > SAMPLE_ROWS:
            self.parts, self.stride = [torch.cat(self.parts)[::2].clone()], self.stride * 2

    def result(self) -> Tensor:
        return torch.cat(self.parts)


@dataclass
class _Counts:
    total: Tensor | None = None

    def add(self, value: Tensor) -> None:
        counts = torch.bincount(value.detach().reshape(-1))
        old = self.total if self.total is not None else counts.new_zeros(0)
        size = max(len(old), len(counts))
        self.total = torch.nn.functional.pad(old, (0, size - len(old))) + torch.nn.functional.pad(
            counts, (0, size - len(counts))
        )

    def result(self) -> Tensor:
        return self.total if self.total is not None else torch.zeros(0, dtype=torch.int64)


@dataclass
class _Sequences:
    """Every ``stride``-th input of the batches, the same ones at every node that sees the same batches."""

    parts: list[Tensor] = field(default_factory=list)
    stride: int = 1
    seen: int = 0

    def add(self, value: Tensor) -> None:
        x = value.detach()
        if self.parts and x.shape[1:] != self.parts[0].shape[1:]:
            raise PlanError(
                f"calibration inputs differ in length ({_length(self.parts[0])} and {_length(x)}), and a pass asks for whole "
                "sequences: cut them to one length"
            )
        first = -self.seen % self.stride
        self.seen += x.shape[0]
        self.parts.append(x[first :: self.stride].clone())
        while (kept := sum(map(len, self.parts))) > 1 and kept * _length(x) > SEQUENCE_TOKENS:
            self.parts, self.stride = [torch.cat(self.parts)[::2].clone()], self.stride * 2

    def result(self) -> Tensor:
        return torch.cat(self.parts)


def _length(x: Tensor) -> int:
    """Tokens of one sequence: [n, length] or [n, ..., length, d]."""
    return x.shape[1] if x.dim() == 2 else x.shape[-2]


def _collector(kind: str) -> Any:
    """A new collector of a kind, whatever stands after its colon."""
    return _COLLECTORS[kind.partition(":")[0]]()


_COLLECTORS: dict[str, Callable[[], Any]] = {
    "second_moment": _Moment,
    "channel_moment": _ChannelMoment,
    "gradient_moment": _Moment,
    "sample": _Sample,
    "counts": _Counts,
    "sequences": _Sequences,
}


@dataclass(frozen=True)
class Statistics:
    """What calibration found, by (kind, module path of the site)."""

    values: Mapping[tuple[str, str], Tensor]
    inputs: int = 0

    def get(self, kind: str, paths: Sequence[str]) -> Tensor | None:
        """The statistic of the first of ``paths`` that has one."""
        return next((self.values[kind, p] for p in paths if (kind, p) in self.values), None)

    def digest(self) -> str:
        text = hashlib.sha256()
        for key in sorted(self.values):
            text.update(repr(key).encode())
            text.update(self.values[key].contiguous().view(torch.uint8).numpy().tobytes())
        return text.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        with atomic_file(Path(path)) as temporary:
            tensors = {f"{kind}/{site}": t.contiguous() for (kind, site), t in self.values.items()}
            save_file(
                tensors,
                temporary,
                metadata={"rewriter.statistics": json.dumps({"format": FORMAT, "inputs": self.inputs})},
            )

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Raises LoadError for a foreign, truncated or newer file."""
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["rewriter.statistics"])
                values = {(k.partition("/")[0], k.partition("/")[2]): file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise LoadError(f"{path}: not a file of calibration statistics ({error})") from error
        if header["format"] > FORMAT:
            raise LoadError(f"{path}: written by a newer version (format {header['format']}, this one reads {FORMAT})")
        return cls(values, header["inputs"])


def wanted(program: Program, passes: Sequence[Pass]) -> dict[tuple[str, str], Node]:
    """(kind, path) -> node to observe, over every site any of the passes could take."""
    found: dict[tuple[str, str], Node] = {}
    for one in passes:
        for rule in one.rules():
            for site in locate(rule, program).sites:
                for kind, node in rule.needs(site.match).items():
                    found |= {(kind, path): node for path in site.paths}
    return found


def calibrate(
    program: Program, passes: Sequence[str | Pass], data: Iterable[Any], progress: Progress | None = None
) -> Statistics:
    """Run ``data`` through the original program once and collect what the passes ask for.

    Args:
        program: a captured, unrewritten program.
        data: inputs: a tensor (the first argument), a tuple of arguments, or a dict by name. An attention mask that
            is missing is all ones.

    Raises:
        PlanError: an input does not fit the program, or there is none.
    """
    from rewriter import registry

    targets = wanted(program, registry.resolve(passes))
    collectors = {key: _collector(key[0]) for key in targets}
    values: dict[Node, list[Any]] = {}
    gradients: dict[Node, list[Any]] = {}
    for key, node in targets.items():
        (gradients if key[0] in _OF_GRADIENT else values).setdefault(node, []).append(collectors[key])
    total = len(data) if isinstance(data, Sized) else 0
    seen = 0
    observer = _Observer(program, values, gradients)
    for batch in data:
        if progress is not None:
            progress("calibrate", seen, total)
        with torch.random.fork_rng(devices=[]):  # a program in training mode draws random numbers
            torch.default_generator.manual_seed(seen)
            observer.observe(*flat_inputs(program, batch))
        seen += 1
    if seen == 0:
        raise PlanError("calibration data is empty; give at least one input")
    return Statistics({key: collector.result() for key, collector in collectors.items()}, seen)


class _Observer(Interpreter):
    """Runs the graph and shows the values of chosen nodes, and the gradients at others, to their collectors.

    It runs on tensors that are shared until written: a program in training mode updates batch statistics.
    """

    def __init__(
        self, program: Program, values: Mapping[Node, Sequence[Any]], gradients: Mapping[Node, Sequence[Any]]
    ) -> None:
        super().__init__(program.fork(store.shared(program.root)).graph_module, graph=program.graph)
        self.values, self.gradients = values, gradients
        self.vocabulary = curvature.vocabulary(program) if gradients else None
        self.generator = torch.Generator().manual_seed(0)
        self.watched: dict[Node, Tensor] = {}

    def observe(self, *inputs: Tensor) -> None:
        """One run, and a backward pass where gradients are wanted; parameters get none."""
        with torch.set_grad_enabled(bool(self.gradients)):
            outputs = self.run(*inputs)
            probe = curvature.probe(outputs, self.vocabulary, self.generator) if self.gradients else None
        watched, self.watched = self.watched, {}
        if probe is None:
            return
        found = torch.autograd.grad(probe, list(watched.values()), allow_unused=True)
        for (node, value), gradient in zip(watched.items(), found, strict=True):
            for collector in self.gradients[node]:
                collector.add(torch.zeros_like(value) if gradient is None else gradient)

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr" and isinstance(value, Tensor):
            value = value.detach()
        for collector in self.values.get(n, ()):
            collector.add(value)
        if n in self.gradients:
            value = value if value.requires_grad else value.detach().requires_grad_()
            self.watched[n] = value
        return value


def flat_inputs(program: Program, batch: Any) -> tuple[Tensor, ...]:
    """The flat tensors of one call: a tensor, a tuple, or a mapping by input name. Raises PlanError."""
    names = program.input_names()
    if isinstance(batch, Tensor):
        batch = (batch,)
    given: dict[str, Any] = dict(batch) if isinstance(batch, Mapping) else dict(zip(names, batch, strict=False))
    if "attention_mask" in names and given.get("attention_mask") is None and "input_ids" in given:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    missing = [n for n in names if n not in given]
    if missing:
        raise PlanError(f"a calibration input lacks {', '.join(missing)}; give a dict with {', '.join(names)}")
    device = next((t.device for t in program.example), torch.device("cpu"))
    return tuple(given[n].to(device) for n in names)


def batches(tokens: Tensor, size: int = 8) -> Iterator[dict[str, Tensor]]:
    """Token windows [n, length] as model inputs of up to ``size`` rows."""
    for part in tokens.split(size):
        yield {"input_ids": part.long()}
