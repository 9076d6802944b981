"""The protocol of a sparse Cholesky backend, and which backends can be had here.

A backend analyses the pattern of a Hermitian positive definite matrix once and factors any
values on it. The pattern comes as full sorted CSC (both triangles, diagonal present), int32.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Protocol

import numpy as np

__all__ = [
    "ORDER",
    "Backend",
    "Factor",
    "NotPositive",
    "Symbolic",
    "available",
    "backend",
    "cudss_analysis",
    "device_backend",
]

ORDER = ("rslab", "superlu", "cholmod", "pardiso")  # what "auto" tries, in this order


class NotPositive(ArithmeticError):
    """The matrix is not positive definite to working precision."""


class Factor(Protocol):
    """A numeric factor of one matrix; ``solve`` may be called from several threads."""

    nbytes: int

    def solve(self, rhs: np.ndarray) -> np.ndarray:
        """Solve N X = rhs, (n, k) to (n, k)."""
        ...

    def positive(self) -> bool:
        """Whether every pivot came out positive."""
        ...


class Symbolic(Protocol):
    """The analysis of one pattern; ``factor`` may be called from several threads.

    It may have an attribute ``work``, (entries of the factor, flops that it takes) or None where
    that is not known yet.
    """

    def factor(self, data: np.ndarray) -> Factor:
        """Factor the values ``data``, (nnz,), in the order of the analysed CSC pattern.

        Raises
        ------
        NotPositive
            If a pivot is zero (or negative, where the backend tells).
        """
        ...


class Backend(Protocol):
    """A module with a name, the dtypes it factors, and ``analyze``."""

    NAME: str
    DTYPES: frozenset[str]

    def analyze(self, indptr: np.ndarray, indices: np.ndarray) -> Symbolic:
        """Analyse a full sorted CSC pattern."""
        ...


_MODULES = {
    "superlu": ("scipy", "superlu"),
    "rslab": ("rslab", "rslab"),
    "cholmod": ("sksparse", "cholmod"),
    "pardiso": ("pypardiso", "pardiso"),
}


@functools.cache
def _import(name: str) -> Any:
    """The backend's module; None if its package is absent, else what was raised in importing it."""
    requirement, module = _MODULES[name]
    if importlib.util.find_spec(requirement) is None:
        return None
    try:
        return importlib.import_module(f"funclsq.backends.{module}")
    except Exception as error:  # present but unusable, as where a shared library is missing
        return error


def _load(name: str) -> Backend | None:
    found = _import(name)
    return None if isinstance(found, Exception) else found


def available() -> tuple[str, ...]:
    """Return the names of the backends that can be used here."""
    return tuple(name for name in _MODULES if _load(name) is not None)


def backend(name: str | None, dtype: str = "float64") -> Backend:
    """Return the named backend, or the first of ``ORDER`` that factors ``dtype``.

    Raises
    ------
    ValueError
        If the backend is unknown, not installed, or does not factor ``dtype``.
    """
    if name is None or name == "auto":
        found = (_load(n) for n in ORDER)
        return next(b for b in found if b is not None and dtype in b.DTYPES)
    if name == "cudss":
        raise ValueError(
            "backend 'cudss' is for matrices on a CUDA device; this one is on the CPU. Leave "
            f"backend out, or use one of {available()}."
        )
    if name not in _MODULES:
        raise ValueError(f"backend must be one of {sorted(_MODULES)} or None; got {name!r}.")
    module = _load(name)
    if module is None:
        cause = _import(name)
        why = "is not installed" if cause is None else f"cannot be imported here ({cause})"
        raise ValueError(
            f"backend {name!r} needs the package {_MODULES[name][0]!r}, which {why}; install it, "
            f"or use one of {available()}."
        ) from cause
    if dtype not in module.DTYPES:
        raise ValueError(
            f"backend {name!r} does not factor {dtype}; it factors {sorted(module.DTYPES)}. "
            "Use backend='superlu'."
        )
    return module


@functools.cache
def _cudss(device: str) -> Any:
    """The module of the cuDSS backend, or what was raised in importing it."""
    if device != "cuda":
        return ImportError(f"it is not for {device}")
    try:
        return importlib.import_module("funclsq.backends.cudss")
    except Exception as error:  # absent, older, or without its library
        return error


def device_backend(name: str | None, device: Any, n: int, most: int) -> str | None:
    """The backend for a sparse normal matrix of order n on a device; None: write it out.

    It is written out where cuDSS is missing and n is at most ``most``.

    Raises
    ------
    ValueError
        If the backend named is not for devices, or what is needed is not installed.
    """
    if name not in (None, "auto", "cudss"):
        raise ValueError(
            f"backend {name!r} is for the CPU; got a matrix on {device}. Leave backend out, or use "
            "backend='cudss'."
        )
    found = _cudss(device.type)
    if not isinstance(found, Exception):
        return found.NAME
    if name in (None, "auto") and n <= most:
        return None
    raise ValueError(
        f"cholesky: a sparse normal matrix of order {n} on {device} is factored by cuDSS, which "
        f"cannot be used here ({found}). Install nvmath-python (funclsq[cudss]), use "
        "solver='lsmr', or move A and b with .cpu()."
    ) from found


def cudss_analysis(indptr: Any, indices: Any, batch: int | None, dtype: Any, device: Any) -> Any:
    """See ``cudss.analyze``."""
    return _cudss(device.type).analyze(indptr, indices, batch, dtype, device)
