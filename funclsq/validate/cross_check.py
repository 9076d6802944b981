"""The torch core and the JAX adapter on one problem, against independent oracles."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from funclsq.validate.candidates import Candidate, default_candidates
from funclsq.validate.closed_form import damping_sizes, evaluate
from funclsq.validate.estimate import Estimate
from funclsq.validate.intake import as_problem
from funclsq.validate.maps_dense import DenseMaps
from funclsq.validate.maps_sparse import SparseMaps
from funclsq.validate.oracle_differences import differences
from funclsq.validate.oracle_mpmath import MP_LIMIT, by_mpmath
from funclsq.validate.oracles_dense import autodiff, own_error
from funclsq.validate.problem import Arrays, Problem
from funclsq.validate.report import Report, Row
from funclsq.validate.spectrum import extremes
from funclsq.validate.tangents import Directions, directions
from funclsq.validate.tolerances import Sensitivity, floors, perturbation

__all__ = ["ORACLES", "cross_check"]

ORACLES = ("closed form", "autodiff", "differences", "mpmath")
_PERTURBATIONS, _PERTURBATIONS_LARGE = 10, 3  # where m n^2 is below, and above
_NUDGES = 3
_CHEAP = 5_000_000
_PROBES = 2


def cross_check(
    A: Any,
    b: Any = None,
    *,
    damp: Any = None,
    weights: Any = None,
    x0: Any = None,
    solver: str | Callable[..., Any] = "auto",
    rank: str | int = "auto",
    seed: int = 0,
    cotangent: Any = None,
    oracles: Sequence[str] | None = None,
    candidates: Mapping[str, Candidate] | None = None,
    factor: float = 100.0,
    **settings: Any,
) -> Report:
    r"""Check x = argmin ||W^(1/2)(A x - b)||^2 + damp^2 ||x - x0||^2 and its derivatives.

    Returns a :class:`Report` with a row for every quantity of every candidate against every
    oracle. Quantities: x; the gradient (``vjp``) of ``Re <x_bar, x>`` in A (all stored entries),
    b and, where given, damp, weights and x0; the directional derivative (``jvp``) in each; the
    Hessian-vector product (``hvp``) in each, forward over reverse, reverse over reverse (r/r) and
    reverse over forward (r/f); and forward over forward. x_bar and directions are random, the
    directions such that the rank of A can stay as it is.

    Parameters
    ----------
    A : Tensor, scipy.sparse matrix, Sparse, array, shape (m, n)
        Dense or sparse, in any layout, real or complex, of any rank.
    b : array, shape (m,) or (m, k), optional
        Random (and so inconsistent, where m > n) unless given.
    damp : real, scalar or (n,), optional
        Differentiated where it is not 0.
    weights : real array, shape (m,) or (m, k), optional
        Row weights.
    x0 : array, shape (n,) or (n, k), optional
        The start.
    solver, rank, **settings
        Passed to :func:`funclsq.lstsq` and :func:`funclsq.jax.lstsq`; an int ``rank`` also tells
        the oracles.
    seed : int
        Of everything random.
    cotangent : array, shape as x, optional
        x_bar, in place of a random one (one in the null space of A, say).
    oracles : sequence of str, optional
        Some of ``ORACLES``; all that fit the problem unless given. "closed form": the formulas
        of Golub and Pereyra by SVD. "autodiff": JAX's, of a dense QR. "differences": of x alone.
        "mpmath": in 80 digits, up to 600
        entries. Above 4,000,000 entries in A the closed form goes
        by a refined sparse factorisation, and autodiff is left out.
    candidates : dict of str to callable, optional
        What to judge instead of funclsq; see :func:`torch_candidate` and :func:`jax_candidate`.
    factor : float
        A candidate may differ from an oracle by this multiple of what the oracle itself moves
        when the data move by their rounding, and of the unit roundoff.

    Returns
    -------
    Report
        True if everything passed.

    Raises
    ------
    TypeError, ValueError
        If the problem is not one that can be checked, or an oracle's name is unknown.

    Notes
    -----
    Cost: a few dense SVDs of A, some tens of solves, and a JAX compilation (seconds).

    Examples
    --------
    >>> import numpy as np
    >>> from funclsq.validate import cross_check
    >>> A = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    >>> report = cross_check(A, np.array([1.0, 0.0, 2.0]), oracles=["closed form", "mpmath"])
    >>> bool(report), report.failures
    (True, ())
    """
    rng = np.random.default_rng(seed)
    problem = as_problem(A, b, damp, weights, x0, rank, rng)
    notes: tuple[str, ...] = ()
    if candidates is None:
        candidates, notes = default_candidates(solver=solver, rank=rank, **settings)
    elif settings:
        raise TypeError(f"cross_check: unknown argument {next(iter(settings))!r}.")
    seeds = None if cotangent is None else np.asarray(cotangent)
    d = directions(problem, rng, seeds)
    probes = [directions(problem, rng) for _ in range(_PROBES)]
    large = SparseMaps()
    sensitivity = _sensitivity(problem, d, rng, DenseMaps if problem.small else large)
    truths, left_out = _ask(problem, d, probes, oracles, sensitivity.base, large)
    answers = {name: candidate(problem, d) for name, candidate in candidates.items()}
    rows: list[Row] = []
    for name, answer in answers.items():
        for oracle, truth in truths.items():
            rows += _rows(name, answer, oracle, truth, sensitivity, factor)
    for first, second in itertools.combinations(answers, 2):
        truth = {key: Estimate(a) for key, a in answers[first].items() if isinstance(a, np.ndarray)}
        rows += _rows(second, answers[second], first, truth, sensitivity, 2 * factor)
    order = {
        name: i for i, name in enumerate(dict.fromkeys(n for a in answers.values() for n in a))
    }
    rows.sort(key=lambda row: (order[row.quantity], list(answers).index(row.candidate)))
    dropped = {(t, o) for t in order for o in truths} - {(r.quantity, r.oracle) for r in rows}
    return Report(
        _title(problem, solver),
        tuple(rows),
        (*notes, *left_out, *_explain(problem, factor, truths, dropped)),
    )


def _sensitivity(
    problem: Problem, d: Directions, rng: np.random.Generator, maps: Callable[[Problem], Any]
) -> Sensitivity:
    """Evaluate the closed form at the data and at perturbed data.

    A damped problem has zeros beside D that no change of the data moves, but solvers that work
    on [W^(1/2) A; D] do: with a null space of A and little damping, by cond^2 times as much.
    """
    largest, smallest = extremes(problem, maps)
    cond = largest / smallest
    size = perturbation(cond)

    def answers(p: Problem, maps: Callable[..., Any] = maps) -> Arrays:
        found = evaluate(p, d, maps)
        found["jvp of jvp"] = np.array(_second(found, d))
        return found

    base = answers(problem)
    m, n = problem.shape
    times = _PERTURBATIONS if m * n * n <= _CHEAP else _PERTURBATIONS_LARGE
    moved = [answers(problem.perturbed(rng, size)) for _ in range(times)]
    if problem.small and problem.damping().any():
        for _ in range(_NUDGES):
            nudge = rng.standard_normal((m + n, n)) * (size / np.sqrt(m + n))
            moved.append(answers(problem, functools.partial(DenseMaps, nudge=nudge)))
    least = floors(problem, d, base, cond)
    if "damp" in problem.inputs:
        least |= damping_sizes(problem, d, maps)
    least["jvp of jvp"] = sum(
        float(np.linalg.norm(base[f"hvp {k}"]) * np.linalg.norm(t)) / np.sqrt(max(t.size, 1))
        for k, t in d.tangents.items()
    )
    return Sensitivity(base, moved, size, float(np.finfo(problem.dtype).eps), least)


def _ask(
    problem: Problem,
    d: Directions,
    probes: list[Directions],
    wanted: Sequence[str] | None,
    closed_form: Arrays,
    large: SparseMaps,
) -> tuple[dict[str, dict[str, Estimate]], tuple[str, ...]]:
    """Ask every oracle that fits; return the answers and notes on those that were left out."""
    for name in wanted or ():
        if name not in ORACLES:
            raise ValueError(f"cross_check: oracles are {', '.join(ORACLES)}; got {name!r}.")
    m, n = problem.shape
    has_jax = importlib.util.find_spec("jax") is not None
    reasons = {
        "autodiff": (not has_jax and "JAX is not installed")
        or (not problem.small and "A is too large"),
        "mpmath": m * n > MP_LIMIT and f"A has more than {MP_LIMIT} entries",
    }
    truths: dict[str, dict[str, Estimate]] = {}
    notes = []
    for name in wanted or ORACLES:
        if reasons.get(name):
            if wanted or name != "mpmath":
                notes.append(f"{name}: left out, {reasons[name]}.")
        elif name == "differences":
            truths[name] = differences(problem, d, probes, large)
        else:
            found = closed_form
            errors: dict[str, float] = {}
            if name != "closed form":
                found = dict((autodiff if name == "autodiff" else by_mpmath)(problem, d))
                if name == "autodiff" and problem.damping().any():
                    errors = own_error(problem, d, found)
                found["jvp of jvp"] = np.array(_second(found, d))
                errors["jvp of jvp"] = sum(
                    errors.get(f"hvp {k}", 0.0) * float(np.linalg.norm(t))
                    for k, t in d.tangents.items()
                )
            truths[name] = {key: Estimate(a, errors.get(key, 0.0)) for key, a in found.items()}
    if not problem.full_column_rank:
        along = np.stack([each.tangents["A"] for each in (d, *probes)])
        for truth in truths.values():
            truth |= _keeping_rank(truth, along)
    return truths, tuple(notes)


def _keeping_rank(truth: dict[str, Estimate], along: np.ndarray) -> dict[str, Estimate]:
    """Return the products of ``hvp A`` with directions that keep the rank of A.

    Where reverse mode comes last the answer is a gradient on the matrices of this rank: a
    functional on such directions, of which the oracle's answer is another representative.
    """
    whole = truth.get("hvp A")
    if whole is None or whole.along is not None:
        return {}
    error = whole.error * float(np.linalg.norm(along))
    products = Estimate(Estimate(whole.value, 0.0, along).of(whole.value), error, along)
    return {f"hvp A ({mode})": products for mode in ("r/r", "r/f")}


def _second(found: Arrays, d: Directions) -> float:
    """Return Re <x_bar, x''> along the tangents, which is their product with the hvp."""
    pairs = [
        np.vdot(found[f"hvp {k}"], t).real for k, t in d.tangents.items() if f"hvp {k}" in found
    ]
    return float(sum(pairs)) if len(pairs) == len(d.tangents) else float("nan")


def _rows(
    candidate: str,
    answers: dict[str, Any],
    oracle: str,
    truth: dict[str, Estimate],
    sensitivity: Sensitivity,
    factor: float,
) -> list[Row]:
    rows = []
    for name, answer in answers.items():
        plain = name.partition(" (")[0]
        estimate = truth.get(name, truth.get(plain))
        if estimate is None or not np.all(np.isfinite(estimate.value)):
            continue
        allowed = sensitivity.allow(plain, estimate, factor)
        if allowed is None:
            continue
        error, reason = float("inf"), allowed.reason
        expected = sensitivity.base[plain].shape
        if isinstance(answer, Exception):
            reason = f"raised {type(answer).__name__}: {str(answer).strip()[:200]}"
        elif answer.shape != expected:
            reason = f"shape {answer.shape}, where {expected} was expected"
        elif not np.isfinite(answer).all():
            reason = f"{int((~np.isfinite(answer)).sum())} of {answer.size} entries are not finite"
        else:
            distance = np.linalg.norm(estimate.of(answer) - estimate.value)
            error = float(distance) / allowed.scale
        rows.append(Row(name, candidate, oracle, error, allowed.tolerance, reason))
    return rows


def _title(problem: Problem, solver: Any) -> str:
    m, n = problem.shape
    kind = "dense" if problem.dense else f"sparse, {problem.row.size} entries"
    columns = "" if problem.vector else f", {problem.columns} right-hand sides"
    extras = [key for key in ("damp", "weights", "x0") if key in problem.inputs]
    given = f", with {', '.join(extras)}" if extras else ""
    name = solver if isinstance(solver, str) else getattr(solver, "__name__", "a function")
    return (
        f"least squares, A {m} x {n} {kind}, {problem.dtype}, rank {problem.rank}{columns}{given}; "
        f"solver {name}"
    )


def _explain(
    problem: Problem,
    factor: float,
    truths: dict[str, dict[str, Estimate]],
    dropped: set[tuple[str, str]],
) -> list[str]:
    notes = [
        f"An error is held to {factor:g} times what the oracle's own answer moves when the data "
        f"move by eps = {np.finfo(problem.dtype).eps:.0e}, relatively and at random"
        f"{', or all of [W^(1/2) A; damp],' if problem.damping().any() else ','} and to "
        f"{factor:g} eps at least; a larger bound of one oracle stands behind its error as <bound."
    ]
    if "differences" in truths:
        pairs = [k for k, e in truths["differences"].items() if e.along is not None]
        if pairs:
            notes.append(
                f"differences: {', '.join(pairs)} along random directions only, not entry by entry."
            )
        if "hvp A" not in pairs:
            notes.append("differences: hvp is the difference of the closed form's gradient.")
    if not problem.full_column_rank:
        notes.append(
            "A has no full column rank: hvp A (r/r) and (r/f) are compared along directions that "
            "keep its rank; across them a gradient on the matrices of this rank is arbitrary."
        )
    if not problem.small:
        how = "a refined factorisation" if problem.full_column_rank else "LSMR"
        notes.append(f"A is large: closed form and differences solve by SciPy ({how}).")
    worthless = sorted(
        name for name, oracle in dropped if oracle == "differences" and name in truths[oracle]
    )
    if worthless:
        notes.append(f"differences: too inaccurate here for {', '.join(worthless)}.")
    return notes
