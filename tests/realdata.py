"""Real data sets, which lie beside the project and are not part of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_FOLDER = Path(
    os.environ.get("FUNCLSQ_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


def data_path(rel: str) -> Path:
    """Path of a data file, as ``"nist/Norris.dat"``; skips the test where it is absent."""
    path = _FOLDER / rel
    if not path.exists():
        pytest.skip(f"no data at {path}; set FUNCLSQ_DATA to the folder of the data sets")
    return path
