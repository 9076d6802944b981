"""Least squares as torch modules: as a layer that solves, and as an objective to be minimised."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from funclsq.beneath import beneath, tracing
from funclsq.checks import from_array
from funclsq.inputs import canonical
from funclsq.lstsq import lstsq
from funclsq.lstsq import solve as _solve
from funclsq.matrix_free import LinearOperator
from funclsq.pattern import SparsityPattern
from funclsq.settings import settings
from funclsq.solution import Solution
from funclsq.sparse import Sparse

__all__ = ["LeastSquares", "Objective"]

_TRAINABLE = ("A", "b", "damp", "weights", "x0")


class LeastSquares(nn.Module):
    """The layer b -> argmin_x ||W^(1/2)(A x - b)||^2 + damp^2 ||x - x0||^2.

    Each operand is a parameter if it is named in ``trainable``, else a buffer; both move with
    ``.to()``, are saved in ``state_dict`` and can be replaced by ``torch.func.functional_call``.
    Negative entries of a trainable ``damp`` count by their size, so an optimiser may cross 0.

    Parameters
    ----------
    A : Tensor (dense or sparse), Sparse, scipy.sparse matrix or LinearOperator, shape (m, n)
        Of a sparse matrix the values of the stored entries are kept as ``A``, its pattern is
        static; of a LinearOperator the params are kept as ``A0``, ``A1``, ...
    b : Tensor, shape (m,) or (m, k), optional
        Right-hand side for calls without one.
    damp, weights, x0
        As in :func:`funclsq.lstsq`.
    trainable : str or iterable of str
        Any of ``"A"``, ``"b"``, ``"damp"``, ``"weights"``, ``"x0"``; none by default.
    **options
        Passed on to :func:`funclsq.lstsq`.

    Raises
    ------
    TypeError
        If A is no matrix.
    ValueError
        If ``trainable`` names something else, or something that was not given.

    Examples
    --------
    >>> import torch
    >>> from funclsq.nn import LeastSquares
    >>> layer = LeastSquares(torch.eye(3, 2), damp=1.0, trainable="damp")
    >>> layer(torch.ones(3)).detach()
    tensor([0.5000, 0.5000])
    >>> [name for name, _ in layer.named_parameters()]
    ['damp']
    """

    A: Tensor
    b: Tensor | None
    damp: Tensor
    weights: Tensor | None
    x0: Tensor | None

    def __init__(
        self,
        A: Any,
        b: Tensor | None = None,
        *,
        damp: float | Tensor = 0.0,
        weights: Tensor | None = None,
        x0: Tensor | None = None,
        trainable: str | Iterable[str] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        chosen = {trainable} if isinstance(trainable, str) else set(trainable)
        if not chosen <= set(_TRAINABLE):
            raise ValueError(
                f"LeastSquares: trainable takes {', '.join(_TRAINABLE)}; got "
                f"{', '.join(sorted(chosen - set(_TRAINABLE)))}."
            )
        self.pattern: SparsityPattern | None = None
        self.operator: LinearOperator | None = None
        self.options = options
        for name, tensor in self._parts(A).items():
            self._keep(name, tensor, "A" in chosen)
        like = next((t for t in (*self.parameters(), *self.buffers())), torch.empty(0))
        real = like.real.dtype if like.is_complex() else like.dtype
        damp = from_array(damp) if isinstance(damp, np.ndarray) else damp
        damp = torch.as_tensor(damp, dtype=real, device=like.device)
        for name, value in (("b", b), ("damp", damp), ("weights", weights), ("x0", x0)):
            if value is None and name in chosen:
                raise ValueError(f"LeastSquares: {name} is to be trained but was not given.")
            self._keep(name, value, name in chosen)
        self._damped = "damp" in chosen or bool((damp != 0).any())

    def _parts(self, A: Any) -> dict[str, Tensor]:
        """Split A into what is static and named tensors."""
        if isinstance(A, LinearOperator):
            self.operator = A
            return {f"A{i}": p for i, p in enumerate(A.params)}
        if hasattr(A, "tocoo"):
            A = Sparse.from_scipy(A)
        elif isinstance(A, np.ndarray):
            A = from_array(A)
        elif isinstance(A, Tensor) and A.layout != torch.strided:
            A = Sparse.from_torch(A.detach())
        if isinstance(A, Sparse):
            self.pattern = A.pattern
            return {"A": A.values}
        if not isinstance(A, Tensor):
            made = " Give Sparse(pattern, values)." if isinstance(A, SparsityPattern) else ""
            raise TypeError(
                "LeastSquares: A must be a Tensor, array, Sparse, scipy.sparse matrix or "
                f"LinearOperator; got {type(A).__name__}.{made}"
            )
        return {"A": A}

    def _keep(self, name: str, value: Tensor | None, trained: bool) -> None:
        if isinstance(value, np.ndarray):
            value = from_array(value)
        if value is not None:
            value = value.detach().clone()
        if trained:
            assert value is not None
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def matrix(self) -> Any:
        """A as :func:`funclsq.lstsq` takes it, made of the present parameters."""
        if self.operator is not None:
            params = tuple(getattr(self, f"A{i}") for i in range(len(self.operator.params)))
            op = self.operator
            return LinearOperator(op.matvec, op.shape, params, op.rmatvec)
        return self.A if self.pattern is None else Sparse(self.pattern, self.A)

    def forward(self, b: Tensor | None = None) -> Tensor:
        """Return the minimiser for this b, (m,) or (..., m, k), or for the module's own."""
        return lstsq(self.matrix, self._right(b), **self._settings())

    def solve(self, b: Tensor | None = None) -> Solution:
        """Return the minimiser and how it was found."""
        return _solve(self.matrix, self._right(b), **self._settings())

    def objective(self, x: Tensor, b: Tensor | None = None) -> Tensor:
        """||W^(1/2)(A x - b)||^2 + damp^2 ||x - x0||^2, summed over columns."""
        A, b = self.matrix, self._right(b)
        x0, weights, damp = self.x0, self.weights, self.damp
        if b.ndim == 1:  # one column
            x, b = x.unsqueeze(-1), b.unsqueeze(-1)
            x0 = None if x0 is None else x0.unsqueeze(-1)
        elif x0 is not None and x0.ndim == 1:
            x0 = x0.unsqueeze(-1)
        square = (_product(A, x) - b).abs() ** 2
        if weights is not None:
            square = (weights.unsqueeze(-1) if weights.ndim == 1 else weights) * square
        total = square.sum()
        if self._damps():
            shift = (x if x0 is None else x - x0).abs() ** 2
            total = total + ((damp.unsqueeze(-1) if damp.ndim else damp) ** 2 * shift).sum()
        return total

    def _right(self, b: Tensor | None) -> Tensor:
        b = self.b if b is None else b
        if b is None:
            raise ValueError("LeastSquares: needs a right-hand side; pass b to the call.")
        return b

    def _damps(self) -> bool:
        """Whether damp counts: one that was zero may have been replaced, loaded or filled."""
        if self._damped or self.damp.requires_grad or self.damp.is_meta or tracing():
            return self._damped or self.damp.requires_grad
        return bool((beneath(self.damp.detach()) != 0).any())

    def _settings(self) -> dict[str, Any]:
        damp = self.damp.abs() if self._damps() else 0.0
        return {"damp": damp, "weights": self.weights, "x0": self.x0, **self.options}

    def extra_repr(self) -> str:
        """Shape of A, and what is trained."""
        shape = tuple(self.matrix.shape)
        trained = ", ".join(name for name, _ in self.named_parameters()) or "none"
        return f"{shape}, trainable: {trained}"


