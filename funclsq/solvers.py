"""Every solver as a pure function ``solver(A, b, ...) -> Solution``, usable on its own.

Each solves min ||W^(1/2)(A x - b)||^2 + damp^2 ||x - x0||^2 as :func:`funclsq.solve` does with
that solver: same arguments, errors and derivatives. As an argument, ``lstsq(A, b, solver=qr)``
or ``solver=partial(lsmr, atol=1e-8)``, it names the method and its settings.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from funclsq.descent import gradient_descent
from funclsq.lstsq import solve
from funclsq.solution import Solution

__all__ = ["cgls", "cholesky", "gradient_descent", "lsmr", "lsqr", "qr", "svd"]


def lsmr(A: Any, b: Tensor, **settings: Any) -> Solution:
    """Minimise ||A x - b|| by LSMR: MINRES on the normal equations, ||A^H r|| falls steadily.

    Two products per iteration, all columns together. Settings: ``atol``, ``btol``, ``conlim``,
    ``maxiter``, ``scale``, ``preconditioner``, ``callback``, ``progress``, and those of
    :func:`funclsq.solve`.

    References
    ----------
    D. C.-L. Fong and M. Saunders, SIAM J. Sci. Comput. 33 (2011) 2950-2971,
    doi:10.1137/10079687X.

    Examples
    --------
    >>> import torch, funclsq as fl
    >>> A = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    >>> fl.solvers.lsmr(A, torch.tensor([1.0, 3.0], dtype=torch.float64)).x.round(decimals=9)
    tensor([2.], dtype=torch.float64)
    """
    return solve(A, b, solver="lsmr", **settings)


def lsqr(A: Any, b: Tensor, **settings: Any) -> Solution:
    """Minimise ||A x - b|| by LSQR: conjugate gradients on the normal equations, ||r|| falls.

    Settings as of :func:`lsmr`.

    References
    ----------
    C. C. Paige and M. A. Saunders, ACM Trans. Math. Softw. 8 (1982) 43-71,
    doi:10.1145/355984.355989.
    """
    return solve(A, b, solver="lsqr", **settings)


def cgls(A: Any, b: Tensor, **settings: Any) -> Solution:
    """Minimise ||A x - b|| by CGLS: the plain recurrence, least work per iteration.

    Settings as of :func:`lsmr`.

    References
    ----------
    A. Bjorck, T. Elfving and Z. Strakos, SIAM J. Matrix Anal. Appl. 19 (1998) 720-736,
    doi:10.1137/S089547989631202X.
    """
    return solve(A, b, solver="cgls", **settings)


def cholesky(A: Any, b: Tensor, **settings: Any) -> Solution:
    """Minimise ||A x - b|| by a sparse Cholesky factor of the normal equations, refined.

    As accurate as a QR factorisation where A^H A is not singular to rounding; finds small null
    spaces and the minimum-norm solution; one too large for it is left to ``qr``, or to ``lsmr``
    where A cannot be written out (``Solution.solver`` and ``why`` tell). Settings: ``backend``,
    ``rcond``, and those of :func:`funclsq.solve`.

    References
    ----------
    A. Bjorck, Linear Algebra Appl. 88/89 (1987) 31-48, doi:10.1016/0024-3795(87)90101-7.
    """
    return solve(A, b, solver="cholesky", **settings)


def qr(A: Any, b: Tensor, **settings: Any) -> Solution:
    """Minimise ||A x - b|| by a dense QR factorisation; the SVD of R where rank is lacking.

    A sparse A is written out. Settings: ``rcond``, and those of :func:`funclsq.solve`.
    """
    return solve(A, b, solver="qr", **settings)


def svd(A: Any, b: Tensor, **settings: Any) -> Solution:
    """Minimise ||A x - b|| by a dense singular value decomposition cut at the numerical rank.

    A sparse A is written out. Settings: ``rcond``, ``rank`` (an int keeps that many singular
    values), and those of :func:`funclsq.solve`.
    """
    return solve(A, b, solver="svd", **settings)


for _solver in (lsmr, lsqr, cgls, cholesky, qr, svd):
    _solver.funclsq_name = _solver.__name__  # type: ignore[attr-defined]
