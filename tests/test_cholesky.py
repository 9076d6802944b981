"""The Cholesky solver: as accurate as QR, right on every rank and shape, and honest otherwise."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest
import realdata
import scipy.sparse
import torch
from problems import FAMILIES, Exact, by_qr, laplacian

from funclsq import spare
from funclsq.backends import available, dense, registry
from funclsq.methods import _layout, _normal
from funclsq.methods._dual import worthwhile
from funclsq.methods._protocol import Options
from funclsq.methods.cholesky import NeedsDense, prepare
from funclsq.operators import DenseOp, SparseOp
from funclsq.pattern import SparsityPattern
from funclsq.solution import Status

EPS = np.finfo(float).eps


def sparse_op(A) -> SparseOp:
    A = scipy.sparse.csr_array(A)
    A.sum_duplicates()
    pattern = SparsityPattern.from_csr(A.indptr, A.indices, A.shape)
    return SparseOp(pattern, torch.from_numpy(A.data.copy()))


def batch_op(members) -> SparseOp:
    """Stack dense members on the union of their patterns."""
    stack = np.stack(members)
    row, col = np.nonzero((stack != 0).any(0))
    return SparseOp(
        SparsityPattern(row, col, stack.shape[1:]), torch.from_numpy(stack[:, row, col])
    )


def solve(prepared, c=None, g=None):
    as_tensor = [None if v is None else torch.from_numpy(v) for v in (c, g)]
    x, status, *_ = prepared.solve(*as_tensor)
    return x.numpy(), status


def error(x, true):
    return np.linalg.norm(x - true) / np.linalg.norm(true)


def right_sides(A, rng):
    """Consistent, inconsistent, and one for G^-1 alone; and what to measure, x or A x."""
    m, n = A.shape
    draw = rng.standard_normal
    x, e, g = (draw((k, 1)) + (1j * draw((k, 1)) if np.iscomplexobj(A) else 0) for k in (n, m, n))
    return [("consistent", A @ x, None), ("inconsistent", A @ x + e, None), ("dual", None, g)]


def check_accuracy(A, damp, factor, op=None, backend=None):
    """Every answer is within ``factor`` of dense QR's error, or its status says otherwise."""
    exact = Exact(A, damp)
    d = None if damp is None else torch.from_numpy(damp)
    prepared = prepare(sparse_op(A) if op is None else op, d, Options(backend=backend))
    for kind, c, g in right_sides(A, np.random.default_rng(1)):
        x, status = solve(prepared, c, g)
        true, image = exact.solve(c, g)
        by = by_qr(A, damp, c, g)
        if kind == "dual":  # it is A x as well that derivatives ask for
            assert error(x, true) <= factor * max(error(by, true), 4 * EPS), kind
            x, by, true = A @ x, A @ by, image
        assert error(x, true) <= factor * max(error(by, true), 4 * EPS), kind
        assert status.item() == Status.DIRECT


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("cond", [1e2, 1e5, 1e8, 1e10])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_accurate_as_qr(family, cond, wide):
    A = FAMILIES[family](cond, np.random.default_rng(0))
    check_accuracy(A.T.copy() if wide else A, None, 10 if cond <= 1e8 else 100)


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("atol", [1e-11, 1e-8, 1e-6])
@pytest.mark.parametrize("cond", [1.5, 1e2, 1e4, 1e7])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_tolerance_the_error_is_below_it_and_no_needless_solve_is_made(
    family, cond, atol, wide, monkeypatch
):
    A = FAMILIES[family](cond, np.random.default_rng(0))
    A = A.T.copy() if wide else A
    solves, whole = [], _normal.Normal.solve
    monkeypatch.setattr(_normal.Normal, "solve", lambda n, q: solves.append(0) or whole(n, q))
    damp = None if wide else torch.full((A.shape[1],), 0.5, dtype=torch.float64)
    for d in (None, damp):
        exact = Exact(A, None if d is None else d.numpy())
        prepared, full = (prepare(sparse_op(A), d, Options(atol=t)) for t in (atol, None))
        for kind, c, g in right_sides(A, np.random.default_rng(1)):
            counts, errors = [], []
            for each in (prepared, full):
                solves.clear()
                x, status = solve(each, c, g)
                counts.append(len(solves))
                assert status.item() == Status.DIRECT
                true, image = exact.solve(c, g)
                errors.append(error(A @ x, image) if kind == "dual" else error(x, true))
            assert errors[0] <= atol + 10 * errors[1], kind
            assert counts[0] <= counts[1]
            if d is not None and atol >= 1e-8 and cond < 1e5:
                assert counts[0] == 1, kind
                assert kind == "dual" or counts[1] > 1


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("damp", [1.0, 1e-2, 1e-4, 1e-8])
def test_damped_as_accurate_as_qr(damp, wide):
    A = FAMILIES["arrow"](1e10, np.random.default_rng(0))
    A = A.T.copy() if wide else A
    check_accuracy(A, damp * np.linspace(1, 2, A.shape[1]), 10)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("damp", [1.0, 1e-3, 1e-6])
