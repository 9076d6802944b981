"""The demo's findings as text and as JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from funclsq.demo.experiment import CLASSES, Demo
from funclsq.demo.samples import SURVEYS
from funclsq.demo.terrain import KINDS

__all__ = ["errors", "table", "to_dict"]

_COLUMNS = ("single weight", "smoothness learnt", "surveys too")


def errors(demo: Demo) -> dict[str, tuple[float, ...]]:
    """Root mean square errors in metres, of each of the three searches' surfaces."""
    test = demo.split.test
    surfaces = [search.surface for search in (demo.single, demo.smooth, demo.both)]
    found = {"test samples": [test.mean_square(s) for s in surfaces]}
    for number, survey in enumerate(SURVEYS):
        name = f"{survey.name} survey, noise {survey.noise:g} m"
        found[name] = [test.of(number).mean_square(s) for s in surfaces]
    squares = [np.square(demo.error(s)) for s in surfaces]
    found["true surface"] = [s.mean() for s in squares]
    for number, name in enumerate(CLASSES):
        found[f"its {name} third"] = [s[demo.classes == number].mean() for s in squares]
    return {name: tuple(float(v) ** 0.5 for v in values) for name, values in found.items()}


def table(demo: Demo) -> str:
    """Lay out the problem, the errors of each search, the learnt weights, the comparisons."""
    (m, n), split = demo.terrain.pattern.shape, demo.split
    rows, columns = demo.elevation.shape
    down, right = demo.elevation.spacing
    count = sum(map(len, split))
    best = demo.strengths[int(np.argmin(demo.single.errors))]
    learnt = sum(t.numel() for t in demo.both.log_weights)
    solves = len(demo.smooth.errors) + len(demo.both.errors)
    lines = [
        f"Jacksboro fault: {rows} x {columns} heights, {down:.0f} m by {right:.0f} m apart",
        f"{count:,} noisy samples ({count / n:.0%} of them): {len(split.fit):,} to fit, "
        f"{len(split.validation):,} to validate, {len(split.test):,} to test",
        f"least squares: {m:,} equations, {n:,} unknowns, {demo.terrain.pattern.nnz:,} nonzeros",
        "",
        *_errors(demo),
        "",
        f"on the test samples, the learnt weights {'beat' if demo.better else 'DO NOT BEAT'} the "
        "best single weight",
        f"single weight: {best:.2g}, the best of {len(demo.strengths)} on the validation samples",
        f"learnt: {learnt} weights, by gradient descent in {solves} solves; in units of the "
        f"{SURVEYS[0].name} survey's:",
        "",
        *_weights(demo),
        "",
    ]
    for report in demo.reports:
        lines += [str(report) if report.rows else "\n".join([report.title, *report.notes]), ""]
    return "\n".join([*lines, f"{demo.seconds:.0f} s"])


def _errors(demo: Demo) -> list[str]:
    head = f"{'root mean square error, m':<28}" + "".join(f"{name:>19}" for name in _COLUMNS)
    lines = [f"{head}{'change':>9}", "-" * (len(head) + 9)]
    for name, values in errors(demo).items():
        label = name if name in ("test samples", "true surface") else f"  {name}"
        cells = "".join(f"{value:>19.2f}" for value in values)
        lines.append(f"{label:<28}{cells}{values[-1] / values[0] - 1:>+9.1%}")
    return lines


def _weights(demo: Demo) -> list[str]:
    surveys, smoothness = (t.exp() for t in demo.both.log_weights.relative())
    lines = [
        f"{survey.name} survey".ljust(16) + f"{float(weight):>10.2g}"
        for survey, weight in zip(SURVEYS, surveys)
    ]
    lines.append(" " * 16 + "".join(f"{name:>10}" for name in CLASSES))
    for kind, weights in zip(KINDS, smoothness):
        name = f"{'slope' if len(kind) == 1 else 'curvature'} {kind}"
        lines.append(f"{name:<16}" + "".join(f"{float(w):>10.2g}" for w in weights))
    return lines


def to_dict(demo: Demo) -> dict[str, Any]:
    """Return everything in the table, ready for :func:`json.dumps`."""
    surveys, smoothness = (t.exp() for t in demo.both.log_weights.relative())
    return {
        "passed": demo.good,
        "learnt beats single": demo.better,
        "shape": list(demo.terrain.pattern.shape),
        "nonzeros": demo.terrain.pattern.nnz,
        "samples": {name: len(part) for name, part in demo.split._asdict().items()},
        "rms_error": {name: dict(zip(_COLUMNS, values)) for name, values in errors(demo).items()},
        "validation": {
            "strengths": [float(s) for s in demo.strengths],
            **{
                name: list(search.errors)
                for name, search in zip(_COLUMNS, (demo.single, demo.smooth, demo.both))
            },
        },
        "weights": {
            **{survey.name: float(weight) for survey, weight in zip(SURVEYS, surveys)},
            **{
                kind: {name: float(w) for name, w in zip(CLASSES, weights)}
                for kind, weights in zip(KINDS, smoothness)
            },
        },
        "checks": [
            {
                "title": report.title,
                "passed": bool(report) if report.rows else None,
                "comparisons": len(report.rows),
                "worst error over tolerance": max(
                    (r.error / r.tolerance for r in report.rows), default=None
                ),
                "notes": list(report.notes),
            }
            for report in demo.reports
        ],
        "seconds": demo.seconds,
    }
