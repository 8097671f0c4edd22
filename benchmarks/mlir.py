# SPDX-License-Identifier: Apache-2.0
"""Whole models through torch-mlir: which dialects they lower to, and whether IREE computes what eager computes.

.venv/bin/python benchmarks/mlir.py                # everything; benchmarks/results/mlir.json and the table of docs/mlir.md
.venv/bin/python benchmarks/mlir.py --only minilm  # rows whose name contains this, as "tiny_lm, original"; they are replaced
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from timing import interleaved, machine
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import rewriter
from rewriter.codegen import mlir
from rewriter.codegen.mlir_iree import IreeProgram, compile_program
from rewriter.errors import UntrainedWarning
from rewriter.passes import LinearAttention, Pass, ShiftAdd, Tversky, VQLogits

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mlir.json"
PAGE = ROOT / "docs" / "mlir.md"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"
SIZE = (2, 64)
OTHER_SIZES = ((1, 17), (3, 96), (1, 1))
TOLERANCE = 1e-4
ORIGINAL = "original"
VERSIONS = (ORIGINAL, "rewritten")

sys.path.insert(0, str(ROOT / "examples"))


@dataclass(frozen=True)
class Subject:
    """A model, and the passes that put all four families into it (three where it has no head)."""

    model: Callable[[], nn.Module]
    vocabulary: int
    passes: tuple[str | Pass, ...]
    select: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """One model. Errors are the largest |Δ| to eager over the largest |output|; seconds once, milliseconds a median."""

    model: str
    sites: dict[str, int]
    lowered: dict[str, float]  # seconds to import, and from there to each dialect
    compiled: float  # seconds of IREE, static sizes
    error: float  # static, against eager
    dynamic_error: float  # one dynamic program at other sizes
    iree_ms: float
    eager_ms: float
    megabytes: float  # of the module, weights included


def minilm() -> nn.Module:
    import minilm as example

    return example.load()[0]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=1024, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    ).eval()


def tiny_lm() -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "tiny_lm", dtype=torch.float32).eval()


_COMMON = (LinearAttention(min_length=None, window=16), ShiftAdd(embeddings=True), Tversky(features=32))
SUBJECTS = {
    "gpt2, 2 layers": Subject(
        gpt2, 1024, ("fuse", VQLogits(structure="product"), *_COMMON), {"re:.*attn.c_proj": "tversky"}
    ),
    "tiny_lm": Subject(tiny_lm, 8192, ("fuse", VQLogits(structure="product"), *_COMMON), {"re:.*o_proj": "tversky"}),
    "minilm": Subject(
        minilm,
        30000,
        (
            "fuse",
            LinearAttention(min_length=None, window=None),
            ShiftAdd(embeddings=True),
            Tversky(features=128),
        ),
        {"re:.*attention.output.dense": "tversky"},
    ),
}


def call(vocabulary: int, size: tuple[int, int]) -> dict[str, Tensor]:
    """Random tokens; the first row is padded on the left where it is long enough."""
    ids = torch.randint(0, vocabulary, size, generator=torch.Generator().manual_seed(size[1]))
    mask = torch.ones_like(ids)
    mask[0, : size[1] // 8] = 0
    return {"input_ids": ids, "attention_mask": mask}


def program_of(subject: Subject, version: str) -> rewriter.Program:
    kwargs = call(subject.vocabulary, SIZE)
    if version == ORIGINAL:
        return rewriter.capture(subject.model(), None, kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        opt = rewriter.optimize(
            subject.model(),
            list(subject.passes),
            example_kwargs=kwargs,
            select=dict(subject.select),
            calibration=[kwargs["input_ids"]],
        )
    return opt.program


def measure(name: str, program: rewriter.Program, vocabulary: int) -> Row:
    lowered, modules = {}, {}
    start = time.perf_counter()
    imported = mlir.import_program(program.graph_module, program.example, static=True)
    lowered["import"] = time.perf_counter() - start
    for dialect in mlir.DIALECTS:
        start = time.perf_counter()
        modules[dialect] = imported.lower(dialect)
        lowered[dialect] = time.perf_counter() - start
    start = time.perf_counter()
    fixed = compile_program(modules["torch"])
    compiled = time.perf_counter() - start
    free = compile_program(mlir.import_program(program.graph_module, program.example).lower("torch"))
    given = [list(call(vocabulary, size).values()) for size in OTHER_SIZES]
    with torch.inference_mode():
        times = interleaved({"iree": lambda: fixed(*program.example), "eager": lambda: program.run(*program.example)})
    return Row(
        name,
        _sites(program),
        lowered,
        compiled,
        difference(fixed, program, list(program.example)),
        max(difference(free, program, inputs) for inputs in given),
        times["iree"].median * 1e3,
        times["eager"].median * 1e3,
        len(modules["torch"].bytecode) / 1e6,
    )


def difference(compiled: IreeProgram, program: rewriter.Program, inputs: list[Tensor]) -> float:
    """The largest |Δ| over all outputs, as a fraction of the largest |output|."""
    with torch.inference_mode():
        pairs = list(zip(compiled(*inputs), program.run(*inputs), strict=True))
    return max((got - want).abs().max().item() / want.abs().max().item() for got, want in pairs)


def _sites(program: rewriter.Program) -> dict[str, int]:
    names = [str(n.target).removeprefix("rewriter.") for n in program.graph.nodes if "rewriter." in str(n.target)]
    return {name.removesuffix(".default"): names.count(name) for name in sorted(set(names))}


def table(rows: list[Row], where: str) -> str:
    heads = [
        "model",
        *("import", *mlir.DIALECTS),
        "module",
        "IREE compile",
        "error",
        "error, other sizes",
        "IREE",
        "eager",
    ]
    lines = [
        f"Machine: {where}.",
        "",
        "| " + " | ".join(heads) + " |",
        "|---|" + "---:|" * (len(heads) - 1),
    ]
    for row in rows:
        cells = [
            row.model,
            *(f"{row.lowered[step]:.1f} s" for step in ("import", *mlir.DIALECTS)),
            f"{row.megabytes:.1f} MB",
            f"{row.compiled:.1f} s",
            f"{row.error:.1e}",
            f"{row.dynamic_error:.1e}",
            f"{row.iree_ms:.2f} ms",
            f"{row.eager_ms:.2f} ms",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="rows whose name contains this")
    only = parser.parse_args().only
    torch.set_num_threads(2)
    kept = [Row(**r) for r in json.loads(RESULTS.read_text())["rows"]] if RESULTS.exists() and only else []
    rows = {row.model: row for row in kept}
    for name, subject in SUBJECTS.items():
        for version in (v for v in VERSIONS if only in f"{name}, {v}"):
            row = measure(f"{name}, {version}", program_of(subject, version), subject.vocabulary)
            rows[row.model] = row
            print(row, flush=True)
            found = {"machine": machine(), "rows": [asdict(r) for r in rows.values()]}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    page = PAGE.read_text()
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(list(rows.values()), machine())}\n{END}{after}")
    return int(any(max(row.error, row.dynamic_error) > TOLERANCE for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
