"""Sparse Cholesky backends behind one protocol."""

from funclsq.backends.registry import (
    Backend,
    Factor,
    NotPositive,
    Symbolic,
    available,
    backend,
    cudss_analysis,
    device_backend,
)

__all__ = [
    "Backend",
    "Factor",
    "NotPositive",
    "Symbolic",
    "available",
    "backend",
    "cudss_analysis",
    "device_backend",
]
