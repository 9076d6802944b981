"""The normal matrix N = B^H B: by SciPy's product, by pairs of entries, and written out."""

from __future__ import annotations

import numpy as np
import pytest
from test_cholesky import sparse_op

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
        np.testing.assert_allclose(np.tril(N), np.tril(expected), rtol=0, atol=1e-13)


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
        np.testing.assert_array_equal(N, np.stack([A.T @ A, 4 * A.T @ A]))


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
