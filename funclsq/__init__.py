"""Differentiable sparse least squares: one functional core, the same in torch and in JAX."""

from typing import TYPE_CHECKING

from funclsq import solvers
from funclsq._lazy import submodules
from funclsq.errors import (
    AccuracyWarning,
    ConvergenceError,
    ConvergenceWarning,
    FunclsqWarning,
    RankWarning,
)
from funclsq.factorize import Factorization, covariance, factorize
from funclsq.lstsq import lstsq, solve
from funclsq.matrix_free import LinearOperator
from funclsq.pattern import SparsityPattern
from funclsq.regression import LinearRegression, linear_regression
from funclsq.solution import Method, Solution, Status
from funclsq.sparse import Sparse

if TYPE_CHECKING:
    from funclsq import compat, nn, plot, preconditioners, ridge, validate

__version__ = "0.1.0"
__getattr__ = submodules(__name__, ("compat", "nn", "plot", "preconditioners", "ridge", "validate"))

__all__ = [
    "AccuracyWarning",
    "ConvergenceError",
    "ConvergenceWarning",
    "Factorization",
    "FunclsqWarning",
    "LinearOperator",
    "LinearRegression",
    "Method",
    "RankWarning",
    "Solution",
    "Sparse",
    "SparsityPattern",
    "Status",
    "compat",
    "covariance",
    "factorize",
    "linear_regression",
    "lstsq",
    "nn",
    "plot",
    "preconditioners",
    "ridge",
    "solve",
    "solvers",
    "validate",
]