def test_few_rows_damped_are_factored_by_rows(damp, dense):
    A = integer_matrix(8, 40, 8)
    A[:, ::3] = 0  # G is damp^2 there
    op = DenseOp(torch.from_numpy(A)) if dense else sparse_op(A)
    d = damp * np.linspace(1, 2, 40)
    assert worthwhile(op, torch.from_numpy(d)) == (damp > 1e-5)
    check_accuracy(A, d, 10, op=op)


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("cond", [1e2, 1e9])
def test_complex_as_accurate_as_qr(cond, wide):
    A = FAMILIES["random"](cond, np.random.default_rng(0), complex_=True)
    check_accuracy(A.conj().T.copy() if wide else A, None, 10)


@pytest.mark.parametrize("cond", [1e2, 1e9])
def test_dense_operator(cond):
    A = FAMILIES["random"](cond, np.random.default_rng(0))
    check_accuracy(A, None, 10, op=DenseOp(torch.from_numpy(A)))


@pytest.mark.parametrize("cond", [1e12, 1e14])
@pytest.mark.parametrize("family", FAMILIES)
def test_hopeless_is_accurate_or_says_so(family, cond):
    A = FAMILIES[family](cond, np.random.default_rng(0))
    prepared = prepare(sparse_op(A), None, Options())
    c = right_sides(A, np.random.default_rng(1))[1][1]
    x, status = solve(prepared, c)
    true = Exact(A).solve(c, None)[0]
    bound = 100 * max(error(by_qr(A, None, c, None), true), EPS)
    assert error(x, true) <= bound or status.item() != Status.DIRECT or prepared.deficient


@pytest.mark.parametrize(("power", "bound"), [(2, 1e-11), (3, 1e-8), (4, 3e-6)])
def test_smooth_spectrum(power, bound):
    """Up to cond 5e9 without a gap: many directions are spoilt by the shift."""
    A = laplacian(24, power)
    x = np.round(64 * np.random.default_rng(0).standard_normal((A.shape[1], 1)))
    found, status = solve(prepare(sparse_op(A), None, Options()), A @ x)
    assert error(found, x) <= bound
    assert status.item() == Status.DIRECT


def test_columns_of_any_scale():
    A = FAMILIES["random"](1e2, np.random.default_rng(0))
    scale = np.logspace(-150, 150, A.shape[1])
    c = right_sides(A, np.random.default_rng(1))[1][1]
    x, _ = solve(prepare(sparse_op(A), None, Options()), c)
    scaled, status = solve(prepare(sparse_op(A * scale), None, Options(scale=True)), c)
    np.testing.assert_allclose(scaled * scale[:, None], x, rtol=1e-10)
    assert status.item() == Status.DIRECT


def integer_matrix(m, n, rank, seed=0):
    """Integer entries, so the rank is exact; half of the entries of the factors are zero."""
    rng = np.random.default_rng(seed)
    L = rng.integers(-2, 3, (m, rank)) * (rng.random((m, rank)) < 0.5)
    R = rng.integers(-2, 3, (rank, n)) * (rng.random((rank, n)) < 0.5)
    L[:rank] += 5 * np.eye(rank, dtype=int)
    R[:, :rank] += 5 * np.eye(rank, dtype=int)
    return (L @ R).astype(float)


