"""The arithmetic of a Krylov loop: vectors are blocks of columns, scalars one per column.

The recurrences of the methods are written once. Where their scalars live differs, because on a
CPU a 0-dim tensor costs more than the arithmetic on it, and on an accelerator a Python float
costs a synchronisation:

- one column on the CPU: Python floats (:class:`FloatScalars`),
- many columns on the CPU: small NumPy arrays (:class:`ArrayScalars`),
- any other device: tensors that stay there (:class:`TensorScalars`).

Scalars are double precision whatever the dtype of the vectors, and divisors are never negative. A
column that is no longer ``active`` gets coefficients of zero: adding that changes no bit of it.
"""

from __future__ import annotations

import collections
import math
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from funclsq.methods import _columns
from funclsq.norms import column_norms
from funclsq.range import safe_norm, scaled_norm

__all__ = [
    "REPRESENTABLE",
    "ArrayScalars",
    "FloatScalars",
    "Scalars",
    "TensorScalars",
    "keep_columns",
    "one_column",
    "scalars_for",
]

TINY = 1e-290  # a divisor below this would overflow; problems are scaled to norms of about 1
_LARGE = 1e38  # the end of the range of float32


_RANGE = (1e-140, 1e140)  # of norms whose squares double precision holds
REPRESENTABLE = (1e-280, 1e280)  # those squares


def _safe(v: Tensor) -> tuple[float, float]:
    """Between which no square that matters to a norm leaves the range."""
    return (1e-15, 1e15) if v.dtype in (torch.float32, torch.complex64) else _RANGE


def _all(flags: np.ndarray) -> bool:
    """flags.all(), in less than half of the time for a few."""
    return np.count_nonzero(flags) == flags.size


class FloatScalars:
    """One right-hand side on the CPU; scalars are Python floats and vectors (n, 1)."""

    check_every = 1
    active: Any = True

    sqrt = staticmethod(math.sqrt)
    maximum = staticmethod(max)
    minimum = staticmethod(min)
    hypot = staticmethod(math.hypot)

    def full(self, value: float) -> float:
        """Return the constant scalar ``value``."""
        return value

    def div(self, a: float, b: float) -> float:
        """Return a / b, and 0 where b vanishes (a breakdown, where the quotient is not used)."""
        return a / b if b > TINY else 0.0

    def inverse(self, b: float) -> float:
        """Return 1 / b, and 0 where b vanishes."""
        return 1.0 / b if b > TINY else 0.0

    def norm(self, v: Tensor) -> float:
        """Return ||v||."""
        norm = torch.linalg.vector_norm(v).item()
        low, high = _safe(v)
        return norm if low < norm < high else safe_norm(v).item()

    def inner_norm(self, v: Tensor, w: Tensor) -> float:
        """Return (v^H w)^(1/2) for w = N v, N positive definite."""
        return math.sqrt(max(torch.vdot(v[:, 0], w[:, 0]).real.item(), 0.0))

    def scale(self, y: Tensor, a: float) -> None:
        """Y <- a y."""
        y.mul_(a)

    def axpy(self, y: Tensor, a: float, x: Tensor) -> None:
        """Y <- y + a x; a may lie beyond the range of single precision, where a x does not."""
        if abs(a) > _LARGE and math.isfinite(a):
            root = math.sqrt(abs(a))
            x, a = x * root, a / root
        y.add_(x, alpha=a)

    def xpay(self, y: Tensor, x: Tensor, a: float) -> None:
        """Y <- x + a y."""
        torch.add(x, y, alpha=a, out=y)

    def live(self, a: float) -> float:
        """Return the coefficient, or zero for a frozen column."""
        return a

    def to_host(self, a: float) -> np.ndarray:
        """Return a scalar as a NumPy array with one entry per column."""
        return np.array([a])


