"""Operands on two devices: solved where they lie, or an error that says which lies where."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("jax")

SCRIPT = """
    import jax, numpy as np
    import funclsq as fl, funclsq.jax as flj

    jax.config.update("jax_enable_x64", True)
    first, second = jax.devices()
    rng = np.random.default_rng(0)
    M, c = rng.standard_normal((8, 3)), rng.standard_normal(8)
    S = fl.SparsityPattern(*np.divmod(np.arange(24), 3), (8, 3))
    want = np.linalg.lstsq(M, c, rcond=None)[0]
    A, b = jax.device_put(M, first), jax.device_put(c, second)

    for other in (jax.numpy.asarray(c), jax.device_put(c, second)):  # the first goes anywhere
        for f in (flj.lstsq, jax.jit(flj.lstsq)):
            x = f(jax.device_put(M, second), other)
            assert x.devices() == {second} and np.abs(x - want).max() < 1e-12

    def message(f, *args):
        try:
            f(*args)
        except ValueError as error:
            return str(error)
        raise AssertionError("nothing was raised")

    ours = {
        "lstsq": lambda A, b: flj.lstsq(A, b),
        "solve": lambda A, b: flj.solve(A, b),
        "sparse": lambda A, b: flj.lstsq(flj.Sparse(S, A.reshape(-1)), b),
        "damp": lambda A, b: flj.lstsq(A, c, damp=b[0] ** 2),
    }
    for name, f in ours.items():
        text = message(f, A, b)
        assert text.startswith(f"{'solve' if name == 'solve' else 'lstsq'}: all operands must be")
        where = "damp" if name == "damp" else "b"
        assert f"A on {first}" in text and f"{where} on {second}" in text, text
        assert "jax.device_put" in text
    text = message(jax.grad(lambda A, b: flj.lstsq(A, b).sum()), A, b)
    assert f"b on {second}, a traced operand elsewhere" in text, text
    assert "lstsq" in message(jax.jit(flj.lstsq), A, b)  # JAX's own, before we are called
    print("done")
"""


def test_operands_on_two_devices():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done" in done.stdout