def check_minimum_norm(A, prepared, tol=1e-11):
    rng = np.random.default_rng(1)
    pinv = np.linalg.pinv(A)
    rank = np.linalg.matrix_rank(A)
    assert int(prepared.rank) == rank
    assert prepared.deficient == (rank < A.shape[1])
    c = rng.standard_normal((A.shape[0], 3))
    g = rng.standard_normal((A.shape[1], 3))
    for rhs, true in [
        ((c, None), pinv @ c),
        ((None, g), pinv @ (pinv.T @ g)),
        ((c, g), pinv @ (c + pinv.T @ g)),
    ]:
        x, status = solve(prepared, *rhs)
        assert error(x, true) <= tol
        assert (status == Status.DIRECT).all()


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (30, 30)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("rank", [1, 12, 17, 20])
def test_minimum_norm_of_any_rank(shape, rank, dense):
    A = integer_matrix(*shape, rank)
    op = DenseOp(torch.from_numpy(A)) if dense else sparse_op(A)
    check_minimum_norm(A, prepare(op, None, Options()))


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
def test_zero_rows_and_columns(wide):
    A = integer_matrix(40, 20, 20)
    A[:, [2, 7]] = 0
    A[[0, 5], :] = 0
    A = A.T.copy() if wide else A
    check_minimum_norm(A, prepare(sparse_op(A), None, Options()))
    stored = SparsityPattern(*np.nonzero(np.ones(A.shape)), A.shape)  # zeros stored
    op = SparseOp(stored, torch.from_numpy(A.reshape(-1)))
    check_minimum_norm(A, prepare(op, None, Options()))


def test_minimum_norm_is_of_unscaled_x():
    A = integer_matrix(40, 20, 15) * np.logspace(0, 4, 20)
    check_minimum_norm(A, prepare(sparse_op(A), None, Options()), tol=1e-7)


def test_all_zero_and_empty():
    for shape in [(3, 2), (2, 3), (0, 2), (2, 0), (0, 0)]:
        prepared = prepare(sparse_op(np.zeros(shape)), None, Options())
        x, _ = solve(prepared, np.ones((shape[0], 2)), np.ones((shape[1], 2)))
        assert x.shape == (shape[1], 2)
        assert not x.any()
        assert int(prepared.rank) == 0


def test_truncation_by_rcond():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((30, 8)))[0]
    A = np.repeat(Q[:, :4], 2, axis=1)
    A[:, ::2] += 1e-5 * Q[:, 4:]
    assert int(prepare(sparse_op(A), None, Options()).rank) == 8
    prepared = prepare(sparse_op(A), None, Options(rcond=1e-3))
    assert int(prepared.rank) == 4
    c = rng.standard_normal((30, 1))
    assert error(solve(prepared, c)[0], np.linalg.lstsq(A, c, rcond=1e-3)[0]) <= 1e-4


def test_large_null_space_asks_for_a_dense_method():
    A = integer_matrix(400, 300, 100)
    with pytest.raises(NeedsDense):
        prepare(sparse_op(A), None, Options())


def test_single_precision_values_are_solved_beyond_single_precision():
    A = FAMILIES["random"](1e3, np.random.default_rng(0)).astype(np.float32)
    c = right_sides(A, np.random.default_rng(1))[1][1].astype(np.float32)
    prepared = prepare(sparse_op(A), None, Options())
    x, status = solve(prepared, c)
    assert x.dtype == np.float32
    assert error(x, Exact(A).solve(c, None)[0]) <= 2 * np.finfo(np.float32).eps
    assert status.item() == Status.DIRECT
    assert int(prepared.rank) == 16
    dependent = A.copy()
    dependent[:, 0] = dependent[:, 1] * (1 + np.float32(1e-6))
    assert int(prepare(sparse_op(dependent), None, Options()).rank) == 15


