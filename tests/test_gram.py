"""The normal matrix N = B^H B: by SciPy's product, by pairs of entries, and written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_cholesky import laplacian, sparse_op

import funclsq as fl
from funclsq.methods import _gram, _pairs

WAYS = {"product": 0, "pairs": 1 << 20}


def sparse(kind, seed=0, m=160, n=24, density=0.15):
    """A matrix with an empty column, empty rows, and most of N's entries not zero."""
    rng = np.random.default_rng(seed)
    A = np.where(rng.random((m, n)) < density, rng.standard_normal((m, n)), 0).astype(kind)
    if kind is complex:
        A *= np.exp(1j * rng.uniform(0, 6, (m, n)))
    A[:, 3] = 0
    A[::2] = 0
    return A


def rows_of(*lengths, n):
    """A matrix whose rows have so many entries, all one."""
    return np.array([np.arange(n) < length for length in lengths], dtype=float)


def full(gram, values):
    """N with both triangles."""
    N = np.zeros((gram.n, gram.n), dtype=values.dtype)
    N[gram.rows, gram.indices] = gram.values(values)
    return N


@pytest.mark.parametrize("kind", [float, complex])
@pytest.mark.parametrize("way", WAYS)
def test_the_values_of_one_matrix(kind, way, monkeypatch):
    monkeypatch.setattr(_gram, "_MAX_ADDED", WAYS[way])
    A = sparse(kind)
    gram = _gram.gram_of(sparse_op(A).pattern)
    values = sparse_op(A).csr_values.numpy()
    np.testing.assert_allclose(full(gram, values), A.conj().T @ A, rtol=0, atol=1e-13)
    assert len(gram._lists) == (way == "pairs")
    values[::3] = 0  # stored zeros: SciPy's product leaves out what they make
    B = A.copy()
    B[np.nonzero(A)] = values
    np.testing.assert_allclose(full(gram, values), B.conj().T @ B, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", [float, complex])
@pytest.mark.parametrize("most", [0, 1 << 20], ids=["product", "pairs"])
def test_a_batch_has_the_values_of_its_members(kind, most, monkeypatch):
    monkeypatch.setattr(_gram, "MAX_PAIRS", most)
    A = sparse(kind)
    gram = _gram.gram_of(sparse_op(A).pattern)
    values = np.stack([sparse_op(A).csr_values.numpy() * s for s in (1, -2, 0)])
    written = gram.written_out(values)
    assert written.stride(-2) == 1  # by columns
    for s, mine, N in zip((1, -2, 0), gram.values(values), written.numpy(), strict=True):
        expected = s**2 * A.conj().T @ A
        np.testing.assert_allclose(mine, expected[gram.rows, gram.indices], rtol=0, atol=1e-13)
        np.testing.assert_allclose(np.tril(N), np.tril(expected, -1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("some", [1, 7, 1000])
def test_sums_are_made_some_pairs_at_a_time(some, monkeypatch):
    monkeypatch.setattr(_pairs, "_CACHED", some)
    A = sparse(float)
    gram = _gram.gram_of(sparse_op(A).pattern)
    values = sparse_op(A).csr_values.numpy()
    np.testing.assert_allclose(full(gram, values), A.T @ A, rtol=0, atol=1e-13)
    batch = np.stack([values] * 5)
    np.testing.assert_allclose(gram.values(batch)[4], gram.values(values), rtol=0, atol=1e-13)


@pytest.mark.parametrize("way", WAYS)
def test_entries_that_cancel_are_kept(way, monkeypatch):
    monkeypatch.setattr(_gram, "_MAX_ADDED", WAYS[way])
    A = np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    gram = _gram.gram_of(sparse_op(np.abs(A)).pattern)
    values = np.array([1.0, 1.0, 1.0, -1.0])
    np.testing.assert_array_equal(full(gram, values), A.T @ A)
    for factor in (1, 1j):
        N = gram.written_out(np.stack([values, 2 * values]) * factor)
        np.testing.assert_array_equal(N, np.zeros((2, 3, 3)))  # the diagonal is left out


def test_sums_that_leave_the_cache_are_left_to_the_product(monkeypatch):
    gram = _gram.gram_of(sparse_op(sparse(float)).pattern)
    monkeypatch.setattr(_gram, "_MAX_SUMS", gram.nnz - 1)
    gram.values(np.ones(gram.pattern.nnz_unique))
    assert not gram._lists


@pytest.mark.parametrize("shape", [(0, 4), (5, 3), (4, 0)])
def test_nothing_stored(shape):
    gram = _gram.gram_of(sparse_op(np.zeros(shape)).pattern)
    n = shape[1]
    assert np.array_equal(full(gram, np.zeros(0)), np.zeros((n, n)))
    assert np.array_equal(gram.written_out(np.zeros((2, 0))), np.zeros((2, n, n)))


@pytest.mark.parametrize("kind", [float, complex])
@pytest.mark.parametrize("most", [0, 1 << 20], ids=["product", "pairs"])
def test_the_normal_matrix_written_out(kind, most, monkeypatch):
    monkeypatch.setattr(_gram, "_MAX_PLACES", most)
    A = sparse(kind)
    op = sparse_op(A)
    N = _gram.full_square(op.pattern, op.csr_values.numpy())
    assert N.stride(-2) == 1  # by columns
    assert (_gram._places(op.pattern) is None) == (most == 0)
    np.testing.assert_allclose(np.tril(N.numpy()), np.tril(A.conj().T @ A), rtol=0, atol=1e-14)


def test_many_pairs_for_each_entry_are_left_to_the_product():
    A = np.random.default_rng(0).standard_normal((60, 5))
    assert _gram._places(sparse_op(A).pattern) is None
    assert _gram._places(sparse_op(A[:3]).pattern) is not None


def test_the_structure():
    A = sparse(float, n=220, m=40)
    gram = _gram.gram_of(sparse_op(A).pattern)
    N = (A != 0).T.astype(int) @ (A != 0)
    expected = (N != 0) | np.eye(220, dtype=bool)  # the diagonal is stored where it is zero too
    assert np.array_equal(np.stack((gram.rows, gram.indices)), np.nonzero(expected))
    assert gram.indices.dtype == gram.indptr.dtype == np.int32
    assert np.array_equal(gram.rows[gram.diagonal], np.arange(220))
    counts = (A != 0).sum(1)
    assert gram.pairs == (counts * (counts + 1) // 2).sum()
    for by_sums, diagonal in ((False, True), (True, True), (True, False)):
        pairs = gram._listed(by_sums, diagonal)
        i, j = gram.rows[pairs.lower], gram.indices[pairs.lower]
        key = np.sort(i * 220 + j) if by_sums else i * 220 + j
        assert np.array_equal(key, np.flatnonzero(np.tril(N, 0 if diagonal else -1)))
        assert np.array_equal((gram.indices[pairs.upper], gram.rows[pairs.upper]), (i, j))


def test_the_product_is_sorted_by_a_kept_permutation(monkeypatch):
    monkeypatch.setattr(_gram, "_MAX_ADDED", 0)
    A = sparse(float, n=220, m=40)
    gram = _gram.gram_of(sparse_op(A).pattern)
    values = sparse_op(A).csr_values.numpy()
    with monkeypatch.context() as patch:
        patch.setattr(np, "searchsorted", None)  # not by looking for every entry
        np.testing.assert_allclose(full(gram, values), A.T @ A, rtol=0, atol=1e-13)
    values[20:] = 0  # but where entries are left out
    B = np.zeros_like(A)
    B[np.nonzero(A)] = values
    np.testing.assert_allclose(full(gram, values), B.T @ B, rtol=0, atol=1e-13)


def test_lists_up_to_their_limits(monkeypatch):
    A = sparse(float)
    values = sparse_op(A).csr_values.numpy()
    pairs = _gram.gram_of(sparse_op(A).pattern).pairs
    for limit, listed, make in (
        ("_MAX_ADDED", (False, True), lambda gram: gram.values(values)),
        ("MAX_PAIRS", (True, True), lambda gram: gram.values(values[None])),
        ("MAX_PAIRS", (True, False), lambda gram: gram.written_out(values[None])),
    ):
        for most in (pairs, pairs - 1):
            gram = _gram.gram_of(sparse_op(A).pattern)
            monkeypatch.setattr(_gram, limit, most)
            make(gram)
            assert (listed in gram._lists) == (most == pairs)


@pytest.mark.parametrize(
    ("lengths", "fits"), [((8, 8, 8, 5, 2, 1, 1), True), ((8, 8, 8, 6), False)]
)
def test_written_out_by_pairs_up_to_twice_its_entries(lengths, fits, monkeypatch):
    pattern = sparse_op(rows_of(*lengths, n=8)).pattern  # of 128 and 129 pairs
    assert (_gram._places(pattern) is not None) == fits
    pattern = sparse_op(rows_of(4, 3, n=8)).pattern  # of 16
    monkeypatch.setattr(_gram, "_MAX_PLACES", 16 if fits else 15)
    assert (_gram._places(pattern) is not None) == fits
    pattern = sparse_op(rows_of(220, n=220)).pattern
    assert _gram.gram_of(pattern).pairs == 24310
    monkeypatch.setattr(_gram, "_MAX_PLACES", 24310 if fits else 24309)
    assert (_gram._places(pattern) is not None) == fits


def test_written_out_by_pairs_as_far_as_32_bits_count():
    for n, fits in ((46340, True), (46341, False)):
        pattern = fl.SparsityPattern(torch.tensor([0]), torch.tensor([n - 1]), (1, n))
        assert (_gram._places(pattern) is not None) == fits


def test_a_batch_is_gone_through_once(monkeypatch):
    A = sparse(float)
    gram = _gram.gram_of(sparse_op(A).pattern)
    monkeypatch.setattr(_pairs, "_CACHED", 3 * gram.pairs)
    batch = np.stack([sparse_op(A).csr_values.numpy()] * 7)
    blocks = list(gram._listed(True).many(batch))
    assert [len(sums) for _, sums in blocks] == [3, 3, 1]


@pytest.mark.parametrize("kind", [float, complex])
@pytest.mark.parametrize("layers", [1, 2, 5, 64])
def test_sums_of_all_lengths_in_layers_and_beyond(layers, kind, monkeypatch):
    monkeypatch.setattr(_pairs, "_LAYERS", layers)
    A = sparse(kind, m=90, density=0.3)
    A[:, 0] = 1  # a sum as long as there are rows
    gram = _gram.gram_of(sparse_op(A).pattern)
    listed = gram._listed(True)
    lengths = np.bincount((A != 0).sum(0))
    assert len(listed._layers) == min(layers, lengths.size - 1)
    values = np.stack([sparse_op(A).csr_values.numpy() * s for s in (1, 3)])
    for s, mine in zip((1, 3), gram.values(values), strict=True):
        expected = s**2 * A.conj().T @ A
        np.testing.assert_allclose(mine, expected[gram.rows, gram.indices], rtol=0, atol=1e-12)


def test_a_long_sum_takes_few_operations():
    A = np.eye(3000, 4) + np.eye(1, 4)
    gram = _gram.gram_of(sparse_op(A).pattern)
    assert len(gram._listed(True)._layers) == _pairs._LAYERS
    batch = np.stack([sparse_op(A).csr_values.numpy()] * 2)
    np.testing.assert_array_equal(gram.values(batch)[1], gram.values(batch[0]))


def test_where_nothing_belongs_a_batch_is_written_out_as_zero(monkeypatch):
    dirty = torch.full((2, 16), torch.nan, dtype=torch.float64)
    monkeypatch.setattr(_gram.spare, "empty", lambda shape, dtype: dirty.clone())
    for most in (0, 1 << 20):
        monkeypatch.setattr(_gram, "MAX_PAIRS", most)
        A = np.eye(4) + np.eye(4, k=-1)
        gram = _gram.gram_of(sparse_op(A).pattern)
        values = np.stack([sparse_op(A).csr_values.numpy() * s for s in (3, 1)])
        written = gram.written_out(values).numpy()
        below = np.eye(4, k=-1)
        np.testing.assert_array_equal(np.tril(written), np.stack([9 * below, below]))


def test_prediction():
    for A in (laplacian(30, 1), laplacian(30, 1)[:300]):  # columns are drawn, or rows
        C = A if A.shape[0] >= A.shape[1] else A.T
        N = C.T @ C
        guess, density = _gram.predict(sparse_op(A).pattern)
        assert abs(guess - N.nnz) <= 0.2 * N.nnz
        assert density == pytest.approx(guess / N.shape[0] ** 2)


def test_prediction_is_exact_where_columns_are_few_or_the_structure_known():
    for A in (laplacian(10, 1).toarray(), sparse(float, n=24), sparse(float, n=24).T):
        pattern = sparse_op(A).pattern
        C = A if A.shape[0] >= A.shape[1] else A.T
        n = C.shape[1]
        nnz = np.count_nonzero((C != 0).T.astype(float) @ (C != 0).astype(float))
        assert _gram.predict(pattern) == (nnz, nnz / n**2)
        tall = pattern if A.shape[0] >= A.shape[1] else pattern.T
        known = _gram.gram_of(tall).nnz
        assert _gram.predict(pattern) == (known, known / n**2)


def test_a_prediction_is_of_the_smaller_normal_matrix():
    A = rows_of(30, *[1] * 5, n=30)  # A A^H is 6 x 6, A^H A full
    assert _gram.predict(sparse_op(A).pattern)[1] == 1
    assert _gram.predict(sparse_op(A.T.copy()).pattern)[1] == 1
    assert _gram.estimate(sparse_op(A).pattern)[0] == 900
    assert _gram.predict(sparse_op(A).pattern)[0] == 36
