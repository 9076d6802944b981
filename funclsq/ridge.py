"""Solutions of a problem over a range of dampings, and the corner of the L-curve they make."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from funclsq.checks import dense_tensor
from funclsq.lstsq import solve

__all__ = ["RidgePath", "ridge_path"]


class RidgePath(NamedTuple):
    """What :func:`ridge_path` found: one entry, or row of x, per damping.

    Parameters
    ----------
    damp : Tensor, shape (d,), units of A
        Dampings, increasing.
    x : Tensor, shape (d, n), units of b / units of A
        Minimisers.
    residual_norm : Tensor, shape (d,), units of b
        ``||W^(1/2)(A x - b)||``, which grows with damp.
    solution_norm : Tensor, shape (d,), units of x
        ``||x - x0||``, which falls as damp grows.
    """

    damp: Tensor
    x: Tensor
    residual_norm: Tensor
    solution_norm: Tensor

    @property
    def curvature(self) -> Tensor:
        """Curvature of (log residual_norm, log solution_norm), positive where convex; (d,)."""
        parts = (self.damp, self.residual_norm, self.solution_norm)
        t, u, v = (np.log(p.detach().double().cpu().numpy()) for p in parts)
        du, dv = np.gradient(u, t), np.gradient(v, t)
        bend = du * np.gradient(dv, t) - dv * np.gradient(du, t)
        return torch.from_numpy(bend / (du**2 + dv**2) ** 1.5)

    @property
    def corner(self) -> int:
        """Index of the greatest curvature, the two points at either end left out."""
        return 2 + int(self.curvature[2:-2].argmax())


def ridge_path(A: Any, b: Tensor, damp: Tensor, **options: Any) -> RidgePath:
    """min ||W^(1/2)(A x - b)||^2 + damp_i^2 ||x - x0||^2 for every damp_i, in one batched solve.

    Parameters
    ----------
    A : (m, n)
        As in :func:`funclsq.lstsq`.
    b : Tensor, shape (m,)
        Right-hand side.
    damp : Tensor, shape (d,), positive and increasing, units of A
        Evenly spaced in their logarithm is best: ``torch.logspace(-6, 1, 60)``.
    **options
        ``weights``, ``x0``, ``solver``, ... as in :func:`funclsq.lstsq`.

    Returns
    -------
    RidgePath
        Solutions, both norms, and the corner of the L-curve. ``x`` and ``solution_norm`` are
        differentiable in A, b and damp.

    Raises
    ------
    ValueError
        If damp is not one-dimensional with at least five increasing positive entries, b is not
        a vector, or A or an option has batch dimensions.

    References
    ----------
    P. C. Hansen, SIAM Review 34 (1992) 561-580, doi:10.1137/1034115.

    Examples
    --------
    >>> import torch
    >>> from funclsq.ridge import ridge_path
    >>> A = torch.diag(torch.tensor([1.0, 0.1, 0.01]))
    >>> path = ridge_path(A, torch.ones(3), torch.logspace(-3, 1, 9))
    >>> path.x.shape, bool((path.solution_norm.diff() < 0).all())
    (torch.Size([9, 3]), True)
    """
    b = dense_tensor(b, "b", "ridge_path")
    if b.ndim != 1:
        raise ValueError(
            f"ridge_path: b must be a vector (m,); got shape {tuple(b.shape)}. Call it once for "
            "each column, b[:, i]."
        )
    damp = dense_tensor(damp, "damp", "ridge_path")
    flat = damp.detach()
    if damp.ndim != 1 or len(damp) < 5 or bool((flat <= 0).any() | (flat.diff() <= 0).any()):
        raise ValueError(
            "ridge_path: damp must be (d,) with d >= 5, positive and increasing; got shape "
            f"{tuple(damp.shape)}. Try torch.logspace(-6, 1, 60)."
        )
    sol = torch.func.vmap(lambda d: solve(A, b, damp=d, **options))(damp)
    if sol.x.ndim != 2:
        raise ValueError(
            "ridge_path: needs one problem; A or an option has batch dimensions "
            f"{tuple(sol.x.shape[1:-1])}. Call it once for each member."
        )
    shift = (
        sol.x
        if options.get("x0") is None
        else sol.x - dense_tensor(options["x0"], "x0", "ridge_path")
    )
    return RidgePath(damp, sol.x, sol.residual_norm, torch.linalg.vector_norm(shift, dim=1))
