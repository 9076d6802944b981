"""Markdown tables from the rows that the suite measured; the docs include them."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.benchmarks.timing import ratios

__all__ = ["target_rows", "write"]

Row = dict[str, Any]
BASE = "funclsq at this error"


def duration(seconds: float) -> str:
    """Three digits with a unit that suits."""
    if not math.isfinite(seconds):
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            value = seconds / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return ""


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(out + ["| " + " | ".join(line) + " |" for line in lines]) + "\n"


def group(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def main_tables(rows: list[Row]) -> str:
    """One table per problem: time and ratio to this library, of x and of x with gradient."""
    parts = []
    for (key,), mine in group(rows, "problem").items():
        first = mine[0]
        size = (
            f"{first['shape'][0]} x {first['shape'][1]}, {first['nnz']} entries, k = {first['k']}"
        )
        works = group(mine, "work")
        lines = []
        for (name,), pair in group(mine, "contestant").items():
            line = [name]
            for work in ("x", "x and gradient"):
                row = next((r for r in pair if r["work"] == work), None)
                base = next((r for r in works.get((work,), []) if r["contestant"] == BASE), None)
                line += cells(row, base)
            lines.append(line)
        head = ["", "x", "times ours", "error", "x and gradient", "times ours", "error"]
        parts.append(f"**{first['title']}** ({key}: {size})\n\n{table(head, lines)}")
    return "\n".join(parts)


def cells(row: Row | None, base: Row | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    if not row["seconds"]:
        return [row["note"], "", ""]
    error = f"{row['error']:.0e}" if row["error"] is not None else ""
    ratio = ""
    if base and base["seconds"]:
        middle, low, high = ratios(row["seconds"], base["seconds"])
        ratio = f"{middle:.2g} ({low:.2g}-{high:.2g})"
    return [duration(statistics.median(row["seconds"])), ratio, error]


def plain_table(rows: list[Row], base: str | None) -> str:
    """Rows of one piece of work: seconds, and the ratio to ``base``."""
    lines = []
    for (title,), mine in group(rows, "title").items():
        first = next((r for r in mine if r["contestant"] == base), mine[0])
        for row in mine:
            middle, low, high = ratios(row["seconds"], first["seconds"])
            lines.append(
                [
                    title,
                    row["contestant"],
                    duration(statistics.median(row["seconds"])),
                    f"{middle:.2g} ({low:.2g}-{high:.2g})",
                ]
            )
    return table(["problem", "", "time", "times the first"], lines)


TARGETS = (
    # what, problem, work, mine, peer, at most
    ("random", "x and gradient", "funclsq at this error", "SciPy lsmr", 0.1),
    ("random", "x and gradient", "funclsq at this error", "SciPy lsmr scaled by hand", 0.8),
    ("random", "x and gradient", "funclsq lsmr", "SciPy lsmr scaled by hand", 0.8),
    ("random", "x and gradient", "funclsq at this error", "torchsparsegradutils", 0.05),
    ("random-64", "x", "funclsq at this error", "SciPy lsmr", 0.1),
    ("random-64", "x", "funclsq at this error", "SciPy lsmr scaled by hand", 0.25),
    ("random-64", "x and gradient", "funclsq at this error", "torchsparsegradutils", 0.01),
    ("random", "x and gradient", "funclsq.jax", "matfree lsmr", 0.1),
    ("random", "x and gradient", "funclsq.jax", "lineax LSMR", 0.1),
    ("random", "x and gradient", "funclsq.jax", "lineax Normal(CG)", 0.1),
    ("grid", "x", "funclsq cholesky", "CHOLMOD", 2.0),
    ("grid", "x", "funclsq cholesky", "SciPy lsmr", 0.1),
    ("grid", "x", "funclsq cholesky", "SPQR", 0.4),
    ("bundle", "x", "funclsq cholesky", "SPQR", 0.4),
    ("terrain", "x", "funclsq cholesky", "SPQR", 0.4),
    ("one-hot", "x", "funclsq cholesky", "SPQR", 0.4),
    ("batch-1000", "x and gradient", "funclsq, vmap", "funclsq, a loop", 0.05),
    ("batch-1000", "x and gradient", "funclsq, vmap", "torch.linalg.cholesky, dense batch", 1.0),
    ("batch-1000", "x and gradient", "funclsq, vmap", "torch.linalg.qr, dense batch", 1.0),
    ("batch-1000", "x and gradient", "funclsq.jax, vmap", "JAX Cholesky of A^T A, vmap", 1.0),
)


def target_rows(rows: list[Row]) -> list[dict[str, Any]]:
    """Each ratio that the project set out to reach, as measured."""
    found = {(r["problem"], r["work"], r["contestant"]): r for r in rows}
    out = []
    for problem, work, mine, peer, limit in TARGETS:
        a, b = found.get((problem, work, mine)), found.get((problem, work, peer))
        if a and b and a["seconds"] and b["seconds"]:
            middle, low, high = ratios(a["seconds"], b["seconds"])
        else:
            middle = low = high = float("nan")
        once = re.search(r"([\d.]+) s for one run", b["note"]) if b else None
        about = float("nan")
        if once and a and a["seconds"]:
            about = statistics.median(a["seconds"]) / float(once[1])
        out.append(
            {
                "problem": problem,
                "work": work,
                "mine": mine,
                "peer": peer,
                "limit": limit,
                "ratio": middle,
                "low": low,
                "high": high,
                "about": about,
                "note": b["note"] if b else "",
            }
        )
    return out


def target_table(rows: list[Row]) -> str:
    lines = []
    for t in target_rows(rows):
        if math.isfinite(t["ratio"]):
            shown = f"{t['ratio']:.2g} ({t['low']:.2g}-{t['high']:.2g})"
            met = "yes" if t["ratio"] <= t["limit"] else "no"
        elif math.isfinite(t["about"]):
            shown = f"about {t['about']:.2g} ({t['note']}, at a tolerance of the middle)"
            met = "yes" if t["about"] <= t["limit"] / 4 else ""  # not at one error: by a margin
        else:
            shown, met = t["note"] or "not measured", ""
        lines.append([t["problem"], t["work"], t["mine"], t["peer"], f"{t['limit']:g}", shown, met])
    head = ["problem", "work", "this library", "against", "to reach", "measured", "reached"]
    return table(head, lines)


def auto_table(rows: list[Row]) -> str:
    """How far ``solver="auto"`` is from the best single choice, problem by problem."""
    lines = []
    found = ("funclsq lsmr, rank unknown", "funclsq cholesky", "funclsq qr")
    told = ("funclsq lsmr", "funclsq lsqr", "funclsq cgls")
    for (_, work), mine in group(rows, "problem", "work").items():
        auto = next((r for r in mine if r["contestant"] == BASE and r["seconds"]), None)
        if auto is None:
            continue
        line = [mine[0]["title"], work]
        for names in (found, told):
            others = [r for r in mine if r["contestant"] in names and r["seconds"]]
            if not others:
                line += ["", "", ""]
                continue
            best = min(others, key=lambda r: statistics.median(r["seconds"]))
            middle, low, high = ratios(auto["seconds"], best["seconds"])
            name = best["contestant"].removeprefix("funclsq ").removesuffix(", rank unknown")
            time = duration(statistics.median(best["seconds"]))
            line += [name, time, f"{middle:.2g} ({low:.2g}-{high:.2g})"]
        lines.append(line)
    head = ["problem", "work", "best single choice", "its time", "auto / best"]
    head += ["best iteration told the rank", "its time", "auto / that"]
    return table(head, lines)


def adjoint_table(rows: list[Row]) -> str:
    """Forward and backward pass, and their ratio run by run."""
    lines = []
    for row in rows:
        times = [duration(statistics.median(row[name])) for name in ("forward", "backward")]
        middle, low, high = ratios(row["backward"], row["forward"])
        lines.append([row["title"], row["way"], *times, f"{middle:.2g} ({low:.2g}-{high:.2g})"])
    return table(["problem", "solver", "forward", "backward", "backward / forward"], lines)


def error_table(rows: list[Row]) -> str:
    """Errors of gradients in the values and in b, and what told how many solves they take."""
    lines = []
    for row in rows:
        pairs = [row["SPQR"], row["cholesky"]]
        errors = ["" if p is None else f"{p[0]:.1e}, {p[1]:.1e}" for p in pairs]
        foretold = "" if row["foretold"] is None else f"{row['foretold']:.2f}"
        lines.append([row["problem"], *errors, str(row["solves"]), foretold])
    return table(["problem", "SPQR", "cholesky", "solves", "foretold / true"], lines)


def write(results: dict[str, Any], folder: Path) -> None:
    """Write each table as a file of its own."""
    rows = results.get("main", [])
    pages = {"main": main_tables(rows), "auto": auto_table(rows)}
    pages["targets"] = target_table(rows + results.get("batch", []))
    if results.get("adjoints"):
        pages["adjoints"] = adjoint_table(results["adjoints"])
    if results.get("errors"):
        pages["errors"] = error_table(results["errors"])
    if results.get("batch"):
        pages["batch"] = plain_table(results["batch"], "funclsq, vmap")
    if results.get("reuse"):
        pages["reuse"] = plain_table(results["reuse"], "funclsq, factorize")
    if results.get("warmth"):
        pages["warmth"] = plain_table(results["warmth"], None)
    if results.get("memory"):
        pages["memory"] = table(
            ["problem", "", "MB"],
            ([r["title"], r["contestant"], f"{r['megabytes']:.0f}"] for r in results["memory"]),
        )
    if results.get("products"):
        pages["products"] = table(
            ["entries", "columns", "", "time"],
            (
                [str(r["nnz"]), str(r["k"]), r["what"], duration(statistics.median(r["seconds"]))]
                for r in results["products"]
            ),
        )
    if results.get("iteration"):
        pages["iteration"] = table(
            [
                "entries",
                "an iteration",
                "its products and vectors by hand",
                "ratio",
                "the same with torch's products",
                "bandwidth floor",
            ],
            (
                [
                    str(r["nnz"]),
                    duration(statistics.median(r["iteration"])),
                    duration(statistics.median(r["by_hand"])),
                    f"{r['ratio']:.2f}",
                    duration(statistics.median(r["by_hand_torch"])),
                    duration(r["floor"]),
                ]
                for r in results["iteration"]
            ),
        )
    if results.get("beyond"):
        pages["beyond"] = table(
            ["entries", "an iteration", "its products", "beyond them", "of it vectors"],
            (
                [str(r["nnz"])]
                + [duration(r[key]) for key in ("iteration", "products", "beyond", "vectors")]
                for r in results["beyond"]
            ),
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text)
