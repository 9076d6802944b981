"""What a comparison found: one row per quantity, candidate and oracle; a table; a verdict."""

from __future__ import annotations

import dataclasses
import json
import math
import textwrap
from typing import Any

__all__ = ["Report", "Row"]

_WIDTH = 100
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: a candidate's quantity against one oracle's.

    Parameters
    ----------
    quantity : str
        What was compared, such as ``"x"``, ``"vjp A"`` or ``"hvp b"``.
    candidate : str
        Whose answer was judged.
    oracle : str
        Whose answer it was held against.
    error : float
        ``||candidate - oracle|| / scale``; infinite where the candidate gave no finite answer.
    tolerance : float
        The largest error that passes.
    reason : str
        Where the tolerance comes from, or what went wrong.
    """

    quantity: str
    candidate: str
    oracle: str
    error: float
    tolerance: float
    reason: str

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (a NaN is not)."""
        return bool(self.error <= self.tolerance)


@dataclasses.dataclass(frozen=True)
class Report:
    """The rows of a comparison. True if there are rows and every one passed; prints as a table.

    Parameters
    ----------
    title : str
        What was compared.
    rows : tuple of Row
        Every comparison made.
    notes : tuple of str
        What was left out and why, and how to read the tolerances.

    Examples
    --------
    >>> from funclsq.validate import Report, Row
    >>> report = Report("demo", (Row("x", "torch", "svd", 1e-15, 1e-13, "100 eps"),))
    >>> bool(report), report.failures
    (True, ())
    """

    title: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Return whether something was compared and everything passed."""
        return bool(self.rows) and not self.failures

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that did not pass, the worst (error over tolerance) first."""
        failed = [row for row in self.rows if not row.passed]
        return tuple(sorted(failed, key=_badness, reverse=True))

    def error(self, quantity: str, candidate: str | None = None) -> float:
        """Return the largest error of one quantity over all oracles.

        Parameters
        ----------
        quantity : str
            As in :attr:`Row.quantity`.
        candidate : str, optional
            Only this candidate's; all of them unless given.

        Raises
        ------
        KeyError
            If no such row exists.
        """
        errors = [
            row.error
            for row in self.rows
            if row.quantity == quantity and candidate in (None, row.candidate)
        ]
        if not errors:
            raise KeyError(f"Report.error: no row for {quantity!r} of {candidate or 'anyone'}")
        return max(errors)

    def to_json(self, **options: Any) -> str:
        """Return the report as JSON; keyword arguments go to :func:`json.dumps`.

        An infinite or NaN error is written as ``null``, which every JSON reader takes.
        """
        rows = [{**dataclasses.asdict(row), "passed": row.passed} for row in self.rows]
        for row in rows:
            for key in ("error", "tolerance"):
                row[key] = row[key] if math.isfinite(row[key]) else None
        content = {
            "title": self.title,
            "passed": bool(self),
            "rows": rows,
            "notes": list(self.notes),
        }
        return json.dumps(content, **options)

    def __str__(self) -> str:
        """Return the table: a line per quantity and candidate, a column per oracle."""
        return "\n".join(_lines(self))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text("Report(...)" if cycle else str(self))


def _badness(row: Row) -> float:
    ratio = row.error / row.tolerance if row.tolerance > 0 else math.inf
    return math.inf if math.isnan(ratio) else ratio


def _lines(report: Report) -> list[str]:
    """Lay the rows out; an error is followed by its own bound where that is not the common one."""
    oracles = list(dict.fromkeys(row.oracle for row in report.rows))
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in report.rows:
        lines.setdefault((row.quantity, row.candidate), {})[row.oracle] = row
    header = ["quantity", "of", *oracles, "held to", ""]
    body = []
    for (quantity, candidate), found in lines.items():
        common = min(row.tolerance for row in found.values())
        cells = [_cell(found.get(oracle), common) for oracle in oracles]
        good = all(row.passed for row in found.values())
        body.append([quantity, candidate, *cells, f"{common:.0e}", "ok" if good else "FAIL"])
    title = textwrap.wrap(report.title, _WIDTH) or [""]
    text = [*title, "=" * max(map(len, title)), *_table([header, *body])]
    for row in report.failures[:_SHOWN]:
        text.extend(_wrap("FAIL", f"{row.quantity} of {row.candidate}: {_say(row)}"))
    if len(report.failures) > _SHOWN:
        text.append(f"... and {len(report.failures) - _SHOWN} more failures")
    for note in report.notes:
        text.extend(_wrap("-", note))
    failed, total = len(report.failures), len(report.rows)
    if not total:
        verdict = "NOTHING WAS COMPARED"
    elif failed:
        verdict = f"FAILED: {failed} of {total} comparisons"
    else:
        verdict = f"passed: all {total} comparisons"
    return [*text, verdict]


def _say(row: Row) -> str:
    if not math.isfinite(row.error):
        return row.reason
    return f"{row.error:.1e} from {row.oracle}, where {row.tolerance:.1e} is allowed ({row.reason})"


def _cell(row: Row | None, common: float) -> str:
    if row is None:
        return "."
    mark = "" if row.passed else "!"
    error = "inf" if not math.isfinite(row.error) else f"{row.error:.0e}"
    own = f"<{row.tolerance:.0e}" if row.tolerance > 2.5 * common else ""
    return f"{error}{own}{mark}"


def _table(cells: list[list[str]]) -> list[str]:
    widths = [max(len(line[j]) for line in cells) for j in range(len(cells[0]))]
    wide = sum(widths) + 2 * len(widths) - 2 > _WIDTH
    gap, text = " " if wide else "  ", []
    for line in cells:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:-1], widths[2:-1], strict=True)]
        text.append(gap.join([*left, *right, line[-1]]).rstrip())
    text.insert(1, "-" * max(len(line) for line in text))
    return [*text, ""]


def _wrap(mark: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=f"{mark} ", subsequent_indent=" " * (len(mark) + 1)
    )
