"""The command line: what it writes, how it ends, and what it says when it cannot go on."""

from __future__ import annotations

import functools
import gzip
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
import scipy.sparse

import funclsq
import funclsq.validate
from funclsq.cli import main
from funclsq.cli.progress import clock, steps
from funclsq.validate import Report, Row

GENERAL = "%%MatrixMarket matrix coordinate real general\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with A.mtx (7, 3) and b.mtx (7, 1), which is also the current one."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    A = scipy.sparse.coo_array(rng.standard_normal((7, 3)) * (rng.random((7, 3)) < 0.8))
    b = rng.standard_normal((7, 1))
    scipy.io.mmwrite("A.mtx", A)
    scipy.io.mmwrite("b.mtx", b)
    return tmp_path


def written(path: str) -> np.ndarray:
    return np.asarray(scipy.io.mmread(path))


def best(A, b, damp=0.0):
    """Solve by NumPy."""
    A = A.toarray() if scipy.sparse.issparse(A) else np.asarray(A)
    b = b.toarray() if scipy.sparse.issparse(b) else np.asarray(b)
    n = A.shape[1]
    stacked = np.vstack([A, damp * np.eye(n)]), np.vstack([b, np.zeros((n, b.shape[1]))])
    return np.linalg.lstsq(*stacked, rcond=None)[0]


# ---- solve


@pytest.mark.parametrize("solver", ["auto", "lsmr", "cholesky", "svd"])
@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_solve_writes_the_minimiser(files, solver, damp):
    arguments = ["--solver", solver, "--damp", str(damp), "--tol", "1e-13"]
    assert main(["solve", "A.mtx", "b.mtx", "-o", "x.mtx", *arguments]) == 0
    expected = best(scipy.io.mmread("A.mtx"), scipy.io.mmread("b.mtx"), damp)
    np.testing.assert_allclose(written("x.mtx"), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "%%MatrixMarket matrix coordinate pattern general\n4 2 5\n1 1\n2 1\n2 2\n3 2\n4 1\n",
        "%%MatrixMarket matrix coordinate integer general\n4 2 4\n1 1 2\n2 2 3\n3 1 -1\n4 2 1\n",
        "%%MatrixMarket matrix array integer general\n4 2\n1\n2\n3\n4\n0\n1\n0\n1\n",
        "%%MatrixMarket matrix array real general\n4 2\n1\n2.5\n3\n4\n0\n1\n0\n1\n",
        "%%MatrixMarket matrix coordinate complex general\n4 2 3\n1 1 1 2\n2 2 0 1\n4 1 3 0\n",
        "%%MatrixMarket matrix coordinate real symmetric\n4 4 4\n1 1 2\n2 1 1\n3 3 1\n4 4 5\n",
        "%%MatrixMarket matrix coordinate real general\n4 2 4\n1 1 1\n1 1 2\n2 2 1\n3 1 4\n",
    ],
    ids=["pattern", "integer", "integer array", "array", "complex", "symmetric", "repeated"],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_every_kind_of_matrix_is_read(files, text, compressed):
    name = "M.mtx.gz" if compressed else "M.mtx"
    (files / name).write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    scipy.io.mmwrite("c.mtx", np.array([[1.0], [2.0], [3.0], [5.0]]))
    assert main(["solve", name, "c.mtx", "-o", "x.mtx.gz"]) == 0
    np.testing.assert_allclose(
        written("x.mtx.gz"), best(scipy.io.mmread(name), scipy.io.mmread("c.mtx")), atol=1e-12
    )


def test_several_and_sparse_right_hand_sides(files):
    b = scipy.sparse.random(7, 3, density=0.5, random_state=0)
    scipy.io.mmwrite("B.mtx", b)
    assert main(["solve", "A.mtx", "B.mtx", "-o", "X.mtx"]) == 0
    np.testing.assert_allclose(written("X.mtx"), best(scipy.io.mmread("A.mtx"), b), atol=1e-12)


def test_complex_right_hand_side_of_a_real_matrix(files):
    scipy.io.mmwrite("c.mtx", scipy.io.mmread("b.mtx") * (1 + 2j))
    assert main(["solve", "A.mtx", "c.mtx", "-o", "x.mtx"]) == 0
    expected = best(scipy.io.mmread("A.mtx"), scipy.io.mmread("c.mtx"))
    np.testing.assert_allclose(written("x.mtx"), expected, atol=1e-12)


