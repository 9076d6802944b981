"""Gradient descent: torch's own steps, textbook rates, implicit and unrolled derivatives."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import funclsq as fl

gradient_descent = fl.solvers.gradient_descent

F64 = torch.float64
quiet = partial(gradient_descent, on_failure="ignore")


@pytest.fixture
def problem():
    """A is 60 x 8 of condition number 3 with singular values 1 to 3; b is inconsistent."""
    U = torch.linalg.qr(torch.randn(60, 8, dtype=F64)).Q
    V = torch.linalg.qr(torch.randn(8, 8, dtype=F64)).Q
    A = U @ torch.diag(torch.linspace(1, 3, 8, dtype=F64)) @ V.T
    return A, torch.randn(60, 2, dtype=F64)


def normal_residual(A, b, x, damp=0.0, weights=None, x0=0.0):
    r = b - A @ x
    r = r if weights is None else weights.unsqueeze(-1) * r
    return A.mH @ r - damp**2 * (x - x0)


# The iteration


@pytest.mark.parametrize("unrolled", [False, True])
@pytest.mark.parametrize(
    "how", [{}, {"momentum": 0.6}, {"momentum": 0.6, "nesterov": True}], ids=str
)
def test_steps_are_those_of_torch_sgd(problem, how, unrolled):
    A, b = problem
    x = torch.zeros(8, 2, dtype=F64, requires_grad=True)
    sgd = torch.optim.SGD([x], lr=0.01, **how)
    path = [x.detach().clone()]
    for _ in range(30):
        sgd.zero_grad()
        ((A @ x - b) ** 2).sum().backward()
        sgd.step()
        path.append(x.detach().clone())
    sol = quiet(A, b, step=0.01, maxiter=30, history=True, unrolled=unrolled, **how)
    torch.testing.assert_close(sol.history.x, torch.stack(path), rtol=1e-13, atol=1e-14)
    rnorm = torch.linalg.vector_norm(b - A @ sol.history.x, dim=-2)
    torch.testing.assert_close(sol.history.residual_norm, rnorm)


VARIANTS = {
    "fixed": {"step": 0.05},
    "1/L": {},
    "exact": {"step": "exact"},
    "heavy ball": {"step": 0.1, "momentum": 0.25},
    "nesterov": {"momentum": 0.5, "nesterov": True},
    "adaptive": {"momentum": "adaptive"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_reaches_the_minimum(problem, name):
    A, b = problem
    sol = gradient_descent(A, b, **VARIANTS[name])
    assert bool(sol.converged.all())
    assert sol.solver == "gradient_descent"
    assert torch.linalg.vector_norm(normal_residual(A, b, sol.x)) < 1e-13
    expected = np.linalg.lstsq(A.numpy(), b.numpy())[0]
    np.testing.assert_allclose(sol.x.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("fixed", 1 - 2 * 0.05 * 1.0),  # 1 - t lambda_min(2 A^T A)
        ("1/L", 1 - 1 / 9),  # 1 - 1 / kappa^2
        ("exact", (9 - 1) / (9 + 1)),
        ("heavy ball", (3 - 1) / (3 + 1)),  # best t and beta: (kappa - 1) / (kappa + 1)
        ("nesterov", 1 - 1 / 3),  # on a quadratic
    ],
)
def test_rates_are_those_of_the_textbook(problem, name, rate):
    A, b = problem
    how = VARIANTS[name]
    if name == "heavy ball":
        how = {"step": 2 / (3 + 1) ** 2, "momentum": ((3 - 1) / (3 + 1)) ** 2}
    x = quiet(A, b, maxiter=40, history=True, **how).history.x
    exact = torch.linalg.lstsq(A, b).solution
    error = torch.linalg.matrix_norm(A @ (x - exact))
    achieved = float((error[-1] / error[10]) ** (1 / (len(error) - 11)))
    assert achieved < rate * 1.06  # the heavy ball's double root: k rate^k
    assert achieved > rate * 0.85


def test_step_from_power_iteration_is_one_over_L(problem):
    A, b = problem
    L = 2 * torch.linalg.matrix_norm(A, 2) ** 2
    auto, given = (quiet(A, b, step=s, maxiter=5).x for s in ("1/L", float(1 / L)))
    torch.testing.assert_close(auto, given, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("kind", ["dense", "sparse", "operator"])
def test_every_operand(dtype, kind):
    real = torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype
    keep = torch.rand(40, 6) < 0.6
    A = torch.randn(40, 6, dtype=dtype) * keep
    b, x0 = torch.randn(40, 3, dtype=dtype), torch.randn(6, 3, dtype=dtype)
    damp = torch.linspace(0.0, 1, 6, dtype=real)
    weights = torch.rand(40, dtype=real)
    given = A
    if kind == "sparse":
        given = A.to_sparse_csr()
    elif kind == "operator":
        given = fl.LinearOperator(lambda p, v: p[0] @ v, (40, 6), (A,))
    sol = gradient_descent(given, b, damp=damp, weights=weights, x0=x0)
    s = normal_residual(A, b, sol.x, damp.unsqueeze(-1), weights, x0)
    assert sol.x.dtype == dtype
    assert float(s.abs().max()) < 300 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", ["wide", "deficient"])
def test_of_several_minimisers_the_one_nearest_the_start(shape):
    A = torch.randn(12, 4, dtype=F64)
    A = torch.cat([A, A[:, :2]], 1) if shape == "deficient" else A.T.contiguous()
    b, x0 = torch.randn(A.shape[0], dtype=F64), torch.randn(A.shape[1], dtype=F64)
    x = fl.lstsq(A, b, x0=x0, solver="gradient_descent")
    torch.testing.assert_close(x, x0 + torch.linalg.pinv(A) @ (b - A @ x0))


def test_the_tutorials_ten_thousand_steps():
    X = torch.from_numpy(np.linspace((0, 1, 2), (1, 2, 3), 10))
    torch.manual_seed(0)
    y = X @ torch.tensor([3.0, 6.0, 9.0], dtype=F64) + 3
    y = y + torch.randn(y.shape)
    start = torch.cat([torch.randn(3, dtype=F64), torch.randn(1, dtype=F64)])
    A = torch.cat([X, torch.ones(10, 1, dtype=F64)], 1)
    sol = gradient_descent(A, y, step=0.01, x0=start, atol=1e-9)
    w = torch.tensor([2.9161651, 6.49297422, 8.25240041, 3.8987414381436416], dtype=F64)
    torch.testing.assert_close(sol.x, w, rtol=0, atol=1e-8)
    assert float(sol.residual_norm) ** 2 == pytest.approx(11.347854769083378, abs=1e-8)
    assert bool(sol.converged)


# Mini-batches


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_batches_are_the_same_dense_sparse_and_unrolled(momentum):
    A = torch.randn(50, 6, dtype=F64) * (torch.rand(50, 6) < 0.5)
    b = torch.randn(50, 2, dtype=F64)
    how = {"step": 0.002, "batch_size": 16, "momentum": momentum, "damp": 0.3, "maxiter": 7}
    runs = [quiet(M, b, unrolled=u, **how).x for M in (A, A.to_sparse_coo()) for u in (False, True)]
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-12, atol=1e-13)
    other = quiet(A, b, seed=1, **how).x
    assert not torch.allclose(other, runs[0])


def test_batches_by_hand():
    A, b = torch.randn(10, 3, dtype=F64), torch.randn(10, dtype=F64)
    x = torch.zeros(3, dtype=F64)
    order = np.random.default_rng(4)
    for _ in range(3):
        for rows in torch.from_numpy(order.permutation(10)).split(4):
            share = len(rows) / 10
            x = x - 0.01 * 2 * (A[rows].T @ (A[rows] @ x - b[rows]) + share * 0.25 * x)
    sol = quiet(A, b, step=0.01, batch_size=4, seed=4, maxiter=3, damp=0.5)
    torch.testing.assert_close(sol.x, x)
    assert int(sol.iterations) == 3


def test_batches_solve_a_consistent_system_and_others_with_a_decreasing_step():
    A = torch.randn(80, 5, dtype=F64)
    x = torch.randn(5, dtype=F64)
    sol = gradient_descent(A, A @ x, batch_size=8)
    torch.testing.assert_close(sol.x, x)
    b = A @ x + torch.randn(80, dtype=F64)
    exact = torch.linalg.lstsq(A, b).solution
    errors = [
        float((quiet(A, b, batch_size=8, step=step, maxiter=150).x - exact).norm())
        for step in (0.004, lambda k: 0.004 / (1 + 0.2 * k))
    ]
    assert errors[1] < 0.2 * errors[0]


# Derivatives


def cases():
    A = torch.randn(14, 4, dtype=F64)
    yield "tall", A, {}
    yield "wide", A.T.contiguous(), {}
    yield "deficient", torch.cat([A, A[:, :2]], 1), {}
    yield "damped", A.T.contiguous(), {"damp": 0.7}
    yield "weighted", A, {"weights": torch.linspace(0, 2, 14, dtype=F64)}
    yield "complex", torch.randn(14, 4, dtype=torch.complex128), {}


@pytest.mark.parametrize("name", ["tall", "wide", "deficient", "damped", "weighted", "complex"])
def test_implicit_derivatives_are_those_of_other_solvers(name):
    A, given = next((A, g) for n, A, g in cases() if n == name)
    b = torch.randn(A.shape[0], 2, dtype=A.dtype)
    x_bar, A_dot = torch.randn(A.shape[1], 2, dtype=A.dtype), torch.randn_like(A)
    out = []
    for solver in (partial(gradient_descent, momentum="adaptive"), "qr"):

        def f(A, b, solver=solver):
            return fl.lstsq(A, b, solver=solver, **given)

        x, pull = torch.func.vjp(f, A, b)
        _, x_dot = torch.func.jvp(lambda A, f=f: f(A, b), (A,), (A_dot,))
        out.append((x, *pull(x_bar), x_dot))
    for ours, theirs in zip(*out):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_implicit_derivative_does_not_see_the_path(problem):
    A, b = problem
    fast = partial(gradient_descent, momentum="adaptive", atol=1e-12)
    grads = [
        torch.func.grad(lambda A, s=s: fl.lstsq(A, b, solver=s).sum())(A) for s in (fast, "qr")
    ]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("how", [{"momentum": 0.4}, {"step": "exact"}, {"batch_size": 20}], ids=str)
def test_unrolled_derivatives_are_those_of_the_iterations(problem, how):
    A, b = problem
    how = {"step": 0.01, **how, "maxiter": 6, "damp": 0.2}

    def f(t):
        return gradient_descent(A + t * b[:, :1], b, unrolled=True, **how).x

    t = torch.tensor(0.3, dtype=F64)
    h = 1e-5
    difference = (f(t + h) - f(t - h)) / (2 * h)
    torch.testing.assert_close(torch.func.jacrev(f)(t), difference, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(torch.func.jacfwd(f)(t), difference, rtol=1e-7, atol=1e-8)


def test_unrolled_tends_to_implicit_and_short_runs_differ(problem):
    A, b = problem
    implicit = torch.func.grad(lambda A: (fl.lstsq(A, b) ** 2).sum())(A)

    def unrolled(steps):
        def f(A):
            return (gradient_descent(A, b, unrolled=True, maxiter=steps).x ** 2).sum()

        return (torch.func.grad(f)(A) - implicit).abs().max()

    assert unrolled(3) > 1e-2
    assert unrolled(400) < 1e-13


def test_unrolled_on_sparse_values_and_under_vmap(problem):
    A, b = problem
    S = fl.Sparse.from_torch(A)

    def f(values, b):
        sol = gradient_descent(fl.Sparse(S.pattern, values), b, unrolled=True, maxiter=30)
        return sol.x

    many = torch.stack([S.values, 2 * S.values])
    batch = torch.func.vmap(f, in_dims=(0, None))(many, b)
    torch.testing.assert_close(batch[1], f(many[1], b))
    values = S.values.clone().requires_grad_()
    f(values, b).sum().backward()
    dense = A.clone().requires_grad_()
    gradient_descent(dense, b, unrolled=True, maxiter=30).x.sum().backward()
    torch.testing.assert_close(values.grad, dense.grad.flatten())


def test_lstsq_under_vmap(problem):
    A, b = problem
    As = torch.stack([A, 1.5 * A])
    x = torch.func.vmap(lambda A: fl.lstsq(A, b, solver="gradient_descent"))(As)
    torch.testing.assert_close(x, torch.linalg.lstsq(As, b.expand(2, -1, -1)).solution)


# What it tells


def test_history_has_the_shape_of_the_solution(problem):
    A, b = problem
    vector = quiet(A, b[:, 0], history=True, maxiter=4)
    assert vector.history.x.shape == (5, 8)
    assert vector.history.residual_norm.shape == (5,)
    torch.testing.assert_close(vector.history.x[-1], vector.x)
    torch.testing.assert_close(vector.history.normal_residual_norm[-1], vector.normal_residual_norm)
    for A_, b_, more in (
        (A, b.expand(3, -1, -1), {}),
        (A.expand(3, -1, -1), b, {}),
        (A, b, {"weights": torch.rand(60, 2, dtype=F64), "x0": torch.ones(8, dtype=F64)}),
    ):
        how = {"history": True, "maxiter": 4, "step": 0.02, **more}
        runs = [quiet(A_, b_, unrolled=u, **how) for u in (False, True)]
        for sol in runs:
            assert sol.history.x.shape == (5, *sol.x.shape)
            assert sol.history.residual_norm.shape == (5, *sol.status.shape)
            torch.testing.assert_close(sol.history.x[-1], sol.x)
            torch.testing.assert_close(sol.history.residual_norm[-1], sol.residual_norm)
        torch.testing.assert_close(runs[0].history.x, runs[1].history.x)
    assert gradient_descent(A, b).history is None


def test_history_ends_with_the_forward_solve(problem):
    A, b = problem
    A = A.clone().requires_grad_()
    told = []
    sol = gradient_descent(A, b, history=True, callback=lambda s: told.append(s["iteration"]))
    assert told == list(range(len(sol.history.x)))
    sol.x.sum().backward()
    assert told == list(range(len(sol.history.x)))


def test_history_inside_a_transform_is_refused(problem):
    A, b = problem
    with pytest.raises(ValueError, match="unrolled=True"):
        torch.func.vmap(lambda b: quiet(A, b, history=True, maxiter=3).x)(b.T)


def test_results_are_pytrees(problem):
    A, b = problem
    for sol in (quiet(A, b, maxiter=2), quiet(A, b, maxiter=2, history=True)):
        leaves, spec = torch.utils._pytree.tree_flatten(sol)
        again = torch.utils._pytree.tree_unflatten(leaves, spec)
        assert (again.history is None) == (sol.history is None)
        assert torch.equal(again.x, sol.x)


def test_statuses(problem):
    A, b = problem
    with pytest.warns(fl.ConvergenceWarning, match="smaller step"):
        sol = gradient_descent(A, b, step=1.0)
    assert sol.status.tolist() == [fl.Status.DIVERGED] * 2
    with pytest.warns(fl.ConvergenceWarning, match="iteration limit"):
        gradient_descent(A, b, maxiter=3)
    zero = gradient_descent(A, 0 * b)
    assert zero.status.tolist() == [fl.Status.START_SOLVES] * 2
    loose = gradient_descent(A, b, atol=1e-4)
    assert loose.status.tolist() == [fl.Status.NORMAL_RESIDUAL_SMALL] * 2
    assert int(loose.iterations.max()) < int(gradient_descent(A, b).iterations.max())
    fit = gradient_descent(A, A @ torch.ones(8, 1, dtype=F64), btol=1e-4, atol=1e-4)
    assert int(fit.status) == fl.Status.RESIDUAL_SMALL
    assert gradient_descent(0 * A, b).x.abs().max() == 0
    early = gradient_descent(A, b, unrolled=True, maxiter=2)
    assert early.status.tolist() == [fl.Status.MAXITER] * 2
    late = gradient_descent(A, b, unrolled=True, maxiter=400)
    assert bool(late.converged.all())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"step": -1.0}, "step must be"),
        ({"step": "best"}, "step must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"nesterov": True}, "needs momentum"),
        ({"step": "exact", "momentum": 0.5}, "neither"),
        ({"momentum": "adaptive", "batch_size": 5}, "full gradient"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(problem, how, message):
    with pytest.raises(ValueError, match=message):
        gradient_descent(*problem, **how)
    if how.get("step") != -1.0:
        return
    with pytest.raises(ValueError, match=message):
        fl.lstsq(*problem, solver="gradient_descent", **how)


def test_a_linear_operator_has_no_rows(problem):
    A, b = problem
    op = fl.LinearOperator(lambda p, v: p[0] @ v, (60, 8), (A,))
    with pytest.raises(ValueError, match="mini-batches need the rows"):
        gradient_descent(op, b, batch_size=5)


def test_from_jax(x64):
    flj = pytest.importorskip("funclsq.jax")
    jnp = x64.numpy
    A = np.random.default_rng(0).standard_normal((20, 4))
    b = np.arange(20.0)

    def f(A, solver):
        return (flj.lstsq(A, jnp.asarray(b), solver=solver) ** 2).sum()

    ours, theirs = (x64.grad(f)(jnp.asarray(A), s) for s in ("gradient_descent", "qr"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)
