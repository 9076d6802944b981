"""Little damping beside a null space: derivatives lose digits, and the warning says how many."""

from __future__ import annotations

import warnings

import pytest
import torch

import funclsq as fl


def _data(m, n, dtype, rank=None):
    g = torch.Generator().manual_seed(m)
    A = torch.randn(m, n, generator=g, dtype=torch.float64)
    if rank is not None:
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        A = U[:, :rank] * s[:rank] @ Vh[:rank]
    b, x_bar = (torch.randn(size, generator=g, dtype=torch.float64) for size in (m, n))
    return A.to(dtype), b.to(dtype), x_bar.to(dtype)


def _b_bar(A, b, x_bar, damp, **options):
    """The cotangent of b, and the warnings on the way."""
    b = b.clone().requires_grad_()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        x = fl.lstsq(A, b, damp=damp, **options)
        (b_bar,) = torch.autograd.grad(x, b, x_bar)
    return b_bar, [w for w in given if issubclass(w.category, fl.AccuracyWarning)]


def _error(A, x_bar, damp, b_bar):
    """Against (A A^T + damp^2)^-1 A x_bar, which has no null space to divide."""
    A, x_bar = A.double(), x_bar.double()
    exact = torch.linalg.solve(A @ A.T + damp**2 * torch.eye(len(A)).double(), A @ x_bar)
    return float((b_bar.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("solver", ["qr", "svd", "lsmr", "cholesky"])
@pytest.mark.parametrize("damp", [1e-5, 1e-6])
def test_the_warning_tells_the_error(solver, damp):
    A, b, x_bar = _data(10, 20, torch.float64)
    b_bar, given = _b_bar(A, b, x_bar, damp, solver=solver)
    assert len(given) == 1
    told = float(str(given[0].message).split("about ")[1].split()[0])
    assert told / 30 < _error(A, x_bar, damp, b_bar) < 30 * told


@pytest.mark.parametrize("damp", [1.0, 1e-2, 1e-3])
def test_moderate_damping_keeps_its_digits_and_does_not_warn(damp):
    A, b, x_bar = _data(10, 20, torch.float64)
    b_bar, given = _b_bar(A, b, x_bar, damp)
    assert not given and _error(A, x_bar, damp, b_bar) < 1e-7


@pytest.mark.parametrize("rank", [None, 6])
def test_a_tall_matrix_warns_where_it_is_deficient_only(rank):
    A, b, x_bar = _data(20, 10, torch.float64, rank)
    _, given = _b_bar(A, b, x_bar, 1e-5)
    assert bool(given) == (rank is not None)


@pytest.mark.parametrize("damp", [1e-12, 1e-9])
def test_a_bad_condition_is_not_laid_on_the_damping(damp):
    A, b, x_bar = _data(20, 10, torch.float64)
    Q, R = torch.linalg.qr(A)
    V = torch.linalg.qr(R)[0]
    A = Q * torch.logspace(0, -8, 10, dtype=torch.float64) @ V.mT
    assert not _b_bar(A, b, x_bar, damp, solver="svd")[1]


def test_single_precision_warns_earlier_and_double_precision_inside_helps():
    A, b, x_bar = _data(10, 20, torch.float32)
    b_bar, given = _b_bar(A, b, x_bar, 1e-2)
    assert given and "compute_dtype" in str(given[0].message)
    assert _error(A, x_bar, 1e-2, b_bar) > 1e-4
    b_bar, given = _b_bar(A, b, x_bar, 1e-2, compute_dtype=torch.float64)
    assert not given and _error(A, x_bar, 1e-2, b_bar) < 1e-6


def test_weights_and_batches_and_what_ignores_failures():
    A, b, x_bar = _data(10, 20, torch.float64)
    weights = torch.linspace(0.1, 1.0, 10, dtype=torch.float64)
    assert _b_bar(A, b, x_bar, 1e-6, weights=weights)[1]
    tame = torch.stack([A[:, :5], A[:, 5:10]])
    assert not _b_bar(tame, torch.stack([b, b])[..., None], torch.ones(2, 5, 1).double(), 1e-6)[1]
    wild = torch.stack([A, A])
    assert _b_bar(wild, torch.stack([b, b])[..., None], torch.ones(2, 20, 1).double(), 1e-6)[1]
    assert not _b_bar(A, b, x_bar, 1e-6, on_failure="ignore")[1]


def test_from_jax():
    jax = pytest.importorskip("jax")
    import funclsq.jax as flj

    A, b, x_bar = (t.numpy() for t in _data(10, 20, torch.float32))

    def loss(b):
        return (flj.lstsq(A, b, damp=1e-2) * x_bar).sum()

    with pytest.warns(fl.AccuracyWarning, match="damp is small"):
        jax.block_until_ready(jax.grad(loss)(jax.numpy.asarray(b)))
