"""A matrix that is only a pair of functions, differentiable in their parameters."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from funclsq.operators import ScaledOp

__all__ = ["LinearOperator", "MatrixFreeOp", "MatrixFreeStructure"]

Matvec = Callable[[tuple[Tensor, ...], Tensor], Tensor]


class LinearOperator:
    """A x given by a function that is linear in x: v -> matvec(params, v).

    Differentiable in ``params``, however they enter ``matvec``. Nothing that ``matvec`` closes
    over is differentiated: pass it through ``params``.

    Parameters
    ----------
    matvec : callable
        ``matvec(params, v)`` with v of shape (n,) or (n, k); returns A v, (m,) or (m, k).
    shape : tuple of int
        ``(m, n)``.
    params : tuple of Tensor
        What the entries of A depend on.
    rmatvec : callable, optional
        ``rmatvec(params, u)`` = A^H u with u of shape (m,) or (m, k). By default it is derived
        from ``matvec`` by reverse-mode differentiation. One that is given is tested once:
        ``<u, A v> = <A^H u, v>`` must hold for a random pair.

    Raises
    ------
    TypeError
        If ``matvec`` is not callable, or one of ``params`` is not a tensor.

    Examples
    --------
    >>> import torch, funclsq as fl
    >>> t = torch.linspace(0, 1, 5, dtype=torch.float64)
    >>> def matvec(params, v):
    ...     (rate,) = params
    ...     return torch.stack([torch.exp(-rate * t), torch.ones_like(t)], 1) @ v
    >>> rate = torch.tensor(2.0, dtype=torch.float64)
    >>> A = fl.LinearOperator(matvec, (5, 2), (rate,))
    >>> fl.lstsq(A, 3 * torch.exp(-2 * t) + 1).round(decimals=6)
    tensor([3., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        matvec: Matvec,
        shape: tuple[int, int],
        params: Any = (),
        rmatvec: Matvec | None = None,
    ) -> None:
        if not callable(matvec):
            raise TypeError(f"LinearOperator: matvec must be callable; got {type(matvec)}.")
        m, n = (int(s) for s in shape)
        if isinstance(params, Tensor):
            params = (params,)
        for p in params:
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"LinearOperator: params must be tensors; got {type(p)}. Close over what is "
                    "not differentiated."
                )
        self.matvec, self.shape, self.params, self.rmatvec = matvec, (m, n), tuple(params), rmatvec

    def structure(self, dtype: torch.dtype, device: torch.device) -> MatrixFreeStructure:
        """Return the static part of this operator, for data of this dtype and device."""
        ndims = tuple(p.ndim for p in self.params)
        return MatrixFreeStructure(self.matvec, self.rmatvec, self.shape, ndims, dtype, device)

    def __repr__(self) -> str:
        return f"LinearOperator(shape={self.shape}, params={len(self.params)})"


class MatrixFreeStructure:
    """Static half of a LinearOperator; equal where the functions are the same objects."""

    kind = "matrix_free"

    def __init__(
        self,
        matvec: Matvec,
        rmatvec: Matvec | None,
        shape: tuple[int, int],
        param_ndims: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.matvec, self.rmatvec, self.shape = matvec, rmatvec, shape
        self.param_ndims, self.dtype, self.device = param_ndims, dtype, device
        self._key = (matvec, rmatvec, shape, param_ndims, dtype, device)
        self._tested = rmatvec is None
        self._lock = threading.Lock()

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MatrixFreeStructure) and self._key == other._key

    def bind(self, params: tuple[Tensor, ...]) -> MatrixFreeOp:
        """Attach parameters."""
        op = MatrixFreeOp(self, params)
        with self._lock:
            if not self._tested and op.batch is None:
                _dot_test(op)
                self._tested = True
        return op

    def call(self, f: Matvec, params: tuple[Tensor, ...], v: Tensor, rows: int) -> Tensor:
        """Run a user function on a block of columns, over a batch by vmap; check its shape."""
        dims = tuple(0 if p.ndim > d else None for p, d in zip(params, self.param_ndims))
        if all(d is None for d in dims):
            if v.ndim == 3:
                count, _, k = v.shape
                out = self.call(f, params, v.movedim(0, 1).flatten(1), rows)
                return out.reshape(rows, count, k).movedim(1, 0)
            single = v.shape[-1] == 1
            out = f(params, v[:, 0] if single else v)
            want = (rows,) if single else (rows, v.shape[-1])
            if not isinstance(out, Tensor) or tuple(out.shape) != want:
                got = tuple(out.shape) if isinstance(out, Tensor) else type(out)
                raise ValueError(
                    f"LinearOperator: for an input of shape {tuple(v.shape[: 2 - single])} the "
                    f"function must return shape {want}; got {got}."
                )
            return out.unsqueeze(-1) if single else out
        inner = 0 if v.ndim == 3 else None
        return torch.vmap(lambda p, t: self.call(f, p, t, rows), in_dims=(dims, inner), out_dims=0)(
            params, v
        )


