"""Mutants of the algebra: one small mistake each, and whether the tests of its area notice.

    python -m tests.mutants                          every mutant of every area (an hour)
    python -m tests.mutants krylov --sample 50       50 of one area, drawn by --seed
    python -m tests.mutants krylov --only stretch    those whose description matches

The tests of an area take a minute at most. A mutant is judged by those of them that execute its
line, in a forked process, until one fails or is late. One that none of them notices survives: it
is killed by a new test, or listed in EQUIVALENT with the reason why nothing can see it. Ends with
status 1 if an unexplained one survived.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import mpmath  # noqa: F401  what a forked process need not import again
import pytest
import torch._dynamo  # noqa: F401
from mutant_trials import Trials
from mutation_operators import Mutant, mutants

ROOT = HERE.parent


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
            "methods._craig": (),
            "methods._extended_cg": (),
            "methods._watch": (),
            "methods._iterate": (),
        },
        (
            "test_iterate.py",
            "test_watch.py",
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
            "methods._needless": (),
            "methods._nullspace": (),
        },
        (
            "test_core.py",
            "test_refinement.py",
            "test_needless.py",
            "test_small_directions.py",
            "test_direct_methods.py",
            "test_normal.py",
            "test_extremes.py",
            "test_accuracy.py",
            "test_cholesky.py",
            "test_rank.py::test_rank_deficient_real_problems",  # and not the large ones
            "test_rank.py::test_one_hot_anova",
            "test_rank.py::test_a_false_claim_of_full_rank_is_told",
            "test_rank.py::test_a_true_claim_of_full_rank_is_not",
            "test_rank.py::test_rcond_decides_the_rank",
            "test_rank.py::test_the_three_term_derivative_of_a_deficient_problem",
            "test_rank.py::test_cholesky_leaves_a_large_null_space_to_another_solver",
            "test_single_factor.py::test_condition_and_rank_are_those_of_double_precision",
            "test_single_factor.py::test_where_it_would_contract_slowly_it_is_not_used",
        ),
    ),
    "gram": Area(
        {"methods._gram": (), "methods._pairs": (), "methods._device_gram": ()},
        ("test_gram.py", "test_single_factor.py", "test_dense_rows.py", "test_cudss.py"),
    ),
    "structure": Area(
        {
            "pattern": (),
            "products": (),
            "compiled": (),
            "fused": (),
            "passes": (),
            "entries": (),
            "operators": (),
            "sparse": (),
            "methods._columns": (),
        },
        (
            "test_operators.py",
            "test_structure.py",
            "test_spare.py",
            "test_fused.py",
            "test_passes.py",
            "test_columns.py",
        ),
    ),
    "bridge": Area(
        {
            "jax.primitive": (),
            "jax.vmap_rules": (),
            "jax.nullspace": (),
            "jax.products": (),
            "jax.convert": (),
        },
        (  # all but those that compile long and see no more
            "test_jax_rules.py::test_products_and_their_derivatives",
            "test_jax_rules.py::test_one_matrix_or_one_block_for_a_whole_batch",
            "test_jax_rules.py::test_batches_of_products",
            "test_jax_rules.py::test_batches_of_several_products[(0, 0, 0, 0, 0)]",
            "test_jax_rules.py::test_first_and_second_derivatives_of_a_solve[damped]",
            "test_jax_rules.py::test_first_and_second_derivatives_of_a_solve[partly damped]",
            "test_jax_rules.py::test_second_derivatives_with_a_row_of_weight_zero",
            "test_jax_rules.py::test_what_a_solve_cannot_see",
            "test_jax_rules.py::test_a_small_damping_of_a_wide_problem_loses_no_digits_of_the_derivative",
            "test_jax_rules.py::test_the_second_derivative_by_a_damping_of_zero_of_a_wide_problem",
            "test_jax_rules.py::test_the_transposed_residual_of_a_little_damped_wide_problem_does_not_cancel",
            "test_jax_rules.py::test_the_transpose_of_a_gated_solve_is_gated",
            "test_jax_rules.py::test_batches_of_solves",
            "test_jax_rules.py::test_batches_of_batches_of_solves",
            "test_jax_convert.py",
            "test_jax_transforms.py::test_every_nesting_of_vmap",
            "test_jax_sparse.py::test_sparse_formats[traced]",
            "test_jax_sparse.py::test_sparse_products_in_every_direction",
            "test_jax_sparse.py::test_vmap_over_bcoo_with_other_indices_for_each_member",
        ),
    ),
}

# Mistakes that cannot be seen, and why: a part of the description without line, "$" where it ends.
EQUIVALENT: dict[str, str] = {
    "_sddmm_abstract off by one: blocks[0]": "all blocks have one dtype and leading dimension",
    "_sddmm_lower off by one: blocks[0]": "all blocks have one dtype and leading dimension",
    "branches swapped: t.cpu() if t.device.type not in": "on the CPU it is a copy that is none",
    "_register branches swapped": "runs on import, before it is applied; in the source it fails",
    "_together off by one: args[0]": "all that are batched twice have the same inner dimension",
    "passes._added sign flipped: len(ranges) - 1": "columns too many, of zeros",
    "passes._added term dropped: len(ranges) - 1": "a column too many, of zeros",
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
    "scaled: floor ** 2 * high": "either way finds the same condition",
    "power dropped: floor ** 2": "either way finds the same condition",
    "qr.prepare factor dropped: cond * rcond": "the singular values, counted then, say the same",
    "scaled: cond * rcond": "the singular values, counted then, say the same",
    "scaled: plain * rcond": "either way finds the same condition",
    "svd.thin_svd branches swapped: A if whole": "the patient way does what the other fails on",
    "off by one: range(steps)": "an estimate, and better by one step",
    "nullspace._in_steps off by one: range(2)": "a third projection takes nothing more away",
    "nnz_unique twin: self.indices": "A and its transpose store as many entries",
    "comparison flipped: U.shape[-1] <= ": "both ways give the same but for rounding",
    "few_terms branches swapped: FEW_SINGLE if ": "both ways give the same but for rounding",
    "sign flipped: WIDTH - t.shape[1]": "columns of zeros, of which more do no harm",
    "term dropped: WIDTH - t.shape[1]": "columns of zeros, of which more do no harm",
    "compiled._pool sign flipped: threads - 1": "threads more or less take more or less time",
    "compiled._pool term dropped: threads - 1": "threads more or less take more or less time",
    "compiled._pool scaled: threads - 1": "threads more or less take more or less time",
    "csr_rows twin: self.indices": "only its dtype is taken",
    "scaled: look.rnorm + look.arnorm": "only whether it is finite is asked",
    "_iterate_one scaled: rnorm + arnorm": "only whether it is finite is asked",
    "scaled: block.since + np.maximum(_PATIENCE": "a count of which one per cent is nothing",
    "scaled: since + max(_PATIENCE": "a count of which one per cent is nothing",
    ": 1 / safe": "more norms are found in the careful way, which is as right",
    "_purify scaled: self._nulls * scale": "what is made orthonormal next may have any length",
    "_purify divisor dropped: again / ": "what is refined may have any length",
    "_purify operands swapped: torch.where(size > 0": "what is not a null vector is left out last",
    "_purify comparison flipped: size > 0": "what is not a null vector is left out last",
    "_purify scaled: again * size": "what is made orthonormal next may have any length",
    "_purify factor dropped: again * size$": "what is made orthonormal next may have any length",
    "_core.project off by one: range(2)": "a third projection takes nothing more away",
    "small_directions scaled: normal.shift * (signs": "a count of which one per cent is nothing",
    "small_directions scaled: signs.conj() * V": "a count of which one per cent is nothing",
    "conjugation dropped: signs.conj()": "the signs are real",
    "small_directions scaled: 1.2 * count": "the size of a first block, by one per cent",
    "small_directions other factor dropped: 1.2 * count": "the first block is large enough without",
    "small_directions scaled: 3 * count": "the size of a first block, by one per cent",
    "small_directions scaled: 0.1 * sigma": "at which change an iteration ends",
    "small_directions scaled: before - sigma": "at which change an iteration ends",
    "small_directions sign flipped: 3 + grown": "any random numbers will do",
    "term dropped: 3 + grown": "any random numbers will do",
    "operands swapped: s.div(rho, self.hnorm)": "largest over smallest: inverses have the same",
    "operands swapped: s.div(rho, self.wnorm)": "largest over smallest: inverses have the same",
    "operands swapped: s.div(qnorm, self.pnorm)": "largest over smallest: inverses have the same",
    "_gram.__init__ scaled: N.nnz + 1": "more numbers than are read",
    "_gram.__init__ scaled: N + scipy.sparse.diags_array": "only its sign is read",
    "_gram.estimate scaled: _adjoint(pattern": "only its structure is read",
    "small_directions term dropped: 1.2 * count + 3 * ": "the first block is large enough without",
    ": torch.finfo(info.dtype).eps ** ": "either choice is the same but for rounding",
}


def _path(name: str) -> Path:
    return (ROOT / "funclsq").joinpath(*name.split(".")).with_suffix(".py")


def _plain(place: str) -> str:
    """The description without line, its end marked."""
    return re.sub(r":\d+ ", " ", place) + "$"


def drawn(area: Area) -> Iterator[tuple[str, Mutant]]:
    """Every (module, mutant) of an area."""
    for name, functions in area.files.items():
        for mutant in mutants(_path(name).read_text(encoding="utf-8"), name, functions):
            yield name, mutant


def run(
    name: str, sample: int | None, seed: int, only: str | None = None, verbose: bool = False
) -> list[str]:
    """Run an area, print its score, and return what survived without a reason."""
    area = AREAS[name]
    chosen = list(drawn(area))
    whole = len(chosen)
    if only is not None:
        chosen = [(module, mutant) for module, mutant in chosen if re.search(only, mutant.place)]
    if sample is not None and sample < len(chosen):
        chosen = random.Random(seed).sample(chosen, sample)
    unexplained: list[str] = []

    def work(trials: Trials) -> None:
        print(
            f"{name}: {len(trials.items)} tests, {trials.whole:.0f} s of processor time", flush=True
        )
        start = time.monotonic()
        killed, late, crashed, known = 0, 0, 0, 0
        for module, mutant in chosen:
            verdict = trials.judge(_path(module), mutant.tree(), mutant.first, mutant.last)
            if verdict.test is not None:
                killed += 1
                late += verdict.late
                crashed += verdict.crashed
                if verbose:
                    print(f"  killed: {mutant.place}\n    by {verdict.test}", flush=True)
            elif any(part in _plain(mutant.place) for part in EQUIVALENT):
                known += 1
            else:
                unexplained.append(mutant.place)
                print(f"  survived: {mutant.place}", flush=True)
        print(
            f"{name}: {killed} of {len(chosen) - known} killed ({late} by their time, {crashed} by "
            f"a crash; {known} cannot be seen; {whole} in all), {time.monotonic() - start:.0f} s",
            flush=True,
        )

    trials = Trials([_path(module) for module in area.files], work)
    where = [str(HERE / test) for test in area.tests]
    plain = ["-qq", "-s", "--no-header", "--no-summary", "--tb=no", "--rootdir", str(ROOT)]
    plain += ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
    code = pytest.main([*where, *plain], plugins=[trials])
    if code:
        raise SystemExit(f"{name}: pytest ended with {code!r}")
    return unexplained


def main(arguments: list[str] | None = None) -> int:
    """Run areas of mutants; 1 if one survived without a reason."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("areas", nargs="*", metavar="AREA", help=f"of {', '.join(AREAS)}")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="REGEX", help="those whose description matches")
    parser.add_argument("--verbose", action="store_true", help="say which test kills each")
    options = parser.parse_args(arguments)
    unknown = set(options.areas) - set(AREAS)
    if unknown:
        parser.error(f"no such area: {', '.join(sorted(unknown))}")
    names = options.areas or list(AREAS)
    if len(names) == 1:
        return bool(run(names[0], options.sample, options.seed, options.only, options.verbose))
    rest = [f"--{k}={v}" for k, v in vars(options).items() if k in ("sample", "seed", "only") and v]
    command = [sys.executable, "-m", "tests.mutants", *rest, *["--verbose"] * options.verbose]
    return max(subprocess.run([*command, name], cwd=ROOT, check=False).returncode for name in names)


if __name__ == "__main__":
    sys.exit(main())
