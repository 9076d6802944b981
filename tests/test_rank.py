"""The rank is found, the minimiser nearest x0 returned, and a false claim of full rank is told."""

from __future__ import annotations

import signal
import warnings

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch
from realdata import data_path

import funclsq as fl

DIRECT = ("qr", "svd", "cholesky")


def load(rel):
    """A (as funclsq.Sparse), b and the reference (if any) of a real problem."""
    path = data_path(rel)
    if path.suffix == ".npz":
        z = np.load(path)
        make = scipy.sparse.csc_array if len(z["indptr"]) == z["shape"][1] + 1 else None
        if make is None or rel.startswith("slam_ba"):
            make = scipy.sparse.csr_array
            if len(z["indptr"]) == z["shape"][1] + 1 != z["shape"][0] + 1:
                make = scipy.sparse.csc_array
        A, b = make((z["data"], z["indices"], z["indptr"]), shape=tuple(z["shape"])), z["b"]
        return A, b.reshape(-1).astype(float), None
    stem = rel.removesuffix(".mtx.gz")
    b = scipy.io.mmread(data_path(f"{stem}_b.mtx.gz"))
    return scipy.io.mmread(path), np.asarray(b).ravel(), np.load(data_path(f"{stem}_ref.npz"))


def solved(A, b, **options):
    A = fl.Sparse.from_scipy(scipy.sparse.coo_array(A), torch.float64)
    return fl.solve(A, torch.from_numpy(b), **options)


def normal_residual(A, b, x):
    r = b - A @ x
    return np.linalg.norm(A.T @ r) / (np.linalg.norm(A.data) * np.linalg.norm(b))


@pytest.mark.parametrize("solver", ["auto", *DIRECT])
@pytest.mark.parametrize(("name", "rank"), [("abb313", 128), ("Maragal_1", 10)])
def test_rank_deficient_real_problems(name, rank, solver):
    A, b, ref = load(f"sparse_lsq/{name}.mtx.gz")
    A = scipy.sparse.csr_array(A).astype(float)
    assert rank == int(ref["rank"])
    sol = solved(A, b, solver=solver)
    assert bool(sol.converged)
    assert int(sol.rank) == rank
    error = np.linalg.norm(sol.x.numpy() - ref["x_minnorm"]) / np.linalg.norm(ref["x_minnorm"])
    assert error < 1e-11
    # from elsewhere: the nearest minimiser, which differs by the part of x0 in the null space
    x0 = np.random.default_rng(0).standard_normal(A.shape[1])
    moved = solved(A, b, solver=solver, x0=torch.from_numpy(x0)).x.numpy()
    assert normal_residual(A, b, moved) < 1e-13
    V = np.linalg.svd(A.toarray())[2][:rank]
    assert np.linalg.norm((moved - x0) - V.T @ (V @ (moved - x0))) < 1e-9 * np.linalg.norm(moved)


@pytest.fixture
def within():
    """Fail a test that takes much longer than it should, instead of waiting for it."""

    def too_long(*_):
        raise TimeoutError("took more than three minutes; seconds are expected")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


LARGE = {
    "regression/insteval.npz": (4105, 309.58495399037),
    "regression/chem97.npz": (2413, 378.81468720134),
    "slam_ba/CSAIL_gn0.npz": (3135 - 3, None),
    "slam_ba/intel_gn0.npz": (-3, None),  # columns less three
    "slam_ba/M3500_gn0.npz": (-3, None),
    "sparse_lsq/landmark.npz": (2671, None),
}


@pytest.mark.parametrize("solver", ["auto", "cholesky"])
@pytest.mark.parametrize("name", LARGE)
def test_large_rank_deficient_real_problems(within, name, solver):
    """Crossed factors (one-hot ANOVA), pose graphs, of which three degrees are free (gauge), and
    a landmark problem of cond 1e8 in units that differ by column.
    """
    A, b, _ = load(name)
    rank, residual = LARGE[name]
    sol = solved(A, b, solver=solver)
    assert bool(sol.converged)
    assert int(sol.rank) == (rank if rank > 0 else A.shape[1] + rank)
    x = sol.x.numpy()
    assert normal_residual(A, b, x) < 1e-12
    assert float(sol.residual_norm) == pytest.approx(float(np.linalg.norm(b - A @ x)))
    if residual is not None:
        assert float(sol.residual_norm) == pytest.approx(residual, rel=1e-11)


def one_hot(rng, rows=60, levels=(4, 3, 5)):
    """Intercept and one-hot columns of each factor: rank is one per factor short."""
    columns = [np.ones((rows, 1))]
    columns += [np.eye(k)[np.concatenate((np.arange(k), rng.integers(0, k, rows - k)))]
                for k in levels]  # fmt: skip
    return np.concatenate(columns, 1)


