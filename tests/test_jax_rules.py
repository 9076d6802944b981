"""The rules of the JAX primitives, one by one and not compiled: against NumPy and differences."""

from __future__ import annotations

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import numpy as np
from jax_common import assert_close

import funclsq as fl
import funclsq.jax as flj
from funclsq.jax.bridge import mechanism
from funclsq.jax.nullspace import null_part
from funclsq.jax.primitive import Operands, Problem, S
from funclsq.jax.products import fan, mv, rmv, sddmm
from funclsq.jax.structures import Static
from funclsq.jax.term import ADJOINT, FORWARD
from funclsq.methods._protocol import Options
from funclsq.raw import INFO

pytestmark = pytest.mark.usefixtures("x64_module")


def _draw(seed, *shape, dtype=complex):
    rng = np.random.default_rng(seed)
    real = rng.standard_normal(shape)
    return real + 1j * rng.standard_normal(shape) if dtype is complex else real


def _close(got, want, **tolerance):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), **{"rtol": 1e-10, **tolerance})


def _inner(a, b):
    """The pairing of tangents and cotangents in JAX."""
    return (np.asarray(a) * np.asarray(b)).sum().real


# ---------------------------------------------------------------------------------------------
# Products.

PATTERN = fl.SparsityPattern([2, 0, 1, 2, 2, 4], [1, 2, 0, 1, 2, 2], (5, 3))  # (2, 1) twice


def _dense(values):
    A = np.zeros((*values.shape[:-1], 5, 3), values.dtype)
    for e, (i, j) in enumerate(zip(PATTERN.row, PATTERN.col)):
        A[..., i, j] += values[..., e]
    return A


def _mv(a, v):
    return _dense(a) @ v


def _rmv(a, u):
    return np.swapaxes(_dense(a).conj(), -1, -2) @ u


def _sddmm(u, v):
    return (u[..., PATTERN.row, :] * v[..., PATTERN.col, :]).sum(-1)


PRODUCTS = {
    "mv": (mv, _mv, (6,), (3, 2)),
    "rmv": (rmv, _rmv, (6,), (5, 2)),
    "sddmm": (sddmm, _sddmm, (5, 2), (3, 2)),
}


@pytest.mark.parametrize("dtype", [float, complex])
@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_and_their_derivatives(kind, dtype):
    f, dense, *shapes = PRODUCTS[kind]
    args, steps, others = (
        tuple(_draw(2 * seed + i, *s, dtype=dtype) for i, s in enumerate(shapes))
        for seed in range(3)
    )
    k = _draw(9, *dense(*args).shape, dtype=dtype)

    def g(*args):
        return f(PATTERN, *args)

    _close(g(*args), dense(*args))
    # linear in each operand, or in its conjugate
    parts = [dense(steps[0], args[1]), dense(args[0], steps[1])]
    _close(jax.jvp(g, args, steps)[1], sum(parts))
    bars = jax.vjp(g, *args)[1](k)
    for slot in range(2):

        def alone(t, slot=slot):
            return g(*(t if i == slot else other for i, other in enumerate(args)))

        _close(jax.jvp(alone, args[slot : slot + 1], steps[slot : slot + 1])[1], parts[slot])
        _close(_inner(bars[slot], steps[slot]), _inner(k, parts[slot]))
        _close(jax.vjp(alone, args[slot])[1](k)[0], bars[slot])
    # both derivatives again: the rules are closed
    twice = jax.jvp(lambda *a: jax.jvp(g, a, steps)[1], args, steps)[1]
    _close(twice, 2 * dense(*steps))
    second = jax.vjp(lambda k, *a: jax.vjp(g, *a)[1](k), k, *args)[1](steps)
    _close(second[0], sum(parts))
    _close(_inner(second[1], others[0]), _inner(k, dense(others[0], steps[1])))
    _close(_inner(second[2], others[1]), _inner(k, dense(steps[0], others[1])))


