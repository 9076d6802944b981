"""One raw solve, on plain tensors: what the derivative rules and the JAX callback both call.

    x = G^+ (A^H W c + g),   G = A^H W A + diag(d2),   ax = A x.

A *plan* is what is static about a solve: structure, settings, what is known of the rank. The
method prepared for given values (a factorisation, above all) is kept by content: the same
pattern with equal values finds it again, in torch or from a JAX callback, under every
transform. Nothing is keyed on identity, so nothing can be stale.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor

from funclsq.errors import ConvergenceError, ConvergenceWarning
from funclsq.methods import registry
from funclsq.methods._protocol import Options, Prepared
from funclsq.operators import Operator
from funclsq.range import exponent, extreme, moderate, power, representable, safe_norm, shifted
from funclsq.solution import Status, describe

__all__ = ["Plan", "clear_cache", "raw_solve", "solver_calls"]

INFO = 8  # status, iterations, residual, normal residual, rank, cond, deficient, method
_PLANS = 32
_CACHE_ENTRIES = 16
_CACHE_BYTES = 2 << 30

_lock = threading.RLock()
_counter = itertools.count(1)
_plans: collections.OrderedDict[Any, Plan] = collections.OrderedDict()
_by_handle: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()
_prepared: collections.OrderedDict[int, _Entry] = collections.OrderedDict()
_pinned: weakref.WeakSet[_Entry] = weakref.WeakSet()
_made = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The static part of a solve.

    Parameters
    ----------
    structure : SparseStructure, DenseStructure or MatrixFreeStructure
        What A is.
    options : Options
        Solver and settings.
    full_rank : bool
        A is known to have full column rank (by the user's word).
    damped : bool
        damp > 0 everywhere is known statically.
    on_failure : {"warn", "raise", "ignore"}
        What an unconverged solve does.
    check_finite : bool
        Whether NaN and Inf in the input are errors.
    """

    structure: Any
    options: Options
    full_rank: bool = False
    damped: bool = False
    on_failure: str = "warn"
    check_finite: bool = True
    handle: int = dataclasses.field(default_factory=lambda: next(_counter), compare=False)

    @property
    def nonsingular(self) -> bool:
        """Whether G is known to be invertible before anything is computed."""
        return self.full_rank or self.damped

    def __reduce__(self) -> tuple[Any, ...]:
        fields = [f.name for f in dataclasses.fields(self) if f.name != "handle"]
        return Plan.of, tuple(getattr(self, name) for name in fields)

    @classmethod
    def of(cls, *args: Any) -> Plan:
        """Return the one plan with this content."""
        with _lock:
            plan = _plans.get(args)
            if plan is None:
                plan = cls(*args)
                _plans[args] = plan
                _by_handle[plan.handle] = plan
                while len(_plans) > _PLANS:
                    _plans.popitem(last=False)
            else:
                _plans.move_to_end(args)
            return plan


def plan_of_handle(handle: int) -> Plan:
    """Return the live plan with this handle."""
    plan = _by_handle.get(handle)
    if plan is None:
        raise RuntimeError(
            "funclsq: the sparsity pattern of a traced solve no longer exists. Keep the "
            "SparsityPattern (or the matrix) alive as long as the traced function."
        )
    return plan


@dataclasses.dataclass(eq=False)
class _Entry:
    key: Any
    data: tuple[Tensor | None, ...]
    op: Operator
    prepared: Prepared
    lock: threading.RLock
    shift: Tensor | None = None  # the method was prepared for 2^shift [W^(1/2) A; D]

    @property
    def nbytes(self) -> int:
        own = sum(t.numel() * t.element_size() for t in self.data if t is not None)
        return own + int(self.prepared.nbytes)


def clear_cache() -> None:
    """Forget every kept factorisation."""
    with _lock:
        _prepared.clear()


