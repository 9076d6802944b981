"""Single-precision data solved in double precision inside: x, derivatives, and what comes back."""

from __future__ import annotations

import functools
import warnings

import mpmath
import numpy as np
import pytest
import scipy.sparse
import torch
from torch.func import grad, hessian, jacfwd, vmap

import funclsq as fl

F32, F64 = torch.float32, torch.float64
C64, C128 = torch.complex64, torch.complex128
WIDE = {F32: F64, C64: C128}
EPS32 = float(np.finfo(np.float32).eps)
lstsq = functools.partial(fl.lstsq, compute_dtype=F64)


def spectrum(m, n, cond, dtype=F32, seed=0):
    """Singular values in geometric progression, rounded to the dtype, and b."""
    g = torch.Generator().manual_seed(seed)
    q = min(m, n)
    wide = WIDE[dtype]
    U, V = (torch.linalg.qr(torch.randn(k, q, generator=g, dtype=wide))[0] for k in (m, n))
    s = cond ** -torch.linspace(0, 1, q, dtype=F64)
    b = torch.randn(m, generator=g, dtype=wide)
    return ((U * s) @ V.mH).to(dtype), b.to(dtype)


def sparse(A):
    """All of A as funclsq.Sparse."""
    pattern = fl.SparsityPattern(*torch.ones(A.shape).nonzero().T, tuple(A.shape))
    return fl.Sparse(pattern, A.flatten())


def by_mpmath(A, b):
    """A^+ b and the gradient of sum(x) in A, to 50 digits; A of full column rank."""
    with mpmath.workdps(50):
        M, v = mpmath.matrix(A.double().tolist()), mpmath.matrix(b.double().tolist())
        inverse = mpmath.inverse(M.T * M)
        x = inverse * (M.T * v)
        z = inverse * mpmath.ones(A.shape[1], 1)
        bar = (v - M * x) * z.T - (M * z) * x.T
        return np.array(x.tolist(), float)[:, 0], np.array(bar.tolist(), float)


@pytest.mark.parametrize("solver", ["auto", "qr", "svd", "cholesky", "lsmr", "lsqr", "cgls"])
@pytest.mark.parametrize("cond", [1e4, 1e5, 1e6, 1e7])
def test_only_the_result_is_rounded(cond, solver):
    A, b = spectrum(14, 6, cond)
    want, bar = by_mpmath(A, b)
    leaf = A.clone().requires_grad_()
    for given in (leaf, sparse(leaf)):
        x = lstsq(given, b, solver=solver)
        assert x.dtype == F32
        size = np.linalg.norm(want)
        assert np.linalg.norm(x.detach().numpy() - want) <= EPS32 * size
        (got,) = torch.autograd.grad(x.sum(), leaf)
        assert got.dtype == F32
        error = np.linalg.norm(got.numpy() - bar) / np.linalg.norm(bar)
        # dx is seen in double precision: what is lost is cond^2 of it, and the rounding
        assert error <= EPS32 + 1e3 * np.finfo(float).eps * cond**2
    if cond == 1e7 and solver in ("qr", "svd"):
        narrow = fl.lstsq(A, b, solver=solver).numpy()
        assert np.linalg.norm(narrow - want) > 1e-3 * size