@pytest.mark.parametrize("kind", ["mv", "rmv"])
def test_one_matrix_or_one_block_for_a_whole_batch(kind):
    f, dense, *shapes = PRODUCTS[kind]
    a, v = (_draw(i, 4, *shape) for i, shape in enumerate(shapes))
    _close(f(PATTERN, a, v[0]), dense(a, v[0]))
    _close(f(PATTERN, a[0], v), dense(a[0], v))
    _close(f(PATTERN, a, v), dense(a, v))


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 2), (None, 1)], ids=str)
def test_batches_of_products(kind, axes):
    f, dense, *shapes = PRODUCTS[kind]
    args, members = [], []
    for seed, (shape, axis) in enumerate(zip(shapes, axes)):
        t = _draw(seed, 4, *shape)
        axis = None if axis is None else min(axis, len(shape))
        members.append(t if axis is not None else np.broadcast_to(t[0], t.shape))
        args.append(t[0] if axis is None else np.moveaxis(t, 0, axis))
    axes = tuple(a if a is None else min(a, len(s)) for a, s in zip(axes, shapes))
    want = np.stack([dense(*pair) for pair in zip(*members)])
    got = jax.vmap(lambda a, v: f(PATTERN, a, v), axes)(*args)
    _close(got, want)
    twice = jax.vmap(jax.vmap(lambda a, v: f(PATTERN, a, v), axes), (None, 0))
    v = np.stack([args[1], 2 * args[1], -args[1]])
    _close(twice(args[0], v), np.stack([want, 2 * want, -want]))
    twice = jax.vmap(jax.vmap(lambda a, v: f(PATTERN, a, v), axes), (0, None))
    _close(twice(np.stack([args[0], args[0] * 3]), args[1]), np.stack([want, 3 * want]))


SEVERAL = (-FORWARD, ADJOINT, FORWARD, -ADJOINT)


def _several(a, *blocks):
    return fan(PATTERN, a, blocks, SEVERAL)


def _several_dense(a, *blocks):
    A = jnp.zeros((5, 3), a.dtype).at[PATTERN.row, PATTERN.col].add(a)
    v, u, w, y = blocks
    return [-A @ v, A.conj().T @ u, A @ w, -A.conj().T @ y]


def _several_drawn(seed, dtype, batch=()):
    shapes = [(6,), (3, 2), (5, 1), (3, 1), (5, 2)]
    return [
        jnp.asarray(_draw(10 * seed + i, *batch, *s, dtype=dtype)) for i, s in enumerate(shapes)
    ]


