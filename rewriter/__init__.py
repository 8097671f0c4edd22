# SPDX-License-Identifier: Apache-2.0
"""A rewriting compiler for PyTorch models; see README.md and docs/quickstart.md."""

from __future__ import annotations

import logging

from rewriter import errors
from rewriter.applying import apply
from rewriter.calibration import Statistics, calibrate
from rewriter.capturing import capture
from rewriter.declaring import rule
from rewriter.decoding import DecodeState
from rewriter.errors import UntrainedWarning
from rewriter.evaluation import Evaluation, evaluate
from rewriter.exporting import export_mlir, export_onnx
from rewriter.finding import explain, find
from rewriter.matcher import Match, Miss
from rewriter.optimized import Optimized
from rewriter.optimizing import optimize
from rewriter.planner import Plan, plan
from rewriter.program import Program
from rewriter.reports import Report
from rewriter.rules import BOUNDED, CALIBRATED, EXACT, LEARNED, Pass, Rule
from rewriter.saving import load
from rewriter.tracing import traced
from rewriter.verification import Verification, verify
from rewriter.version import __version__

logging.getLogger("rewriter").addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    """``rewriter.passes`` on first use: importing the package alone registers no operators."""
    if name == "passes":
        import importlib

        return importlib.import_module("rewriter.passes")
    raise AttributeError(f"module 'rewriter' has no attribute {name!r}")
