"""Random problems of every shape, dtype, layout and scale, and what must hold of each.

    python -m tests.fuzz --cases 100000 [--seed 0]

runs that many (a seed per thousand, so that a failure can be run again on its own); a fixed small
number of them is part of the test suite (test_properties.py).

What must hold: no crash; no input written to; every output finite, or a status and a warning
that say otherwise; and where the status says solved, the optimality condition
A^H W (b - A x) = damp^2 (x - x0), evaluated in extended precision and range.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import scipy.sparse
import torch
from torch import Tensor

import funclsq as fl

DTYPES = (torch.float64, torch.float32, torch.complex128, torch.complex64)
SOLVERS = ("auto", "qr", "svd", "cholesky", "lsmr", "lsqr", "cgls")
LAYOUTS = ("dense", "sparse", "repeated", "coo", "csr", "csc", "bsr", "bsc", "scipy", "operator")
_HALF_RANGE = {torch.float32: 36, torch.float64: 300}


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
        return scipy.sparse.coo_array((values.numpy(), (row, col)), shape=(m, n))
    index = torch.from_numpy(np.stack((row, col)).astype(np.int64))
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


def _powers(draw: Any, size: int, top: int) -> np.ndarray:
    """Powers of ten, with the limits of the range drawn often."""
    exponent = st.one_of(st.integers(-top, top), st.sampled_from((-top, 0, 0, top)))
    return 10.0 ** np.array([draw(exponent) for _ in range(size)], dtype=float)


@st.composite
def cases(draw: Any, mild: bool = False, batches: bool = True) -> Case:
    """Draw a case; ``mild`` leaves out extreme scales."""
    dtype = draw(st.sampled_from(DTYPES))
    real = dtype.to_real()
    layout = draw(st.sampled_from(LAYOUTS))
    solvers = SOLVERS if layout != "operator" else ("auto", "lsmr", "lsqr", "cgls")
    solver = draw(st.sampled_from(solvers))
    sizes = st.one_of(st.integers(1, 9), st.sampled_from((0, 1, 2, 17)))
    m, n = draw(sizes), draw(sizes)
    if layout in ("bsr", "bsc") and 0 in (m, n):
        layout = "csr"  # torch has no empty blocks
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    lead: tuple[int, ...] = ()
    if batches and layout in ("dense", "sparse", "repeated"):
        lead = draw(st.sampled_from(((), (), (), (1,), (3,), (0,), (2, 2))))
    rank = draw(st.one_of(st.just(min(m, n)), st.integers(0, min(m, n))))
    A = _entries(rng, (*lead, m, n), dtype)
    stored = rng.random((m, n)) < draw(st.sampled_from((0.0, 0.3, 0.6, 1.0)))
    if rank < min(m, n):
        left = _entries(rng, (*lead, m, rank), dtype) * (rng.random((m, rank)) < 0.7)
        A = left @ _entries(rng, (*lead, rank, n), dtype)
        stored = np.ones((m, n), bool)
    A = A * stored
    row, col = np.nonzero(stored)
    order = rng.permutation(row.size)
    row, col = row[order], col[order]
    vector = draw(st.booleans()) and not lead
    k = draw(st.sampled_from((1, 1, 2, 3, 0)))
    b = _entries(rng, (*lead, m) if vector else (*lead, m, k), dtype)
    if draw(st.integers(0, 5)) == 0:  # consistent
        b = A @ _entries(rng, (*lead, n) if vector else (*lead, n, k), dtype)
    if draw(st.integers(0, 9)) == 0:
        b = 0 * b
    damp: Any = draw(st.sampled_from((0.0, 0.0, 0.5, "scalar", "vector", "partly")))
    d = rng.integers(1, 25, n) / 16
    if damp == "partly":
        d = d * (rng.random(n) < 0.5)
    if isinstance(damp, str):
        damp = torch.tensor(0.75, dtype=real) if damp == "scalar" else torch.from_numpy(d).to(real)
    weights = None
    kind = draw(st.sampled_from((None, None, "rows", "zeros", "columns")))
    if kind is not None:
        shape = (m, k) if kind == "columns" and not vector else (m,)
        w = rng.integers(1, 33, shape) / 16
        if kind != "rows":
            w = w * (rng.random(shape) < 0.7)
        weights = torch.from_numpy(w).to(real)
    x0 = None
    if draw(st.integers(0, 3)) == 0:
        x0 = _entries(rng, (n,) if vector else (n, k), dtype)
    scaling = "none" if mild else draw(st.sampled_from(("none", "all", "columns", "rows", "tiny")))
    if scaling != "none":
        top = _HALF_RANGE[real]
        with np.errstate(all="ignore"):
            if scaling == "all":
                A = A * _powers(draw, 1, top)
            elif scaling == "columns":
                A = A * _powers(draw, n, top)
            elif scaling == "rows":
                A = A * _powers(draw, m, top)[:, None]
            else:
                A = A * np.float64(torch.finfo(real).tiny) / 64
            b = b * _powers(draw, 1, top)
    given = torch.from_numpy(np.ascontiguousarray(A)).to(dtype)
    rhs = torch.from_numpy(np.ascontiguousarray(b)).to(dtype)
    start = None if x0 is None else torch.from_numpy(x0).to(dtype)
    mild = scaling == "none"
    return Case(solver, layout, given, row, col, rhs, damp, weights, start, seed, mild)


def solve(case: Case, **more: Any) -> tuple[fl.Solution, list[Any]]:
    """Solve; also the warnings given. A warning that is not funclsq's own fails."""
    options = {"maxiter": 300} if case.solver in ("lsmr", "lsqr", "cgls") else {}
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        sol = fl.solve(case.matrix(), **case.operands(), solver=case.solver, **options, **more)
    for w in given:
        assert issubclass(w.category, fl.FunclsqWarning), w
    return sol, given