@pytest.mark.parametrize("dtype", [F32, C64])
@pytest.mark.parametrize(
    "layout", ["dense", "sparse", "coo", "csr", "csc", "bsr", "bsc", "scipy", "operator"]
)
def test_every_layout(layout, dtype):
    A, b = spectrum(12, 6, 1e5, dtype)
    given = {
        "dense": lambda: A,
        "sparse": lambda: sparse(A),
        "scipy": lambda: scipy.sparse.csr_array(A.numpy()),
        "operator": lambda: fl.LinearOperator(lambda p, v: p[0] @ v, A.shape, (A,)),
        "coo": lambda: A.to_sparse_coo(),
        "csr": lambda: A.to_sparse_csr(),
        "csc": lambda: A.to_sparse_csc(),
        "bsr": lambda: A.to_sparse_bsr((3, 2)),
        "bsc": lambda: A.to_sparse_bsc((3, 2)),
    }[layout]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        given = given()
    want = fl.lstsq(A.to(WIDE[dtype]), b.to(WIDE[dtype]))
    if layout in ("coo", "csr", "csc", "bsr", "bsc"):
        given = given.requires_grad_()
    x = lstsq(given, b)
    assert x.dtype == dtype
    torch.testing.assert_close(x.detach(), want.to(dtype), rtol=2 * EPS32, atol=1e-4 * EPS32)
    if layout in ("coo", "csr", "csc", "bsr", "bsc"):
        (bar,) = torch.autograd.grad(x.abs().square().sum(), given)
        assert (bar.dtype, bar.layout) == (dtype, given.layout)


def _operands(dtype):
    A, b = spectrum(9, 4, 1e4, dtype)
    real = torch.linspace(0.5, 1.5, 9)
    return A, b, torch.tensor(0.01), real, torch.ones(4, dtype=dtype)


@pytest.mark.parametrize("dtype", [F32, C64])
def test_gradients_of_every_operand_keep_its_dtype(dtype):
    leaves = [t.requires_grad_() for t in _operands(dtype)]
    wide = [t.detach().to(WIDE.get(t.dtype, t.dtype)).requires_grad_() for t in leaves]

    def x(A, b, damp, weights, x0, **more):
        return fl.lstsq(A, b, damp=damp, weights=weights, x0=x0, **more)

    bars = torch.autograd.grad(x(*leaves, compute_dtype=F64).abs().square().sum(), leaves)
    want = torch.autograd.grad(x(*wide).abs().square().sum(), wide)
    for leaf, bar, exact in zip(leaves, bars, want):
        assert bar.dtype == leaf.dtype
        # the cotangent is made of x rounded, so that it is right to that
        torch.testing.assert_close(
            bar, exact.to(leaf.dtype), rtol=1e-4, atol=1e-4 * float(exact.abs().max())
        )


def test_a_small_damping_is_squared_in_double_precision():
    A = torch.tensor([[1e-25], [0.0]])
    b = torch.tensor([1e-25, 0.0])
    damp = torch.tensor(1e-25, requires_grad=True)  # its square is not a number of single precision
    x = lstsq(A, b, damp=damp)
    assert float(x.detach()) == pytest.approx(0.5)
    x.sum().backward()
    assert float(damp.grad) == pytest.approx(-0.5e25)


def test_under_transforms():
    A, b, damp, weights, x0 = _operands(F32)

    def f(A, b, **more):
        return fl.lstsq(A, b, damp=damp, weights=weights, x0=x0, **more).square().sum()

    wide = functools.partial(f, compute_dtype=F64)
    doubles = tuple(t.double() for t in (A, b))
    damp_, weights_, x0_ = (t.double() for t in (damp, weights, x0))

    def exact(A, b):
        return fl.lstsq(A, b, damp=damp_, weights=weights_, x0=x0_).square().sum()

    def close(got, want):
        assert got.dtype == F32
        torch.testing.assert_close(
            got, want.float(), rtol=1e-4, atol=1e-4 * float(want.abs().max())
        )

    close(grad(wide)(A, b), grad(exact)(*doubles))
    close(jacfwd(wide, 1)(A, b), jacfwd(exact, 1)(*doubles))
    close(hessian(wide, 1)(A, b), hessian(exact, 1)(*doubles))
    many = torch.stack((A, 2 * A, A + 0.1))
    close(
        vmap(wide, (0, None))(many, b), torch.stack([exact(a.double(), doubles[1]) for a in many])
    )
    each = torch.stack([grad(exact)(a.double(), doubles[1]) for a in many])
    close(vmap(grad(wide), (0, None))(many, b), each)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled():
    A, b = spectrum(9, 4, 1e4)
    pattern = sparse(A).pattern

    def f(values, b):
        return fl.lstsq(fl.Sparse(pattern, values), b, damp=0.01, compute_dtype=F64)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    one, two = (A.flatten().clone().requires_grad_() for _ in range(2))
    x, y = f(one, b), compiled(two, b)
    assert y.dtype == F32
    torch.testing.assert_close(y, x, rtol=0, atol=0)
    x.sum().backward()
    y.sum().backward()
    torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=0)


