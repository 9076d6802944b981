"""The public functions for JAX: check, then one compiled program per static description."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funclsq.errors import ConvergenceError, ConvergenceWarning
from funclsq.jax.devices import one_device
from funclsq.jax.inputs import Call, canonical
from funclsq.jax.primitive import Operands, S
from funclsq.settings import settings
from funclsq.solution import LEAVES, Solution, Status, describe

try:
    import equinox as eqx
except ImportError:  # the extra is optional
    eqx = None

__all__ = ["lstsq", "solve"]

jax.tree_util.register_pytree_node(
    Solution,
    lambda s: (tuple(getattr(s, name) for name in LEAVES), s.reason),
    lambda reason, leaves: Solution(**dict(zip(LEAVES, leaves)), reason=reason),
)


def lstsq(
    A: Any,
    b: Any,
    *,
    damp: Any = 0.0,
    weights: Any = None,
    x0: Any = None,
    solver: str | Callable[..., Any] = "auto",
    rank: str | int = "auto",
    rcond: float | None = None,
    on_failure: str = "warn",
    check_finite: bool = True,
    compute_dtype: str | None = None,
    **options: Any,
) -> jax.Array:
    r"""argmin_x ||W^(1/2)(A x - b)||^2 + damp^2 ||x - x0||^2, of all minimisers the nearest x0.

    Returns the minimiser; :func:`solve` returns how it was reached as well. Runs the torch core
    of funclsq on JAX's own buffers, inside ``jit`` and under every transform.

    Parameters
    ----------
    A : array, BCOO, BCSR, Sparse, LinearOperator or scipy.sparse matrix, shape (..., m, n)
        Any shape and rank, real or complex. Fastest for ``Sparse``, whose pattern is static.
    b : array, shape (m,) or (..., m, k)
        Right-hand side, a vector if and only if it is 1-D. Same dtype as A.
    damp : float or real array, scalar or (n,), units of A
        Tikhonov damping.
    weights : real array, shape (m,) or (m, k), optional
        Row weights W >= 0; 0 drops a row.
    x0 : array, shape as x, optional
        Where x is pulled by damp, and which minimiser is chosen where several are; 0 by default.
    solver, rank, rcond, **options
        As for :func:`funclsq.lstsq`.
    on_failure : {"warn", "raise", "ignore"}
        What happens when a solve does not meet its tolerance: a ``ConvergenceWarning`` from the
        host; an error (``ConvergenceError``, inside ``jit`` that of ``equinox.error_if``, for a
        derivative's solve one of the JAX runtime); or nothing. :func:`solve` gives a status.
    check_finite : bool
        Whether the input is tested for NaN and Inf (and weights for negative entries). Members
        and columns with such input come out as NaN, and count as failed.
    compute_dtype : {None, "float64"}
        "float64" solves float32 problems in double precision on the host and rounds the result;
        x64 need not be enabled for that.

    Returns
    -------
    x : jax.Array, shape (..., n) or (..., n, k), units of b / units of A

    Raises
    ------
    TypeError, ValueError
        At trace time: shapes, dtypes and settings that do not fit, 64-bit input that a JAX
        without x64 would narrow, negative damp or weights where they are not traced.

    Notes
    -----
    Differentiable in A (its stored entries), b, damp, weights and x0, in forward and reverse
    mode, to any order; the rank of A is taken to be locally constant. Complex derivatives follow
    JAX's conventions. A gradient costs one more solve, with the factor of the first.
    ``jax.export`` cannot serialise the host call.

    References
    ----------
    G. H. Golub and V. Pereyra, SIAM J. Numer. Anal. 10 (1973) 413-432, doi:10.1137/0710036.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, funclsq.jax as flj
    >>> A = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    >>> b = jnp.array([1.0, 3.0, 5.0])
    >>> jax.jit(flj.lstsq)(A, b).round(4)
    Array([1., 2.], dtype=float32)
    >>> jax.grad(lambda b: flj.lstsq(A, b).sum())(b).round(4)
    Array([0.3333, 0.3333, 0.3333], dtype=float32)
    """
    opts = settings("lstsq", solver, rank=rank, rcond=rcond, **options).options()
    call, arrays = canonical(
        "lstsq", A, b, damp, weights, x0, opts, on_failure, check_finite, compute_dtype
    )
    with one_device("lstsq", arrays):
        x, info = _run(call, arrays)
    return _report(call, "lstsq", on_failure, x, info)


def solve(
    A: Any,
    b: Any,
    *,
    damp: Any = 0.0,
    weights: Any = None,
    x0: Any = None,
    solver: str | Callable[..., Any] = "auto",
    rank: str | int = "auto",
    rcond: float | None = None,
    on_failure: str = "ignore",
    check_finite: bool = True,
    compute_dtype: str | None = None,
    **options: Any,
) -> Solution:
    """Solve as :func:`lstsq`, and return how: status, iterations, residuals, rank, condition.

    Parameters, errors and derivatives are those of :func:`lstsq`; failure is a status here, and
    nothing else unless ``on_failure`` says so. ``Solution.x`` is the only differentiable field.

    Returns
    -------
    Solution
        Of JAX arrays: one entry of status, iterations, residual_norm, normal_residual_norm, rank
        and cond per batch member and column. A pytree, so it passes through ``jit`` and ``vmap``;
        ``Solution.message`` and ``Solution.solver`` decode it outside of them.

    Examples
    --------
    >>> import jax.numpy as jnp, funclsq.jax as flj
    >>> sol = flj.solve(jnp.ones((3, 2)), jnp.array([1.0, 2.0, 3.0]))
    >>> int(sol.rank), bool(sol.converged)
    (1, True)
    """
    opts = settings("solve", solver, rank=rank, rcond=rcond, **options).options()
    call, arrays = canonical(
        "solve", A, b, damp, weights, x0, opts, on_failure, check_finite, compute_dtype
    )
    with one_device("solve", arrays):
        x, info = _run(call, arrays)
    x = _report(call, "solve", on_failure, x, info)
    return Solution(**dict(zip(LEAVES, (x, *info))), reason=f"solver={opts.solver!r}")


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _run(call: Call, arrays: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """Compose x0, damp, weights and batch dimensions around the primitive."""
    structure = call.problem.structure
    n = structure.shape[1]
    params, b, x0 = arrays["params"], arrays["b"], arrays["x0"]
    if arrays["kept"] is not None:
        params = (params[0][..., arrays["kept"]],)
    real = jnp.finfo(b.dtype).dtype
    b = b[..., None] if call.vector else b
    k = b.shape[-1]
    d2 = arrays["damp"]
    if d2 is not None:
        d2 = jnp.square(jnp.asarray(d2).astype(real))
        d2 = d2[None] if d2.ndim == 0 else d2
    if x0 is not None:
        x0 = x0[..., None] if call.vector or x0.ndim == 1 else x0
        x0 = jnp.broadcast_to(x0, (*x0.shape[:-1], k))
    w = arrays["weights"]
    if w is not None:
        w = w.astype(real)
        if w.ndim > 1:
            w = jnp.swapaxes(w, -1, -2) if call.per_column else w[..., 0]
    lead = call.lead
    if call.per_column:
        b, x0 = (t if t is None else jnp.swapaxes(t, -1, -2)[..., None] for t in (b, x0))
        params = tuple(_spread(p, d) for p, d in zip(params, structure.param_ndims))
        d2 = d2 if d2 is None else _spread(d2, 1)
        lead = (*lead, k)
    params = tuple(_flat(p, lead, d) for p, d in zip(params, structure.param_ndims))
    w, d2, c, x0 = _flat(w, lead, 1), _flat(d2, lead, 1), _flat(b, lead, 2), _flat(x0, lead, 2)
    members = any(t is not None and t.ndim > 1 for t in (w, d2)) or any(
        p.ndim > d for p, d in zip(params, structure.param_ndims)
    )
    if x0 is not None:
        c = c - structure.mv(params, arrays["aux"], x0)
    if lead and not members:  # one problem: the batch of b is more columns
        count, m, width = c.shape
        c = jnp.moveaxis(c, 0, 1).reshape(m, count * width)
    x, *info = S(call.problem, Operands(params, arrays["aux"], w, d2, c))
    if lead and not members:
        x = jnp.moveaxis(x.reshape(n, count, width), 1, 0)
        info = [t.reshape(count, width, -1) for t in info]
    if x0 is not None:
        x = x0 + x
    table = _table(_restore_info(call, info[0], k)) if info else ()
    return _restore(call, x, k), table


def _spread(t, core):
    """Make room for the columns as a batch dimension, where there is a batch."""
    return t if t.ndim == core else jnp.expand_dims(t, t.ndim - core)


def _flat(t, lead, core):
    """Broadcast the batch of t to ``lead`` and flatten it; an operand without batch stays so."""
    if t is None or t.ndim == core:
        return t
    tail = t.shape[t.ndim - core :]
    return jnp.broadcast_to(t, (*lead, *tail)).reshape(math.prod(lead), *tail)


def _restore(call, x, k):
    n = x.shape[-2]
    if call.per_column:
        return jnp.swapaxes(x.reshape(*call.lead, k, n), -1, -2)
    x = x.reshape(*call.lead, n, k)
    return x[..., 0] if call.vector else x


def _restore_info(call, info, k):
    info = info.reshape(*call.lead, k, info.shape[-1])
    return info[..., 0, :] if call.vector else info


def _table(info):
    """Columns of the info table as the fields of a Solution; -1 stands for unknown in it."""
    status, iterations, residual, normal, rank, cond, _, method = jnp.moveaxis(info, -1, 0)
    if not jax.config.jax_debug_nans:
        residual, normal, cond = (jnp.where(t < 0, jnp.nan, t) for t in (residual, normal, cond))
    status, iterations, rank, method = (t.astype(int) for t in (status, iterations, rank, method))
    return status, iterations, residual, normal, rank, cond, method


def _report(call: Call, name: str, on_failure: str, x: Any, info: tuple[Any, ...]) -> Any:
    """Do what ``on_failure`` says; the host warns by itself, a solve in JAX does not."""
    if on_failure == "raise":
        return _raise_if_failed(name, x, info)
    if on_failure == "warn" and call.problem.structure.solves_in_jax:
        failed = _failed(info[0])
        if isinstance(failed, jax.core.Tracer):
            jax.lax.cond(failed, lambda: jax.debug.callback(_warn, *info[:4]), lambda: None)
        elif bool(failed):
            _warn(*info[:4])
    return x


def _failed(status: Any, xp: Any = jnp) -> Any:
    """Whether any solve did not converge."""
    good = functools.reduce(xp.logical_or, (status == int(s) for s in Status if s.converged))
    return xp.logical_not(good.all())


def _warn(*table: Any) -> None:
    table = tuple(np.asarray(t) for t in table)
    if bool(_failed(table[0], np)):  # under vmap both branches of a cond run
        warnings.warn(describe(*table), ConvergenceWarning, stacklevel=2)


def _raise_if_failed(name: str, x: Any, info: tuple[Any, ...]) -> Any:
    """Raise now if there are values to look at, else put the check into the program."""
    failed = _failed(info[0])
    if not isinstance(failed, jax.core.Tracer):
        if bool(failed):
            raise ConvergenceError(f"{name}: {describe(*(np.asarray(t) for t in info[:4]))}")
        return x
    if eqx is None:
        raise ImportError(
            f'{name}: on_failure="raise" inside a JAX program needs equinox. Install it with '
            "pip install 'funclsq[jax]', or use funclsq.jax.solve and look at its status."
        )
    # The check hangs on one flag, not on x: what goes through its callback must be small.
    failed = eqx.error_if(
        failed,
        failed,
        f"funclsq.jax.{name}: a least-squares solve did not meet its tolerance, or its input was "
        "not finite. funclsq.jax.solve(...).message says which and what to do.",
    )
    return jnp.where(failed, jnp.nan, x)
