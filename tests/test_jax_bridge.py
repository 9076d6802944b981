"""The bridge between JAX and torch: no hangs, no silent dtypes, clear errors."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
import numpy as np
import torch
from jax_common import assert_close, draw, problem

import funclsq as fl
import funclsq.jax as flj
from funclsq.jax import bridge, host, host_primitive
from funclsq.jax.problem import Problem
from funclsq.jax.structures import Indexed
from funclsq.operators import SparseStructure
from funclsq.settings import settings


def run_script(code, timeout=120, **env):
    script = textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# -------------------------------------------------------------------------------------------
# Threads.


def test_a_plan_is_not_that_of_another_thread(x64):
    first, second = (
        SparseStructure(fl.SparsityPattern(row, [0, 1], (3, 2))) for row in ([0, 1], [1, 2])
    )

    class Overtaken(host.HostSolve):
        """One into whose hands another thread plays as soon as it has kept its plan."""

        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "_plan" and value is not None and value.structure is first:
                self._plan_for(second)

    options = settings("lstsq", "auto", rank="auto").options()
    problem = Problem(Indexed((3, 2), "coo"), options)
    solve = Overtaken(problem, (False, False, True, False, False))
    assert solve._plan_for(first).structure is first
    assert solve._plan_for(second).structure is second


def test_small_problems_run_on_one_thread_and_leave_the_setting_alone(x64, monkeypatch):
    seen = []
    solve = host.raw_solve
    monkeypatch.setattr(
        host, "raw_solve", lambda *a: seen.append(torch.get_num_threads()) or solve(*a)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        flj.lstsq(*problem()).block_until_ready()
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_eight_threads_at_once(x64):
    f = jax.jit(jax.value_and_grad(lambda A, b: jnp.sin(flj.lstsq(A, b)).sum()))
    inputs = [problem(8, 3, seed=s) for s in range(8)]
    want = [f(*p) for p in inputs]
    failures = []

    def work(i):
        for _ in range(20):
            got = f(*inputs[i])
            if not np.allclose(got[1], want[i][1], rtol=1e-12, atol=1e-12):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not any(t.is_alive() for t in threads)
    assert not failures


SOAK = os.path.join(os.path.dirname(__file__), "benchmarks", "jax_soak.py")


@pytest.mark.slow
@pytest.mark.parametrize("row", ["1x1", "1x8", "2x8", "2xvmap"])
def test_soak(row):
    """Few CPUs, threads, nested vmap, failing calls: no hang, no abort, right results."""
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs to choose from")
    short = ["--calls", "40", "--megabytes", "4", "--limit", "240", "--exits", "0"]
    done = subprocess.run(
        [sys.executable, SOAK, *short, "--rows", row],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "well" in done.stdout


EXIT = """
    import atexit, sys, threading, time
    import jax, jax.numpy as jnp, torch
    import funclsq.jax as flj
    from funclsq.jax import settle

    def slow(A, b):
        time.sleep(0.3)
        x = torch.linalg.lstsq(A, b.reshape(len(b), -1)).solution
        return x.reshape(A.shape[1], *b.shape[1:])

    before = jax.jit(lambda a: jax.lax.fori_loop(0, 4, lambda i, c: c @ a * 1e-3, a))
    a = before(jnp.eye(1000))
    f = jax.jit(lambda a: flj.lstsq(a[:8, :3] + jnp.eye(8, 3), a[:8, 0], solver=slow))
    f(a).block_until_ready()
    """


@pytest.mark.slow
@pytest.mark.parametrize("settles", [True, False])
def test_dropped_work_does_not_abort_the_exit(settles):
    """Results that were dropped are still being computed at the end; unsettled, that aborts."""
    leave = "" if settles else "atexit.unregister(settle.settle)\n"
    drop = """
    for i in range(3):
        f(before(a) + i)
    keep = f(before(a) + 4)
    print("leaving")
    """
    done = run_script(EXIT + leave + drop)
    assert "leaving" in done.stdout
    assert (done.returncode == 0) == settles, done.stderr


@pytest.mark.slow
def test_a_thread_that_goes_on_solving_does_not_abort_the_exit():
    done = run_script(
        EXIT
        + """
    def go_on():
        try:
            while True:
                f(a).block_until_ready()
        except Exception as error:
            print(str(error)[-80:], flush=True)

    threading.Thread(target=go_on, daemon=True).start()
    time.sleep(0.5)
    """
    )
    assert done.returncode == 0, done.stderr
    assert "the interpreter is shutting down" in done.stdout


def test_exit_handlers_that_run_later_may_solve():
    done = run_script(
        """
        import atexit
        atexit.register(lambda: print("late", float(flj.lstsq(A, A[:, 0])[0])))
        import jax.numpy as jnp
        import funclsq.jax as flj
        A = jnp.eye(4, 2)
        flj.lstsq(A, A[:, 0]).block_until_ready()
        """
    )
    assert done.returncode == 0, done.stderr
    assert "late 1.0" in done.stdout


def test_two_devices():
    """shard_map over the batch, with replicated and with split operands, on two CPU devices."""
    done = run_script(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, PartitionSpec as P
        import funclsq as fl, funclsq.jax as flj

        jax.config.update("jax_enable_x64", True)
        if hasattr(jax, "shard_map"):
            shard_map = jax.shard_map
        else:  # JAX before 0.7
            from jax.experimental.shard_map import shard_map
        m, n = 6, 3
        S = fl.SparsityPattern(*np.divmod(np.arange(m * n), n), (m, n))
        rng = np.random.default_rng(0)
        v = jnp.asarray(rng.standard_normal(m * n))
        vs = jnp.asarray(rng.standard_normal((4, m * n)))
        bs = jnp.asarray(rng.standard_normal((4, m)))
        mesh = Mesh(np.array(jax.devices()), ("i",))
        h = lambda v, b: flj.lstsq(flj.Sparse(S, v), b)

        def shared(v, bs):
            return shard_map(
                lambda v, bs: jax.vmap(lambda b: h(v, b))(bs),
                mesh=mesh, in_specs=(P(), P("i")), out_specs=P("i"))(v, bs)

        def split(vs, bs):
            return shard_map(
                jax.vmap(h), mesh=mesh, in_specs=(P("i"), P("i")), out_specs=P("i"))(vs, bs)

        plain = jax.vmap(h, (None, 0)), jax.vmap(h)
        for f, g, a in ((shared, plain[0], v), (split, plain[1], vs)):
            loss = lambda f: jax.jit(
                jax.value_and_grad(lambda a, b: jnp.sin(f(a, b)).sum(), (0, 1)))
            for x, y in zip(jax.tree.leaves(loss(f)(a, bs)), jax.tree.leaves(loss(g)(a, bs))):
                assert np.abs(x - y).max() < 1e-10 * (1 + np.abs(y).max()), np.abs(x - y).max()
        print("done")
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout


# -------------------------------------------------------------------------------------------
# The fallback, and what importing does.


def test_the_fallback_is_announced_and_right(x64, monkeypatch):
    A, b = problem(7, 3, seed=5)
    want = jax.grad(lambda A: flj.lstsq(A, b).sum())(A)
    monkeypatch.setattr(bridge, "buffer_callback", None)
    monkeypatch.setattr(bridge, "_announced", False)
    with pytest.warns(fl.errors.FunclsqWarning, match="pure_callback"):
        got = jax.grad(lambda A: flj.lstsq(A, b).sum())(A)
    assert_close(got, want)


def test_the_public_way_gives_the_same_bits(x64, monkeypatch):
    """Host calls name their operation themselves only for versions of JAX that were tested."""
    A, b = problem(9, 4, seed=6)
    bs = jnp.stack([b, 2 * b, -b])

    def everything():
        f = lambda A, b: flj.lstsq(A, b)  # noqa: E731
        loss = lambda A: (f(A, b) ** 2).sum()  # noqa: E731
        sol = jax.jit(lambda A, b: flj.solve(A, b))(A, b)
        return (
            jax.jit(f)(A, b),
            jax.jit(jax.value_and_grad(loss))(A),
            jax.jit(jax.hessian(loss))(A),
            jax.jit(jax.vmap(f, (None, 0)))(A, bs),
            jax.lax.scan(lambda x, b: (x, f(A, b)), 0.0, bs),
            (sol.x, sol.status, sol.residual_norm),
        )

    calls = []
    bare = bridge.bare_call
    monkeypatch.setattr(bridge, "bare_call", lambda *a: calls.append(1) or bare(*a))
    here = everything()
    assert bool(calls) == (jax.__version_info__[:2] in host_primitive.TESTED)
    calls.clear()
    monkeypatch.setattr(host_primitive, "TESTED", ())
    jax.clear_caches()
    public = everything()
    assert not calls
    jax.tree.map(np.testing.assert_array_equal, here, public)
    jax.clear_caches()


def test_importing_changes_no_configuration_and_torch_alone_needs_no_jax():
    done = run_script(
        """
        import sys
        import funclsq
        assert "jax" not in sys.modules
        import jax
        before = dict(jax.config.values)
        import funclsq.jax
        assert dict(jax.config.values) == before
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_names_the_command_that_brings_it():
    done = run_script(
        """
        import sys
        sys.modules["equinox"] = sys.modules["lineax"] = None
        import jax, jax.numpy as jnp
        import funclsq.jax as flj

        def said(f):
            try:
                f()
            except ImportError as error:
                return "pip install 'funclsq[jax]'" in str(error)

        A, b = jnp.eye(4, 2), jnp.ones(4)
        print(flj.lstsq(A, b, on_failure="raise").tolist())
        raising = jax.jit(lambda b: flj.lstsq(A, b, on_failure="raise"))
        print(said(lambda: flj.LeastSquares(None, None)), said(lambda: flj.SparseLinear(None)))
        print(said(lambda: __import__("funclsq.jax.lineax")), said(lambda: raising(b)))
        """
    )
    assert done.stdout.split("\n")[:3] == ["[1.0, 1.0]", "True True", "True True"], done.stderr


