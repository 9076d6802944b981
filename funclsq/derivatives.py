"""Derivatives of least squares, of every order, from one primitive that is closed under them.

The primitive. For A (m, n) of any rank, weights w >= 0, damping d2 = damp^2 >= 0, let
W = diag(w), D2 = diag(d2), G = A^H W A + D2, and G^+ its pseudo-inverse. Then

    S(A, w, d2; c, g) = (x, A x),     x = G^+ (A^H W c + g).

With g absent x solves min ||W^(1/2)(A x - c)||^2 + x^H D2 x, of all minimisers the smallest
(call it T c); with c absent it applies G^+. T^H k = W A G^+ k. Let P = G^+ G project on the range
of G, and suppose that the rank of G is constant near (A, w, d2).

Tangent. For a Hermitian G of constant rank (Golub & Pereyra 1973, eq. 4.12 with its symmetries)

    d(G^+) = -G^+ dG G^+  +  G^+ G^+ dG (I - P)  +  (I - P) dG G^+ G^+.

Apply it to h = A^H W c + g and write r = c - A x, n_g = (I - P) g = (I - P) h, u = G^+ x. In
dG = dA^H W A + A^H dW A + A^H W dA + dD2, every factor A (I - P), dD2 (I - P) vanishes: the null
space of G is where W^(1/2) A and D2 are zero (and, the rank being constant, rows of weight 0
reach nothing new). So

    dx = S(dc - dA x,  dg + dA^H W r + A^H dW r - dD2 x + T(dA n_g)).x          (1)
         + (I - P) dA^H W A u                                                  (2)
    d(A x) = dA x + A dx.

Cotangent. For (k, k_ax) let k <- k + A^H k_ax, (z, A z) = S(-; k), n_k = (I - P) k. Then

    c_bar  = W A z,       g_bar = z,
    w_bar  = Re(conj(A z) r),      d2_bar = -Re(conj(z) x)         (summed over columns)
    A_bar  = (W r) z^H - (W A z) x^H + k_ax x^H                     from (1)
             + (W A u) n_k^H                                       from (2)
             + (W A G^+ z) n_g^H                                   from T(dA n_g),

A_bar at the stored entries only. All of it is finite at w = 0, where differentiating sqrt(w)
is not, and at damp = 0. The two last terms vanish where G is invertible. Whether it is, is a
property of (A, w, d2) and not of k: it is known statically (full_rank, damped), or S reports it
as data per problem, ``deficient``, and a solve gated by it costs nothing where it is zero.

b, x0 and damp are composed around S: x = x0 + S(A, w, damp^2; b - A x0).x.

References
----------
G. H. Golub and V. Pereyra, SIAM J. Numer. Anal. 10 (1973) 413-432, doi:10.1137/0710036.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from funclsq.batching import vmap_solve
from funclsq.beneath import beneath, tracing
from funclsq.forward_mode import nested_forward_mode, primals, transformed
from funclsq.matrix import matmul, matmul_dot, outer, reduce_batch, rmatmul, rmatmul_dot
from funclsq.opaque import solve_op
from funclsq.raw import Plan
from funclsq.shapes import broadcast_shapes
from funclsq.solution import METHODS, Method, Status

__all__ = ["solve"]

_SLOT_COND, _SLOT_DEFICIENT, _SLOT_METHOD = 5, 6, 7


class _ReverseSolve(Function):
    """S with its reverse rule only: the face for torch.compile."""

    @staticmethod
    def forward(plan, primary, w, d2, c, g, gate, *params):
        return solve_op(params, w, d2, c, g, gate, plan.handle, primary, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.plan, _, w, d2, c, g, gate, *params = inputs
        x, ax, info = output
        ctx.mark_non_differentiable(info)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w, d2, c, g, gate, x, ax, info, *params)
        ctx.save_for_forward(w, d2, c, g, gate, x, ax, info, *params)

    @staticmethod
    def backward(ctx, k, k_ax, _):
        w, d2, c, g, gate, x, ax, info, *params = ctx.saved_tensors
        bars = _pull(
            ctx.plan, w, d2, c, g, gate, x, ax, info, tuple(params), k, k_ax, ctx.needs_input_grad
        )
        return None, None, *bars


class _Solve(_ReverseSolve):
    """S in every mode."""

    @staticmethod
    def jvp(ctx, *tangents):
        with nested_forward_mode():
            w, d2, c, g, gate, x, ax, info, *params = primals(ctx)
            x_dot, ax_dot = _push(
                ctx.plan, w, d2, c, g, gate, x, ax, info, tuple(params), tangents[2:]
            )
        return x_dot, ax_dot, None

    @staticmethod
    def vmap(batch, in_dims, plan, primary, *tensors):
        def call(w, d2, c, g, gate, *params):
            return solve(plan, w, d2, c, g, gate, params, primary)

        out = vmap_solve(batch.batch_size, in_dims[2:], plan.structure.param_ndims, tensors, call)
        return out, (0, 0, 0)


def solve(
    plan: Plan,
    w: Tensor | None,
    d2: Tensor | None,
    c: Tensor | None,
    g: Tensor | None,
    gate: Tensor | None,
    params: tuple[Tensor, ...],
    primary: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """S(A, w, d2; c, g) -> (x, A x, info), differentiable in every tensor but gate."""
    face = _ReverseSolve if torch.compiler.is_compiling() else _Solve
    return face.apply(plan, primary, w, d2, c, g, gate, *params)


def _pull(plan, w, d2, c, g, gate, x, ax, info, params, k, k_ax, needs):
    """Cotangents of (w, d2, c, g, gate, *params)."""
    count = 5 + len(params)
    if k is None and k_ax is None:
        return (None,) * count
    need_w, need_d2, need_c, need_g, _, *need_params = needs[2:]
    structure = plan.structure
    if k_ax is not None:
        pulled = rmatmul(structure, params, k_ax)
        k = pulled if k is None else k + pulled
    z, az, _ = solve(plan, w, d2, None, k, gate, params)
    waz = _rows(w, az)
    r = -ax if c is None else c - ax
    w_bar = d2_bar = c_bar = g_bar = None
    if need_c:
        c_bar = reduce_batch(waz, c)
    if need_g:
        g_bar = reduce_batch(z, g)
    if need_w:
        w_bar = reduce_batch((az.conj() * r).real.sum(-1), w)
    if need_d2:
        d2_bar = reduce_batch(-(z.conj() * x).real.sum(-1), d2)
    params_bar: tuple[Tensor | None, ...] = (None,) * len(params)
    if any(need_params):
        lefts, rights = [_rows(w, r), -waz], [z, x]
        if k_ax is not None:
            lefts.append(k_ax)
            rights.append(x)
        deficient = _deficiency(plan, info, gate)
        if deficient is not None:
            au = _image_of_inverse(plan, w, d2, x, deficient, params)
            if au is not None:
                lefts.append(_rows(w, au))
                rights.append(_null(plan, params, w, d2, k, z, az, deficient, info))
            if g is not None and au is not None:
                n_g = _null_of_g(plan, w, d2, c, g, x, ax, params, deficient, info)
                agz = _image_of_inverse(plan, w, d2, z, deficient, params)
                lefts.append(_rows(w, agz))
                rights.append(n_g)
        U, V = _columns(lefts), _columns(rights)
        params_bar = outer(structure, params, U, V)
    return w_bar, d2_bar, c_bar, g_bar, None, *params_bar


def _push(plan, w, d2, c, g, gate, x, ax, info, params, tangents):
    """Tangents of (x, A x) for tangents of (w, d2, c, g, gate, *params)."""
    w_dot, d2_dot, c_dot, g_dot, _, *params_dot = tangents
    structure = plan.structure
    first, second = c_dot, g_dot
    moved = any(t is not None for t in params_dot)
    r = -ax if c is None else c - ax
    deficient = null_term = adx = None
    if moved:
        params_dot = tuple(
            torch.zeros_like(p) if t is None else t for p, t in zip(params, params_dot)
        )
        adx = matmul_dot(structure, params, params_dot, x)
        first = -adx if first is None else first - adx
        second = _plus(second, rmatmul_dot(structure, params, params_dot, _rows(w, r)))
        deficient = _deficiency(plan, info, gate)
    if w_dot is not None:
        second = _plus(second, rmatmul(structure, params, _rows(w_dot, r)))
    if d2_dot is not None:
        second = _plus(second, -d2_dot.unsqueeze(-1) * x)
    if deficient is not None:
        if g is not None:
            n_g = _null_of_g(plan, w, d2, c, g, x, ax, params, deficient, info)
            moved_null = matmul_dot(structure, params, params_dot, n_g)
            correction, _, _ = solve(plan, w, d2, moved_null, None, deficient, params)
            second = _plus(second, correction)
        _, au, _ = solve(plan, w, d2, None, x, deficient, params)
        v = rmatmul_dot(structure, params, params_dot, _rows(w, au))
        null_term = _null(plan, params, w, d2, v, None, None, deficient, info)
    if first is None and second is None:
        return None, None
    x_dot, ax_dot, _ = solve(plan, w, d2, first, second, gate, params)
    if null_term is not None:
        x_dot = x_dot + null_term
        ax_dot = ax_dot + matmul(structure, params, null_term)
    if adx is not None:
        ax_dot = ax_dot + adx
    return x_dot, ax_dot


def _image_of_inverse(plan, w, d2, v, gate, params):
    """A G^+ v; None where the gate, or what the solver finds, says that it is not needed.

    Where nothing records and no transform watches (a backward pass inside forward mode has a
    tangent to carry), by the cheaper solve that does not give G^+ v itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed():
        return solve(plan, w, d2, None, v, gate, params)[1]
    _, image, info = solve_op(params, w, d2, None, v, gate, plan.handle, False, False)
    return None if _is_zero(info[..., 0] != Status.SKIPPED) else image


