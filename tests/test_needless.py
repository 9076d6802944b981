"""A first correction that is left out: what tells it, and that no gradient is the worse for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import FAMILIES, Exact, by_qr

import funclsq as fl
from funclsq.methods._needless import Foresight, norms
from funclsq.methods._normal import Normal
from funclsq.methods._protocol import Options
from funclsq.methods.cholesky import prepare
from funclsq.operators import SparseOp
from funclsq.raw import clear_cache

EPS = np.finfo(float).eps


def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


def loosely(floor):
    return Foresight(np.asarray(floor), EPS, True)


def seen(response, floor=1.0, eps=EPS, loose=False):
    """What a solve with c has shown: one response."""
    known = Foresight(np.asarray(floor), eps, loose)
    known.see(ones(1, 1), np.asarray([response]))
    return known


# By a bound


def test_with_a_right_hand_side_in_the_domain_the_image_counts_too():
    goal, floor, whole = 1e-9, 10.0, np.array([1e-3])  # |B x|, |x| = 1
    for part, needless in ((0.999, True), (1.001, False)):
        q = part * 0.25 * goal * floor * whole[0] * ones(1, 1)
        assert loosely(floor).needless(q, np.ones(1), whole, goal, "g") == [needless]
        assert loosely(floor).needless(q, np.ones(1), None, goal, "c") == [True]


def test_of_an_image_the_relative_residual_and_the_error_count():
    goal, size, whole = 1e-9, np.array([4.0]), np.array([2.0])
    for floor, limit in ((10.0, 4.0), (0.1, 0.2)):  # |g|, then floor |y|
        for part, needless in ((0.999, True), (1.001, False)):
            q = part * 0.25 * goal * limit * ones(1, 1)
            assert loosely(floor).needless(q, size, whole, goal, "image") == [needless]


def test_columns_and_members_are_judged_on_their_own():
    q = torch.tensor([[[1e-9, 1e-7]], [[1e-9, 1e-13]]], dtype=torch.float64)
    found = loosely([[1.0], [1e-2]]).needless(q, np.ones((2, 2)), None, 1e-8, "c")
    assert found.tolist() == [[True, False], [False, True]]


# By the backward error


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize("eps", [EPS, 2.0**-23])
@pytest.mark.parametrize("response", [0.5, 30.0])
@pytest.mark.parametrize("length", [1e-3, 1e3])
def test_a_backward_error_of_two_units_is_left(response, length, eps, loose):
    known = seen(response, eps=eps, loose=loose)
    for part, stable in ((0.999, True), (1.001, False)):
        q, size = part * 2 * eps * length / response * ones(1, 1), np.array([length])
        assert known.needless(q, size, size, 1e-30, "g") == [stable]
        assert known.needless(q, size, None, 1e-30, "c") == [False]
        assert known.needless(q, size, size, 1e-30, "image") == [False]


def test_not_where_the_bound_of_it_is_poor():
    for part, stable in ((0.999, True), (1.001, False)):
        q = part * 5e3 * EPS * 1e-6 * ones(1, 1)  # 5000 units, lay it along the smallest direction
        assert seen(1.0, floor=1e-6).needless(q, np.ones(1), np.ones(1), EPS, "g") == [stable]


def test_nothing_is_left_out_before_anything_was_seen():
    known = Foresight(np.ones(()), EPS, False)
    assert known.needless(0 * ones(1, 1), np.ones(1), np.ones(1), EPS, "g") == [False]


def test_the_first_response_is_kept_and_of_its_columns_the_largest():
    q = torch.tensor([[[1.0, 0.0, 2.0]], [[0.0, 0.0, 0.0]]], dtype=torch.float64)
    known = Foresight(np.ones((2, 1)), EPS, False)
    with np.errstate(invalid="ignore"):
        known.see(0 * q, np.zeros((2, 3)))
        assert known.response is None  # nothing was to be seen
        known.see(q, np.array([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0]]))
    known.see(q, np.full((2, 3), 100.0))
    np.testing.assert_array_equal(known.response, [[3.0], [np.nan]])
    found = known.needless(1e-18 * ones(2, 1, 3), np.ones((2, 3)), np.ones((2, 3)), EPS, "g")
    assert found.tolist() == [[True] * 3, [False] * 3]


@pytest.mark.parametrize("damp", [None, 0.5, 1e-3])
@pytest.mark.parametrize("cond", [1.5, 1e2, 1e4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_correction_is_about_as_long_as_foretold(family, cond, damp):
    """|B dx| for a right-hand side g, from its residual and from what a solve with c showed."""
    rng = np.random.default_rng(0)
    A = FAMILIES[family](cond, rng)
    m, n = A.shape
    S = fl.SparsityPattern(*np.nonzero(A), A.shape)
    op = SparseOp(S, torch.from_numpy(A[np.nonzero(A)]))
    d = None if damp is None else torch.full((n,), damp, dtype=torch.float64)
    core = prepare(op, d, Options())._problem.core
    B, k = core.normal.B, 8
    c, g = (torch.from_numpy(rng.standard_normal((size, k))) for size in (B.shape[0], n))
    core.solve(c, None)
    z = core._rough(g)
    q = g - B.rmv(B.mv(z))
    foretold, true = core._known.response * norms(q), norms(B.mv(core._rough(q)))
    assert bool((foretold > true / 4).all() and (foretold < 15 * true).all())


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
    for forget, count in ((False, 1), (True, 2)):
        x = fl.lstsq(fl.Sparse(S, values), b, damp=0.5, solver="cholesky")  # damping tells the rank
        if forget:
            clear_cache()
        solves.clear()
        x.sum().backward()
        assert len(solves) == count
