"""Ill-conditioned problems: as accurate as LAPACK on well-scaled columns, or said not to be."""

from __future__ import annotations

import warnings

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch

import funclsq as fl

SHAPES = {"tall": (14, 6), "square": (8, 8), "wide": (6, 14)}
EPS = np.finfo(float).eps
CONDS = (1e2, 1e4, 1e6, 1e8, 1e10, 1e12)


def spectrum(rng, m, n, cond):
    """Singular values in geometric progression."""
    q = min(m, n)
    U, V = (np.linalg.qr(rng.standard_normal((k, q)))[0] for k in (m, n))
    return (U * np.geomspace(1, 1 / cond, q)) @ V.T


def graded(rng, m, n, cond):
    """A fair matrix, its columns (rows, if wide) in units that differ by cond."""
    A = rng.standard_normal((m, n))
    units = np.geomspace(1, 1 / cond, min(m, n))
    return A * units if m >= n else A * units[:, None]


def near_dependent(rng, m, n, cond):
    """A column (row, if wide) that is the sum of two others but for 1 / cond."""
    A = rng.standard_normal((m, n))
    B = A if m >= n else A.T
    B[:, 0] = B[:, 1] + B[:, 2] + B[:, 0] / cond
    return A


FAMILIES = {f.__name__: f for f in (spectrum, graded, near_dependent)}


def exact(A, b):
    """A^+ b to 60 digits, rounded; A of full rank."""
    with mpmath.workdps(60):
        M, v = mpmath.matrix(A.tolist()), mpmath.matrix(b.tolist())
        if A.shape[0] >= A.shape[1]:
            x = mpmath.cholesky_solve(M.T * M, M.T * v)
        else:
            x = M.T * mpmath.cholesky_solve(M * M.T, v)
        return np.array([float(t) for t in x])


def lapack(A, b):
    """Dense gelsd on columns (rows, if wide) scaled to one."""
    if A.shape[0] >= A.shape[1]:
        size = np.linalg.norm(A, axis=0)
        return scipy.linalg.lstsq(A / size, b, cond=0, lapack_driver="gelsd")[0] / size
    size = np.linalg.norm(A, axis=1)[:, None]
    return scipy.linalg.lstsq(A / size, b / size[:, 0], cond=0, lapack_driver="gelsd")[0]


def case(family, shape, cond, consistent):
    rng = np.random.default_rng(int(np.log10(cond)))
    A = FAMILIES[family](rng, *SHAPES[shape], cond)
    b = A @ rng.standard_normal(A.shape[1]) if consistent else rng.standard_normal(A.shape[0])
    return A, b


def solve(A, b, layout, solver="auto"):
    given = torch.from_numpy(A)
    given = given if layout == "dense" else fl.Sparse.from_torch(given)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sol = fl.solve(given, torch.from_numpy(b), solver=solver)
    return sol, told


