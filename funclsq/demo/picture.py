"""One picture: the truth, what was measured of it, both reconstructions, and what was learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from funclsq.demo.elevation import MISSING
from funclsq.demo.experiment import CLASSES, Demo
from funclsq.demo.findings import errors
from funclsq.demo.samples import SURVEYS
from funclsq.demo.terrain import KINDS

__all__ = ["draw_picture", "require_plottable"]

_COLOURS = "gist_earth"
_ERROR = 100.0  # metres at the ends of the colour scale


def require_plottable(path: str) -> None:
    """Find out before long work whether a picture can be drawn.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If it does not know the format that the ending of ``path`` stands for.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ImportError(MISSING) from None
    known = FigureCanvasBase.get_supported_filetypes()
    ending = Path(path).suffix.removeprefix(".").lower()
    if ending not in known:
        raise ValueError(
            f"a picture's name must end in one of .{', .'.join(sorted(known))}; got "
            f"{Path(path).name!r}. Use .png."
        )


def draw_picture(demo: Demo, path: str) -> None:
    """Write the picture as PNG, PDF or SVG, as the ending of ``path`` says.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(wspace=0.02, hspace=0.04)
    figure = Figure(figsize=(14.6, 7.7), dpi=100, layout=layout)
    grid = figure.add_gridspec(2, 5, width_ratios=(1, 1, 1, 1, 0.04))
    axes = [[figure.add_subplot(grid[i, j]) for j in range(4)] for i in range(2)]
    before, _, after = errors(demo)["true surface"]
    _relief(axes[0][0], demo, demo.elevation.heights, "true surface")
    _samples(axes[0][1], demo)
    _search(axes[0][2], demo)
    _weights(axes[0][3], demo)
    single, both = demo.single.surface, demo.both.surface
    shape = demo.elevation.shape
    _relief(axes[1][0], demo, single.numpy().reshape(shape), "rebuilt, best single weight")
    _relief(axes[1][1], demo, both.numpy().reshape(shape), "rebuilt, learnt weights")
    _error(axes[1][2], demo, demo.error(single), f"error, single weight: {before:.1f} m RMS")
    image = _error(axes[1][3], demo, demo.error(both), f"error, learnt weights: {after:.1f} m RMS")
    figure.colorbar(image, cax=figure.add_subplot(grid[1, 4]), label="m", extend="both")
    figure.savefig(path)


def _range(demo: Demo) -> tuple[float, float]:
    """Heights at the ends of the colour scale; its lowest part, the sea's, is left out."""
    low, high = demo.elevation.heights.min(), demo.elevation.heights.max()
    return low - 0.35 * (high - low), high + 0.05 * (high - low)


def _relief(ax: Any, demo: Demo, heights: np.ndarray, title: str) -> None:
    """Shade from the north-west, coloured by height on the truth's scale."""
    import matplotlib as mpl
    from matplotlib.colors import LightSource, Normalize

    down, right = demo.elevation.spacing
    image = LightSource(azdeg=315, altdeg=45).shade(
        heights,
        cmap=mpl.colormaps[_COLOURS],
        norm=Normalize(*_range(demo)),
        blend_mode="soft",
        vert_exag=4,
        dx=right,
        dy=down,
    )
    ax.imshow(image, aspect=down / right, interpolation="nearest")
    _bare(ax, title)


def _samples(ax: Any, demo: Demo) -> None:
    down, right = demo.elevation.spacing
    rows, columns = demo.elevation.shape
    low, high = _range(demo)
    fit = demo.split.fit
    for number, size in reversed(list(enumerate((2200.0, 700.0)))):
        part = fit.of(number)
        y, x = np.divmod(part.points, columns)
        ax.scatter(
            x, y, s=size / columns, c=part.heights, cmap=_COLOURS, vmin=low, vmax=high, linewidths=0
        )
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect=down / right)
    ax.set_facecolor("0.2")
    new, old = (f"{s.noise:g} m" for s in SURVEYS)
    _bare(ax, f"{len(fit):,} samples, noise {new} (large) or {old}")


def _error(ax: Any, demo: Demo, error: np.ndarray, title: str) -> Any:
    down, right = demo.elevation.spacing
    image = ax.imshow(
        error,
        cmap="RdBu_r",
        vmin=-_ERROR,
        vmax=_ERROR,
        aspect=down / right,
        interpolation="nearest",
    )
    _bare(ax, title)
    return image


def _search(ax: Any, demo: Demo) -> None:
    """Draw the validation error of every solve, in the order they were made."""
    searches = (demo.single, demo.smooth, demo.both)
    labels = ("single weights", "smoothness learnt", "surveys too")
    made = 0
    for search, label, style in zip(searches, labels, ("o", "o-", "o-")):
        colour = {"single weights": "0.6", "smoothness learnt": "C0"}.get(label, "C3")
        solves = made + 1 + np.arange(len(search.errors))
        ax.plot(solves, search.errors, style, color=colour, markersize=4, label=label)
        made += len(search.errors)
    ax.axhline(min(demo.single.errors), color="0.6", linestyle="--", linewidth=1)
    ax.set_xlabel("solve")
    ax.set_title("error at validation samples, m", fontsize=11)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_box_aspect(1)


def _weights(ax: Any, demo: Demo) -> None:
    """Write each smoothness weight, as its decimal logarithm, on a patch of its colour."""
    logs = demo.both.log_weights.relative().smoothness.numpy() / np.log(10)
    ax.imshow(logs, cmap="viridis", aspect="auto")
    ax.set_xticks(range(len(CLASSES)), CLASSES)
    ax.set_yticks(range(len(KINDS)), KINDS)
    ax.tick_params(length=0)
    middle = (logs.min() + logs.max()) / 2
    for (i, j), value in np.ndenumerate(logs):
        colour = "white" if value < middle else "black"
        ax.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour)
    ax.set_title("learnt smoothness weights (log10)", fontsize=11)
    ax.set_box_aspect(1)


def _bare(ax: Any, title: str) -> None:
    ax.set_title(title, fontsize=11)
    ax.set_xticks([])
    ax.set_yticks([])