def test_a_solution_has_the_precision_of_the_data():
    A, b = spectrum(14, 6, 1e7)
    sol = fl.solve(A, b, compute_dtype=F64)
    assert int(sol.rank) == 6
    for name in ("x", "residual_norm", "normal_residual_norm", "cond"):
        assert getattr(sol, name).dtype == F32
    named = fl.solvers.svd(A, b, compute_dtype="float64")
    torch.testing.assert_close(named.x, sol.x, rtol=2 * EPS32, atol=0)
    assert (
        fl.solvers.gradient_descent(A, b, maxiter=3, unrolled=True, compute_dtype=F64).x.dtype
        == F32
    )
    assert fl.solve(A.double(), b.double(), compute_dtype=F64).x.dtype == F64


def test_a_factorization():
    A, b = spectrum(14, 6, 1e6)
    f = fl.factorize(A, weights=torch.full((14,), 4.0), compute_dtype=F64)
    x = f.solve(b)
    assert x.dtype == F32
    torch.testing.assert_close(x, lstsq(A, b), rtol=2 * EPS32, atol=0)
    assert f.adjoint(x).dtype == f.solve_normal(x).dtype == fl.covariance(f).dtype == F32
    with pytest.raises(TypeError, match="float32"):
        f.solve(b.double())


def test_what_overflows_on_the_way_back_is_told():
    A, b = torch.tensor([[1e-30], [0.0]]), torch.tensor([1e30, 0.0])
    with pytest.warns(fl.ConvergenceWarning, match="NONFINITE"):
        sol = fl.solve(A, b, compute_dtype=F64)
    assert int(sol.status) == fl.Status.NONFINITE
    with pytest.raises(fl.ConvergenceError, match="NONFINITE"):
        lstsq(A, b, on_failure="raise")
    with pytest.warns(fl.ConvergenceWarning, match="NONFINITE"):
        sols = vmap(lambda b: fl.solve(A, b, compute_dtype=F64))(torch.stack((1e-30 * b, b)))
    assert sols.converged.tolist() == [True, False]


@pytest.mark.parametrize("wrong", [F32, torch.float16, "double", C128, 64])
def test_other_precisions_are_refused(wrong):
    A, b = spectrum(5, 3, 10)
    with pytest.raises(ValueError, match="compute_dtype must be None"):
        fl.lstsq(A, b, compute_dtype=wrong)


def test_dtypes_may_not_be_mixed_for_it():
    A, b = spectrum(5, 3, 10)
    with pytest.raises(TypeError, match="one dtype"):
        lstsq(A, b.double())
    with pytest.raises(TypeError, match="float32"):
        lstsq(A, b, damp=torch.tensor(0.5, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_an_operator_may_be_in_half_precision(dtype):
    """Its functions say how they are used; those that NumPy has not are kept and found as well."""
    torch.manual_seed(0)
    A, b = torch.randn(30, 5).to(dtype), torch.randn(30)
    P, Q = A.clone().requires_grad_(), A.float().requires_grad_()
    op = fl.LinearOperator(
        lambda params, v: params[0].to(v.dtype) @ v,
        (30, 5),
        (P,),
        lambda params, u: params[0].to(u.dtype).mT @ u,
    )
    x, y = fl.lstsq(op, b, solver="lsmr"), fl.lstsq(Q, b)
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    for solution in (x, y):
        solution.square().sum().backward()
    assert P.grad.dtype == dtype
    torch.testing.assert_close(P.grad.float(), Q.grad, rtol=1e-2, atol=1e-3)
