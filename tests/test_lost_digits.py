"""Little damping beside a null space: digits that derivatives keep, and those that are told lost.

The oracle is autograd through x = A^T (A A^T + damp^2 W^-1)^-1 b, which divides by nothing small
where A has full row rank, and has no differences of what is almost equal.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

import funclsq as fl
from funclsq import lost_digits
from funclsq.lost_digits import _bound, _size, recovered
from funclsq.operators import DenseOp, SparseOp

F64 = torch.float64
SOLVERS = ["qr", "svd", "cholesky", "lsmr", "lsqr", "cgls"]


def _data(m, n, dtype=F64, rank=None):
    g = torch.Generator().manual_seed(m)
    A = torch.randn(m, n, generator=g, dtype=F64)
    if rank is not None:
        U, s, Vh = torch.linalg.svd(A, full_matrices=False)
        A = U[:, :rank] * s[:rank] @ Vh[:rank]
    b, x_bar = (torch.randn(size, generator=g, dtype=F64) for size in (m, n))
    return A.to(dtype), b.to(dtype), x_bar.to(dtype)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_size_of_the_longest_column(batch, n):
    A = torch.randn(*batch, 5, n, dtype=torch.float32)
    root = torch.linspace(0.1, 2.0, 5).sqrt()[:, None]
    for weights, scaled in ((None, A), (root, root * A)):
        want = scaled.double().norm(dim=-2).amax(-1, keepdim=True)
        torch.testing.assert_close(_size(DenseOp(A), weights), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex128])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_the_size_is_bounded_by_one_pass_over_sparse_values(batch, dtype):
    A = torch.randn(5, 4, dtype=F64) * (torch.rand(5, 4) < 0.7)
    A[0, 0] = 1.0
    pattern, values = fl.SparsityPattern(*A.nonzero().T, (5, 4)), A[A != 0].to(dtype)
    values = torch.stack([values, 3 * values]) if batch else values
    root = torch.linspace(0.1, 2.0, 5, dtype=values.real.dtype).sqrt()[:, None]
    for weights in (None, root, root.expand(*batch, 5, 1)):
        op = SparseOp(pattern, values)
        bound, size = _bound(op, weights), _size(op, weights)
        assert bound.shape == size.shape and bound.dtype == size.dtype
        assert bool((bound >= size * (1 - 1e-6)).all() and (bound < 20 * size).all())
    assert _bound(DenseOp(A), None) is None
    assert _bound(SparseOp(pattern, values.new_zeros(0, pattern.nnz)), None) is None
    for beyond in (1e-160, 1e160, 0.0) if dtype != torch.float32 else (1e-30, 1e30, 0.0):
        assert _bound(SparseOp(pattern, values * beyond), None) is None


@pytest.mark.parametrize("damp", [1e-1, 1e-5])
def test_column_norms_are_taken_where_digits_may_be_lost(damp, monkeypatch):
    """A null space of the columns shows in D^2 x, so that digits are asked for."""
    A, b, x_bar = _data(9, 6, rank=4)
    seen = []
    size = lost_digits._size
    monkeypatch.setattr(lost_digits, "_size", lambda *a: seen.append(1) or size(*a))
    A.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fl.AccuracyWarning)
        x = fl.lstsq(A.to_sparse_csr(), b, damp=damp, solver="cholesky")
        x.backward(x_bar)
    assert bool(seen) is (damp < 1e-3)


def _by_rows(A, b, damp, weights=None):
    inverse = torch.ones_like(b) if weights is None else 1 / weights
    K = A @ A.mT + damp**2 * torch.diag(inverse)
    return A.mT @ torch.linalg.solve(K, b)


def _bars(function, operands, x_bar):
    """Cotangents of the operands, in double precision, and the warnings on the way."""
    leaves = tuple(t.clone().requires_grad_() for t in operands)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        bars = torch.autograd.grad(function(*leaves), leaves, x_bar)
    said = [w for w in given if issubclass(w.category, fl.AccuracyWarning)]
    return [t.double() for t in bars], said


def _errors(got, want):
    return [float((g - w).norm() / w.norm()) for g, w in zip(got, want)]


def _against_rows(dtype, damp, **options):
    """Relative errors of the cotangents of A, b and damp, and the warnings."""
    A, b, x_bar = _data(10, 20, dtype)
    d = torch.tensor(damp, dtype=dtype)

    got, said = _bars(lambda A, b, d: fl.lstsq(A, b, damp=d, **options), (A, b, d), x_bar)
    want, _ = _bars(_by_rows, [t.double() for t in (A, b, d)], x_bar.double())
    return _errors(got, want), said


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("damp", [1e-1, 1e-3, 1e-5, 1e-7])
def test_a_wide_matrix_of_full_row_rank_keeps_its_digits(solver, damp):
    errors, said = _against_rows(F64, damp, solver=solver)
    assert not said and max(errors) < 1e-12, errors


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("damp", [1e-1, 1e-2, 1e-3])
def test_single_precision_keeps_its_digits(solver, damp):
    errors, said = _against_rows(torch.float32, damp, solver=solver)
    assert not said and max(errors) < 2e-5, errors


def test_weights():
    A, b, x_bar = _data(10, 20)
    w = torch.linspace(0.1, 1.0, 10, dtype=F64)
    got, said = _bars(lambda *p: fl.lstsq(*p, damp=1e-5, weights=w), (A, b), x_bar)
    want, _ = _bars(lambda *p: _by_rows(*p, 1e-5, w), (A, b), x_bar)
    assert not said and max(_errors(got, want)) < 1e-12
    (got,), _ = _bars(lambda w: fl.lstsq(A, b, damp=1e-5, weights=w), (w,), x_bar)
    (want,), _ = _bars(lambda w: _by_rows(A, b, 1e-5, w), (w,), x_bar)
    assert _errors([got], [want])[0] < 1e-12  # of the size of damp^2


def test_a_weight_of_zero():
    A, b, x_bar = _data(10, 20)
    w = torch.linspace(0.0, 1.0, 10, dtype=F64)
    got, said = _bars(lambda *p: fl.lstsq(*p, damp=1e-5, weights=w), (A, b), x_bar)
    want, _ = _bars(lambda *p: _by_rows(*p, 1e-5, w[1:]), (A[1:], b[1:]), x_bar)
    assert not said and all(bool((g[0] == 0).all()) for g in got)
    assert max(_errors([g[1:] for g in got], want)) < 1e-12


def test_one_damping_for_each_column():
    A, b, x_bar = _data(10, 20)
    d = torch.linspace(0.5, 2.0, 20, dtype=F64) * 1e-5

    def oracle(A, b, d):  # columns divided by their damping
        return _by_rows(A / d, b, 1.0) / d

    got, said = _bars(lambda A, b, d: fl.lstsq(A, b, damp=d), (A, b, d), x_bar)
    want, _ = _bars(oracle, (A, b, d), x_bar)
    assert not said and max(_errors(got, want)) < 1e-11


@pytest.mark.parametrize("solver", SOLVERS)
def test_tangents(solver):
    A, b, _ = _data(10, 20)
    operands = A, b, torch.tensor(1e-5, dtype=F64)
    for i, t in enumerate(operands):
        dots = tuple(
            torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=F64)
            if p is t
            else torch.zeros_like(p)
            for p in operands
        )

        def ours(A, b, d):
            return fl.lstsq(A, b, damp=d, solver=solver)

        _, got = torch.func.jvp(ours, operands, dots)
        _, want = torch.func.jvp(_by_rows, operands, dots)
        assert _errors([got], [want])[0] < 1e-11 + (1e-10 if solver == "lsmr" else 0), i


def test_second_derivatives():
    A, b, x_bar = _data(6, 9)
    d = torch.tensor(1e-4, dtype=F64)
    along = torch.randn(6, 9, generator=torch.Generator().manual_seed(5), dtype=F64)

    def hvp(function):
        def bar(A, b, d):
            return torch.func.grad(lambda *p: function(*p) ** 2 @ x_bar, argnums=(0, 1, 2))(A, b, d)

        forward = torch.func.jvp(lambda A: bar(A, b, d), (A,), (along,))[1]
        _, pull = torch.func.vjp(lambda A: bar(A, b, d)[0], A)
        return [*forward, *pull(along)]

    got, want = hvp(lambda A, b, d: fl.lstsq(A, b, damp=d)), hvp(_by_rows)
    assert max(_errors(got, want)) < 1e-10


@pytest.mark.parametrize("solver", ["qr", "svd", "lsmr", "cholesky"])
@pytest.mark.parametrize("damp", [1e-7, 1e-8])
def test_dependent_rows_lose_digits_and_the_warning_tells_how_many(solver, damp):
    A, b, x_bar = _data(20, 10, rank=6)
    (b_bar,), said = _bars(lambda b: fl.lstsq(A, b, damp=damp, solver=solver), (b,), x_bar)
    assert len(said) == 1
    told = float(str(said[0].message).split("about ")[1].split()[0])
    U, s, Vh = (t[:6] if t.ndim == 1 else t for t in torch.linalg.svd(A, full_matrices=False))
    exact = U[:, :6] @ (s / (s**2 + damp**2) * (Vh[:6] @ x_bar))
    assert told / 100 < _errors([b_bar], [exact])[0] < 100 * told


@pytest.mark.parametrize("rank", [None, 6])
def test_a_tall_matrix_warns_where_it_is_deficient_only(rank):
    A, b, x_bar = _data(20, 10, rank=rank)
    _, said = _bars(lambda b: fl.lstsq(A, b, damp=1e-8), (b,), x_bar)
    assert bool(said) == (rank is not None)


@pytest.mark.parametrize("damp", [1e-12, 1e-9])
def test_a_bad_condition_is_not_laid_on_the_damping(damp):
    A, b, x_bar = _data(20, 10)
    Q, R = torch.linalg.qr(A)
    V = torch.linalg.qr(R)[0]
    A = Q * torch.logspace(0, -8, 10, dtype=F64) @ V.mT
    _, said = _bars(lambda b: fl.lstsq(A, b, damp=damp, solver="svd"), (b,), x_bar)
    assert not said


def test_single_precision_warns_earlier_and_double_precision_inside_helps():
    A, b, x_bar = _data(20, 10, torch.float32, rank=6)
    _, said = _bars(lambda b: fl.lstsq(A, b, damp=1e-3), (b,), x_bar)
    assert said and "compute_dtype" in str(said[0].message)
    inside = {"damp": 1e-3, "compute_dtype": F64}
    _, said = _bars(lambda b: fl.lstsq(A, b, **inside), (b,), x_bar)
    assert not said


def test_batches_and_what_ignores_failures():
    A, b, x_bar = _data(10, 20)
    one, _ = _bars(lambda b: fl.lstsq(A, b, damp=1e-6), (b,), x_bar)
    pair = torch.stack([A, 1e-2 * torch.roll(A, 1, 0)])

    def both(b):
        return fl.lstsq(pair, b[..., None], damp=1e-6)[..., 0]

    (bars,), said = _bars(both, (torch.stack([b, b]),), torch.stack([x_bar, x_bar]))
    assert not said and _errors([bars[0]], one)[0] < 1e-13
    (want,), _ = _bars(lambda b: _by_rows(pair[1], b, 1e-6), (b,), x_bar)
    assert _errors([bars[1]], [want])[0] < 1e-12
    A, b, x_bar = _data(20, 10, rank=6)
    quiet = {"damp": 1e-8, "on_failure": "ignore"}
    assert not _bars(lambda b: fl.lstsq(A, b, **quiet), (b,), x_bar)[1]


def test_sparse_and_many_columns():
    g = torch.Generator().manual_seed(3)
    A = torch.randn(40, 90, generator=g, dtype=F64) * (torch.rand(40, 90, generator=g) < 0.2)
    A = A + torch.eye(40, 90, dtype=F64)
    b, x_bar = (torch.randn(size, 3, generator=g, dtype=F64) for size in (40, 90))
    pattern = fl.SparsityPattern(*torch.nonzero(A).unbind(1), (40, 90))
    values = A[tuple(torch.nonzero(A).unbind(1))]

    def oracle(v, b):
        D = torch.zeros_like(A).index_put(tuple(torch.nonzero(A).unbind(1)), v)
        K = D @ D.mT + 1e-12 * torch.eye(40, dtype=F64)
        return D.mT @ torch.linalg.solve(K, b)

    want, _ = _bars(oracle, (values, b), x_bar)
    for solver in ("cholesky", "lsmr", "auto"):

        def ours(v, b, solver=solver):
            return fl.lstsq(fl.Sparse(pattern, v), b, damp=1e-6, solver=solver)

        got, said = _bars(ours, (values, b), x_bar)
        assert not said and max(_errors(got, want)) < 1e-9, solver


def test_from_jax():
    jax = pytest.importorskip("jax")
    import funclsq.jax as flj

    A, b, x_bar = _data(10, 20, torch.float32)
    names = "A", "b", "damp"
    want, _ = _bars(_by_rows, [t.double() for t in (A, b, torch.tensor(1e-3))], x_bar.double())
    operands = A.numpy(), b.numpy(), jax.numpy.float32(1e-3)

    def loss(A, b, d):
        return (flj.lstsq(A, b, damp=d) * x_bar.numpy()).sum()

    got = jax.grad(loss, argnums=(0, 1, 2))(*operands)
    for name, g, w in zip(names, got, want):
        assert _errors([torch.tensor(jax.device_get(g)).double()], [w])[0] < 2e-5, name
    dots = tuple(jax.numpy.ones_like(t) for t in operands)
    _, dot = jax.jvp(loss, operands, dots)
    exact = sum(float(w.sum()) for w in want)
    assert abs(float(dot) - exact) < 1e-4 * sum(float(w.abs().sum()) for w in want)
    A, b, x_bar = _data(20, 10, torch.float32, rank=6)
    with pytest.warns(fl.AccuracyWarning, match="damp is small"):
        jax.block_until_ready(jax.grad(loss_of(flj, A, x_bar))(jax.numpy.asarray(b.numpy())))


def loss_of(flj, A, x_bar):
    return lambda b: (flj.lstsq(A.numpy(), b, damp=1e-3) * x_bar.numpy()).sum()


def test_matrix_free():
    A, b, x_bar = _data(10, 20)

    def ours(A, b, d):
        op = fl.LinearOperator(lambda p, x: p[0] @ x, shape=(10, 20), params=(A,))
        return fl.lstsq(op, b, damp=d)

    operands = A, b, torch.tensor(1e-5, dtype=F64)
    got, said = _bars(ours, operands, x_bar)
    want, _ = _bars(_by_rows, operands, x_bar)
    assert not said and max(_errors(got, want)) < 1e-12


def test_a_factorization():
    A, b, x_bar = _data(10, 20)
    leaf = A.clone().requires_grad_()
    kept = fl.factorize(leaf, damp=1e-5)
    rhs = b.clone().requires_grad_()
    got = torch.autograd.grad(kept.solve(rhs), (leaf, rhs), x_bar)
    want, _ = _bars(lambda *p: _by_rows(*p, 1e-5), (A, b), x_bar)
    assert max(_errors(got, want)) < 1e-12
    K = A @ A.T + 1e-10 * torch.eye(10, dtype=F64)
    y = kept.adjoint(x_bar).detach()
    assert _errors([y], [torch.linalg.solve(K, A @ x_bar)])[0] < 1e-12


@pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
def test_iterations_on_rows_keep_digits_where_rows_are_dependent(solver):
    A, b, x_bar = _data(10, 20, rank=6)
    (b_bar,), said = _bars(lambda b: fl.lstsq(A, b, damp=1e-8, solver=solver), (b,), x_bar)
    U, s, Vh = (t[:6] if t.ndim == 1 else t for t in torch.linalg.svd(A, full_matrices=False))
    exact = U[:, :6] @ (s / (s**2 + 1e-16) * (Vh[:6] @ x_bar))
    assert not said and _errors([b_bar], [exact])[0] < 1e-12


def test_a_column_without_suspicion_is_left_alone():
    A, _, g = _data(10, 20)
    null = torch.linalg.svd(A)[2][-1]  # of which a small damping makes a large x
    g = torch.stack((null, A.mT @ (A @ g)), -1)
    d2 = torch.tensor([1e-8], dtype=F64)
    x = torch.linalg.solve(A.mT @ A + 1e-8 * torch.eye(20, dtype=F64), g)
    s = A @ x
    options = SimpleNamespace(atol=None, btol=None)
    plan = SimpleNamespace(options=options, on_failure="ignore")
    entry = SimpleNamespace(op=DenseOp(A), size=None, bound=None)

    def inverse(entry, w, q, tolerance):
        return torch.ones_like(x), torch.ones_like(s)

    new_x, new_s = recovered(plan, entry, None, d2, None, g, x, s, inverse)
    assert bool((new_x[:, 0] != x[:, 0]).all()) and bool((new_s[:, 0] != s[:, 0]).all())
    assert torch.equal(new_x[:, 1], x[:, 1]) and torch.equal(new_s[:, 1], s[:, 1])
