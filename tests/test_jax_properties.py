"""JAX and torch on the same random problems; ``python -m tests.fuzz_jax`` runs many more."""

import pytest

jax = pytest.importorskip("jax")

import fuzz_jax

CASES = 5
PROGRAMS = fuzz_jax.programs()[::3]  # each compiles once


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: f"{p.shape}-{p.dtype}-{p.solver}")
def test_jax_and_torch_agree(x64, program):
    for seed in range(CASES):
        fuzz_jax.check(program, seed)
