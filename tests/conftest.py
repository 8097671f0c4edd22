# SPDX-License-Identifier: Apache-2.0
"""What every test gets: one thread, no network, no chatter, and how hard the property tests search."""

from __future__ import annotations

import os
from pathlib import Path

# Read when the libraries are imported, so set before.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Compiled sources of the CPU kernels: beside the other products of a build, not among the user's.
os.environ.setdefault("REWRITER_CACHE", str(Path(__file__).resolve().parent.parent / "build" / "cache"))

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

FUZZ = 20  # `make fuzz`: this many times the examples a test asks for

quick = settings(settings.get_profile("default"), deadline=None, derandomize=bool(os.environ.get("CI")))
settings.register_profile("default", quick)
settings.register_profile("fuzz", quick, derandomize=False, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test that draws from the global generator draws the same whichever tests ran before it in its process."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the fuzz profile, scale the number of examples, also where a test states its own."""
    if config.getoption("--hypothesis-profile") != "fuzz":
        return
    for function in {item.function for item in items if isinstance(item, pytest.Function)}:
        own = getattr(function, "_hypothesis_internal_use_settings", None)
        if own is not None:
            function._hypothesis_internal_use_settings = settings(own, max_examples=FUZZ * own.max_examples)
