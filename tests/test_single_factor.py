"""A factor in single precision: a preconditioner for refinement in double, no digit lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_cholesky import batch_op, check_accuracy, error, nearly_full, solve, sparse_op

import funclsq as fl
from funclsq.backends import dense, registry
from funclsq.methods import _normal
from funclsq.methods._core import EASIEST
from funclsq.methods._protocol import Options
from funclsq.methods.cholesky import prepare
from funclsq.operators import DenseOp
from funclsq.solution import Status

M, N = 50, 16


@pytest.fixture(autouse=True)
def low(monkeypatch):
    """Small matrices are treated as large ones are."""
    monkeypatch.setattr(dense, "SINGLE_ORDER", 8)


def well(kind=float, seed=0, m=M, n=N):
    """A full matrix with columns in units of their own, cond 3 when these are scaled away."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((m, n))
    if kind is complex:
        A = A + 1j * rng.standard_normal((m, n))
    return A * 10.0 ** rng.uniform(-3, 3, n)


def conditioned(cond, seed=0):
    """A full matrix with columns of one length and this condition number."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal(shape))[0] for shape in ((M, N), (N, N)))
    return (U * np.geomspace(1, 1 / cond, N)) @ V.T


def sparse(kind, seed=0):
    """A sparse matrix whose factor is nearly full, cond below 10 when scaled."""
    return nearly_full(np.random.default_rng(seed), kind, m=160, n=24, each=4)


def normal_of(prepared):
    return prepared._problem.core.normal


def factor_of(A, damp=None):
    return prepare(DenseOp(torch.from_numpy(A)), damp, Options())


CASES = {
    "full": (well, None, False),
    "complex": (lambda: well(complex), None, False),
    "wide": (lambda: well().T.copy(), None, False),
    "complex wide": (lambda: well(complex).T.copy(), None, False),
    "damped": (well, 0.1 * np.linspace(1, 2, N), False),
    "damped by rows": (lambda: conditioned(3).T.copy(), 0.1 * np.linspace(1, 2, M), False),
    "nearly full": (lambda: sparse(float), None, True),
    "nearly full, complex": (lambda: sparse(complex), None, True),
}


@pytest.mark.parametrize("backend", ["rslab", "superlu"])
@pytest.mark.parametrize("case", CASES)
def test_as_accurate_as_qr(case, backend, monkeypatch):
    make, damp, by_pattern = CASES[case]
    if backend not in registry.available():
        pytest.skip(f"{backend} is not installed")
    if by_pattern:
        monkeypatch.setattr(_normal, "DENSE_FILL", 1.0)
    monkeypatch.setattr(registry, "ORDER", (backend, "superlu"))
    A = make()
    op = sparse_op(A) if by_pattern else DenseOp(torch.from_numpy(A))
    check_accuracy(A, damp, 10, op=op)
    d = None if damp is None else torch.from_numpy(damp)
    first, second = prepare(op, d, Options()), prepare(op, d, Options())
    assert normal_of(first).single
    assert normal_of(second).single
    c = A @ np.ones((A.shape[1], 2))
    np.testing.assert_array_equal(solve(first, c)[0], solve(second, c)[0])


def test_condition_and_rank_are_those_of_double_precision(monkeypatch):
    A = well()
    single = factor_of(A)
    monkeypatch.setattr(dense, "SINGLE_ORDER", 10**9)
    double = factor_of(A)
    assert normal_of(single).single
    assert not normal_of(double).single
    assert int(single.rank) == int(double.rank) == N
    assert single.deficient == double.deficient
    assert float(single.cond) == pytest.approx(float(double.cond), rel=1e-6)


@pytest.mark.parametrize("cond", [0.5 * EASIEST, 2 * EASIEST, 1e4, 1e9])
def test_where_it_would_contract_slowly_it_is_not_used(cond):
    A = conditioned(cond)
    prepared = factor_of(A)
    assert normal_of(prepared).single == (cond < EASIEST)
    assert float(prepared.cond) == pytest.approx(cond, rel=0.5)
    check_accuracy(A, None, 10, op=DenseOp(torch.from_numpy(A)))


def test_dependent_columns_are_found_all_the_same():
    A = well()
    A[:, 7] = A[:, 3] + A[:, 5]
    A[:, 11] = 0
    prepared = factor_of(A)
    assert not normal_of(prepared).single
    assert int(prepared.rank) == N - 2
    x, status = solve(prepared, A @ np.ones((N, 1)))
    assert error(x, np.linalg.pinv(A, rcond=1e-12) @ (A @ np.ones((N, 1)))) <= 1e-10
    assert status.item() == Status.DIRECT


def test_columns_beyond_the_range_of_single_precision():
    A = conditioned(3)
    prepared = factor_of(A)
    rng = np.random.default_rng(1)
    size = np.array([1e-75, 1e-45, 1e-30, 1, 1e30, 1e45, 1e75, 0])
    c, g = rng.standard_normal((M, 8)), rng.standard_normal((N, 8))
    for rhs in ((c * size, None), (None, g * size), (c * size, g * size)):
        x, status = solve(prepared, *rhs)
        plain = solve(prepared, *(v if v is None else v / np.where(size, size, 1) for v in rhs))[0]
        for j in range(7):
            assert error(x[:, j], size[j] * plain[:, j]) <= 1e-15
        assert not x[:, 7].any()
        assert (status == Status.DIRECT).all()


def test_a_column_is_solved_to_the_same_digits_beside_a_small_one():
    prepared = factor_of(conditioned(3))
    c = np.random.default_rng(2).standard_normal((M, 3))
    alone, _ = solve(prepared, c)
    c[:, 1] *= 1e-40
    beside, _ = solve(prepared, c)
    np.testing.assert_array_equal(beside[:, ::2], alone[:, ::2])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_column(bad):
    prepared = factor_of(conditioned(3))
    c = np.ones((M, 3))
    good, _ = solve(prepared, c)
    c[5, 1] = bad
    x, status = solve(prepared, c)
    np.testing.assert_array_equal(x[:, ::2], good[:, ::2])
    assert status.tolist() == [Status.DIRECT, Status.NONFINITE, Status.DIRECT]


def test_half_the_memory_and_no_normal_matrix(monkeypatch):
    A = well(m=400, n=200)
    single = factor_of(A)
    monkeypatch.setattr(dense, "SINGLE_ORDER", 10**9)
    double = factor_of(A)
    assert single.nbytes == A.nbytes + 200 * 200 * 4
    assert double.nbytes == A.nbytes + 200 * 200 * 8
    x, y = (solve(p, np.ones((400, 1)))[0] for p in (single, double))
    assert error(x, y) <= 1e-14


def test_members_of_a_batch_are_factored_in_double_precision():
    stack = torch.from_numpy(np.stack([conditioned(3, seed) for seed in range(3)]))
    assert not normal_of(prepare(DenseOp(stack), None, Options())).single
    members = [sparse(float) * (1 + i) for i in range(2)]
    assert not normal_of(prepare(batch_op(members), None, Options())).single


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_gradients_and_second_derivatives(damp):
    A = torch.from_numpy(conditioned(3)).requires_grad_()
    b = torch.from_numpy(np.random.default_rng(2).standard_normal(M)).requires_grad_()

    def ours(A, b):
        return fl.lstsq(A, b, solver="cholesky", damp=damp)

    def dense_one(A, b):
        stacked = torch.cat((A, damp * torch.eye(N, dtype=A.dtype)))
        Q, R = torch.linalg.qr(stacked)
        c = torch.cat((b, b.new_zeros(N)))
        return torch.linalg.solve_triangular(R, (Q.mT @ c)[:, None], upper=True)[:, 0]

    found = []
    for f in (ours, dense_one):
        dA, db = torch.autograd.grad(f(A, b).square().sum(), (A, b), create_graph=True)
        second = torch.autograd.grad((dA**2).sum() + (db**3).sum(), (A, b))
        found.append((dA.detach(), db.detach(), *second))
    for mine, true in zip(*found, strict=True):
        assert error(mine.numpy(), true.numpy()) <= 1e-13


@pytest.mark.parametrize("case", CASES)
def test_a_tolerance_saves_corrections_and_is_kept(case):
    make, damp, by_pattern = CASES[case]
    A = make()
    op = sparse_op(A) if by_pattern else DenseOp(torch.from_numpy(A))
    damp = None if damp is None else torch.from_numpy(np.asarray(damp))
    rng = np.random.default_rng(4)
    c = torch.from_numpy(
        A @ rng.standard_normal((A.shape[1], 3)) + rng.standard_normal((len(A), 3))
    )
    full, rough, roughest, beyond = (
        prepare(op, damp, Options(atol=atol)).solve(c, None) for atol in (None, 1e-10, 1e-6, 1.0)
    )
    whole = float(full.x.norm())
    assert float((rough.x - full.x).norm()) <= 1e-10 * whole
    assert float((roughest.x - full.x).norm()) <= 1e-6 * whole
    assert torch.equal(roughest.x, beyond.x)
    assert bool((rough.status == int(Status.DIRECT)).all())
    if case != "damped by rows":  # two steps of full accuracy, as what is left may cancel
        assert bool((rough.iterations < full.iterations).all())
    assert bool((roughest.iterations <= rough.iterations).all())
