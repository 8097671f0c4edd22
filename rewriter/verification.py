# SPDX-License-Identifier: Apache-2.0
"""The golden run: does a rewritten program compute the same function?

Two programs are compared twice.

1. *Promoted*, every floating value in float64 (:mod:`rewriter.promotion`): outputs, updated buffers and
   gradients may differ by at most 1e-10 of their largest magnitude. Two spellings of one function differ by
   about 1e-15 there and a wrong constant does not come near 1e-10, so this decides *what* is computed.
2. *In their own dtype*, outputs and buffers against the golden run g of the original, for *how well*:

       max|after − g| ≤ 2 · max|before − g| + 1 ulp,    ulp = eps · 2^⌊log2 max|g|⌋

   (g itself is known to 1e-10 of its largest magnitude; in a float64 program that takes the place of the
   ulp.)

   Gradients are measured by the same rule and noted, not judged; :class:`Verification` says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from rewriter.errors import VerificationError
from rewriter.figures import Figure, Runs, compare, largest, relative_error, worst
from rewriter.promotion import duplicate, promote, promoted_dtype, read_tensors

if TYPE_CHECKING:
    from rewriter.program import Program

Samples = Sequence[tuple[Tensor, ...]]

# A gradient that is zero by mathematics (a key bias: softmax ignores a shift of its row) is, in float64, what
# is left of large terms that cancelled. Its unit is at least this fraction of the largest gradient.
_CANCELLATION = 1e-3

_SEED = 0  # of the cotangents, and of random operators in each run


@dataclass(frozen=True)
class Verification:
    """The verdict on a rewritten program.

    Attributes:
        outputs: one figure per output, and one per buffer that either program updates.
        gradients: one figure per floating input and per parameter both programs read under one name.
        dtype: the floating dtypes of the original's tensors and inputs, e.g. ("torch.float32",).
        samples: how many inputs were run.
        reason: the first broken promise in words; empty if all were kept.
        notes: values that are undefined everywhere, and gradients that lost accuracy in the own dtype. The
            latter do not fail a rewrite: which kernel computes a gradient is torch's choice, and those of
            fused attention are wrong, by design of the kernels, in rows that see no key
            (:mod:`rewriter.promotion`). Training does not meet this as long as the loss leaves such rows out.
    """

    outputs: tuple[Figure, ...]
    gradients: tuple[Figure, ...]
    dtype: tuple[str, ...]
    samples: int
    reason: str

    @property
    def passed(self) -> bool:
        return not self.reason

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(f"{f.name}: {f.note}" for f in (*self.outputs, *self.gradients) if f.note and f.passed)

    def raise_if_failed(self) -> Verification:
        """Itself, if it passed.

        Raises:
            VerificationError: names every output and gradient that moved, and its figures.
        """
        if self.passed:
            return self
        broken = [f"  {f.name}: {f.reason}" for f in (*self.outputs, *self.gradients) if not f.passed]
        head = f"the rewritten program does not compute the original's function; {len(broken)} values moved:"
        advice = "undo the rewrite, or give its rule a contract that promises less than EXACT"
        raise VerificationError("\n".join([head, *broken, advice]))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinities as text, since JSON has none."""
        data: dict[str, Any] = {"passed": self.passed, **_json(asdict(self)), "notes": list(self.notes)}
        for figures in ("outputs", "gradients"):
            for entry, figure in zip(data[figures], getattr(self, figures), strict=True):
                entry["passed"] = figure.passed
        return data

    def __rich__(self) -> Any:
        from rewriter.rendering import verification

        return verification(self)


def verify(
    before: Program | GraphModule,
    after: Program | GraphModule,
    inputs: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    *,
    gradients: bool = True,
) -> Verification:
    """Compare two programs by the golden run.

    Neither program is changed, nor are its buffers and gradients, nor the global RNG; copies are run.

    Args:
        before: the original program.
        after: the rewritten program, with the same inputs and outputs.
        inputs: flat tensors of one call, or a sequence of such tuples. Values matter: an input of zeros sees
            no weight (:func:`perturbed` makes such inputs general).
        gradients: also compare gradients of a fixed random projection of all floating outputs with respect to
            floating inputs, and to every floating parameter that both programs read under one name and in one
            shape. A program over token ids is covered by its embedding. A parameter that only one program has
            (a fused one) has no counterpart.

    Raises:
        VerificationError: a program cannot be run on the inputs, in its own dtype or in float64. A program
            that
            runs and differs is a verdict, not an error: see :meth:`Verification.raise_if_failed`.
    """
    modules = (_graph_module(before), _graph_module(after))
    samples = _samples(inputs, modules)
    names = _shared_parameters(*modules) if gradients else None
    with _isolated(samples):
        golden = _pair(modules, samples, names, wide=True)
        own = _pair(modules, samples, names, wide=False)
    outputs = tuple(_outputs(golden, own, _labels(before, "output_names")))
    slopes = tuple(_slopes(golden, own, _labels(before, "input_names")))
    reason = next((f"{f.name}: {f.reason}" for f in (*outputs, *slopes) if not f.passed), "")
    return Verification(outputs, slopes, _dtypes(modules[0], samples), len(samples), reason)


