"""Pictures of a problem and its solution: convergence, sparsity, agreement of gradients, L-curve.

Each function takes data and, optionally, the Axes to draw on, changes no global setting and returns
the Axes. matplotlib is imported when the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from funclsq.descent import Descent, History
from funclsq.pattern import SparsityPattern
from funclsq.ridge import RidgePath
from funclsq.sparse import Sparse
from funclsq.torch_sparse import is_sparse
from funclsq.validate.report import Report

__all__ = ["convergence", "gradient_agreement", "l_curve", "sparsity"]

_GOOD, _BAD, _QUIET = "#1d5b9c", "#c0392b", "0.55"
_PIXELS = 256  # cells per side up to which every entry of a pattern is a pixel of its own


def convergence(
    history: Any,
    ax: Any = None,
    *,
    quantity: str = "normal_residual_norm",
    rate: float | None = None,
    label: str | None = None,
) -> Any:
    """Draw how an iteration converged, on a logarithmic scale.

    Parameters
    ----------
    history : Descent, History, sequence of dicts, or array of shape (T + 1,) or (T + 1, k)
        A descent with its history; what ``callback=states.append`` collected from any iterative
        solver; or numbers of your own, one per step and column.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    quantity : str
        What to draw of a history or of dicts: ``"residual_norm"`` or ``"normal_residual_norm"``.
    rate : float, optional
        A factor per step that theory promises, drawn as a dashed line from the first value.
    label : str, optional
        Name in the legend.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed and no ``ax`` is given.
    ValueError
        If there is no history, or it is empty.

    Examples
    --------
    >>> import torch, funclsq as fl
    >>> from funclsq import plot
    >>> A, b = torch.eye(3, 2) * torch.tensor([1.0, 3.0]), torch.ones(3)
    >>> sol = fl.solvers.gradient_descent(A, b, history=True)
    >>> ax = plot.convergence(sol, rate=1 - 1 / 9)
    >>> len(ax.lines), ax.get_yscale()
    (2, 'log')
    """
    steps, values, name = _history(history, quantity)
    ax = _axes(ax)
    lines = ax.semilogy(steps, values, lw=1.8)
    lines[0].set_label(label)
    if rate is not None:
        first = values.reshape(len(values), -1).max(1)[0]
        ax.semilogy(
            steps, first * rate ** (steps - steps[0]), "--", lw=1, color=lines[0].get_color()
        )
    ax.set(xlabel="step", ylabel=name)
    return _finished(ax, legend=label is not None)


def sparsity(A: Any, ax: Any = None) -> Any:
    """Draw where the entries of a matrix are; a large one as how many share a pixel.

    Parameters
    ----------
    A : SparsityPattern, Sparse, SciPy sparse matrix, or Tensor or array of shape (m, n)
        Of a sparse matrix the stored entries are drawn, of a dense one those that are not zero.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib Axes
        Its image holds the number of entries of each pixel, at most 256 pixels a side.

    Raises
    ------
    ImportError
        If matplotlib is not installed and no ``ax`` is given.
    ValueError
        If A is not one matrix.

    Examples
    --------
    >>> import funclsq as fl
    >>> from funclsq import plot
    >>> ax = plot.sparsity(fl.SparsityPattern([0, 1, 2], [0, 1, 1], (3, 2)))
    >>> ax.get_title()
    '3 x 2, 3 entries (50%)'
    """
    row, col, (m, n) = _entries(A)
    ax = _axes(ax)
    counts, _, _ = np.histogram2d(
        row,
        col,
        bins=(min(max(m, 1), _PIXELS), min(max(n, 1), _PIXELS)),
        range=((0, m or 1), (0, n or 1)),
    )
    shade = np.ma.masked_equal(counts, 0)
    ax.imshow(
        shade,
        extent=(-0.5, max(n, 1) - 0.5, max(m, 1) - 0.5, -0.5),
        cmap="Blues",
        vmin=-max(counts.max(), 1),
        vmax=max(counts.max(), 1),
        interpolation="nearest",
        aspect="equal" if 1 / 4 <= (m or 1) / (n or 1) <= 4 else "auto",
    )
    share = f"{100 * len(row) / (m * n):.2g}%" if m * n else "none"
    ax.set(xlabel="column", ylabel="row", title=f"{m} x {n}, {len(row):,} entries ({share})")
    return ax


def gradient_agreement(report: Report, ax: Any = None) -> Any:
    """Draw the errors of a comparison and the bounds that they are held to.

    Parameters
    ----------
    report : Report
        Of :func:`funclsq.validate.cross_check` or ``compare``.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib Axes
        One line per quantity: a dot per candidate and oracle, red where it fails, and a tick at
        its bound. An error of 0 is drawn at the left edge, one that is not finite at the right.

    Raises
    ------
    ImportError
        If matplotlib is not installed and no ``ax`` is given.
    ValueError
        If the report has no rows.

    Examples
    --------
    >>> from funclsq import plot
    >>> from funclsq.validate import Report, Row
    >>> rows = (Row("x", "torch", "svd", 1e-15, 1e-13, "100 eps"),)
    >>> plot.gradient_agreement(Report("demo", rows)).get_title()
    'all 1 comparisons within their bounds'
    """
    rows = report.rows
    if not rows:
        raise ValueError(
            "gradient_agreement: the report must have rows; got none. Pass what cross_check or "
            "compare returned."
        )
    ax = _axes(ax)
    names = list(dict.fromkeys(row.quantity for row in rows))
    given = np.array([row.error for row in rows], float)
    bounds = np.array([row.tolerance for row in rows], float)
    finite = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in (given, bounds)])
    least, most = (finite.min() / 10, finite.max() * 10) if len(finite) else (1e-17, 1.0)
    errors = np.clip(np.where(np.isfinite(given), given, most), least, most)
    place = np.array([names.index(row.quantity) for row in rows])
    good = np.array([row.passed for row in rows])
    ax.scatter(bounds, place, marker="|", s=130, color=_QUIET, label="bound")
    for chosen, colour, what in ((good, _GOOD, "within it"), (~good, _BAD, "beyond it")):
        if chosen.any():
            ax.scatter(errors[chosen], place[chosen], s=22, color=colour, label=what, alpha=0.8)
    failed = int((~good).sum())
    verdict = f"{failed} of {len(rows)} beyond their bounds"
    ax.set(
        xscale="log",
        xlim=(least / 2, most * 2),
        ylim=(len(names) - 0.5, -0.5),
        xlabel="relative error",
        title=verdict if failed else f"all {len(rows)} comparisons within their bounds",
    )
    ax.set_yticks(range(len(names)), names)
    ax.grid(axis="y", alpha=0.25)
    _finished(ax)
    ax.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return ax


def l_curve(path: RidgePath, ax: Any = None) -> Any:
    """Draw the size of the solution against that of the residual, and mark the corner.

    Parameters
    ----------
    path : RidgePath
        Of :func:`funclsq.ridge.ridge_path`.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ImportError
        If matplotlib is not installed and no ``ax`` is given.

    Examples
    --------
    >>> import torch
    >>> from funclsq import plot
    >>> from funclsq.ridge import ridge_path
    >>> A = torch.diag(torch.tensor([1.0, 0.1, 0.01]))
    >>> ax = plot.l_curve(ridge_path(A, torch.ones(3), torch.logspace(-3, 1, 40)))
    >>> ax.get_xscale(), ax.get_yscale()
    ('log', 'log')
    """
    damp, residual, size = (
        _numbers(t) for t in (path.damp, path.residual_norm, path.solution_norm)
    )
    ax = _axes(ax)
    ax.loglog(residual, size, lw=1.8, color=_GOOD)
    marked = path.corner
    ax.loglog(residual[marked], size[marked], "o", color=_BAD)
    for i, text in ((marked, "corner: damp"), (0, "damp"), (len(damp) - 1, "damp")):
        ax.annotate(
            f"{text} {damp[i]:.2g}",
            (residual[i], size[i]),
            xytext=(-6, 4) if i == len(damp) - 1 else (6, 4),
            ha="right" if i == len(damp) - 1 else "left",
            textcoords="offset points",
            color=_BAD if i == marked else _QUIET,
        )
    ax.set(xlabel=r"$\|A x - b\|$", ylabel=r"$\|x - x_0\|$")
    _short_labels(ax)
    return _finished(ax)


def _axes(ax: Any) -> Any:
    """Give the Axes, of a new figure if there are none."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError(
            "funclsq.plot needs matplotlib, which is not installed. Install it with "
            "pip install 'funclsq[plot]'."
        ) from None
    return pyplot.subplots(layout="constrained")[1]


