"""A first correction that is left out: what tells it, and that no gradient is the worse for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import FAMILIES, Exact, by_qr

import funclsq as fl
from funclsq.methods._needless import Foresight, norms
from funclsq.methods._normal import Normal
from funclsq.raw import clear_cache

EPS = np.finfo(float).eps


def seen(response, floor=1.0, eps=EPS):
    """What a solve with c has shown, one response for each member."""
    known = Foresight(np.asarray(floor), eps, False)
    known.see(np.ones(1), np.asarray(response))
    return known


@pytest.mark.parametrize("eps", [EPS, 2.0**-23])
@pytest.mark.parametrize("response", [0.5, 30.0])
@pytest.mark.parametrize("length", [1e-3, 1e3])
def test_a_backward_error_of_two_units_is_left(response, length, eps):
    known = seen([response], eps=eps)
    x = torch.full((1, 1), length, dtype=torch.float64)
    for part, stable in ((0.999, True), (1.001, False)):
        q = part * 2 * eps * x / response
        assert known.stable(norms(q), norms(x)) == [stable]


def test_not_where_the_bound_of_it_is_poor():
    x = torch.ones((1, 1), dtype=torch.float64)
    for part, stable in ((0.999, True), (1.001, False)):
        q = part * 5e3 * EPS * 1e-6 * x  # 5000 units if it lay along the smallest singular vector
        assert seen([1.0], floor=1e-6).stable(norms(q), norms(x)) == [stable]


def test_the_first_response_is_kept_and_of_its_columns_the_largest():
    q = torch.tensor([[[1.0, 0.0, 2.0]], [[0.0, 0.0, 0.0]]], dtype=torch.float64)
    known = Foresight(np.ones((2, 1)), EPS, False)
    with np.errstate(invalid="ignore"):
        known.see(np.zeros((2, 3)), np.zeros((2, 3)))
        assert known.response is None  # nothing was to be seen
        known.see(norms(q), np.array([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]]))
    known.see(norms(q), np.full((2, 3), 100.0))
    np.testing.assert_array_equal(known.response, [[3.0], [np.nan]])
    small = torch.full((2, 1, 3), 1e-18, dtype=torch.float64)
    x = torch.ones((2, 1, 3), dtype=torch.float64)
    assert known.stable(norms(small), norms(x)).tolist() == [[True] * 3, [False] * 3]


@pytest.fixture
def solves(monkeypatch):
    """Solves with a factor, each as one entry."""
    made, solve = [], Normal.solve
    monkeypatch.setattr(Normal, "solve", lambda normal, q: made.append(0) or solve(normal, q))
    clear_cache()
    return made


def gradients(A, b, x_bar, damp, solves):
    """x and its gradients in the stored entries and in b; ``solves`` has those of the gradients."""
    S = fl.SparsityPattern(*np.nonzero(A), A.shape)
    values = torch.from_numpy(A[np.nonzero(A)]).requires_grad_()
    rhs = torch.from_numpy(b).requires_grad_()
    x = fl.lstsq(fl.Sparse(S, values), rhs, damp=damp, solver="cholesky")
    solves.clear()
    return x, torch.autograd.grad(x, (values, rhs), torch.from_numpy(x_bar))


def pulled_back(A, b, x, z):
    """The same by formula, from x and from z = (A^H A + damp^2)^-1 x_bar."""
    y = A @ z
    return (np.outer(b - A @ x, z) - np.outer(y, x))[np.nonzero(A)], y


def error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("damp", [0.0, 0.5, 1e-3])
@pytest.mark.parametrize("cond", [1.5, 10.0, 1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_as_accurate_as_by_qr(family, cond, damp, solves):
    """Within ten times, whether one solve gave them or more."""
    rng = np.random.default_rng(0)
    A = FAMILIES[family](cond, rng)
    m, n = A.shape
    b, x_bar = rng.standard_normal(m), rng.standard_normal(n)
    d = np.full(n, damp) if damp else None
    exact = Exact(A, d)
    columns = b[:, None], x_bar[:, None]
    true = exact.solve(columns[0], None)[0][:, 0], exact.solve(None, columns[1])[0][:, 0]
    qr = (by_qr(A, d, columns[0], None)[:, 0], by_qr(A, d, None, columns[1])[:, 0])
    want, rival = pulled_back(A, b, *true), pulled_back(A, b, *qr)
    _, bars = gradients(A, b, x_bar, damp, solves)
    for bar, right, by in zip(bars, want, rival, strict=True):
        assert error(bar.numpy(), right) <= 10 * max(error(by, right), 4 * EPS)


@pytest.mark.parametrize(
    ("cond", "damp", "once"),
    [(1.5, 0.0, True), (1e2, 0.5, True), (1e8, 0.5, True), (1e3, 0.0, False), (1e5, 0.0, False)],
)
def test_one_solve_where_rounding_is_all_that_it_leaves(cond, damp, once, solves):
    """And the same to the last digit each time, from a kept factor or from a new one."""
    rng = np.random.default_rng(0)
    A = FAMILIES["random"](cond, rng)
    b, x_bar = rng.standard_normal(A.shape[0]), rng.standard_normal(A.shape[1])
    found = []
    for new in (True, False, True):
        if new:
            clear_cache()
        x, bars = gradients(A, b, x_bar, damp, solves)
        assert (len(solves) == 1) == once
        found.append((x.detach(), *bars))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_a_gradient_without_its_forward_solve_is_corrected(solves):
    """Nothing was seen of the factor: it was made for the gradient alone."""
    rng = np.random.default_rng(0)
    A = FAMILIES["random"](1.5, rng)
    S = fl.SparsityPattern(*np.nonzero(A), A.shape)
    values = torch.from_numpy(A[np.nonzero(A)])
    b = torch.randn(A.shape[0], dtype=torch.float64, requires_grad=True)
    x = fl.lstsq(fl.Sparse(S, values), b, solver="cholesky")
    clear_cache()
    solves.clear()
    x.sum().backward()
    assert len(solves) > 1