@pytest.mark.parametrize("n", [16, 90], ids=["dense", "sparse"])
@pytest.mark.parametrize("damped", [False, True])
def test_batch_equals_loop(n, damped):
    rng = np.random.default_rng(0)
    mask = rng.random((3 * n, n)) < 3 / n
    members = [np.eye(3 * n, n) + mask * rng.standard_normal((3 * n, n)) for _ in range(5)]
    members[1][:, 2] = members[1][:, 3]  # one of them deficient
    members[3][:, 4] = members[3][:, 5] * (1 + 1e-8)  # and one almost so
    damp = torch.rand(5, n, dtype=torch.float64) if damped else None
    c, g = torch.randn(5, 3 * n, 2).double(), torch.randn(5, n, 2).double()
    op = batch_op(members)
    whole = prepare(op, damp, Options())
    x, status, *_ = whole.solve(c, g)
    assert x.shape == (5, n, 2)
    assert status.shape == (5, 2)
    for i in range(5):
        one = prepare(
            SparseOp(op.pattern, op.csr_values[i]), None if damp is None else damp[i], Options()
        )
        alone, s, *_ = one.solve(c[i], g[i])
        bound = 1e-10 if i != 3 or damped else 1e-4
        assert error(x[i].numpy(), alone.numpy()) <= bound
        assert torch.equal(status[i], s)
        assert whole.rank[i] == one.rank
        assert bool(whole.deficient[i]) == one.deficient


def test_batch_of_dampings_on_one_matrix():
    A = integer_matrix(30, 10, 10)
    damp = torch.tensor([[0.5], [2.0]], dtype=torch.float64).expand(2, 10)
    c = torch.randn(30, 1, dtype=torch.float64)
    x, *_ = prepare(sparse_op(A), damp, Options()).solve(c, None)
    for i, d in enumerate((0.5, 2.0)):
        true = np.linalg.solve(A.T @ A + d**2 * np.eye(10), A.T @ c.numpy())
        assert error(x[i].numpy(), true) <= 1e-12


@pytest.mark.parametrize("backend", available())
def test_every_backend(backend):
    A = laplacian(16, 1)
    A = scipy.sparse.vstack([A, scipy.sparse.eye_array(A.shape[1])]).toarray()
    rng = np.random.default_rng(0)
    c, g = rng.standard_normal((A.shape[0], 3)), rng.standard_normal((A.shape[1], 3))
    pinv = np.linalg.pinv(A)
    op = sparse_op(A)
    kept = []
    for factor in (1.0, 2.0, 4.0):  # same pattern, new values: the analysis is kept
        prepared = prepare(
            SparseOp(op.pattern, factor * op.csr_values), None, Options(backend=backend)
        )
        kept.append((prepared, pinv @ (c / factor + pinv.T @ g / factor**2)))
    for prepared, true in kept:  # earlier factors are left alone by later ones
        x, status = solve(prepared, c, g)
        assert error(x, true) <= 1e-12
        assert (status == Status.DIRECT).all()
        assert prepared.nbytes > 0
        for right in (g.copy(), g[:, :1].copy()):
            prepared._problem.core.normal.solve(torch.from_numpy(right))
            np.testing.assert_array_equal(right, g[:, : right.shape[1]])
    A[:, 1] = A[:, 0]
    check_minimum_norm(A, prepare(sparse_op(A), None, Options(backend=backend)))