def solver_calls() -> int:
    """Number of times that a solver has been run in this process (gated calls not counted)."""
    return _made


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _prepare(plan: Plan, params: tuple[Tensor, ...], w: Tensor | None, d2: Tensor | None) -> _Entry:
    """Find or make the method prepared for these values."""
    key = (plan.structure, plan.options, plan.full_rank)
    data = (*params, w, d2)
    with _lock:
        candidates = [(i, e) for i, e in reversed(_prepared.items()) if e.key == key]
        candidates += [(-1, e) for e in _pinned if e.key == key]
    for index, entry in candidates:
        if len(entry.data) == len(data) and all(map(_same, entry.data, data)):
            with _lock:
                if index in _prepared:
                    _prepared.move_to_end(index)
            return entry
    kept = tuple(None if t is None else t.detach().clone() for t in data)
    op = plan.structure.bind(kept[: len(params)])
    root = None if w is None else w.sqrt()
    damp = None if d2 is None else d2.sqrt()
    weighted = op if root is None else op.scaled(row=root)
    shift = _shift(plan, weighted, damp)
    if shift is not None:
        alpha = power(shift, _real_dtype(op.dtype)).unsqueeze(-1)
        rows = alpha.expand(*alpha.shape[:-1], op.shape[0])
        if root is not None:  # a row of weight 0 may overflow
            rows = torch.where(root > 0, rows, 0)
        weighted = op.scaled(row=rows)
        weighted = weighted if root is None else weighted.scaled(row=root)
        damp = None if damp is None else damp * alpha
    full = plan.full_rank or (d2 is not None and bool((d2 > 0).all()))
    prepared = registry.prepare(weighted, damp, plan.options, full)
    entry = _Entry(key, kept, op, prepared, threading.RLock(), shift)
    with _lock:
        _prepared[next(_counter)] = entry
        total = sum(e.nbytes for e in _prepared.values())
        while len(_prepared) > 1 and (len(_prepared) > _CACHE_ENTRIES or total > _CACHE_BYTES):
            _, old = _prepared.popitem(last=False)
            total -= old.nbytes
    return entry


def _shift(plan: Plan, op: Operator, damp: Tensor | None) -> Tensor | None:
    """Exponent, () or (B,), that brings [W^(1/2) A; D] to about one; None if it is moderate."""
    entries = getattr(op, "csr_values", getattr(op, "A", None))
    if entries is None or entries.numel() == 0 or plan.options.step is not None:
        return None
    core = 1 if hasattr(op, "csr_values") else 2
    e = exponent(entries, tuple(range(-core, 0)))
    if damp is not None and damp.numel():
        own = exponent(damp, (-1,))
        own = own.amax() if own.ndim > e.ndim else own
        e = torch.where(own == 0, e, torch.where(e == 0, own, torch.maximum(e, own)))
    real = _real_dtype(op.dtype)
    return representable(-e, real) if extreme(e, real) else None


def pin(plan: Plan, params: tuple[Tensor, ...], w: Tensor | None, d2: Tensor | None) -> _Entry:
    """Prepare now, and keep what was prepared as long as the returned object lives."""
    with torch.no_grad():
        base: Any = [_innermost(t) for t in params]
        w, d2 = _innermost(w), _innermost(d2)
        if plan.check_finite:
            _check_finite(plan, base, w, d2, None, None)
        entry = _prepare(plan, tuple(base), w, d2)
    with _lock:
        _pinned.add(entry)
    return entry


def deficiency(entry: _Entry) -> bool:
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
) -> tuple[Tensor, Tensor, Tensor]:
    """x = G^+ (A^H W c + g), ax = A x and the info table; shapes as in ``derivatives``.

    ``norms`` marks the solve that a user asked for: input is checked, residual norms are
    computed, and failure is reported; derivative solves skip what they do not need. With
    ``need_x`` false and c absent only ax is wanted, and x may be left zero.
    """
    with torch.no_grad():
        return _raw_solve(plan, params, w, d2, c, g, gate, norms, need_x)


def _raw_solve(plan, params, w, d2, c, g, gate, norms, need_x):
    global _made
    m, n = plan.structure.shape
    some = c if c is not None else g
    k = some.shape[-1]
    real = _real_dtype(some.dtype)
    operands = (*((p, d) for p, d in zip(params, plan.structure.param_ndims)), (w, 1), (d2, 1))
    count = next((t.shape[0] for t, d in operands if t is not None and t.ndim > d), None)
    folded = count is None and any(t is not None and t.ndim == 3 for t in (c, g))
    batch = next((t.shape[0] for t in (c, g) if t is not None and t.ndim == 3), count)
    lead = () if batch is None else (batch,)
    if gate is not None and not bool(gate.any()):
        return _skipped(some, lead, m, n, k, real)
    if norms and plan.check_finite:
        _check_finite(plan, params, w, d2, c, g)
    if k == 0 or batch == 0:
        info = some.new_zeros((*lead, k, INFO), dtype=real)
        return some.new_zeros((*lead, n, k)), some.new_zeros((*lead, m, k)), info
    if folded:
        c, g = (_fold(t, batch) for t in (c, g))
    elif batch is not None:
        c, g = (t if t is None else t.expand(batch, *t.shape[-2:]) for t in (c, g))
    entry = _prepare(plan, params, w, d2)
    if gate is not None and not deficiency(entry):
        return _skipped(some, lead, m, n, k, real)
    _made += 1
    weighted = c if c is None or w is None else c * w.sqrt().unsqueeze(-1)
    adjoint = getattr(entry.prepared, "adjoint", None)
    if not need_x and c is None and w is None and adjoint is not None:
        _, g, e, _ = _in_range(entry.shift, None, g)
        result = adjoint(g)  # one Krylov run gives A G^+ g, a second one would give G^+ g
        ax = result.x if e is None else shifted(result.x, e)
        x = some.new_zeros((*ax.shape[:-2], n, ax.shape[-1]))
        result = result._replace(x=x)
    else:
        c_in, g_in, _, back = _in_range(entry.shift, weighted, g)
        result = entry.prepared.solve(c_in, g_in)
        if back is not None:
            result = result._replace(x=shifted(result.x, back))
        x = result.x
        ax = entry.op.mv(x)
    info = _info(entry, result, w, d2, c, g, ax, norms, real)
    if norms or plan.on_failure == "raise":
        _report(plan, info)
    if folded:
        x, ax = (t.unflatten(1, (*lead, -1)).movedim(1, 0) for t in (x, ax))
        info = info.unflatten(0, (*lead, -1))
    return x.contiguous(), ax.contiguous(), info


