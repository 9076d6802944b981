"""What a derivative costs, counted in products with A and A^H and in uses of the factor.

Counts, not seconds: they are the same on every machine. A product with a block of k columns
counts k times.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import funclsq as fl
from funclsq import compiled, entries, operators, passes
from funclsq.methods._normal import Normal
from funclsq.raw import clear_cache

FULL_RANK = 1.3  # of the forward products: one run with z and A z together
UNKNOWN_RANK = 3.3  # a probe of the rank, or the two applications of G^+ of the null-space term
DIRECT = 2  # solves with the kept factor beyond those of the forward pass: the two of refinement


class Counts:
    """Products (columns), factorisations, and solves with a factor since the last ``take``."""

    def __init__(self) -> None:
        self.products = self.factors = self.solves = 0

    def take(self) -> tuple[int, int, int]:
        seen = (self.products, self.factors, self.solves)
        self.products = self.factors = self.solves = 0
        return seen


@pytest.fixture(params=["products", "passes"])
def counts(request, monkeypatch):
    """Products with torch's kernels, or in passes by compiled loops, where one may be two."""
    counts = Counts()
    passing = request.param == "passes" and compiled.loops() is not None
    if request.param == "passes" and not passing:
        pytest.skip("numba is not installed")
    monkeypatch.setattr(passes, "LEAST", 0 if passing else 1 << 60)
    clear_cache()
    csr_mm, factor, solve = operators.csr_mm, Normal.factor, Normal.solve

    def counted_csr_mm(matrix, X, out=None):
        counts.products += X.shape[1]
        return csr_mm(matrix, X, out)

    def counted_factor(self, **how):
        counts.factors += 1
        return factor(self, **how)

    def counted_solve(self, q):
        counts.solves += 1
        return solve(self, q)

    monkeypatch.setattr(operators, "csr_mm", counted_csr_mm)
    for name, made in (("apply", 1), ("adjoint", 1), ("through", 2), ("descend", 1)):
        monkeypatch.setattr(passes.Rows, name, counting(getattr(passes.Rows, name), made, counts))
    monkeypatch.setattr(Normal, "factor", counted_factor)
    monkeypatch.setattr(Normal, "solve", counted_solve)
    return counts


def counting(method, made, counts):
    def counted(self, *arguments):
        counts.products += made
        return method(self, *arguments)

    return counted


def random_pattern(m, n, per_row, seed):
    rng = np.random.default_rng(seed)
    row = np.repeat(np.arange(m), per_row)
    col = np.concatenate([rng.choice(n, per_row, replace=False) for _ in range(m)])
    return fl.SparsityPattern(row, col, (m, n)), torch.from_numpy(rng.standard_normal(row.size))


def chain(n):
    """First differences and one anchor: the condition number grows with n."""
    row = np.concatenate((np.arange(n - 1), np.arange(n - 1), [n - 1]))
    col = np.concatenate((np.arange(n - 1), np.arange(1, n), [0]))
    values = np.concatenate((-np.ones(n - 1), np.ones(n - 1), [1.0]))
    return fl.SparsityPattern(row, col, (n, n)), torch.from_numpy(values)


