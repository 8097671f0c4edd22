# SPDX-License-Identifier: Apache-2.0
"""Every case of the legality corpus is rewritten so that no caller can tell, or refused for the expected reason."""

from __future__ import annotations

import pytest

from rewriter import legality
from rewriter.errors import LegalityError

from .legality_corpus import CASES, THEMES, Case, Refused, Rewritten
from .legality_corpus.engine import Attempt, attempt

LEGALITY = {check.__name__.lstrip("_") for check in legality._CHECKS}
REWRITTEN = {name: case for name, case in CASES.items() if isinstance(case.expect, Rewritten)}
REFUSED = {name: case for name, case in CASES.items() if isinstance(case.expect, Refused)}
# The rule's own guards see the same thing.
GUARDED_TWICE = {"projection weights written"}

# Torch itself refuses to build the replacement, so there is nothing to force.
UNBUILT = {"product of three dimensions"}
BUILT = [n for n, c in REFUSED.items() if c.expect.kind == "replacement" and n not in UNBUILT]


@pytest.mark.parametrize("name", REWRITTEN)
def test_sound_rewrites_are_made_and_nobody_can_tell(name: str) -> None:
    case = REWRITTEN[name]
    found = attempt(case)
    assert found.changed is None
    assert isinstance(case.expect, Rewritten)
    assert found.sites == case.expect.sites, _said(found)


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_for_the_expected_reason(name: str) -> None:
    case = REFUSED[name]
    expect = case.expect
    found = attempt(case)
    assert isinstance(expect, Refused)
    assert found.sites == 0 and found.changed is None
    assert expect.words in _said(found)
    if expect.kind == "absent":
        assert not found.misses
    elif expect.kind == "pattern":
        assert found.misses and not found.kinds & LEGALITY
    else:
        assert expect.kind in found.kinds


@pytest.mark.parametrize("name", [n for n, c in REFUSED.items() if c.expect.kind in LEGALITY and not c.sound])
def test_what_legality_refuses_would_have_been_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus is no straw man: without the reason the rewrite is made, and the caller sees something else."""
    monkeypatch.setattr(legality, "_CHECKS", ())
    assert _goes_wrong(REFUSED[name]) is (name not in GUARDED_TWICE)


@pytest.mark.parametrize("name", BUILT)
def test_what_is_refused_once_built_would_have_been_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewriter.replacing.check", lambda *_: {})
    monkeypatch.setattr("rewriter.propagation.EXPANDED_ADDENDS", {})
    assert _goes_wrong(REFUSED[name])


def test_the_corpus_is_large_and_has_both_kinds() -> None:
    assert len(REWRITTEN) >= 40 and len(REFUSED) >= 40
    assert {case.theme for case in CASES.values()} == THEMES.keys()
    assert all(case.about for case in CASES.values())


def _goes_wrong(case: Case) -> bool:
    try:
        found = attempt(case)
    except (RuntimeError, LegalityError):  # it does not even run
        return True
    return found.changed is not None


def _said(found: Attempt) -> str:
    return "\n".join(map(str, found.misses))
