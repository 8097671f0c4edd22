# SPDX-License-Identifier: Apache-2.0
"""Graphs and fitted parameters must not depend on the modes their maker happens to be called in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def neutral() -> Iterator[None]:
    """Outside inference mode and autocast, whatever the caller is in; also a decorator."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
