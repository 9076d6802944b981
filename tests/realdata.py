"""Real matrices from the data folder beside the repository; a test that lacks them is skipped."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse

FOLDER = Path(
    os.environ.get("FUNCLSQ_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


def data_path(rel: str) -> Path:
    """Return the path of a data file; skip the test where it is absent."""
    path = FOLDER / rel
    if not path.exists():
        pytest.skip(f"no data file {rel}; set FUNCLSQ_DATA to the data folder")
    return path


def load(rel: str) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """Return A and b of a problem: an ``.npz`` of CSC arrays with b, or NAME.mtx.gz with NAME_b."""
    path = data_path(rel)
    if rel.endswith(".npz"):
        with np.load(path) as d:
            parts = (d["data"], d["indices"], d["indptr"])
            return scipy.sparse.csc_array(parts, shape=tuple(d["shape"])).tocsr(), d["b"]
    A = _matrix_market(path)
    b = _matrix_market(data_path(rel.replace(".mtx.gz", "_b.mtx.gz")))
    return scipy.sparse.csr_array(A, dtype=np.float64), np.asarray(b, dtype=np.float64).ravel()


def reference(rel: str) -> dict[str, np.ndarray]:
    """Return the stored reference of a problem: x_minnorm, svals, rank."""
    with np.load(data_path(rel.replace(".mtx.gz", ".npz").replace(".npz", "_ref.npz"))) as d:
        return dict(d)


def _matrix_market(path: Path):
    with gzip.open(path) as f:
        return scipy.io.mmread(f)
