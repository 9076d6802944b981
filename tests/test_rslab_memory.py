"""Memory of rslab's allocator: handed back without being taken away, and the user's to decide."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("rslab")

SCRIPT = """
import os, resource
import numpy as np, scipy.sparse as sp
from funclsq.backends import rslab

n = 150
line = sp.diags_array([-np.ones(n - 1), 2.1 * np.ones(n), -np.ones(n - 1)], offsets=[-1, 0, 1])
one = sp.eye_array(n)
A = sp.csc_array(sp.kron(line, one) + sp.kron(one, line))
symbolic = rslab.analyze(A.indptr.astype(np.int64), A.indices.astype(np.int64))
kept, faults = [], []
for i in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [symbolic.factor((1 + i / 100) * A.data), *kept][:4]
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[10:]), sorted(name for name in os.environ if "MIMALLOC" in name.upper()))
"""


def faults(**environment: str) -> tuple[int, str]:
    """Pages that 20 factors of new values had to be given, and mimalloc's settings left behind."""
    own = {k: v for k, v in os.environ.items() if not k.upper().startswith("MIMALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=own | environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count, names = done.stdout.split(" ", 1)
    return int(count), names.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_pages_of_a_factor_serve_the_next_one_and_the_environment_is_left_as_it_was():
    ours, names = faults()
    assert names == "[]"
    taken_away, names = faults(mimalloc_purge_decommits="1")
    assert names == "['mimalloc_purge_decommits']"
    assert ours < 0.5 * taken_away, (ours, taken_away)
