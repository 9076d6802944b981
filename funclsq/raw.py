"""One raw solve, on plain tensors: what the derivative rules and the JAX callback both call.

    x = G^+ (A^H W c + g),   G = A^H W A + diag(d2),   s = A x - c.

The method prepared for given values (a factorisation, above all) is kept by content: the same
pattern with equal values finds it again, in torch or from a JAX callback, under every
transform. Nothing is keyed on identity, so nothing can be stale.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from funclsq import kept
from funclsq.extent import extent, finite, largest
from funclsq.full_precision import full_precision
from funclsq.info import INFO, report, residual_norms, table
from funclsq.kept import Entry
from funclsq.lost_digits import recovered
from funclsq.methods import registry
from funclsq.methods._protocol import Prepared, Raw
from funclsq.methods.auto import PreparedAuto
from funclsq.operators import Operator
from funclsq.plan import Plan
from funclsq.range import column_range, exponent, extreme, power, representable, shifted, within
from funclsq.solution import Status
from funclsq.spare import copied, is_large

__all__ = ["INFO", "NotFiniteError", "clear_cache", "raw_solve", "solver_calls"]

_REFINED = ("auto", "cholesky", "qr", "svd", "lsmr", "lsqr", "cgls")  # to working precision

_made = 0

clear_cache = kept.clear


class NotFiniteError(ValueError):
    """NaN or Inf where there may be none, or a negative weight."""


def solver_calls() -> int:
    """Number of times that a solver has been run in this process (gated calls not counted)."""
    return _made


def _prepare(
    plan: Plan,
    params: tuple[Tensor, ...],
    w: Tensor | None,
    d2: Tensor | None,
    check: bool,
    once: bool = False,
) -> Entry:
    """Find or make the method prepared for these values; what is found has been checked.

    ``once``: large values that were not seen lately are used where they lie, and not kept.
    """
    data = (*params, w, d2)
    found_by = kept.fingerprint(plan.key, data)
    entry = kept.lookup(plan.key, data, found_by)
    if entry is not None and (entry.checked or not check):
        return entry
    top = (
        largest(params[0])
        if len(params) == 1 and params[0].ndim == plan.structure.param_ndims[0]
        else None
    )
    if check:
        if top is None or not math.isfinite(top):
            _check_finite("A", *params)
        _check_finite("weights", w)
        _check_finite("damp", d2)
    if entry is not None:
        entry.checked = True
        return entry
    keep = not (once and is_large(params[0]) and kept.new(found_by))
    copies = tuple(None if t is None else copied(t) if keep else t for t in data)
    op = plan.structure.bind(copies[: len(params)])
    root = None if w is None else w.sqrt()
    damp = None if d2 is None else d2.sqrt().expand(*d2.shape[:-1], op.shape[1]).contiguous()
    weighted = op if root is None else op.scaled(row=root)
    shift = _shift(plan, weighted, damp, top if w is None else None)
    if shift is not None:
        alpha = power(shift, op.dtype.to_real()).unsqueeze(-1)
        rows = alpha.expand(*alpha.shape[:-1], op.shape[0])
        if root is not None:  # a row of weight 0 may overflow
            rows = torch.where(root > 0, rows, 0)
        weighted = op.scaled(row=rows)
        weighted = weighted if root is None else weighted.scaled(row=root)
        damp = None if damp is None else damp * alpha
    full = plan.full_rank or (d2 is not None and bool((d2 > 0).all()))
    prepared = registry.prepare(weighted, damp, plan.options, full)
    if plan.differentiated and isinstance(prepared, PreparedAuto):
        prepared.expect_derivatives()
    entry = Entry(plan.key, copies, op, prepared, shift, checked=check)
    if keep:
        kept.keep(entry, found_by)
    return entry


def _shift(plan: Plan, op: Operator, damp: Tensor | None, top: float | None) -> Tensor | None:
    """Exponent, () or (B,), that brings [W^(1/2) A; D] to about one; None if it is moderate."""
    entries = getattr(op, "csr_values", getattr(op, "A", None))
    if entries is None or entries.numel() == 0 or plan.options.step is not None:
        return None
    core = 1 if hasattr(op, "csr_values") else 2
    real = op.dtype.to_real()
    if top is None:
        sizes = column_range(entries.reshape(*entries.shape[: entries.ndim - core], -1, 1))
    else:
        sizes = (top, top)
    if within(sizes, real) and (damp is None or within((1.0, largest(damp)), real)):
        return None
    e = exponent(entries, tuple(range(-core, 0)))
    if damp is not None and damp.numel():
        own = exponent(damp, (-1,))
        own = own.amax() if own.ndim > e.ndim else own
        e = torch.where(own == 0, e, torch.where(e == 0, own, torch.maximum(e, own)))
    return representable(-e, real) if extreme(e, real) else None


def pin(plan: Plan, params: tuple[Tensor, ...], w: Tensor | None, d2: Tensor | None) -> Entry:
    """Prepare now, and keep what was prepared as long as the returned object lives."""
    some = next((t for t in (*params, w, d2) if t is not None), None)
    with torch.no_grad(), full_precision("cpu" if some is None else some.device.type):
        base: Any = [_innermost(t) for t in params]
        w, d2 = _innermost(w), _innermost(d2)
        entry = _prepare(plan, tuple(base), w, d2, plan.check_finite)
        if isinstance(entry.prepared, PreparedAuto):
            entry.prepared.factor()
    kept.pin(entry)
    return entry


def deficiency(entry: Entry) -> bool:
    """Whether any matrix of a prepared entry may lack full column rank."""
    value = entry.prepared.deficient
    return bool(value.any()) if isinstance(value, Tensor) else bool(value)


def _innermost(t: Tensor | None) -> Tensor | None:
    if t is None:
        return None
    t = t.detach()
    if torch._C._functorch.is_functorch_wrapped_tensor(t):
        raise ValueError(
            "factorize: cannot run inside a torch.func transform. Factorise outside, or call "
            "lstsq: it shares factors between equal matrices by itself."
        )
    return t


def raw_solve(
    plan: Plan,
    params: tuple[Tensor, ...],
    w: Tensor | None,
    d2: Tensor | None,
    c: Tensor | None,
    g: Tensor | None,
    gate: Tensor | None = None,
    norms: bool = True,
    need_x: bool = True,
    check: bool | None = None,
    need_s: bool = True,
) -> tuple[Tensor, Any, Tensor]:
    """x = G^+ (A^H W c + g), s = A x - c and the info table; shapes as in ``derivatives``.

    ``norms`` marks the solve that a user asked for: input is checked (``check`` overrides that)
    and residual norms are computed; derivative solves skip what they do not need. With
    ``need_x`` false and c absent only s is wanted, and x may be left zero. With ``need_s``
    false, which says that no derivative follows, s may be None, and nothing large is copied in
    order to be found again, unless the same values come a second time.
    """
    if check is None:
        check = norms and plan.check_finite
    some: Any = c if c is not None else g
    with torch.no_grad(), full_precision(some.device.type):
        return _raw_solve(plan, params, w, d2, c, g, gate, norms, need_x, check, need_s)


def _raw_solve(plan, params, w, d2, c, g, gate, norms, need_x, check, need_s):
    global _made
    m, n = plan.structure.shape
    some = c if c is not None else g
    k = some.shape[-1]
    real = some.dtype.to_real()
    operands = (*((p, d) for p, d in zip(params, plan.structure.param_ndims)), (w, 1), (d2, 1))
    count = next((t.shape[0] for t, d in operands if t is not None and t.ndim > d), None)
    folded = count is None and any(t is not None and t.ndim == 3 for t in (c, g))
    batch = next((t.shape[0] for t in (c, g) if t is not None and t.ndim == 3), count)
    lead = () if batch is None else (batch,)
    if gate is not None and not bool(gate.any()):
        return _skipped(some, lead, m, n, k, real)
    if k == 0 or batch == 0:
        if check:
            for name, tensors in (("A", params), ("weights", (w,)), ("damp", (d2,))):
                _check_finite(name, *tensors)
        info = some.new_zeros((*lead, k, INFO), dtype=real)
        return some.new_zeros((*lead, n, k)), some.new_zeros((*lead, m, k)), info
    c_range, g_range = (None if t is None else column_range(t) for t in (c, g))
    if check:
        for name, t, size in (("b - A x0", c, c_range), ("g", g, g_range)):
            if size is not None and not math.isfinite(size[1] + size[0]):
                _check_finite(name, t)
    if folded:
        c, g = (_fold(t, batch) for t in (c, g))
    elif batch is not None:
        c, g = (t if t is None else t.expand(batch, *t.shape[-2:]) for t in (c, g))
    once = not need_s and not callable(plan.options.solver)  # a user's solver may keep its A
    entry = _prepare(plan, params, w, d2, check, once)
    if gate is not None and not deficiency(entry):
        return _skipped(some, lead, m, n, k, real)
    _made += 1
    weighted = c
    if c is not None and w is not None:
        weighted = c * w.sqrt().unsqueeze(-1)
        c_range = column_range(weighted)
    ranges = [size for size in (c_range, g_range) if size is not None]
    as_is = entry.shift is None and all(within(size, real) for size in ranges)
    adjoint = getattr(entry.prepared, "adjoint", None)
    if not need_x and c is None and w is None and adjoint is not None:
        # one Krylov run gives A G^+ g, a second one would give G^+ g
        scaled, e = (g, None) if as_is else _in_range(entry.shift, None, g)[1:3]
        result = adjoint(scaled)
        s = result.x if e is None else shifted(result.x, e)
        x = some.new_zeros((*s.shape[:-2], n, s.shape[-1]))
    else:
        x, s, result = _applied(entry, entry.prepared, w, weighted, g, as_is)
        sharp = result.sharp and s is not None
        if need_s and s is None:
            s = entry.op.mv(x)
            if c is not None:
                s = torch.sub(s, c, out=s)
        if s is not None and need_s and not sharp:
            followed = plan.differentiated or not norms
            if d2 is not None and followed and plan.options.solver in _REFINED:
                refined, s = recovered(plan, entry, w, d2, c, g, x, s, _again)
                x = x if norms else refined  # the same with and without derivatives
    found = functools.partial(residual_norms, entry.op, w, d2, c, g, x, s)
    known = found() if norms and plan.residuals else None
    info = table(x, result.status, result.iterations, known, entry.prepared, True)
    report(plan.on_failure, info, found if norms else lambda: None)
    if folded:
        x, s = (t if t is None else t.unflatten(1, (*lead, -1)).movedim(1, 0) for t in (x, s))
        info = info.unflatten(0, (*lead, -1))
    return x.contiguous(), None if s is None else s.contiguous(), info


def _applied(
    entry: Entry,
    prepared: Prepared,
    w: Tensor | None,
    c: Tensor | None,
    g: Tensor | None,
    as_is: bool,
) -> tuple[Tensor, Tensor | None, Raw]:
    """x, s if the method has it, and what it says, for W^(1/2) c and g.

    ``as_is`` says that all is of moderate size.
    """
    e = back = None
    if not as_is:
        c, g, e, back = _in_range(entry.shift, c, g)
    result = prepared.solve(c, g)
    x, s = result.x, result.image
    if s is not None and w is not None:  # of W^(1/2) A
        root = w.sqrt().unsqueeze(-1)
        s = s / root if bool((w > 0).all()) else None
    if back is not None:
        x, s = shifted(x, back), None if s is None or e is None else shifted(s, e)
    return x, s, result


def _again(entry: Entry, w: Tensor | None, g: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """G^-1 g and A G^-1 g for one more g, to a relative tolerance if that saves steps."""
    loosely = getattr(entry.prepared, "loosely", None)
    prepared = entry.prepared if loosely is None else loosely(tolerance)
    as_is = entry.shift is None and within(column_range(g), g.dtype.to_real())
    x, s, _ = _applied(entry, prepared, w, None, g, as_is)
    return x, entry.op.mv(x) if s is None else s


def _in_range(shift: Tensor | None, c: Tensor | None, g: Tensor | None) -> tuple[Any, ...]:
    """gamma c and alpha gamma g, and the exponents of 1 / gamma and of alpha / gamma."""
    some: Any = c if c is not None else g
    a = torch.zeros((), dtype=torch.int32, device=some.device) if shift is None else shift
    a = a[..., None, None]
    sizes = []
    if c is not None:
        sizes.append(exponent(c, (-2,)).unsqueeze(-2))
    if g is not None:
        own = exponent(g, (-2,)).unsqueeze(-2)
        sizes.append(torch.where(own == 0, own, own + a))
    e = sizes[0] if len(sizes) == 1 else torch.maximum(*torch.broadcast_tensors(*sizes))
    c = None if c is None else shifted(c, -e)
    return c, None if g is None else shifted(g, a - e), e, a + e


def _skipped(some, lead, m, n, k, real):
    """Zeros: G is invertible, so the terms that this solve is for vanish."""
    info = some.new_zeros((*lead, k, INFO), dtype=real)
    info[..., 0] = int(Status.SKIPPED)
    return some.new_zeros((*lead, n, k)), some.new_zeros((*lead, m, k)), info


def _fold(t: Tensor | None, batch: Any) -> Tensor | None:
    if t is None:
        return None
    t = t.expand(batch, *t.shape[-2:])
    return t.movedim(0, 1).flatten(1)


def _check_finite(name: str, *tensors: Tensor | None) -> None:
    for t in tensors:
        if t is not None and not finite(t):
            shown = "b" if name == "b - A x0" else name
            count = int((~torch.isfinite(t)).sum())
            raise NotFiniteError(
                f"lstsq: {shown} must be finite; got {count} NaN or Inf "
                f"{'entry' if count == 1 else 'entries'}"
                f"{' in b - A x0 (b alone without x0)' if shown == 'b' else ''}. "
                "Drop or repair them, or give a row "
                "weight 0 and a finite value (check_finite=False skips this check)."
            )
        if name == "weights" and t is not None and extent(t)[0] < 0:
            raise NotFiniteError("lstsq: weights must not be negative; pass weights >= 0.")