# -------------------------------------------------------------------------------------------
# x64, dtypes, shapes: at trace time, in words.


@pytest.fixture
def x32():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("compute_dtype", [None, "float64"])
def test_float32_without_x64(x32, compute_dtype):
    A, b = problem(30, 6, np.float32)
    f = lambda A, b: flj.lstsq(A, b, compute_dtype=compute_dtype)  # noqa: E731
    x, g = jax.jit(lambda A, b: (f(A, b), jax.grad(lambda A: f(A, b).sum())(A)))(A, b)
    assert x.dtype == g.dtype == jnp.float32
    exact = np.linalg.lstsq(np.asarray(A, float), np.asarray(b, float), rcond=None)[0]
    error = np.abs(x - exact).max() / np.abs(exact).max()
    assert error < (6e-8 if compute_dtype else 2e-6)


@pytest.mark.parametrize("kind", ["torch", "numpy", "scipy"])
def test_float64_without_x64_is_an_error(x32, kind):
    A, b = problem(6, 3, np.float32)
    wide = np.ones((6, 3))
    if kind == "torch":
        wide = torch.ones(6, 3, dtype=torch.float64)
    if kind == "scipy":
        wide = pytest.importorskip("scipy.sparse").csr_array(wide)
    with pytest.raises(TypeError, match="jax_enable_x64"):
        flj.lstsq(wide, b)


