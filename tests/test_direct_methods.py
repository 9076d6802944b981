"""Direct methods and their parts, against the pseudo-inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import funclsq as fl
from funclsq.methods import _refine, cholesky, qr, svd
from funclsq.methods._protocol import Options
from funclsq.operators import DenseOp, SparseOp
from funclsq.solution import Status

SHAPES = {
    "tall": (9, 5, 5),
    "square": (6, 6, 6),
    "wide": (5, 9, 5),
    "tall-deficient": (9, 5, 3),
    "wide-deficient": (5, 9, 3),
}
DTYPES = {"real": np.float64, "complex": np.complex128}


def _draw(seed, *shape, dtype=np.complex128):
    rng = np.random.default_rng(seed)
    real = rng.standard_normal(shape)
    return real + 1j * rng.standard_normal(shape) if dtype == np.complex128 else real


def _operator(A, layout):
    A = torch.from_numpy(A)
    if layout == "dense":
        return DenseOp(A)
    m, n = A.shape[-2:]
    pattern = fl.SparsityPattern(*np.divmod(np.arange(m * n), n), (m, n))
    return SparseOp(pattern, A.flatten(-2))


def _adjoint(A):
    return np.swapaxes(A.conj(), -1, -2)


@pytest.mark.parametrize("damp", [False, True], ids=["", "damped"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("method", [qr, svd, cholesky], ids=["qr", "svd", "cholesky"])
def test_a_solve_is_that_of_the_pseudo_inverse(method, kind, dtype, layout, batch, damp):
    m, n, rank = SHAPES[kind]
    A = _draw(0, *batch, m, rank, dtype=dtype) @ _draw(1, *batch, rank, n, dtype=dtype)
    c, g = _draw(2, *batch, m, 2, dtype=dtype), _draw(3, *batch, n, 2, dtype=dtype)
    D = np.linspace(0.1, 1.0, n) if damp else np.zeros(n)
    prepared = method.prepare(
        _operator(A, layout), torch.from_numpy(D) if damp else None, Options(), False
    )
    B = np.concatenate((A, np.broadcast_to(np.diag(D), (*batch, n, n))), -2)
    inverse = np.linalg.pinv(B, rcond=1e-10)
    inverse = inverse @ _adjoint(inverse)
    for with_c, with_g in ((1, 0), (0, 1), (1, 1)):
        given = (torch.from_numpy(t) if w else None for w, t in ((with_c, c), (with_g, g)))
        raw = prepared.solve(*given)
        want = inverse @ (with_c * _adjoint(A) @ c + with_g * g)
        np.testing.assert_allclose(raw.x.numpy(), want, rtol=1e-8, atol=1e-9)
        assert bool((raw.status == int(Status.DIRECT)).all())
    assert bool((torch.as_tensor(prepared.rank) == (n if damp else rank)).all())
    assert bool(torch.as_tensor(prepared.deficient).all()) is not (damp or rank == n)
    if method is svd:
        s = np.linalg.svd(B, compute_uv=False)
        want = s[..., 0] / s[..., (n if damp else rank) - 1]
        np.testing.assert_allclose(prepared.cond.numpy(), want, rtol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_conjugate_gradients_end_after_as_many_steps_as_there_are_unknowns(dtype, monkeypatch):
    m, n = 12, 6
    A, q = _draw(0, m, n, dtype=dtype), _draw(1, n, 3, dtype=dtype)
    q[:, 1] = 0
    near = _adjoint(A) @ A + np.diag(np.arange(n))
    op, inverse = DenseOp(torch.from_numpy(A)), torch.from_numpy(np.linalg.inv(near))
    want = np.linalg.solve(_adjoint(A) @ A, q)

    def error():
        x = _refine._conjugate_gradients(op, lambda q: inverse @ q, torch.from_numpy(q)).numpy()
        return np.linalg.norm(A @ (x - want), axis=0) / np.linalg.norm(A @ want, axis=0).clip(1e-9)

    assert error().max() < 10 * _refine._DROP
    monkeypatch.setattr(_refine, "_DROP", 1e-12)
    monkeypatch.setattr(_refine, "_INNER", n)
    assert error().max() < 1e-9


@pytest.mark.parametrize("scale", ["auto", True])
def test_the_rank_is_that_of_columns_of_one_length(scale):
    """Columns 2 and 3 are equal to 1e-7, and shorter than the others by a factor of 1e9."""
    U = np.linalg.qr(_draw(0, 9, 4, dtype=np.float64))[0]
    A = np.stack((U[:, 0], U[:, 1], U[:, 1] + 1e-7 * U[:, 2]), 1)
    units = np.array([1.0, 1e-9, 1e-9]) if scale == "auto" else np.array([1.0, 1e-30, 1e-30])
    b = U @ np.array([1.0, 2.0, 3.0, 4.0])
    prepared = qr.prepare(DenseOp(torch.from_numpy(A * units)), None, Options(scale=scale), False)
    assert int(prepared.rank) == 3
    x = prepared.solve(torch.from_numpy(b[:, None]), None).x.numpy()[:, 0] * units
    np.testing.assert_allclose(x, [1.0, 2.0 - 3e7, 3e7], rtol=1e-7)


def test_columns_too_short_to_count():
    """Beside one of length 1, a column of 1e-20 is none, but for scale=True."""
    A = _draw(0, 7, 3, dtype=np.float64)
    A[:, 1] *= 1e-20
    b = _draw(1, 7, 1, dtype=np.float64)
    for scale, kept in (("auto", [0, 2]), (True, [0, 1, 2])):
        for method in (qr, cholesky):
            prepared = method.prepare(
                DenseOp(torch.from_numpy(A)), None, Options(scale=scale), False
            )
            assert int(prepared.rank) == len(kept)
            x = prepared.solve(torch.from_numpy(b), None).x.numpy()
            units = np.linalg.norm(A, axis=0)[kept]
            want = np.linalg.lstsq(A[:, kept] / units, b, rcond=None)[0][:, 0]
            np.testing.assert_allclose(x[kept, 0] * units, want, rtol=1e-12)
            if len(kept) == 2:
                assert abs(x[1, 0]) < 1e-15


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (80, 70)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(np.float64, 1.0), (np.complex128, 1e20), (np.float32, 1e-22)],
    ids=["double", "complex large", "single tiny"],
)
def test_the_condition_that_qr_tells(dtype, size, shape, batch):
    """In the Frobenius norm, of columns (rows, if wide) of length one, whatever they had."""
    A = _draw(0, *batch, *shape, dtype=np.complex128)
    A = A if dtype == np.complex128 else A.real
    given = torch.from_numpy((A * size).astype(dtype))
    prepared = qr.prepare(DenseOp(given), None, Options(), False)
    columns = A if shape[0] >= shape[1] else _adjoint(A)
    units = columns / np.linalg.norm(columns, axis=-2, keepdims=True)
    inverse = np.linalg.norm(np.linalg.pinv(units), axis=(-2, -1))
    want = np.linalg.norm(units, axis=(-2, -1)) * inverse
    tolerance = 3e-3 if dtype == np.float32 else 1e-10
    np.testing.assert_allclose(np.asarray(prepared.cond), want, rtol=tolerance)
    if dtype != np.float32:  # small ones are looked at in the quick way
        assert isinstance(prepared.cond, float) == (not batch and min(shape) <= qr.SMALL)


@pytest.mark.parametrize("top", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("copies", [None, 2])
@pytest.mark.parametrize(("ratio", "rank"), [(1.005, 3), (0.995, 2)])
def test_which_columns_are_too_short_for_qr(ratio, rank, copies, top):
    U = np.linalg.qr(_draw(0, 7, 3))[0] * np.array([1.0, 0.5, ratio * 1e-6]) * top
    given = torch.from_numpy(U if copies is None else np.stack([U] * copies))
    prepared = qr.prepare(DenseOp(given), None, Options(rcond=1e-6), False)
    assert np.all(np.asarray(prepared.rank) == rank)


def test_the_condition_of_a_small_factor_is_told_at_once_where_it_is_plain():
    R = np.triu(_draw(0, 4, 4))
    units = R / np.linalg.norm(R, axis=0)
    want = 2 * np.linalg.norm(np.linalg.inv(units))
    assert qr._plain_cond(torch.from_numpy(R), 1e-12) == pytest.approx(want, rel=1e-12)
    for odd in (0.0, 1e-13, np.nan, np.inf):
        column = R.copy()
        column[:, 3] *= odd if np.isfinite(odd) else 1
        column[1, 3] = column[1, 3] if np.isfinite(odd) else odd
        assert qr._plain_cond(torch.from_numpy(column), 1e-12) is None
    R[1] = R[2] = R[2, 2] = 0  # finite, and its inverse is not
    R[1, 2], R[1, 3] = 1, 1
    assert qr._plain_cond(torch.from_numpy(R), 1e-12) is None


def test_the_rank_tolerance_is_that_of_numpy():
    """The larger side times eps; of nothing, eps."""
    eps = np.finfo(np.float32).eps
    for m, n, size in ((9, 5, 9), (5, 9, 9), (0, 0, 1)):
        assert svd.default_rcond(m, n, torch.float32) == size * eps


def test_what_is_far_below_rounding_is_left_out_of_qr():
    tiny = np.finfo(float).eps ** 3
    B = np.zeros((3, 4))
    B[:, 0] = np.array([1.0, 1.005 * tiny, 0.995 * tiny]) * 1e3
    B[1, 1], B[2, 2], B[:, 3] = 1.005e-3, 0.995e-3, [1.0, np.inf, 2.0]
    want = B.copy()
    want[2, 0] = want[2, 2] = 0
    # beside infinity all is short, so that a column of it is judged alone
    for columns in ([0, 1, 2], [3]):
        got = qr._without_negligible(torch.from_numpy(B[:, columns]), 1e-6)
        np.testing.assert_array_equal(got.numpy(), want[:, columns])


@pytest.fixture
def no_gesdd(monkeypatch):
    """Divide and conquer fails, as it does on some matrices with subnormal numbers."""

    def fails(*_, **__):
        raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)


def test_svd_in_the_patient_way_keeps_short_columns(no_gesdd):
    sizes = np.array([1e10, 1.0, 1e-20])
    A = np.linalg.qr(_draw(0, 2, 6, 3))[0] * sizes
    s = svd.thin_svd(torch.from_numpy(A))[1]
    np.testing.assert_allclose(s.numpy(), np.stack([sizes] * 2), rtol=1e-12)


@pytest.mark.parametrize(("ratio", "kept"), [(1.005, 1), (0.995, 0)])
def test_svd_in_the_patient_way_leaves_out_what_is_far_below_rounding(ratio, kept, no_gesdd):
    small = ratio * 1e10 * np.finfo(float).eps ** 3
    s = svd.thin_svd(torch.from_numpy(np.diag([1e10, small])))[1]
    np.testing.assert_allclose(s.numpy(), [1e10, kept * small], rtol=1e-14)


def test_singular_values_that_are_nan_are_found_in_the_patient_way(monkeypatch):
    plain = torch.linalg.svd

    def spoilt(A, **options):
        U, s, Vh = plain(A, **options)
        return U, s * torch.nan, Vh

    A = _draw(0, 5, 3)
    monkeypatch.setattr(torch.linalg, "svd", spoilt)
    s = svd.thin_svd(torch.from_numpy(A))[1]
    np.testing.assert_allclose(s.numpy(), np.linalg.svd(A, compute_uv=False), rtol=1e-13)


@pytest.mark.parametrize("top", [1e-3, 1e3])
@pytest.mark.parametrize(("ratio", "rank"), [(1.005, 3), (0.995, 2)])
def test_which_singular_values_count(ratio, rank, top):
    U, V = np.linalg.qr(_draw(0, 7, 3))[0], np.linalg.qr(_draw(1, 3, 3))[0]
    A = (U * [top, top / 2, ratio * 1e-6 * top]) @ V
    prepared = svd.prepare(DenseOp(torch.from_numpy(A)), None, Options(rcond=1e-6), False)
    assert int(prepared.rank) == rank


@pytest.mark.parametrize("dtype", [np.float32, np.complex128])
@pytest.mark.parametrize("deficient", [False, True])
def test_the_bytes_that_a_factor_holds(deficient, dtype):
    m, n, rank = 9, 5, 3 if deficient else 5
    A = _draw(0, 2, m, rank, dtype=dtype) @ _draw(1, 2, rank, n, dtype=dtype)
    A = A.astype(dtype)
    size = np.dtype(dtype).itemsize
    for method in (qr, svd):
        prepared = method.prepare(DenseOp(torch.from_numpy(A)), None, Options(), False)
        if method is qr and not deficient:  # Q and R
            assert prepared.nbytes == 2 * (m * n + n * n) * size
        else:  # U, V and the singular values, which are real
            values = np.dtype(dtype).type(0).real.itemsize
            assert prepared.nbytes == 2 * ((m * n + n * n) * size + n * values)