def perturbed(inputs: Sequence[Tensor], *, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, ...]:
    """The inputs with ``scale`` times standard normal noise added to the floating ones; others unchanged."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return (tensor.detach().double() + scale * noise.to(tensor.device)).to(tensor.dtype)

    return tuple(noisy(tensor) for tensor in inputs)


def _graph_module(program: Program | GraphModule) -> GraphModule:
    module = program if isinstance(program, GraphModule) else getattr(program, "graph_module", None)
    if not isinstance(module, GraphModule):
        kind = type(program).__name__
        raise VerificationError(f"verify() compares Programs or GraphModules, not {kind}; see rewriter.capture")
    return module


def _samples(
    inputs: Sequence[Tensor] | Sequence[Sequence[Tensor]], modules: tuple[GraphModule, GraphModule]
) -> list[tuple[Tensor, ...]]:
    """Always a list of flat tensor tuples, each of the length both programs take."""
    items: Sequence[Any] = inputs
    one = all(isinstance(item, Tensor) for item in items)
    samples = [tuple(items)] if one else [tuple(item) for item in items]
    for module, which in zip(modules, ("original", "rewritten"), strict=True):
        expected = len(module.graph.find_nodes(op="placeholder"))
        for sample in samples:
            if len(sample) != expected or not all(isinstance(t, Tensor) for t in sample):
                raise VerificationError(
                    f"the {which} program takes {expected} flat tensors, but verify() got {len(sample)} "
                    "values; inputs is one tuple of tensors or a list of such tuples"
                )
    return samples


def _shared_parameters(before: GraphModule, after: GraphModule) -> tuple[str, ...]:
    """Floating parameters that both programs read under one name and in one shape."""
    shapes = {name: t.shape for name, t in read_tensors(after)}
    return tuple(
        name
        for name, t in read_tensors(before)
        if isinstance(t, nn.Parameter) and t.is_floating_point() and shapes.get(name) == t.shape
    )


def _dtypes(module: GraphModule, samples: Samples) -> tuple[str, ...]:
    tensors = (*(t for _, t in read_tensors(module)), *(t for sample in samples for t in sample))
    return tuple(sorted({str(t.dtype) for t in tensors if t.is_floating_point()}))


def _labels(program: Program | GraphModule, method: str) -> tuple[str, ...]:
    """Names of outputs or inputs, where the program knows them."""
    return () if isinstance(program, GraphModule) else tuple(getattr(program, method)())


# --- running ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """What a program gave: per sample its outputs and gradients by name, at the end its updated buffers."""

    outputs: list[list[Tensor]]
    gradients: list[dict[str, Tensor]]
    buffers: dict[str, Tensor]


_Pair = tuple[_Run, _Run]  # the original's and the rewritten program's


def _pair(modules: tuple[GraphModule, GraphModule], samples: Samples, names: Sequence[str] | None, wide: bool) -> _Pair:
    """Both programs on all samples, promoted (``wide``) or in their own dtype."""
    runs = []
    for module, which in zip(modules, ("original", "rewritten"), strict=True):
        try:
            runs.append(_run(module, samples, names, wide))
        except Exception as error:  # whatever an operator raises: this program does not compute this input
            dtype = "promoted to float64" if wide else "in its own dtype"
            raise VerificationError(f"the {which} program {dtype} does not run on the inputs: {error}") from error
    return runs[0], runs[1]


def _run(source: GraphModule, samples: Samples, names: Sequence[str] | None, wide: bool) -> _Run:
    """Run a copy on every sample, in order; with gradients if ``names`` of parameters are given."""
    module = promote(source) if wide else duplicate(source)
    tensors = dict(read_tensors(module))
    for name, tensor in tensors.items():
        tensor.requires_grad_(names is not None and name in names)
    _seed(samples)
    outputs, gradients = [], []
    for sample in samples:
        leaves = [_leaf(t, wide, requires_grad=names is not None) for t in sample]
        result = _flat(module(*[t.clone() for t in leaves]))
        wanted = {f"input {i}": t for i, t in enumerate(leaves) if t.requires_grad}
        wanted |= {name: tensors[name] for name in names or ()}
        gradients.append({} if names is None else _gradients(result, wanted))
        outputs.append([t.detach().clone() for t in result])
    originals = dict(read_tensors(source))
    updated = {
        name: t
        for name, t in tensors.items()
        if not isinstance(t, nn.Parameter) and not torch.equal(t, originals[name].to(t.dtype))
    }
    return _Run(outputs, gradients, updated)


def _leaf(tensor: Tensor, wide: bool, requires_grad: bool) -> Tensor:
    own = tensor.detach().to(promoted_dtype(tensor.dtype) if wide else tensor.dtype, copy=True)
    return own.requires_grad_(requires_grad and own.is_floating_point())


def _gradients(outputs: Sequence[Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of Σ_i ⟨c_i, output_i⟩ for standard normal c_i; zeros where no output depends on a tensor."""
    generator = torch.Generator().manual_seed(_SEED)
    projected, cotangents = [], []
    for output in outputs:
        # Drawn for every output, so that a detached one does not shift the others' numbers.
        c = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        if output.requires_grad:
            projected.append(output)
            cotangents.append(c.to(output))
    if not projected:
        return {name: torch.zeros_like(t) for name, t in wanted.items()}
    found = torch.autograd.grad(projected, list(wanted.values()), cotangents, allow_unused=True, materialize_grads=True)
    return dict(zip(wanted, found, strict=True))


