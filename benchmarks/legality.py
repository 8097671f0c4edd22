# SPDX-License-Identifier: Apache-2.0
"""Who gets which wrong: the legality corpus through this engine, torch.fx and Inductor; writes docs/legality.md.

.venv/bin/python benchmarks/legality.py

Every engine gets the same graphs and the same rewrites, and is judged by the same observer: outputs, dtypes, strides,
shared storage, writes to arguments and buffers, gradients, random numbers drawn.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "engine"), str(ROOT / "benchmarks")]

from legality_corpus import CASES, THEMES, Case  # noqa: E402
from legality_corpus.behaviour import difference, observe  # noqa: E402
from legality_corpus.case import tensors  # noqa: E402
from legality_corpus.engine import attempt  # noqa: E402
from rivals.traced import inductor, replace_pattern  # noqa: E402

import rewriter  # noqa: E402

RIGHT, MISSED, WRONG, CRASH, UNABLE = "right", "missed", "**wrong**", "**crash**", "–"


@dataclass(frozen=True)
class Verdict:
    """How an engine did on a case, and what happened."""

    word: str
    what: str = ""


def ours(case: Case) -> Verdict:
    try:
        result = attempt(case)
    except Exception as error:
        return Verdict(CRASH, _line(error))
    if result.changed is not None:
        return Verdict(WRONG, result.changed)
    return Verdict(RIGHT if result.sites >= case.sites else MISSED, f"{result.sites} rewritten")


def theirs(
    apply: Callable[[GraphModule, Case], int], form: Callable[[ExportedProgram], ExportedProgram]
) -> Callable[[Case], Verdict]:
    """A rival on the exported graph in one form, judged against that same graph before it was rewritten."""

    def judge(case: Case) -> Verdict:
        try:
            before = _exported(case, form)
            expected = observe(before, case.inputs(), tensors(before))
        except Exception as error:
            return Verdict(UNABLE, f"does not run before any rewrite: {_line(error)}")
        module = _exported(case, form)
        try:
            count = apply(module, case)
        except Exception as error:
            return Verdict(CRASH, f"while rewriting: {_line(error)}")
        try:
            module.graph.lint()
            module.recompile()
            changed = difference(expected, observe(module, case.inputs(), tensors(module)))
        except Exception as error:
            return Verdict(CRASH if count else UNABLE, f"when run: {_line(error)}")
        if changed is not None:
            return Verdict(WRONG, changed)
        return Verdict(RIGHT if count >= case.sites else MISSED, f"{count} rewritten")

    return judge


def _exported(case: Case, form: Callable[[ExportedProgram], ExportedProgram]) -> GraphModule:
    inputs = case.inputs()
    dims = tuple({d: Dim.AUTO for d in range(t.dim())} for t in inputs) if case.dynamic else None
    exported = torch.export.export(case.build(), inputs, dynamic_shapes=None if dims is None else (dims,), strict=False)
    module = form(exported).module(check_guards=False)
    assert isinstance(module, GraphModule)
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        module.graph.erase_node(node)  # export puts them beside casts, and both rivals take them for users
    module.recompile()
    return module


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:120] if text else ''}"


def _as_exported(program: ExportedProgram) -> ExportedProgram:
    return program


def _functional(program: ExportedProgram) -> ExportedProgram:
    return program.run_decompositions({})


ENGINES: Mapping[str, Callable[[Case], Verdict]] = {
    "rewriter": ours,
    "replace_pattern": theirs(replace_pattern, _as_exported),
    "Inductor": theirs(inductor, _as_exported),
    "Inductor, functional graph": theirs(inductor, _functional),
}


PAGE = """# Who gets which wrong

Written by `benchmarks/legality.py`: {count} small adversarial graphs, each with a rewrite that is tempting there. On
{sound} of them a sound rewrite exists, on {unsound} none does. `tests/engine/test_legality_corpus.py` guards the first
column.

{totals}

- **right**: rewritten where that is sound, left alone where it is not; nobody can tell the result from the original.
- **missed**: a sound rewrite was not made. This engine says why it was not, the others do not.
- **wrong**: a caller sees another value, dtype, stride, another aliasing of outputs, another effect on arguments and
  buffers, another gradient, or another use of random numbers.
