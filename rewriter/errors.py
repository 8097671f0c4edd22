# SPDX-License-Identifier: Apache-2.0
"""Errors of the rewriter. Each message names what was refused (rule, site, source line) and what to do next."""

from __future__ import annotations


class RewriterError(Exception):
    """Base of every error this package raises on purpose."""


class CaptureError(RewriterError):
    """The model could not be captured as a graph, or its inputs could not be inferred."""


class PatternError(RewriterError):
    """A pattern is impossible or ambiguous; raised when the pattern is defined."""


class LegalityError(RewriterError):
    """A rewrite that was asked for by name would be unsound, or its weights cannot be rewritten."""


class PlanError(RewriterError):
    """A pass, option, selection or plan is wrong, or does not fit the program it is applied to."""


class VerificationError(RewriterError):
    """A rewritten program does not keep the promise of its contract."""


class BudgetError(RewriterError):
    """A budget cannot be met; the message shows what can."""


class ExportError(RewriterError):
    """A program could not be written in the format asked for."""


class LoadError(RewriterError):
    """A saved file is truncated, foreign, hostile, or newer than this version reads."""


class UntrainedWarning(UserWarning):
    """A LEARNED rewrite was applied without the training it needs to be good."""