@pytest.mark.parametrize(
    "make",
    [
        lambda S, wide: flj.Sparse.fromdense(np.eye(4, 3)),
        lambda S, wide: flj.Sparse(S, jnp.ones(3)) @ wide,
        lambda S, wide: flj.Sparse(S, wide) @ jnp.ones(3),
        lambda S, wide: flj.Sparse(S, jnp.ones(3)).T.rmatvec(wide),
        lambda S, wide: flj.LeastSquares(S, wide),
        lambda S, wide: flj.lstsq(
            flj.LinearOperator(lambda p, v: p * v, (3, 3), wide), jnp.ones(3)
        ),
    ],
    ids=["fromdense", "product", "values", "adjoint", "layer", "operator"],
)
def test_nothing_narrows_a_float64_array_without_x64(x32, make):
    pattern = fl.SparsityPattern([0, 1, 2], [0, 1, 1], (4, 3))
    with pytest.raises(TypeError, match="jax_enable_x64"):
        make(pattern, np.ones(3))


A32 = np.ones((6, 3), np.float32)
B32 = np.ones(6, np.float32)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"b": B32[:5]}, ValueError, r"6 rows.*got shape \(5,\)"),
        ({"b": np.float32(1)}, ValueError, "6 rows"),
        ({"b": B32.astype(np.int32)}, TypeError, "must be float32"),
        ({"b": B32.astype(np.complex64)}, TypeError, "one dtype"),
        ({"A": A32.astype(np.float16)}, TypeError, "must be float32"),
        ({"A": A32[0]}, ValueError, "must be a matrix"),
        ({"A": "A"}, TypeError, "A must be a JAX array"),
        ({"damp": -1.0}, ValueError, "damp must be finite and >= 0"),
        ({"damp": np.nan}, ValueError, "damp must be finite"),
        ({"damp": 1j}, TypeError, "real"),
        ({"damp": np.ones(4, np.float32)}, ValueError, r"shape \(3,\)"),
        ({"damp": -np.ones(3, np.float32)}, ValueError, "negative"),
        ({"weights": -B32}, ValueError, "weights must not be negative"),
        ({"weights": B32[:4]}, ValueError, r"shape \(6,\)"),
        ({"weights": B32.astype(np.complex64)}, TypeError, "real"),
        ({"x0": B32}, ValueError, r"x0 must have shape \(3,\)"),
        ({"solver": "magic"}, ValueError, "solver must be one of"),
        ({"rank": 9}, ValueError, "at most"),
        ({"rank": "half"}, ValueError, "rank must be"),
        ({"on_failure": "shrug"}, ValueError, "on_failure"),
        ({"compute_dtype": "float16"}, ValueError, "compute_dtype"),
        ({"atoll": 1}, TypeError, "unknown setting"),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_bad_input_is_an_ordinary_error_before_any_work(x32, change, error, match, traced):
    given = {"A": A32, "b": B32, **change}
    arrays = {k: jnp.asarray(v) for k, v in given.items() if isinstance(v, np.ndarray)}
    rest = {k: v for k, v in given.items() if k not in arrays}
    if traced and (match in ("negative", "weights must not be negative")):
        pytest.skip("a traced value cannot be looked at")
    call = lambda arrays: flj.lstsq(**arrays, **rest)  # noqa: E731
    with pytest.raises(error, match=match):
        (jax.jit(call) if traced else call)(arrays)