class ArrayScalars:
    """Many columns (and batch members) on the CPU; scalars are float64 NumPy arrays."""

    check_every = 1
    sqrt = staticmethod(np.sqrt)
    maximum = staticmethod(np.maximum)
    minimum = staticmethod(np.minimum)
    hypot = staticmethod(np.hypot)

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.active = np.ones(shape, dtype=bool)
        self._all_active = True

    def full(self, value: float) -> np.ndarray:
        """Return the constant scalar ``value``."""
        return np.full(self.active.shape, value)

    def div(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return a / b, and 0 where b vanishes (a breakdown, where the quotient is not used)."""
        safe = b > TINY
        return a / b if _all(safe) else np.divide(a, b, out=np.zeros_like(b), where=safe)

    def inverse(self, b: np.ndarray) -> np.ndarray:
        """Return 1 / b, and 0 where b vanishes."""
        safe = b > TINY
        return 1.0 / b if _all(safe) else np.divide(1.0, b, out=np.zeros_like(b), where=safe)

    def norm(self, v: Tensor) -> np.ndarray:
        """Return ||v|| of each column."""
        norm = column_norms(v).numpy()
        low, high = _safe(v)
        if not _all((norm > low) & (norm < high)):
            norm = safe_norm(v).numpy()
        return norm if norm.dtype == np.float64 else norm.astype(np.float64)

    def inner_norm(self, v: Tensor, w: Tensor) -> np.ndarray:
        """Return (v^H w)^(1/2) for w = N v, N positive definite."""
        inner = (v.conj() * w).sum(-2).real.to(torch.float64)
        return inner.clamp_min_(0).sqrt_().numpy()

    def _coefficient(self, a: np.ndarray, y: Tensor) -> Tensor:
        coefficient = torch.from_numpy(a[..., None, :])
        return coefficient if y.dtype == torch.float64 else coefficient.to(y.dtype)

    def scale(self, y: Tensor, a: np.ndarray) -> None:
        """Y <- y diag(a)."""
        _columns.scale(y, self._coefficient(a, y))

    def axpy(self, y: Tensor, a: np.ndarray, x: Tensor) -> None:
        """Y <- y + x diag(a)."""
        _columns.axpy(y, self._coefficient(a, y), x)

    def xpay(self, y: Tensor, x: Tensor, a: np.ndarray) -> None:
        """Y <- x + y diag(a)."""
        _columns.xpay(y, x, self._coefficient(a, y))

    def live(self, a: np.ndarray) -> np.ndarray:
        """Return the coefficients, zero for frozen columns."""
        return a if self._all_active else np.where(self.active, a, 0.0)

    def to_host(self, a: np.ndarray) -> np.ndarray:
        """Return a scalar as a NumPy array with one entry per column."""
        return a

    def all_to_host(self, *scalars: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return several scalars as NumPy arrays."""
        return scalars

    def told(self, *norms: np.ndarray) -> None:
        """Nothing to note: every norm is looked at."""

    def keep(self, a: np.ndarray, columns: Tensor) -> np.ndarray:
        """Return the entries of these columns."""
        return a[..., columns.numpy()]

    def freeze(self, running: np.ndarray) -> None:
        """Let only these columns be active."""
        self.active = running
        self._all_active = bool(running.all())


class TensorScalars:
    """Columns on an accelerator; scalars stay there, and the host asks every few iterations."""

    check_every = 8
    sqrt = staticmethod(torch.sqrt)
    maximum = staticmethod(torch.maximum)
    minimum = staticmethod(torch.minimum)
    hypot = staticmethod(torch.hypot)

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.active = torch.ones(shape, dtype=torch.bool, device=device)
        # as tensors: each number given to torch.where would be written to the device again
        self._zero, self._inf = (
            torch.full((), value, dtype=torch.float64, device=device) for value in (0.0, math.inf)
        )
        self._extreme = True  # unless the first norms of a run are seen not to be
        self._divisors: collections.deque[tuple[Tensor, Tensor]] = collections.deque(maxlen=4)

    def full(self, value: float) -> Tensor:
        """Return the constant scalar ``value``."""
        return torch.full(self.active.shape, value, dtype=torch.float64, device=self.active.device)

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        """Return a / b, and 0 where b vanishes (a breakdown, where the quotient is not used)."""
        return a / self._divisor(b)

    def inverse(self, b: Tensor) -> Tensor:
        """Return 1 / b, and 0 where b vanishes."""
        return 1.0 / self._divisor(b)

    def _divisor(self, b: Tensor) -> Tensor:
        """Return b, infinite where it vanishes; most are divided by more than once."""
        for known, divisor in self._divisors:
            if known is b:
                return divisor
        divisor = torch.where(b > TINY, b, self._inf)
        self._divisors.append((b, divisor))
        return divisor

    def norm(self, v: Tensor) -> Tensor:
        """Return ||v|| of each column.

        Single precision is summed in double; double precision is scaled by powers of two while the
        norms of the run may leave its range.
        """
        if v.dtype in (torch.float32, torch.complex64):
            wide = torch.complex128 if v.is_complex() else torch.float64
            return torch.linalg.vector_norm(v, dim=-2, dtype=wide)
        return scaled_norm(v) if self._extreme else torch.linalg.vector_norm(v, dim=-2)

    def told(self, *norms: np.ndarray) -> None:
        """Take note of the first norms of a run, of b, A^H b and A, which the host has seen."""
        low, high = _RANGE
        self._extreme = any((((n <= low) & (n > 0)) | ~(n < high)).any() for n in norms)

    def inner_norm(self, v: Tensor, w: Tensor) -> Tensor:
        """Return (v^H w)^(1/2) for w = N v, N positive definite."""
        return (v.conj() * w).sum(-2).real.to(torch.float64).clamp_min_(0).sqrt_()

    def _coefficient(self, a: Tensor, y: Tensor) -> Tensor:
        return a.to(y.dtype).unsqueeze(-2)

    def scale(self, y: Tensor, a: Tensor) -> None:
        """Y <- y diag(a)."""
        y.mul_(self._coefficient(a, y))

    def axpy(self, y: Tensor, a: Tensor, x: Tensor) -> None:
        """Y <- y + x diag(a)."""
        y.addcmul_(x, self._coefficient(a, y))

    def xpay(self, y: Tensor, x: Tensor, a: Tensor) -> None:
        """Y <- x + y diag(a)."""
        torch.addcmul(x, y, self._coefficient(a, y), out=y)

    def live(self, a: Tensor) -> Tensor:
        """Return the coefficients, zero for frozen columns."""
        return torch.where(self.active, a, self._zero)

    def to_host(self, a: Tensor) -> np.ndarray:
        """Return a scalar as a NumPy array with one entry per column."""
        return a.cpu().numpy()

    def all_to_host(self, *scalars: Tensor) -> tuple[np.ndarray, ...]:
        """Return several scalars as NumPy arrays, in one transfer."""
        return tuple(torch.stack(scalars).cpu().numpy())

    def keep(self, a: Tensor, columns: Tensor) -> Tensor:
        """Return the entries of these columns."""
        return a.index_select(-1, columns)

    def freeze(self, running: np.ndarray) -> None:
        """Let only these columns be active."""
        self.active = torch.from_numpy(running).to(self.active.device)


Scalars: TypeAlias = Any  # one of the three; their scalars have no common type


def scalars_for(block: Tensor) -> Scalars:
    """Choose where the scalars of a block of columns (..., n, k) live."""
    shape = block.shape[:-2] + block.shape[-1:]
    if block.device.type != "cpu":
        return TensorScalars(shape, block.device)
    if shape == (1,):
        return FloatScalars()
    return ArrayScalars(shape)


def one_column(op: Any, scalars: Scalars) -> Any:
    """The operator's passes for a single column on the CPU; None where products are to be used."""
    passes = getattr(op, "passes", None)
    return passes() if passes is not None and isinstance(scalars, FloatScalars) else None


def keep_columns(state: Any, vectors: tuple[str, ...], scalars: tuple[str, ...], columns: Tensor):
    """Drop all but these columns of the named vectors and scalars of a method's state."""
    for name in vectors:
        setattr(state, name, getattr(state, name).index_select(-1, columns))
    for name in scalars:
        setattr(state, name, state.scalars.keep(getattr(state, name), columns))
