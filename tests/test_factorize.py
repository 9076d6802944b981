"""A factorisation serves many right-hand sides, is shared, and is differentiable."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import scipy.sparse
import torch
from cases import DTYPES, LAYOUTS, operands, problem
from oracle import check, reference

import funclsq as fl
from funclsq import raw
from funclsq.solution import METHODS

F64 = torch.float64


def _factorize(p, leaf, tensors, layout="sparse", **options):
    more = {n: tensors[n] for n in ("damp", "weights") if n in tensors}
    return fl.factorize(LAYOUTS[layout].wrap(leaf, p.stored), **more, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "sparse", "csr", "matrix_free"])
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "damped", "weighted"])
def test_solve_is_lstsq(name, layout, dtype):
    if layout == "matrix_free" and dtype != "float64":
        pytest.skip("an operator without a dtype is taken as float64")
    ref = reference(name, DTYPES[dtype])
    p = ref.problem
    f = _factorize(p, LAYOUTS[layout].leaf(ref.data["A"], p.stored), ref.data, layout)
    assert f.shape == p.A.shape
    check(f.solve(ref.data["b"]), ref.x, "x")
    single = f.solve(ref.data["b"][:, 0])
    torch.testing.assert_close(single, ref.x.value[:, 0].to(DTYPES[dtype]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["auto", "qr", "svd", "cholesky", "lsmr"])
@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "damped", "weighted"])
@pytest.mark.parametrize("complex_", [False, True])
def test_adjoint_is_the_adjoint_of_solve(name, solver, complex_):
    p = problem(name, complex_)
    dtype = torch.complex128 if complex_ else F64
    data = p.tensors(dtype)
    f = _factorize(p, LAYOUTS["sparse"].leaf(data["A"], p.stored), data, solver=solver)
    b, g = torch.randn(p.A.shape[0], 3, dtype=dtype), torch.randn(p.A.shape[1], 3, dtype=dtype)
    left, right = torch.vdot(g[:, 0], f.solve(b)[:, 0]), torch.vdot(f.adjoint(g)[:, 0], b[:, 0])
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(f.adjoint(g)[:, 1], f.adjoint(g[:, 1]), rtol=1e-10, atol=1e-11)
    A = data["A"]
    W = torch.diag(data.get("weights", torch.ones(len(A), dtype=F64))).to(dtype)
    D2 = torch.eye(p.A.shape[1], dtype=dtype) * data.get("damp", torch.zeros((), dtype=F64)) ** 2
    G = A.mH @ W @ A + D2
    inverse = torch.linalg.pinv(G, hermitian=True, rtol=1e-10)
    torch.testing.assert_close(f.solve_normal(g), inverse @ g, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(f.adjoint(g), W @ A @ inverse @ g, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["tall", "wide", "deficient_tall", "damped", "weighted"])
def test_solve_is_differentiable_in_what_it_was_made_from(name):
    ref = reference(name, F64)
    p = ref.problem
    names = [n for n in p.names if n != "x0"]
    inputs = [t.requires_grad_() for t in operands(p, F64)]
    f = _factorize(p, inputs[0], dict(zip(names, inputs)))
    x = f.solve(inputs[1])
    bars = torch.autograd.grad(x, inputs, ref.cotangent + ref.curvature * x.detach())
    pull = lambda t: LAYOUTS["sparse"].pull(t, p.stored)  # noqa: E731
    for n, bar in zip(names, bars):
        check(bar, ref.grad[n], n, pull if n == "A" else None)


def test_the_adjoint_is_differentiable_too():
    p = problem("deficient_tall")
    A, b = operands(p, F64)
    inputs = [A.requires_grad_(), torch.randn(5, 2, dtype=F64, requires_grad=True)]

    def image(A, g):
        return _factorize(p, A, {}).adjoint(g)

    c = torch.randn(8, 2, dtype=F64)
    got = torch.autograd.grad((c * image(*inputs)).sum(), inputs)
    dense = [torch.from_numpy(p.A).requires_grad_(), inputs[1].detach().requires_grad_()]
    want = torch.autograd.grad(
        (c * (torch.linalg.pinv(dense[0], rtol=1e-10).mT @ dense[1])).sum(), dense
    )
    torch.testing.assert_close(
        got[0], LAYOUTS["sparse"].pull(want[0], p.stored), rtol=1e-9, atol=1e-10
    )
    torch.testing.assert_close(got[1], want[1], rtol=1e-10, atol=1e-11)


def test_one_factor_for_every_solve_and_derivative(monkeypatch):
    p = problem("tall")
    data = p.tensors(F64)
    counted = []
    original = raw.registry.prepare
    monkeypatch.setattr(raw.registry, "prepare", lambda *args: counted.append(1) or original(*args))
    raw.clear_cache()
    values = LAYOUTS["sparse"].leaf(data["A"], p.stored).requires_grad_()
    f = _factorize(p, values, data, solver="cholesky")
    raw.clear_cache()  # what is pinned by f is not forgotten
    for scale in (1.0, 2.0, 3.0):
        x = f.solve(scale * data["b"])
        torch.autograd.grad(x.square().sum(), values)
        f.adjoint(data["A"].mT @ data["b"])
    torch.vmap(f.solve)(torch.randn(4, 7, 2, dtype=F64))
    assert len(counted) == 1


def test_a_factor_lives_as_long_as_what_holds_it():
    data = problem("tall").tensors(F64)
    f = fl.factorize(data["A"])
    entry = weakref.ref(f._pin)
    raw.clear_cache()
    gc.collect()
    assert entry() is not None
    del f
    gc.collect()
    assert entry() is None


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_batches_of_matrices_and_of_right_hand_sides(layout):
    p = problem("tall")
    data = p.tensors(F64)
    A = torch.stack((data["A"], 2 * data["A"]))
    f = _factorize(p, LAYOUTS[layout].leaf(A, p.stored), {}, layout)
    b = torch.randn(2, 7, 3, dtype=F64)
    x = f.solve(b)
    assert x.shape == (2, 4, 3)
    torch.testing.assert_close(x, torch.linalg.pinv(A) @ b)
    torch.testing.assert_close(f.solve(b[0, :, 0])[1], torch.linalg.pinv(A[1]) @ b[0, :, 0])
    one = _factorize(p, LAYOUTS[layout].leaf(A[0], p.stored), {}, layout)
    torch.testing.assert_close(one.solve(b), torch.linalg.pinv(A[0]) @ b)
    torch.testing.assert_close(torch.vmap(one.solve)(b), torch.linalg.pinv(A[0]) @ b)


@pytest.mark.parametrize("solver", ["auto", "cholesky", "lsmr"])
@pytest.mark.parametrize("name", ["tall", "damped", "weighted", "damped_wide"])
def test_covariance_is_the_inverse_normal_matrix(name, solver):
    ref = reference(name, F64)
    p, data = ref.problem, ref.data
    f = _factorize(p, LAYOUTS["sparse"].leaf(data["A"], p.stored), data, solver=solver)
    W = torch.diag(data.get("weights", torch.ones(p.A.shape[0], dtype=F64)))
    D2 = torch.eye(p.A.shape[1], dtype=F64) * data.get("damp", torch.zeros((), dtype=F64)) ** 2
    want = torch.linalg.inv(data["A"].mT @ W @ data["A"] + D2)
    torch.testing.assert_close(fl.covariance(f), want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(fl.covariance(f, diag=True), want.diagonal(), rtol=1e-9, atol=1e-11)


def test_covariance_is_differentiable():
    p = problem("weighted")
    data = p.tensors(F64)
    inputs = [data["A"].requires_grad_(), data["weights"].requires_grad_()]
    variances = fl.covariance(fl.factorize(inputs[0], weights=inputs[1]), diag=True)
    got = torch.autograd.grad(variances.sum(), inputs)
    G = inputs[0].mT @ (inputs[1][:, None] * inputs[0])
    want = torch.autograd.grad(torch.linalg.inv(G).trace(), inputs)
    for bar, exact in zip(got, want):
        torch.testing.assert_close(bar, exact, rtol=1e-9, atol=1e-11)


def test_covariance_of_no_columns_and_with_the_users_word():
    f = fl.factorize(torch.zeros(3, 0, dtype=F64))
    assert fl.covariance(f).shape == (0, 0)
    assert fl.covariance(f, diag=True).shape == (0,)
    operator = LAYOUTS["matrix_free"]
    p = problem("tall")
    A = operator.wrap(operator.leaf(p.tensors(F64)["A"], p.stored), p.stored)
    variances = fl.covariance(fl.factorize(A, rank="full"), diag=True)
    want = torch.linalg.inv(torch.from_numpy(p.A.T @ p.A)).diagonal()
    torch.testing.assert_close(variances, want)


def test_a_sparse_matrix_beyond_small_is_factored():
    n = 300
    index = torch.arange(n)
    row, col = torch.cat((index, index[1:])), torch.cat((index, index[:-1]))
    values = torch.cat((torch.full((n,), 2.0, dtype=F64), torch.ones(n - 1, dtype=F64)))
    A = fl.Sparse(fl.SparsityPattern(row, col, (n, n)), values)
    f = fl.factorize(A)
    b = torch.randn(n, dtype=F64)
    torch.testing.assert_close(A @ f.solve(b), b)
    assert fl.solve(A, b, solver="cholesky").solver == "cholesky"


def _sparse(m, n):
    """A well-conditioned random matrix, on which lsmr wins where one answer is wanted."""
    draw = torch.Generator().manual_seed(0)
    kept = torch.rand(m, n, generator=draw) < 0.05
    A = torch.randn(m, n, generator=draw, dtype=F64) * kept
    return fl.Sparse.from_torch(A.to_sparse_coo()), A


@pytest.mark.parametrize("after_a_solve", [False, True])
def test_auto_keeps_a_factor_of_a_narrow_sparse_matrix(after_a_solve):
    """100 columns: too large to be written out, and iterations would be repeated per solve."""
    A, dense = _sparse(2000, 100)
    b = torch.ones(2000, dtype=F64)
    raw.clear_cache()
    if after_a_solve:
        assert fl.solve(A, b).solver == "lsmr"
    f = fl.factorize(A)
    torch.testing.assert_close(f.solve(b), torch.linalg.lstsq(dense, b[:, None]).solution[:, 0])
    assert fl.Method(f._pin.prepared.method % METHODS).name == "cholesky"


def test_a_lower_rank_that_was_given_is_kept():
    """It was left out where auto stood for cholesky."""
    A, dense = _sparse(400, 150)
    b = torch.ones(400, dtype=F64)
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    want = Vh[:100].mT @ ((U[:, :100].mT @ b) / S[:100])
    torch.testing.assert_close(fl.factorize(A, rank=100).solve(b), want)
    torch.testing.assert_close(fl.lstsq(A, b, rank=100), want)


@pytest.mark.parametrize("dtype", ["float32", "complex64", "complex128", "int64"])
@pytest.mark.parametrize("wrap", [np.asarray, scipy.sparse.csr_array, scipy.sparse.coo_matrix])
def test_matrices_of_numpy_and_scipy_bring_their_dtype(wrap, dtype):
    A = np.array([[2, 0], [1, 3], [0, 1]], dtype=dtype)
    if dtype == "int64" and wrap is np.asarray:
        with pytest.raises(TypeError, match="floating point"):
            fl.factorize(A)
        return
    b = torch.ones(3, dtype=F64 if dtype == "int64" else getattr(torch, dtype))
    torch.testing.assert_close(fl.factorize(wrap(A)).solve(b), fl.lstsq(wrap(A), b))


@pytest.mark.parametrize("lead", [(2,), (8,), (2, 3)])
@pytest.mark.parametrize("columns", [None, 1, 8])
def test_adjoint_of_a_batch_of_weights(lead, columns):
    A = torch.randn(8, 3, dtype=F64)
    W = torch.rand(*lead, 8, 1, dtype=F64) + 0.5
    g = torch.randn(3, dtype=F64) if columns is None else torch.randn(3, columns, dtype=F64)
    got = fl.factorize(A, weights=W).adjoint(g)
    block = g[:, None] if columns is None else g
    want = W * (A @ torch.linalg.inv(A.mT @ (W * A)) @ block)
    torch.testing.assert_close(got, want[..., 0] if columns is None else want)


def test_what_a_factorization_cannot_take():
    f = fl.factorize(torch.randn(8, 3, dtype=F64))
    b = torch.randn(8, dtype=F64)
    torch.testing.assert_close(f.solve(b.numpy()), f.solve(b))
    assert repr(f) == "Factorization(shape=(8, 3), dtype=torch.float64, solver='auto')"
    assert repr(fl.factorize(torch.ones(2, 3, 1))).endswith(
        "dtype=torch.float32, solver='auto', batch=(2,))"
    )
    with pytest.raises(ValueError, match="needs 8 rows"):
        f.solve(b[0])
    with pytest.raises(TypeError, match="got list"):
        f.solve(b.tolist())
    with pytest.raises(ValueError, match=r"one per row; got \(8, 2\)"):  # nothing of 0 columns
        fl.factorize(torch.randn(8, 3, dtype=F64), weights=torch.rand(8, 2, dtype=F64))


def test_no_columns_for_a_batch_and_no_scalar():
    A = torch.randn(3, 5, 2, dtype=torch.float64)
    f = fl.factorize(A)
    assert f.solve(torch.zeros(3, 5, 0, dtype=torch.float64)).shape == (3, 2, 0)
    with pytest.raises(ValueError, match="needs 5 rows"):
        f.solve(torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [[1.0, 2.0], None, torch.ones(3), np.ones(3)], ids=repr)
def test_what_is_no_matrix_is_told(wrong):
    with pytest.raises((TypeError, ValueError), match=r"^factorize: "):
        fl.factorize(wrong)


def test_an_operator_with_a_parameter_of_integers_first():
    A, shift = torch.rand(6, 3), torch.tensor([0])
    op = fl.LinearOperator(
        lambda p, v: p[1] @ v + p[0], (6, 3), (shift, A), rmatvec=lambda p, u: p[1].mH @ u + p[0]
    )
    b = torch.rand(6)
    torch.testing.assert_close(fl.factorize(op).solve(b), fl.lstsq(A, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 6, 2), (2, 3, 6, 2)])
def test_a_batch_that_does_not_fit_is_told(shape):
    f = fl.factorize(torch.rand(3, 6, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"needs leading dimensions \(3,\)"):
        f.solve(torch.rand(shape, dtype=torch.float64))
    assert f.solve(torch.rand(1, 6, 2, dtype=torch.float64)).shape == (3, 3, 2)


@pytest.mark.parametrize(("m", "n"), [(0, 3), (3, 0)])
@pytest.mark.parametrize("solver", ["auto", "qr", "svd", "lsmr", "cholesky"])
def test_a_batch_of_b_with_one_empty_matrix(m, n, solver):
    A = torch.zeros(m, n, dtype=torch.float64, requires_grad=True)
    b = torch.ones(2, m, 1, dtype=torch.float64, requires_grad=True)
    x = fl.lstsq(A, b, solver=solver)
    assert x.shape == (2, n, 1) and not x.any()
    bars = torch.autograd.grad(x.sum(), (A, b), allow_unused=True)
    assert all(bar is None or not bar.any() for bar in bars)
