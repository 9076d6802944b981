"""Every operator is the matrix that it says: products, adjoints, scalings and column norms."""

from __future__ import annotations

import pytest
import torch

import funclsq as fl
from funclsq import products
from funclsq.operators import DenseOp, ScaledOp, SparseOp, StackedOp, column_scale

M, N, K = 7, 4, 3


def _draw(*shape, dtype=torch.complex128, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def _sparse(batch):
    pattern = fl.SparsityPattern([0, 0, 1, 3, 4, 6, 6, 2], [1, 3, 0, 2, 3, 0, 1, 2], (M, N))
    return SparseOp(pattern, _draw(*batch, pattern.nnz))


def _stacked(batch):
    return StackedOp(_sparse(batch), _draw(N, dtype=torch.float64).abs())


OPERATORS = {"dense": lambda batch: DenseOp(_draw(*batch, M, N)), "sparse": _sparse}
OPERATORS["stacked"] = _stacked
ROW = _draw(M, dtype=torch.float64, seed=1).abs()
COL = _draw(N, dtype=torch.float64, seed=2).abs()


def _same(op, A):
    m, n = A.shape[-2:]
    X, Y = _draw(*A.shape[:-2], n, K, seed=3), _draw(*A.shape[:-2], m, K, seed=4)
    torch.testing.assert_close(op.mv(X), A @ X)
    torch.testing.assert_close(op.rmv(Y), A.mH @ Y)
    for apply, v in ((op.mv, X), (op.rmv, Y)):
        out = torch.full_like(apply(v), torch.nan)
        apply(v, out=out)
        torch.testing.assert_close(out, apply(v))


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_products_scalings_and_norms(kind, batch):
    op = OPERATORS[kind](batch)
    A = op.dense()
    _same(op, A)
    norms = torch.linalg.vector_norm(A, dim=-2)
    torch.testing.assert_close(op.column_norms(), norms)
    torch.testing.assert_close(column_scale(op), 1 / norms)
    _same(op.scaled(col=COL), A * COL)
    if kind != "stacked":
        _same(op.scaled(row=ROW), ROW[:, None] * A)
        _same(op.scaled(row=ROW, col=COL), ROW[:, None] * A * COL)


@pytest.mark.parametrize("row", [None, ROW], ids=["", "row"])
@pytest.mark.parametrize("col", [None, COL], ids=["", "col"])
def test_an_operator_scaled_from_outside(row, col):
    inner = DenseOp(_draw(M, N))
    A = inner.dense()
    A = A if row is None else row[:, None] * A
    A = A if col is None else A * col
    op = ScaledOp(inner, row, col)
    _same(op, A)
    assert op.column_norms() is None
    assert column_scale(op) is None
    _same(op.scaled(ROW, COL), ROW[:, None] * A * COL)
    _same(op.scaled(col=COL), A * COL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("sign", [1, -1])
def test_column_norms_of_ordinary_numbers(dtype, sign):
    op = _sparse(())
    op = SparseOp(op.pattern, (sign * (op.csr_values.abs() + 0.5)).to(dtype))
    want = torch.linalg.vector_norm(op.dense(), dim=0)
    torch.testing.assert_close(op.column_norms(), want)


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_column_norms_out_of_the_range_of_squares(kind, size):
    op = _sparse(())
    A = op.dense()  # no column of zeros, and zeros in every one
    scaled = DenseOp(A * size) if kind == "dense" else SparseOp(op.pattern, op.csr_values * size)
    want = torch.linalg.vector_norm(A, dim=0)
    torch.testing.assert_close(scaled.column_norms() / size, want, rtol=1e-14, atol=0)


def test_column_norms_of_many_entries_whose_squares_have_few_bits():
    count, ulp = 12_000, 2.0**-149  # a sum of 700 of these each is a normal number
    pattern = fl.SparsityPattern(torch.arange(count), torch.zeros(count, dtype=int), (count, 1))
    values = torch.full((count,), (700.45 * ulp) ** 0.5, dtype=torch.float64).float()
    got = SparseOp(pattern, values).column_norms().double()
    torch.testing.assert_close(got, values[:1].double() * count**0.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one", "batch"])
@pytest.mark.parametrize("shape", [(0, N), (M, 0), (0, 0)])
def test_column_norms_of_nothing(shape, batch):
    norms = torch.zeros((*batch, shape[1]), dtype=torch.float64)
    torch.testing.assert_close(DenseOp(_draw(*batch, *shape)).column_norms(), norms)
    op = SparseOp(fl.SparsityPattern([], [], shape), _draw(*batch, 0))
    torch.testing.assert_close(op.column_norms(), norms)


@pytest.mark.parametrize("k", [0, 1, 7, 8, 9, 16, 21])
def test_products_with_any_number_of_columns(k):
    op = _sparse(())
    X = _draw(N, k)
    out = torch.full((M, k), torch.nan, dtype=X.dtype)
    assert products.csr_mm(op.matrix(), X, out) is out
    for got in (out, products.csr_mm(op.matrix(), X)):
        torch.testing.assert_close(got, op.dense() @ X)


def test_a_zero_column_is_not_scaled():
    A = _draw(M, N)
    A[:, 1] = 0
    scale = column_scale(DenseOp(A))
    assert float(scale[1]) == 1
    torch.testing.assert_close(scale[[0, 2, 3]], 1 / torch.linalg.vector_norm(A, dim=0)[[0, 2, 3]])
    assert bool(torch.isfinite(column_scale(DenseOp(A * 1e-320))).all())


def test_a_stack_over_norms_that_are_not_known():
    op = StackedOp(ScaledOp(DenseOp(_draw(M, N)), None, COL), COL)
    assert op.column_norms() is None
    with pytest.raises(ValueError, match="only columns"):
        op.scaled(row=torch.ones(M + N))


@pytest.mark.parametrize("kind", ["vector", "block", "batch"])
def test_a_sparse_matrix_times_what_python_writes(kind):
    op = _sparse((2,) if kind == "batch" else ())
    dense = op.dense()
    shape = {"vector": (N,), "block": (N, K), "batch": (N, K)}[kind]
    v = _draw(*shape, seed=5)
    if kind == "batch":
        A = fl.Sparse(op.pattern, torch.stack([_entries(op.pattern, d) for d in dense]))
    else:
        A = fl.Sparse(op.pattern, _entries(op.pattern, dense))
    torch.testing.assert_close(A @ v, dense @ v)


@pytest.mark.parametrize(("lead", "of_v"), [((2, 3), ()), ((2, 1), (3,)), ((3,), (2, 1))])
def test_batches_of_matrices_and_of_blocks_broadcast(lead, of_v):
    pattern = _sparse(()).pattern
    values, v = _draw(*lead, pattern.nnz), _draw(*of_v, N, K, seed=5)
    dense = torch.zeros((*lead, M, N), dtype=values.dtype)
    for entry, (i, j) in enumerate(zip(pattern.row, pattern.col)):
        dense[..., i, j] += values[..., entry]
    torch.testing.assert_close(fl.Sparse(pattern, values) @ v, dense @ v)


def _entries(pattern, dense):
    return dense[torch.tensor(pattern.row), torch.tensor(pattern.col)]
