"""From a solver's name to the code that prepares it."""

from __future__ import annotations

from torch import Tensor

from funclsq.methods import foreign
from funclsq.methods._protocol import Options, Prepared
from funclsq.methods.auto import instead_of_cholesky
from funclsq.methods.auto import prepare as prepare_auto
from funclsq.methods.cgls import prepare as prepare_cgls
from funclsq.methods.cholesky import NeedsDense
from funclsq.methods.cholesky import prepare as prepare_cholesky
from funclsq.methods.gradient_descent import prepare as prepare_gradient_descent
from funclsq.methods.lsmr import prepare as prepare_lsmr
from funclsq.methods.lsqr import prepare as prepare_lsqr
from funclsq.methods.qr import prepare as prepare_qr
from funclsq.methods.svd import prepare as prepare_svd
from funclsq.operators import Operator

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
    try:
        return _METHODS[options.solver](op, damp, options, full_rank)
    except NeedsDense:  # of cholesky alone
        return instead_of_cholesky(op, damp, options, full_rank)
