"""Derivatives of least squares, of every order, from one primitive that is closed under them.

The primitive. For A (m, n) of any rank, weights w >= 0, damping d2 = damp^2 >= 0, let
W = diag(w), D2 = diag(d2), G = A^H W A + D2, and G^+ its pseudo-inverse. Then

    S(A, w, d2; c, g) = (x, s),     x = G^+ (A^H W c + g),     s = A x - c.

With g absent x solves min ||W^(1/2)(A x - c)||^2 + x^H D2 x, of all minimisers the smallest
(call it T c); with c absent it applies G^+, and s = A x. T^H k = W A G^+ k. Let P = G^+ G project
on the range of G, and suppose that the rank of G is constant near (A, w, d2). It is s that S gives,
and not A x, because with little damping and m < n it is so small beside c and A x that a difference
of theirs has no digit of it right (see `funclsq.lost_digits`).

Tangent. For a Hermitian G of constant rank (Golub & Pereyra 1973, eq. 4.12 with its symmetries)

    d(G^+) = -G^+ dG G^+  +  G^+ G^+ dG (I - P)  +  (I - P) dG G^+ G^+.

Apply it to h = A^H W c + g and write r = c - A x = -s, n_g = (I - P) g = (I - P) h, u = G^+ x. In
dG = dA^H W A + A^H dW A + A^H W dA + dD2, every factor A (I - P), dD2 (I - P) vanishes: the null
space of G is where W^(1/2) A and D2 are zero (and, the rank being constant, rows of weight 0
reach nothing new). So

    dx = S(dc - dA x,  dg + dA^H W r + A^H dW r - dD2 x + T(dA n_g)).x          (1)
         + (I - P) dA^H W A u                                                  (2)
    ds = dA x + A dx - dc,   which is the s of the solve in (1), as A (I - P) is zero.

Cotangent. For (k, k_s) let k <- k + A^H k_s, (z, A z) = S(-; k), n_k = (I - P) k. Then

    c_bar  = W A z - k_s,  g_bar = z,
    w_bar  = Re(conj(A z) r),      d2_bar = -Re(conj(z) x)         (summed over columns)
    A_bar  = (W r) z^H - (W A z - k_s) x^H                          from (1)
             + (W A u) n_k^H                                       from (2)
             + (W A G^+ z) n_g^H                                   from T(dA n_g),

A_bar at the stored entries only. All of it is finite at w = 0, where differentiating sqrt(w)
is not, and at damp = 0. The two last terms vanish where G is invertible. Whether it is, is a
property of (A, w, d2) and not of k: it is known statically (full_rank, damped), or S reports it
as data per problem, ``deficient``, and a solve gated by it costs nothing where it is zero.

One damping for all columns, d2 of length 1, has the sum of d2_bar. With m < n and g absent its
terms cancel: x = -A^H W s / d2 is in the range of A^H, z mostly is not. That x is put in, here and
in (1),

    d2_bar = Re((A z)^H W s) / d2,         -dD2 x = A^H W t,  t = s dd2 / d2,

and t, which takes the place of a dc, comes back into ds.

b, x0 and damp are composed around S: x = x0 + S(A, w, damp^2; b - A x0).x.

References
----------
G. H. Golub and V. Pereyra, SIAM J. Numer. Anal. 10 (1973) 413-432, doi:10.1137/0710036.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funclsq.batching import vmap_solve
from funclsq.beneath import beneath, tracing
from funclsq.forward_mode import nested_forward_mode, primals, unrecorded
from funclsq.function import Function
from funclsq.matrix import matmul, matmul_dot, outer, reduce_batch, rmatmul, rmatmul_dot
from funclsq.opaque import solve_op
from funclsq.plan import Plan
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
        x, s, info = output
        ctx.mark_non_differentiable(info)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(w, d2, c, g, gate, x, s, info, *params)
        ctx.save_for_forward(w, d2, c, g, gate, x, s, info, *params)

    @staticmethod
    def backward(ctx, k, k_s, _):
        w, d2, c, g, gate, x, s, info, *params = ctx.saved_tensors
        bars = _pull(
            ctx.plan, w, d2, c, g, gate, x, s, info, tuple(params), k, k_s, ctx.needs_input_grad
        )
        return None, None, *bars


class _Solve(_ReverseSolve):
    """S in every mode."""

    @staticmethod
    def jvp(ctx, *tangents):
        with nested_forward_mode():
            w, d2, c, g, gate, x, s, info, *params = primals(ctx)
            x_dot, s_dot = _push(
                ctx.plan, w, d2, c, g, gate, x, s, info, tuple(params), tangents[2:]
            )
        return x_dot, s_dot, None

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
    """S(A, w, d2; c, g) -> (x, A x - c, info), differentiable in every tensor but gate."""
    if unrecorded():
        return solve_op(params, w, d2, c, g, gate, plan.handle, primary, True)
    face = _ReverseSolve if torch.compiler.is_compiling() else _Solve
    return face.apply(plan, primary, w, d2, c, g, gate, *params)


def _pull(plan, w, d2, c, g, gate, x, s, info, params, k, k_s, needs):
    """Cotangents of (w, d2, c, g, gate, *params)."""
    count = 5 + len(params)
    if k is None and k_s is None:
        return (None,) * count
    need_w, need_d2, need_c, need_g, _, *need_params = needs[2:]
    z, az, waz_k = _adjoint(plan, w, d2, gate, params, k, k_s)
    w_bar = d2_bar = c_bar = g_bar = None
    if need_c:
        c_bar = reduce_batch(waz_k, c)
    if need_g:
        g_bar = reduce_batch(z, g)
    if need_w:
        w_bar = reduce_batch(-(az.conj() * s).real.sum(-1), w)
    if need_d2:
        d2_bar = reduce_batch(_damping_cotangent(plan, d2, g, x, s, z, _rows(w, az)), d2)
    params_bar: tuple[Tensor | None, ...] = (None,) * len(params)
    if any(need_params):
        lefts, rights = [_rows(w, s), waz_k], [-z, -x]  # these are the shorter ones, as a rule
        deficient = _deficiency(plan, info, gate)
        if deficient is not None:
            au = _image_of_inverse(plan, w, d2, x, deficient, params)
            if au is not None:
                k = _total(plan, params, k, k_s)
                lefts.append(_rows(w, au))
                rights.append(_null(plan, params, w, d2, k, z, az, deficient, info))
            if g is not None and au is not None:
                n_g = _null_of_g(plan, w, d2, c, g, x, s, params, deficient, info)
                agz = _image_of_inverse(plan, w, d2, z, deficient, params)
                lefts.append(_rows(w, agz))
                rights.append(n_g)
        U, V = _columns(lefts), _columns(rights)
        params_bar = outer(plan.structure, params, U, V)
    return w_bar, d2_bar, c_bar, g_bar, None, *params_bar


def _adjoint(plan, w, d2, gate, params, k, k_s):
    """z = G^+ (k + A^H k_s), A z, W A z - k_s (s of one solve where nothing divides k_s)."""
    m, n = plan.structure.shape
    if k_s is None or w is not None or d2 is None or m >= n:
        z, az, _ = solve(plan, w, d2, None, _total(plan, params, k, k_s), gate, params)
        waz = _rows(w, az)
        return z, az, waz if k_s is None else waz - _gated(gate, k_s)
    z, rest, _ = solve(plan, w, d2, k_s, k, gate, params)
    return z, rest + _gated(gate, k_s), rest


def _total(plan, params, k, k_s):
    """Return k + A^H k_s."""
    return k if k_s is None else _plus(rmatmul(plan.structure, params, k_s), k)


def _push(plan, w, d2, c, g, gate, x, s, info, params, tangents):
    """Tangents of (x, s) for tangents of (w, d2, c, g, gate, *params)."""
    w_dot, d2_dot, c_dot, g_dot, _, *params_dot = tangents
    structure = plan.structure
    first, second = c_dot, g_dot
    deficient = null_term = share = None
    if any(t is not None for t in params_dot):
        params_dot = tuple(
            torch.zeros_like(p) if t is None else t for p, t in zip(params, params_dot)
        )
        first = _plus(-matmul_dot(structure, params, params_dot, x), first)
        second = _plus(-rmatmul_dot(structure, params, params_dot, _rows(w, s)), second)
        deficient = _deficiency(plan, info, gate)
    if w_dot is not None:
        second = _plus(-rmatmul(structure, params, _rows(w_dot, s)), second)
    if d2_dot is not None:
        share, rest = _damping_tangent(plan, d2, d2_dot, g, x, s)
        first = first if share is None else _plus(share, first)
        second = second if rest is None else _plus(rest, second)
    if deficient is not None:
        if g is not None:
            n_g = _null_of_g(plan, w, d2, c, g, x, s, params, deficient, info)
            moved_null = matmul_dot(structure, params, params_dot, n_g)
            correction, _, _ = solve(plan, w, d2, moved_null, None, deficient, params)
            second = _plus(correction, second)
        _, au, _ = solve(plan, w, d2, None, x, deficient, params)
        v = rmatmul_dot(structure, params, params_dot, _rows(w, au))
        null_term = _null(plan, params, w, d2, v, None, None, deficient, info)
    if first is None and second is None:
        return None, None
    x_dot, s_dot, _ = solve(plan, w, d2, first, second, gate, params)
    if share is not None:  # it stands for a part of g_dot
        s_dot = s_dot + share
    if null_term is not None:
        x_dot = x_dot + null_term
        s_dot = s_dot + matmul(structure, params, null_term)
    return x_dot, s_dot


def _cancelling(plan, d2, g):
    """Whether the sum over z^H x may cancel, as one damping for all columns has it."""
    m, n = plan.structure.shape
    return g is None and d2.shape[-1] == 1 and m < n


def _damping_cotangent(plan, d2, g, x, s, z, waz):
    """-Re(conj(z) x) summed over columns, and over all of x where d2 is one number."""
    terms = -(z.conj() * x).real.sum(-1)
    if d2.shape[-1] == 1:
        terms = terms.sum(-1, keepdim=True)
    if not _cancelling(plan, d2, g):
        return terms
    positive = d2 > 0
    other = (waz.conj() * s).real.sum((-2, -1)).unsqueeze(-1)
    return torch.where(positive, other / torch.where(positive, d2, 1), terms)


def _damping_tangent(plan, d2, d2_dot, g, x, s):
    """What a tangent of d2 adds to c_dot and to g_dot; None for nothing."""
    if not _cancelling(plan, d2, g):
        return None, -d2_dot.unsqueeze(-1) * x
    positive = d2 > 0
    share = torch.where(positive, d2_dot / torch.where(positive, d2, 1), 0)
    share = share.unsqueeze(-1) * s
    if _is_zero(~positive):
        return share, None
    return share, -torch.where(positive, 0, d2_dot).unsqueeze(-1) * x


def _image_of_inverse(plan, w, d2, v, gate, params):
    """A G^+ v; None where the gate, or what the solver finds, says that it is not needed.

    Where nothing records and no transform watches (a backward pass inside forward mode has a
    tangent to carry), by the cheaper solve that does not give G^+ v itself.
    """
    if not unrecorded():
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


def _null_of_g(plan, w, d2, c, g, x, s, params, deficient, info):
    """n_g = (I - P) g; where c is present x is not G^+ g alone."""
    if c is not None:
        x = s = None
    return _null(plan, params, w, d2, g, x, s, deficient, info)


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


def _gated(gate: Tensor | None, t: Tensor) -> Tensor:
    return t if gate is None else gate[..., None, None] * t


def _plus(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else b + a


def _columns(blocks: list[Tensor]) -> Tensor:
    """Blocks of columns side by side, shared ones repeated over the batch.

    Single columns are stored one after the other, which are copied at a third of the time (and are
    taken apart again without a copy).
    """
    if any(b.ndim > 2 for b in blocks):
        lead = broadcast_shapes(*(b.shape[:-2] for b in blocks))
        blocks = [b.expand(*lead, *b.shape[-2:]) for b in blocks]
    if all(b.shape[-1] == 1 for b in blocks):
        return torch.cat([b.mT for b in blocks], -2).mT
    return torch.cat(blocks, -1)