def _short_labels(ax: Any) -> None:
    """Label a logarithmic axis of few decades 0.2, 0.5, 1 and not 2 x 10^-1 at every tick."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        if high < 50 * low:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def _finished(ax: Any, *, legend: bool = False) -> Any:
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(frameon=False)
    return ax


def _numbers(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


def _history(history: Any, quantity: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Steps (T + 1,), values (T + 1,) or (T + 1, k), and what they are called."""
    if isinstance(history, Descent):
        if history.history is None:
            raise ValueError("convergence: this descent kept no history. Pass history=True to it.")
        history = history.history
    first, name = 0, quantity.replace("_", " ")
    if isinstance(history, History):
        values = _numbers(getattr(history, quantity))
    elif isinstance(history, Sequence) and len(history) and isinstance(history[0], dict):
        values = np.stack([_numbers(state[quantity]) for state in history])
        first = int(history[0]["iteration"])
    else:
        values, name = _numbers(history), ""
    if values.size == 0 or values.ndim == 0:
        raise ValueError(
            "convergence: the history must have one value per step; got none. Collect it in a "
            "callback, or pass a descent made with history=True."
        )
    return np.arange(first, first + len(values)), values.reshape(len(values), -1), name


def _entries(A: Any) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Row and column of each entry, and the shape."""
    if isinstance(A, Tensor) and is_sparse(A):
        A = Sparse.from_torch(A.detach())
    if isinstance(A, Sparse):
        A = A.pattern
    if isinstance(A, SparsityPattern):
        return A.row, A.col, A.shape
    if hasattr(A, "tocoo"):
        A = A.tocoo()
        return A.row, A.col, A.shape
    dense = A.detach().cpu().numpy() if isinstance(A, Tensor) else np.asarray(A)
    if dense.ndim != 2:
        raise ValueError(
            f"sparsity: A must be one matrix (m, n); got shape {dense.shape}. Pass one member of "
            "a batch, A[0]."
        )
    row, col = np.nonzero(dense)
    return row, col, dense.shape
