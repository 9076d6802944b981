"""Real problems: x against stored references, and the cross-check of every derivative."""

import numpy as np
import pytest
import realdata
import torch

import funclsq as fl

NAMES = ["well1033", "illc1850", "ash219", "ash608", "abb313", "Maragal_1", "Franz6_id1959_aug"]
CHECKED = ["ash219", "abb313", "Maragal_1"]  # the others take minutes: `funclsq check` does them


def sensitivity(A, b, x, rank):
    """How far the reference moves when the data move by their rounding, at fixed rank."""
    rng = np.random.default_rng(0)
    eps = np.finfo(float).eps
    moved = A.copy()
    if rank == A.shape[1]:
        moved.data = moved.data * (1 + eps * rng.uniform(-1, 1, moved.data.size))
        c = b * (1 + eps * rng.uniform(-1, 1, b.size))
        f = fl.lstsq(fl.Sparse.from_scipy(moved), torch.from_numpy(c), solver="cholesky")
        size = np.linalg.norm(f.numpy() - x) / np.linalg.norm(x)
    else:
        s = np.linalg.svd(A.toarray(), compute_uv=False)
        size = eps * s[0] / s[rank - 1]
    return max(size, eps)


@pytest.mark.parametrize("solver", ["auto", "lsmr", "lsqr", "cholesky"])
@pytest.mark.parametrize("name", NAMES)
def test_reference_solution(name, solver):
    A, b = realdata.load(f"sparse_lsq/{name}.mtx.gz")
    ref = realdata.reference(f"sparse_lsq/{name}.mtx.gz")
    x, rank = ref["x_minnorm"], int(ref["rank"])
    sol = fl.solve(A, torch.from_numpy(b), solver=solver)
    error = np.linalg.norm(sol.x.numpy() - x) / np.linalg.norm(x)
    assert error <= 1000 * sensitivity(A, b, x, rank)
    assert bool(sol.converged)
    assert int(sol.rank) in (rank, -1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKED)
def test_cross_check(name):
    pytest.importorskip("jax")
    from funclsq.validate import cross_check

    A, b = realdata.load(f"sparse_lsq/{name}.mtx.gz")
    rank = int(realdata.reference(f"sparse_lsq/{name}.mtx.gz")["rank"])
    report = cross_check(A, b, rank="auto" if rank == A.shape[1] else rank)
    assert report, str(report)