def _wide(t: Any) -> np.ndarray:
    """Extended precision and, above all, range."""
    a = t.detach().numpy() if isinstance(t, Tensor) else np.asarray(t)
    return a.astype(np.clongdouble if np.iscomplexobj(a) else np.longdouble)


def _norm(a: np.ndarray, axis: int | None = None) -> Any:
    return np.sqrt((np.abs(a) ** 2).sum(axis))


def columns(case: Case, sol: fl.Solution) -> Any:
    """Yield (A, x, b, w, d2, x0, status, residual_norm) of every column of every member."""
    vector = case.b.ndim == 1
    m, n = case.A.shape[-2:]

    def block(t: Any, rows: int) -> np.ndarray:
        t = _wide(t)
        t = t[..., None] if vector else t
        return t.reshape(count, *t.shape[-2:])

    count = int(np.prod(case.A.shape[:-2]))
    if count == 0 or (case.b.ndim > 1 and case.b.shape[-1] == 0):
        return

    x, b = block(sol.x, n), block(case.b, m)
    status = sol.status.numpy().reshape(len(x), -1)
    rnorm = sol.residual_norm.numpy().reshape(len(x), -1)
    A = _wide(case.A).reshape(count, m, n)
    w = np.ones((m, 1)) if case.weights is None else _wide(case.weights)
    w = w[:, None] if w.ndim == 1 else w
    d2 = np.broadcast_to(_wide(case.damp) ** 2, (n,))
    x0 = np.zeros((n, 1)) if case.x0 is None else _wide(case.x0)
    x0 = x0[:, None] if x0.ndim == 1 else x0
    for i in range(len(x)):
        for j in range(x.shape[-1]):
            args = A[i % len(A)], x[i, :, j], b[i, :, j], w[:, j % w.shape[1]], d2
            yield (*args, x0[:, j % x0.shape[1]], fl.Status(int(status[i, j])), rnorm[i, j])


def check_solution(case: Case, sol: fl.Solution, given: list[Any]) -> None:
    """Finite or said not to be; optimal where it is said to be."""
    lead, vector = tuple(case.A.shape[:-2]), case.b.ndim == 1
    n = case.A.shape[-1]
    assert sol.x.shape == (*lead, n, *(() if vector else case.b.shape[-1:]))
    assert sol.x.dtype == case.dtype
    if not bool(sol.converged.all()):
        assert any(issubclass(w.category, fl.ConvergenceWarning) for w in given)
    eps = float(torch.finfo(case.dtype).eps)
    smallest = torch.finfo(case.dtype.to_real()).smallest_normal * eps
    largest = float(torch.finfo(case.dtype.to_real()).max)
    for A, x, b, w, d2, x0, status, rnorm in columns(case, sol):
        if not status.converged:
            continue
        assert np.isfinite(x).all(), f"{status.name} with {x}"
        root = np.sqrt(w)
        B = np.concatenate((root[:, None] * A, np.diag(np.sqrt(d2))))
        r = np.concatenate((root * (b - A @ x), -np.sqrt(d2) * (x - x0)))
        size = _norm(B)
        true_rnorm = _norm(r[: len(b)])
        # entries of W^(1/2) A near the end of the range have fewer digits than eps says
        floor = smallest * np.sqrt(B.size + 1)
        lost = eps + (floor / size if size > 0 else 0)
        terms = size * _norm(x) + _norm(root * b) + size * _norm(x0)
        if true_rnorm < largest / 4 and terms < largest:
            assert np.isfinite(rnorm), f"{status.name} with residual {rnorm}"
            assert abs(rnorm - true_rnorm) <= 0.01 * true_rnorm + 100 * lost * terms + floor * (
                1 + size
            )
        many = 20 * max(*A.shape, 1)
        s = _norm(B.conj().T @ r)
        bound = size * (many * lost * terms + floor * (1 + size))
        assert s <= bound, (
            f"{case.solver} on {case.layout} {tuple(A.shape)} {case.dtype}, {status.name}: "
            f"||A^H W r - damp^2 (x - x0)|| = {s:.2e} exceeds {bound:.2e}"
        )


def check(case: Case) -> None:
    """Everything that must hold of any case."""
    tensors = [t for t in (case.A, *case.operands().values()) if isinstance(t, Tensor)]
    before = [t.clone() for t in tensors]
    sol, given = solve(case)
    for t, old in zip(tensors, before):
        assert torch.equal(t, old)
    check_solution(case, sol, given)


_SETTINGS = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(hypothesis.HealthCheck),
}


def run(strategy: Any, test: Any, examples: int, seed: int | None = None) -> None:
    """Run ``test`` on drawn cases: always the same ones, or those of a seed."""
    checked = hypothesis.given(strategy)(test)
    if seed is not None:
        checked = hypothesis.seed(seed)(checked)
    fixed = hypothesis.settings(max_examples=examples, derandomize=seed is None, **_SETTINGS)
    fixed(checked)()


def main() -> None:
    """Run many cases, in batches of a thousand that have a seed each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start, done = time.monotonic(), 0
    while done < args.cases:
        seed = args.seed + done // 1000
        print(f"seed {seed}: cases {done} to {done + 999}, {time.monotonic() - start:.0f} s")
        run(cases(), lambda case: check(case), min(1000, args.cases - done), seed)
        done += 1000
    print(f"{args.cases} cases held, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
