"""solver="auto": what it chooses, and that what it tries first is cheap where it fails."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import funclsq as fl
from funclsq.methods import auto
from funclsq.methods._price import HARD, SPARSE_FACTOR, Price
from funclsq.operators import SparseOp


def _random(m, n, per_row, seed=0):
    rng = np.random.default_rng(seed)
    row = np.repeat(np.arange(m), per_row)
    col = rng.integers(0, n, m * per_row)
    return sp.coo_array((rng.standard_normal(row.size), (row, col)), shape=(m, n)).tocsr()


def _grid(side):
    D = sp.diags_array([-np.ones(side), np.ones(side)], offsets=[0, 1], shape=(side - 1, side))
    eye = sp.eye_array(side)
    return sp.vstack([sp.kron(D, eye), sp.kron(eye, D)]).tocsr()


def _chain(n):
    return sp.diags_array([-np.ones(n), np.ones(n)], offsets=[0, 1], shape=(n - 1, n)).tocsr()


@pytest.fixture
def products(monkeypatch):
    """Count the products with single columns that a solve makes."""
    made = []
    for name in ("mv", "rmv"):
        original = getattr(SparseOp, name)

        def counted(self, X, out=None, original=original):
            made.append(X.shape[-1])
            return original(self, X) if out is None else original(self, X, out=out)

        monkeypatch.setattr(SparseOp, name, counted)
    return made


def _sizes(A, k=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    shape = (A.shape[0],) if k is None else (A.shape[0], k)
    return torch.randn(shape, generator=g, dtype=torch.float64)


FULL = ", a dense one here: the sparse factor would be nearly full"


@pytest.mark.parametrize(
    ("A", "damp", "k", "chosen"),
    [
        (_random(4000, 400, 6), 0.0, None, "lsmr"),  # well-conditioned: a few iterations do
        (_random(20_000, 2000, 10, seed=5), 0.0, 2, "lsmr"),
        (_random(4000, 400, 6, seed=6), 0.0, 64, "cholesky"),  # many share a factor
        (_grid(60), 0.01, None, "cholesky"),  # thousands of iterations, a thin factor
        (_chain(3000), 0.01, None, "cholesky"),
        (_random(100, 40, 5), 0.0, None, "qr"),  # small enough to be written out
    ],
    ids=["random", "few", "many", "grid", "chain", "small"],
)
def test_the_method_suits_the_matrix(A, damp, k, chosen):
    b = _sizes(A, k)
    sol = fl.solve(A, b, damp=damp)
    assert sol.solver == chosen
    assert sol.why == {
        "lsmr": "it converged before it had cost as much as a factorisation",
        "cholesky": "an iterative method would cost more than a factorisation",
        "qr": "A is dense, or small enough to be written out",
    }.get(chosen) + (FULL if k == 64 else "")
    assert fl.solve(A, b, damp=damp, solver=chosen).why == "it was asked for"
    assert bool(sol.converged.all())
    want = fl.lstsq(A, b, damp=damp, solver="cholesky")
    assert float((sol.x - want).norm()) <= 1e-11 * float(want.norm())


@pytest.mark.parametrize(("A", "damp"), [(_grid(60), 0.01), (_chain(3000), 0.01)])
def test_a_hopeless_trial_is_given_up_early(A, damp, products):
    b = _sizes(A)
    fl.lstsq(A, b, damp=damp)
    tried = len(products)
    products.clear()
    fl.lstsq(2.0 * A, b, damp=2 * damp, solver="cholesky")
    # two checks at most, two products per iteration, and a few around them
    assert tried - len(products) <= 2 * 2 * auto.CHECK_EVERY + 12


def test_a_trial_that_looks_cheaper_than_a_factor_runs_on(products):
    A = _random(6000, 3000, 6, seed=3)  # A^H A is full enough: a dense factor
    b = _sizes(A)
    sol = fl.solve(A, b, rank="full")
    price = Price(_op(A), None).settle()
    assert price > 2 * SPARSE_FACTOR
    assert sol.solver == "lsmr"
    assert 2 * auto.CHECK_EVERY < int(sol.iterations) <= auto.SLACK * price


def test_many_columns_are_not_iterated_on_because_one_was():
    A = _random(4000, 400, 6, seed=9)
    assert fl.solve(A, _sizes(A)).solver == "lsmr"
    assert fl.solve(A, _sizes(A, 64)).solver == "cholesky"


def _places(A):
    return np.repeat(np.arange(A.shape[0]), np.diff(A.indptr)), A.indices


def _op(A):
    S = fl.SparsityPattern(*_places(A), A.shape)
    return SparseOp(S, torch.from_numpy(A.data))


def test_a_probe_cut_short_leaves_the_rank_to_the_factor(monkeypatch):
    """Where lsmr converges on b but its probe for the rank does not, the factor decides."""
    A = sp.vstack([_grid(60), 0.02 * sp.eye_array(3600)]).tocsr()
    smooth = torch.from_numpy(A @ np.ones(3600))  # a right-hand side of few singular vectors
    sol = fl.solve(A, smooth)
    assert sol.solver == "cholesky"
    assert int(sol.rank) == 3600
    np.testing.assert_allclose(sol.x.numpy(), 1.0, rtol=1e-10)


@pytest.mark.parametrize(("atol", "probe"), [(0.0, 0.5), (1e-6, 1.3045), (1e-3, 2.6089)])
def test_a_probe_for_the_rank_is_reckoned_with(atol, probe, monkeypatch):
    """Its cost is in the ratio of what is asked of it, eps^(1/2), to what is asked of x."""
    seen = []
    watch = auto._Watch
    monkeypatch.setattr(auto, "_Watch", lambda *given: seen.append(given[2:]) or watch(*given))
    monkeypatch.setattr(auto, "_fewest", lambda *_: 1.0)  # a trial is made in any case
    A = _random(4000, 400, 6, seed=9)
    for rank, more in (("full", 0.0), ("auto", probe)):
        fl.solve(A, _sizes(A), rank=rank, atol=atol, btol=atol)
        factor, goal = seen.pop()
        assert factor == pytest.approx(1 + more, rel=1e-4)
        assert goal == min(max(atol, 2.0**-52), 0.1)


def test_why_for_what_is_not_sparse_on_the_cpu():
    A = fl.LinearOperator(lambda p, v: p[0] @ v, (6, 3), (torch.eye(6, 3, dtype=torch.float64),))
    sol = fl.solve(A, torch.ones(6, dtype=torch.float64))
    assert (sol.solver, sol.why.split(",")[0]) == ("lsmr", "A has no entries at hand")
    sparse = _grid(30)
    sol = fl.solve(sparse, _sizes(sparse), rank=2)
    assert sol.why == "a rank was given, which needs an orthogonal factorisation"


def test_why_under_vmap():
    A = _random(4000, 400, 6, seed=11)
    S = fl.SparsityPattern(*_places(A), A.shape)
    values = torch.from_numpy(A.data)
    sol = torch.func.vmap(lambda b: fl.solve(fl.Sparse(S, values), b))(_sizes(A, 2).T)
    assert sol.x.shape == (2, 400)
    assert sol.method.shape == (2,)
    assert sol.why == "an iterative method would cost more than a factorisation" + FULL


class Known:
    exact = True

    def __init__(self, value, most=None):
        self.value, self.most = value, most or value

    def after(self, steps):
        return self.value if steps < HARD else self.most


def run(rates, price=None):
    """The iteration at which a trial with these rates of ||A^H r|| is given up."""
    watch = auto._Watch(price or Known(130.0), 1.0, 1.0, 1e-16)
    size = 1.0
    for count in range(1, 2000):
        size *= rates(count)
        if size < 1e-16:
            return None
        state = {"iteration": count, "normal_residual_norm": np.array([size])}
        try:
            watch(state | {"residual_norm": np.array([1.0])})
        except auto._TooSlow:
            return count


def test_the_watch_tells_steady_from_slowing():
    assert run(lambda count: 0.6) is None  # 72 iterations
    assert run(lambda count: 0.995) == auto.CHECK_EVERY
    assert run(lambda count: 0.6 if count < 6 else 0.97) <= 3 * auto.CHECK_EVERY
    assert run(lambda count: 1.001) == auto.CHECK_EVERY


def test_a_trial_is_given_up_sooner_while_what_remains_does_not_get_less():
    def slowing(count):  # sizes 1 / count^2: what remains rises for as long as one looks
        return ((count - 1) / count) ** 2 if count > 1 else 1.0

    assert run(slowing, Known(1600.0)) == 408  # the first check after 1600 / 4
    assert run(slowing, Known(600.0, 1600.0)) == 408  # a factor for what is not well conditioned
    steady = Known(160.0)  # 92 iterations, all but 2 of them foretold from the first check on
    assert run(lambda count: 0.67, steady) is None


def test_derivatives_to_come_weigh_for_a_factor():
    """The same matrix, with a loose tolerance: iterated on for x alone, factored for a gradient."""
    A = _random(4200, 700, 5, seed=2)
    A = sp.hstack([A, A + _random(4200, 700, 5, seed=3) / 7]).tocsr()
    S, b = fl.SparsityPattern(*A.tocoo().coords, A.shape), _sizes(A)
    fresh = (torch.from_numpy(A.data * (1 + i / 64)) for i in range(10))

    def choice(values):
        return fl.solve(fl.Sparse(S, values), b, atol=1e-6, btol=1e-6, rank="full").solver

    seen = []

    def loss(values):
        sol = fl.solve(fl.Sparse(S, values), b, atol=1e-6, btol=1e-6, rank="full")
        seen.append(sol.solver)
        return sol.x.square().sum()

    assert choice(next(fresh)) == "lsmr"
    assert choice(next(fresh).requires_grad_()) == "cholesky"
    with torch.no_grad():
        assert choice(next(fresh).requires_grad_()) == "lsmr"
    torch.func.grad(loss)(next(fresh))
    torch.func.jvp(loss, (next(fresh),), (torch.ones(A.nnz, dtype=torch.float64),))
    assert seen == ["cholesky", "cholesky"]


@pytest.mark.parametrize(
    ("shape", "goal", "damped", "steps"),
    [
        ((20_000, 2000), 2.0**-52, False, 31.9),
        ((2000, 20_000), 2.0**-52, False, 31.9),
        ((100_000, 64), 2.0**-52, False, 2 * auto.CHECK_EVERY),  # 10 by the formula
        ((1850, 712), 2.0**-52, False, auto.MOST_LIKELY),  # 77
        ((1850, 712), 1e-8, False, 40.0),
        ((1850, 712), 2.0**-52, True, 2 * auto.CHECK_EVERY),  # damping may be strong
        ((400, 400), 2.0**-52, False, auto.MOST_LIKELY),  # no bound by this formula
        ((400, 0), 2.0**-52, False, 2 * auto.CHECK_EVERY),
    ],
)
def test_the_fewest_iterations_that_a_trial_is_hoped_to_take(shape, goal, damped, steps):
    assert auto._fewest(shape, goal, damped) == pytest.approx(steps, rel=2e-3)


def test_no_trial_is_made_where_random_entries_would_take_too_many(products):
    A = _random(1850, 712, 5)
    b = _sizes(A).requires_grad_()
    S = fl.SparsityPattern(*_places(A), A.shape)
    counts = []
    for solver in ("cholesky", "auto"):
        products.clear()
        x = fl.lstsq(fl.Sparse(S, torch.from_numpy(A.data)), b, solver=solver)
        x.sum().backward()
        counts.append(len(products))
    assert counts[0] == counts[1] > 0


def test_a_step_on_more_columns_costs_more_and_less_for_each():
    price = Price(_op(_random(4000, 400, 6)), None)
    costs = [price.columns(k) for k in (1, 2, 8, 64)]
    assert costs[0] == 1.0 and costs == sorted(costs)
    assert costs[3] / 64 < costs[2] / 8 < costs[1] / 2


def test_a_price_is_the_same_once_the_normal_matrix_is_known():
    op = _op(_grid(60))
    first = Price(op, None)
    assert not first.exact
    assert first.settle() == Price(op, None).settle()


def test_a_dense_factor_is_dearer_where_iterations_are_many():
    """It is in double precision there, after one in single precision has been made."""
    price = Price(_op(_random(6000, 3000, 6, seed=3)), None)
    price.settle()
    assert price.after(HARD - 1) == price.value < price.most / 3 == price.after(HARD) / 3
    small = Price(_op(_random(4000, 400, 6)), None)  # too small for single precision
    assert small.after(1) == small.after(HARD) == small.settle()
