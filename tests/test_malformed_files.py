"""Damaged Matrix Market files: a message and a status, never a traceback, a hang or a crash.

``python tests/test_malformed_files.py 20000 [SEED]`` damages many more.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import random
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
import scipy.sparse

COUNT, SEED = 300, 0
MEMORY, SECONDS = 16 << 30, 60  # of address space; for one file
HEAD = "%%MatrixMarket matrix"
SIZES = (
    *("1000000000000", "99999999999999999999", "-1", "0", "2147483648", "9223372036854775807"),
    *("1e3", "3.5", "", "nan", "100000", "7 3"),
)  # fmt: skip
WORDS = (
    *("", "matrix", "vector", "array", "coordinate", "real", "pattern", "hermitian", "complex"),
    *("skew-symmetric", "quaternion", "\xff\xfe", "A" * 100000, "unsigned-integer", "double"),
)  # fmt: skip
LINES = ("", "%", "\0", "1 1 1", "0 0 1", "x", "1" * 10000, "1 1 1e400", "1 1 0x10", "1,1,1")


def written(A, **how):
    stream = io.BytesIO()
    scipy.io.mmwrite(stream, A, **how)
    return stream.getvalue().decode("latin1")


def originals():
    rng = np.random.default_rng(0)
    A = scipy.sparse.coo_array(rng.standard_normal((7, 3)) * (rng.random((7, 3)) < 0.8))
    square = np.diag([1.0, 2, 3]) + 1
    return [
        written(A),
        written(A.astype(complex)),
        written(A.toarray()),
        written(A.toarray().astype(complex)),
        written((A * 10).astype(int)),
        written(A, field="pattern"),
        written(scipy.sparse.coo_array(square), symmetry="symmetric"),
        written(square, symmetry="symmetric"),
        f"{HEAD} coordinate real skew-symmetric\n3 3 1\n2 1 4.0\n",
        f"{HEAD} coordinate complex hermitian\n2 2 2\n1 1 4.0 0\n2 1 1 1\n",
    ]


def damaged(text, rng):
    """One thing wrong: cut, bytes or bits changed, other sizes, words or lines, a part missing."""
    lines = text.split("\n")
    size = next((i for i, line in enumerate(lines) if not line.startswith("%")), 0)
    at = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    kind = rng.randrange(8)
    if kind == 0:
        return text[: at[0]]
    if kind == 1:
        return text[: at[0]] + chr(rng.randrange(256)) + text[at[0] + 1 :]
    if kind == 2:
        return text[: at[0]] + "".join(
            chr(ord(c) ^ 1 << rng.randrange(8)) for c in text[at[0] :][:1]
        )
    if kind == 3:
        words = lines[size].split() or [""]
        words[rng.randrange(len(words))] = rng.choice(SIZES)
        lines[size] = " ".join(words)
    elif kind == 4:
        words = lines[0].split(" ")
        words[rng.randrange(len(words))] = rng.choice(WORDS)
        lines[0] = " ".join(words)
    elif kind == 5:
        rng.shuffle(lines)
    elif kind == 6:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(LINES))
    else:
        return text[: at[0]] + text[at[1] :]
    return "\n".join(lines)


def compressed(data, rng):
    """The name and bytes of a file, sometimes compressed, sometimes damaged after that."""
    suffix, pack = rng.choice(
        (("", bytes), ("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress))
    )
    data = pack(data)
    if suffix and rng.random() < 0.5:
        data = damaged(data.decode("latin1"), rng).encode("latin1")
    return f"bad.mtx{suffix}", data


def sweep(count, seed):
    """Solve with damaged files, and print what should not be; in a process of its own."""
    from funclsq.cli import main

    def too_long(*_):
        raise TimeoutError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, too_long)
    rng, texts, codes = random.Random(seed), originals(), {}
    for rows in (2, 3, 7):
        scipy.io.mmwrite(f"b{rows}.mtx", np.arange(1.0 * rows)[:, None])
    with open("A.mtx", "w") as file:
        file.write(texts[0])
    for _ in range(count):
        which = rng.randrange(len(texts))
        rows = 7 if which < 6 else 3 if which < 9 else 2
        text = damaged(texts[which], rng)
        text = damaged(text, rng) if rng.random() < 0.2 else text
        name, data = compressed(text.encode("latin1", "replace"), rng)
        with open(name, "wb") as file:
            file.write(data)
        pair = (name, f"b{rows}.mtx") if rng.random() < 0.7 else ("A.mtx", name)
        out, err = io.StringIO(), io.StringIO()
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(["solve", *pair])
        except BaseException as error:
            print(f"{error!r} escaped for {pair} with {data[:300]!r}")
            continue
        finally:
            signal.alarm(0)
        codes[code] = codes.get(code, 0) + 1
        if code == 2 and not re.match(r"funclsq solve: .*\w", err.getvalue()):
            print(f"no message for {pair} with {data[:300]!r}: {err.getvalue()[:300]}")
        if code not in (0, 1, 2) or "Traceback" in err.getvalue():
            print(f"status {code} for {pair} with {data[:300]!r}")
    return codes


def test_damaged_files_are_refused_or_read(tmp_path):
    command = [sys.executable, __file__, str(COUNT), str(SEED)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert re.fullmatch(r"\{.*\}\n", done.stdout), done.stdout
    codes = {int(k): int(n) for k, n in re.findall(r"(\d): (\d+)", done.stdout)}
    assert sum(codes.values()) == COUNT
    assert codes[2] > COUNT / 3  # most are refused
    assert codes[0] > 0  # some damage does not matter


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEAD} coordinate real general\n1000000000000 1000000000000 1\n1 1 1\n", "memory"),
        (f"{HEAD} coordinate real general\n7 3 1000000000000\n1 1 1\n", "memory"),
        (f"{HEAD} coordinate real general\n7 3 100000000\n1 1 1\n", "more than a file of its len"),
        (f"{HEAD} array real general\n100000 1000\n1\n", "more than a file of its length can hold"),
        (f"{HEAD} coordinate real general\n7 -3 1\n1 1 1\n", "negative|Invalid|out of bounds"),
        (f"{HEAD} coordinate real general\n7 3 1\n1 1 1x", "b'x' is no part of a number"),
        (f"{HEAD} coordinate real general\n7 3 1\n1 1 1\0\n", "is no part of a number"),
        (f"{HEAD} coordinate real general\n7 3 1\n1 1 1 2\n", "promises 3 numbers; it holds 4"),
        (f"{HEAD} array real general\n2 2\n1\n2\n3\n4\x1a", ""),  # SciPy alone crashes
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_a_header_claims_is_checked_before_it_is_believed(
    tmp_path, capsys, text, message, packed
):
    from funclsq.cli import main

    path = tmp_path / ("bad.mtx.gz" if packed else "bad.mtx")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    scipy.io.mmwrite(tmp_path / "b.mtx", np.ones((7, 1)))
    assert main(["solve", str(path), str(tmp_path / "b.mtx")]) == 2
    assert re.search(f"funclsq solve: .*bad.mtx.*({message})", capsys.readouterr().err, re.DOTALL)


def test_a_matrix_without_rows_is_read(tmp_path):
    from funclsq.cli.files import read_matrix

    path = tmp_path / "A.mtx"
    path.write_text(f"{HEAD} array real general\n0 2\n")  # SciPy alone crashes
    assert read_matrix(str(path)).shape == (0, 2)


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n"])
def test_a_last_line_may_lack_its_end(tmp_path, end):
    from funclsq.cli.files import read_matrix

    path = tmp_path / "A.mtx"
    path.write_text(f"{HEAD} coordinate real symmetric\n3 3 2\n1 1 2\n3 2 5{end}")
    np.testing.assert_array_equal(
        read_matrix(str(path)).toarray(), [[2, 0, 0], [0, 0, 5], [0, 5, 0]]
    )


if __name__ == "__main__":
    print(sweep(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
