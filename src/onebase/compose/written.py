"""Compositions as text: ``stack(fr, combine('a@2', b, weights=[.7, .3]))``."""

from __future__ import annotations

import ast
from typing import Any

from onebase.compose.recipes import KINDS, Composition
from onebase.errors import ConfigError, unknown

OPTIONS = {"stack": (), "fuse": (), "average": ("weights", "of"),
           "combine": ("weights", "how", "rank", "density", "seed")}  # fmt: skip


def read(text: str) -> Composition:
    """Read a composition; see `onebase.compose.parse`."""
    how = f"composition {text!r}: write kind(part, ..., option=value), e.g. stack(fr, sentiment) or combine('a@2', b)"
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ConfigError(how) from None
    found = _part(node, how)
    if isinstance(found, str):
        raise ConfigError(how)
    return found


def _part(node: ast.expr, how: str) -> str | Composition:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult) and isinstance(node.left, ast.Name):
        if isinstance(node.right, ast.Name):
            return f"{node.left.id}@{node.right.id}"
        if isinstance(node.right, ast.Constant) and type(node.right.value) is int:
            return f"{node.left.id}@{node.right.value}"
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ConfigError(how)
    kind = node.func.id
    if kind not in KINDS:
        raise unknown("composition", kind, KINDS)
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in options:
            raise ConfigError(how)
        if keyword.arg not in OPTIONS[kind]:
            raise unknown(f"option of {kind}", keyword.arg, OPTIONS[kind])
        try:
            value = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise ConfigError(f"{kind}: the value of {keyword.arg!r} is not a literal") from None
        options[keyword.arg] = tuple(value) if isinstance(value, list) else value
    if "weights" in options and not isinstance(options["weights"], tuple):
        raise ConfigError(f"{kind}: weights = {options['weights']!r}: expected a list of numbers")
    return KINDS[kind](parts=tuple(_part(part, how) for part in node.args), **options)
