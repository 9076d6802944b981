"""Dense oracle for least squares and every derivative of it; shares no code with funclsq.

On the set of matrices of one rank the minimiser is a composition of products and inverses: with
rows R such that Q = (R [W A; D^2])^H spans the range of G = A^H W A + D^2 (R taken from an SVD at
the point in question, and constant),

    x = x0 + Q (Q^H G Q)^-1 Q^H A^H W (b - A x0).

Where every nearby matrix has this rank, automatic differentiation of that formula is the oracle,
without any rule for least squares. Elsewhere a gradient also has a part across the set, which
the formula cannot know; then it is the closed form of Golub and Pereyra (1973),

    A_bar = W r z^H - W A z x^H + W A G^+ (x - x0) (k - P k)^H,    z = G^+ k,

differentiated automatically once more for Hessian-vector products (``test_oracle`` in
test_derivatives.py holds both against mpmath). ``torch.linalg.inv`` is right in nested forward
mode, ``torch.linalg.solve`` is not.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from cases import Problem, as_tensors, problem_for
from torch import Tensor

_norm = torch.linalg.vector_norm

MULTIPLE = 100  # how many times the oracle's own sensitivity an error may be
_SAMPLES = 3


def _columns(p: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split into problems with one weight per row."""
    w = p.get("weights")
    if w is None or w.ndim == 1:
        return [p]
    out = []
    for j in range(w.shape[1]):
        part = {**p, "weights": w[:, j], "b": p["b"][:, j : j + 1]}
        if "x0" in p:
            part["x0"] = p["x0"][:, j : j + 1]
        out.append(part)
    return out