def test_solve_without_output_prints_x_alone(files, capsys):
    assert main(["solve", "A.mtx", "b.mtx"]) == 0
    said = capsys.readouterr()
    x = scipy.io.mmread(io.BytesIO(said.out.encode()))
    np.testing.assert_allclose(x, best(scipy.io.mmread("A.mtx"), scipy.io.mmread("b.mtx")))
    assert "7 x 3" in said.err
    assert "||b - A x||" in said.err


def test_solve_json(files, capsys):
    assert main(["solve", "A.mtx", "b.mtx", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert said.err == ""
    assert found["converged"] is True
    assert found["shape"] == [7, 3]
    expected = best(scipy.io.mmread("A.mtx"), scipy.io.mmread("b.mtx"))[:, 0]
    np.testing.assert_allclose(found["x"], expected)
    residual = scipy.io.mmread("b.mtx")[:, 0] - scipy.io.mmread("A.mtx") @ expected
    np.testing.assert_allclose(found["residual_norm"], [np.linalg.norm(residual)])


def test_unconverged_solve_fails_and_says_so(files, capsys, monkeypatch):
    scipy.io.mmwrite("H.mtx", np.vander(np.linspace(0, 1, 7), 6))
    limited = functools.partial(funclsq.solve, maxiter=3)
    monkeypatch.setattr(funclsq, "solve", limited)
    assert main(["solve", "H.mtx", "b.mtx", "-o", "x.mtx", "--solver", "gradient_descent"]) == 1
    said = capsys.readouterr().err
    assert "MAXITER" in said
    assert "x does not meet its tolerance" in said
    assert written("x.mtx").shape == (6, 1)


# ---- messages

BAD_FILES = {
    "missing": (None, "no such file"),
    "text": ("hello\n", "not a Matrix Market file that can be read.*banner.*%%MatrixMarket"),
    "empty": ("", "not a Matrix Market file"),
    "truncated": (GENERAL + "7 3 5\n1 1 1.0\n", "Truncated"),
    "index": (GENERAL + "7 3 1\n8 1 1.0\n", "Line 3: Row index out of bounds"),
    "number": (GENERAL + "7 3 1\n1 1 one\n", "Line 3"),
    "nan": (GENERAL + "7 3 2\n1 1 1.0\n5 2 nan\n", "finite; got nan in row 5, column 2"),
    "inf": (GENERAL + "7 3 2\n1 1 inf\n5 2 nan\n", r"got inf in row 1, column 1 \(2 such entries"),
    "nan array": (
        "%%MatrixMarket matrix array real general\n2 2\n1\n2\nnan\n4\n",
        "got nan in row 1, column 2",
    ),
    "overflow": (
        "%%MatrixMarket matrix coordinate integer general\n7 3 1\n1 1 99999999999999999999\n",
        "out of range",
    ),
    "huge": (
        "%%MatrixMarket matrix array real general\n900000000000 9000\n1\n",
        "does not fit into memory",
    ),
}


@pytest.mark.parametrize("command", ["solve", "check"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_matrix_file(files, capsys, command, case):
    text, message = BAD_FILES[case]
    if text is not None:
        (files / "bad.mtx").write_text(text)
    assert main([command, "bad.mtx", "b.mtx"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"funclsq {command}: bad.mtx")
    assert re.search(message, said.err)


@pytest.mark.parametrize("case", ["missing", "text", "nan"])
def test_bad_right_hand_side_file(files, capsys, case):
    text, message = BAD_FILES[case]
    if text is not None:
        (files / "bad.mtx").write_text(text)
    assert main(["solve", "A.mtx", "bad.mtx"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_compressed_file_that_is_not(files, capsys):
    (files / "bad.mtx.gz").write_bytes(b"hello")
    assert main(["solve", "bad.mtx.gz", "b.mtx"]) == 2
    assert "gzip" in capsys.readouterr().err
    whole = gzip.compress((files / "A.mtx").read_bytes())
    (files / "bad.mtx.gz").write_bytes(whole[: len(whole) // 2])
    assert main(["solve", "bad.mtx.gz", "b.mtx"]) == 2
    assert "not a Matrix Market file that can be read" in capsys.readouterr().err


def test_shape_mismatch(files, capsys):
    scipy.io.mmwrite("c.mtx", np.ones((5, 1)))
    for command in ("solve", "check"):
        assert main([command, "A.mtx", "c.mtx"]) == 2
        assert (
            "c.mtx: b must have 7 rows, one per row of A.mtx; got 5 x 1." in capsys.readouterr().err
        )
    scipy.io.mmwrite("c.mtx", np.ones((1, 7)))
    assert main(["solve", "A.mtx", "c.mtx"]) == 2
    assert "transpose it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "message"), [("none/x.mtx", "no folder 'none'"), (".", "is a folder")]
)
def test_output_is_checked_before_work(files, capsys, output, message):
    assert main(["solve", "A.mtx", "b.mtx", "-o", output]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["solve", "A.mtx", "b.mtx"], ["check", "A.mtx"], ["demo"]])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver", "magic"], "must be one of auto, lsmr, .*; got 'magic'"),
        (["--damp", "-1"], "must be a finite number >= 0; got '-1'"),
        (["--damp", "nan"], "must be a finite number >= 0; got 'nan'"),
        (["--tol", "0"], "must be a finite number > 0, such as 1e-8; got '0'"),
        (["--tol", "x"], "must be a finite number > 0"),
    ],
)
def test_bad_arguments(files, capsys, command, arguments, message):
    with pytest.raises(SystemExit) as end:
        main([*command, *arguments])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("command", ["solve", "check", "demo"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for word in ("--damp", "--solver", "--tol", "--json", "exit status"):
        assert word in said


def test_no_command(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_interrupt(files, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("funclsq.solve", stop)
    assert main(["solve", "A.mtx", "b.mtx"]) == 130
    assert "interrupted" in capsys.readouterr().err


# ---- check


def test_check_on_a_problem(files, capsys):
    pytest.importorskip("jax")
    assert main(["check", "A.mtx", "--damp", "0.1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    assert {row["candidate"] for row in found["rows"]} == {"torch", "jax"}
    assert {"x", "vjp A", "vjp damp", "jvp b", "hvp A"} <= {
        row["quantity"] for row in found["rows"]
    }


@pytest.fixture
def checked(monkeypatch):
    """What cross_check was called with; it finds one error of 1e-10 where 1e-12 is allowed."""
    calls = []

    def cross_check(A, b, **settings):
        calls.append((A, b, settings))
        rows = [
            Row("x", "torch", oracle, 1e-10, 1e-12, "made up")
            for oracle in ("closed form", "differences")
        ]
        return Report("made up", tuple(rows))

    monkeypatch.setattr(funclsq.validate, "cross_check", cross_check)
    return calls


def test_failed_check(files, capsys, checked):
    assert main(["check", "A.mtx", "b.mtx", "--solver", "lsmr", "--seed", "3"]) == 1
    assert "FAIL" in capsys.readouterr().out
    A, b, settings = checked[0]
    assert (A.shape, b.shape) == ((7, 3), (7,))
    assert (settings["solver"], settings["seed"], settings["damp"]) == ("lsmr", 3, None)


def test_check_with_a_tolerance(files, capsys, checked):
    assert main(["check", "A.mtx", "--tol", "1e-9"]) == 0
    assert checked[0][1] is None
    assert "held to 1e-09" in capsys.readouterr().out
    assert main(["check", "A.mtx", "--tol", "1e-11", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["tolerance"] for row in rows] == [1e-11, 1e-11]


# ---- demo, as far as the command goes; the rest is in test_demo.py


def test_demo_without_matplotlib(files, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--quick"]) == 2
    assert "pip install 'funclsq[plot]'" in capsys.readouterr().err


def test_demo_checks_the_picture_before_work(files, capsys):
    assert main(["demo", "--quick", "-o", "picture.doc"]) == 2
    said = capsys.readouterr().err
    assert "must end in one of" in said
    assert ".png" in said


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with steps(2, "demo") as tick:
        tick("one")
        tick("two")
    assert "demo" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    with clock("solving") as say:
        say("iteration 7")
    assert "solving" in sys.stderr.getvalue()


def test_no_progress_elsewhere(capsys):
    with steps(1, "demo") as tick, clock("solving") as say:
        tick("one")
        say("iteration 7")
    assert capsys.readouterr().err == ""


def test_no_progress_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with steps(1, "demo") as tick:
        tick("one")
    assert sys.stderr.getvalue() == ""


def test_as_a_program(files):
    """Run ``python -m funclsq`` itself: exit status and streams as the shell sees them."""
    program = [sys.executable, "-m", "funclsq", "solve", "A.mtx"]
    good = subprocess.run([*program, "b.mtx"], capture_output=True, text=True, check=False)
    assert good.returncode == 0
    assert good.stdout.startswith("%%MatrixMarket")
    bad = subprocess.run([*program, "none.mtx"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2
    assert bad.stderr.startswith("funclsq solve: none.mtx: there is no such file.")
    assert "Traceback" not in bad.stderr