def _null(plan, params, w, d2, v, z, az, deficient, info):
    """(I - P) v, zero where G is invertible; z = G^+ v and A z, or None where nobody has them.

    v - A^H W A z - D2 z leaves eps cond^2 |v| of the range behind. A second projection, by S,
    leaves eps cond of what it is given; it is made where a kept factor makes it cheap. Where the
    first one is worse than nothing, S is given v itself.
    """
    if z is None:
        z, az, _ = solve(plan, w, d2, None, v, deficient, params)
    out = v - rmatmul(plan.structure, params, _rows(w, az))
    if d2 is not None:
        out = out - d2.unsqueeze(-1) * z
    if _factored(info):
        moderate = info[..., _SLOT_COND] < torch.finfo(info.dtype).eps ** -0.375
        out = torch.where(moderate.unsqueeze(-2), out, v)
        image = matmul(plan.structure, params, out)
        damped = None if d2 is None else d2.unsqueeze(-1) * out
        out = out - solve(plan, w, d2, image, damped, deficient, params)[0]
    return deficient.to(out.dtype)[..., None, None] * out


def _null_of_g(plan, w, d2, c, g, x, ax, params, deficient, info):
    """n_g = (I - P) g; where c is present x is not G^+ g alone."""
    if c is not None:
        x = ax = None
    return _null(plan, params, w, d2, g, x, ax, deficient, info)


