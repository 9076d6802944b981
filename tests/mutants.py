"""Mutants of the derivative rules: one small algebraic mistake each, loaded beside the original.

Operators: a sign flipped, a term of a sum dropped, a term scaled by 1.01, a conjugation dropped,
the operands of a product swapped, an adjoint taken for the matrix.
"""

from __future__ import annotations

import ast
import copy
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import funclsq
from funclsq import matrix

lstsq = sys.modules["funclsq.lstsq"]  # the module; the package attribute is the function
SOURCES = {name: Path(funclsq.__file__).parent / f"{name}.py" for name in ("derivatives", "matrix")}
RULES = {
    "derivatives": ("_pull", "_push", "_null", "_null_of_g", "_rows"),
    "matrix": ("backward", "jvp", "_sampled", "outer"),
}


def _scaled(node: ast.expr) -> ast.expr:
    return ast.BinOp(ast.Constant(1.01), ast.Mult(), node)


def _variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a node may be mistaken for."""
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield "sign dropped", operand
            yield "scaled", ast.UnaryOp(ast.USub(), _scaled(operand))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            yield "sign flipped", ast.BinOp(left, ast.Sub(), right)
            yield "term dropped", left
            yield "other term dropped", right
            yield "scaled", ast.BinOp(left, ast.Add(), _scaled(right))
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            yield "sign flipped", ast.BinOp(left, ast.Add(), right)
            yield "term dropped", left
            yield "scaled", ast.BinOp(left, ast.Sub(), _scaled(right))
        case ast.Call(func=ast.Attribute(value=value, attr="conj"), args=[]):
            yield "conjugation dropped", value
        case ast.Call(func=ast.Name(id="matmul"), args=args):
            yield "adjoint for matrix", ast.Call(ast.Name("rmatmul", ast.Load()), args, [])
        case ast.Call(func=ast.Name(id="_rows"), args=[_, t]):
            yield "weights dropped", t
        case ast.Call(func=ast.Name(id=name), args=args) if name in ("outer", "_sddmm", "_sampled"):
            yield "operands swapped", ast.Call(node.func, [*args[:-2], args[-1], args[-2]], [])
        case ast.Call(func=ast.Name(id="_spmm"), args=[values, v, pattern, flag]):
            flipped = ast.UnaryOp(ast.Not(), flag)
            yield "adjoint for matrix", ast.Call(node.func, [values, v, pattern, flipped], [])


def mutants() -> Iterator[tuple[str, str, str]]:
    """Every mutant as (module, description, source)."""
    for module, path in SOURCES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name in RULES[module]
        ]
        for function in functions:
            for number, node in enumerate(ast.walk(function)):
                for what, _ in _variants(node):
                    clone = copy.deepcopy(tree)
                    twin = next(
                        f
                        for f in ast.walk(clone)
                        if isinstance(f, ast.FunctionDef) and f.lineno == function.lineno
                    )
                    target = list(ast.walk(twin))[number]
                    new = next(v for w, v in _variants(target) if w == what)
                    clone = _Replace(target, new).visit(clone)
                    text = ast.unparse(ast.fix_missing_locations(clone))
                    place = f"{module}.{function.name}:{node.lineno}"
                    yield module, f"{place} {what}: {ast.unparse(node)[:50]}", text


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)


def _load(name: str, source: str) -> types.ModuleType:
    module = types.ModuleType(f"funclsq._mutant_{name}")
    module.__dict__["__package__"] = "funclsq"
    exec(compile(source, f"<mutant of {name}>", "exec"), module.__dict__)
    return module


def plant(monkeypatch, module: str, source: str) -> None:
    """Let funclsq.lstsq run on a mutant of one of its two modules of rules."""
    if module == "derivatives":
        monkeypatch.setattr(lstsq, "derivatives", _load(module, source))
        return
    mutant = _load(module, source)
    rules = _load("derivatives", SOURCES["derivatives"].read_text(encoding="utf-8"))
    for name in matrix.__all__:
        if hasattr(rules, name):
            setattr(rules, name, getattr(mutant, name))
    monkeypatch.setattr(lstsq, "matrix", mutant)
    monkeypatch.setattr(lstsq, "derivatives", rules)