def _weighted(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """W A and D^2."""
    A, n = p["A"], p["A"].shape[1]
    w = p.get("weights")
    WA = A if w is None else w[:, None] * A
    damp = p.get("damp")
    D2 = torch.zeros(n, dtype=A.dtype) if damp is None else (damp**2).expand(n).to(A.dtype)
    return WA, torch.diag(D2)


def bases(p: dict[str, Tensor], rank: int) -> list[Tensor | None]:
    """R of each column's problem; None where G is invertible."""
    out = []
    for q in _columns(p):
        if rank == p["A"].shape[1]:
            out.append(None)
            continue
        U, s, _ = torch.linalg.svd(torch.vstack(_weighted(q)))
        out.append(U[:, :rank].mH / s[:rank, None])
    return out


def _pseudo_inverses(p: dict[str, Tensor], R: Tensor | None) -> tuple[Tensor, Tensor]:
    """G^+ and the projector on the range of G."""
    A = p["A"]
    WA, D2 = _weighted(p)
    G = A.mH @ WA + D2
    if R is None:
        return torch.linalg.inv(G), torch.eye(len(G), dtype=G.dtype)
    Q = (R @ torch.vstack((WA, D2))).mH
    inverse = Q @ torch.linalg.inv(Q.mH @ G @ Q) @ Q.mH
    return inverse, Q @ torch.linalg.inv(Q.mH @ Q) @ Q.mH


def _block(t: Tensor, k: int) -> Tensor:
    return t[:, None].expand(-1, k) if t.ndim == 1 else t


def _one(p: dict[str, Tensor], R: Tensor | None) -> tuple[Tensor, ...]:
    """x, x - x0, r, G^+ and P of a problem with one weight per row; blocks of columns."""
    A = p["A"]
    k = 1 if p["b"].ndim == 1 else p["b"].shape[1]
    WA, _ = _weighted(p)
    inverse, P = _pseudo_inverses(p, R)
    b = _block(p["b"], k)
    x0 = _block(p["x0"], k) if "x0" in p else torch.zeros(A.shape[1], k, dtype=A.dtype)
    step = inverse @ (WA.mH @ (b - A @ x0))
    x = x0 + step
    return x, step, b - A @ x, inverse, P


def minimiser(p: dict[str, Tensor], R: Sequence[Tensor | None]) -> Tensor:
    """x, differentiable along the set of constant rank."""
    x = torch.cat([_one(q, part)[0] for q, part in zip(_columns(p), R)], 1)
    return x[:, 0] if p["b"].ndim == 1 else x


def closed_form(p: dict[str, Tensor], R: Sequence[Tensor | None], k: Tensor) -> dict[str, Tensor]:
    """Cotangents of all operands for the cotangent k of x."""
    k = _block(k, 1)
    total: dict[str, list[Tensor]] = {n: [] for n in p}
    parts = _columns(p)
    for j, (q, part) in enumerate(zip(parts, R)):
        A = q["A"]
        kj = k if len(parts) == 1 else k[:, j : j + 1]
        x, step, r, inverse, P = _one(q, part)
        w = q["weights"][:, None] if "weights" in q else 1.0
        z = inverse @ kj
        Az = A @ z
        null = kj - P @ kj
        total["A"].append((w * r) @ z.mH - (w * Az) @ x.mH + (w * (A @ (inverse @ step))) @ null.mH)
        total["b"].append(w * Az)
        if "weights" in q:
            total["weights"].append((Az.conj() * r).real.sum(1))
        if "damp" in q:
            bar = -2 * q["damp"] * (z.conj() * step).real.sum(1)
            total["damp"].append(bar.sum() if q["damp"].ndim == 0 else bar)
        if "x0" in q:
            total["x0"].append(kj - A.mH @ (w * Az))
    out = {"A": sum(total["A"]), "b": torch.cat(total["b"], 1)}
    if "weights" in p:
        by_column = p["weights"].ndim == 2
        out["weights"] = torch.stack(total["weights"], 1) if by_column else total["weights"][0]
    if "damp" in p:
        out["damp"] = sum(total["damp"])
    if "x0" in p:
        out["x0"] = torch.cat(total["x0"], 1)
        out["x0"] = out["x0"].sum(1) if p["x0"].ndim == 1 else out["x0"]
    out["b"] = out["b"][:, 0] if p["b"].ndim == 1 else out["b"]
    return {n: out[n] for n in p}


# ---------------------------------------------------------------------------------------------
# What is expected, and how closely.


@dataclasses.dataclass(frozen=True)
class Expected:
    """A value and the absolute error (in the Frobenius norm) that is allowed."""

    value: Tensor
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Reference:
    """A problem's answers for the loss  Re <cotangent, x> + curvature/2 ||x||^2.

    ``along`` and ``other`` are directions of constant rank: dicts of tensors in the problem's
    dtype, as ``data`` and ``cotangent`` are.
    """

    problem: Problem
    dtype: torch.dtype
    data: dict[str, Tensor]
    cotangent: Tensor
    along: dict[str, Tensor]
    other: dict[str, Tensor]
    curvature: float
    x: Expected
    loss: Expected
    grad: dict[str, Expected]
    jvp: Expected
    hvp: dict[str, Expected]
    second: Expected  # d^2 x along ``along`` and ``other``


CURVATURE = 0.5


def loss(x: Tensor, cotangent: Tensor, curvature: float = CURVATURE) -> Tensor:
    """Re <cotangent, x> + curvature/2 ||x||^2."""
    return (cotangent.conj() * x).real.sum() + curvature / 2 * (x * x.conj()).real.sum()


def _gradient(
    p: dict[str, Tensor], R: Sequence[Any], c: Tensor, automatic: bool
) -> dict[str, Tensor]:
    if automatic:
        return torch.func.grad(lambda q: loss(minimiser(q, R), c))(p)
    return closed_form(p, R, c + CURVATURE * minimiser(p, R))


def _answers(data: dict[str, Any], automatic: bool) -> dict[str, Any]:
    """Everything of a Reference, from data, cotangent, directions and R."""
    p, c, along, other = data["p"], data["c"], data["along"], data["other"]
    R = data["R"]
    x, x_dot = torch.func.jvp(lambda q: minimiser(q, R), (p,), (along,))
    grad, hvp = torch.func.jvp(lambda q: _gradient(q, R, c, automatic), (p,), (along,))
    if automatic:
        push = lambda q: torch.func.jvp(lambda s: minimiser(s, R), (q,), (other,))[1]  # noqa: E731
        second = torch.func.jvp(push, (p,), (along,))[1]
    else:
        second = _second_from_pullbacks(p, R, along, other)
    return {"x": x, "loss": loss(x, c), "jvp": x_dot, "second": second, "grad": grad, "hvp": hvp}


def _second_from_pullbacks(p, R, along, other) -> Tensor:
    """Mixed second derivative of x: each entry from the pull-back of a unit cotangent."""
    shape = minimiser(p, R).shape
    units = torch.eye(shape.numel(), dtype=p["A"].dtype).view(-1, *shape)

    def entry(e: Tensor) -> Tensor:
        _, dot = torch.func.jvp(lambda q: closed_form(q, R, e), (p,), (along,))
        return sum((dot[n].conj() * other[n]).real.sum() for n in p)

    out = torch.vmap(entry)(units).to(units.dtype)
    if units.is_complex():
        out = out + 1j * torch.vmap(entry)(1j * units)
    return out.view(shape)


def _perturbed(t: Any, eps: float, generator: torch.Generator) -> Any:
    """Samples of the data with every number moved by a random relative eps."""
    if isinstance(t, dict):
        return {n: _perturbed(v, eps, generator) for n, v in t.items()}
    shape = (_SAMPLES, *t.shape)
    if t.is_complex():
        xi = torch.exp(2j * torch.pi * torch.rand(shape, generator=generator, dtype=torch.float64))
    else:
        xi = 2.0 * torch.randint(0, 2, shape, generator=generator).to(t.dtype) - 1
    return t * (1 + eps * xi)


def _flat(a: dict[str, Any]) -> dict[Any, Tensor]:
    """Answers by name, or by (name, operand)."""
    out = {}
    for n, v in a.items():
        out.update({(n, m): t for m, t in v.items()} if isinstance(v, dict) else {n: v})
    return out


@functools.cache
def reference(name: str, dtype: torch.dtype) -> Reference:
    """Answers and tolerances for a problem of the table, its data rounded to dtype."""
    p = problem_for(name, dtype)
    rng = np.random.default_rng(zlib.crc32(name.encode()) + 1)
    n, k = p.A.shape[1], p.b.shape[1:]
    cotangent = rng.standard_normal((n, *k))
    if dtype.is_complex:
        cotangent = cotangent + 1j * rng.standard_normal((n, *k))
    data = p.tensors(dtype)
    along, other = (as_tensors(p.tangent(rng), dtype) for _ in range(2))
    c = torch.from_numpy(cotangent).to(dtype)
    return make_reference(p, dtype, data, c, along, other)


def make_reference(
    p: Problem,
    dtype: torch.dtype,
    data: dict[str, Tensor],
    cotangent: Tensor,
    along: dict[str, Tensor],
    other: dict[str, Tensor],
) -> Reference:
    """Answers in double precision, and tolerances.

    What is allowed is MULTIPLE times what the oracle itself moves when it is evaluated in the
    dtype in question, its data moved by a relative eps of that dtype, and at least that many eps.
    """
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}.get(dtype, dtype)
    up = functools.partial(_cast, dtype=wide)
    point = {"p": up(data), "c": up(cotangent), "along": up(along), "other": up(other)}
    m, n = p.A.shape
    automatic = p.rank == n or (
        p.rank == m and p.damp is None and (p.weights is None or bool((p.weights > 0).all()))
    )
    R = bases(point["p"], p.rank)
    exact = _answers({**point, "R": R}, automatic)
    low = functools.partial(_cast, dtype=dtype)
    eps = torch.finfo(dtype).eps
    moved = low(_perturbed(point, eps, torch.Generator().manual_seed(1)))
    samples = torch.vmap(lambda q: _answers({**q, "R": low(R)}, automatic))(moved)
    changes = _flat(samples)

    def expect(value: Tensor, key: Any) -> Expected:
        change = (changes[key].to(value.dtype) - value)[..., None].flatten(1)
        most = torch.linalg.vector_norm(change, dim=1).max()
        return Expected(value, MULTIPLE * float(most.clamp(min=eps * float(_norm(value)))))

    return Reference(
        p,
        dtype,
        data,
        cotangent,
        along,
        other,
        CURVATURE,
        expect(exact["x"], "x"),
        expect(exact["loss"], "loss"),
        {name: expect(v, ("grad", name)) for name, v in exact["grad"].items()},
        expect(exact["jvp"], "jvp"),
        {name: expect(v, ("hvp", name)) for name, v in exact["hvp"].items()},
        expect(exact["second"], "second"),
    )


def _cast(t: Any, dtype: torch.dtype) -> Any:
    if t is None or isinstance(t, (dict, list)):
        return torch.utils._pytree.tree_map(lambda v: v if v is None else _cast(v, dtype), t)
    return t.to(dtype if t.is_complex() or not dtype.is_complex else dtype.to_real())


def check(got: Tensor, want: Expected, what: str, pull: Callable[[Tensor], Tensor] | None = None):
    """Assert that got equals what is wanted; ``pull`` maps a dense gradient to a leaf's."""
    value = want.value if pull is None else pull(want.value)
    assert tuple(got.shape) == tuple(value.shape), (what, got.shape, value.shape)
    error = float(_norm(got.to(value.dtype) - value)) if value.numel() else 0.0
    assert error <= want.tolerance, (
        f"{what}: error {error:.3e} exceeds {want.tolerance:.3e} (size {float(_norm(value)):.3e})"
    )
