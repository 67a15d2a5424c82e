"""Markdown out of plain text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

SPECIAL = "\\*_<>[]|$`#"
CODE = re.compile(r"(``.+?``|`[^`]+`)")


def escaped(text: str) -> str:
    """Keep Markdown from reading text that was written as plain text; words in backticks are code."""
    return "".join(code(part.strip("`")) if i % 2 else _plain(part) for i, part in enumerate(CODE.split(text)))


def _plain(text: str) -> str:
    return "".join("\\" + character if character in SPECIAL else character for character in text)


def code(text: str) -> str:
    """Return text as code, also where it stands in a table."""
    mark = "``" if "`" in text else "`"
    return mark + text.replace("|", "\\|") + mark


def cell(text: str) -> str:
    """Return plain text as a cell of a table."""
    return escaped(" ".join(text.split())) or "\u00a0"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