@pytest.mark.parametrize("moving", [(0,), (1, 4), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("dtype", [float, complex])
def test_several_products_at_once(dtype, moving):
    """A fan and the sampled products of its derivative, to second order."""
    args, steps, others = (_several_drawn(seed, dtype) for seed in range(3))
    chosen, steps, others = (tuple(t[i] for i in moving) for t in (args, steps, others))

    def derivatives(f):
        def g(*some):
            return f(*(dict(enumerate(args)) | dict(zip(moving, some))).values())

        out, pull = jax.vjp(g, *chosen)
        k = [jnp.cos(t) for t in out]
        k[-1] = jnp.zeros_like(k[-1])

        def pulled(*some):
            return jax.vjp(g, *some)[1](k)

        return {
            "value": out,
            "jvp": jax.jvp(g, chosen, steps)[1],
            "vjp": pull(k),
            "one of them": jax.vjp(lambda *some: g(*some)[1], *chosen)[1](k[1]),
            "forward twice": jax.jvp(lambda *t: jax.jvp(g, t, steps)[1], chosen, others)[1],
            "forward over reverse": jax.jvp(pulled, chosen, steps)[1],
            "reverse twice": jax.vjp(lambda k: pull(k), k)[1](steps),
            "reverse over reverse": jax.vjp(pulled, *chosen)[1](steps),
        }

    assert_close(derivatives(_several), derivatives(_several_dense))


@pytest.mark.parametrize("axes", [(None, 0, None, 1, 0), (0, None, 0, 1, None), (0,) * 5], ids=str)
def test_batches_of_several_products(axes):
    members = _several_drawn(0, complex, (4,))
    args = [t[0] if d is None else jnp.moveaxis(t, 0, d) for t, d in zip(members, axes)]
    want = jax.vmap(_several_dense, axes)(*args)
    assert_close(jax.vmap(_several, axes)(*args), want)
    pulled = lambda f: lambda *t: jax.vjp(f, *t)[1]([jnp.sin(y) for y in f(*t)])  # noqa: E731
    got, want = (jax.vmap(pulled(f), axes)(*args) for f in (_several, _several_dense))
    assert_close(got, want)
    nested = [jax.vmap(jax.vmap(f, axes), (0, *(None,) * 4)) for f in (_several, _several_dense)]
    args[0] = jnp.stack([args[0], 2 * args[0]])
    assert_close(*(f(*args) for f in nested))


def test_a_sampled_product_of_zeros_does_not_look_at_the_rest():
    """Where the rules multiply by zeros, what they are multiplied with may not be finite."""
    a, *blocks = _several_drawn(0, float)
    k = [jnp.zeros((5, 2)), jnp.ones((3, 1)), jnp.zeros((5, 1)), jnp.zeros((3, 2))]
    blocks[0] = blocks[0] * jnp.nan
    lazy = lambda a: fan(PATTERN, a, blocks, SEVERAL, lazy=True)  # noqa: E731
    (got,) = jax.vjp(lazy, a)[1](k)
    _close(got, _sddmm(np.asarray(blocks[1]), np.asarray(k[1])))
    none = [jnp.zeros_like(t) for t in k]
    assert not np.any(jax.vjp(lazy, a)[1](none)[0])
    zeros = [jnp.zeros_like(t) for t in blocks]
    got = fan(PATTERN, a * jnp.nan, zeros, SEVERAL, lazy=True)
    assert not any(np.any(t) for t in got)


# ---------------------------------------------------------------------------------------------
# Solves.

M, N = 6, 4
WHOLE = fl.SparsityPattern(*np.divmod(np.arange(M * N), N), (M, N))


def _deficient(dtype=complex, damped=False):
    """A function of (L, R, b, w, x0), L R of rank 2, and the same by numpy."""
    args = [_draw(0, M, 2, dtype=dtype), _draw(1, 2, N, dtype=dtype), _draw(2, M, dtype=dtype)]
    args += [np.abs(_draw(3, M, dtype=float)) + 0.5, _draw(4, N, dtype=dtype)]
    damp = np.array([0.8, 0.0, 0.0, 0.0]) if damped else np.zeros(N)
    how = {"damp": damp} if damped else {}

    def ours(L, R, b, w, x0):
        A = flj.Sparse(WHOLE, (L @ R).reshape(-1))
        return flj.lstsq(A, b, weights=w, x0=x0, solver="svd", **how)

    def oracle(L, R, b, w, x0):
        A, s = L @ R, np.sqrt(w)
        B = np.concatenate((s[:, None] * A, np.diag(damp)))
        return x0 + np.linalg.pinv(B, rcond=1e-9)[:, :M] @ (s * (b - A @ x0))

    return ours, oracle, args


def _damped(dtype=complex):
    """A function of (values, b, w, damp, x0) of full rank."""
    args = [_draw(0, M * N, dtype=dtype), _draw(1, M, dtype=dtype)]
    args += [np.abs(_draw(2, M, dtype=float)) + 0.5, np.array(0.7), _draw(3, N, dtype=dtype)]

    def ours(values, b, w, damp, x0):
        return flj.lstsq(flj.Sparse(WHOLE, values), b, weights=w, damp=damp, x0=x0, solver="svd")

    def oracle(values, b, w, damp, x0):
        A, s = values.reshape(M, N), np.sqrt(w)
        B = np.concatenate((s[:, None] * A, damp * np.eye(N)))
        return x0 + np.linalg.pinv(B)[:, :M] @ (s * (b - A @ x0))

    return ours, oracle, args


SOLVES = {
    "deficient": _deficient,
    "partly damped": lambda: _deficient(damped=True),
    "damped": _damped,
}


def _difference(f, args, steps, size):
    """Central difference of the fourth order."""

    def at(t):
        return np.asarray(f(*(a + t * size * s for a, s in zip(args, steps))))

    return (8 * (at(1) - at(-1)) - at(2) + at(-2)) / (12 * size)


@pytest.mark.parametrize("name", SOLVES)
def test_first_and_second_derivatives_of_a_solve(name):
    f, oracle, args = SOLVES[name]()
    args = tuple(args)
    _close(f(*args), oracle(*args), rtol=1e-9)
    k = _draw(9, N)
    steps = tuple(
        _draw(10 + i, *np.shape(a), dtype=complex if np.iscomplexobj(a) else float)
        for i, a in enumerate(args)
    )

    def pulled(*args):
        return jax.vjp(f, *args)[1](k)

    def slope(*args):
        return _difference(oracle, args, steps, 1e-3)

    bars = pulled(*args)
    for slot in range(len(args)):
        along = tuple(s if i == slot else np.zeros_like(s) for i, s in enumerate(steps))
        want = _difference(oracle, args, along, 1e-3)
        _close(jax.jvp(f, args, along)[1], want, rtol=1e-6, atol=1e-6)
        _close(_inner(bars[slot], steps[slot]), _inner(k, want), rtol=1e-6, atol=1e-6)
    want = _difference(slope, args, steps, 1e-3)
    loose = {"rtol": 1e-5, "atol": 1e-5}
    _close(jax.jvp(lambda *a: jax.jvp(f, a, steps)[1], args, steps)[1], want, **loose)
    for second in (jax.jvp(pulled, args, steps)[1], jax.vjp(pulled, *args)[1](steps)):
        _close(sum(map(_inner, second, steps)), _inner(k, want), **loose)


def test_second_derivatives_with_a_row_of_weight_zero():
    """Also in that weight, which the residual of a row without weight decides."""
    args = [_draw(i, *s, dtype=float) for i, s in enumerate([(M, 2), (2, N), (M,), (M,), (N,)])]
    args[3] = np.array([1.0, 0.0, 2.0, 0.5, 1.5, 0.8])
    args = tuple(args)
    steps = tuple(_draw(10 + i, *t.shape, dtype=float) for i, t in enumerate(args))
    f = _deficient(float)[0]

    def oracle(L, R, b, w, x0):
        H = L.T * w
        z = np.linalg.solve(H @ L, H @ (b - L @ (R @ x0)))
        return x0 + R.T @ np.linalg.solve(R @ R.T, z)

    def slope(*args):
        return _difference(oracle, args, steps, 1e-3)

    want = _difference(slope, args, steps, 1e-3)
    got = jax.jvp(lambda *a: jax.jvp(f, a, steps)[1], args, steps)[1]
    _close(got, want, rtol=1e-5, atol=1e-5)


NULLS = {"a": 0, "w": 1, "d2": 0, "g": 2, "gate": 0}


@pytest.mark.parametrize("mapped", ["", "g", "gate", "a gate", "w g", "a w d2 g gate"])
def test_what_a_solve_cannot_see(mapped):
    members, names = _members(3), mapped.split()
    problem = Problem(Static(WHOLE), Options(solver="svd"), how=mechanism())

    def part(a, w, d2, g, gate):
        return null_part(problem, Operands((a,), (), w, d2, None, g, gate))

    def plain(a, w, d2, g, gate):
        A = a.reshape(M, N)
        G = A.conj().T @ (w[:, None] * A) + np.diag(d2)
        return gate * (g - np.linalg.pinv(G, rcond=1e-9) @ (G @ g))

    axes = tuple(axis if name in names else None for name, axis in NULLS.items())
    chosen = [members[name] for name in NULLS]
    args = [t[0] if d is None else np.moveaxis(t, 0, d) for t, d in zip(chosen, axes)]
    every = [np.stack([t[0]] * 3) if d is None else t for t, d in zip(chosen, axes)]
    want = np.stack([plain(*one) for one in zip(*every)])
    batched = jax.vmap(part, axes) if names else part

    def f(v):
        return batched(*args[:3], v, args[4])

    _close(f(args[3]), want if names else want[0], rtol=1e-8, atol=1e-9)
    step, k = _draw(7, *args[3].shape), _draw(8, *f(args[3]).shape)
    _close(jax.jvp(f, (args[3],), (step,))[1], f(step))
    _close(_inner(jax.vjp(f, args[3])[1](k)[0], step), _inner(k, f(step)))


def test_a_member_that_is_not_finite_spoils_its_own_gradient_only():
    A = _draw(0, 3, 5, 2, dtype=float) @ _draw(1, 3, 2, 4, dtype=float)
    b = jnp.asarray(_draw(2, 3, 5, 1, dtype=float))
    gradient = jax.grad(lambda A: jnp.sin(flj.lstsq(A, b, on_failure="ignore")).sum())
    want = jax.grad(lambda A: jnp.sin(jnp.linalg.pinv(A, rtol=1e-9) @ b).sum())(jnp.asarray(A))
    got = gradient(jnp.asarray(A).at[1, 2, 3].set(np.nan))
    assert np.isnan(got[1]).all()
    _close(got[0], want[0])
    _close(got[2], want[2])


def test_gradients_in_double_precision_of_a_single_precision_problem():
    A = jnp.asarray(_draw(0, 5, 2, dtype=float) @ _draw(1, 2, 4, dtype=float), jnp.float32)
    b = jnp.asarray(_draw(2, 5, dtype=float), jnp.float32)
    same = {"rcond": 1e-5, "solver": "svd"}
    double = lambda A: jnp.sin(flj.lstsq(A, b, compute_dtype="float64", **same)).sum()  # noqa: E731
    wide = lambda A: jnp.sin(flj.lstsq(A, b.astype(float), **same)).sum()  # noqa: E731
    got, want = jax.grad(double)(A), jax.grad(wide)(A.astype(float))
    assert got.dtype == np.float32
    _close(got, want, rtol=0, atol=2e-7 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("damp", [1e-6, 0.0])
def test_a_small_damping_of_a_wide_problem_loses_no_digits_of_the_derivative(damp):
    A, b, k = _draw(0, N, M), _draw(1, N), _draw(2, M)
    G = A @ A.conj().T + damp**2 * np.eye(N)
    want = -2 * damp * A.conj().T @ np.linalg.solve(G, np.linalg.solve(G, b))

    def f(damp):
        return flj.lstsq(A, b, damp=damp, solver="svd")

    _close(jax.jvp(f, (damp,), (1.0,))[1], want, rtol=1e-8)
    _close(jax.vjp(f, damp)[1](k)[0], _inner(k, want), rtol=1e-8)


def test_the_second_derivative_by_a_damping_of_zero_of_a_wide_problem():
    A, b = _draw(0, N, M), _draw(1, N)
    G = A @ A.conj().T
    want = -2 * A.conj().T @ np.linalg.solve(G, np.linalg.solve(G, b))

    def f(damp):
        return flj.lstsq(A, b, damp=damp, solver="svd")

    _close(jax.jvp(lambda d: jax.jvp(f, (d,), (1.0,))[1], (0.0,), (1.0,))[1], want)


def test_the_transposed_residual_of_a_little_damped_wide_problem_does_not_cancel():
    """With s = A x - c = -d2 (A A^H + d2)^-1 c, of which a difference keeps eps / d2."""
    A, c, k, d2 = _draw(0, N, M), _draw(1, N, 1), _draw(2, N, 1), 1e-10
    pattern = fl.SparsityPattern(*np.divmod(np.arange(N * M), M), (N, M))
    problem = Problem(Static(pattern), Options(solver="svd"), how=mechanism())

    def s(c):
        return S(problem, Operands((A.reshape(-1),), (), None, np.array([d2]), c), "s")

    matrix = -d2 * np.linalg.inv(A @ A.conj().T + d2 * np.eye(N))
    assert_close(jax.vjp(s, c)[1](k)[0] / d2, matrix.T @ k / d2)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_the_transpose_of_a_gated_solve_is_gated(gate):
    a, w, d2, c, g, _ = (t[0] for t in _members(1).values())
    k, k_s = _draw(8, N, 2), _draw(9, M, 2)

    def solved(c):
        return _solved(a, w, d2, c, g, np.array(gate))[:2]

    def along(step):
        return _direct(a, w, d2, step, 0 * g, gate)

    step = _draw(10, M, 2)
    bar = jax.vjp(solved, c)[1]((k, k_s))[0]
    x_dot, s_dot = along(step)
    assert_close((bar * step).sum(), (k * x_dot).sum() + (k_s * s_dot).sum(), rtol=1e-8)


# Values, weights, damping squared, c, g and the gate: the axis that a batch of it lies on.
OPERANDS = {"a": 0, "w": 1, "d2": 0, "c": 2, "g": 1, "gate": 0}
MAPPED = [
    "c",
    "g",
    "c g",
    "gate",
    "c gate",
    "g gate",
    "a",
    "w",
    "d2 c",
    "a c gate",
    "a w d2 c g gate",
]


def _members(count):
    """Operands of that many solves, of rank 3 of 4, stacked in front."""
    A = _draw(0, count, M, 2) @ _draw(5, count, 2, N)
    return {
        "a": A.reshape(count, M * N),
        "w": _draw(1, count, M, dtype=float) ** 2,
        "d2": _draw(2, count, N, dtype=float) ** 2 * np.array([1.0, 0.0, 0.0, 0.0]),
        "c": _draw(3, count, M, 2),
        "g": _draw(4, count, N, 2),
        "gate": np.arange(1.0, count + 1) % 2,
    }


def _solved(a, w, d2, c, g, gate):
    problem = Problem(Static(WHOLE), Options(solver="svd"), how=mechanism())
    return S(problem, Operands((a,), (), w, d2, c, g, gate))


def _direct(a, w, d2, c, g, gate):
    """X and A x - c by numpy; zeros where the gate is."""
    A = a.reshape(M, N)
    G = A.conj().T @ (w[:, None] * A) + np.diag(d2)
    x = gate * np.linalg.pinv(G, rcond=1e-9) @ (A.conj().T @ (w[:, None] * c) + g)
    return x, gate * (A @ x - c)


@pytest.mark.parametrize("mapped", MAPPED)
def test_batches_of_solves(mapped):
    members, names = _members(3), mapped.split()
    axes = tuple(axis if name in names else None for name, axis in OPERANDS.items())
    given, chosen = [], []
    for t, axis in zip(members.values(), axes):
        given.append(t[0] if axis is None else np.moveaxis(t, 0, axis))
        chosen.append(np.stack([t[0]] * 3) if axis is None else t)
    want = [_direct(*one) for one in zip(*chosen)]
    x, s, info, deficient = jax.vmap(_solved, axes)(*given)
    _close(x, np.stack([one[0] for one in want]), rtol=1e-8, atol=1e-9)
    _close(s, np.stack([one[1] for one in want]), rtol=1e-8, atol=1e-9)
    assert info.shape == (3, 2, INFO) and deficient.shape == (3,)
    for i, one in enumerate(zip(*chosen)):
        if one[-1]:  # where the gate is 0 nobody reads them
            alone = _solved(*one)
            _close(info[i], alone[2], rtol=1e-6, atol=1e-12)
            assert deficient[i] == alone[3]


@pytest.mark.parametrize(
    ("inner", "outer"), [("c", "a"), ("a", "c"), ("gate", "a g"), ("w c", "d2")]
)
def test_batches_of_batches_of_solves(inner, outer):
    inside, outside = _members(2), _members(3)
    given, want = [], np.empty((3, 2, N, 2), complex)
    dims = [[], []]
    for name in OPERANDS:
        t = outside[name] if name in outer.split() else inside[name]
        mapped = [name in inner.split(), name in outer.split()]
        given.append(t if any(mapped) else t[0])
        dims[0].append(0 if mapped[0] else None)
        dims[1].append(0 if mapped[1] else None)
    for i in range(3):
        for j in range(2):
            one = [t if d == e is None else t[i if e == 0 else j] for t, d, e in zip(given, *dims)]
            want[i, j] = _direct(*one)[0]
    nested = jax.vmap(jax.vmap(lambda *t: _solved(*t)[0], tuple(dims[0])), tuple(dims[1]))
    _close(nested(*given), want, rtol=1e-8, atol=1e-9)
