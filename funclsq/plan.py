"""A plan: what is static about a solve, that is structure, settings and what is known of the rank.

There is one plan for each content, so that plans are compared by identity, and a number that finds
it again where only numbers may be passed (a traced graph).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import secrets
import threading
import weakref
from typing import Any

from funclsq.kept import Key
from funclsq.methods._protocol import Options

__all__ = ["Plan", "plan_of_handle"]

_PLANS = 32

_lock = threading.RLock()
# from where no other process begins: a handle in an exported program must not fit anything here
_counter = itertools.count(secrets.randbits(40) << 20)
_plans: collections.OrderedDict[Any, Plan] = collections.OrderedDict()
_by_handle: weakref.WeakValueDictionary[int, Plan] = weakref.WeakValueDictionary()


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
    residuals : bool
        Whether the user reads residual norms and condition number; if not, the norms are computed
        for a failure only, the condition number for derivatives with a null space only.
    differentiated : bool
        Whether derivatives are likely to follow: a method that is chosen may be another one.
    """

    structure: Any
    options: Options
    full_rank: bool = False
    damped: bool = False
    on_failure: str = "warn"
    check_finite: bool = True
    residuals: bool = True
    differentiated: bool = False
    handle: int = dataclasses.field(default_factory=lambda: next(_counter), compare=False)

    @property
    def nonsingular(self) -> bool:
        """Whether G is known to be invertible before anything is computed."""
        return self.full_rank or self.damped

    @functools.cached_property
    def key(self) -> Key:
        """What a prepared method depends on besides values."""
        return Key(self.structure, self.options, self.full_rank)

    def with_derivatives(self) -> Plan:
        """Return the same plan, derivatives to follow."""
        return self if self.differentiated else Plan.of(*self.__reduce__()[1][:-1], True)

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
            "SparsityPattern (or the matrix) alive as long as the traced function; a program "
            "saved by torch.export runs in the process that exported it only."
        )
    return plan
