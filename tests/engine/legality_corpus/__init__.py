# SPDX-License-Identifier: Apache-2.0
"""The legality corpus: small adversarial graphs, each with the one right thing to do about it.

    case.py       what a case is
    rules.py      the rewrites the cases tempt an engine to make, once per engine
    behaviour.py  what a caller can observe of a program, and how two of them differ
    everything else: the cases, one file per theme

`tests/engine/test_legality_corpus.py` runs it through this engine, `benchmarks/legality.py` through others as well.
"""

from __future__ import annotations

from . import aliasing, arguments, attention, control, modes, mutation, sharing, sizes, types
from .case import CASES, Case, Refused, Rewritten

__all__ = ["CASES", "THEMES", "Case", "Refused", "Rewritten"]

THEMES = {
    module.__name__.rpartition(".")[2]: (module.__doc__ or "").strip().splitlines()[0]
    for module in (mutation, aliasing, sharing, arguments, types, sizes, modes, control, attention)
}
