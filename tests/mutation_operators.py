"""One small mistake at a time in a source file: the operators, and every place they apply to.

A sign dropped or flipped, a term dropped, a term or factor scaled by 1.01, a conjugation or a
transposition dropped, operands swapped, an adjoint taken for the matrix, a comparison flipped,
an integer off by one.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

_SWAPPED = {
    "outer", "_sddmm", "_sampled", "sddmm", "div", "where", "solve_triangular",
    "product_p.bind", "bind",
}  # fmt: skip
_TWIN = {
    "mv": "rmv",
    "rmv": "mv",
    "matmul": "rmatmul",
    "rmatmul": "matmul",
    "_up": "_down",
    "_down": "_up",
    "maximum": "minimum",
    "minimum": "maximum",
    "amax": "amin",
    "indptr": "t_indptr",
    "indices": "t_indices",
}
_COMPARED = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt}


class Mutant(NamedTuple):
    """What is changed, in which lines, and the changed source when it is asked for."""

    place: str
    first: int
    last: int
    tree: Callable[[], ast.Module]


def mutants(text: str, name: str, functions: tuple[str, ...] = ()) -> Iterator[Mutant]:
    """Every mutant of a source text; of these functions alone, if any are named."""
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    owner = _owners(tree)
    skipped = _not_algebra(tree)
    for number, node in enumerate(nodes):
        where = owner.get(id(node))
        if where is None or id(node) in skipped or (functions and where not in functions):
            continue
        for kind, _ in _variants(node):
            place = f"{name}.{where}:{node.lineno} {kind}: {ast.unparse(node)[:60]}"
            changed = functools.partial(_changed, text, number, kind)
            yield Mutant(place, node.lineno, node.end_lineno, changed)


def _changed(text: str, number: int, kind: str) -> ast.Module:
    tree = ast.parse(text)
    target = next(t for i, t in enumerate(ast.walk(tree)) if i == number)
    new = next(v for k, v in _variants(target) if k == kind)
    return ast.fix_missing_locations(_Replace(target, new).visit(tree))


def _owners(tree: ast.AST) -> dict[int, str]:
    """The innermost function that each node is in."""
    found: dict[int, str] = {}

    def visit(node: ast.AST, name: str | None) -> None:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, ast.FunctionDef) else name
            if inner is not None and not isinstance(child, ast.FunctionDef):
                found[id(child)] = inner
            visit(child, inner)

    visit(tree, None)
    return found


def _not_algebra(tree: ast.AST) -> set[int]:
    """Nodes of messages, annotations, checks and docstrings."""
    out: set[int] = set()

    def drop(node: ast.AST | None) -> None:
        if node is not None:
            out.update(id(n) for n in ast.walk(node))

    for node in ast.walk(tree):
        match node:
            case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.ImportFrom():
                drop(node)
            case ast.FunctionDef(returns=returns, args=args, decorator_list=decorators):
                drop(returns)
                drop(args)
                for decorator in decorators:
                    drop(decorator)
            case ast.AnnAssign(annotation=annotation):
                drop(annotation)
            case ast.If(body=[ast.Raise()], test=test):
                drop(test)
            case ast.Call(func=ast.Attribute(attr="warn")):
                drop(node)
            case ast.Call(func=ast.Name(id="isinstance")):
                drop(node)
    return out


def _scaled(node: ast.expr) -> ast.expr:
    return ast.BinOp(ast.Constant(1.01), ast.Mult(), node)


def _call(node: ast.Call, name: str, args: list[ast.expr]) -> ast.Call:
    func: ast.expr = ast.Name(name, ast.Load())
    if isinstance(node.func, ast.Attribute):
        func = ast.Attribute(node.func.value, name, ast.Load())
    return ast.Call(func, args, node.keywords)


def _variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a node may be mistaken for."""
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant()):
            pass
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
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            yield "factor dropped", left
            yield "other factor dropped", right
            yield "scaled", _scaled(node)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            yield "divisor dropped", left
            yield "operands swapped", ast.BinOp(right, ast.Div(), left)
        case ast.BinOp(left=left, op=ast.MatMult(), right=right):
            yield "operands swapped", ast.BinOp(right, ast.MatMult(), left)
            yield "scaled", _scaled(node)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            yield "power dropped", left
        case ast.Compare(left=left, ops=[op], comparators=comparators) if type(op) in _COMPARED:
            yield "comparison flipped", ast.Compare(left, [_COMPARED[type(op)]()], comparators)
        case ast.Attribute(value=value, attr=("mH" | "H") as attr):
            yield "conjugation dropped", ast.Attribute(value, attr.replace("H", "T"), ast.Load())
            yield "transposition dropped", value
        case ast.Attribute(value=value, attr=("mT" | "T")):
            yield "transposition dropped", value
        case ast.Call(func=ast.Attribute(value=value, attr="conj"), args=[]):
            yield "conjugation dropped", value
        case ast.Call(func=ast.Attribute(attr="conj"), args=[operand]):
            yield "conjugation dropped", operand
        case ast.Call(func=ast.Name(id="_rows"), args=[_, t]):
            yield "weights dropped", t
        case ast.Call(func=ast.Name(id="_spmm"), args=[values, v, pattern, flag]):
            flipped = ast.UnaryOp(ast.Not(), flag)
            yield "adjoint for matrix", ast.Call(node.func, [values, v, pattern, flipped], [])
        case ast.Call(func=(ast.Attribute(attr=name) | ast.Name(id=name)), args=args):
            if name in _SWAPPED and len(args) >= 2:
                swapped = [*args[:-2], args[-1], args[-2]]
                yield "operands swapped", ast.Call(node.func, swapped, node.keywords)
            if name in _TWIN:
                yield "twin", _call(node, _TWIN[name], args)
            if name == "range":
                more = ast.BinOp(args[-1], ast.Add(), ast.Constant(1))
                yield "off by one", ast.Call(node.func, [*args[:-1], more], [])
        case ast.Attribute(value=value, attr=("indptr" | "indices") as attr, ctx=ast.Load()):
            yield "twin", ast.Attribute(value, _TWIN[attr], ast.Load())
        case ast.Subscript(value=value, slice=ast.Constant(value=int(i)), ctx=ast.Load()):
            yield "off by one", ast.Subscript(value, ast.Constant(i + 1), ast.Load())
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield "branches swapped", ast.IfExp(test, orelse, body)


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().generic_visit(node)
