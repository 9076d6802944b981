"""Warnings and errors of funclsq. Bad input is a plain ValueError or TypeError."""

from __future__ import annotations

__all__ = [
    "AccuracyWarning",
    "ConvergenceError",
    "ConvergenceWarning",
    "FunclsqWarning",
    "RankWarning",
]


class FunclsqWarning(UserWarning):
    """Base class of every warning that funclsq gives."""


class ConvergenceWarning(FunclsqWarning):
    """A solve ended without meeting its tolerance; the message holds status and residuals."""


class RankWarning(FunclsqWarning):
    """A was asserted to have a rank that the solver found to be false."""


class AccuracyWarning(FunclsqWarning):
    """A derivative has lost more than half of its digits to rounding."""


class ConvergenceError(RuntimeError):
    """A solve ended without meeting its tolerance and ``on_failure="raise"`` was given."""
