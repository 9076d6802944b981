"""Rows with many entries do not fill the factor, and change nothing in the answer."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import funclsq as fl
from funclsq.methods._dense_rows import dense_rows
from funclsq.methods._gram import estimate


def _grid(side):
    D = sp.diags_array([-np.ones(side), np.ones(side)], offsets=[0, 1], shape=(side - 1, side))
    eye = sp.eye_array(side)
    return sp.vstack([sp.kron(D, eye), sp.kron(eye, D)]).tocsr()


def _with_rows(A, count, seed=0, dtype=float):
    rng = np.random.default_rng(seed)
    E = rng.standard_normal((count, A.shape[1])) / A.shape[1] ** 0.5
    if dtype is complex:
        E = E + 1j * rng.standard_normal(E.shape) / A.shape[1] ** 0.5
    whole = sp.vstack([A[:7], sp.csr_array(E[:1]), A[7:], sp.csr_array(E[1:])]).tocsr()
    whole.sort_indices()
    return whole


def _pattern(A):
    row = np.repeat(np.arange(A.shape[0]), np.diff(A.indptr))
    return fl.SparsityPattern(row, A.indices, A.shape)


def _residual_of_optimality(A, b, x, damp):
    s = A.conj().T @ (b - A @ x) - damp**2 * x
    return np.linalg.norm(s) / (abs(A).sum(0).max() * np.linalg.norm(b))


@pytest.mark.parametrize("dtype", [float, complex])
@pytest.mark.parametrize("damp", [0.0, 1e-2])
def test_dense_rows_are_kept_out_of_the_factor(damp, dtype):
    base = _grid(20) if damp else sp.vstack([_grid(20), 0.1 * sp.eye_array(400)]).tocsr()
    A = _with_rows(base, 5, dtype=dtype)
    S = _pattern(A)
    apart = dense_rows(S)
    assert apart is not None
    assert apart.pattern.nnz_unique == A.nnz - 5 * 400
    assert estimate(S)[1] < 0.05  # 1 with them
    rng = np.random.default_rng(1)
    b = rng.standard_normal((A.shape[0], 2))
    b = b + 1j * rng.standard_normal(b.shape) if dtype is complex else b
    sol = fl.solve(A, torch.from_numpy(b), damp=damp, solver="cholesky")
    assert sol.rank.unique().tolist() == [400]
    assert bool((sol.status == int(fl.Status.DIRECT)).all())
    want = np.linalg.lstsq(
        np.vstack([A.toarray(), damp * np.eye(400)]),
        np.vstack([b, np.zeros((400, 2))]),
        rcond=None,
    )[0]
    assert np.linalg.norm(sol.x.numpy() - want) < 1e-12 * np.linalg.norm(want)


def test_a_dense_row_that_fixes_the_level():
    """Without the row of ones the grid's constant is free: N_S is singular, A is not."""
    A = sp.vstack([_grid(20), sp.csr_array(np.ones((1, 400)) / 20)]).tocsr()
    assert dense_rows(_pattern(A)) is not None
    b = np.random.default_rng(2).standard_normal(A.shape[0])
    sol = fl.solve(A, torch.from_numpy(b), solver="cholesky")
    assert int(sol.rank) == 400
    assert bool(sol.converged.all())
    want = np.linalg.lstsq(A.toarray(), b, rcond=None)[0]
    assert np.linalg.norm(sol.x.numpy() - want) < 1e-11 * np.linalg.norm(want)


def test_a_dense_row_that_leaves_the_rank_deficient():
    rng = np.random.default_rng(3)
    row = rng.standard_normal(400)
    A = sp.vstack([_grid(20), sp.csr_array((row - row.mean())[None] / 20)]).tocsr()
    assert dense_rows(_pattern(A)) is not None
    b = rng.standard_normal(A.shape[0])
    sol = fl.solve(A, torch.from_numpy(b), solver="cholesky")
    assert int(sol.rank) == 399
    want = np.linalg.pinv(A.toarray()) @ b
    assert np.linalg.norm(sol.x.numpy() - want) < 1e-10 * np.linalg.norm(want)


def test_gradients_with_dense_rows():
    A = _with_rows(sp.vstack([_grid(20), 0.1 * sp.eye_array(400)]).tocsr(), 2)
    S = _pattern(A)
    assert dense_rows(S) is not None
    values = torch.from_numpy(A.data).requires_grad_()
    g = torch.Generator().manual_seed(4)
    b = torch.randn(A.shape[0], generator=g, dtype=torch.float64, requires_grad=True)
    x_bar = torch.randn(400, generator=g, dtype=torch.float64)
    got = torch.autograd.grad(
        fl.lstsq(fl.Sparse(S, values), b, solver="cholesky"), (values, b), x_bar
    )
    dense = torch.from_numpy(A.toarray()).requires_grad_()
    want = torch.autograd.grad(torch.linalg.pinv(dense) @ b, (dense, b), x_bar)
    stored = want[0][torch.tensor(S.row), torch.tensor(S.col)]
    torch.testing.assert_close(got[0], stored, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got[1], want[1], rtol=1e-10, atol=1e-12)


def test_a_batch_with_dense_rows():
    A = _with_rows(sp.vstack([_grid(20), 0.1 * sp.eye_array(400)]).tocsr(), 2)
    S = _pattern(A)
    g = torch.Generator().manual_seed(5)
    values = torch.from_numpy(A.data) * (
        1 + 0.1 * torch.randn((3, A.nnz), generator=g, dtype=torch.float64)
    )
    b = torch.randn((3, A.shape[0], 1), generator=g, dtype=torch.float64)
    x = fl.lstsq(fl.Sparse(S, values), b, solver="cholesky")
    each = [fl.lstsq(fl.Sparse(S, v), c, solver="cholesky") for v, c in zip(values, b)]
    torch.testing.assert_close(x, torch.stack(each), rtol=1e-11, atol=1e-13)


def test_dense_columns_of_a_wide_matrix():
    A = _with_rows(sp.vstack([_grid(20), 0.1 * sp.eye_array(400)]).tocsr(), 2).T.tocsr()
    b = np.random.default_rng(6).standard_normal(400)
    sol = fl.solve(A, torch.from_numpy(b), solver="cholesky")
    want = np.linalg.pinv(A.toarray()) @ b
    assert np.linalg.norm(sol.x.numpy() - want) < 1e-11 * np.linalg.norm(want)


@pytest.mark.parametrize("count", [0, 150])
def test_none_are_kept_apart_where_it_does_not_pay(count):
    A = _grid(20)
    if count:
        A = _with_rows(A, count)
    assert dense_rows(_pattern(A)) is None
