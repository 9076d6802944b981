"""A preconditioner shortens the way and changes nothing else: answer, gradient, status."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cases import DTYPES, LAYOUTS

import funclsq as fl
from funclsq import preconditioners
from funclsq.preconditioners import Preconditioner, _incomplete, block_diagonal, incomplete, sketch

F64 = torch.float64
LABELS = [3, 1, 3, 1, 1, 9, 3]
MAKERS = {
    "block_diagonal": lambda A, **more: block_diagonal(A, LABELS, **more),
    "incomplete": incomplete,
    "sketch": lambda A, **more: sketch(A, oversampling=2, nnz_per_row=2, **more),
}
KRYLOV = pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])
EACH = pytest.mark.parametrize("name", MAKERS)


def small(dtype=F64, m=40, n=7):
    """A matrix with columns over two decades, its pattern, weights and damp."""
    rng = np.random.default_rng(7)
    stored = rng.random((m, n)) < 0.5
    A = rng.standard_normal((m, n)) + (1j * rng.standard_normal((m, n)) if dtype.is_complex else 0)
    A = A * stored * np.logspace(0, 2, n)
    weights = rng.random(m)
    weights[3] = 0
    damp = np.array([0.5, 0, 0, 1, 2, 0, 3])[:n]
    real = dtype.to_real()
    return (
        torch.from_numpy(A).to(dtype),
        stored,
        torch.from_numpy(weights).to(real),
        torch.from_numpy(damp).to(real),
    )


def normal(A, weights, damp):
    """A^H W A + D^2 in double precision."""
    A = A.to(torch.complex128)
    return A.mH @ (weights[:, None] * A) + torch.diag(damp.to(torch.complex128) ** 2)


def applied(P, n=7):
    return P.solve_normal(torch.eye(n, dtype=P.dtype)).to(torch.complex128)


# What N is


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [k for k in LAYOUTS if "matrix_free" not in k])
@EACH
def test_every_form_of_the_matrix(name, layout, dtype):
    dtype = DTYPES[dtype]
    A, stored, weights, damp = small(dtype)
    form = LAYOUTS[layout]
    leaf = form.wrap(form.leaf(A, stored), stored)
    P = MAKERS[name](leaf, weights=weights, damp=damp)
    G = applied(P)
    eps = torch.finfo(dtype).eps
    assert P.dtype == dtype and P.shape == (40, 7) and P.nbytes > 0
    torch.testing.assert_close(G, G.mH, rtol=0, atol=1e3 * eps * float(G.abs().max()))
    S = torch.diag(normal(A, weights, damp).diagonal().real.rsqrt()).to(torch.complex128)
    inner = torch.linalg.eigvalsh(torch.linalg.inv(S) @ ((G + G.mH) / 2) @ torch.linalg.inv(S))
    assert float(inner.min()) > 0
    torch.testing.assert_close(G, applied(MAKERS[name](A, weights=weights, damp=damp)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_block_diagonal_inverts_the_blocks(form, dtype):
    dtype = DTYPES[dtype]
    A, _, weights, damp = small(dtype)
    A_in = A if form == "dense" else A.to_sparse()
    tolerance = 1e-10 if dtype != torch.float32 else 1e-5
    N = normal(A, weights, damp)
    for blocks, label in (
        (LABELS, LABELS),
        (3, [0, 0, 0, 1, 1, 1, 2]),
        (1, range(7)),
        (9, [0] * 7),
    ):
        label = torch.tensor(list(label))
        P = block_diagonal(A_in, blocks, weights=weights, damp=damp)
        want = N * (label[:, None] == label)
        error = applied(P) @ want - torch.eye(7)
        assert float(error.abs().max()) < tolerance
    assert f"blocks={1}" in repr(P)


def test_blocks_equal_whatever_holds_the_labels():
    A, *_ = small()
    want = applied(block_diagonal(A, LABELS))
    for labels in (np.array(LABELS), torch.tensor(LABELS), tuple(LABELS), np.uint8(LABELS)):
        torch.testing.assert_close(applied(block_diagonal(A, labels)), want, rtol=0, atol=0)
    torch.testing.assert_close(
        applied(block_diagonal(A, np.int64(3))), applied(block_diagonal(A, 3)), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_incomplete_with_nothing_dropped_is_complete(dtype):
    dtype = DTYPES[dtype]
    A, _, weights, damp = small(dtype)
    P = incomplete(A.to_sparse(), weights=weights, damp=damp, drop=0.0)
    error = applied(P) @ normal(A, weights, damp) - torch.eye(7)
    assert float(error.abs().max()) < (1e-10 if dtype != torch.float32 else 1e-5)


def test_incomplete_leaves_out_more_for_a_larger_threshold():
    A = grid(30)
    sizes = [incomplete(A, damp=0.1, drop=drop).nbytes for drop in (0.0, 1e-3, 1e-2, 1e-1)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[-1]
    assert incomplete(A, damp=0.1, fill=1.0).nbytes < sizes[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("damped", [False, True])
def test_sketch_conditions_a_tall_matrix(form, dtype, damped):
    dtype = DTYPES[dtype]
    hard = 1e3 if dtype == torch.float32 else 1e8
    A, stored = tall(4000, 20, hard, dtype)
    damp = torch.full((20,), 1.0, dtype=dtype.to_real()) if damped else 0.0
    weights = torch.rand(4000, dtype=dtype.to_real()) + 0.1
    P = sketch(A if form == "dense" else A.to_sparse(), damp=damp, weights=weights)
    assert "rows=80" in repr(P)
    double = torch.complex128
    B = weights.sqrt().unsqueeze(-1).to(double) * A.to(double)
    if damped:
        B = torch.cat((B, torch.eye(20, dtype=double)))
    R = P._inverse.R.to(double)
    sigma = torch.linalg.svdvals(torch.linalg.solve_triangular(R, B, upper=True, left=False))
    assert float(sigma[0] / sigma[-1]) < 4  # (1 + 1/2) / (1 - 1/2), and room for chance
    plain = torch.linalg.svdvals(B)
    assert damped or float(plain[0] / plain[-1]) > 100


def test_sketch_is_the_same_for_a_seed_and_another_for_another():
    A, _ = tall(2000, 10, 1e3)
    first = applied(sketch(A, seed=3), 10)
    assert torch.equal(first, applied(sketch(A, seed=3), 10))
    assert not torch.equal(first, applied(sketch(A, seed=4), 10))
    torch.testing.assert_close(first, applied(sketch(A.to_sparse(), seed=3), 10), rtol=1e-6, atol=0)


def test_sketch_with_more_rows_conditions_better():
    A, _ = tall(20_000, 20, 1e4)
    conds = []
    for c in (2, 4, 16):
        R = sketch(A, oversampling=c)._inverse.R
        sigma = torch.linalg.svdvals(torch.linalg.solve_triangular(R, A, upper=True, left=False))
        conds.append(float(sigma[0] / sigma[-1]))
    assert conds[0] > conds[1] > conds[2] and conds[2] < 2


def test_sketch_of_a_short_matrix_is_its_own_factor():
    A, _, weights, damp = small(m=20)
    P = sketch(A, weights=weights, damp=damp)
    assert "rows=20" in repr(P)
    error = applied(P) @ normal(A, weights, damp) - torch.eye(7)
    assert float(error.abs().max()) < 1e-10


@EACH
def test_entries_out_of_range_of_their_squares(name):
    A, _, weights, damp = small(torch.float32)
    b = torch.randn(40)
    want = fl.lstsq(A, b, solver="qr", rank="full")
    for size in (1e-25, 1e25):
        P = MAKERS[name](size * A)
        x = fl.lstsq(size * A, b, solver="lsmr", rank="full", preconditioner=P)
        torch.testing.assert_close(size * x, want, rtol=1e-3, atol=1e-5)
    A, b = A.double(), b.double()
    want = fl.lstsq(A, b, solver="qr", rank="full")
    for size in (1e-200, 1e200):
        x = fl.lstsq(size * A, b, solver="lsqr", rank="full", preconditioner=MAKERS[name](size * A))
        torch.testing.assert_close(size * x, want)


# Singular and empty


@pytest.mark.parametrize("form", ["dense", "sparse"])
@EACH
def test_dependent_and_zero_columns(name, form):
    A, _, _, _ = small(m=3000)
    A[:, 2] = 2 * A[:, 0]  # in one block
    A[:, 5] = 0
    P = MAKERS[name](A if form == "dense" else A.to_sparse())
    G = applied(P).real
    assert bool(torch.isfinite(G).all())
    probes = torch.randn(7, 50, dtype=F64)
    assert float((probes * P.solve_normal(probes)).sum(0).min()) > 0
    if name != "sketch":  # whose N has a condition number beyond what eigvalsh can tell
        size = A.norm(dim=0)
        scale = torch.diag(torch.where(size > 0, size, 1.0))
        assert float(torch.linalg.eigvalsh(scale @ (G + G.mT) @ scale).min()) > 0
    b = torch.randn(3000, dtype=F64)
    want = fl.solve(A, b, solver="svd")
    got = fl.solve(A, b, solver="lsmr", preconditioner=P)  # the rank is found, N is left out
    assert bool(got.converged)
    torch.testing.assert_close(got.x, want.x, rtol=1e-8, atol=1e-10)
    damped = MAKERS[name](A, damp=0.5)
    x = fl.lstsq(A, b, damp=0.5, solver="lsmr", preconditioner=damped)
    torch.testing.assert_close(x, fl.lstsq(A, b, damp=0.5, solver="qr"), rtol=1e-8, atol=1e-10)


def test_a_block_of_equal_columns_takes_a_larger_shift():
    A = torch.ones(50_000, 30, dtype=F64) * torch.rand(50_000, 1, dtype=F64)
    G = applied(block_diagonal(A, 30), 30).real
    assert bool(torch.isfinite(G).all())
    assert float(torch.linalg.eigvalsh(G).min()) > 0


def test_more_columns_than_rows():
    A, _, _, damp = small(m=4)
    b = torch.randn(4, dtype=F64)
    for make in MAKERS.values():
        assert bool(torch.isfinite(applied(make(A))).all())
        P = make(A, damp=damp + 1)
        x = fl.lstsq(A, b, damp=damp + 1, solver="lsqr", preconditioner=P)
        torch.testing.assert_close(x, fl.lstsq(A, b, damp=damp + 1, solver="qr"))


@pytest.mark.parametrize("shape", [(0, 0), (5, 0), (0, 7)])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_empty(shape, form):
    A = torch.zeros(shape, dtype=F64)
    A = A if form == "dense" else A.to_sparse()
    for P in (block_diagonal(A, 2), incomplete(A), sketch(A)):
        v = torch.randn(shape[1], 3, dtype=F64)
        torch.testing.assert_close(P.solve_normal(v), v)
        assert P.solve_normal(v[:, :0]).shape == (shape[1], 0)


# Shapes of what it is applied to


@EACH
def test_shapes(name):
    A, *_ = small()
    P = MAKERS[name](A)
    G = applied(P).real
    for shape in ((7,), (7, 1), (7, 5), (3, 7, 2), (2, 3, 7, 2)):
        v = torch.randn(shape, dtype=F64)
        before = v.clone()
        got = P.solve_normal(v)
        assert got.shape == v.shape and torch.equal(v, before)
        assert got.data_ptr() != v.data_ptr()
        torch.testing.assert_close(got, G @ v)
    spread = torch.randn(5, 7, dtype=F64).mT
    torch.testing.assert_close(P.solve_normal(spread), G @ spread)
    assert not P.solve_normal(spread.requires_grad_()).requires_grad


# The way is shorter, the answer the same


def grid(side):
    D = sp.diags_array([-np.ones(side - 1), np.ones(side - 1)], offsets=[0, 1])
    D = D.tocsr()[: side - 1]
    eye = sp.eye_array(side)
    return sp.csr_array(sp.vstack([sp.kron(D, eye), sp.kron(eye, D)]))


def tall(m, n, cond, dtype=F64):
    """Sparse rows, singular values in geometric progression (through dense combinations)."""
    rng = np.random.default_rng(1)
    A = rng.standard_normal((m, n)) + (1j * rng.standard_normal((m, n)) if dtype.is_complex else 0)
    A = A * np.logspace(0, -np.log10(cond), n) @ np.linalg.qr(rng.standard_normal((n, n)))[0]
    return torch.from_numpy(A).to(dtype), np.ones((m, n), dtype=bool)


def arrow(cameras=4, points=40, seen=3, cond=30.0):
    """Bundle adjustment: 9 unknowns per camera, 3 per point, each group in unlike units."""
    rng = np.random.default_rng(2)
    camera = np.concatenate([rng.permutation(cameras)[:seen] for _ in range(points)])
    point = np.repeat(np.arange(points), seen)
    label = np.repeat(np.arange(cameras + points), [9] * cameras + [3] * points)
    n = label.size
    J = np.zeros((2 * camera.size, n))
    for i in range(camera.size):
        for group in (camera[i], cameras + point[i]):
            J[2 * i : 2 * i + 2, label == group] = rng.standard_normal((2, (label == group).sum()))
    for group in range(cameras + points):
        at = label == group
        s = at.sum()
        Q, R = (np.linalg.qr(rng.standard_normal((s, s)))[0] for _ in range(2))
        J[:, at] = J[:, at] @ (Q * np.logspace(0, np.log10(cond), s)) @ R
    order = rng.permutation(n)  # labels need not be consecutive
    return sp.csr_array(J[:, order]), label[order]


def hard(name):
    """The problem that a preconditioner is for: A, damp, and it."""
    if name == "block_diagonal":
        A, label = arrow()
        return fl.Sparse.from_scipy(A), 0.0, lambda A, **more: block_diagonal(A, label, **more)
    if name == "incomplete":
        return fl.Sparse.from_scipy(grid(40)), 1e-2, incomplete
    A, _ = tall(4000, 60, 1e3)
    return fl.Sparse.from_torch(A), 0.0, sketch


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


@EACH
def test_pickled(name):
    A, *_ = small()
    P = MAKERS[name](A)
    want = applied(P)  # whatever is made at first use does not stand in the way
    copy = pickle.loads(pickle.dumps(P))
    assert isinstance(copy, Preconditioner) and repr(copy) == repr(P)
    assert copy.nbytes == P.nbytes and copy.shape == P.shape
    torch.testing.assert_close(applied(copy), want, rtol=1e-12, atol=0)


@EACH
def test_immutable(name):
    A, *_ = small()
    P = MAKERS[name](A)
    want = applied(P)
    with pytest.raises(AttributeError):
        P.shape = (1, 1)
    A.zero_()
    torch.testing.assert_close(applied(P), want, rtol=0, atol=0)
    assert repr(P).startswith(f"{name}(shape=(40, 7), ")


@EACH
def test_shared_between_threads(name):
    A, damp, make = hard(name)
    P = make(A, damp=damp)
    b = torch.randn(A.shape[0], 6, dtype=F64)
    found = [None] * 6

    def work(i):
        options = {"damp": damp, "solver": "lsqr", "rank": "full", "preconditioner": P}
        found[i] = fl.lstsq(A, b[:, i], **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    want = fl.lstsq(A, b, damp=damp, solver="cholesky")
    atol = 1e-8 * float(want.abs().max())
    torch.testing.assert_close(torch.stack(found, 1), want, rtol=1e-7, atol=atol)


def test_public():
    assert fl.preconditioners is preconditioners
    assert set(preconditioners.__all__) == {*MAKERS, "Preconditioner"}


# Errors


@EACH
def test_errors(name):
    make = MAKERS[name]
    A, _, weights, _ = small()
    operator = fl.LinearOperator(lambda params, v: params[0] @ v, (40, 7), (A,))
    with pytest.raises(TypeError, match=f"{name}: needs the entries of A, and a LinearOperator"):
        make(operator)
    with pytest.raises(ValueError, match=f"{name}: A, damp and weights must be without batch"):
        make(torch.stack((A, A)))
    with pytest.raises(ValueError, match=r"must be without batch.*in a batch \(2,\)"):
        make(A, damp=torch.ones(2, 7, dtype=F64))
    with pytest.raises(ValueError, match=f"{name}: A must be on the CPU; got meta"):
        make(A.to("meta"))
    with pytest.raises(TypeError, match=f"{name}: A must be floating point or complex"):
        make(A.int())
    with pytest.raises(TypeError, match=f"{name}: A must be a torch tensor"):
        make("A")
    with pytest.raises(ValueError, match=f"{name}: damp must be finite and >= 0"):
        make(A, damp=-1.0)
    with pytest.raises(ValueError, match=f"{name}: weights must have shape"):
        make(A, weights=weights[1:])
    for key, bad in (("A", A / 0), ("weights", weights / 0)):
        with pytest.raises(ValueError, match=f"{name}: {key} must be finite; got NaN or Inf"):
            make(**{"A": A, key: bad})
    with pytest.raises(ValueError, match=f"{name}: damp must be finite; got NaN or Inf"):
        make(A, damp=torch.tensor(torch.nan, dtype=F64))
    P = make(A)
    with pytest.raises(ValueError, match=f"{name}: solve_normal needs 7 rows"):
        P.solve_normal(torch.ones(6, dtype=F64))
    with pytest.raises(TypeError, match=f"{name}: solve_normal needs dtype torch.float64"):
        P.solve_normal(torch.ones(7))
    with pytest.raises(ValueError, match="Make the preconditioner from a matrix with as many"):
        fl.lstsq(A[:, 1:], A[:, 0], solver="lsmr", rank="full", preconditioner=P)


@pytest.mark.parametrize(
    ("blocks", "error", "match"),
    [
        (0, ValueError, "got 0"),
        (True, TypeError, "bool"),
        (2.0, TypeError, "float of float64"),
        ("two", TypeError, "str"),
        (LABELS[1:], ValueError, r"got shape \(6,\)"),
        ([LABELS], ValueError, r"got shape \(1, 7\)"),
        ([], ValueError, r"got shape \(0,\)"),
        (np.ones(7), TypeError, "ndarray of float64"),
    ],
)
def test_wrong_blocks(blocks, error, match):
    with pytest.raises(error, match=match):
        block_diagonal(torch.ones(9, 7), blocks)


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (incomplete, {"drop": 1.0}, r"incomplete: drop must be a number in \[0, 1\); got 1.0"),
        (incomplete, {"drop": "1"}, "got '1'"),
        (incomplete, {"fill": 0.5}, "incomplete: fill must be a number >= 1; got 0.5"),
        (sketch, {"oversampling": 1}, "sketch: oversampling must be an int >= 2; got 1"),
        (sketch, {"oversampling": 2.5}, "got 2.5"),
        (sketch, {"nnz_per_row": 0}, "sketch: nnz_per_row must be an int >= 1; got 0"),
        (sketch, {"seed": -1}, "sketch: seed must be an int >= 0; got -1"),
    ],
)
def test_wrong_settings(make, options, match):
    with pytest.raises(ValueError, match=match):
        make(torch.ones(9, 7), **options)


def test_incomplete_is_shifted_until_its_pivots_are_positive(monkeypatch):
    A, *_ = small()
    tried = []
    spilu = _incomplete.scipy.sparse.linalg.spilu

    def moody(N, **options):
        tried.append(float(N.diagonal()[0]))
        if len(tried) == 1:
            raise RuntimeError("Factor is exactly singular")
        return spilu(N if len(tried) > 2 else N - 2 * sp.eye_array(7, format="csc"), **options)

    monkeypatch.setattr(_incomplete.scipy.sparse.linalg, "spilu", moody)
    P = incomplete(A)
    assert np.allclose(tried, [1.0, 1.001, 1.008])
    assert float(torch.linalg.eigvalsh(applied(P).real).min()) > 0

    def broken(N, **options):
        raise RuntimeError("Factor is exactly singular")

    monkeypatch.setattr(_incomplete.scipy.sparse.linalg, "spilu", broken)
    with pytest.raises(ArithmeticError, match="incomplete: no shift up to"):
        incomplete(A)