def _in_range(shift: Tensor | None, c: Tensor | None, g: Tensor | None) -> tuple[Any, ...]:
    """gamma c and alpha gamma g, and the exponents of 1 / gamma and of alpha / gamma."""
    some: Any = c if c is not None else g
    if shift is None and all(t is None or moderate(t) for t in (c, g)):
        return c, g, None, None
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
    return t.movedim(0, 1).reshape(t.shape[1], -1)


def _real_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype


def _info(entry, result, w, d2, c, g, ax, norms, real):
    x = result.x
    info = x.new_empty((*x.shape[:-2], x.shape[-1], INFO), dtype=real)
    info[..., 0] = result.status.to(real)
    info[..., 1] = result.iterations.to(real)
    if norms:
        r = -ax if c is None else c - ax
        weighted = r if w is None else r * w.unsqueeze(-1)
        info[..., 2] = safe_norm(r if w is None else r * w.sqrt().unsqueeze(-1))
        normal = entry.op.rmv(weighted)
        if g is not None:
            normal = normal + g
        if d2 is not None:
            normal = normal - d2.unsqueeze(-1) * x
        info[..., 3] = safe_norm(normal)
    else:
        info[..., 2:4] = torch.nan
    prepared = entry.prepared
    for slot, value, absent in (
        (4, prepared.rank, -1.0),
        (5, prepared.cond, torch.nan),
        (6, assumed_deficient(prepared), 1.0),
        (7, prepared.method, 0.0),
    ):
        if value is None:
            info[..., slot] = absent
        else:
            value = torch.as_tensor(value, device=info.device).to(real)
            info[..., slot] = value.unsqueeze(-1) if value.ndim else value
    if not norms:
        return info
    bad = ~(torch.isfinite(x).all(-2) & torch.isfinite(info[..., 2]))
    info[..., 0] = torch.where(bad, float(Status.NONFINITE), info[..., 0])
    return info


def assumed_deficient(prepared: Any) -> Any:
    """What to say of the rank without working for it: a Krylov method may not know yet."""
    assumed = getattr(prepared, "assumed_deficient", None)
    return prepared.deficient if assumed is None else assumed


def _check_finite(plan, params, w, d2, c, g) -> None:
    names = ("A", "weights", "damp", "b - A x0", "g")
    for name, tensors in zip(names, (params, (w,), (d2,), (c,), (g,))):
        for t in tensors:
            if t is not None and not bool(torch.isfinite(t).all()):
                shown = "b" if name == "b - A x0" else name
                count = int((~torch.isfinite(t)).sum())
                raise ValueError(
                    f"lstsq: {shown} must be finite; got {count} NaN or Inf "
                    f"{'entry' if count == 1 else 'entries'}"
                    f"{' in b - A x0 (b alone without x0)' if shown == 'b' else ''}. "
                    "Drop or repair them, or give a row "
                    "weight 0 and a finite value (check_finite=False skips this check)."
                )
    if w is not None and bool((w < 0).any()):
        raise ValueError("lstsq: weights must not be negative; pass weights >= 0.")


def _report(plan: Plan, info: Tensor) -> None:
    if plan.on_failure == "ignore":
        return
    codes = info[..., 0].reshape(-1)
    good = torch.zeros_like(codes, dtype=torch.bool)
    for status in Status:
        if status.converged:
            good |= codes == int(status)
    if bool(good.all()):
        return
    text = describe(info[..., 0], info[..., 1], info[..., 2], info[..., 3])
    if plan.on_failure == "raise":
        raise ConvergenceError(text)
    warnings.warn(text, ConvergenceWarning, stacklevel=2)