@pytest.mark.parametrize("backend", available())
def test_threads_share_a_factor(backend):
    A = laplacian(16, 1)
    prepared = prepare(sparse_op(A), None, Options(backend=backend))
    rhs = [np.random.default_rng(i).standard_normal((A.shape[0], 1)) for i in range(8)]
    alone = [solve(prepared, c)[0] for c in rhs]
    found = [None] * 8

    def work(i):
        for _ in range(5):
            found[i] = solve(prepared, rhs[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, b in zip(alone, found, strict=True):
        np.testing.assert_array_equal(a, b)


def nearly_full(rng, kind=float, m=240, n=80, each=3):
    """Rows of a few entries at random: A^H A is thin enough, and its factor more than half full."""
    row, col = np.repeat(np.arange(m), each), rng.integers(0, n, each * m)
    A = np.zeros((m, n), dtype=kind)
    np.add.at(A, (row, col), rng.standard_normal(each * m))
    if kind is complex:
        A = A * np.exp(1j * rng.standard_normal((m, n)))
    return A


@pytest.fixture(params=["rslab", "superlu"])
def first(request, monkeypatch):
    """Let this backend be the first choice, and nothing be written out before it is asked."""
    if request.param not in available():
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setattr(registry, "ORDER", (request.param, "superlu"))
    monkeypatch.setattr(_normal, "DENSE_FILL", 1.0)
    monkeypatch.setattr(dense, "NEARLY_FULL", 0.5)


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("case", ["tall", "wide", "damped", "complex", "deficient", "single"])
def test_a_nearly_full_factor_is_dense_and_the_same(case):
    rng = np.random.default_rng(0)
    A = nearly_full(rng, complex if case == "complex" else float)
    if case == "deficient":
        A[:, 7] = A[:, 3] + A[:, 5]
    A = A.T.copy() if case == "wide" else A.astype(np.float32) if case == "single" else A
    damp = torch.rand(80, dtype=torch.float64) if case == "damped" else None
    c, g = checked_blocks(A, rng)
    op = sparse_op(A)
    found = []
    for scale in (1.0, 2.0, 4.0, 1.0):  # earlier factors are left alone by later ones
        scaled = SparseOp(op.pattern, scale * op.csr_values)
        found.append((prepare(scaled, damp, Options()), scaled))
    for ours, scaled in found:
        other = prepare(scaled, damp, Options(backend="superlu"))
        assert ours.full
        assert not other.full
        assert ours.nbytes > 80 * 80 * 8
        assert (int(ours.rank), ours.deficient) == (int(other.rank), other.deficient)
        assert int(ours.rank) == (79 if case == "deficient" else 80)
        for rhs in ((c, None), (None, g), (c, g)):
            (x, status), (y, same) = solve(ours, *rhs), solve(other, *rhs)
            assert error(x, y) <= (1e-6 if case == "single" else 1e-11)
            assert torch.equal(status, same)
    np.testing.assert_array_equal(solve(found[0][0], c)[0], solve(found[3][0], c)[0])


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize("kind", [float, complex])
def test_a_batch_of_nearly_full_factors(kind, monkeypatch):
    rng = np.random.default_rng(0)
    members = [nearly_full(np.random.default_rng(1), kind) for _ in range(3)]
    members = [A * (1 + 0.3 * rng.standard_normal(A.shape)) for A in members]
    members[1][:, 7] = members[1][:, 3]
    op = batch_op(members)
    c, g = (torch.stack([torch.from_numpy(v)] * 3) for v in checked_blocks(members[0], rng))
    # SuperLU alone tells the fill after its first factor
    for _ in range(2):
        ours = prepare(op, None, Options())
        assert ours.full
    other = prepare(op, None, Options(backend="superlu"))
    assert torch.equal(ours.rank, other.rank)
    assert ours.rank.tolist() == [80, 79, 80]
    for rhs in ((c, None), (None, g), (c, g)):
        (x, status, *_), (y, same, *_) = ours.solve(*rhs), other.solve(*rhs)
        assert error(x.numpy(), y.numpy()) <= 1e-11
        assert torch.equal(status, same)
    monkeypatch.setattr(_layout, "_MOST_DENSE", 2 * 80 * 80)  # too large in all: sparse
    assert not prepare(op, None, Options()).full


def test_a_thin_factor_and_a_backend_asked_for_stay_sparse():
    assert not prepare(sparse_op(laplacian(16, 1)), None, Options()).full
    A = nearly_full(np.random.default_rng(0), m=1000, n=400, each=5)
    for name in available():
        assert not prepare(sparse_op(A), None, Options(backend=name)).full


def test_the_memory_of_dense_factors_is_used_again():
    spare.clear()
    A = sparse_op(nearly_full(np.random.default_rng(0), m=1000, n=400, each=5))
    first = prepare(A, None, Options())
    assert first.full
    x = solve(first, np.ones((1000, 1)))[0]
    address = first._problem.core.normal._factor._inner._L.data_ptr()
    other = prepare(A, None, Options())
    assert other._problem.core.normal._factor._inner._L.data_ptr() != address
    np.testing.assert_array_equal(solve(other, np.ones((1000, 1)))[0], x)
    del first
    gc.collect()
    third = prepare(SparseOp(A.pattern, 2 * A.csr_values), None, Options())
    assert third._problem.core.normal._factor._inner._L.data_ptr() == address
    np.testing.assert_array_equal(solve(other, np.ones((1000, 1)))[0], x)


def checked_blocks(A, rng):
    """Right-hand sides c and g of two columns in the dtype of A."""
    unit = 1 + 1j if np.iscomplexobj(A) else 1
    c, g = (unit * rng.standard_normal((rows, 2)) for rows in A.shape)
    return c.astype(A.dtype), g.astype(A.dtype)


def test_refused_input():
    for name, told in (("nonesuch", "backend must be one of"), ("cudss", "this one is on the CPU")):
        with pytest.raises(ValueError, match=told):
            prepare(sparse_op(laplacian(9, 1)), None, Options(backend=name))


def test_refused_dtype():
    if "rslab" not in available():
        pytest.skip("rslab is not installed")
    op = sparse_op(laplacian(9, 1) * (1 + 1j))
    with pytest.raises(ValueError, match="does not factor complex128"):
        prepare(op, None, Options(backend="rslab"))


def test_overflow_is_told_per_member():
    good = integer_matrix(6, 3, 3)
    bad = good.copy()
    bad[0, 0] = np.inf
    op = batch_op([good, bad])
    c = torch.randn(6, 1, dtype=torch.float64)
    x, status, *_ = prepare(op, None, Options()).solve(c, None)
    assert status[:, 0].tolist() == [Status.DIRECT, Status.NONFINITE]
    assert error(x[0].numpy(), np.linalg.lstsq(good, c.numpy())[0]) <= 1e-13
    assert x[1].isnan().all()


REAL = [
    "ash219.mtx.gz",
    "ash608.mtx.gz",
    "abb313.mtx.gz",
    "well1033.mtx.gz",
    "illc1850.mtx.gz",
    "lp_e226_T.mtx.gz",
    "lp_d2q06c_T.mtx.gz",
    "lp_greenbea_T.mtx.gz",
    "maragal3_signlost.mtx.gz",
    "Maragal_1.mtx.gz",
]


@pytest.mark.parametrize("name", REAL)
def test_real_data_with_reference(name):
    A, b = realdata.load(f"sparse_lsq/{name}")
    ref = realdata.reference(f"sparse_lsq/{name}")
    prepared = prepare(sparse_op(A), None, Options())
    x, status = solve(prepared, b[:, None])
    assert int(prepared.rank) == int(ref["rank"])
    assert bool(prepared.deficient) == (int(ref["rank"]) < A.shape[1])
    assert error(x[:, 0], ref["x_minnorm"]) <= 1e-12
    assert status.item() == Status.DIRECT


@pytest.mark.parametrize(
    ("name", "rank", "norm"),
    [
        ("sparse_lsq/landmark.npz", 2671, None),
        ("slam_ba/CSAIL_gn0.npz", 3132, None),
        ("slam_ba/intel_gn0.npz", 5181, None),
        ("slam_ba/M3500_gn0.npz", 10497, None),
        ("regression/insteval.npz", 4105, 309.58495399037),
        ("regression/chem97.npz", 2413, 378.81468720134),
    ],
)
def test_real_data_of_deficient_rank(name, rank, norm):
    A, b = realdata.load(name)
    prepared = prepare(sparse_op(A), None, Options())
    x, status = solve(prepared, b[:, None])
    assert int(prepared.rank) == rank
    assert prepared.deficient
    r = b - A @ x[:, 0]
    assert norm is None or np.linalg.norm(r) == pytest.approx(norm, rel=1e-12)
    assert np.linalg.norm(A.T @ r) <= 1e-12 * np.linalg.norm(A.data) * np.linalg.norm(b)
    assert status.item() == Status.DIRECT