class MatrixFreeOp:
    """A matrix-free operator on plain tensors."""

    def __init__(self, structure: MatrixFreeStructure, params: tuple[Tensor, ...]) -> None:
        self.structure, self.params = structure, params
        self.shape, self.dtype, self.device = structure.shape, structure.dtype, structure.device
        sizes = (p.shape[0] for p, d in zip(params, structure.param_ndims) if p.ndim > d)
        self.batch = next(sizes, None)

    def mv(self, X: Tensor, out: Tensor | None = None) -> Tensor:
        """Y = A X."""
        s = self.structure
        if self.shape[1] == 0 or X.shape[-1] == 0:
            Y = X.new_zeros((*X.shape[:-2], s.shape[0], X.shape[-1]))
        else:
            Y = s.call(s.matvec, self.params, X, s.shape[0]).detach()
        return Y.clone() if out is None else out.copy_(Y)  # it may be X, or be written over

    def rmv(self, Y: Tensor, out: Tensor | None = None) -> Tensor:
        """X = A^H Y."""
        s = self.structure
        if s.rmatvec is not None:
            X = s.call(s.rmatvec, self.params, Y, s.shape[1]).detach()
        else:
            lead = Y.shape[:-2] if self.batch is None else (self.batch,)
            with recording():
                v = Y.new_zeros((*lead, s.shape[1], Y.shape[-1]), requires_grad=True)
                image = s.call(s.matvec, self.params, v, s.shape[0])
                if not image.requires_grad:
                    raise ValueError(
                        "LinearOperator: matvec cannot be differentiated by torch, so rmatvec "
                        "cannot be derived from it. Pass rmatvec."
                    )
                (X,) = torch.autograd.grad(image, v, Y.expand_as(image))
        return X.clone() if out is None else out.copy_(X)

    def scaled(self, row: Tensor | None = None, col: Tensor | None = None) -> ScaledOp:
        """Return diag(row) A diag(col)."""
        return ScaledOp(self, row, col)

    def column_norms(self) -> None:
        """Not known."""
        return None


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Let autograd record inside a raw kernel, where the dispatcher has switched it off."""
    keys = torch._C.DispatchKey
    with torch._C._PreserveDispatchKeyGuard(), torch.enable_grad():
        for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        for name in ("AutogradCPU", "AutogradCUDA", "AutogradOther"):
            torch._C._dispatch_tls_set_dispatch_key_excluded(getattr(keys, name), False)
        yield


def _dot_test(op: MatrixFreeOp) -> None:
    m, n = op.shape
    if m == 0 or n == 0:
        return
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(m, 1, generator=generator, dtype=op.dtype).to(op.device)
    v = torch.randn(n, 1, generator=generator, dtype=op.dtype).to(op.device)
    Av, Ahu = op.mv(v), op.rmv(u)
    left, right = torch.vdot(u[:, 0], Av[:, 0]), torch.vdot(Ahu[:, 0], v[:, 0])
    size = max(
        float(u.abs().T @ Av.abs()),
        float(Ahu.abs().T @ v.abs()),
        torch.finfo(op.dtype).tiny,
    )
    error = abs(complex(left - right)) / size
    if not math.isfinite(error) or error > 100 * max(m, n) ** 0.5 * torch.finfo(op.dtype).eps:
        raise ValueError(
            "LinearOperator: rmatvec must be the adjoint of matvec: <u, A v> = <A^H u, v>; for a "
            f"random pair they differ by {error:.1e} of their size. Correct rmatvec, or leave it "
            "out to have it derived from matvec."
        )


def _vjp(f: Callable[..., Any], *primals: Tensor) -> tuple[Any, Any]:
    """torch.func.vjp without auxiliary output, which its type leaves open."""
    return torch.func.vjp(f, *primals)  # type: ignore[return-value]


# What the derivative rules need of a matrix-free operator, in terms of torch.func.


def apply(s: Any, params: tuple[Tensor, ...], v: Tensor) -> Tensor:
    """A v, differentiable."""
    return s.call(s.matvec, params, v, s.shape[0])


def apply_adjoint(s: Any, params: tuple[Tensor, ...], u: Tensor) -> Tensor:
    """A^H u, differentiable."""
    if s.rmatvec is not None:
        return s.call(s.rmatvec, params, u, s.shape[1])
    batched = u.ndim == 3 or any(p.ndim > d for p, d in zip(params, s.param_ndims))
    lead: tuple[int, ...] = ()
    if batched:
        sizes = [p.shape[0] for p, d in zip(params, s.param_ndims) if p.ndim > d]
        lead = (sizes[0] if sizes else u.shape[0],)
    zero = torch.zeros((*lead, s.shape[1], u.shape[-1]), dtype=u.dtype, device=u.device)
    image, pull = _vjp(lambda v: apply(s, params, v), zero)
    return pull(u.expand_as(image))[0]


def pull_params(f: Callable[..., Tensor], params: tuple[Tensor, ...], cotangent: Tensor):
    """Cotangents of params under params -> f(params)."""
    image, pull = _vjp(lambda *p: f(p), *params)
    return pull(cotangent.expand_as(image))


def push_params(
    f: Callable[..., Tensor], params: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]
) -> Tensor:
    """Tangent of f(params): the transpose of the pull-back, so no forward mode is nested."""
    filled = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(params, tangents))
    image, pull = _vjp(lambda *p: f(p), *params)
    _, push = _vjp(pull, torch.zeros_like(image))
    return push(filled)[0]
