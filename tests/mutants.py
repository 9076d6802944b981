"""Mutants of the algebra: one small mistake each, and whether the tests of its area notice.

    python -m tests.mutants                          every mutant of every area (hours)
    python -m tests.mutants solvers --sample 50      50 of one area, drawn by --seed

Each mutant runs in a forked process, in which importing its module gives the changed source, and
the tests of the area (under a minute of them) run until one fails. A mutant that no test notices
survives: it is killed by a new test, or listed in EQUIVALENT with the reason why nothing can see
it. Ends with status 1 if an unexplained one survived.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from mutation_operators import Mutant, mutants

PACKAGE = HERE.parent / "funclsq"
MEMORY = 12 << 30


@dataclasses.dataclass(frozen=True)
class Area:
    """Files (with the functions that matter, if not all), and the tests that judge them."""

    files: dict[str, tuple[str, ...]]
    tests: tuple[str, ...]


AREAS = {
    "derivatives": Area(
        {
            "derivatives": (
                "_pull",
                "_push",
                "_adjoint",
                "_total",
                "_damping_cotangent",
                "_damping_tangent",
                "_gated",
                "_null",
                "_null_of_g",
                "_rows",
            ),
            "matrix": ("backward", "jvp", "_sampled", "outer"),
        },
        ("test_mutants.py", "test_lost_digits.py::test_second_derivatives"),
    ),
    "krylov": Area(
        {
            "methods.lsmr": (),
            "methods.lsqr": (),
            "methods._golub_kahan": (),
            "methods._extended_cg": (),
        },
        (
            "test_recurrences.py",
            "test_krylov.py",
            "test_stopping.py::test_status_is_reached",  # the others start processes of their own,
            "test_stopping.py::test_status_is_by_member_inside_vmap",  # or take long
            "test_stopping.py::test_members_that_have_converged_stay_bit_for_bit",
        ),
    ),
    "direct": Area(
        {
            "methods.qr": (),
            "methods.svd": (),
            "methods._core": (),
            "methods._normal": (),
            "methods._refine": (),
            "methods._nullspace": (),
        },
        (
            "test_direct_methods.py",  # the quick ones first, since most mutants fall to them
            "test_extremes.py",
            "test_accuracy.py",
            "test_cholesky.py",
            "test_rank.py",
        ),
    ),
    "structure": Area(
        {"pattern": (), "products": (), "entries": (), "operators": (), "sparse": ()},
        ("test_operators.py", "test_structure.py"),
    ),
    "bridge": Area(
        {
            "jax.primitive": (),
            "jax.vmap_rules": (),
            "jax.nullspace": (),
            "jax.products": (),
            "jax.convert": (),
        },
        (
            "test_jax_rules.py",
            "test_jax_convert.py",
            "test_jax_transforms.py",
            "test_jax_sparse.py",
        ),
    ),
}

# Mistakes that cannot be seen, and why: a part of the description without line, the reason.
EQUIVALENT: dict[str, str] = {
    ": 5 + len(params)": "a count of None, not algebra",
    ": (None,) * ": "a count of None, not algebra",
    ": s_dot + matmul(structure, params, null_term)": "A (I - P) is zero",
    "other factor dropped: deficient.to(": "where the gate is 0, (I - P) v is 0 anyway",
    "other factor dropped: gate[..., None, None] * t": "no gated solve with a c has its s read",
    ": v - rmatmul(plan.structure, params, _rows(w, az))": "the second projection does it all",
    "derivatives._null weights dropped: _rows(w, az)": "the second projection does it all",
    ": out - d2.unsqueeze(-1) * z": "the second projection does it all",
    ": out - solve(plan, w, d2, image": "the first projection does it to eps cond^2",
    ": torch.where(moderate": "either choice is the same but for rounding",
    ": info[..., _SLOT_COND] < ": "either choice is the same but for rounding",
    "csr_mm comparison flipped: k <= width": "in one block or in many it is the same product",
    "csr_rows twin: self.indices": "only its dtype is taken",
    ": 1 / safe": "more norms are found in the careful way, which is as right",
    "scaled: self._nulls * self.normal.scale": "what is made orthonormal next may have any length",
    "scaled: top * cnorm + gnorm + ": "a bound of twenty roundings, wider by one per cent",
    "operands swapped: s.div(rho, self.hnorm)": "largest over smallest: inverses have the same",
    "operands swapped: s.div(rho, self.wnorm)": "largest over smallest: inverses have the same",
    "term dropped: 1.2 * count + 3 * ": "the size of a first block, which grows until it is enough",
    ": torch.finfo(info.dtype).eps ** ": "either choice is the same but for rounding",
}


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports modules of funclsq from texts."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = {f"funclsq.{name}": text for name, text in sources.items()}

    def find_spec(self, name, path=None, target=None):
        if name in self.sources:
            return importlib.util.spec_from_loader(name, self, origin=self.get_filename(name))
        return None

    def get_filename(self, name):
        return str(_path(name.removeprefix("funclsq.")))

    def get_data(self, path):
        return next(t.encode() for n, t in self.sources.items() if self.get_filename(n) == path)

    def get_source(self, name):
        return self.sources[name]


def _path(name: str) -> Path:
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def drawn(area: Area) -> Iterator[tuple[str, Mutant]]:
    """Every (module, mutant) of an area."""
    for name, functions in area.files.items():
        for mutant in mutants(_path(name).read_text(encoding="utf-8"), name, functions):
            yield name, mutant


def judged(area: Area, sources: dict[str, str], limit: float) -> int:
    """0 if the tests of an area pass with these sources, in a process of their own."""
    child = os.fork()
    if child == 0:
        _judge(area, sources, limit)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _judge(area: Area, sources: dict[str, str], limit: float) -> None:
    import pytest

    try:
        signal.alarm(max(1, int(limit)))  # kills the process: a mutant that hangs is noticed
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.meta_path.insert(0, _Changed(sources))
        where = [str(HERE / test) for test in area.tests]
        plain = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
        code = int(pytest.main([*where, *plain, "--rootdir", str(HERE.parent)]))
    except BaseException:
        code = 1
    os._exit(code)


def run(name: str, sample: int | None, seed: int) -> list[str]:
    """Run an area, print its score, and return what survived without a reason."""
    area = AREAS[name]
    chosen = list(drawn(area))
    whole = len(chosen)
    if sample is not None and sample < whole:
        chosen = random.Random(seed).sample(chosen, sample)
    start = time.monotonic()
    # read and written as the mutants are, so that nothing but the mistake is noticed in them
    same = {m: ast.unparse(ast.parse(_path(m).read_text(encoding="utf-8"))) for m in area.files}
    if judged(area, same, 600):
        raise SystemExit(f"{name}: the tests fail on the source as it is")
    limit = 30 + 4 * (time.monotonic() - start)
    killed, late, known, unexplained = 0, 0, 0, []
    for module, mutant in chosen:
        code = judged(area, {module: mutant.source()}, limit)
        if code:
            killed += 1
            late += code == -signal.SIGALRM
        elif any(part in re.sub(r":\d+ ", " ", mutant.place) for part in EQUIVALENT):
            known += 1
        else:
            unexplained.append(mutant.place)
            print(f"  survived: {mutant.place}", flush=True)
    print(
        f"{name}: {killed} of {len(chosen) - known} killed ({late} by their time; {known} cannot "
        f"be seen; {whole} in all), {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return unexplained


def main(arguments: list[str] | None = None) -> int:
    """Run areas of mutants; 1 if one survived without a reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"of {', '.join(AREAS)}")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    unknown = set(options.areas) - set(AREAS)
    if unknown:
        parser.error(f"no such area: {', '.join(sorted(unknown))}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # What a forked process need not import again; not funclsq, of which it imports a mutant.
    import mpmath  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    assert "funclsq" not in sys.modules
    names = options.areas or list(AREAS)
    return 1 if sum(len(run(name, options.sample, options.seed)) for name in names) else 0


if __name__ == "__main__":
    sys.exit(main())
