"""Random problems of every shape, dtype, layout and scale.

The same drawing is led by hypothesis (which reduces what fails) or by a seed alone (faster, for
long runs): :class:`Drawn` and :class:`Seeded`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import scipy.sparse
import torch
from torch import Tensor

import funclsq as fl

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)
SOLVERS = ("auto", "qr", "svd", "cholesky", "lsmr", "lsqr", "cgls")
KRYLOV = ("lsmr", "lsqr", "cgls")
# sparse, and sparse enough to be factored so (the normal matrix is at most 15% full)
LARGE = ((120, 90), (90, 120), (150, 110), (200, 70), (70, 200), (130, 130))
LARGE_SOLVERS = ("cholesky", "cholesky", "cholesky", "auto", "auto", "lsmr", "lsqr", "cgls", "qr")
LARGE_LAYOUTS = ("sparse", "sparse", "repeated", "coo", "csr", "csc", "bsr", "bsc", "scipy")
LAYOUTS = ("dense", "sparse", "repeated", "coo", "csr", "csc", "bsr", "bsc", "scipy", "operator")
LEADS: tuple[tuple[int, ...], ...] = ((), (), (), (1,), (3,), (0,), (2, 2))
_HALF_RANGE = {torch.float32: 36, torch.float64: 300}


class Drawn:
    """Choices made by hypothesis."""

    def __init__(self, draw: Any) -> None:
        self._draw = draw

    def one_of(self, options: Sequence[Any]) -> Any:
        return self._draw(st.sampled_from(options))

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))


class Seeded:
    """Choices made by a seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def one_of(self, options: Sequence[Any]) -> Any:
        return options[int(self._rng.integers(len(options)))]

    def integer(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high, endpoint=True))


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem: a matrix or a batch of them on a pattern, operands, and how they are passed."""

    solver: str
    layout: str
    A: Tensor  # (m, n) or (B, m, n), zero off the pattern
    row: np.ndarray
    col: np.ndarray
    b: Tensor
    damp: Any
    weights: Tensor | None
    x0: Tensor | None
    seed: int
    mild: bool  # no scaling beyond a few powers of ten

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    def matrix(self) -> Any:
        """A as the layout has it."""
        return wrap(self.A, self.layout, self.row, self.col)

    def on(self, device: str | None) -> Case:
        """The same on a device, where SciPy's matrices are not at home."""
        if device is None:
            return self

        def there(t: Any) -> Any:
            return t.to(device) if isinstance(t, Tensor) else t

        return dataclasses.replace(
            self,
            layout="csr" if self.layout == "scipy" else self.layout,
            **{name: there(getattr(self, name)) for name in ("A", "b", "damp", "weights", "x0")},
        )

    def operands(self) -> dict[str, Any]:
        """The operands but A."""
        return {"b": self.b, "damp": self.damp, "weights": self.weights, "x0": self.x0}


def _product(params: Any, v: Tensor) -> Tensor:
    return params[0] @ v


def _adjoint(params: Any, u: Tensor) -> Tensor:
    return params[0].mH @ u


def wrap(A: Tensor, layout: str, row: np.ndarray, col: np.ndarray) -> Any:
    """Pass a dense A, which is zero off the pattern, in a layout."""
    m, n = A.shape[-2:]
    if layout == "dense":
        return A
    if layout == "operator":
        return fl.LinearOperator(_product, (m, n), (A,), rmatvec=_adjoint)
    values = A[..., row, col]
    if layout == "sparse":
        return fl.Sparse(fl.SparsityPattern(row, col, (m, n)), values)
    if layout == "repeated":  # a quarter and three quarters sum exactly, but for subnormals
        twice = fl.SparsityPattern(np.tile(row, 2), np.tile(col, 2), (m, n))
        return fl.Sparse(twice, torch.cat((0.25 * values, 0.75 * values), -1))
    if layout == "scipy":
        return scipy.sparse.coo_array((values.detach().numpy(), (row, col)), shape=(m, n))
    index = torch.from_numpy(np.stack((row, col)).astype(np.int64)).to(A.device)
    coo = torch.sparse_coo_tensor(index, values, (m, n), check_invariants=True)
    if layout == "coo":
        return coo
    if layout in ("csr", "csc"):
        return coo.to_sparse(layout=getattr(torch, f"sparse_{layout}"))
    size = tuple(next(s for s in (3, 2, 1) if d % s == 0) for d in (m, n))
    return A.to_sparse(layout=getattr(torch, f"sparse_{layout}"), blocksize=size)


def _entries(rng: np.random.Generator, shape: Any, dtype: torch.dtype) -> np.ndarray:
    """Random multiples of 1/16."""
    out = rng.integers(-24, 25, shape) / 16
    if dtype.is_complex:
        out = out + 1j * rng.integers(-24, 25, shape) / 16
    return out


def _powers(rng: np.random.Generator, size: int, top: int) -> np.ndarray:
    """Powers of ten, with the limits of the range drawn often."""
    ends = rng.choice((-top, 0, 0, top), size)
    return 10.0 ** np.where(rng.random(size) < 0.5, ends, rng.integers(-top, top, size)).astype(
        float
    )


@st.composite
def cases(draw: Any, mild: bool = False, batches: bool = True, large: bool = False) -> Case:
    """Draw a case; ``mild`` leaves out extreme scales."""
    return make(Drawn(draw), mild, batches, large)


