# SPDX-License-Identifier: Apache-2.0
"""Every case of the legality corpus is rewritten so that no caller can tell, or refused for the expected reason."""

from __future__ import annotations

import pytest

from .legality_corpus import CASES, THEMES, Case, Refused, Rewritten
from .legality_corpus.engine import attempt
