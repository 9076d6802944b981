"""Solves with a preconditioner: fewer steps to the same answer, gradient and status."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cases import LAYOUTS
from hard_problems import EACH, F64, MAKERS, hard, small

import funclsq as fl
from funclsq import preconditioners
from funclsq.preconditioners import block_diagonal

KRYLOV = pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])

FEWER = {"block_diagonal": 5, "incomplete": 7, "sketch": 5}


@KRYLOV
@pytest.mark.parametrize("k", [None, 3])
@EACH
def test_fewer_iterations_to_the_same_answer(name, k, solver):
    A, damp, make = hard(name)
    m = A.shape[0]
    b = torch.randn((m,) if k is None else (m, k), dtype=F64)
    P = make(A, damp=damp)
    options = {"damp": damp, "solver": solver, "rank": "full"}
    plain, fast = (fl.solve(A, b, preconditioner=M, **options) for M in (None, P))
    assert bool(plain.converged.all()) and bool(fast.converged.all())
    assert FEWER[name] * int(fast.iterations.max()) < int(plain.iterations.max())
    exact = fl.lstsq(A, b, damp=damp, solver="cholesky")
    torch.testing.assert_close(fast.x, exact, rtol=1e-8, atol=1e-9 * float(exact.abs().max()))


@EACH
def test_the_rank_is_found_with_it_too(name):
    A, damp, make = hard(name)
    if damp:  # it would make the rank known: one more row does so by its values
        A = sp.vstack([A.to_scipy(), sp.eye_array(1, A.shape[1])], format="csr")
    b = torch.randn(A.shape[0], dtype=F64)
    plain, fast = (fl.solve(A, b, solver="lsmr", preconditioner=M) for M in (None, make(A)))
    assert bool(fast.converged) and int(fast.rank) == A.shape[1]
    assert FEWER[name] * int(fast.iterations) < int(plain.iterations)


@KRYLOV
@pytest.mark.parametrize("tolerance", [1e-4, 1e-7, 1e-10, None])
@EACH
def test_converges_to_any_tolerance(name, tolerance, solver):
    """Entries of one sign: ||A|| is far above the norms of its columns, and of A N^(-1/2)."""
    rng = np.random.default_rng(3)
    A = sp.random_array((500, 240), density=0.2, rng=rng) + 3 * sp.eye_array(500, 240)
    A = A @ sp.diags_array([np.ones(240), np.ones(239)], offsets=[0, 1])
    b = torch.from_numpy(rng.standard_normal((500, 2)))
    P = block_diagonal(A, 16) if name == "block_diagonal" else getattr(preconditioners, name)(A)
    options = {"solver": solver, "rank": "full", "atol": tolerance, "btol": tolerance}
    sol = fl.solve(A, b, preconditioner=P, **options)  # a warning would be an error
    assert bool(sol.converged.all())
    exact = fl.lstsq(A, b, solver="cholesky")
    assert float((sol.x - exact).norm()) < max(1e4 * (tolerance or 0), 1e-10) * float(exact.norm())


@EACH
def test_the_same_gradient(name):
    A, damp, make = hard(name)
    b = torch.randn(A.shape[0], 2, dtype=F64)
    x_bar = torch.randn(A.shape[1], 2, dtype=F64)
    values, b, size = (
        t.detach().requires_grad_() for t in (A.values, b, torch.tensor(max(damp, 0.1), dtype=F64))
    )

    def gradient(**options):
        A_now = fl.Sparse(A.pattern, values)
        x = fl.lstsq(A_now, b, damp=size, rank="full", **options)
        return torch.autograd.grad((x * x_bar).sum() + 0.1 * x.square().sum(), (values, b, size))

    # the preconditioner is made from values that require a gradient, and carries none
    P = make(fl.Sparse(A.pattern, values), damp=size)
    want = gradient(solver="cholesky")
    for got in (gradient(solver="lsmr", preconditioner=P), gradient(solver="lsmr")):
        for mine, exact in zip(got, want):
            atol = 1e-8 * float(exact.abs().max())
            torch.testing.assert_close(mine, exact, rtol=1e-7, atol=atol)


@EACH
def test_under_the_transforms_of_torch_func(name):
    A, stored, weights, damp = small()
    b = torch.randn(40, dtype=F64)
    form = LAYOUTS["sparse"]
    leaf = form.leaf(A, stored)

    def loss(values, b, damp, **options):
        A = form.wrap(values, stored)
        if options["solver"] == "lsmr":  # made inside grad, from traced values
            options["preconditioner"] = MAKERS[name](A, damp=damp, weights=weights)
        x = fl.lstsq(A, b, damp=damp, weights=weights, rank="full", **options)
        return x.square().sum()

    got, want = (
        torch.func.grad(lambda *a, s=s: loss(*a, solver=s), argnums=(0, 1, 2))(leaf, b, damp)
        for s in ("lsmr", "qr")
    )
    for mine, exact in zip(got, want):
        torch.testing.assert_close(mine, exact, rtol=1e-8, atol=1e-10)
    tangents = tuple(torch.randn_like(t) for t in (leaf, b, damp))
    got, want = (
        torch.func.jvp(lambda *a, s=s: loss(*a, solver=s), (leaf, b, damp), tangents)[1]
        for s in ("lsmr", "qr")
    )
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@EACH
def test_under_vmap(name):
    A, stored, weights, _ = small()
    form = LAYOUTS["sparse"]
    leaf = form.leaf(A, stored)
    P = MAKERS[name](A, weights=weights)
    b = torch.randn(5, 40, dtype=F64)
    options = {"weights": weights, "solver": "lsmr", "rank": "full", "preconditioner": P}

    def one(values, b):
        return fl.lstsq(form.wrap(values, stored), b, **options)

    want = torch.stack([one(leaf, column) for column in b])
    torch.testing.assert_close(torch.vmap(one, (None, 0))(leaf, b), want)
    # one preconditioner serves a batch of matrices near the one that it was made from
    many = torch.stack([leaf, 1.1 * leaf, leaf * torch.linspace(0.9, 1.1, leaf.numel())])
    got = torch.vmap(one, (0, None))(many, b[0])
    want = torch.stack([one(values, b[0]) for values in many])
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"cannot be made inside torch\.vmap"):
        torch.vmap(lambda v: MAKERS[name](form.wrap(v, stored)).solve_normal(b[0]))(many)


@EACH
def test_float32_and_complex_solves(name):
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.complex128, 1e-9)):
        A, _, weights, damp = small(dtype)
        b = torch.randn(40, 2, dtype=dtype)
        P = MAKERS[name](A, weights=weights, damp=damp)
        more = {"weights": weights, "damp": damp, "rank": "full"}
        sol = fl.solve(A, b, solver="lsmr", preconditioner=P, **more)
        want = fl.lstsq(A, b, solver="qr", **more)
        assert bool(sol.converged.all())
        torch.testing.assert_close(sol.x, want, rtol=tolerance, atol=tolerance)


@EACH
def test_from_jax(name, x64):
    jax = x64
    flj = pytest.importorskip("funclsq.jax")
    A, damp, make = hard(name)
    P = make(A, damp=damp)
    values = jax.numpy.asarray(A.values.numpy())
    b = jax.numpy.asarray(np.random.default_rng(0).standard_normal(A.shape[0]))
    more = {"damp": damp, "rank": "full"}

    def loss(values, b, **options):
        x = flj.lstsq(flj.Sparse(A.pattern, values), b, **more, **options)
        return (x**2).sum()

    steps = []
    for M in (None, P):
        options = {"solver": "lsqr", "preconditioner": M, **more}
        steps.append(int(flj.solve(flj.Sparse(A.pattern, values), b, **options).iterations))
    assert FEWER[name] * steps[1] < steps[0]
    got = jax.jit(jax.grad(lambda v, b: loss(v, b, solver="lsmr", preconditioner=P), (0, 1)))
    want = jax.grad(lambda v, b: loss(v, b, solver="cholesky"), (0, 1))(values, b)
    for mine, exact in zip(got(values, b), want):
        np.testing.assert_allclose(mine, exact, rtol=1e-7, atol=1e-8 * float(abs(exact).max()))


# Kept, copied, shared