def test_input_that_is_not_finite_is_nan_and_a_status_for_its_members_only(x64):
    A, b = problem()
    B = jnp.stack([b, b.at[2].set(jnp.nan)], 1)
    sol = jax.jit(flj.solve)(jnp.stack([A, A.at[0, 0].set(jnp.inf)]), B)
    good, bad = int(fl.Status.DIRECT), int(fl.Status.NONFINITE)
    assert sol.status.tolist() == [[good, bad], [bad, bad]]
    assert np.isfinite(sol.x[0, :, 0]).all()
    assert np.isnan(sol.x[0, :, 1]).all()
    assert np.isnan(sol.x[1]).all()
    assert "NONFINITE" in sol.message
    assert not bool(sol.converged.all())
    with pytest.warns(fl.ConvergenceWarning, match="NaN or Inf"):
        flj.lstsq(A, B)
    with pytest.raises(fl.ConvergenceError, match="NONFINITE"):
        flj.lstsq(A, B, on_failure="raise")
    negative = jax.jit(lambda w: flj.solve(A, b, weights=w))(jnp.full(6, -1.0))
    assert int(negative.status) == bad


def test_a_solve_that_does_not_converge_warns_or_raises(x64):
    pytest.importorskip("equinox")
    A, b = problem(60, 30)
    short = {"solver": "lsmr", "maxiter": 2, "rank": "full"}
    sol = flj.solve(A, b, **short)
    assert not bool(sol.converged)
    with pytest.warns(fl.ConvergenceWarning, match="MAXITER"):
        jax.jit(lambda A, b: flj.lstsq(A, b, **short))(A, b).block_until_ready()
    with pytest.raises(fl.ConvergenceError, match="MAXITER"):
        flj.lstsq(A, b, on_failure="raise", **short)
    inside = jax.jit(lambda A, b: flj.lstsq(A, b, on_failure="raise", **short))
    with pytest.raises(Exception, match="did not meet its tolerance"):
        inside(A, b).block_until_ready()
    flj.lstsq(A, b, on_failure="ignore", **short)


