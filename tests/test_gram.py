"""The normal matrix N = B^H B: by SciPy's product, by pairs of entries, and written out."""

from __future__ import annotations

import numpy as np
import pytest
from test_cholesky import sparse_op

from funclsq.methods import _gram

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


@pytest.mark.parametrize("kind", [float, complex])
@pytest.mark.parametrize("way", WAYS)
def test_the_values_of_one_matrix(kind, way, monkeypatch):
    monkeypatch.setattr(_gram, "_MAX_ADDED", WAYS[way])
    A = sparse(kind)
    gram = _gram.gram_of(sparse_op(A).pattern)
    values = sparse_op(A).csr_values.numpy()
    np.testing.assert_allclose(gram.dense(values), A.conj().T @ A, rtol=0, atol=1e-13)
    assert len(gram._lists) == (way == "pairs")
    values[::3] = 0  # stored zeros: SciPy's product leaves out what they make
    B = A.copy()
    B[np.nonzero(A)] = values
    np.testing.assert_allclose(gram.dense(values), B.conj().T @ B, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", [float, complex])
def test_a_batch_has_the_values_of_its_members(kind):
    A = sparse(kind)
    gram = _gram.gram_of(sparse_op(A).pattern)
    values = np.stack([sparse_op(A).csr_values.numpy() * s for s in (1, -2, 0)])
    found = gram.values(values)
    for member, mine in zip(values, found, strict=True):
        np.testing.assert_allclose(mine, gram.values(member), rtol=0, atol=1e-13)


def test_sums_that_leave_the_cache_are_left_to_the_product(monkeypatch):
    gram = _gram.gram_of(sparse_op(sparse(float)).pattern)
    monkeypatch.setattr(_gram, "_MAX_SUMS", gram.nnz - 1)
    gram.values(np.ones(gram.pattern.nnz_unique))
    assert not gram._lists


@pytest.mark.parametrize("shape", [(0, 4), (5, 3), (4, 0)])
def test_nothing_stored(shape):
    gram = _gram.gram_of(sparse_op(np.zeros(shape)).pattern)
    n = shape[1]
    assert np.array_equal(gram.dense(np.zeros(0)), np.zeros((n, n)))
    assert np.array_equal(gram.dense(np.zeros((2, 0))), np.zeros((2, n, n)))


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
