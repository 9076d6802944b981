"""What the README, the documentation and the docstrings show is what happens."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import funclsq

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(funclsq.__path__, "funclsq.")
    if not module.name.endswith("__main__")
)
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S
)


def blocks(page: Path) -> list[tuple[str, int, str]]:
    """Language, first line number and text of each fenced block of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        (
            (match["info"].split() or [""])[0],
            text.count("\n", 0, match.start("code")) + 1,
            textwrap.dedent(match["code"]),
        )
        for match in FENCE.finditer(text)
    ]


def run_page(page: Path) -> None:
    """Run the python blocks of a page as one script; a text block says what the last one prints."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = None
    for language, line, text in blocks(page):
        if language == "python":
            source = "\n" * (line - 1) + text  # so that a traceback names the line of the page
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(source, str(page), "exec"), namespace)
            printed = output.getvalue()
        elif language == "text" and printed is not None:
            assert printed.split() == text.split(), f"{page.name}:{line} shows another output"
            printed = None
        else:
            printed = None


def test_the_pages_have_code():
    runnable = [
        page for page in PAGES if any(language == "python" for language, *_ in blocks(page))
    ]
    assert ROOT / "README.md" in runnable
    assert len(runnable) >= 5


def test_every_example_is_shown():
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    for script in (ROOT / "examples").glob("*.py"):
        assert f"python examples/{script.name}" in page


def test_the_imports_shown_suffice():
    """No page relies on a submodule that something else has imported."""
    text = "\n".join(
        code for page in PAGES for language, _, code in blocks(page) if language == "python"
    )
    names = sorted(set(re.findall(r"\bfl(?:\.[A-Za-z_]\w*)+", text)))
    script = "\n".join(["import funclsq as fl", *names])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with settings_kept():
        run_page(page)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with settings_kept():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] == "funclsq":
                raise
            pytest.skip(f"{error.name} is not installed")
        failed, _ = doctest.testmod(
            module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
        )
    assert failed == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "another output"),
        ("```python\nraise RuntimeError('planted')\n```\n", "planted"),
        ("=== \"tab\"\n\n    ```python\n    raise RuntimeError('planted')\n    ```\n", "planted"),
    ],
)
def test_a_wrong_page_is_found(tmp_path, text, message):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        run_page(page)


@contextlib.contextmanager
def settings_kept():
    """Undo what a page sets in torch and in JAX."""
    jax = pytest.importorskip("jax")
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)
    torch.set_default_dtype(torch.float32)
    torch.set_printoptions(profile="default")
