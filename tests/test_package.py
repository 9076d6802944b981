"""The package as installed: light to import, whole without its extras, typed, of one version."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import funclsq

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ["equinox", "jax", "lineax", "matplotlib", "rslab", "sksparse", "pypardiso", "tqdm"]


def fresh(script: str) -> str:
    """Run a script in a new interpreter, warnings being errors; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_brings_nothing_heavy():
    out = fresh(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import funclsq\n"
        "print(*(set(sys.modules) - before))"
    )
    assert not {*EXTRAS, "scipy.optimize", "torch._dynamo"} & set(out.split())


def test_the_core_works_without_the_extras():
    out = fresh(
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n"  # None: import fails
        "import scipy.sparse, torch, funclsq as fl\n"
        "torch.manual_seed(0)\n"
        "A = scipy.sparse.random(400, 150, 0.05, random_state=0) + scipy.sparse.eye(400, 150)\n"
        "b = torch.randn(400, 2, dtype=torch.float64)\n"
        "dense = torch.from_numpy(A.toarray())\n"
        "for solver in ('auto', 'lsmr', 'cholesky', 'qr'):\n"
        "    x = fl.lstsq(A, b, solver=solver)\n"
        "    assert (dense.T @ (dense @ x - b)).abs().max() < 1e-9, solver\n"
        "print('right')"
    )
    assert out.strip() == "right"


def test_importing_the_adapter_leaves_the_configuration_of_jax():
    pytest.importorskip("jax")
    out = fresh(
        "import jax\n"
        "before = dict(jax.config.values)\n"
        "import funclsq.jax\n"
        "print(before == dict(jax.config.values))"
    )
    assert out.strip() == "True"


def test_one_version():
    version = importlib.metadata.version("funclsq")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert funclsq.__version__ == version
    assert re.search(r"^## (\S+)", changelog, re.M)[1] == version


def test_types_are_shipped():
    assert (Path(funclsq.__file__).parent / "py.typed").is_file()


def test_it_can_be_imported_again():
    """As notebooks do that reload what was edited."""
    code = (
        "import importlib, sys, torch, funclsq\n"
        "importlib.reload(funclsq.opaque)\n"
        "for name in [n for n in sys.modules if n.split('.')[0] == 'funclsq']: "
        "del sys.modules[name]\n"
        "import funclsq as again\n"
        "assert again is not funclsq\n"
        "A, b = torch.eye(3, 2), torch.ones(3)\n"
        "assert torch.equal(again.lstsq(A, b), torch.ones(2))\n"
        "assert torch.equal(torch.func.vmap(again.lstsq, (None, 0))(A, b.expand(2, 3)), "
        "torch.ones(2, 2))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