- **crash**: the engine raises, or the rewritten graph does not run.
- **–**: the graph in that form does not run even before any rewrite, or is not to be had (export's limits, no
  one's fault here).

## Wrong, missed and crashed, by theme

Each cell is right / missed / wrong / crash.

{themes}

## How the others were called

Versions: torch {torch}, rewriter {rewriter}. Every rewrite is a formula without guards, the way its author would first
write it; its two sides are in `tests/engine/legality_corpus/rules.py`, for this engine as a pattern, for the others as
Python functions traced to the same operators the graphs have (`make_fx(pre_dispatch=True)`), one pair per spelling
where an operand is optional (a mask, a dropout).

- `torch.fx.subgraph_rewriter.replace_pattern(graph_module, pattern, replacement)` on the graph of
  `torch.export.export(model, inputs, strict=False)`. It matches operands in the order written; nothing else is checked.
- Inductor: `register_replacement(search, replace, examples, trace, pass)` without `extra_check`, then
  `PatternMatcherPass.apply` on the same graph. It rejects matches that span in-place operations, and uses of interior
  values.
- *Functional graph*: the same after `run_decompositions({{}})`, which turns in-place operations into out-of-place ones
  and puts their effect on arguments at the end of the graph. This is what Inductor meets inside `torch.compile`, so that
  column is its own ground; the one before it is what a user meets who runs its matcher on an exported graph.

A rival is judged against the graph it was given, run before the rewrite, so that nothing export changes counts against it.
The assertions on dtypes that export puts beside casts were taken out for the rivals, which count them as uses.
Guards that a rule's author might add are left out: the question is what the engine knows by itself. The exceptions are
attention and q/k/v fusion, which for this engine are the passes it ships, guards included, for the others the bare formula.

In rows of attention that see no key the gradients of torch's fused kernels are wrong, rewritten or not
([limits](limits.md)); the one case about such a row compares values only.

## Every case

{cases}

## What went wrong

{details}
"""


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    verdicts = {name: {engine: judge(case) for engine, judge in ENGINES.items()} for name, case in CASES.items()}
    (ROOT / "docs" / "legality.md").write_text(page(verdicts))
    totals = _totals(verdicts)
    sys.stdout.write(totals + "\n")
    return int(any(v["rewriter"].word in (WRONG, CRASH) for v in verdicts.values()))


def page(verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    sound = sum(case.sound for case in CASES.values())
    return PAGE.format(
        count=len(CASES),
        sound=sound,
        unsound=len(CASES) - sound,
        totals=_totals(verdicts),
        themes=_themes(verdicts),
        cases=_cases(verdicts),
        details=_details(verdicts),
        torch=torch.__version__,
        rewriter=rewriter.__version__,
    )


def _totals(verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    counted = {engine: Counter(v[engine].word for v in verdicts.values()) for engine in ENGINES}
    words = (RIGHT, MISSED, WRONG, CRASH, UNABLE)
    return _table(["", *words], [[engine, *(str(counted[engine][w]) for w in words)] for engine in ENGINES])


def _themes(verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    rows = []
    for theme, title in THEMES.items():
        names = [name for name, case in CASES.items() if case.theme == theme]
        counted = [Counter(verdicts[name][engine].word for name in names) for engine in ENGINES]
        cells = [" / ".join(str(c[w]) for w in (RIGHT, MISSED, WRONG, CRASH)) for c in counted]
        rows.append([title, str(len(names)), *cells])
    return _table(["theme", "cases", *ENGINES], rows)


def _cases(verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    parts = []
    for theme, title in THEMES.items():
        rows = [
            [name, _say(case), f"`{case.rewrite.formula}`", *(verdicts[name][engine].word for engine in ENGINES)]
            for name, case in CASES.items()
            if case.theme == theme
        ]
        parts.append(f"### {title}\n\n" + _table(["case", "", "rewrite", *ENGINES], rows))
    return "\n\n".join(parts)


def _details(verdicts: Mapping[str, Mapping[str, Verdict]]) -> str:
    lines = [
        f"- {name}, {engine}: {verdict.what}"
        for name, by_engine in verdicts.items()
        for engine, verdict in by_engine.items()
        if verdict.word in (WRONG, CRASH)
    ]
    return "\n".join(lines).replace("<", "&lt;")


def _say(case: Case) -> str:
    sound = "sound" if case.sound else "unsound"
    return f"{case.about.splitlines()[0]} *({sound})*"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
