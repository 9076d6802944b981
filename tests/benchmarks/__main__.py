"""Measure, and write JSON, tables and plots: ``python -m tests.benchmarks [--quick]``."""

from __future__ import annotations

import os

# One thread for everybody, set before any library starts its own. (JAX keeps its pool: confined
# to one thread by XLA_FLAGS it was seen to hang in a batched Cholesky.)
_THREADS = os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, _THREADS)
os.environ.setdefault("MPLBACKEND", "Agg")

import argparse
import importlib.metadata
import json
import platform
import time
from pathlib import Path

import numpy
import scipy
import torch

from tests.benchmarks import batches, factors, plots, scaling, suite, tables
from tests.benchmarks.adjoints import adjoints
from tests.benchmarks.gradient_errors import gradient_errors
from tests.benchmarks.iteration import bandwidth, beyond_products, iteration
from tests.benchmarks.peers import CONTESTANTS

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "assets" / "benchmarks"
SECTIONS = (
    "main",
    "adjoints",
    "errors",
    "batch",
    "reuse",
    "memory",
    "iteration",
    "products",
    "scaling",
)
ADJOINTS = (
    "random",
    "grid",
    "grid-160k",
    "bundle",
    "one-hot",
    "terrain",
    "m3500",
    "bal-49",
    "landmark",
    "insteval",
)
ERRORS = (
    "grid",
    "grid-160k",
    "bundle",
    "terrain",
    "tomography",
    "near-dependent",
    "well1033",
    "illc1850",
    "m3500",
    "landmark",
)
QUICK = ("random", "grid", "well1033")
FULL = (
    "random",
    "random-8",
    "random-64",
    "grid",
    "grid-160k",
    "grid-rows",
    "bundle",
    "one-hot",
    "terrain",
    "tomography",
    "tomography-128",
    "near-dependent",
    "graded",
    "well1033",
    "illc1850",
    "lp_fit2p_T",
    "m3500",
    "bal-49",
    "landmark",
    "insteval",
)


def main() -> None:
    """Run the sections asked for; keep the others of an earlier run."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small selection, under 3 minutes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--problems", nargs="+", help="of the main section")
    parser.add_argument("--contestants", nargs="+", help="of the main section")
    parser.add_argument("--works", nargs="+", choices=suite.WORKS, default=suite.WORKS)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--patience", type=float, help="seconds for one run, beyond which it is left out"
    )
    parser.add_argument("--out", type=Path, default=FOLDER)
    a = parser.parse_args()
    torch.set_num_threads(int(_THREADS))
    quick, n = a.quick, a.repetitions
    path = a.out / ("quick.json" if quick else "results.json")
    results = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = _machine()

    def save() -> None:
        a.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")

    start = time.perf_counter()
    if "main" in a.only:
        names = a.problems or (QUICK if quick else FULL)
        patience = a.patience or (2.0 if quick else 120.0)
        quick_set = [c for c in CONTESTANTS if "lineax" not in c and "matfree" not in c]
        contestants = a.contestants or (quick_set if quick else list(CONTESTANTS))
        for name in names:
            new = suite.compare([name], contestants, n, patience, a.works)
            done = {(r["problem"], r["work"], r["contestant"]) for r in new}
            kept = [
                r
                for r in results.get("main", [])
                if (r["problem"], r["work"], r["contestant"]) not in done
            ]
            results["main"] = kept + new
            save()
    if "adjoints" in a.only:
        results["adjoints"] = adjoints(ADJOINTS[:2] if quick else ADJOINTS, n)
        save()
    if "errors" in a.only:
        results["errors"] = gradient_errors(ERRORS[-2:-1] if quick else ERRORS)
        save()
    if "batch" in a.only:
        results["batch"] = batches.compare_batches(100 if quick else 1000, n)
        save()
    if "reuse" in a.only:
        results["reuse"] = factors.reuse(("grid",) if quick else ("grid", "bundle"), n)
        results["warmth"] = factors.warmth("grid", n)
        save()
    if "memory" in a.only:
        some = ("funclsq", "funclsq cholesky", "SciPy lsmr scaled by hand", "torchsparsegradutils")
        results["memory"] = factors.memory(("random",) if quick else ("random", "grid"), some)
        save()
    if "iteration" in a.only:
        results["bandwidth"] = bandwidth()
        powers = (4, 5, 6) if quick else (4, 4.5, 5, 5.5, 6, 6.5, 7)
        sizes = tuple(int(10**p) for p in powers)
        results["iteration"] = iteration(sizes, n, results["bandwidth"])
        results["beyond"] = beyond_products(3 * n)
        save()
    if "products" in a.only:
        results["products"] = scaling.products(n)
        save()
    if "scaling" in a.only:
        results["scaling"] = scaling.scaling(quick, 3 if quick else n)
        save()
    tables.write(results, a.out / "quick" if quick else a.out)
    plots.draw(results, a.out / "quick" if quick else a.out)
    suite.log(f"{time.perf_counter() - start:.0f} s; written to {a.out}")


def _machine() -> dict[str, str]:
    return {
        "machine": platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": _THREADS,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        **{name: _version(name) for name in ("rslab", "numba", "jax", "scikit-sparse")},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