def deficient(m, n):
    """Columns j and j + n/2 are equal: rank n/2."""
    S, values = random_pattern(m, n // 2, 5, 3)
    row, col = np.concatenate((S.row, S.row)), np.concatenate((S.col, S.col + n // 2))
    return fl.SparsityPattern(row, col, (m, n)), torch.cat((values, values))


def ratio(counts, S, values, k, **options):
    """Products of the backward pass over those of the forward pass, gradients in all asked."""
    torch.manual_seed(1)
    values = values.clone().requires_grad_()
    b = torch.randn(S.shape[0], k, dtype=torch.float64, requires_grad=True)
    x_bar = torch.randn(S.shape[1], k, dtype=torch.float64)
    counts.take()
    x = fl.lstsq(fl.Sparse(S, values), b, **options)
    forward, _, _ = counts.take()
    torch.autograd.grad(x, (values, b), x_bar)
    backward, _, _ = counts.take()
    assert forward > 4 * k  # an iteration was run
    return backward / forward


PROBLEMS = {
    "random": lambda: random_pattern(2000, 200, 8, 0),
    "chain": lambda: chain(300),
    "square": lambda: random_pattern(400, 200, 6, 2),
}


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_known_rank_costs_one_run(counts, problem, solver, k):
    S, values = PROBLEMS[problem]()
    assert ratio(counts, S, values, k, solver=solver, rank="full") <= FULL_RANK


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize("problem", ["random", "chain", "deficient", "wide"])
def test_damping_costs_one_run(counts, problem, solver):
    make = {
        **PROBLEMS,
        "deficient": lambda: deficient(500, 100),
        "wide": lambda: random_pattern(150, 400, 6, 4),
    }
    S, values = make[problem]()
    # A cotangent has a part in the null space of A that b never has. There G is damp^2: one more
    # eigenvalue, and one more step. Column scaling spreads it into as many as there are norms.
    options = {"scale": False} if problem == "deficient" else {}
    assert ratio(counts, S, values, 1, solver=solver, damp=0.3, **options) <= FULL_RANK


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize("problem", ["random", "deficient", "wide"])
def test_unknown_rank_costs_at_most_three_runs(counts, problem, solver):
    make = {
        **PROBLEMS,
        "deficient": lambda: deficient(500, 100),
        "wide": lambda: random_pattern(150, 400, 6, 4),
    }
    S, values = make[problem]()
    assert ratio(counts, S, values, 1, solver=solver) <= UNKNOWN_RANK


def test_matrix_free_costs_one_run():
    torch.manual_seed(0)
    M = torch.randn(300, 60, dtype=torch.float64)
    seen = [0]

    def matvec(params, v):
        seen[0] += 1
        return params[0] @ v

    def rmatvec(params, u):
        seen[0] += 1
        return params[0].mT @ u

    M.requires_grad_()
    A = fl.LinearOperator(matvec, (300, 60), (M,), rmatvec)
    b = torch.randn(300, dtype=torch.float64, requires_grad=True)
    seen[0] = 0
    x = fl.lstsq(A, b, solver="lsmr", rank="full")
    forward, seen[0] = seen[0], 0
    torch.autograd.grad(x, (M, b), torch.randn(60, dtype=torch.float64))
    assert seen[0] <= FULL_RANK * forward


@pytest.mark.parametrize("damp", [0.0, 0.1])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_direct_backward_uses_the_kept_factor(counts, problem, damp):
    S, values = PROBLEMS[problem]()
    values = (1.01 * values).requires_grad_()
    b = torch.randn(S.shape[0], 3, dtype=torch.float64, requires_grad=True)
    x_bar = torch.randn(S.shape[1], 3, dtype=torch.float64)
    f = fl.factorize(fl.Sparse(S, values), solver="cholesky", damp=damp)
    _, made, _ = counts.take()
    assert made == 1
    x = f.solve(b)
    _, again, forward = counts.take()
    torch.autograd.grad(x, (values, b), x_bar)
    _, refactored, backward = counts.take()
    assert again == refactored == 0
    assert 1 <= backward <= forward + DIRECT


@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_with_a_tolerance_a_direct_gradient_is_one_solve(counts, damp):
    """Two triangular solves: a well-conditioned problem needs no correction to reach 1e-8."""
    S, values = random_pattern(300, 40, 6, 7)
    values.requires_grad_()
    b = torch.randn(300, dtype=torch.float64, requires_grad=True)
    found = []
    for atol in (None, 1e-8):
        options = {} if atol is None else {"atol": atol}
        x = fl.lstsq(fl.Sparse(S, values), b, damp=damp, solver="cholesky", **options)
        _, _, forward = counts.take()
        bars = torch.autograd.grad(x.square().sum(), (values, b))
        _, refactored, backward = counts.take()
        assert refactored == 0
        found.append((forward, backward, x.detach(), *bars))
    (forward, backward, *exact), (less, once, *found) = found
    assert backward == once == 1 and less == forward - 1
    for a, c in zip(found, exact):
        assert torch.linalg.vector_norm(a - c) <= 1e-8 * torch.linalg.vector_norm(c)


def test_what_nobody_asks_for_costs_nothing(counts, monkeypatch):
    """b_bar alone takes no sampled outer product, and no null-space term."""
    S, values = PROBLEMS["random"]()
    b = torch.randn(S.shape[0], dtype=torch.float64, requires_grad=True)
    for name in ("sddmm_csr", "sddmm_few"):
        monkeypatch.setattr(entries, name, None)
    x = fl.lstsq(fl.Sparse(S, values), b, solver="lsmr", rank="full")
    forward, _, _ = counts.take()
    x.sum().backward()
    backward, _, _ = counts.take()
    assert backward <= FULL_RANK * forward
