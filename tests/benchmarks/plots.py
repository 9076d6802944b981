"""Plots of what the suite measured: comparisons, and time against size with the machine's floor."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from tests.benchmarks.tables import BASE, group
from tests.benchmarks.timing import ratios

__all__ = ["draw"]

NAMES = {BASE: "this library"}


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write every plot that there are numbers for."""
    folder.mkdir(parents=True, exist_ok=True)
    if results.get("main"):
        _comparison(results["main"], folder / "comparison.png")
    if results.get("scaling"):
        _scaling(results, folder / "scaling.png")
    if results.get("iteration"):
        _iteration(results["iteration"], folder / "iteration.png")


def _comparison(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times longer each peer takes for x and gradient, problem by problem."""
    peers = [
        "SciPy lsmr",
        "SciPy lsmr scaled by hand",
        "CHOLMOD",
        "SPQR",
        "torchsparsegradutils",
        "matfree lsmr",
        "lineax LSMR",
        "lineax Normal(CG)",
    ]
    colours = dict(zip(peers, plt.get_cmap("tab10").colors))
    works = ("x", "x and gradient")
    titles = list({r["problem"]: r["title"] for r in rows}.values())
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 0.6 * len(titles) + 1.8), sharey=True, layout="constrained"
    )
    shown = set()
    for axis, work in zip(axes, works):
        for place, (_, mine) in enumerate(
            group([r for r in rows if r["work"] == work], "title").items()
        ):
            base = next((r for r in mine if r["contestant"] == BASE and r["seconds"]), None)
            if base is None:
                continue
            for row in mine:
                name = row["contestant"]
                if name not in colours or not row["seconds"]:
                    continue
                middle, low, high = ratios(row["seconds"], base["seconds"])
                y = place + 0.085 * (peers.index(name) - (len(peers) - 1) / 2)
                axis.plot([low, high], [y, y], color=colours[name], lw=2, alpha=0.5)
                label = None if name in shown else name
                shown.add(name)
                axis.plot(middle, y, "o", color=colours[name], ms=5, label=label)
        axis.axvline(1, color="0.3", lw=1)
        axis.set(xscale="log", title=work, xlabel="times this library's time (1: equal)")
        axis.grid(axis="x", alpha=0.3)
        for edge in np.arange(len(titles) - 1) + 0.5:
            axis.axhline(edge, color="0.9", lw=0.8)
    axes[0].set_yticks(np.arange(len(titles)), titles)
    axes[0].invert_yaxis()
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _scaling(results: dict[str, Any], path: Path) -> None:
    panels = (
        ("nnz", "stored entries"),
        ("k", "right-hand sides"),
        ("batch", "problems in a batch"),
        ("threads", "threads"),
    )
    panels = tuple(p for p in panels if results["scaling"].get(p[0]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4 * len(panels), 3.8), layout="constrained"
    )
    for axis, (key, label) in zip(axes, panels):
        for (solver,), rows in group(results["scaling"][key], "solver").items():
            at = [r["at"] for r in rows]
            middle = np.array([statistics.median(r["seconds"]) for r in rows])
            low = np.array([min(r["seconds"]) for r in rows])
            high = np.array([max(r["seconds"]) for r in rows])
            line = axis.plot(at, middle, "o-", ms=4, label=f"solver={solver!r}")[0]
            axis.fill_between(at, low, high, color=line.get_color(), alpha=0.15)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds, x and gradient")
        axis.grid(alpha=0.3)
        if key == "threads":
            axis.set_xticks(at, at)
            axis.minorticks_off()
        else:
            _slope(axis, max(at))
        if key == "nnz" and results.get("bandwidth"):
            # one pass over values and indices of A: an iteration takes that
            floor = [12 * entries / results["bandwidth"] for entries in at]
            axis.plot(at, floor, "k--", lw=1, label="one iteration at full bandwidth")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _slope(axis: Any, right: float) -> None:
    """A line of slope 1 under the curves, for the eye."""
    bottom, top = axis.get_ylim()
    x = np.array([right / 10, right])
    axis.plot(x, bottom * 1.3 * x / x[0], "k:", lw=1, label="slope 1")
    axis.set_ylim(bottom, top)


def _iteration(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    nnz = [r["nnz"] for r in rows]
    for key, label in (
        ("iteration", "an LSMR iteration"),
        ("by_hand", "its products and vector updates by hand"),
        ("by_hand_torch", "the same with torch's products"),
    ):
        middle = [statistics.median(r[key]) for r in rows]
        line = axis.plot(nnz, middle, "o-", ms=4, label=label)[0]
        low = [min(t for t in r[key] if t > 0) for r in rows]  # a difference of two times
        high = [max(r[key]) for r in rows]
        axis.fill_between(nnz, low, high, color=line.get_color(), alpha=0.15)
    floor = [r["floor"] for r in rows]
    axis.plot(nnz, floor, "k--", lw=1, label="bytes / measured bandwidth")
    axis.set(xscale="log", yscale="log", xlabel="stored entries", ylabel="seconds")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
