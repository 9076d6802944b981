"""Every way that a solve can end is reached, told in words, and warned of where x is not right."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import SOLVERS, operands, problem

import funclsq as fl
from funclsq.info import residual_norms
from funclsq.methods._protocol import Options
from funclsq.operators import DenseOp, DenseStructure
from funclsq.plan import Plan
from funclsq.raw import raw_solve
from funclsq.solution import describe

F64 = torch.float64
S = fl.Status


def _tall(consistent=False):
    A, b = operands(problem("tall_vector"), F64, "dense")
    return A, (A @ A.sum(0) if consistent else b)


def _solved():
    """A, b and the x that solves it: sums and products of sixteenths, which no machine rounds."""
    A = (16 * _tall()[0]).round() / 16
    x = torch.arange(1.0, A.shape[1] + 1, dtype=F64)
    return A.requires_grad_(), A.detach() @ x, x


def _ill_conditioned(cond):
    """A matrix whose condition no scaling of its columns mends."""
    U, _ = torch.linalg.qr(torch.randn(30, 12, dtype=F64))
    V, _ = torch.linalg.qr(torch.randn(12, 12, dtype=F64))
    sigma = cond ** -torch.linspace(0, 1, 12, dtype=F64)
    return U * sigma @ V.mT, torch.randn(30, dtype=F64)


def _skipped():
    A, b = _tall()
    plan = Plan.of(DenseStructure(7, 4), Options())
    _, _, info = raw_solve(plan, (A,), None, None, b[:, None], None, torch.zeros((), dtype=F64))
    return info[:, 0].to(torch.int64)


def _stop_at(count):
    """A callback that ends the solve at this iteration."""

    def callback(state):
        if state["iteration"] >= count:
            raise StopIteration

    return callback


REACHED = {
    S.START_SOLVES: lambda: fl.solve(_tall()[0], 0 * _tall()[1], solver="lsmr"),
    S.RESIDUAL_SMALL: lambda: fl.solve(*_tall(True), solver="lsmr", atol=1e-6, btol=1e-6),
    S.NORMAL_RESIDUAL_SMALL: lambda: fl.solve(*_tall(), solver="lsmr", atol=1e-6),
    S.CONDITION_LIMIT: lambda: fl.solve(*_tall(), solver="lsmr", conlim=1.5, on_failure="ignore"),
    S.RESIDUAL_AT_EPS: lambda: fl.solve(*_tall(True), solver="lsmr"),
    S.NORMAL_RESIDUAL_AT_EPS: lambda: fl.solve(*_tall(), solver="lsmr"),
    S.INTERRUPTED: lambda: fl.solve(
        *_tall(), solver="lsmr", callback=_stop_at(1), on_failure="ignore"
    ),
    S.MAXITER: lambda: fl.solve(*_tall(), solver="lsmr", maxiter=1, on_failure="ignore"),
    S.DIRECT: lambda: fl.solve(*_tall(), solver="qr"),
    S.STAGNATED: lambda: fl.solve(
        *_ill_conditioned(1e12), solver="lsmr", rank="full", on_failure="ignore"
    ),
    S.INACCURATE: lambda: fl.solve(
        *_ill_conditioned(1e16), solver="cholesky", rcond=0.0, on_failure="ignore"
    ),
    S.NONFINITE: lambda: fl.solve(
        1e-300 * _tall()[0], 1e300 * _tall()[1], solver="qr", on_failure="ignore"
    ),
    S.DIVERGED: lambda: fl.solvers.gradient_descent(*_tall(), step=10.0, on_failure="ignore"),
    S.SKIPPED: _skipped,
}


@pytest.mark.parametrize("status", REACHED, ids=lambda s: s.name)
def test_every_status_is_reached(status):
    got = REACHED[status]()
    codes = got.status if isinstance(got, fl.Solution) else got
    assert set(codes.reshape(-1).tolist()) == {int(status)}
    if isinstance(got, fl.Solution):
        assert got.message.startswith(status.name)
        assert bool(got.converged.all()) == status.converged


def test_every_status_has_advice_and_a_recipe_here():
    assert set(REACHED) == set(S)
    for status in S:
        assert len(status.advice) > 10


def test_the_message_names_the_worst_of_many():
    A, b = _tall()
    many = torch.stack((0 * b, b, b), 1)
    solution = fl.solve(A, many, solver="lsmr", maxiter=1, on_failure="ignore")
    assert solution.status.tolist() == [S.START_SOLVES, S.MAXITER, S.MAXITER]
    assert solution.converged.tolist() == [True, False, False]
    assert solution.message.startswith("2 of 3 solves failed; member 1: MAXITER")
    assert "iterations 1" in solution.message
    whole = fl.solve(A, many)
    assert whole.message.startswith("all 3 solves converged; member 0: DIRECT")
    nothing = torch.zeros(0)
    assert describe(nothing, nothing, nothing, nothing) == "nothing to solve"


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
def test_a_solve_that_did_not_converge_warns_or_raises(solver):
    A, b = _tall()
    settings = {"solver": solver, "maxiter": 1}
    message = r"MAXITER: .*raise maxiter.*\(iterations 1, \|\|r\|\| = \d.*, \|\|A\^H r\|\| = \d"
    with pytest.warns(fl.ConvergenceWarning, match=message):
        fl.lstsq(A, b, **settings)
    with pytest.warns(fl.ConvergenceWarning, match=message):
        fl.solve(A, b, **settings)
    with pytest.raises(fl.ConvergenceError, match=message):
        fl.lstsq(A, b, **settings, on_failure="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = fl.solve(A, b, **settings, on_failure="ignore")
    assert not bool(solution.converged)
    assert issubclass(fl.ConvergenceWarning, fl.FunclsqWarning)
    assert issubclass(fl.ConvergenceError, RuntimeError)


def test_a_failed_derivative_solve_raises_where_failure_raises():
    A, b, x0 = _solved()  # the forward solve starts at the solution
    x = fl.lstsq(A, b, x0=x0, solver="lsmr", maxiter=1, on_failure="raise", rank="full")
    with pytest.raises(fl.ConvergenceError, match="MAXITER"):
        x.square().sum().backward()


def test_a_failed_derivative_solve_warns():
    A, b, x0 = _solved()
    x = fl.lstsq(A, b, x0=x0, solver="lsmr", maxiter=1, rank="full")
    with pytest.warns(fl.ConvergenceWarning, match="MAXITER.*iterations 1"):
        x.square().sum().backward()
    A = torch.tensor([[1e-200]], dtype=F64, requires_grad=True)  # its inverse squared overflows
    x = fl.lstsq(A, torch.tensor([1e-200], dtype=F64), solver="qr")
    with pytest.warns(fl.ConvergenceWarning, match="NONFINITE"):
        (1e100 * x).square().sum().backward()


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls", "gradient_descent"])
@pytest.mark.parametrize("columns", [1, 3])
def test_a_callback_ends_a_solve_by_stop_iteration(solver, columns):
    A, b = _ill_conditioned(1e4)
    b = b[:, None] * torch.arange(1.0, columns + 1, dtype=F64)
    seen = []

    def callback(state):
        seen.append(state["iteration"])
        if len(seen) == 4:
            raise StopIteration

    with pytest.warns(fl.ConvergenceWarning, match="INTERRUPTED: the callback ended the solve"):
        sol = fl.solve(A, b, solver=solver, rank="full", callback=callback)
    assert len(seen) == 4
    assert sol.status.tolist() == columns * [S.INTERRUPTED]
    assert sol.iterations.tolist() == columns * [seen[-1]]
    same = fl.solve(A, b, solver=solver, rank="full", maxiter=seen[-1], on_failure="ignore")
    assert torch.equal(sol.x, same.x)


def test_a_column_that_has_converged_is_not_interrupted():
    A, b = _ill_conditioned(1e4)
    both = torch.stack((0 * b, b), 1)
    sol = fl.solve(A, both, solver="lsmr", callback=_stop_at(2), on_failure="ignore")
    assert sol.status.tolist() == [S.START_SOLVES, S.INTERRUPTED]


def test_a_slow_problem_does_not_fail_in_silence():
    """A difference operator with little damping: 98% wrong at 100 steps, elsewhere unsaid."""
    n = 300
    D = torch.diag(torch.full((n,), 2.0, dtype=F64))
    D -= torch.diag(torch.ones(n - 1, dtype=F64), 1) + torch.diag(torch.ones(n - 1, dtype=F64), -1)
    A = torch.cat((D, 1e-3 * torch.eye(n, dtype=F64)))
    b = torch.randn(2 * n, dtype=F64)
    exact = torch.linalg.lstsq(A, b).solution
    with pytest.warns(fl.ConvergenceWarning, match="MAXITER"):
        early = fl.lstsq(A, b, solver="lsmr", maxiter=100)
    assert torch.linalg.vector_norm(early - exact) > 0.5 * torch.linalg.vector_norm(exact)
    for solver in ("auto", "lsmr", "cholesky"):
        x = fl.lstsq(A.to_sparse_csr(), b, solver=solver)
        assert torch.linalg.vector_norm(x - exact) < 1e-7 * torch.linalg.vector_norm(exact)


def test_a_false_word_of_full_rank_is_told():
    A, b = operands(problem("deficient_tall"), F64, "dense")
    with pytest.warns(fl.RankWarning, match=r"rank='full' was asserted.*rank 3 of 5.*rank='auto'"):
        x = fl.lstsq(A, b, rank="full")
    torch.testing.assert_close(x, fl.lstsq(A, b))


# ---------------------------------------------------------------------------------------------
# What a Solution tells.


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "everything_deficient"])
def test_norms_rank_and_condition_are_those_of_the_problem(name, solver):
    p = problem(name)
    data = p.tensors(F64)
    more = {n: data[n] for n in p.names[2:]}
    solution = fl.solve(data["A"], data["b"], **more, solver=solver)
    w = data.get("weights", torch.ones(p.A.shape[0], dtype=F64))[:, None]
    damp = data.get("damp", torch.zeros(p.A.shape[1], dtype=F64))
    x0 = data.get("x0", 0.0)
    r = data["b"] - data["A"] @ solution.x
    norms = (w.sqrt() * r).norm(dim=0)
    torch.testing.assert_close(solution.residual_norm, norms, rtol=1e-10, atol=1e-13)
    s = data["A"].mT @ (w * r) - damp[:, None] ** 2 * (solution.x - x0)
    scale = float((data["A"].abs().mT @ (w * data["b"].abs())).max())
    assert (solution.normal_residual_norm - s.norm(dim=0)).abs().max() < 1e-13 * scale
    assert solution.normal_residual_norm.max() < 1e-12 * scale
    stacked = torch.cat((w.sqrt() * data["A"], torch.diag(damp)))
    if solver in ("auto", "qr", "svd", "cholesky"):
        assert solution.rank.tolist() == [p.rank, p.rank]
        sigma = torch.linalg.svdvals(stacked)[: p.rank]
        assert bool((solution.cond > 1 - 1e-12).all())
        if solver == "svd":
            cond = (sigma[0] / sigma[-1]).expand(2)
            torch.testing.assert_close(solution.cond, cond, rtol=1e-9, atol=0)
    assert solution.solver == ("qr" if solver == "auto" else solver)
    assert solution.iterations.min() >= 0
    assert solution.status.dtype == solution.rank.dtype == torch.int64
    assert solution.status.shape == (2,)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("solver", ["qr", "svd", "cholesky"])
def test_each_member_of_a_batch_has_its_own_rank_and_condition(solver, k):
    A = torch.randn(3, 6, 3, dtype=F64)
    A[1, :, 2] = A[1, :, 0] + A[1, :, 1]
    A[2, :, 1:] = A[2, :, :1]
    solution = fl.solve(A, torch.randn(3, 6, k, dtype=F64), solver=solver)
    assert solution.rank.tolist() == [[3] * k, [2] * k, [1] * k]
    if solver == "svd":
        s = torch.linalg.svdvals(A)
        cond = torch.stack((s[0, 0] / s[0, 2], s[1, 0] / s[1, 1], s[2, 0] / s[2, 0]))
        torch.testing.assert_close(solution.cond, cond[:, None].expand(3, k), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("end", ["lost", "subnormal", "moderate", "infinite"])
def test_norms_of_residuals_whose_squares_leave_the_range(end, dtype):
    single = dtype == torch.float32
    sizes = {"lost": (-25, -200), "subnormal": (-21, -160), "infinite": (25, 200)}
    size = 10.0 ** sizes.get(end, (0, 0))[0 if single else 1]
    A, x = torch.randn(6, 3, dtype=dtype), torch.randn(3, 2, dtype=dtype)
    c, g = torch.randn(6, 2, dtype=dtype), torch.randn(3, 2, dtype=dtype)
    w, d2 = torch.rand(6, dtype=dtype), torch.rand(3, dtype=dtype)
    for w_, d2_, c_, g_ in ((None, None, c, None), (w, None, c, g), (w, d2, None, g)):
        r = (0 if c_ is None else c_) - A @ x
        weights = torch.ones(6, dtype=dtype) if w_ is None else w_
        s = A.T @ (weights[:, None] * r) + (0 if g_ is None else g_)
        s = s - (0 if d2_ is None else d2_[:, None] * x)
        want = [(weights.sqrt()[:, None] * r).norm(dim=0), s.norm(dim=0)]
        given = [None if t is None else size * t for t in (c_, g_)]
        got = residual_norms(DenseOp(A), w_, d2_, *given, size * x, None)
        for one, other in zip(got, want):
            torch.testing.assert_close(one / size, other, rtol=1e-5, atol=0)


def test_a_solution_is_a_pytree():
    A, b = _tall()
    solution = fl.solve(A, b)
    leaves, spec = torch.utils._pytree.tree_flatten(solution)
    assert all(isinstance(t, torch.Tensor) for t in leaves)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.message == solution.message
    assert again.solver == "qr"


def test_solver_functions_are_the_solvers_by_name():
    A, b = _tall()
    for name in ("lsmr", "lsqr", "cgls", "cholesky", "qr", "svd"):
        f = getattr(fl.solvers, name)
        solution = f(A, b)
        assert solution.solver == name
        torch.testing.assert_close(solution.x, fl.lstsq(A, b, solver=f), rtol=0, atol=0)
        torch.testing.assert_close(solution.x, fl.lstsq(A, b, solver=name), rtol=0, atol=0)


def test_a_foreign_solver_may_report_a_status_of_its_own():
    A, b = _tall()

    def gives_up(A, b):
        return fl.solve(A, b, solver="lsmr", maxiter=1, on_failure="ignore")

    with pytest.warns(fl.ConvergenceWarning, match="MAXITER"):
        solution = fl.solve(A, b, solver=gives_up)
    assert solution.solver == "foreign"
    assert int(solution.status) == S.MAXITER
