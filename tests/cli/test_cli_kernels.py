# SPDX-License-Identifier: Apache-2.0
"""`rewriter kernels`: the code of every site, for this processor and for a GPU that is not here."""

from __future__ import annotations

from pathlib import Path

from commands import Run, data, done, readable, refused

PASSES = ("--passes", "fuse,shift_add:group=32", "--select", "lm_head=none")


def test_the_code_of_every_site_is_listed_for_a_gpu(run: Run, folder: Path) -> None:
    text = "\n".join(readable(done(run("kernels", folder, *PASSES, "--target", "sm_90"))))
    assert "sm_90 · 8 sites" in text  # q, k, v and gate, up are one each, in two layers
    assert "bcq_linear + add" in text  # the residual
    assert "registers" in text and "spills" in text


def test_what_runs_here_is_timed(run: Run, folder: Path) -> None:
    found = data(run("kernels", folder, *PASSES, "--json"))
    assert [one["operator"] for one in found] == ["bcq_linear"] * 8
    assert all(one["seconds"] >= one["bound"] > 0 for one in found)
    assert {one["source"] for one in found} <= {"shift_add/native.py", "shift_add/reference.py"}


def test_a_chip_that_nothing_is_compiled_for_is_refused_with_those_that_are(run: Run, folder: Path) -> None:
    assert "sm_80, sm_90, sm_100, gfx942" in refused(run("kernels", folder, *PASSES, "--target", "sm_70"))
