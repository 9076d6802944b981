"""The call shapes of torchsparsegradutils, so that its users can switch by one import.

    from funclsq.compat import lsmr, sparse_generic_lstsq

Same arguments, same results where those are right, the documented errors raised. What is more:
wide and rank-deficient A, complex A, every sparse layout, uncoalesced entries, double backward,
column scaling, one adjoint solve instead of two, and a warning where a solve does not converge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funclsq.lstsq import lstsq as _lstsq
from funclsq.lstsq import solve as _solve
from funclsq.matrix_free import LinearOperator
from funclsq.torch_sparse import is_sparse

__all__ = ["lsmr", "sparse_generic_lstsq"]

Solver = Callable[[Tensor, Tensor], Tensor]


def sparse_generic_lstsq(
    A: Tensor, B: Tensor, lstsq: Solver | None = None, transpose_lstsq: Solver | None = None
) -> Tensor:
    """Minimise ||A X - B|| for a sparse A; gradients at the stored entries of A.

    Parameters
    ----------
    A : sparse Tensor, shape (m, n)
        COO, CSR, CSC, BSR or BSC.
    B : Tensor, shape (m,) or (m, k)
        Right-hand sides.
    lstsq : callable, optional
        ``lstsq(A, B) -> X``; :func:`funclsq.lstsq` by default.
    transpose_lstsq : callable, optional
        ``transpose_lstsq(A, G) -> Y``, the minimum-norm solution of A^H Y = G (it is given A).

    Returns
    -------
    Tensor, shape (n,) or (n, k)
        The minimiser, of minimum norm where there are several. Differentiable in A and B, any
        number of times.

    Raises
    ------
    TypeError
        If A is not a sparse tensor, or dtypes are mixed.
    ValueError
        If the shapes do not match.
    RuntimeError
        If a given solver fails or returns an unexpected shape.

    Examples
    --------
    >>> import torch
    >>> from funclsq.compat import sparse_generic_lstsq
    >>> index = torch.tensor([[0, 1, 2, 3, 4, 1, 2, 3], [0, 0, 0, 0, 1, 1, 1, 2]])
    >>> value = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 2.0, 1.0, 1.0])
    >>> A = torch.sparse_coo_tensor(index, value, (5, 3), check_invariants=True)
    >>> A = A.coalesce().requires_grad_()
    >>> sparse_generic_lstsq(A, torch.ones(5)).sum().backward()
    >>> A.grad.is_sparse, A.grad._nnz()
    (True, 8)
    """
    if not is_sparse(A):
        got = f"layout {A.layout}" if isinstance(A, Tensor) else type(A).__name__
        raise TypeError(
            f"sparse_generic_lstsq: A must be a sparse tensor; got {got}. For a dense A call "
            "funclsq.lstsq."
        )
    if not isinstance(B, Tensor) or is_sparse(B):
        raise TypeError("sparse_generic_lstsq: B must be a dense tensor.")
    if B.ndim not in (1, 2):
        raise ValueError(
            f"sparse_generic_lstsq: B must have shape (m,) or (m, k); got {tuple(B.shape)}."
        )
    if lstsq is None and transpose_lstsq is None:
        return _lstsq(A, B)
    primary = _Guarded(lstsq or _lstsq, "lstsq", False)
    adjoint = _Guarded(transpose_lstsq or _solve_transposed, "transpose_lstsq", True)
    return _lstsq(A, B, solver=primary, adjoint_solver=adjoint)


def _solve_transposed(A: Tensor, G: Tensor) -> Tensor:
    return _lstsq(_adjoint(A), G)


def _adjoint(A: Tensor) -> Tensor:
    """A^H, in COO or CSR as A is."""
    T = A.to_sparse_coo().transpose(0, 1).coalesce()
    if T.is_complex():
        T = torch.sparse_coo_tensor(
            T.indices(),
            T.values().conj().resolve_conj(),
            T.shape,
            is_coalesced=True,
            check_invariants=False,
        )
    return T if A.layout == torch.sparse_coo else T.to_sparse_csr()


@dataclasses.dataclass(frozen=True)
class _Guarded:
    """A user's solver: whatever goes wrong in it is a RuntimeError that names it."""

    solver: Solver
    name: str
    transposed: bool

    def __call__(self, A: Tensor, B: Tensor) -> Tensor:
        rows = A.shape[1]
        if self.transposed:
            A = _adjoint(A)  # it is handed A^H, and the user's function expects A
        try:
            X = self.solver(A, B)
        except Exception as error:
            raise RuntimeError(f"sparse_generic_lstsq: {self.name} failed: {error}") from error
        want = (rows, *B.shape[1:])
        got = tuple(X.shape) if isinstance(X, Tensor) else type(X).__name__
        flat = (rows,) if B.ndim == 2 and B.shape[1] == 1 else (rows, 1)
        if got != want and not (got == flat and B.shape[1:] in ((), (1,))):
            raise RuntimeError(
                f"sparse_generic_lstsq: {self.name} must return shape {want} for a right-hand side "
                f"of shape {tuple(B.shape)}; got {got}."
            )
        return X.reshape(want)


