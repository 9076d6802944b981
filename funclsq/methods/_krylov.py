"""A Krylov method made ready for one operator: damping, scaling, rank, and both kinds of solve.

solve(c, g) gives x = G^+ (A^H c + g) for G = A^H A + D^2, through B = [A; D] S:

- B of full column rank: any column scaling S is admissible, and one run of ExtendedCg or Craig
  gives z = G^-1 g with A z. Unit columns as a rule; for m < n and D > 0 S = D^-1, which leaves
  B^H B = (A S)^H A S + 1 with the one eigenvalue 1 on the null space of A S, where the right-hand
  side A^H c has no part: at most m steps, and the condition of A A^H + D^2 decides. There z comes
  from a run on (A S)^H (see _dual), as a g has a part in the null space that would drown A z;
- otherwise the least-norm solution is wanted, which only S = 1 keeps: y = A^{+H} g by a run on
  A^H, and z = A^+ y by one on A.

Which of the two holds is known for damp > 0 everywhere and on the caller's word; else, for m >= n,
it is found by a probe: a random w is sought back from A S w. Its least-norm solution lacks the
part of w in the null space, which is of size 1 unless there is none. That takes at most the time
of one solve, and saves more in every derivative.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funclsq.methods._blocks import Adjoint, even_damping, padded, units, worse
from funclsq.methods._craig import Craig
from funclsq.methods._extended_cg import ExtendedCg
from funclsq.methods._iterate import Run
from funclsq.methods._progress import reporter
from funclsq.methods._protocol import Options, Raw
from funclsq.methods._scalars import one_column, scalars_for
from funclsq.methods._verify import Answer, Settings, first_run, norms, solve_verified
from funclsq.operators import StackedOp
from funclsq.solution import Method, Status

__all__ = ["PreparedKrylov"]

_MIN_ITERATIONS = 5000
_PROBE_EVERY = 2  # steps after which the probe for the rank looks how far it is


class PreparedKrylov:
    """A Krylov method ready for min ||A x - c||^2 + ||D x||^2 and for G^+ g.

    Parameters
    ----------
    method : callable
        State of the method: ``method(op, rhs, scalars)``.
    code : Method
        Its code.
    op : operator
        A, of shape (m, n), weights folded in.
    damp : Tensor, shape (n,) or (B, n), or None
        Diagonal of D, real and not negative.
    options : Options
        Settings. ``atol`` and ``btol`` default to the rounding level, ``conlim`` to no limit,
        ``maxiter`` to max(5000, 10 min(m, n)) steps per run, ``scale`` to column scaling where
        it is admissible.
    full_rank : bool
        Whether A is known to be of full column rank.

    Attributes
    ----------
    method : int
        Code of the method.
    rank : Tensor or None
        n where full column rank is known or was found.
    cond : Tensor or None
        Estimate of the condition number of the scaled operator, once a solve was made.
    deficient : bool
        Whether B may lack full column rank.
    nbytes : int
        Memory held.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        code: Method,
        op: Any,
        damp: Tensor | None,
        options: Options,
        full_rank: bool,
    ) -> None:
        self._kind, self.method, self._options = method, int(code), options
        self._op = op
        if damp is None or not bool((damp > 0).any()):
            self._system, damped = op, False
        else:
            self._system, damped = StackedOp(op, damp), bool((damp > 0).all())
        known = full_rank or damped or op.shape[1] == 0
        m, n = self._system.shape
        self._column_norms = self._system.column_norms()
        if known:
            self._full: bool | None = True
        elif m < n or self._column_norms is None:
            self._full = False
        else:
            self._full = None  # not known yet
        self._probed = False
        self.undecided = False  # the probe for the rank was cut short
        self._damp = even_damping(damp, self._column_norms) if damped and op.shape[0] < n else None
        self._scaled: dict[str, tuple[Any, Tensor | None]] = {}
        self.cond: Tensor | None = None

    @property
    def assumed_deficient(self) -> bool:
        """What to assume of the rank before working for it: deficient unless known not to be."""
        return self._full is not True

    def with_options(self, options: Options) -> PreparedKrylov:
        """Return the same operator with other options; what was found of it is kept."""
        other = copy.copy(self)
        other._options = options
        if options.maxiter != self._options.maxiter and self._full is False and self._probed:
            other._full, other._probed, other.undecided = None, False, False  # more steps may tell
        return other

    def supposing_full_rank(self) -> PreparedKrylov:
        """Return the same operator, its columns taken as independent without a look."""
        other = copy.copy(self)
        if self._column_norms is not None:
            other._full = True
        return other

    @property
    def deficient(self) -> bool:
        """Whether B may lack full column rank."""
        if self._full is None:
            with torch.no_grad():
                self._full, self._probed = self._probe(), True
        return not self._full

    @property
    def rank(self) -> Tensor | None:
        """N where full column rank is known or was found, else None."""
        if not self._full:
            return None
        lead = () if self._system.batch is None else (self._system.batch,)
        return torch.full(lead, self._system.shape[1], dtype=torch.int64, device=self._op.device)

    @property
    def nbytes(self) -> int:
        """Memory held by scaled copies of the operator."""
        total = 0
        for scaled, _ in self._scaled.values():
            for name in ("csr_values", "A"):
                values = getattr(getattr(scaled, "op", scaled), name, None)
                if isinstance(values, Tensor):
                    total += 3 * values.numel() * values.element_size()
        return total

    def solve(self, c: Tensor | None, g: Tensor | None) -> Raw:
        """Apply x = G^+ (A^H c + g).

        Parameters
        ----------
        c : Tensor, shape (m, k) or (B, m, k), or None
            Right-hand side in the range.
        g : Tensor, shape (n, k) or (B, n, k), or None
            Right-hand side in the domain.

        Returns
        -------
        Raw
            x, and per column the status and the number of steps.
        """
        c, g = self._batched(c), self._batched(g)
        with torch.no_grad():
            if c is None and self._by_rows():
                assert g is not None
                answer, y, x = self._dual(g)
                return self._raw(x, answer)._replace(image=y, sharp=True)
            if self.deficient:
                answer, x = self._least_norm(c, g)
                return self._raw(x, answer)
            answer, unit, x = self._definite(c, g)
            image = answer.r[..., : self._op.shape[0], :] * -unit  # A x - c
            return self._raw(x, answer)._replace(image=image)

    def loosely(self, tolerance: float) -> PreparedKrylov:
        """Return the same operator, solved to a relative tolerance."""
        o = self._options
        loose = {"atol": max(tolerance, o.atol or 0.0), "btol": max(tolerance, o.btol or 0.0)}
        return self.with_options(dataclasses.replace(o, **loose))

    def adjoint(self, g: Tensor) -> Raw:
        """Apply y = A G^+ g, which is A^{+H} g for D = 0, in one run.

        Parameters
        ----------
        g : Tensor, shape (n, k) or (B, n, k)
            Right-hand side in the domain.

        Returns
        -------
        Raw
            y, shape (m, k) or (B, m, k), and per column the status and the number of steps.
        """
        with torch.no_grad():
            g = self._batched(g)
            if self._by_rows():
                answer, y, _ = self._dual(g)
            elif not self.deficient:
                answer, unit, _ = self._definite(None, g)
                y = -answer.r * unit
            else:
                answer, y = self._adjoint_least_norm(g)
            return self._raw(y[..., : self._op.shape[0], :], answer)

    def _batched(self, block: Any) -> Any:
        """Give a block the batch dimension of the operator."""
        if block is None or self._system.batch is None or block.ndim == 3:
            return block
        return block.expand(self._system.batch, *block.shape)

    def _raw(self, x: Tensor, answer: Answer) -> Raw:
        self._note(answer)
        status, iterations = (
            torch.from_numpy(a).to(x.device) for a in (answer.status, answer.iterations)
        )
        return Raw(x, status, iterations)

    def _note(self, answer: Answer) -> None:
        cond = torch.from_numpy(answer.acond).to(self._op.device)
        if cond.shape[-1] == 0:
            return
        cond = cond.amax(-1)
        if self._system.batch is None and cond.ndim:
            cond = cond.amax()
        self.cond = cond if self.cond is None else torch.maximum(self.cond, cond)

    # The four kinds of solve

    def _definite(self, c: Tensor | None, g: Tensor | None) -> tuple[Answer, Tensor, Tensor]:
        """Solve with column scaling; returns the answer for unit right-hand sides, unit, and x."""
        op, scale = self._operator(self._scaling())
        c = None if c is None else padded(c, op.shape[0])
        if g is not None and scale is not None:
            g = g * scale.unsqueeze(-1)
        unit = units(*(t for t in (c, g) if t is not None))
        answer = self._run(
            op, scale, None if c is None else c / unit, None if g is None else g / unit
        )
        x = answer.x if scale is None else answer.x * scale.unsqueeze(-1)
        return answer, unit, x * unit

    def _by_rows(self) -> bool:
        """Whether G^-1 g is found by a run on A^H."""
        o = self._options
        return self._scaling() == "damping" and o.preconditioner is None and o.callback is None

    def _dual(self, g: Tensor) -> tuple[Answer, Tensor, Tensor]:
        """Solve min ||(A S)^H y - S g||^2 + e^2 ||y||^2, e = D S: y = A G^-1 g, and G^-1 g."""
        op, scale = self._operator("damping")
        size = op.damp[..., :1]
        m, n = op.op.shape
        stacked = StackedOp(Adjoint(op.op), size.expand(*size.shape[:-1], m))
        g = g if scale is None else g * scale.unsqueeze(-1)
        unit = units(g)
        answer = self._run(stacked, None, padded(g / unit, m + n), None)
        z = (g / unit - op.op.rmv(answer.x)) / size.unsqueeze(-1) ** 2
        z = z if scale is None else z * scale.unsqueeze(-1)
        return answer, answer.x * unit, z * unit

    def _least_norm(self, c: Tensor | None, g: Tensor | None) -> tuple[Answer, Tensor]:
        """Solve without scaling: x = A^+ (c + A^{+H} g)."""
        first = None
        if g is not None:
            first, y = self._adjoint_least_norm(g)
            c = y if c is None else padded(c, y.shape[-2]) + y
        assert c is not None
        op, scale = self._operator("one")
        c = padded(c, op.shape[0])
        unit = units(c)
        answer = self._run(op, scale, c / unit, None)
        x = answer.x if scale is None else answer.x * scale.unsqueeze(-1)
        return (answer if first is None else worse(first, answer)), x * unit

    def _adjoint_least_norm(self, g: Tensor) -> tuple[Answer, Tensor]:
        """Solve min ||B^H y - g|| for the y of least norm."""
        op, scale = self._operator("one")
        unit = units(g)
        answer = self._run(Adjoint(op), None, g / unit, None)
        y = answer.x * unit
        return answer, y if scale is None else y * scale[..., :1].unsqueeze(-1)

    def _probe(self) -> bool:
        """Find whether B has full column rank: are random w the least-norm solutions for B S w."""
        op, scale = self._operator("columns")
        eps = torch.finfo(op.dtype).eps
        count, level = (1, 1e-5) if eps < 1e-10 else (3, 2e-2)
        generator = torch.Generator().manual_seed(20110)
        w = torch.randn((op.shape[1], count), generator=generator, dtype=torch.float64)
        w = w.to(device=op.device, dtype=op.dtype)
        if op.batch is not None:
            w = w.expand(op.batch, *w.shape)
        w = w.contiguous()
        states: list[Any] = []

        def watched(*arguments: Any, **keywords: Any) -> Any:
            states.append(self._kind(*arguments, **keywords))
            return states[-1]

        def near(state: dict[str, Any]) -> bool:
            if state["iteration"] % _PROBE_EVERY:
                return False
            x = states[-1].x
            return x.shape == w.shape and bool((norms(w - x) < level).all())

        settings = self._settings(op, scale, self._kind, None)
        settings = dataclasses.replace(settings, atol=eps**0.5, btol=eps**0.5)
        run: Run | Answer = first_run(
            watched, op, op.mv(w), dataclasses.replace(settings, report=near)
        )
        for again in (True, False):
            w = w - run.x
            if bool((norms(w) < level).all()):
                return True
            if (run.status == int(Status.MAXITER)).any():
                self.undecided = True
                break
            if again:  # needed where cond(B) is large
                run = solve_verified(self._kind, op, op.mv(w), None, settings)
        return False

    def _run(self, op: Any, scale: Tensor | None, c: Tensor | None, g: Tensor | None) -> Answer:
        """Run the method, or ExtendedCg (or Craig's) where there is a g, on a scaled system."""
        method = self._kind if g is None else ExtendedCg
        with reporter(self._options) as report:
            settings = self._settings(op, scale, method, report)
            if c is None:
                assert g is not None
                c = g.new_zeros((*g.shape[:-2], op.shape[0], g.shape[-1]))
                if settings.inverse is None and one_column(op, scalars_for(c)) is not None:
                    method = Craig
            return solve_verified(method, op, c, g, settings)

    def _inverse(self, scale: Tensor | None) -> Callable[[Tensor], Tensor] | None:
        """Give the preconditioner of the scaled variable: N = S A0^H A0 S."""
        preconditioner = self._options.preconditioner
        if preconditioner is None or self._full is False:
            return None  # it would change which of several minimisers is found
        if scale is None:
            return preconditioner.solve_normal
        unscale = 1 / scale.unsqueeze(-1)
        return lambda v: preconditioner.solve_normal(v * unscale).mul_(unscale)

    def _settings(self, op: Any, scale: Tensor | None, method: Any, report: Any) -> Settings:
        o = self._options
        m, n = op.shape
        eps = torch.finfo(op.dtype).eps
        if self._full:
            atol = (4.0 if method is ExtendedCg else 1.0) * eps
        else:
            # Beyond the rounding of A^H r there is only noise, and a null space to amplify it.
            atol = max(8.0, max(m, n) ** 0.5) * eps
        maxiter = max(_MIN_ITERATIONS, 10 * min(m, n)) if o.maxiter is None else o.maxiter
        return Settings(
            atol=atol if o.atol is None else max(o.atol, atol),
            btol=2.0 * eps if o.btol is None else max(o.btol, eps),
            conlim=float("inf") if o.conlim is None else o.conlim,
            maxiter=maxiter,
            eps=eps,
            definite=bool(self._full),
            report=report,
            inverse=self._inverse(scale),
        )

    def _scaling(self) -> str:
        """The kind of column scaling where any is admissible."""
        if self._options.scale is False:
            return "one"
        if self._options.scale is True or self._damp is None:
            return "columns"
        return "damping"

    def _operator(self, kind: str) -> tuple[Any, Tensor | None]:
        """B S and the diagonal of S.

        S gives unit columns, or damping of one size for all of them, or is one factor for all; the
        latter two bring the longest column to 1.
        """
        found = self._scaled.get(kind)
        if found is None:
            norm = self._column_norms
            if norm is None or norm.shape[-1] == 0:
                found = (self._system, None)
            else:
                if kind == "damping":
                    assert self._damp is not None
                    norm = self._damp * (norm / self._damp).amax(-1, keepdim=True)
                elif kind == "one":
                    norm = norm.amax(-1, keepdim=True).expand_as(norm)
                tiny = torch.finfo(norm.dtype).tiny
                usable = (norm > tiny) & torch.isfinite(norm)
                scale = torch.where(usable, 1 / norm.clamp_min(tiny), torch.ones_like(norm))
                found = (self._system.scaled(col=scale), scale)
            self._scaled[kind] = found
        return found
