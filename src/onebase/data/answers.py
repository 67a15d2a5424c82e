"""Cells that hold more than a name: numbers, and sets of labels in a list, a string, or columns of 0 and 1."""

from __future__ import annotations

import math
from typing import Any

from onebase.data.columns import match_column
from onebase.data.files import Table

SEPARATORS = ("|", ";", ",")  # the first that occurs in the column is the one in use


class Misfit(ValueError):
    """A cell that cannot be read: what is wrong, with the value seen."""


def number(value: Any, role: str) -> str:
    """Return a finite number as it was written.

    Raises:
        Misfit: it is none.
    """
    text = "" if value is None else str(value).strip()
    if not text or text.lower() in ("nan", "<na>", "nat"):
        raise Misfit(f"missing {role}")
    try:
        finite = math.isfinite(float(text))
    except ValueError:
        hint = "; write decimals with a point" if "," in text else ""
        raise Misfit(f"{role} that is no number: {text[:40]!r}{hint}") from None
    if not finite or isinstance(value, bool):
        raise Misfit(f"{role} that is no finite number: {text[:40]!r}")
    return text


def separator(table: Table, column: str) -> str | None:
    """Return what separates the labels of a column of strings; None where each string is one label."""
    written = [value for value in table.cells.get(column, ()) if isinstance(value, str)]
    return next((mark for mark in SEPARATORS if any(mark in value for value in written)), None)


def labels_of(table: Table, row: int, column: str, mark: str | None) -> tuple[str, ...]:
    """Return the labels of a row; () where none applies.

    Args:
        table: one split.
        row: which.
        column: a column of lists or strings, or several columns of 0 and 1 joined by commas.
        mark: what separates labels in a string.

    Raises:
        Misfit: the cell cannot be read.
    """
    if column not in table.cells:
        parts = [match_column(table, part) or part for part in column.split(",")]
        return tuple(part for part in parts if _flag(table.cells[part][row], part))
    value = table.cells[column][row]
    if value is None or (isinstance(value, float) and value != value) or type(value).__name__ == "NAType":
        raise Misfit("missing labels: expected a list or a string, empty where none applies")
    if isinstance(value, str):
        value = [part for part in (value.split(mark) if mark else [value]) if part.strip() or mark is None]
        value = [] if value == [""] or not "".join(value).strip() else value
    if not isinstance(value, list | tuple | set) or not all(isinstance(part, str | int) for part in value):
        raise Misfit(f"labels that are no list of names: {str(value)[:40]!r}")
    names = [str(part).strip() for part in value]
    if any(not name for name in names):
        raise Misfit(f"labels with an empty name: {str(value)[:40]!r}")
    if len(set(names)) < len(names):
        raise Misfit(f"labels that name one twice: {str(value)[:40]!r}")
    return tuple(sorted(names))


def _flag(value: Any, column: str) -> bool:
    text = "" if value is None else str(value).strip().lower()
    if text not in ("0", "1", "0.0", "1.0", "true", "false"):
        raise Misfit(f"label {column!r} that is neither 0 nor 1: {text[:40]!r}")
    return text in ("1", "1.0", "true")
