"""The factored normal matrix: what it is, which columns it leaves out, how it is laid out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_direct_methods import DTYPES, _adjoint, _draw, _operator

import funclsq as fl
from funclsq.backends import NotPositive
from funclsq.methods import _normal
from funclsq.methods._normal import Normal
from funclsq.operators import DenseOp, SparseOp, StackedOp


def _banded(n, batch, dtype):
    """A matrix whose normal matrix is sparse."""
    row, col = np.nonzero(sum(np.eye(n, k=k) for k in (0, -1, -5)))
    values = _draw(4, *batch, row.size, dtype=dtype)
    values[..., row == col] += 5
    A = np.zeros((*batch, n, n), dtype)
    A[..., row, col] = values
    return SparseOp(fl.SparsityPattern(row, col, (n, n)), torch.from_numpy(values)), A


@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("damp", [False, True], ids=["", "damped"])
@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["dense", "sparse", "banded"])
def test_the_factored_normal_matrix(kind, dtype, batch, damp, shift):
    if kind == "banded":
        op, A = _banded(80, batch, dtype)
    else:
        A = _draw(0, *batch, 9, 5, dtype=dtype)
        A[..., 2] = 0
        A[..., 3] *= 1e-7
        op = _operator(A, kind)
    n = A.shape[-1]
    if damp:
        D = np.arange(1.0, n + 1) / n
        op = StackedOp(op, torch.from_numpy(D).expand(*batch, n))
        A = np.concatenate((A, np.broadcast_to(np.diag(D), (*batch, n, n))), -2)
    normal = Normal(op)
    norms = np.linalg.norm(A, axis=-2)
    scale = normal.scale.numpy()
    assert (np.frexp(scale)[0] == 0.5).all()  # powers of two
    assert ((norms == 0) | ((norms * scale >= 0.5) & (norms * scale < 1))).all()
    np.testing.assert_array_equal(normal.zero.numpy(), norms == 0)
    assert not bool(normal.broken.any())
    B = A * scale[..., None, :]
    N = _adjoint(B) @ B + (norms == 0)[..., None] * np.eye(n) + shift * np.eye(n)
    normal.factor(shift)
    assert normal.positive()
    q = _draw(5, *batch, n, 3, dtype=dtype)
    np.testing.assert_allclose(normal.solve(torch.from_numpy(q)).numpy(), np.linalg.solve(N, q))
    v = torch.from_numpy(q)
    image = normal.filled.mv(v)[..., : A.shape[-2], :].numpy()
    np.testing.assert_allclose(image, B @ q, atol=1e-14)
    lengths = np.linalg.norm(normal.filled.mv(v).numpy(), axis=-2)
    whole = np.concatenate((B, (norms == 0)[..., None] * np.eye(n)), -2)
    np.testing.assert_allclose(lengths, np.linalg.norm(whole @ q, axis=-2))


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize("least", [1.0, 1e-4])
def test_what_damping_says_of_the_condition_number(batch, least):
    A = _draw(0, *batch, 9, 5)
    A[..., 4] = A[..., 0]  # that only damping tells apart
    A[..., 3] *= 1e-3
    D = least * np.array([1.0, 3.0, 1e2, 1e3, 2.0])
    op = _operator(A, "dense")
    assert Normal(op).cond_bound == np.inf
    normal = Normal(StackedOp(op, torch.from_numpy(D).expand(*batch, 5)))
    B = np.concatenate((A, np.broadcast_to(np.diag(D), (*batch, 5, 5))), -2)
    true = np.linalg.cond(B * normal.scale.numpy()[..., None, :]).max()
    assert true <= normal.cond_bound <= 20 * true
    D[1] = 0.0
    assert Normal(StackedOp(op, torch.from_numpy(D).expand(*batch, 5))).cond_bound == np.inf
    A[..., 1] = 0.0  # a unit stands in the place of what neither A nor damping holds
    filled = Normal(StackedOp(_operator(A, "dense"), torch.from_numpy(D).expand(*batch, 5)))
    assert 1 <= filled.cond_bound <= 20 * true


def test_a_member_that_is_not_finite_is_taken_as_zero():
    A = _draw(0, 2, 6, 4)
    A[1, 2, 1] = np.nan
    D = torch.ones(2, 4, dtype=torch.float64)
    for op in (_operator(A, "dense"), _operator(A, "sparse")):
        for normal in (Normal(op), Normal(StackedOp(op, D))):
            assert normal.broken.tolist() == [False, True]
            assert normal.zero.tolist() == [[False] * 4, [True] * 4]
            assert not bool(normal.B.dense()[1].any())


@pytest.mark.parametrize("damped", [False, True])
@pytest.mark.parametrize("kind", ["dense", "banded"])
def test_the_bytes_that_a_factored_normal_matrix_holds(kind, damped):
    n = 80
    op, A = _banded(n, (), np.float64)
    entries = np.count_nonzero(A)
    if kind == "dense":
        op = DenseOp(torch.from_numpy(A))
    if damped:
        op = StackedOp(op, torch.ones(n, dtype=torch.float64))
    normal = Normal(op)
    normal.factor()
    own = 8 * (n * n if kind == "dense" else 2 * entries)  # values by rows and by columns
    product = n * n if kind == "dense" else normal._values.size
    factor = normal._factor.nbytes
    assert factor >= 8 * n
    assert normal.nbytes == factor + own + 8 * product
    normal.settle()
    assert normal.nbytes == factor + own


@pytest.mark.parametrize("top", [1e-3, 1e3])
def test_which_columns_are_too_short_for_the_normal_matrix(top):
    A = np.diag(np.array([1.0, 1.003e-6, 0.997e-6, 0.0]) * top)
    normal = Normal(DenseOp(torch.from_numpy(A)), None, 1e-6)
    assert normal.zero.tolist() == [False, False, True, True]
    assert normal.scale[2] == 0


def test_a_column_that_is_neither_damped_nor_filled_is_a_unit_in_the_normal_matrix():
    A, D = _draw(0, 9, 5), np.arange(5.0)
    A[:, 0] = 0
    normal = Normal(StackedOp(DenseOp(torch.from_numpy(A)), torch.from_numpy(D)))
    assert normal.zero.tolist() == [True, *[False] * 4]
    normal.factor()
    B = np.concatenate((A, np.diag(D))) * normal.scale.numpy()
    N = _adjoint(B) @ B
    N[0, 0] = 1
    q = _draw(1, 5, 2)
    np.testing.assert_allclose(normal.solve(torch.from_numpy(q)).numpy(), np.linalg.solve(N, q))


def test_a_shift_is_raised_sixteenfold_at_most_eight_times(monkeypatch):
    normal = Normal(_operator(_draw(0, 9, 5), "dense"))
    shifts = []

    def refused(shift):
        shifts.append(shift)
        if len(shifts) % 2:
            raise NotPositive("a pivot is not positive")

    monkeypatch.setattr(normal, "factor", refused)
    monkeypatch.setattr(normal, "positive", lambda: len(shifts) == 6)
    normal.factor_shifted(1.0)
    assert shifts == [16.0**k for k in range(6)]
    shifts.clear()
    monkeypatch.setattr(normal, "positive", lambda: False)
    with pytest.raises(NotPositive, match="even when shifted"):
        normal.factor_shifted(1.0)
    assert shifts == [16.0**k for k in range(8)]


@pytest.mark.parametrize(
    ("limit", "below", "dense"),
    [("DENSE_FILL", 1.003, True), ("DENSE_FILL", 0.997, False),
     ("DENSE_ORDER", 1.0, True), ("DENSE_ORDER", 0.99, False)],
)  # fmt: skip
def test_which_normal_matrices_are_written_out(limit, below, dense, monkeypatch):
    """Of one matrix: up to an order, from a density on."""
    op, A = _banded(100, (), np.float64)
    density = np.count_nonzero(A.T @ A) / 100**2
    order = limit == "DENSE_ORDER"
    monkeypatch.setattr(_normal, limit, 100 * below if order else density / below)
    monkeypatch.setattr(_normal, *(("DENSE_FILL", 0.0) if order else ("DENSE_ORDER", 100)))
    normal = Normal(op)
    assert isinstance(normal._values, torch.Tensor) == dense


@pytest.mark.parametrize(("order", "dense"), [(100, True), (99, False)])
def test_which_normal_matrices_of_a_batch_are_written_out(order, dense, monkeypatch):
    monkeypatch.setattr(_normal, "SMALL_ORDER", order)
    assert isinstance(Normal(_banded(100, (2,), np.float64)[0])._values, torch.Tensor) == dense
    assert not isinstance(Normal(_banded(100, (), np.float64)[0])._values, torch.Tensor)


def _with_a_dense_row(n=300, size=1.0):
    """A banded matrix, its last row full."""
    row, col = np.nonzero(sum(np.eye(n, k=k) for k in (0, -1)))
    row, col = np.append(row, [n] * n), np.append(col, np.arange(n))
    values = _draw(0, row.size, dtype=np.float64)
    values[row == col] += 5
    values[row == n] *= size
    return SparseOp(fl.SparsityPattern(row, col, (n + 1, n)), torch.from_numpy(values))


def test_the_bytes_that_dense_rows_take():
    op = _with_a_dense_row()
    normal = Normal(op)
    normal.factor()
    assert normal._border.nbytes == 2 * 300 * 8
    held = normal._factor.nbytes + normal._values.nbytes + 2 * op.csr_values.nbytes
    assert normal.nbytes == held + normal._border.nbytes
    q = torch.from_numpy(_draw(1, 300, 2, dtype=np.float64))
    B = normal.B.dense()
    torch.testing.assert_close(normal.solve(B.mT @ (B @ q)), q)


def test_dense_rows_that_outweigh_the_rest_take_a_shift():
    """The formula for them loses the digits that refinement needs, but for a preconditioner."""
    op = _with_a_dense_row(size=1e12)
    normal = Normal(op)
    with pytest.raises(NotPositive, match="dense rows"):
        normal.factor()
    normal.factor(1e-14)
    assert normal.positive()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_small_batch_is_factored_where_it_lies_and_formed_again_for_another_shift(dtype):
    op, A = _banded(40, (3,), dtype)
    normal = Normal(op)
    B = A * normal.scale.numpy()[..., None, :]
    N = _adjoint(B) @ B
    q = _draw(5, 3, 40, 2, dtype=dtype)
    for shift in (0.0, 0.0, 0.3, 0.3, 0.0):
        normal.factor(shift)
        x = normal.solve(torch.from_numpy(q)).numpy()
        np.testing.assert_allclose(x, np.linalg.solve(N + shift * np.eye(40), q))
        assert (normal._values is None) == (shift == 0)
    fresh = Normal(op)
    where = fresh._values.data_ptr()
    fresh.factor()
    assert fresh._factor._L.data_ptr() == where
    for other in (DenseOp(torch.from_numpy(A)), _banded(40, (), dtype)[0]):
        kept = Normal(other)
        kept.factor()
        assert kept._values is not None
