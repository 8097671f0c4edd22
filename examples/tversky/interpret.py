# SPDX-License-Identifier: Apache-2.0
"""What tiny_lm's head sees, once it is a Tversky projection: features as sets, named by the tokens that have most of them.

    python examples/tversky/interpret.py --text "for i in range("

The head is rewritten by `low_rank` in the metric of calibration text. Each feature stands for a direction of the hidden
space, or for its opposite; a token has it if its prototype points that way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import rewriter
from rewriter.passes import Tversky
from rewriter.passes.tversky.modules import TverskyProjection
from rewriter.passes.tversky.salience import (
    FeatureSet,
    Weighted,
    common_features,
    contributions,
    distinctive_features,
    features_of_prototype,
    nearest_rows,
    prototype_vectors,
    render,
    salience,
    similar_prototypes,
)

FOLDER = Path(__file__).resolve().parent.parent / "tiny_lm"
CALIBRATION_ROWS = 32
QUERY = (" list", " tuple", " dict")  # A ∩ B − C


class Names:
    """Tokens as text, and features by the tokens that have most of them."""

    def __init__(self, head: TverskyProjection, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.memberships = head.prototype_memberships().detach()

    def token(self, index: int) -> str:
        return repr(self.tokenizer.decode([index]))

    def feature(self, index: int) -> str:
        return " ".join(self.token(int(t)) for t in self.memberships[:, index].topk(5).indices)

    def table(self, title: str, what: str, rows: tuple[Weighted, ...], of_features: bool = True) -> Table:
        table = Table(title=title, title_justify="left")
        for column in (what, "weight", "tokens that have most of it" if of_features else "token"):
            table.add_column(column)
        for row in rows:
            name = self.feature(row.index) if of_features else self.token(row.index)
            table.add_row(str(row.index), f"{row.weight:.3f}", name)
        return table


def rewritten_head(features: int) -> tuple[TverskyProjection, torch.nn.Module]:
    """The head as a Tversky projection of so many features, and the model it stands in."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    rows = load_file(FOLDER / "calibration.safetensors")["input_ids"][:CALIBRATION_ROWS].long()
    opt = rewriter.optimize(
        model,
        passes=[Tversky(features=features, init="low_rank")],
        select={"lm_head": "tversky", "re:.*": None},
        calibration=[{"input_ids": part} for part in rows.split(8)],
    )
    whole = opt.to_module()
    head = whole.get_submodule("lm_head")
    if not isinstance(head, TverskyProjection):
        raise TypeError(f"the head is a {type(head).__name__}, not a Tversky projection")
    return head, whole


def explain(console: Console, head: TverskyProjection, names: Names, hidden: Tensor) -> None:
    """The prediction at the last of some hidden states ``[n, d]``, by features."""
    last = hidden[-1]
    best = int(head(last).argmax())
    console.print(f"next token: {names.token(best)}, similarity {float(head(last)[best]):.2f}")
    parts = contributions(head, last, best).detach()
    for largest, title in ((True, "features that speak for it"), (False, "features that speak against it")):
        weights, order = parts.topk(5, largest=largest)
        rows = tuple(Weighted(int(i), float(w)) for i, w in zip(order, weights, strict=True))
        console.print(names.table(f"{title}, by their part of the similarity", "feature", rows))
    console.print(names.table("features in common", "feature", common_features(head, last, best, count=3)))
    console.print(names.table("features of the context alone", "feature", distinctive_features(head, last, best)))
    alone = distinctive_features(head, last, best, of_prototype=True)
    console.print(names.table("features of the token alone", "feature", alone))


def query(console: Console, head: TverskyProjection, names: Names) -> None:
    """Tokens that have what A and B have in common, but C lacks."""
    first, second, without = (names.tokenizer.encode(text)[0] for text in QUERY)
    a, b, c = (features_of_prototype(head, token) for token in (first, second, without))
    wanted: FeatureSet = (a & b) - c
    title = f"what {QUERY[0]!r} and {QUERY[1]!r} have and {QUERY[2]!r} lacks: {len(wanted)} features"
    console.print(names.table(title, "token", similar_prototypes(head, wanted), of_features=False))


def main() -> None:
    """Prints the salience of each token of a text, what decides the next one, and a query."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="for i in range(")
    parser.add_argument("--features", type=int, default=128, help="of the bank, each with its opposite")
    given = parser.parse_args()
    console = Console()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    head, model = rewritten_head(given.features)
    names = Names(head, tokenizer)
    ids = tokenizer(given.text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.get_submodule("model")(input_ids=ids, use_cache=False).last_hidden_state[0]
    table = Table(title="salience: how much of all features a position has", title_justify="left")
    for column in ("token", "salience"):
        table.add_column(column)
    for token, value in zip(ids[0].tolist(), salience(head, hidden).tolist(), strict=True):
        table.add_row(names.token(token), f"{value:.1f}")
    console.print(table)
    explain(console, head, names, hidden)
    query(console, head, names)
    vectors = prototype_vectors(head)
    chosen = tokenizer.encode(QUERY[0])[0]
    near = render(vectors[chosen : chosen + 1], nearest_rows(vectors))[0]
    console.print(names.table(f"prototypes nearest to that of {QUERY[0]!r} (cosine)", "token", near, of_features=False))


if __name__ == "__main__":
    main()