@contextmanager
def _isolated(samples: Samples) -> Iterator[None]:
    """Autograd works whatever mode the caller is in, and the global RNG is put back."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(_cuda_devices(samples)):
        yield


def _seed(samples: Samples) -> None:
    """Every run meets the same random numbers (inside ``_isolated``)."""
    torch.default_generator.manual_seed(_SEED)
    for index in _cuda_devices(samples):
        torch.cuda.default_generators[index].manual_seed(_SEED)


def _cuda_devices(samples: Samples) -> list[int]:
    return sorted({t.device.index for sample in samples for t in sample if t.device.type == "cuda"})


def _flat(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


# --- comparing ----------------------------------------------------------------------------------------------


def _outputs(golden: _Pair, own: _Pair, labels: Sequence[str]) -> Iterator[Figure]:
    """One figure per output, and per buffer that a program updates.

    The error of a scalar (a loss) in its own dtype is one draw of a lottery: it may be nothing in the original
    and an ulp and a half in an equal program. So each output's worst relative error over all inputs is what
    the original loses there, and sets what is allowed on every one of them.
    """
    before, after = golden
    samples = range(len(before.outputs))
    for i in range(max((len(out) for run in golden for out in run.outputs), default=0)):
        name = f"output {labels[i] if i < len(labels) else i}"
        of_samples = [Runs(*(_at(run.outputs[s], i) for run in (*golden, *own))) for s in samples]
        known = [(r.own_before, r.golden_before) for r in of_samples]
        lost = max((relative_error(o, g) for o, g in known if o is not None and g is not None), default=0.0)
        yield worst(compare(name, s, r, noise=lost) for s, r in enumerate(of_samples))
    for name in dict.fromkeys((*before.buffers, *after.buffers)):
        runs = Runs(*(run.buffers.get(name) for run in (*golden, *own)))
        yield compare(f"buffer {name}", len(before.outputs) - 1, runs)


def _slopes(golden: _Pair, own: _Pair, labels: Sequence[str]) -> Iterator[Figure]:
    """One figure per gradient. Only the promoted comparison binds; in the own dtype it is measured and noted.

    There a single gradient's error is a lottery (measured: after a sound rewrite up to 7 of 41 are more
    than twice worse, as many twice better), but the worst of all is not; so that one sets what is allowed:

        err_k(after) / unit_k ≤ 2 · max_j err_j(before) / unit_j + 1 ulp
    """
    all_golden, all_own = golden[0].gradients, own[0].gradients
    floors = [_CANCELLATION * max(map(largest, g.values()), default=0.0) for g in all_golden]
    noise = [
        max((relative_error(o[name], g[name], floor) for name in g), default=0.0)
        for g, o, floor in zip(all_golden, all_own, floors, strict=True)
    ]
    readable = {f"input {i}": f"input {label}" for i, label in enumerate(labels)}
    for name in all_golden[0]:
        label = f"gradient of {readable.get(name, name)}"
        yield worst(
            compare(
                label,
                s,
                Runs(*(run.gradients[s][name] for run in (*golden, *own))),
                floor=floors[s],
                noise=noise[s],
                own_dtype_binds=False,
            )
            for s in range(len(all_golden))
        )


def _at(tensors: Sequence[Tensor], i: int) -> Tensor | None:
    return tensors[i] if i < len(tensors) else None


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