def _deficiency(plan: Plan, info: Tensor, gate: Tensor | None) -> Tensor | None:
    """1 per problem that may lack full column rank; None where none can."""
    if plan.nonsingular or info.shape[-2] == 0:
        return None
    flag = info[..., 0, _SLOT_DEFICIENT]
    if gate is not None:
        flag = flag * gate
    return None if _is_zero(flag) else flag


def _factored(info: Tensor) -> bool:
    """Whether a factor is kept, so that one more solve costs little; True where none can see."""
    code = info[..., _SLOT_METHOD] % METHODS  # the Method; the rest says why it was taken
    direct = (code == Method.cholesky) | (code == Method.qr) | (code == Method.svd)
    return not _is_zero(direct)


def _is_zero(flag: Tensor) -> bool:
    """Whether the data under every transform is zero; False where data cannot be seen."""
    if tracing():
        return False
    try:
        flag = flag.detach()
    except RuntimeError:  # a batch of autograd's own vmap (is_grads_batched) is opaque
        return False
    return not bool((beneath(flag) != 0).any())


def _rows(w: Tensor | None, t: Tensor) -> Tensor:
    return t if w is None else w.unsqueeze(-1) * t


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _columns(blocks: list[Tensor]) -> Tensor:
    """Blocks of columns side by side, shared ones repeated over the batch."""
    lead = broadcast_shapes(*(b.shape[:-2] for b in blocks))
    return torch.cat([b.expand(*lead, *b.shape[-2:]) for b in blocks], -1)
