"""What each command does; returns the exit status."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import sys
from typing import Any

import numpy as np
import scipy.io
import scipy.sparse
import torch

import funclsq
from funclsq.cli.files import UserError, read_matrix, read_rhs, require_writable, write_array
from funclsq.cli.progress import clock, steps

__all__ = ["check", "demo", "solve"]


def solve(options: argparse.Namespace) -> int:
    """``funclsq solve A.mtx b.mtx -o x.mtx``."""
    if options.output:
        require_writable(options.output)
    A, b = _problem(options)
    with clock("solving") as say:
        found = funclsq.solve(
            A,
            torch.from_numpy(b),
            damp=options.damp,
            solver=options.solver,
            atol=options.tol,
            btol=options.tol,
            on_failure="ignore",
            callback=lambda state: say(f"iteration {state['iteration']}"),
        )
    good = bool(found.converged.all())
    x = found.x.numpy()
    if options.output:
        write_array(options.output, x, "argmin ||A x - b||, by funclsq")
    if options.json:
        print(json.dumps(_solution(options, A, found, good), allow_nan=False))
    else:
        print(_summary(options, A, found), file=sys.stderr)
        if not options.output:
            text = io.BytesIO()
            scipy.io.mmwrite(text, x[:, None] if x.ndim == 1 else x)
            sys.stdout.write(text.getvalue().decode())
    if not good:
        print(f"funclsq solve: x does not meet its tolerance. {found.message}", file=sys.stderr)
    return 0 if good else 1


def check(options: argparse.Namespace) -> int:
    """``funclsq check A.mtx [b.mtx]``."""
    from funclsq.validate import cross_check

    A, b = _problem(options)
    with clock("checking"):
        report = cross_check(
            A, b, damp=options.damp or None, solver=options.solver, seed=options.seed
        )
    if options.tol is not None:
        report = _held_to(options.tol, report)
    print(report.to_json() if options.json else report)
    return 0 if report else 1


def demo(options: argparse.Namespace) -> int:
    """``funclsq demo [--quick] [-o picture.png]``."""
    from funclsq.demo import count_ticks, draw_picture, require_plottable, run, table, to_dict

    require_writable(options.output)
    try:
        require_plottable(options.output)
    except ValueError as error:
        raise UserError(f"{options.output}: {error}") from None
    with steps(count_ticks(), "demo") as tick:
        found = run(
            quick=options.quick,
            seed=options.seed,
            tolerance=options.tol,
            tick=tick,
            solver=options.solver,
            damp=options.damp,
        )
    draw_picture(found, options.output)
    if options.json:
        print(json.dumps({**to_dict(found), "picture": options.output}, allow_nan=False))
    else:
        print(f"{table(found)}, picture in {options.output}")
    if not found.good:
        print("funclsq demo: a comparison failed; see the table.", file=sys.stderr)
    return 0 if found.good else 1


def _held_to(tol: float, report: Any) -> Any:
    """Judge again by one tolerance; central differences cannot do better than their own."""
    rows = []
    for row in report.rows:
        own = row.tolerance if row.oracle == "differences" else 0.0
        rows.append(dataclasses.replace(row, tolerance=max(tol, own), reason="--tol"))
    note = f"--tol: errors are held to {tol:g} instead (differences: to no less than their own)."
    return dataclasses.replace(report, rows=tuple(rows), notes=(*report.notes, note))


def _problem(options: argparse.Namespace) -> tuple[Any, np.ndarray | None]:
    """Read A and b, in one dtype."""
    A = read_matrix(options.A)
    b = None
    if options.b is not None:
        b = read_rhs(options.b, A.shape[0], options.A)
        dtype = np.result_type(A.dtype, b.dtype)
        A, b = A.astype(dtype), np.ascontiguousarray(b, dtype)
    if not scipy.sparse.issparse(A):
        A = torch.from_numpy(np.ascontiguousarray(A))
    return A, b


def _facts(found: funclsq.Solution) -> dict[str, list[float | int | None]]:
    """Per column: what is known of the solve, None where it is not known."""
    facts = {}
    for name in ("iterations", "residual_norm", "normal_residual_norm", "rank", "cond"):
        values = getattr(found, name).reshape(-1).tolist()
        known = [math.isfinite(v) and not (name == "rank" and v < 0) for v in values]
        facts[name] = [v if k else None for v, k in zip(values, known)]
    return facts


def _solution(
    options: argparse.Namespace, A: Any, found: funclsq.Solution, good: bool
) -> dict[str, Any]:
    names = [funclsq.Status(int(code)).name for code in found.status.reshape(-1)]
    content = {
        "converged": good,
        "message": found.message,
        "solver": found.solver,
        "shape": list(A.shape),
        "status": names,
        **_facts(found),
        "output": options.output,
    }
    if not options.output:
        x = found.x.numpy()
        content["x"] = [x.real.tolist(), x.imag.tolist()] if np.iscomplexobj(x) else x.tolist()
    return content


def _summary(options: argparse.Namespace, A: Any, found: funclsq.Solution) -> str:
    m, n = A.shape
    sparse = scipy.sparse.issparse(A)
    entries = f", {A.nnz} entries" if sparse else ", dense"
    facts = _facts(found)
    lines = {
        "A": f"{m} x {n}{entries}, {'complex' if np.iscomplexobj(A) else 'real'}",
        "solver": found.solver,
        "status": found.message,
        "rank": _span(facts["rank"]),
        "cond(A)": _span(facts["cond"]),
        "||b - A x||": _span(facts["residual_norm"]),
    }
    if options.output:
        lines["x"] = f"{options.output} ({' x '.join(map(str, found.x.shape))})"
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items())


def _span(values: list[Any]) -> str:
    """One value, or the smallest and the largest."""
    known = sorted(v for v in values if v is not None)
    if not known:
        return "not determined"
    low, high = known[0], known[-1]
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
