# SPDX-License-Identifier: Apache-2.0
"""Where code stands, for people."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any


def file_of(function: Any) -> str:
    """Folder and file of a function: "shift_add/native.py"; of an emitted one "emitted/<file>"."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    path = Path(inspect.getsourcefile(inspect.unwrap(function)) or "?")
    return "/".join(path.parts[-2:])
