"""What a preconditioner is: the inverse it stands for, its errors, its life as an object."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cases import DTYPES, LAYOUTS
from hard_problems import EACH, F64, LABELS, MAKERS, grid, hard, small, tall

import funclsq as fl
from funclsq import preconditioners
from funclsq.preconditioners import Preconditioner, _incomplete, block_diagonal, incomplete, sketch

KRYLOV = pytest.mark.parametrize("solver", ["lsmr", "lsqr", "cgls"])


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
