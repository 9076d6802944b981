"""What a solve inside JAX reads, copies, keeps and makes again: as little as it can."""

import importlib

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import numpy as np
import torch
from jax_common import assert_close, draw, full_pattern, problem

import funclsq.jax as flj
from funclsq import kept, raw
from funclsq.jax import bridge, host


def test_the_host_sees_the_memory_of_jax_arrays(x64, monkeypatch):
    A, b = problem()
    seen = {}
    solve = host.raw_solve

    def spy(plan, params, w, d2, c, *rest):
        seen.update(A=params[0].data_ptr(), c=c.data_ptr())
        return solve(plan, params, w, d2, c, *rest)

    monkeypatch.setattr(host, "raw_solve", spy)
    jax.jit(flj.lstsq)(A, b).block_until_ready()
    assert seen == {"A": A.unsafe_buffer_pointer(), "c": b.unsafe_buffer_pointer()}


def test_inputs_are_not_written_to(x64):
    A, b = problem(20, 8)
    before = np.array(A), np.array(b)
    jax.jit(jax.value_and_grad(lambda A, b: flj.lstsq(A, b, damp=0.1).sum()))(A, b)
    assert np.array_equal(before[0], A)
    assert np.array_equal(before[1], b)


def test_forward_and_gradient_share_one_factorisation(x64, monkeypatch):
    made = []
    prepare = raw.registry.prepare
    monkeypatch.setattr(raw.registry, "prepare", lambda *a: made.append(1) or prepare(*a))
    A, b = problem(9, 4, seed=7)
    f = jax.jit(jax.value_and_grad(lambda A: (flj.lstsq(A, b) ** 2).sum()))
    for k in range(3):
        f((k + 1.5) * A)[1].block_until_ready()
        assert len(made) == k + 1


def test_calls_outside_jit_do_not_retrace(x64, monkeypatch):
    traced = []
    module = importlib.import_module("funclsq.jax.lstsq")
    S = module.S
    monkeypatch.setattr(module, "S", lambda *a: traced.append(1) or S(*a))
    pattern = full_pattern(11, 2)
    rng = np.random.default_rng(0)
    for damp in (0.1, 0.2, 0.3):
        A = flj.Sparse(pattern, draw(rng, 22))
        flj.lstsq(A, draw(rng, 11), damp=damp)
    assert len(traced) == 1


# -------------------------------------------------------------------------------------------
# What is written, and what is not.


@pytest.mark.parametrize(
    ("names", "program"),
    [
        ({"x"}, lambda A, b: flj.lstsq(A, b)),
        ({"x", "info"}, lambda A, b: flj.solve(A, b).x),
        ({"x", "s", "deficient"}, jax.value_and_grad(lambda A, b: flj.lstsq(A, b).sum())),
    ],
    ids=["lstsq", "solve", "value_and_grad"],
)
def test_results_that_nobody_reads_are_not_made(x64, monkeypatch, names, program):
    written = []
    run = bridge._run
    monkeypatch.setattr(
        bridge, "_run", lambda f, *a: written.append(f._problem.results) or run(f, *a)
    )
    jax.block_until_ready(jax.jit(program)(*problem(12, 5, seed=11)))
    assert set(written[0]) == names


def test_one_derivative_solve_gives_what_is_asked_for_only(x64, monkeypatch):
    """b's gradient is y = A z, and z is not wanted; A's wants both, beside one factorisation."""
    asked = []
    solve = host.raw_solve
    monkeypatch.setattr(host, "raw_solve", lambda *a: asked.append((a[8], a[10])) or solve(*a))
    A, b = problem(13, 4, seed=12)
    grads = {}
    for argnums, wanted in ((1, (False, True)), (0, (True, True))):
        asked.clear()
        loss = lambda A, b: jnp.sin(flj.lstsq(A, b, rank="full")).sum()  # noqa: E731
        grads[argnums] = jax.jit(jax.grad(loss, argnums))(A, b)
        jax.block_until_ready(grads)
        assert asked == [(True, True), wanted]
    dense = lambda A, b: jnp.sin(jnp.linalg.pinv(A) @ b).sum()  # noqa: E731
    assert_close((grads[0], grads[1]), jax.grad(dense, (0, 1))(A, b))


@pytest.mark.parametrize(("solver", "calls"), [("auto", 5), ("cholesky", 3)])
def test_a_gradient_leaves_nothing_for_xla_to_compile(x64, solver, calls):
    """Every kernel of its own costs 25 ms; signs, sums and differences are made in host calls."""
    options = {"solver": solver, "rank": "full" if solver == "cholesky" else "auto"}
    pattern = full_pattern(7, 3)

    def pulled(v, b, k):
        return jax.vjp(lambda v: flj.lstsq(flj.Sparse(pattern, v), b, **options), v)[1](k)

    steps = [e.primitive.name for e in jax.make_jaxpr(pulled)(*map(jnp.ones, (21, 7, 3))).eqns]
    ours = [name for name in steps if name.startswith("funclsq")]
    assert len(ours) == calls
    assert set(steps) - set(ours) <= {"broadcast_in_dim", "reshape", "squeeze"}


# -------------------------------------------------------------------------------------------
# Large operands.


@pytest.fixture
def large(x64):
    """A matrix of 6 MB, and nothing kept."""
    raw.clear_cache()
    yield problem(75_000, 10, seed=13)
    raw.clear_cache()


@pytest.fixture
def seen(monkeypatch):
    """Where the matrices of prepared methods lie."""
    pointers = []
    prepare = raw.registry.prepare
    monkeypatch.setattr(
        raw.registry, "prepare", lambda op, *a: pointers.append(op.A.data_ptr()) or prepare(op, *a)
    )
    return pointers


def test_large_values_are_not_copied_until_they_come_again(large, seen):
    A, b = large
    f = jax.jit(lambda A, b: flj.lstsq(A, b, solver="qr"))
    want = np.linalg.lstsq(np.asarray(A), np.asarray(b), rcond=None)[0]
    for _ in range(2):
        assert_close(f(A, b), want)
    assert seen[0] == A.unsafe_buffer_pointer()
    assert seen[1] != A.unsafe_buffer_pointer()
    assert len(kept._recent) == 1  # the second time
    assert_close(f(A, 2 * b), 2 * want)
    assert len(seen) == 2  # the third finds it
    f(A + 1, b).block_until_ready()
    assert len(kept._recent) == 1


def test_large_values_are_kept_for_the_gradient(large, seen):
    A, b = large
    f = jax.jit(jax.value_and_grad(lambda A, b: flj.lstsq(A, b, solver="qr").sum()))
    jax.block_until_ready(f(A, b))
    assert len(seen) == 1
    assert seen[0] != A.unsafe_buffer_pointer()


def test_a_solver_of_the_user_may_keep_its_matrix(large):
    A, b = large
    held = []

    def solver(A, b):
        held.append(A)
        return torch.linalg.lstsq(A, b).solution

    jax.jit(lambda A, b: flj.lstsq(A, b, solver=solver))(A, b).block_until_ready()
    want = np.array(A)
    del A, large
    for t in held:
        assert t.data_ptr() not in {a.unsafe_buffer_pointer() for a in jax.live_arrays()}
        assert np.array_equal(t.numpy(), want)
