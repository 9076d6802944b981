"""The examples are short, shown with their pictures, and do what the pages say of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
GALLERY = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_is_short_and_has_its_picture(script):
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 120
    found = re.search(rf"python examples/{script.name}(?: .*)?\n", GALLERY)
    assert found is not None
    section = GALLERY[found.end() :].split("\n## ", 1)[0]
    pictures = re.findall(r"!\[[^\]]+\]\((assets/[^)]+\.png)\)", section)
    assert len(pictures) == 1
    assert (ROOT / "docs" / pictures[0]).is_file()


def run(name: str, folder: Path) -> str:
    """Run an example; return what it prints. Its picture goes to the folder and must be one."""
    picture = folder / "picture.png"
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), "-o", str(picture)],
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    return done.stdout


def numbers(text: str) -> list[float]:
    return [float(v) for v in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?", text)]


@pytest.mark.slow
def test_levelling_network(tmp_path):
    out = run("levelling_network", tmp_path)
    assert "rank 48" in out
    assert "redundancy 39.000000" in out
    assert "without line 31 (planted: 31)" in out
    assert numbers(re.search(r"largest \|w\| (.*)", out)[1])[0] < 3.29
    assert numbers(re.search(r"against fl.covariance: (.*)", out)[1])[0] < 1e-12
    along, difference = numbers(re.search(r"change of all lines: (.*); (.*) by", out)[0])
    assert along == pytest.approx(difference, abs=1e-8)


@pytest.mark.slow
def test_ridge_gcv(tmp_path):
    out = run("ridge_gcv", tmp_path)
    slope, difference = numbers(re.search(r"log damp: (.*); by central differences (.*)", out)[0])
    assert slope == pytest.approx(difference, rel=1e-6)
    damp, value, _, error = numbers(re.search(r"learnt by GCV(.*)", out)[1])
    near, least, _, _ = numbers(re.search(r"least GCV of the grid(.*)", out)[1])
    assert value <= least
    assert damp == pytest.approx(near, rel=0.07)  # the spacing of the grid
    for other in ("too little", "too much"):
        _, other_value, _, other_error = numbers(re.search(rf"{other}(.*)", out)[1])
        assert other_value > 1.3 * value
        assert other_error > 3 * error


@pytest.mark.slow
def test_formulations(tmp_path):
    out = run("formulations", tmp_path)
    ways = ("nn.Linear, frozen weight", "nn.Module with a Parameter", "tensor with requires_grad")
    for way in (*ways, "gradient_descent, lr"):
        error, rate, theory = numbers(re.search(rf"{re.escape(way)}(.*)", out)[1])[-3:]
        assert error < 1e-6
        assert rate == pytest.approx(theory, abs=1e-3)
    assert numbers(re.search(r"^lstsq (.*)", out, re.M)[1])[0] < 1e-14


@pytest.mark.slow
def test_batched_polynomials(tmp_path):
    pytest.importorskip("jax")
    out = run("batched_polynomials", tmp_path)
    assert "identical, bit by bit" in out
    assert re.search(r"^torch (.*)", out, re.M)[1].split() == (
        re.search(r"^JAX (.*)", out, re.M)[1].split()
    )


@pytest.mark.slow
def test_ct_geometry(tmp_path):
    out = run("ct_geometry", tmp_path)
    for name in ("image_error", "ray_error"):
        line = re.search(rf"gradient of {name}(.*)", out)[1]
        *gradient, a, b = numbers(line)
        assert gradient == pytest.approx([a, b], rel=1e-3)
    shift, angle, _, error = numbers(re.search(r"by the image(.*)", out)[1])
    assert shift == pytest.approx(1.3, abs=0.05)
    assert angle == pytest.approx(1.5, abs=0.2)
    assert error < 0.4 * numbers(re.search(r"as assumed(.*)", out)[1])[-1]
