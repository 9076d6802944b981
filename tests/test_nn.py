"""Least squares as torch modules."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.func import functional_call

import funclsq as fl
from funclsq.nn import LeastSquares, Objective

F64 = torch.float64


@pytest.fixture
def problem():
    return torch.randn(12, 4, dtype=F64), torch.randn(12, 2, dtype=F64)


def kinds(A):
    S = fl.Sparse.from_torch(A.to_sparse_coo())
    return {
        "dense": A,
        "numpy": A.numpy(),
        "coo": A.to_sparse_coo(),
        "csr": A.to_sparse_csr(),
        "sparse": S,
        "scipy": S.to_scipy(),
        "operator": fl.LinearOperator(lambda p, v: p[0] @ v, A.shape, (A,)),
    }


@pytest.mark.parametrize("kind", ["dense", "numpy", "coo", "csr", "sparse", "scipy", "operator"])
def test_the_layer_is_lstsq(problem, kind):
    A, b = problem
    damp, weights = torch.rand(4, dtype=F64), torch.rand(12, dtype=F64)
    x0 = torch.randn(4, 2, dtype=F64)
    given = {"damp": damp, "weights": weights, "x0": x0}
    layer = LeastSquares(kinds(A)[kind], b, trainable=("A", "b", "damp", "weights", "x0"), **given)
    torch.testing.assert_close(layer(), fl.lstsq(A, b, **given))
    torch.testing.assert_close(layer(2 * b), fl.lstsq(A, 2 * b, **given))
    assert bool(layer.solve().converged.all())
    layer().square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    assert len(list(layer.parameters())) == 5
    x = torch.randn(4, 2, dtype=F64)
    rows = weights[:, None] * (A @ x - b) ** 2
    pull = (damp[:, None] * (x - x0)) ** 2
    torch.testing.assert_close(layer.objective(x), rows.sum() + pull.sum())
    assert "(12, 4)" in repr(layer)


def test_frozen_by_default(problem):
    A, b = problem
    layer = LeastSquares(A, b)
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"A", "b", "damp"}
    again = LeastSquares(torch.zeros_like(A), torch.zeros_like(b))
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(), layer())
    assert LeastSquares(A, b).to(torch.float32)(b.float()).dtype == torch.float32


def test_damp_learnt_across_zero(problem):
    A, b = problem
    target = fl.lstsq(A, b, damp=1.5)
    layer = LeastSquares(A, b, damp=-0.3, trainable="damp")
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = ((layer() - target) ** 2).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert abs(abs(float(layer.damp.detach())) - 1.5) < 1e-4


def test_functional_call_and_transforms(problem):
    A, b = problem
    layer = LeastSquares(A, trainable="A")

    def loss(params, b):
        return functional_call(layer, params, (b,)).square().sum()

    grads = torch.func.grad(loss)(dict(layer.named_parameters()), b)
    want = torch.func.grad(lambda A: fl.lstsq(A, b).square().sum())(A)
    torch.testing.assert_close(grads["A"], want)
    many = {"A": torch.stack([A, 2 * A])}
    losses = torch.func.vmap(loss, in_dims=({"A": 0}, None))(many, b)
    torch.testing.assert_close(losses[1], loss({"A": 2 * A}, b))


OPTIMISERS = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.02), 400),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5), 200),
    "Adam": (lambda p: torch.optim.Adam(p, lr=0.1), 600),
    "LBFGS": (lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"), 5),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_any_optimiser_drives_the_objective_to_the_solution(problem, name):
    A, b = problem
    make, steps = OPTIMISERS[name]
    loss = Objective(LeastSquares(A, b, damp=0.5, weights=torch.rand(12, dtype=F64) + 0.5))
    optimiser = make([loss.x])

    def closure():
        optimiser.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(steps):
        optimiser.step(closure)
    tolerance = 1e-3 if name == "Adam" else 1e-5
    torch.testing.assert_close(loss.x.detach(), loss.problem(), rtol=0, atol=tolerance)


def test_objective_starts_at_x0_and_takes_columns_and_vectors(problem):
    A, b = problem
    x0 = torch.randn(4, dtype=F64)
    loss = Objective(LeastSquares(A, b[:, 0], x0=x0))
    torch.testing.assert_close(loss.x.detach(), x0)
    grad = torch.autograd.grad(loss(), loss.x)[0]
    torch.testing.assert_close(grad, 2 * A.T @ (A @ x0 - b[:, 0]))
    start = torch.ones(4, dtype=F64)
    assert torch.equal(Objective(LeastSquares(A, b[:, 0]), start).x.detach(), start)
    assert Objective(LeastSquares(A, b)).x.shape == (4, 2)
    value = functional_call(loss, {"x": x0}, ())
    torch.testing.assert_close(value, ((A @ x0 - b[:, 0]) ** 2).sum())


def test_errors(problem):
    A, b = problem
    with pytest.raises(ValueError, match="trainable takes"):
        LeastSquares(A, b, trainable="x")
    with pytest.raises(ValueError, match="weights is to be trained"):
        LeastSquares(A, b, trainable="weights")
    with pytest.raises(ValueError, match="needs a right-hand side"):
        LeastSquares(A)()
    with pytest.raises(TypeError, match=r"got SparsityPattern\. Give Sparse\(pattern, values\)"):
        LeastSquares(fl.SparsityPattern([0], [0], (1, 1)))
    with pytest.raises(TypeError, match=r"got list\.$"):
        LeastSquares([[1.0]])


@pytest.mark.parametrize("kind", ["dense", "sparse", "operator"])
@pytest.mark.parametrize("columns", [None, 1, 4, 12])  # 4 and 12 broadcast with anything
@pytest.mark.parametrize("per_row", [(12,), (12, 1)])
def test_the_objective_is_that_of_the_layer(kind, columns, per_row):
    A = torch.randn(12, 4, dtype=F64)
    b = torch.randn(12, *(() if columns is None else (columns,)), dtype=F64)
    given = {"damp": torch.rand(4, dtype=F64), "weights": torch.rand(per_row, dtype=F64)}
    layer = LeastSquares(kinds(A)[kind], b, x0=torch.randn(4, dtype=F64), **given)
    x = layer().requires_grad_()
    r, shift = A @ x - b, x.mT - layer.x0 if x.ndim > 1 else x - layer.x0
    w = given["weights"].flatten()
    want = (w * r.mT**2 if r.ndim > 1 else w * r**2).sum() + (given["damp"] * shift).square().sum()
    torch.testing.assert_close(layer.objective(x), want)
    (slope,) = torch.autograd.grad(layer.objective(x), x)  # x minimises it
    torch.testing.assert_close(slope, torch.zeros_like(x), rtol=0, atol=1e-10)
    assert Objective(layer).x.shape == x.shape


def test_the_objective_of_a_batch():
    A, b = torch.randn(3, 12, 4, dtype=F64), torch.randn(12, dtype=F64)
    layer = LeastSquares(A, b, damp=0.5)
    x = layer().requires_grad_()
    (slope,) = torch.autograd.grad(layer.objective(x), x)
    torch.testing.assert_close(slope, torch.zeros_like(x), rtol=0, atol=1e-10)
    layer = LeastSquares(A[0], torch.randn(5, 12, 2, dtype=F64), damp=0.5)
    assert Objective(layer).x.shape == layer().shape


@pytest.mark.parametrize("square", [False, True])
def test_the_objective_is_that_of_the_solver_for_every_shape_it_takes(square):
    A, b = (
        torch.randn(4 if square else 7, 4, dtype=F64),
        torch.randn(4 if square else 7, 4, dtype=F64),
    )
    w, start, x = (
        torch.rand(len(b), dtype=F64),
        torch.randn(4, dtype=F64),
        torch.randn(4, 4, dtype=F64),
    )
    whole = LeastSquares(A, b, damp=0.5, weights=w, x0=start)
    want = (w[:, None] * (A @ x - b) ** 2).sum() + 0.25 * ((x - start[:, None]) ** 2).sum()
    torch.testing.assert_close(whole.objective(x), want)
    loss = Objective(whole)
    torch.testing.assert_close(loss.x.detach(), start[:, None].expand(4, 4))
    one = LeastSquares(A, b[:, 0], damp=0.5, weights=w[:, None], x0=start)
    want = (w * (A @ x[:, 0] - b[:, 0]) ** 2).sum() + 0.25 * ((x[:, 0] - start) ** 2).sum()
    torch.testing.assert_close(one.objective(x[:, 0]), want)
    best = whole().requires_grad_()
    (slope,) = torch.autograd.grad(whole.objective(best), best)
    assert slope.abs().max() < 1e-10


@pytest.mark.parametrize("how", ["called", "loaded", "filled", "assigned"])
def test_a_damp_that_was_zero_counts_once_it_is_not(problem, how):
    A, b = problem
    layer = LeastSquares(A, b)
    damp = torch.tensor(1.5, dtype=F64)
    x = torch.zeros(4, 2, dtype=F64)
    if how == "called":
        got = functional_call(layer, {"damp": damp}, ())
        loss = functional_call(Objective(layer, x + 1), {"problem.damp": damp}, ())
    else:
        if how == "loaded":
            layer.load_state_dict(LeastSquares(A, b, damp=damp).state_dict())
        elif how == "filled":
            layer.damp.fill_(1.5)
        else:
            layer.damp = damp
        got, loss = layer(), layer.objective(x + 1)
    torch.testing.assert_close(got, fl.lstsq(A, b, damp=1.5))
    torch.testing.assert_close(loss, LeastSquares(A, b, damp=1.5).objective(x + 1))


@pytest.mark.parametrize(
    "given",
    [
        {"A": (2, 12, 4), "b": (12,)},
        {"A": (2, 12, 4), "b": (12, 3)},
        {"A": (12, 4), "b": (2, 12, 3)},
        {"A": (12, 4), "b": (12, 3), "weights": (12, 3)},
        {"A": (12, 4), "b": (12, 3), "x0": (4, 1)},
        {"A": (12, 4), "b": (12, 3), "x0": (4,)},
        {"A": (2, 12, 4), "b": (12, 3), "x0": (4,)},
    ],
    ids=str,
)
def test_the_parameter_of_an_objective_has_the_shape_of_the_solution(given):
    tensors = {name: torch.rand(shape, dtype=F64) for name, shape in given.items()}
    loss = Objective(LeastSquares(**tensors))
    solution = loss.problem()
    assert loss.x.shape == solution.shape
    loss.x.data.copy_(solution)
    (bar,) = torch.autograd.grad(loss(), loss.x)
    assert float(bar.abs().max()) < 1e-12


def test_operands_may_be_arrays(problem):
    A, b = (t.numpy() for t in problem)
    x0, weights, damp = np.ones(4), np.arange(12.0), np.full(4, 0.1)
    frozen = A.copy()
    frozen.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = LeastSquares(frozen, b, x0=x0, weights=weights, damp=damp)
        expected = fl.lstsq(frozen, b, x0=x0, weights=weights, damp=damp)
    torch.testing.assert_close(layer(), expected)