def _product(A: Any, x: Tensor) -> Tensor:
    return A.matvec(A.params, x) if isinstance(A, LinearOperator) else A @ x


class Objective(nn.Module):
    """||W^(1/2)(A x - b)||^2 + damp^2 ||x - x0||^2 as a loss whose parameter is x.

    ``forward()`` is the loss, so any ``torch.optim`` optimiser can minimise it; the solution that
    it is on the way to is ``problem()``.

    Parameters
    ----------
    problem : LeastSquares
        With a right-hand side.
    x : Tensor, shape (n,) or (n, k), optional
        Start; the problem's x0, or zero, by default.

    Examples
    --------
    >>> import torch
    >>> from funclsq.nn import LeastSquares, Objective
    >>> loss = Objective(LeastSquares(torch.eye(3, 2), torch.ones(3)))
    >>> sgd = torch.optim.SGD([loss.x], lr=0.5)
    >>> loss().backward()
    >>> sgd.step()
    >>> loss.x.detach()
    tensor([1., 1.])
    """

    def __init__(self, problem: LeastSquares, x: Tensor | None = None) -> None:
        super().__init__()
        self.problem = problem
        b = problem._right(None)
        like = b.new_zeros(_shape_of_solution(problem))
        if x is None:
            x = like if problem.x0 is None else problem.x0
            x = x.unsqueeze(-1) if x.ndim == 1 and like.ndim > 1 and b.ndim > 1 else x
            x = x.expand_as(like)
        self.x = nn.Parameter(x.detach().clone())

    def forward(self) -> Tensor:
        """Return the loss at x."""
        return self.problem.objective(self.x)


def _shape_of_solution(problem: LeastSquares) -> tuple[int, ...]:
    """That of ``problem()``, without solving it."""
    given = {name: getattr(problem, name) for name in ("damp", "weights", "x0")}
    given = {name: None if t is None else t.detach() for name, t in given.items()}
    given["damp"] = given["damp"].abs()
    plain = settings("Objective", "lsmr")
    A, b = problem.matrix, problem._right(None)
    p = canonical("Objective", A, b, **given, options=plain, on_failure="warn", check_finite=True)
    n = p.plan.structure.shape[1]
    return (*p.lead, n) if p.vector else (*p.lead, n, p.columns)
