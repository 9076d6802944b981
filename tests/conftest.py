"""What every test shares: one thread, fixed seeds, no window, and where the real data lies."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch and matplotlib are imported: small problems are fastest on one thread, two test
# workers must not share cores, and no test opens a window.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from devices import DEVICE

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("FUNCLSQ_DATA", ROOT.parent / "shared" / "data"))

torch.set_num_threads(1)

if os.environ.get("FUNCLSQ_LOOPS") == "always":  # whatever can be done by compiled loops is
    from funclsq import fused, passes

    fused.LEAST = passes.LEAST = 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE is not None:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Make random numbers the same in any order of tests."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002


def _wide_jax():
    """64-bit JAX, and JAX left as it was."""
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield jax
    jax.config.update("jax_enable_x64", before)


x64 = pytest.fixture(_wide_jax)
x64_module = pytest.fixture(scope="module")(_wide_jax)


@pytest.fixture(scope="session")
def data() -> Path:
    """Folder of real data sets: ../shared/data, or what FUNCLSQ_DATA says; skips where absent."""
    if not DATA.is_dir():
        pytest.skip(f"no data sets at {DATA}; set FUNCLSQ_DATA to their folder")
    return DATA
