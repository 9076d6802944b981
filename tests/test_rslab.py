"""The rslab backend: what it is told beside the matrix."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

pytest.importorskip("rslab")

from funclsq.backends import rslab as backend


def _normal(side):
    D = sp.diags_array([-np.ones(side), np.ones(side)], offsets=[0, 1], shape=(side - 1, side))
    eye = sp.eye_array(side)
    A = sp.vstack([sp.kron(D, eye), sp.kron(eye, D), 0.1 * sp.eye_array(side * side)])
    N = sp.csr_array(A.T @ A)
    N.sort_indices()
    return N


class _Recorder:
    """An analysis that writes down how it is asked for a factor."""

    def __init__(self, symbolic):
        self._symbolic, self.asked = symbolic, {}
        self.front_dims = symbolic.front_dims

    def factor(self, data, **settings):
        self.asked = settings
        return self._symbolic.factor(data, **settings)


@pytest.mark.parametrize(
    ("threads", "side", "one_piece"),
    [(1, 20, True), (1, 120, True), (2, 20, True), (2, 120, False)],
)
def test_a_solve_by_one_thread_takes_the_tree_in_one_piece(monkeypatch, threads, side, one_piece):
    N = _normal(side)
    symbolic = backend.analyze(N.indptr, N.indices)
    symbolic._symbolic = recorder = _Recorder(symbolic._symbolic)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    factor = symbolic.factor(N.data)
    assert recorder.asked["threads"] == threads
    assert recorder.asked.get("solve_leaf_subtrees") == (1 if one_piece else None)
    rhs = np.random.default_rng(0).standard_normal((N.shape[0], 4))
    for block in (rhs[:, :1], rhs):
        np.testing.assert_allclose(N @ factor.solve(block), block, rtol=0, atol=1e-10)


def test_settings_that_a_version_lacks_are_left_out(monkeypatch):
    N = _normal(20)
    assert set(backend._known(backend._SETTINGS)) == set(backend._SETTINGS)
    monkeypatch.setattr(backend, "_every_setting", lambda: frozenset({"scaling"}))
    symbolic = backend.analyze(N.indptr, N.indices)
    symbolic._symbolic = recorder = _Recorder(symbolic._symbolic)
    factor = symbolic.factor(N.data)
    assert set(recorder.asked) == {"threads", "scaling"}
    rhs = np.ones((N.shape[0], 1))
    np.testing.assert_allclose(N @ factor.solve(rhs), rhs, rtol=0, atol=1e-10)


def test_a_diagonal_far_from_one_is_factored_all_the_same():
    """Columns are brought to length one before, but for those that only dense rows reach."""
    N = _normal(20)
    scale = sp.diags_array(10.0 ** -np.linspace(0, 12, N.shape[0]))
    scaled = sp.csr_array(scale @ N @ scale)
    scaled.sort_indices()
    factor = backend.analyze(scaled.indptr, scaled.indices).factor(scaled.data)
    assert factor.positive()
    x = factor.solve(scale @ np.ones((N.shape[0], 1)))
    reference = np.linalg.solve(N.toarray(), np.ones(N.shape[0]))
    np.testing.assert_allclose((scale @ x)[:, 0], reference, rtol=1e-10)
    indefinite = N.copy()
    indefinite[200, 200] = -1.0
    assert not backend.analyze(N.indptr, N.indices).factor(indefinite.data).positive()
