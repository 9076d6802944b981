"""Passes of one column by compiled loops: the numbers of the definition, when they are taken."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

import funclsq as fl
from funclsq import compiled, passes
from funclsq.methods._blocks import Adjoint
from funclsq.operators import SparseOp, StackedOp
from funclsq.raw import clear_cache

pytest.importorskip("numba")

from funclsq import loops

EVERY = [torch.float32, torch.float64, torch.complex64, torch.complex128]
DTYPES = pytest.mark.parametrize("dtype", EVERY, ids=str)
M, N, COUNT = 40, 23, 300


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Loops for the smallest work."""
    monkeypatch.setattr(passes, "LEAST", 0)
    clear_cache()
    yield
    clear_cache()


def drawn(dtype, batch=(), damped=False):
    """An operator with empty rows, empty columns and entries in no order."""
    g = torch.Generator().manual_seed(5)
    row = torch.randint(0, M // 2, (COUNT,), generator=g) * 2
    col = torch.randint(1, N, (COUNT,), generator=g)
    S = fl.SparsityPattern(row, col, (M, N))
    op = SparseOp(S, torch.randn((*batch, S.nnz_unique), generator=g, dtype=dtype))
    return StackedOp(op, 0.1 + torch.rand(N, generator=g, dtype=dtype.to_real())) if damped else op


def vector(size, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn((size, 1), generator=g, dtype=dtype).numpy()[:, 0]


def close(found, want, dtype):
    scale = 1 + np.abs(want).max() if np.size(want) else 1
    np.testing.assert_allclose(found, want, rtol=0, atol=100 * torch.finfo(dtype).eps * scale)


KINDS = {
    "A": lambda dtype: drawn(dtype),
    "[A; D]": lambda dtype: drawn(dtype, damped=True),
    "A^H": lambda dtype: Adjoint(drawn(dtype)),
}


def matrix(op):
    eye = torch.eye(op.shape[1], dtype=op.dtype)
    return torch.cat([op.mv(e.unsqueeze(1)) for e in eye], 1).numpy()


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_pass_is_what_it_says(kind, threads, dtype, monkeypatch):
    op = KINDS[kind](dtype)
    with monkeypatch.context() as patch:  # the matrix without the loops
        patch.setattr(passes, "LEAST", 1 << 60)
        A = matrix(KINDS[kind](dtype))
    if threads > 1:
        monkeypatch.setattr(compiled, "SHARE", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    m, n = op.shape
    way = op.passes()
    assert way.shape == (m, n)
    x, p = vector(n, dtype, 1), vector(n, dtype, 2)
    u, q = vector(m, dtype, 3), vector(m, dtype, 4)

    y = np.full(m, np.nan, u.dtype)
    square = way.apply(x, y)
    close(y, A @ x, dtype)
    close(square, np.linalg.norm(A @ x) ** 2, dtype)

    out = p.copy()
    way.adjoint(u, out)
    close(out, p + A.conj().T @ u, dtype)

    y, out = u.copy(), p.copy()
    square = way.through(x, 0.75, y, out)
    close(y, A @ x - 0.75 * u, dtype)
    close(out, p + A.conj().T @ (A @ x - 0.75 * u), dtype)
    close(square, np.linalg.norm(A @ x - 0.75 * u) ** 2, dtype)

    y, out = np.full(m, np.nan, u.dtype), p.copy()
    square = way.through(x, 0.0, y, out)  # what y holds does not matter
    close(y, A @ x, dtype)
    close(out, p + A.conj().T @ (A @ x), dtype)
    close(square, np.linalg.norm(A @ x) ** 2, dtype)

    y, out = u.copy(), p.copy()
    square = way.descend(0.3, q, y, out)
    close(y, u - 0.3 * q, dtype)
    close(out, p + A.conj().T @ (u - 0.3 * q), dtype)
    close(square, np.linalg.norm(u - 0.3 * q) ** 2, dtype)


@DTYPES
def test_vector_loops_are_what_they_say(dtype):
    v, h, w, x, p = (vector(N, dtype, seed) for seed in range(5))
    turned = p.copy()
    square = loops.turn(turned, 0.5, v, 0.25)
    close(turned, 0.5 * p - 0.25 * v, dtype)
    close(square, np.linalg.norm(0.5 * p - 0.25 * v) ** 2, dtype)

    a = [t.copy() for t in (v, h, w, x)]
    loops.lsmr_step(a[0], 2.0, a[1], 0.5, a[2], 3.0, a[3], 0.25)
    bar = h + 0.5 * w
    for found, want in zip(a, (2 * v, 2 * v + 0.25 * h, bar, x + 3 * bar)):
        close(found, want, dtype)

    a = [t.copy() for t in (v, w, x)]
    loops.lsqr_step(a[0], 2.0, a[1], a[2], 3.0, 0.25)
    for found, want in zip(a, (2 * v, 2 * v + 0.25 * w, x + 3 * w)):
        close(found, want, dtype)

    a = [t.copy() for t in (w, x)]
    loops.craig_step(v, 2.0, a[0], 0.5, a[1], 3.0)
    for found, want in zip(a, (2 * v + 0.5 * w, x + 3 * (2 * v + 0.5 * w))):
        close(found, want, dtype)

    a = [t.copy() for t in (x, p)]
    loops.cg_step(a[0], 3.0, a[1], v, 0.25)
    for found, want in zip(a, (x + 3 * p, v + 0.25 * p)):
        close(found, want, dtype)


@DTYPES
@pytest.mark.parametrize("batch", [(), (3,)])
def test_column_norms_scalings_and_products_of_operators(batch, dtype, monkeypatch):
    op = drawn(dtype, batch)
    real = dtype.to_real()
    row, col = torch.rand(M, dtype=real), torch.rand((*batch, N), dtype=real)
    X, Y = torch.randn((*batch, N, 1), dtype=dtype), torch.randn((*batch, M, 1), dtype=dtype)

    def everything(op):
        shifted = [t.expand(2, *t.shape).clone().select(0, 1) for t in (X, Y)]
        yield op.column_norms()
        for scaled in (op.scaled(row=row), op.scaled(col=col), op.scaled(row=row, col=col)):
            yield scaled.csr_values
        yield from (op.mv(X), op.rmv(Y), op.mv(shifted[0]), op.rmv(shifted[1]))
        yield from (op.mv(X.conj()), op.rmv(-Y.conj()))
        yield op.mv(X, out=torch.full((*batch, M, 1), torch.nan, dtype=dtype))
        yield op.rmv(Y, out=torch.full((*batch, N, 1), torch.nan, dtype=dtype))

    found = list(everything(op))
    monkeypatch.setattr(passes, "LEAST", 1 << 60)
    want = list(everything(drawn(dtype, batch)))
    eps = torch.finfo(dtype).eps
    for a, b in zip(found, want):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=100 * eps, atol=100 * eps)


def test_a_scaling_of_each_member_of_one_matrix():
    op = drawn(torch.float64)
    col = torch.rand((3, N), dtype=torch.float64)
    found = op.scaled(col=col)
    for member in range(3):
        torch.testing.assert_close(
            found.csr_values[member], op.scaled(col=col[member]).csr_values, rtol=0, atol=0
        )


def solved(solver, rank, damp, dtype, least, monkeypatch):
    monkeypatch.setattr(passes, "LEAST", least)
    clear_cache()
    g = torch.Generator().manual_seed(7)
    row, col = np.repeat(np.arange(60), 3), (np.arange(180) * 7 + np.arange(180) // 9) % 12
    S = fl.SparsityPattern(row, col, (60, 12))
    values = torch.randn(180, generator=g, dtype=dtype).requires_grad_()
    b = torch.randn(60, generator=g, dtype=dtype).requires_grad_()
    sol = fl.solve(fl.Sparse(S, values), b, damp=damp, solver=solver, rank=rank)
    loss = (sol.x.abs() ** 2).sum() + sol.x.real.sum()
    first = torch.autograd.grad(loss, (values, b), create_graph=True)
    second = torch.autograd.grad(sum((t.abs() ** 2).sum() for t in first), (values, b))
    return sol, (sol.x, *first, *second)


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls", "cholesky"])
@pytest.mark.parametrize(("rank", "damp"), [("auto", 0.0), ("full", 0.0), ("auto", 0.3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_solves_and_derivatives_are_those_of_the_plain_way(solver, rank, damp, dtype, monkeypatch):
    used = []
    for name in ("through", "descend", "apply"):
        loop = getattr(loops, name)
        monkeypatch.setattr(loops, name, lambda *a, loop=loop: used.append(loop) or loop(*a))
    sol, found = solved(solver, rank, damp, dtype, 0, monkeypatch)
    assert used and bool(sol.converged)
    used.clear()
    plain, want = solved(solver, rank, damp, dtype, 1 << 60, monkeypatch)
    assert not used
    assert abs(int(sol.iterations) - int(plain.iterations)) <= 1
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize("size", [1e-150, 1e150])
def test_norms_whose_squares_leave_the_range(solver, size):
    """A b of any size has the x of its size; raw methods are given it unscaled."""
    from funclsq.methods import cgls, lsmr, lsqr
    from funclsq.methods._iterate import Targets, iterate

    kind = {"lsmr": lsmr.Lsmr, "lsqr": lsqr.Lsqr, "cgls": cgls.ExtendedCg}[solver]
    op = drawn(torch.float64).scaled(col=torch.ones(N, dtype=torch.float64))
    b = torch.from_numpy(vector(M, torch.float64, 3)).unsqueeze(1)

    def run(c):
        norm = np.array([float(torch.linalg.vector_norm(c / c.abs().max()) * c.abs().max())])
        zero = np.zeros(1)
        targets = Targets(1e-12, 1e-12, np.inf, False, norm, zero, zero, 0.0)
        return iterate(kind, op, c, targets, 100)

    one, other = run(b), run(b * size)
    assert other.iterations[0] <= 2 * one.iterations[0]
    torch.testing.assert_close(other.x / size, one.x, rtol=1e-8, atol=1e-8)


def test_a_process_that_ends_in_the_middle_of_a_range():
    """A right-hand side that A^H does not see, and one that a single step exhausts."""
    S = drawn(torch.float64).pattern
    empty = torch.zeros(M, dtype=torch.float64)
    empty[1::2] = 1.0  # rows without entries
    for solver in ("lsmr", "lsqr", "cgls"):
        x = fl.lstsq(fl.Sparse(S, torch.ones(COUNT).double()), empty, solver=solver)
        assert not x.any()
        unit = fl.Sparse(
            fl.SparsityPattern([0, 1, 2], [0, 1, 2], (3, 3)), torch.ones(3, dtype=torch.float64)
        )
        b = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        torch.testing.assert_close(fl.lstsq(unit, b, solver=solver), b)


# When they are taken


def test_little_work_other_types_and_blocks_are_left_to_torch(monkeypatch):
    op = drawn(torch.float64)
    for least, taken in ((op.csr_values.numel(), True), (op.csr_values.numel() + 1, False)):
        monkeypatch.setattr(passes, "LEAST", least)
        assert (drawn(torch.float64).passes() is not None) == taken
        assert (StackedOp(drawn(torch.float64), torch.ones(N)).passes() is not None) == taken
        assert (Adjoint(drawn(torch.float64)).passes() is not None) == taken
    monkeypatch.setattr(passes, "LEAST", 0)
    assert Adjoint(StackedOp(op, torch.ones(N))).passes() is None
    assert StackedOp(drawn(torch.float64, (2,)), torch.ones(N)).passes() is None
    called = []
    monkeypatch.setattr(loops, "apply", lambda *a: called.append(a))
    op.mv(torch.ones(N, 2, dtype=torch.float64))
    op.mv(torch.ones(N, 1, dtype=torch.float64), out=torch.ones(M, 2, dtype=torch.float64)[:, 1:])
    assert not called


def test_without_numba_the_plain_way_is_taken(monkeypatch):
    monkeypatch.setattr(compiled, "loops", lambda: None)
    op = drawn(torch.float64)
    assert op.passes() is None and op.column_norms().shape == (N,)
    assert op.scaled(col=torch.ones(N)).csr_values.equal(op.csr_values)


def test_threads_share_the_rows_and_have_columns_of_their_own(monkeypatch):
    op = drawn(torch.float64)
    seen = []
    loop = loops.through
    monkeypatch.setattr(loops, "through", lambda *a: seen.append(a[-3:]) or loop(*a))
    monkeypatch.setattr(compiled, "SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    p = np.zeros(N)
    op.passes().through(np.ones(N), 0.0, np.zeros(M), p)
    ranges = sorted(part[1:] for part in seen)
    assert len(ranges) == 3 and ranges[0][0] == 0 and ranges[-1][1] == M
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert len({part[0].ctypes.data for part in seen}) == 3
    # no more threads than entries pay for columns of their own
    monkeypatch.setattr(passes, "_SPARE_COLUMNS", op.csr_values.numel() // (2 * N))
    seen.clear()
    drawn(torch.float64).passes().through(np.ones(N), 0.0, np.zeros(M), p)
    assert len(seen) == 2


def test_importing_and_small_solves_do_not_load_numba():
    script = """
import sys
import torch, funclsq as fl
S = fl.SparsityPattern([0, 1, 2, 2], [0, 1, 0, 1], (3, 2))
b = torch.ones(3, dtype=torch.float64)
for solver in ("lsmr", "cholesky"):
    fl.lstsq(fl.Sparse(S, torch.ones(4, dtype=torch.float64)), b, solver=solver)
print("numba" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "False\n", done.stdout + done.stderr[-2000:]
