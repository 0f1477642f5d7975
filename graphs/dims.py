"""Dimensions as the tracer and ``spec.json`` write them: a number, a symbol of ``graphs.spec``, arithmetic on them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import TypeAlias

Dim: TypeAlias = int | str
Sizes: TypeAlias = Mapping[str, int]

ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def size_of(dim: Dim, sizes: Sizes) -> int:
    """A dimension at these sizes; KeyError for a symbol that is none of them, and for what is no such arithmetic."""
    try:
        return dim if isinstance(dim, int) else _value(_parsed(dim), sizes)
    except RecursionError:
        raise KeyError(f"{dim:.40}…") from None


def symbols_of(dim: Dim) -> set[str]:
    """The symbols in a dimension."""
    return set() if isinstance(dim, int) else {node.id for node in ast.walk(_parsed(dim)) if isinstance(node, ast.Name)}


@cache
def _parsed(dim: str) -> ast.expr:
    try:
        return ast.parse(dim, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Constant(dim)  # neither a number nor a symbol


def _value(node: ast.expr, sizes: Sizes) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=symbol):
            return sizes[symbol]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
            return ARITHMETIC[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, sizes)
    raise KeyError(ast.unparse(node))