def lsmr(
    A: Tensor | Callable[[Tensor], Tensor],
    b: Tensor,
    Armat: Tensor | Callable[[Tensor], Tensor] | None = None,
    n: int | None = None,
    damp: float = 0.0,
    atol: float = 1e-6,
    btol: float = 1e-6,
    conlim: float = 1e8,
    maxiter: int | None = None,
    x0: Tensor | None = None,
    check_nonzero: bool = True,
) -> tuple[Tensor, int]:
    """Minimise ||A x - b||^2 + damp^2 ||x - x0||^2 by LSMR.

    Parameters
    ----------
    A : Tensor or callable
        Dense or sparse matrix (m, n), or v -> A v.
    b : Tensor, shape (m,) or (m, k)
        Right-hand side.
    Armat : Tensor or callable, optional
        u -> A^H u; required if A is a function, not used otherwise.
    n : int, optional
        Columns of A; required if A is a function.
    damp, atol, btol, conlim, maxiter, x0
        As in :func:`funclsq.lstsq`; these defaults are looser than its.
    check_nonzero : bool
        Has no effect: a zero right-hand side is always recognised.

    Returns
    -------
    x : Tensor, shape (n,) or (n, k)
        Differentiable in A (if it is a tensor) and b.
    iterations : int
        Of the slowest column.

    Raises
    ------
    RuntimeError
        If A or Armat is neither a tensor nor callable, or n is missing.

    Warns
    -----
    ConvergenceWarning
        If the tolerance was not met.

    Examples
    --------
    >>> import torch
    >>> from funclsq.compat import lsmr
    >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> x, iterations = lsmr(A, torch.tensor([1.0, 2.0, 3.0]))
    >>> x.shape
    torch.Size([2])
    """
    if b.ndim == 2 and b.shape[1] == 1:
        b = b.squeeze(1)
    sol = _solve(
        A if isinstance(A, Tensor) else _operator(A, b, Armat, n),
        torch.atleast_1d(b),
        solver="lsmr",
        damp=damp,
        atol=atol,
        btol=btol,
        conlim=conlim,
        maxiter=maxiter,
        x0=x0,
    )
    return sol.x, int(sol.iterations.max()) if sol.iterations.numel() else 0


def _operator(A: Any, b: Tensor, Armat: Any, n: int | None) -> LinearOperator:
    if not callable(A):
        raise RuntimeError(f"lsmr: A must be a tensor or a function; got {type(A).__name__}.")
    if n is None:
        raise RuntimeError("lsmr: n, the number of columns, is needed where A is a function.")
    if isinstance(Armat, Tensor):
        Armat = Armat.matmul
    if not callable(Armat):
        raise RuntimeError(
            f"lsmr: Armat must be a tensor or a function where A is one; got "
            f"{type(Armat).__name__}."
        )
    return LinearOperator(lambda _, v: A(v), (b.shape[0], n), rmatvec=lambda _, u: Armat(u))
