"""LSMR in ``jax.lax``, for operators that are JAX functions: no host call, any device.

All columns (and batch members) run together; each stops by its own tests and is frozen then.
Greek letters are the scalars of the paper, one per column.

References
----------
D. C.-L. Fong and M. A. Saunders, LSMR: an iterative algorithm for sparse least-squares problems,
SIAM J. Sci. Comput. 33 (2011) 2950-2971, doi:10.1137/10079687X.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funclsq.solution import Status

__all__ = ["Result", "lsmr"]

_RUNNING = -1


class Result(NamedTuple):
    """x (..., n, k); per column status, steps made and an estimate of the condition number."""

    x: Any
    status: Any
    iterations: Any
    cond: Any


class _State(NamedTuple):
    count: Any
    status: Any
    iterations: Any
    u: Any
    v: Any
    h: Any
    hbar: Any
    x: Any
    alpha: Any
    alphabar: Any
    zetabar: Any
    rho: Any
    rhobar: Any
    cbar: Any
    sbar: Any
    betaddot: Any
    betadot: Any
    rhodot: Any
    tautilde: Any
    thetatilde: Any
    zeta: Any
    anorm2: Any
    largest: Any
    smallest: Any


def lsmr(
    mv: Callable[[Any], Any],
    rmv: Callable[[Any], Any],
    b: Any,
    *,
    atol: float | None = None,
    btol: float | None = None,
    conlim: float | None = None,
    maxiter: int | None = None,
) -> Result:
    """Minimise ||A x - b||, x of least norm, for every column of b.

    Parameters
    ----------
    mv, rmv : callable
        A on (..., n, k) and A^H on (..., m, k).
    b : array, shape (..., m, k)
        Right-hand sides.
    atol, btol : float, optional
        Stop at ||A^H r|| <= atol ||A|| ||r|| or ||r|| <= btol ||b|| + atol ||A|| ||x||; by default
        the rounding level.
    conlim : float, optional
        Stop when the estimate of cond(A) passes this; by default never.
    maxiter : int, optional
        Largest number of steps, by default max(5000, 10 min(m, n)).

    Returns
    -------
    Result
    """
    real = jnp.finfo(b.dtype).dtype
    eps = float(jnp.finfo(real).eps)
    at_eps = atol is None and btol is None
    atol, btol = (eps if t is None else t for t in (atol, btol))
    # beta_1 u_1 = b,  alpha_1 v_1 = A^H u_1
    beta = bnorm = _norm(b)
    u = _over(b, beta)
    v = rmv(u)
    alpha = _norm(v)
    v = _over(v, alpha)
    limit = maxiter if maxiter is not None else max(5000, 10 * min(b.shape[-2], v.shape[-2]))
    one, zero = jnp.ones_like(beta), jnp.zeros_like(beta)
    code = jnp.where(alpha * beta > 0, _RUNNING, int(Status.START_SOLVES))
    code = jnp.where(jnp.isfinite(alpha * beta), code, int(Status.NONFINITE))
    start = _State(
        count=0, status=code, iterations=jnp.zeros(beta.shape, jnp.int32), u=u, v=v, h=v,
        hbar=jnp.zeros_like(v), x=jnp.zeros_like(v), alpha=alpha, alphabar=alpha,
        zetabar=alpha * beta, rho=one, rhobar=one, cbar=one, sbar=zero, betaddot=beta, betadot=zero,
        rhodot=one, tautilde=zero, thetatilde=zero, zeta=zero, anorm2=alpha**2, largest=zero,
        smallest=jnp.full_like(one, jnp.inf),
    )  # fmt: skip

    def body(s: _State) -> _State:
        new, rnorm, arnorm, cond = _step(mv, rmv, s)
        anorm = jnp.sqrt(new.anorm2)
        small = rnorm <= btol * bnorm + atol * anorm * _norm(new.x)
        optimal = arnorm <= atol * anorm * rnorm
        first, second = (
            (Status.RESIDUAL_AT_EPS, Status.NORMAL_RESIDUAL_AT_EPS)
            if at_eps
            else (Status.RESIDUAL_SMALL, Status.NORMAL_RESIDUAL_SMALL)
        )
        code = jnp.full_like(s.status, _RUNNING)
        if conlim is not None:
            code = jnp.where(cond >= conlim, int(Status.CONDITION_LIMIT), code)
        code = jnp.where(optimal, int(second), code)
        code = jnp.where(small, int(first), code)
        code = jnp.where(jnp.isfinite(rnorm + arnorm), code, int(Status.NONFINITE))
        active = s.status == _RUNNING
        kept = jax.tree.map(
            lambda a, b: jnp.where(active if a.ndim == active.ndim else active[..., None, :], a, b),
            new._replace(count=None),
            s._replace(count=None),
        )
        return kept._replace(
            count=s.count + 1,
            status=jnp.where(active, code, s.status),
            iterations=jnp.where(active, s.count + 1, s.iterations),
        )

    def running(s: _State) -> Any:
        return (s.count < limit) & (s.status == _RUNNING).any()

    end = jax.lax.while_loop(running, body, start)
    status = jnp.where(end.status == _RUNNING, int(Status.MAXITER), end.status)
    failed = (status == int(Status.NONFINITE))[..., None, :]
    return Result(
        jnp.where(failed, jnp.nan, end.x),
        status,
        end.iterations,
        _cond(end, jnp.zeros_like(end.rho)),
    )


def _step(mv: Any, rmv: Any, s: _State) -> tuple[_State, Any, Any, Any]:
    """Advance x_{k-1} to x_k; also ||r_k||, ||A^H r_k|| and cond(A)."""
    # beta_{k+1} u_{k+1} = A v_k - alpha_k u_k,  alpha_{k+1} v_{k+1} = A^H u_{k+1} - beta_{k+1} v_k
    u = mv(s.v) - _col(s.alpha) * s.u
    beta = _norm(u)
    u = _over(u, beta)
    v = rmv(u) - _col(beta) * s.v
    alpha = _norm(v)
    v = _over(v, alpha)
    # P_k: rho_k, c_k, s_k, theta_{k+1} = s_k alpha_{k+1}, alphabar_{k+1} = c_k alpha_{k+1}
    rho = jnp.hypot(s.alphabar, beta)
    c, sn = _div(s.alphabar, rho), _div(beta, rho)
    theta, alphabar = sn * alpha, c * alpha
    # Pbar_k: thetabar_k = sbar_{k-1} rho_k, rhobar_k = ((cbar_{k-1} rho_k)^2 + theta_{k+1}^2)^(1/2)
    thetabar, rhotemp = s.sbar * rho, s.cbar * rho
    rhobar = jnp.hypot(rhotemp, theta)
    cbar, sbar = _div(rhotemp, rhobar), _div(theta, rhobar)
    # zeta_k = cbar_k zetabar_k, zetabar_{k+1} = -sbar_k zetabar_k
    zeta, zetabar = cbar * s.zetabar, -sbar * s.zetabar
    # hbar_k = h_k - (thetabar_k rho_k / (rho_{k-1} rhobar_{k-1})) hbar_{k-1}
    hbar = s.h - _col(_div(thetabar * rho, s.rho * s.rhobar)) * s.hbar
    # x_k = x_{k-1} + (zeta_k / (rho_k rhobar_k)) hbar_k
    # h_{k+1} = v_{k+1} - (theta_{k+1} / rho_k) h_k
    x = s.x + _col(_div(zeta, rho * rhobar)) * hbar
    h = v - _col(_div(theta, rho)) * s.h
    # ||r_k||, section 5: betahat_k = c_k betaddot_k, betaddot_{k+1} = -s_k betaddot_k
    betahat, betaddot = c * s.betaddot, -sn * s.betaddot
    # Ptilde_{k-1}: rhotilde_{k-1} = (rhodot_{k-1}^2 + thetabar_k^2)^(1/2)
    rhotilde = jnp.hypot(s.rhodot, thetabar)
    ctilde, stilde = _div(s.rhodot, rhotilde), _div(thetabar, rhotilde)
    thetatilde, rhodot = stilde * rhobar, ctilde * rhobar
    betadot = -stilde * s.betadot + ctilde * betahat
    # tautilde_{k-1} = (zeta_{k-1} - thetatilde_{k-2} tautilde_{k-2}) / rhotilde_{k-1}
    tautilde = _div(s.zeta - s.thetatilde * s.tautilde, rhotilde)
    taudot = _div(zeta - thetatilde * tautilde, rhodot)
    rnorm = jnp.hypot(betadot - taudot, betaddot)
    first = s.count == 0
    largest = jnp.where(first, s.largest, jnp.maximum(s.largest, s.rhobar))
    smallest = jnp.where(first, s.smallest, jnp.minimum(s.smallest, s.rhobar))
    new = s._replace(
        u=u, v=v, h=h, hbar=hbar, x=x, alpha=alpha, alphabar=alphabar, zetabar=zetabar, rho=rho,
        rhobar=rhobar, cbar=cbar, sbar=sbar, betaddot=betaddot, betadot=betadot, rhodot=rhodot,
        tautilde=tautilde, thetatilde=thetatilde, zeta=zeta,
        anorm2=s.anorm2 + beta**2 + alpha**2, largest=largest, smallest=smallest,
    )  # fmt: skip
    return new, rnorm, jnp.abs(zetabar), _cond(new, rhotemp)


def _cond(s: _State, rhotemp: Any) -> Any:
    """Ratio of the largest and smallest diagonal entries of Rbar_k."""
    largest = jnp.maximum(s.largest, rhotemp)
    smallest = jnp.where(rhotemp > 0, jnp.minimum(s.smallest, rhotemp), s.smallest)
    return jnp.maximum(_div(largest, smallest), 1.0)


def _norm(t: Any) -> Any:
    square = jnp.real(t) ** 2 + jnp.imag(t) ** 2 if jnp.iscomplexobj(t) else t**2
    return jnp.sqrt(square.sum(-2))


def _col(a: Any) -> Any:
    return a[..., None, :]


def _div(a: Any, b: Any) -> Any:
    """a / b, and 0 where b is 0 (a breakdown: the quotient is not used)."""
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1), 0)


def _over(t: Any, norm: Any) -> Any:
    return t * _col(_div(jnp.ones_like(norm), norm))
