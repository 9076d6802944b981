"""Mutants outside the algebra: a fixed sample of those that cosmic-ray makes, judged by it.

    pip install cosmic-ray==8.7.0
    python -m tests.mutants_sample                  every module of JUDGES (half an hour)
    python -m tests.mutants_sample shapes settings  of these

cosmic-ray writes one mutant after the other into a copy of the source tree, and runs the tests
that are named beside the module. Ends with status 1 if one survived that EXPLAINED does not name.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult

ROOT = Path(__file__).resolve().parents[1]
EACH, SEED = 6, 0

# Modules of funclsq, and the tests that judge them, in less than twenty seconds.
JUDGES = {
    "batching": "tests/test_transforms.py",
    "checks": "tests/test_errors.py",
    "extent": "tests/test_range.py",
    "info": "tests/test_info.py tests/test_status.py",
    "kept": "tests/test_kept.py",
    "lost_digits": "tests/test_lost_digits.py",
    "norms": "tests/test_norms.py",
    "precision": "tests/test_compute_dtype.py",
    "range": "tests/test_range.py",
    "settings": "tests/test_errors.py",
    "shapes": "tests/test_structure.py",
    "spare": "tests/test_spare.py",
}

# ``|`` stands in annotations, which are not evaluated.
LEFT_OUT = "core/ReplaceBinaryOperator_BitOr_"

# Mistakes that no test can see: the module and the changed line, and why.
EXPLAINED = {
    (
        "range",
        "lift = ~2 * round(torch.finfo(top.dtype).eps ** -0.5).bit_length()",
    ): "any power that lifts subnormal numbers into the range of normal ones will do",
    ("extent", "if t.numel() <= 0:"): "no tensor has fewer entries than none",
    ("checks", "if a.dtype is not b.dtype:"): "there is one object of each dtype",
    (
        "info",
        'if x.device.type >= "cpu" and finite(x) and (not norms or finite(info[..., 2])):',
    ): "differs on a device only, where it is a look at the data too many",
    ("info", 'if not v.device.type != "cpu":'): "either way gives the same norms",
    (
        "norms",
        "by_norm = v.numel() < _SHORT if k == 1 else k != _MANY",
    ): "either way gives the same sizes, in more time",
    (
        "norms",
        "by_norm = v.numel() < _SHORT if k == 1 else k is _MANY",
    ): "either way gives the same sizes, in more time",
    (
        "norms",
        "_MANY = 7  # real columns from which on memory order pays",
    ): "either way gives the same norms and sizes, in more time",
}

CONFIG = """
[cosmic-ray]
module-path = "funclsq/{module}.py"
timeout = {timeout}
excluded-modules = []
test-command = "{python} -m pytest -x -q -m 'not slow' -p no:cacheprovider -p no:xdist {tests}"
[cosmic-ray.distributor]
name = "local"
"""


def run(module: str, tree: Path, work: Path) -> int:
    """Judge the sample of a module, print its score, and return how many are unexplained."""
    config, session = work / f"{module}.toml", work / f"{module}.sqlite"

    def configure(timeout: float) -> None:
        text = CONFIG.format(
            module=module, timeout=timeout, python=sys.executable, tests=JUDGES[module]
        )
        config.write_text(text, encoding="utf-8")

    def cosmic_ray(*arguments: object) -> None:
        data = os.environ.get("FUNCLSQ_DATA", str(ROOT.parent / "shared" / "data"))
        own = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "FUNCLSQ_DATA": data}
        command = [sys.executable, "-m", "cosmic_ray.cli", *map(str, arguments)]
        subprocess.run(command, cwd=tree, env={**os.environ, **own}, check=True)

    configure(600)
    start = time.monotonic()
    cosmic_ray("baseline", config)  # fails if the tests do on the source as it is
    configure(30 + 5 * (time.monotonic() - start))
    cosmic_ray("init", config, session)
    with use_db(session) as db:
        whole = {item.job_id: item.mutations[0] for item in db.work_items}
        whole = {k: v for k, v in whole.items() if not v.operator_name.startswith(LEFT_OUT)}
        names = sorted(whole, key=lambda k: (whole[k].operator_name, whole[k].occurrence))
        drawn = set(random.Random(SEED).sample(names, min(EACH, len(names))))
        others = [item.job_id for item in db.work_items if item.job_id not in drawn]
        db.set_multiple_results(others, WorkResult(WorkerOutcome.SKIPPED))
    cosmic_ray("exec", config, session)
    killed = late = known = unexplained = 0
    with use_db(session) as db:
        for item, result in db.completed_work_items:
            if item.job_id not in drawn:
                continue
            if result.worker_outcome != WorkerOutcome.NORMAL:
                raise SystemExit(f"{module}: cosmic-ray failed:\n{result.output}")
            if result.test_outcome != TestOutcome.SURVIVED:
                killed += 1
                late += result.output == "timeout"
                continue
            lines = [t for t in (result.diff or "").splitlines() if t[:1] in "+-"]
            lines = [t for t in lines if not t.startswith(("+++", "---"))]
            if any((module, t[1:].strip()) in EXPLAINED for t in lines if t[0] == "+"):
                known += 1
                continue
            unexplained += 1
            print(f"  survived: {module}, {item.mutations[0].operator_name}", *lines, sep="\n    ")
    print(
        f"{module}: {killed} of {len(drawn) - known} killed ({late} by their time; {known} cannot "
        f"be seen; {len(whole)} in all), {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return unexplained


def main(arguments: list[str] | None = None) -> int:
    """Run the samples of modules; 1 if a mutant survived without a reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(JUDGES)}")
    modules = parser.parse_args(arguments).modules or list(JUDGES)
    unknown = set(modules) - set(JUDGES)
    if unknown:
        parser.error(f"no such module: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as where:
        tree = Path(where) / "tree"
        tree.mkdir()
        for name in ("funclsq", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        return 1 if sum(run(module, tree, Path(where)) for module in modules) else 0


if __name__ == "__main__":
    sys.exit(main())