@pytest.mark.parametrize("consistent", [True, False], ids=["consistent", "inconsistent"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cond", [1e2, 1e4, 1e6, 1e8, 1e10, 1e12])
def test_forward_error_is_that_of_lapack(cond, family, shape, consistent):
    A, b = case(family, shape, cond, consistent)
    x, rival = exact(A, b), lapack(A, b)
    size = np.linalg.norm(x)
    # one run of LAPACK may be lucky: what it may lose is eps times the condition of the scaled A
    columns = A if A.shape[0] >= A.shape[1] else A.T
    scaled = np.linalg.cond(columns / np.linalg.norm(columns, axis=0))
    floor = max(np.linalg.norm(rival - x), EPS * scaled * size / 10)
    for layout, solver in (("dense", "auto"), ("sparse", "auto"), ("sparse", "cholesky")):
        sol, told = solve(A, b, layout, solver)
        error = np.linalg.norm(sol.x.numpy() - x)
        factor = 10 if cond <= 1e8 else 100
        fine = error <= factor * floor
        assert fine or (cond > 1e10 and bool(told)), (layout, solver, error / floor)


@pytest.mark.parametrize(
    ("shape", "cond"),
    [(shape, cond) for shape in SHAPES for cond in CONDS],
)
@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_gradients_are_within_the_perturbation_bound(layout, cond, shape):
    """Against A_bar = r z^T - A z x^T (+ its term across the null space), in 60 digits."""
    A, b = case("spectrum", shape, cond, consistent=False)
    m, n = A.shape
    k = np.random.default_rng(1).standard_normal(n)
    with mpmath.workdps(60):
        M, v, c = (mpmath.matrix(t.tolist()) for t in (A, b, k))
        P = mpmath.inverse(M.T * M) * M.T if m >= n else M.T * mpmath.inverse(M * M.T)
        x, z = P * v, P * P.T * c
        r, null = v - M * x, c - P * M * c
        exact_bar = r * z.T - (M * z) * x.T + (P.T * x) * null.T
        A_bar = np.array(exact_bar.tolist(), dtype=float)
        b_bar = np.array((P.T * c).tolist(), dtype=float)[:, 0]
        norm = lambda t: float(mpmath.norm(t))  # noqa: E731
        inverse = cond  # ||A^+||, for ||A|| = 1
        # each factor moves by eps times its own condition
        moved = (norm(r) * inverse**3 + norm(x) * inverse**2 + norm(x) * inverse**2) * norm(c)
    leaf, rhs = torch.from_numpy(A).requires_grad_(), torch.from_numpy(b).requires_grad_()
    given = leaf if layout == "dense" else fl.Sparse.from_torch(leaf)
    got = torch.autograd.grad(fl.lstsq(given, rhs) @ torch.from_numpy(k), (leaf, rhs))
    assert np.linalg.norm(got[0].numpy() - A_bar) <= 100 * EPS * moved
    bound = 100 * EPS * inverse * (inverse * norm(c))
    assert np.linalg.norm(got[1].numpy() - b_bar) <= bound


@pytest.mark.parametrize("solver", ["auto", "qr", "svd", "cholesky"])
@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision_data_at_cond_1e4(shape, solver):
    A, b = case("spectrum", shape, 1e4, consistent=True)
    A, b = A.astype(np.float32), b.astype(np.float32)
    x = exact(A.astype(float), b.astype(float))
    y = fl.lstsq(torch.from_numpy(A), torch.from_numpy(b), solver=solver)
    assert y.dtype == torch.float32
    size = np.linalg.norm(x) + np.linalg.norm(b)
    residual = np.linalg.norm(b - A @ x)
    bound = 10 * np.finfo(np.float32).eps * 1e4 * (size + 1e4 * residual)
    assert np.linalg.norm(y.numpy() - x) <= bound


def little_damped(kind, damp):
    """A with a null space, singular values 1 to 1/30 on its rank, in 60 digits the exact x."""
    rng = np.random.default_rng(2)
    m, n, rank = {"wide": (5, 9, 5), "deficient": (9, 5, 3)}[kind]
    U, V = (np.linalg.qr(rng.standard_normal((k, rank)))[0] for k in (m, n))
    A, b, k = (
        (U * np.geomspace(1, 1 / 30, rank)) @ V.T,
        rng.standard_normal(m),
        rng.standard_normal(n),
    )
    with mpmath.workdps(60):
        M, v, c = (mpmath.matrix(t.tolist()) for t in (A, b, k))
        inverse = mpmath.inverse(M.T * M + mpmath.mpf(damp) ** 2 * mpmath.eye(n))
        x, z = inverse * (M.T * v), inverse * c
        bar = (v - M * x) * z.T - (M * z) * x.T
        exact = [np.array(t.tolist(), dtype=float) for t in (x, bar, M * z)]
    return A, b, k, exact[0][:, 0], exact[1], exact[2][:, 0]


@pytest.mark.parametrize("solver", ["auto", "qr", "svd", "cholesky", "lsmr"])
@pytest.mark.parametrize("damp", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("kind", ["wide", "deficient"])
def test_little_damping_beside_a_null_space(kind, damp, solver):
    """Of full row rank, its condition 30 bounds the error; dependent, that of [A; damp I] does."""
    A, b, k, x, A_bar, b_bar = little_damped(kind, damp)
    leaf, rhs = torch.from_numpy(A).requires_grad_(), torch.from_numpy(b).requires_grad_()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        got = fl.lstsq(leaf, rhs, damp=damp, solver=solver)
        bars = torch.autograd.grad(got @ torch.from_numpy(k), (leaf, rhs))
    errors = [
        np.linalg.norm(t.detach().numpy() - exact)
        for t, exact in zip((got, *bars), (x, A_bar, b_bar))
    ]
    # half of the digits of b_bar, and it is said; near that it may be or not
    lost = errors[2] / np.linalg.norm(b_bar)
    said = [issubclass(w.category, fl.AccuracyWarning) for w in given]
    assert all(said) and (said or lost < 10 * EPS**0.5) and not (said and lost < 0.1 * EPS**0.5)
    if kind == "wide":
        sizes = [np.linalg.norm(t) for t in (x, A_bar, b_bar)]
        assert all(e <= 100 * EPS * 30**2 * size for e, size in zip(errors, sizes))
        return
    size, seed = np.linalg.norm(x) + np.linalg.norm(b), np.linalg.norm(k)
    inverse = 1 / damp  # ||[A; damp I]^+||, for ||A|| = 1
    residual = np.linalg.norm(b - A @ x)
    moved = (residual * inverse**3 + size * inverse**2) * seed
    assert errors[0] <= 100 * EPS * inverse * (size + inverse * residual)
    assert errors[1] <= 100 * EPS * moved and errors[2] <= 100 * EPS * inverse**2 * seed