@pytest.mark.parametrize("solver", ["auto", *DIRECT, "lsmr", "lsqr", "cgls"])
def test_one_hot_anova(solver):
    rng = np.random.default_rng(1)
    A, y = one_hot(rng), rng.standard_normal(60)
    want = np.linalg.pinv(A) @ y
    sol = solved(A, y, solver=solver)
    assert bool(sol.converged)
    assert int(sol.rank) in ((10,) if solver in ("auto", *DIRECT) else (10, -1))
    np.testing.assert_allclose(sol.x.numpy(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", DIRECT)
@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("shape", ["tall", "wide"])
def test_a_false_claim_of_full_rank_is_told(solver, layout, shape):
    rng = np.random.default_rng(2)
    A = rng.integers(-3, 4, (9, 3)) @ rng.integers(-2, 3, (3, 5)).astype(float)
    A = A if shape == "tall" else A.T.copy()
    b = rng.standard_normal(A.shape[0])
    given = torch.from_numpy(A)
    given = given if layout == "dense" else fl.Sparse.from_torch(given)
    with pytest.warns(fl.RankWarning, match="rank='full' was asserted"):
        x = fl.lstsq(given, torch.from_numpy(b), rank="full", solver=solver)
    np.testing.assert_allclose(x.numpy(), np.linalg.pinv(A) @ b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("batch", [None, 3])
def test_cholesky_tells_that_it_found_another_rank_than_was_given(batch):
    A = torch.from_numpy(np.random.default_rng(4).standard_normal((batch or 1, 9, 5)))
    A[0, :, 4] = A[0, :, 3]
    A = A if batch else A[0]
    b = A[..., :1]
    with pytest.warns(fl.RankWarning, match="rank=3 was given.* rank 4: solver='cholesky'"):
        x = fl.lstsq(A, b, rank=3, solver="cholesky")
    torch.testing.assert_close(A @ x, b)
    fl.lstsq(A, b, rank=3, solver="cholesky", damp=0.1)  # the rank of A decides nothing there
    if not batch:
        fl.lstsq(A, b, rank=4, solver="cholesky")


@pytest.mark.parametrize("solver", ["auto", *DIRECT])
def test_a_true_claim_of_full_rank_is_not(solver):
    A = torch.from_numpy(np.random.default_rng(3).standard_normal((9, 5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fl.lstsq(A, A[:, 0], rank="full", solver=solver)
        fl.lstsq(A, A[:, 0], rank=5, solver=solver)


@pytest.mark.parametrize("solver", DIRECT)
def test_rcond_decides_the_rank(solver):
    """Singular values 1, 1e-2, 1e-4, 1e-6 of a matrix with columns of nearly one length."""
    rng = np.random.default_rng(4)
    U, V = (np.linalg.qr(rng.standard_normal((k, 4)))[0] for k in (8, 4))
    A = torch.from_numpy((U * [1, 1e-2, 1e-4, 1e-6]) @ V.T)
    b = torch.from_numpy(rng.standard_normal(8))
    for rcond, rank in ((1e-8, 4), (1e-5, 3), (1e-3, 2), (1e-1, 1)):
        sol = fl.solve(A, b, solver=solver, rcond=rcond)
        assert int(sol.rank) == rank
    if solver != "cholesky":
        for rank in (1, 2, 3, 4):
            cut = fl.solve(A, b, solver=solver, rank=rank)
            assert int(cut.rank) == rank
            want = V[:, :rank] @ ((U.T @ b.numpy()) / [1, 1e-2, 1e-4, 1e-6])[:rank]
            np.testing.assert_allclose(cut.x.numpy(), want, rtol=1e-8)


@pytest.mark.parametrize("solver", ["auto", *DIRECT])
def test_the_three_term_derivative_of_a_deficient_problem(solver):
    """Along matrices of rank 2 the gradient is that of x = (B C)^+ b = C^+ B^+ b."""
    rng = np.random.default_rng(5)
    B, C, b, k = (torch.from_numpy(rng.standard_normal(s)) for s in ((7, 2), (2, 4), 7, 4))

    def gradient(f):
        left, right = B.clone().requires_grad_(), C.clone().requires_grad_()
        return torch.autograd.grad(f(left, right) @ k, (left, right))

    def exact(B, C):
        y = torch.linalg.solve(B.T @ B, B.T @ b)
        return C.T @ torch.linalg.solve(C @ C.T, y)

    got = gradient(lambda B, C: fl.lstsq(B @ C, b, solver=solver))
    for g, want in zip(got, gradient(exact)):
        torch.testing.assert_close(g, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("damp", [None, 0.5])
def test_cholesky_leaves_a_large_null_space_to_another_solver(damp):
    """90 of 200 columns repeated; a column of damping takes one of them away."""
    rng = np.random.default_rng(6)
    A = rng.integers(-3, 4, (200, 110)) * (rng.random((200, 110)) < 0.03) + 20.0 * np.eye(200, 110)
    A = np.concatenate((A, A[:, :90]), 1)
    b, d = rng.standard_normal(200), np.zeros(200)
    d[0] = damp or 0.0
    more = {} if damp is None else {"damp": torch.from_numpy(d)}
    sol = solved(scipy.sparse.coo_array(A), b, solver="cholesky", **more)
    M, c = np.concatenate((A, np.diag(d))), np.concatenate((b, 0 * d))
    want, _, rank, _ = np.linalg.lstsq(M, c, rcond=1e-12)
    assert bool(sol.converged)
    assert int(sol.rank) == rank
    assert sol.solver == "qr"
    assert "too many dependent columns" in sol.why
    np.testing.assert_allclose(sol.x.numpy(), want, rtol=0, atol=1e-12)