def make(pick: Any, mild: bool = False, batches: bool = True, large: bool = False) -> Case:
    """Make a case by the choices of ``pick``; a ``large`` one is sparse."""
    dtype = pick.one_of(DTYPES)
    layout = pick.one_of(LARGE_LAYOUTS if large else LAYOUTS)
    solvers = LARGE_SOLVERS if large else SOLVERS
    solver = pick.one_of(solvers if layout != "operator" else ("auto", *KRYLOV))
    if large:
        m, n = pick.one_of(LARGE)
    else:
        m, n = (pick.one_of((0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 17)) for _ in range(2))
    if layout in ("bsr", "bsc") and 0 in (m, n):
        layout = "csr"  # torch has no empty blocks
    seed = pick.integer(0, 2**32 - 1)
    rng = np.random.default_rng(seed)
    lead = pick.one_of(LEADS) if batches and layout in ("dense", "sparse", "repeated") else ()
    A, row, col = (_large if large else _matrix)(pick, rng, (*lead, m, n), dtype)
    vector = bool(pick.integer(0, 1)) and not lead
    k = pick.one_of((1, 1, 2, 3, 0))
    b = _entries(rng, (*lead, m) if vector else (*lead, m, k), dtype)
    if pick.integer(0, 5) == 0:  # consistent
        b = A @ _entries(rng, (*lead, n) if vector else (*lead, n, k), dtype)
    if pick.integer(0, 9) == 0:
        b = 0 * b
    real = dtype.to_real()
    damp = _damping(pick, rng, n, real)
    weights = None
    kind = pick.one_of((None, None, "rows", "zeros", "columns"))
    if kind is not None:
        shape = (m, k) if kind == "columns" and not vector else (m,)
        w = rng.integers(1, 33, shape) / 16
        if kind != "rows":
            w = w * (rng.random(shape) < 0.7)
        weights = torch.from_numpy(w).to(real)
    x0 = None
    if pick.integer(0, 3) == 0:
        x0 = _entries(rng, (n,) if vector else (n, k), dtype)
    scaling = "none" if mild else pick.one_of(("none", "all", "columns", "rows", "tiny"))
    A, b = _scaled(rng, A, b, scaling, real)
    given = torch.from_numpy(np.ascontiguousarray(A)).to(dtype)
    rhs = torch.from_numpy(np.ascontiguousarray(b)).to(dtype)
    start = None if x0 is None else torch.from_numpy(x0).to(dtype)
    mild = scaling == "none"
    return Case(solver, layout, given, row, col, rhs, damp, weights, start, seed, mild)


def _matrix(pick: Any, rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """A of some rank, zero off a pattern, and the pattern in random order."""
    *lead, m, n = shape
    rank = pick.one_of((min(m, n), pick.integer(0, min(m, n))))
    A = _entries(rng, shape, dtype)
    stored = rng.random((m, n)) < pick.one_of((0.0, 0.3, 0.6, 1.0))
    if rank < min(m, n):
        left = _entries(rng, (*lead, m, rank), dtype) * (rng.random((m, rank)) < 0.7)
        A = left @ _entries(rng, (*lead, rank, n), dtype)
        stored = np.ones((m, n), bool)
    if pick.integer(0, 4) == 0:  # empty rows and columns
        stored &= (rng.random((m, 1)) < 0.7) & (rng.random(n) < 0.7)
    row, col = np.nonzero(stored)
    order = rng.permutation(row.size)
    return A * stored, row[order], col[order]


def _large(pick: Any, rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """About 2% full, with a diagonal or without, some columns twice or empty."""
    *lead, m, n = shape
    A = _entries(rng, shape, dtype)
    stored = rng.random((m, n)) < pick.one_of((0.01, 0.02, 0.03))
    if pick.integer(0, 3) > 0:
        stored |= np.eye(m, n, dtype=bool)
        A = A + 2 * np.eye(m, n)  # where most columns are told apart
    if pick.integer(0, 3) == 0:
        source, copy = rng.permutation(n)[:10].reshape(2, 5)
        A[..., copy], stored[:, copy] = A[..., source], stored[:, source]
    row, col = np.nonzero(stored)
    order = rng.permutation(row.size)
    return A * stored, row[order], col[order]


def _damping(pick: Any, rng: np.random.Generator, n: int, real: torch.dtype) -> Any:
    damp = pick.one_of((0.0, 0.0, 0.5, "scalar", "vector", "partly"))
    d = rng.integers(1, 25, n) / 16
    if damp == "partly":
        d = d * (rng.random(n) < 0.5)
    if damp == "scalar":
        return torch.tensor(0.75, dtype=real)
    return torch.from_numpy(d).to(real) if isinstance(damp, str) else damp


def _scaled(
    rng: np.random.Generator, A: np.ndarray, b: np.ndarray, scaling: str, real: torch.dtype
) -> tuple[np.ndarray, np.ndarray]:
    if scaling == "none":
        return A, b
    m, n = A.shape[-2:]
    top = _HALF_RANGE[real]
    with np.errstate(all="ignore"):
        if scaling == "all":
            A = A * _powers(rng, 1, top)
        elif scaling == "columns":
            A = A * _powers(rng, n, top)
        elif scaling == "rows":
            A = A * _powers(rng, m, top)[:, None]
        else:
            A = A * np.float64(torch.finfo(real).tiny) / 64
        return A, b * _powers(rng, 1, top)
