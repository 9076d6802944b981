"""Check least squares and its derivatives against independent oracles, in torch and in JAX."""

from funclsq.validate.candidates import jax_candidate, torch_candidate
from funclsq.validate.compare import compare
from funclsq.validate.cross_check import ORACLES, cross_check
from funclsq.validate.report import Report, Row

__all__ = [
    "ORACLES",
    "Report",
    "Row",
    "compare",
    "cross_check",
    "jax_candidate",
    "torch_candidate",
]
