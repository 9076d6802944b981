"""The tables that every test draws from: problems, dtypes, layouts of A, and solvers.

Entries are small multiples of 1/16, so that they, and the products that make a matrix rank
deficient, are exact in float32: the rank is what it is said to be in every dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

import funclsq as fl

DTYPES = {"float32": torch.float32, "float64": torch.float64, "complex128": torch.complex128}
SOLVERS = ("auto", "qr", "svd", "cholesky", "lsmr", "lsqr", "cgls")
OPERANDS = ("A", "b", "damp", "weights", "x0")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A dense matrix with the pattern it is stored on, and the other operands (None: absent).

    ``factors`` (B, C) are given where A = B C is rank deficient; ``rank`` is that of the stacked
    [W^(1/2) A; damp I]. Directions from ``tangent`` keep that rank, and the pattern.
    """

    name: str
    A: np.ndarray
    stored: np.ndarray
    b: np.ndarray
    rank: int
    damp: np.ndarray | None = None
    weights: np.ndarray | None = None
    x0: np.ndarray | None = None
    factors: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def open(self) -> bool:
        """Whether every nearby A on the pattern has this rank."""
        return self.factors is None

    @property
    def names(self) -> tuple[str, ...]:
        """Operands that are there."""
        return tuple(n for n in OPERANDS if getattr(self, n) is not None)

    def tangent(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A random direction in which the rank stays."""
        out = {n: _like(rng, getattr(self, n)) for n in self.names}
        if self.factors is None:
            out["A"] = out["A"] * self.stored
        else:
            B, C = self.factors
            rows, cols = rng.standard_normal(self.A.shape[0]), rng.standard_normal(self.A.shape[1])
            moved = (_like(rng, B) * (B != 0)) @ C
            out["A"] = rows[:, None] * self.A + self.A * cols + moved
        return out

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The operands as tensors of this dtype."""
        return as_tensors({n: getattr(self, n) for n in self.names}, dtype)


def as_tensors(arrays: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, Tensor]:
    """Arrays as tensors of this dtype; damp and weights as its real part."""
    real = dtype.to_real()
    return {
        n: torch.from_numpy(np.asarray(a)).to(real if n in ("damp", "weights") else dtype)
        for n, a in arrays.items()
    }


def _like(rng: np.random.Generator, a: np.ndarray) -> np.ndarray:
    out = rng.standard_normal(a.shape)
    return out + 1j * rng.standard_normal(a.shape) if np.iscomplexobj(a) else out


def _grid(rng: np.random.Generator, shape: Any, complex_: bool, top: int = 24) -> np.ndarray:
    """Random non-zero multiples of 1/16."""

    def part():
        return rng.integers(4, top, shape) * rng.choice([-1, 1], shape) / 16

    return part() + 1j * part() if complex_ else part()


def _pattern(rng: np.random.Generator, m: int, n: int, density: float) -> np.ndarray:
    """A random pattern that holds the diagonal."""
    stored = rng.random((m, n)) < density
    stored[np.arange(m), np.arange(m) % n] = True
    stored[np.arange(n) % m, np.arange(n)] = True
    return stored


Maker = Callable[[np.random.Generator, bool], dict[str, Any]]
_MAKERS: dict[str, Maker] = {}


def _add(name: str) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        _MAKERS[name] = make
        return make

    return register


@functools.cache
def problem(name: str, complex_: bool = False) -> Problem:
    """Make the problem of this name, real or complex."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return Problem(name, **_MAKERS[name](rng, complex_))


def problem_for(name: str, dtype: torch.dtype) -> Problem:
    """Make the problem of this name for this dtype."""
    return problem(name, dtype.is_complex)


def _full(m: int, n: int, k: int | None = 2, density: float = 0.6, **more: Callable[..., Any]):
    """A maker of a problem of full rank; ``more`` makes further operands from (rng, complex)."""

    def make(rng: np.random.Generator, cx: bool) -> dict[str, Any]:
        stored = _pattern(rng, m, n, density)
        A = _grid(rng, (m, n), cx) * stored
        b = _grid(rng, (m,) if k is None else (m, k), cx)
        return {
            "A": A,
            "stored": stored,
            "b": b,
            "rank": n if "damp" in more else min(m, n),
            **{key: f(rng, cx) for key, f in more.items()},
        }

    return make


def _deficient(m: int, n: int, rank: int, k: int | None = 2, **more: Callable[..., Any]):
    """A maker of a problem whose A = B C has a lower rank."""

    def make(rng: np.random.Generator, cx: bool) -> dict[str, Any]:
        B = _grid(rng, (m, rank), cx) * _pattern(rng, m, rank, 0.6)
        C = _grid(rng, (rank, n), cx, 16) * _pattern(rng, rank, n, 0.4)
        A = B @ C
        out = {
            "A": A,
            "stored": (B != 0).astype(int) @ (C != 0) > 0,
            "b": _grid(rng, (m,) if k is None else (m, k), cx),
            "rank": rank,
            "factors": (B, C),
            **{key: f(rng, cx) for key, f in more.items()},
        }
        damp, weights = out.get("damp"), out.get("weights")
        W = np.ones(m) if weights is None else (weights if weights.ndim == 1 else weights[:, 0])
        D = np.zeros(n) if damp is None else np.broadcast_to(damp, (n,))
        out["rank"] = int(np.linalg.matrix_rank(np.vstack((np.sqrt(W)[:, None] * A, np.diag(D)))))
        if out["rank"] == n:
            out["factors"] = None
        return out

    return make


def _weights(*shape: int, zeros: bool = False) -> Callable[..., np.ndarray]:
    def make(rng: np.random.Generator, cx: bool) -> np.ndarray:
        w = rng.integers(2, 32, shape) / 16
        if zeros:
            w[1] = 0
            if w.ndim == 2:
                w[3, -1] = 0
        return w

    return make


def _x0(*shape: int) -> Callable[..., np.ndarray]:
    return lambda rng, cx: _grid(rng, shape, cx)


def _constant(value: Any) -> Callable[..., np.ndarray]:
    return lambda rng, cx: np.asarray(value, dtype=float)


_MAKERS.update(
    tall=_full(7, 4),
    tall_vector=_full(7, 4, None),
    square=_full(5, 5),
    wide=_full(4, 7),
    deficient_tall=_deficient(8, 5, 3),
    deficient_wide=_deficient(4, 7, 2),
    deficient_square=_deficient(5, 5, 3, None),
    damped=_full(7, 4, damp=_constant(0.75)),
    damped_wide=_full(4, 7, damp=_constant(0.5)),
    damped_columns=_full(7, 4, damp=_constant([0.5, 1.0, 0.25, 2.0])),
    damped_partly=_deficient(8, 5, 3, damp=_constant([0.5, 0, 0, 0, 0])),
    damped_deficient=_deficient(8, 5, 3, damp=_constant(0.5)),
    damp_zero_tensor=_full(7, 4, damp=_constant(0.0)),
    weighted=_full(7, 4, weights=_weights(7)),
    weighted_zeros=_full(9, 4, weights=_weights(9, zeros=True)),
    weighted_wide=_full(4, 7, weights=_weights(4)),
    weighted_columns=_full(9, 4, weights=_weights(9, 2, zeros=True)),
    weighted_deficient=_deficient(9, 5, 3, weights=_weights(9, zeros=True)),
    started=_full(7, 4, x0=_x0(4, 2)),
    started_wide=_full(4, 7, x0=_x0(7, 2)),
    started_deficient=_deficient(8, 5, 3, x0=_x0(5, 2)),
    started_vector=_deficient(8, 5, 3, None, x0=_x0(5)),
    everything=_full(
        8, 4, damp=_constant([0.5, 1, 0.25, 2]), weights=_weights(8, 2, zeros=True), x0=_x0(4, 2)
    ),
    everything_deficient=_deficient(
        9,
        5,
        3,
        damp=_constant([0.0, 0.75, 0.0, 0.0, 0.0]),
        weights=_weights(9, zeros=True),
        x0=_x0(5, 2),
    ),
    one_row=_full(1, 4, density=1.0),
    one_column=_full(6, 1, density=1.0),
    one_entry=_full(1, 1, None, density=1.0),
    no_columns_in_b=_full(7, 4, 0),
    five_columns_in_b=_full(7, 4, 5),
)


@_add("zero_column")
def _zero_column(rng, cx):
    out = _full(6, 4)(rng, cx)
    out["stored"][:, 2] = False
    out["A"][:, 2] = 0
    out["rank"] = 3
    return out


@_add("stored_zero_column")
def _stored_zero_column(rng, cx):
    """A column of stored zeros: a direction in it would change the rank."""
    out = _deficient(6, 4, 3)(rng, cx)
    C = np.eye(3, 4) + 0 * out["factors"][1]
    B = out["factors"][0]
    out.update(A=B @ C, factors=(B, C))
    out["stored"] = B @ C != 0
    out["stored"][:2, 3] = True
    return out


@_add("zero_row")
def _zero_row(rng, cx):
    out = _full(6, 3)(rng, cx)
    out["stored"][4] = False
    out["A"][4] = 0
    return out


@_add("empty")
def _empty(rng, cx):
    out = _full(5, 3, x0=_x0(3, 2))(rng, cx)
    out.update(A=0 * out["A"], stored=np.zeros((5, 3), bool), rank=0)
    return out


@_add("graded")
def _graded(rng, cx):
    """Columns of very different units."""
    out = _full(9, 4, density=0.8)(rng, cx)
    out["A"] = out["A"] * 2.0 ** np.array([0, 6, -6, 4])
    return out


PROBLEMS = tuple(_MAKERS)


# ---------------------------------------------------------------------------------------------
# Layouts of A.


@dataclasses.dataclass(frozen=True)
class Layout:
    """How A is passed: a tensor that is differentiated (the leaf), wrapped.

    ``leaf(A, stored)`` is linear in A, ``wrap(leaf, stored)`` is what funclsq is given, and
    ``pull(A_bar, stored)`` is the gradient that the leaf should get where a dense A gets A_bar.
    """

    name: str
    leaf: Callable[[Tensor, np.ndarray], Tensor]
    wrap: Callable[[Tensor, np.ndarray], Any]
    pull: Callable[[Tensor, np.ndarray], Tensor]
    functional: bool = True  # can be used inside torch.func
    differentiable: bool = True


def _shuffled(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    row, col = np.nonzero(stored)
    order = np.random.default_rng(row.size).permutation(row.size)
    return row[order], col[order]


def _entries(A: Tensor, stored: np.ndarray) -> Tensor:
    row, col = _shuffled(stored)
    return A[..., row, col]


@functools.lru_cache(256)
def _shared_pattern(row: bytes, col: bytes, shape: tuple[int, int]) -> fl.SparsityPattern:
    return fl.SparsityPattern(np.frombuffer(row, np.int64), np.frombuffer(col, np.int64), shape)


def pattern(row: np.ndarray, col: np.ndarray, shape: tuple[int, int]) -> fl.SparsityPattern:
    """One pattern object per content."""
    row, col = (np.asarray(i, np.int64) for i in (row, col))
    return _shared_pattern(row.tobytes(), col.tobytes(), shape)


def _sparse(values: Tensor, stored: np.ndarray) -> fl.Sparse:
    return fl.Sparse(pattern(*_shuffled(stored), stored.shape), values)


def _twice(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    row, col = _shuffled(stored)
    return np.concatenate((row, row)), np.concatenate((col, col))


def _halves(A: Tensor, stored: np.ndarray) -> Tensor:
    values = _entries(A, stored)
    return torch.cat((0.25 * values, 0.75 * values), -1)


def _scatter(values: Tensor, stored: np.ndarray) -> Tensor:
    """Values at their places in a dense matrix."""
    row, col = _shuffled(stored)
    flat = torch.from_numpy(row * stored.shape[1] + col)
    zero = torch.zeros(stored.size, dtype=values.dtype)
    return zero.index_add(0, flat, values).view(stored.shape)


def _matvec(stored: np.ndarray) -> Callable[..., Tensor]:
    return _products(stored.tobytes(), stored.shape)[0]


@functools.lru_cache(256)
def _products(data: bytes, shape: tuple[int, int]) -> tuple[Callable[..., Tensor], ...]:
    """One pair of functions per pattern, so that solves can share what they prepare."""
    stored = np.frombuffer(data, bool).reshape(shape)

    def matvec(params, v):
        return _scatter(params[0], stored) @ v

    def rmatvec(params, u):
        return _scatter(params[0], stored).mH @ u

    return matvec, rmatvec


def _operator(values: Tensor, stored: np.ndarray) -> fl.LinearOperator:
    matvec, _ = _products(stored.tobytes(), stored.shape)
    return fl.LinearOperator(matvec, stored.shape, (values,))


def _operator_with_adjoint(values: Tensor, stored: np.ndarray) -> fl.LinearOperator:
    matvec, rmatvec = _products(stored.tobytes(), stored.shape)
    return fl.LinearOperator(matvec, stored.shape, (values,), rmatvec=rmatvec)


def _coo_tensor(index: Tensor, values: Tensor, shape: Any) -> Tensor:
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=True)


def _coo(A: Tensor, stored: np.ndarray) -> Tensor:
    row, col = np.nonzero(stored)
    index = torch.from_numpy(np.stack((row, col)))
    return _coo_tensor(index, A[row, col], A.shape).coalesce()


def _uncoalesced(A: Tensor, stored: np.ndarray) -> Tensor:
    index = torch.from_numpy(np.stack(_twice(stored)))
    return _coo_tensor(index, _halves(A, stored), A.shape)


def _blocks(shape: tuple[int, int]) -> tuple[int, int]:
    m, n = shape
    return next(s for s in (3, 2, 1) if m % s == 0), next(s for s in (2, 3, 1) if n % s == 0)


def _compressed(layout: torch.layout) -> Callable[[Tensor, np.ndarray], Tensor]:
    def convert(A: Tensor, stored: np.ndarray) -> Tensor:
        if layout in (torch.sparse_bsr, torch.sparse_bsc):
            marked = _coo(torch.from_numpy(stored).to(torch.float64), stored)
            like = marked.to_dense().to_sparse(layout=layout, blocksize=_blocks(A.shape))
            return _refilled(like, A)
        return _refilled(_coo(torch.ones(A.shape), stored).to_sparse(layout=layout), A)

    return convert


def _refilled(like: Tensor, A: Tensor) -> Tensor:
    """Put the entries of a dense A at the places of a compressed tensor."""
    by_row = like.layout in (torch.sparse_csr, torch.sparse_bsr)
    starts = like.crow_indices() if by_row else like.ccol_indices()
    minor = like.col_indices() if by_row else like.row_indices()
    major = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    row, col = (major, minor) if by_row else (minor, major)
    if like.values().ndim == 3:
        high, wide = like.values().shape[1:]
        row = row[:, None, None] * high + torch.arange(high)[:, None]
        col = col[:, None, None] * wide + torch.arange(wide)
    return torch.sparse_compressed_tensor(
        starts, minor, A[row, col], A.shape, layout=like.layout, check_invariants=False
    )


def _itself(leaf: Tensor, stored: np.ndarray) -> Tensor:
    return leaf


def _sparse_tensor(name: str, convert: Callable[[Tensor, np.ndarray], Tensor]) -> Layout:
    return Layout(name, convert, _itself, convert, functional=False)


def _scipy(A: Tensor, stored: np.ndarray) -> Any:
    row, col = _twice(stored)
    values = _halves(A.detach(), stored).numpy()
    return scipy.sparse.coo_array((values, (row, col)), shape=stored.shape)


def _uncoalesced_pull(A_bar: Tensor, stored: np.ndarray) -> Tensor:
    row, col = _twice(stored)
    return _coo_tensor(torch.from_numpy(np.stack((row, col))), A_bar[row, col], A_bar.shape)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("dense", lambda A, s: A, _itself, lambda A, s: A),
        Layout("sparse", _entries, _sparse, _entries),
        Layout(
            "repeated",
            _halves,
            lambda values, s: fl.Sparse(pattern(*_twice(s), s.shape), values),
            lambda A, s: torch.cat((_entries(A, s), _entries(A, s)), -1),
        ),
        Layout("matrix_free", _entries, _operator, _entries),
        Layout("matrix_free_adjoint", _entries, _operator_with_adjoint, _entries),
        _sparse_tensor("coo", _coo),
        Layout("coo_uncoalesced", _uncoalesced, _itself, _uncoalesced_pull, functional=False),
        _sparse_tensor("csr", _compressed(torch.sparse_csr)),
        _sparse_tensor("csc", _compressed(torch.sparse_csc)),
        _sparse_tensor("bsr", _compressed(torch.sparse_bsr)),
        _sparse_tensor("bsc", _compressed(torch.sparse_bsc)),
        Layout("scipy", lambda A, s: A, _scipy, lambda A, s: A, False, differentiable=False),
        Layout(
            "numpy",
            lambda A, s: A,
            lambda A, s: A.detach().numpy(),
            lambda A, s: A,
            False,
            differentiable=False,
        ),
    )
}


def function(p: Problem, layout: Layout | str = "sparse", **options: Any) -> Callable[..., Tensor]:
    """x as a function of the operands of p, in the order of ``p.names``; A as a leaf."""
    chosen = LAYOUTS[layout] if isinstance(layout, str) else layout

    def f(leaf: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        more = dict(zip(p.names[2:], rest))
        return fl.lstsq(chosen.wrap(leaf, p.stored), b, **more, **options)

    return f


def operands(p: Problem, dtype: torch.dtype, layout: Layout | str = "sparse") -> tuple[Any, ...]:
    """The operands of p in the order of ``p.names``; A as a leaf."""
    return leaves(p, p.tensors(dtype), layout)


def leaves(
    p: Problem, tensors: dict[str, Tensor], layout: Layout | str = "sparse"
) -> tuple[Any, ...]:
    """Tensors by name (operands or a direction), in the order of ``p.names``; A as a leaf."""
    chosen = LAYOUTS[layout] if isinstance(layout, str) else layout
    return tuple(chosen.leaf(tensors[n], p.stored) if n == "A" else tensors[n] for n in p.names)
