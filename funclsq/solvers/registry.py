"""From a solver's name to the code that prepares it."""

from __future__ import annotations

from torch import Tensor

from funclsq.operators import Operator
from funclsq.solvers import foreign
from funclsq.solvers._protocol import Options, Prepared
from funclsq.solvers.auto import prepare as prepare_auto
from funclsq.solvers.cgls import prepare as prepare_cgls
from funclsq.solvers.cholesky import prepare as prepare_cholesky
from funclsq.solvers.gradient_descent import prepare as prepare_gradient_descent
from funclsq.solvers.lsmr import prepare as prepare_lsmr
from funclsq.solvers.lsqr import prepare as prepare_lsqr
from funclsq.solvers.qr import prepare as prepare_qr
from funclsq.solvers.svd import prepare as prepare_svd

__all__ = ["NAMES", "prepare"]

_METHODS = {
    "auto": prepare_auto,
    "lsmr": prepare_lsmr,
    "lsqr": prepare_lsqr,
    "cgls": prepare_cgls,
    "cholesky": prepare_cholesky,
    "qr": prepare_qr,
    "svd": prepare_svd,
    "gradient_descent": prepare_gradient_descent,
}
NAMES = tuple(_METHODS)


def prepare(op: Operator, damp: Tensor | None, options: Options, full_rank: bool) -> Prepared:
    """Prepare the solver that ``options.solver`` names, or the function that it is."""
    if callable(options.solver):
        return foreign.prepare(op, damp, options, full_rank)
    return _METHODS[options.solver](op, damp, options, full_rank)
