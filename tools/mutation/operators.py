"""The changes: each replaces one node of a module's syntax tree."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tools.mutation.rules import may_be_left_out

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}
REMOVED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Delete)
"""Statements that are also left out. An assignment to a name is not: without it, the name is unbound."""

Node = TypeVar("Node", bound=ast.AST)


def _changed(node: Node, change: Callable[[Node], object]) -> Node:
    copied = copy.deepcopy(node)
    change(copied)
    return copied


def _compared_otherwise(node: ast.Compare, index: int) -> ast.Compare:
    changed = copy.deepcopy(node)
    changed.ops[index] = COMPARISONS[type(changed.ops[index])]()
    return changed


def _unbounded(node: ast.Slice, bound: str) -> ast.Slice:
    return _changed(node, lambda each: setattr(each, bound, None))


def _without(node: ast.AST, field: str, index: int) -> ast.AST:
    return _changed(node, lambda each: getattr(each, field).pop(index))


def replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what replaces a node, in a fixed order."""
    match node:
        case ast.Compare():
            yield from (_compared_otherwise(node, i) for i in range(len(node.ops)))
        case ast.BinOp() | ast.AugAssign() if type(node.op) in ARITHMETIC:
            yield _changed(node, lambda each: setattr(each, "op", ARITHMETIC[type(each.op)]()))
        case ast.BoolOp():
            yield _changed(
                node, lambda each: setattr(each, "op", ast.Or() if isinstance(each.op, ast.And) else ast.And())
            )
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield copy.deepcopy(node.operand)
        case ast.Constant():
            yield from (ast.copy_location(ast.Constant(value), node) for value in _values(node.value))
        case ast.If() | ast.While() | ast.IfExp() if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
            yield _changed(node, lambda each: setattr(each, "test", ast.UnaryOp(ast.Not(), each.test)))
        case ast.Return() if not _is_false(node.value):
            yield _changed(node, lambda each: setattr(each, "value", ast.Constant(None)))
        case ast.Break():
            yield ast.copy_location(ast.Continue(), node)
        case ast.Continue():
            yield ast.copy_location(ast.Break(), node)
        case ast.Slice():
            bounds = [bound for bound in ("lower", "upper") if getattr(node, bound) is not None]
            yield from (_unbounded(node, bound) for bound in bounds)
        case ast.comprehension():
            yield from (_without(node, "ifs", i) for i in range(len(node.ifs)))
        case ast.Call():
            if isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
                other = ast.Name(FUNCTIONS[node.func.id], ast.Load())
                yield _changed(node, lambda each: setattr(each, "func", other))
            yield from (_without(node, "keywords", i) for i, word in enumerate(node.keywords) if may_be_left_out(word))
    if isinstance(node, REMOVED) and not (isinstance(node, ast.Assign) and _binds_name(node)):
        yield ast.copy_location(ast.Pass(), node)


def _is_false(node: ast.expr | None) -> bool:
    """Return True for nothing, None, and False: callers treat None in the same way."""
    return node is None or (isinstance(node, ast.Constant) and node.value in (None, False))


def _binds_name(node: ast.Assign) -> bool:
    return any(isinstance(each, ast.Name | ast.Tuple) for each in node.targets)


def _values(value: Any) -> Iterator[Any]:
    """Yield other values for a constant."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value + 1
        if value > 1:
            yield value - 1
    elif isinstance(value, float):
        yield value * 2 + 1
    elif isinstance(value, str):
        yield "XX" + value