@pytest.mark.parametrize("k", [0, 1, 5])
def test_empty_shapes(x64, k):
    A, _ = problem()
    assert flj.lstsq(A, jnp.ones((6, k))).shape == (3, k)
    assert jax.grad(lambda A: flj.lstsq(A, jnp.ones((6, k))).sum())(A).shape == (6, 3)
    nothing = flj.Sparse(fl.SparsityPattern([], [], (6, 3)), jnp.zeros(0))
    assert_close(flj.lstsq(nothing, jnp.ones((6, k))), np.zeros((3, k)))
    assert flj.lstsq(jnp.zeros((0, 3)), jnp.zeros((0, k))).shape == (3, k)
    assert flj.lstsq(jnp.zeros((6, 0)), jnp.zeros((6, k))).shape == (0, k)


def test_batches_weights_per_column_and_x0_agree_with_single_solves(x64):
    rng = np.random.default_rng(0)
    A, b = draw(rng, 2, 1, 7, 4), draw(rng, 3, 7, 5)
    w = jnp.asarray(rng.uniform(0.5, 2.0, (7, 5)))
    sol = flj.solve(A, b, weights=w, x0=jnp.ones(4), damp=0.1)
    assert sol.x.shape == (2, 3, 4, 5)
    assert sol.status.shape == (2, 3, 5)
    one = flj.lstsq(A[1, 0], b[2, :, 3], weights=w[:, 3], x0=jnp.ones(4), damp=0.1)
    assert_close(sol.x[1, 2, :, 3], one)
    shared = flj.lstsq(A[0, 0], b)
    assert_close(shared[2], flj.lstsq(A[0, 0], b[2]))
    assert flj.lstsq(A[:, 0], b[0, :, 0]).shape == (2, 4)


def test_gradients_stay_finite_at_weight_zero_and_damp_zero(x64):
    A, b = problem()
    w = jnp.ones(6).at[1].set(0.0)
    f = lambda w, d: flj.lstsq(A, b, weights=w, damp=d).sum()  # noqa: E731
    grads = jax.jit(jax.grad(f, (0, 1)))(w, jnp.asarray(0.0))
    assert all(np.isfinite(g).all() for g in grads)
    step = 1e-6
    numeric = (f(w.at[1].set(step), jnp.asarray(0.0)) - f(w, jnp.asarray(0.0))) / step
    assert abs(float(numeric - grads[0][1])) < 1e-4 * (1 + abs(float(numeric)))


def test_complex_gradients_are_the_conjugate_of_those_of_torch(x64):
    rng = np.random.default_rng(2)
    A, b = draw(rng, 5, 3, complex_=True), draw(rng, 5, complex_=True)
    got = jax.grad(lambda A, b: jnp.abs(jnp.sin(flj.lstsq(A, b))).sum(), (0, 1))(A, b)
    At, bt = (flj.to_torch(t, copy=True).requires_grad_() for t in (A, b))
    torch.sin(fl.lstsq(At, bt)).abs().sum().backward()
    assert_close(got, (At.grad.numpy().conj(), bt.grad.numpy().conj()))
