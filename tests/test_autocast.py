"""torch.autocast lowers what is around a solve, and nothing in it."""

from __future__ import annotations

import copy

import pytest
import torch

import funclsq as fl
from funclsq.raw import clear_cache

SOLVERS = ("lsmr", "cgls", "cholesky", "qr", "svd", "gradient_descent")
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


def matrix_free(params, v):
    return params[0] @ v


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(60, 5, generator=generator)
    b = torch.randn(60, generator=generator)
    return A, b, torch.randn(5, generator=generator), torch.rand(60, generator=generator) + 0.5


def made(A, kind):
    if kind == "sparse":
        pattern = fl.SparsityPattern(*torch.cartesian_prod(*map(torch.arange, A.shape)).T, A.shape)
        return fl.Sparse(pattern, A.flatten())
    if kind == "matrix_free":
        return fl.LinearOperator(matrix_free, tuple(A.shape), (A,))
    return A


def derivatives(f, operands, lowered):
    """Value, gradients of two orders, tangent; backward passes are outside, as torch asks."""
    clear_cache()
    leaves = [t.detach().clone().requires_grad_() for t in operands]
    with torch.autocast(**AUTOCAST, enabled=lowered):
        x = f(*leaves)
        _, tangent = torch.func.jvp(f, tuple(operands), tuple(t.cos() for t in operands))
    first = torch.autograd.grad(x.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [t.detach() for t in (x, *first, *second, tangent)]


@pytest.mark.parametrize("kind", ["dense", "sparse", "matrix_free"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solve_and_its_derivatives_keep_single_precision(data, solver, kind):
    if kind == "matrix_free" and solver in ("cholesky", "qr", "svd"):
        pytest.skip("needs the entries")
    deficient = data[0].clone()
    deficient[:, 4] = deficient[:, 0]

    for A, damp in ((data[0], 0.0), (data[0], 0.5), (deficient, 0.0)):
        if A is deficient and solver == "gradient_descent":
            continue

        def f(A, b, x0, w, damp=damp):
            return fl.lstsq(made(A, kind), b, x0=x0, weights=w, damp=damp, solver=solver)

        if A is deficient:  # the projections onto the null space are products too
            operands = (data[0][:, :4], *data[1:])

            def g(A, *rest):
                return f(torch.cat((A, A[:, :1]), 1), *rest)

        else:
            operands, g = (A, *data[1:]), f
        wanted = derivatives(g, operands, lowered=False)
        for one, other in zip(derivatives(g, operands, lowered=True), wanted):
            assert one.dtype == torch.float32
            assert (one - other).norm() <= 2e-5 * other.norm()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("solver", ["lsmr", "cholesky", "qr"])
def test_a_backward_pass_inside_keeps_it_too(data, solver, kind):
    A, b, _, w = data

    def f(A, b, w):
        return fl.lstsq(made(A, kind), b, weights=w, damp=0.1, solver=solver).square().sum()

    wanted = torch.func.grad(f, (0, 1, 2))(A, b, w)
    clear_cache()
    with torch.autocast(**AUTOCAST):
        got = torch.func.grad(f, (0, 1, 2))(A, b, w)
    for one, other in zip(got, wanted):
        assert (one - other).norm() <= 2e-5 * other.norm()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("solver", ["lsmr", "cholesky", "qr"])
def test_a_factorization_keeps_single_precision(data, solver, kind):
    A, b, g, w = data
    with torch.autocast(**AUTOCAST):
        clear_cache()
        f = fl.factorize(made(A, kind), weights=w, damp=0.1, solver=solver)
        got = f.solve(b), f.adjoint(g), f.solve_normal(g), fl.covariance(f)
    clear_cache()
    f = fl.factorize(made(A, kind), weights=w, damp=0.1, solver=solver)
    for one, other in zip(got, (f.solve(b), f.adjoint(g), f.solve_normal(g), fl.covariance(f))):
        assert (one - other).norm() <= 2e-6 * other.norm()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_regression_keeps_single_precision(data, kind):
    A, b, _, w = data
    wanted = fl.linear_regression(made(A, kind), b, weights=w, damp=3.0)
    clear_cache()
    with torch.autocast(**AUTOCAST):
        got = fl.linear_regression(made(A, kind), b, weights=w, damp=3.0)
    for name in ("coefficients", "residuals", "variance", "covariance"):
        one, other = getattr(got, name), getattr(wanted, name)
        assert (one - other).norm() <= 2e-6 * other.norm(), name


def test_an_unrolled_descent_keeps_single_precision(data):
    def run():
        A, b = (t.clone().requires_grad_() for t in data[:2])
        x = fl.solvers.gradient_descent(A, b, unrolled=True, maxiter=20).x
        return x, A, b

    x, A, b = run()
    wanted = x, *torch.autograd.grad(x.sum(), (A, b))
    with torch.autocast(**AUTOCAST):
        x, A, b = run()
    for one, other in zip((x, *torch.autograd.grad(x.sum(), (A, b))), wanted):
        assert (one - other).norm() <= 2e-6 * other.norm()


def test_around_a_solve_autocast_stays_on(data):
    A, b, _, _ = data
    with torch.autocast(**AUTOCAST):
        fl.lstsq(A, b)
        assert (A.T @ A).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


# Dynamo itself instantiates a Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled(data):
    A, b, x0, _ = data

    def f(A, b, x0):
        with torch.autocast(**AUTOCAST):
            return fl.lstsq(A, b, x0=x0, damp=0.1)

    def train(f):
        leaves = [t.clone().requires_grad_() for t in (A, b, x0)]
        x = f(*leaves)
        return x.detach(), *torch.autograd.grad(x.sum(), leaves)

    wanted = train(lambda *t: fl.lstsq(t[0], t[1], x0=t[2], damp=0.1))
    clear_cache()
    got = train(torch.compile(f, fullgraph=True, backend="aot_eager"))
    for one, other in zip(got, wanted):
        assert (one - other).norm() <= 2e-5 * other.norm()


def test_a_layer_in_mixed_precision(data):
    A, b, _, _ = data
    layer = fl.nn.LeastSquares(A, damp=0.3, trainable=("A", "damp"))
    plain = copy.deepcopy(layer)
    plain(b).sum().backward()
    with torch.autocast(**AUTOCAST):
        loss = layer(b).sum()
    loss.backward()
    for one, other in zip(layer.parameters(), plain.parameters()):
        assert (one.grad - other.grad).norm() <= 2e-5 * other.grad.norm()
