"""Oracles on a dense A: the closed form through an SVD, and JAX's autodiff of a QR or SVD formula.

The second knows no derivative rule of least squares: with full rank it differentiates a QR
factorisation, a triangular solve and products. Only for A without full row or column rank does
it go through ``jnp.linalg.pinv``, whose rule is JAX's own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from funclsq.validate.closed_form import evaluate
from funclsq.validate.maps_dense import DenseMaps
from funclsq.validate.problem import Arrays, Problem, stacked_svd, turned
from funclsq.validate.tangents import Directions

__all__ = ["autodiff", "closed_form", "own_error"]


def closed_form(problem: Problem, d: Directions) -> Arrays:
    """Return x and its derivatives by the closed form, its maps applied by LAPACK's SVD."""
    return evaluate(problem, d, DenseMaps)


def autodiff(problem: Problem, d: Directions) -> Arrays:
    """Return x and its derivatives by JAX's autodiff of a dense formula, in float64.

    The formula is, with M = [W^(1/2) A; D] and c = [W^(1/2)(b - A x0); 0], the columns scaled
    where their rank is full:

    - full column rank: M = Q R, x = x0 + R^-1 Q^H c;
    - full row rank: M^H = Q R, x = x0 + Q R^-H c;
    - neither: x = x0 + pinv(M) c, cut between the singular values r and r + 1;
    - full column rank and some weight 0, where W^(1/2) has no derivative: the system
      ``[a I, A; A^H W, -D^2 / a] [r / a; x - x0] = [b - A x0; 0]`` by LU, a = sigma_min / sqrt(2).

    Parameters
    ----------
    problem : Problem
        With known rank.
    d : Directions
        Along what.

    Returns
    -------
    dict
        As :func:`funclsq.validate.closed_form.evaluate` returns; without the gradient in the
        weights where some are 0 and A has no full column rank.

    Raises
    ------
    ImportError
        If JAX is not installed.
    """
    from funclsq.validate._jax_side import x64

    with x64(True):
        return _autodiff(problem, d)


def own_error(problem: Problem, d: Directions, found: Arrays) -> dict[str, float]:
    """Return what asking ``autodiff`` with rows and columns in opposite order changes.

    In exact arithmetic nothing; so this is of the size of its rounding.
    """
    turn = {key: turned(key, a) for key, a in d.tangents.items()}
    again = autodiff(problem.reversed(), Directions(turn, turned("x", d.cotangent)))
    out = {}
    for name, a in found.items():
        key = "x" if name.startswith(("x", "jvp")) else name.partition(" ")[2]
        out[name] = float(np.linalg.norm(turned(key, again[name]) - a))
    return out


def _autodiff(problem: Problem, d: Directions) -> Arrays:
    import jax
    import jax.numpy as jnp

    parts = [(s, _formula(part)) for s, part in problem.column_problems()]
    (m, n), S = problem.shape, problem.column_scale()

    def solve(inputs: dict[str, Any]) -> Any:
        A = jnp.zeros((m, n), inputs["A"].dtype).at[problem.row, problem.col].add(inputs["A"])
        blocks = []
        for columns, formula in parts:
            own = problem.only(columns, inputs)
            b, x0 = own["b"], own.get("x0", jnp.zeros(n, own["b"].dtype))
            b, x0 = (a[:, None] if a.ndim == 1 else a for a in (b, x0))
            w = own.get("weights", jnp.ones(m))[:, None]
            damp = jnp.broadcast_to(own.get("damp", 0.0), (n,))
            blocks.append(x0 + S[:, None] * formula(A * S, b - A @ x0, w, damp * S))
        return jnp.concatenate(blocks, axis=1).reshape(problem.x_shape)

    def loss(inputs: dict[str, Any]) -> Any:
        return jnp.vdot(d.cotangent, solve(inputs)).real

    def everything(inputs: dict[str, Any], tangents: dict[str, Any]) -> dict[str, Any]:
        x, move = jax.linearize(solve, inputs)
        found = {"x": x}
        each = {key: jnp.stack([t * (k == key) for k in tangents]) for key, t in tangents.items()}
        for key, x_dot in zip(tangents, jax.vmap(move)(each), strict=True):
            found[f"jvp {key}"] = x_dot
        grad, hvp = jax.jvp(jax.grad(loss), (inputs,), (tangents,))
        for key in inputs:  # JAX's gradient is the conjugate of the direction of steepest ascent
            found[f"vjp {key}"], found[f"hvp {key}"] = grad[key].conj(), hvp[key].conj()
        return found

    found = jax.jit(everything)(problem.inputs, d.tangents)
    out = {key: np.asarray(a) for key, a in found.items()}
    if not problem.full_column_rank and (problem.weights() == 0).any():
        for name in ("vjp weights", "hvp weights"):
            out.pop(name, None)
    return out


def _formula(part: Problem) -> Any:
    """Return formula(A, c, w, damp) -> x - x0 for one matrix; which one is decided here."""
    import jax.numpy as jnp
    from jax.scipy.linalg import solve_triangular

    (m, n), damped = part.shape, bool(part.damping().any())
    s = stacked_svd(part)[1]
    zero_weights = bool((part.weights() == 0).any())

    def stack(A: Any, c: Any, w: Any, damp: Any) -> tuple[Any, Any]:
        root = jnp.where(w > 0, jnp.sqrt(jnp.where(w > 0, w, 1.0)), 0.0)
        if not damped:
            return root * A, root * c
        return jnp.vstack([root * A, jnp.diag(damp)]), jnp.pad(root * c, ((0, n), (0, 0)))

    def by_qr(A: Any, c: Any, w: Any, damp: Any) -> Any:
        M, c = stack(A, c, w, damp)
        q, r = jnp.linalg.qr(M)
        return solve_triangular(r, q.conj().T @ c)

    def by_qr_of_adjoint(A: Any, c: Any, w: Any, damp: Any) -> Any:
        M, c = stack(A, c, w, damp)
        q, r = jnp.linalg.qr(M.conj().T)
        return q @ solve_triangular(r, c, trans="C")

    def by_pinv(A: Any, c: Any, w: Any, damp: Any) -> Any:
        M, c = stack(A, c, w, damp)
        return jnp.linalg.pinv(M, rtol=cut) @ c

    def by_augmented(A: Any, c: Any, w: Any, damp: Any) -> Any:
        top = jnp.hstack([alpha * jnp.eye(m), A])
        bottom = jnp.hstack([(w * A).conj().T, -jnp.diag(damp**2) / alpha])
        rhs = jnp.pad(c, ((0, n), (0, 0)))
        return jnp.linalg.solve(jnp.vstack([top, bottom]), rhs)[m:]

    if part.full_column_rank and n:
        alpha = s[-1] / np.sqrt(2)
        return by_augmented if zero_weights else by_qr
    if part.rank == m and not damped and not zero_weights:
        return by_qr_of_adjoint
    if part.rank:  # cut where the singular values break off, between number r and r + 1
        kept, dropped = s[part.rank - 1], s[part.rank] if part.rank < s.size else 0.0
        cut = np.sqrt(kept * max(dropped, kept * np.finfo(float).eps)) / s[0]
    else:
        cut = 1.0
    return by_pinv
