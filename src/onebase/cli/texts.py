"""The texts a command works on: arguments, a file, or standard input."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.cli.failures import UsageError
from onebase.errors import DataError, first_of, unknown

if TYPE_CHECKING:
    from onebase.data.files import Table

STDIN = "-"
SHOWN = 10  # bad rows that an error names


@dataclass
class Texts:
    """Texts with where they came from.

    Attributes:
        texts: n texts.
        pairs: n second texts, or None.
        columns: the file's own columns, n values each, to be written beside the results; {} without a table.
    """

    texts: list[str]
    pairs: list[str] | None = None
    columns: dict[str, list[Any]] = field(default_factory=dict)


def read_texts(
    given: Sequence[str],
    file: Path | None,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    pair: Sequence[str] = (),
    trained_on: Mapping[str, str | None] | None = None,
    wants_pair: bool = False,
    role: str = "text",
) -> Texts:
    """Read texts from where the command line says.

    Args:
        given: positional texts; ``-`` alone is standard input.
        file: a .csv, .tsv or .jsonl with columns, a .txt with one text per line, or ``-``.
        text, text_pair: columns of the file.
        pair: second texts of the positional ones.
        trained_on: role -> column that the adapter was trained on, tried first.
        wants_pair: whether the adapter takes pairs.
        role: 'text', or 'prompt' for generation.

    Raises:
        UsageError: two sources, none, or options without meaning for the source.
        DataError: the file cannot be read, or has empty texts.
    """
    from_stdin = list(given) == [STDIN] or (file is not None and str(file) == STDIN)
    if given and file is not None:
        raise UsageError(f"both texts and --file {file} are given: pass one of them")
    if not given and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("nothing to read: pass texts, --file FILE, or pipe lines to standard input")
        from_stdin = True
    table = file is not None and not from_stdin and file.suffix.lower() != ".txt"
    if not table and (text or text_pair):
        raise UsageError(f"--{'text' if text else 'text-pair'} names a column, but there is no file with columns")
    if pair and (from_stdin or file is not None):
        raise UsageError("--pair gives second texts of the texts on the command line; in a file use --text-pair COLUMN")
    if from_stdin:
        return Texts(_lines(_stdin(), "standard input"))
    if file is None:
        if pair and len(pair) != len(given):
            raise UsageError(f"{len(given)} texts but {len(pair)} --pair: pass one --pair for each text, in order")
        for said, values in ((role, given), ("--pair", pair)):
            if bad := [number for number, value in enumerate(values, 1) if not value.strip()]:
                raise UsageError(f"{said} {first_of(bad, SHOWN)} of the command line is empty: expected a text")
        return Texts(list(given), list(pair) or None)
    if not table:
        return Texts(_lines(read_document(file), file.name))
    return _from_table(file, {role: text, "text_pair": text_pair}, trained_on or {}, wants_pair, role)


def read_conversations(file: Path) -> list[tuple[dict[str, Any], ...]]:
    """Read conversations to continue: one JSON object a line, with `messages` (OpenAI) or `conversations` (ShareGPT).

    Raises:
        DataError: the file cannot be read, or lines are no such conversations; all of them at once.
    """
    from onebase.data.columns import by_name
    from onebase.data.files import read_file
    from onebase.data.messages import as_messages

    table = read_file(file)
    column = by_name(table, "messages")
    if column is None:
        raise DataError(f"{file.name}: no column messages or conversations; found {', '.join(table.cells)}")
    found, bad = [], []
    for place, value in zip(table.places, table.cells[column]):
        try:
            found.append(as_messages(value, answered=False))
        except ValueError as error:
            bad.append(f"\n  {table.unit} {place}: {error}")
    if bad:
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(f"{file.name}: {len(bad)} conversations cannot be continued:{''.join(bad[:SHOWN])}{more}")
    return found


def read_document(file: Path) -> str:
    """Read a whole file as text.

    Raises:
        DataError: it is not UTF-8, or there is no such file.
    """
    if str(file) == STDIN:
        return _stdin()
    if not file.is_file():
        raise DataError(f"no file {str(file)!r}")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8 at byte {error.start}") from None


def _lines(content: str, name: str) -> list[str]:
    """Take one text per line; a blank line is refused, as results would no longer stand beside their lines."""
    if not content.strip():
        raise DataError(f"{name} holds no text; expected one text per line")
    lines = [line.strip("\r") for line in content.removesuffix("\n").split("\n")]
    bad = [number for number, line in enumerate(lines, 1) if not line.strip()]
    if bad:
        raise DataError(
            f"{name}: no text in line {first_of(bad, SHOWN)}; expected one text per line. No line was dropped."
        )
    return lines


def _from_table(
    file: Path, asked: dict[str, str | None], trained_on: Mapping[str, str | None], wants_pair: bool, role: str
) -> Texts:
    from onebase.data.files import read_file

    table = read_file(file)
    first = _column(table, role, asked[role], trained_on.get(role), [])
    texts = _checked(table, first)
    if asked["text_pair"] is None and not wants_pair:
        return Texts(texts, None, table.cells)
    second = _column(table, "text_pair", asked["text_pair"], trained_on.get("text_pair"), [first])
    return Texts(texts, _checked(table, second), table.cells)


def _column(table: Table, role: str, asked: str | None, trained: str | None, taken: list[str]) -> str:
    """Find a column: the one asked for, the one the adapter was trained on, by its name, or the only one."""
    from onebase.data.columns import by_name, match_column

    option = "--" + (role if role == "text_pair" else "text").replace("_", "-")
    if asked is not None:
        found = match_column(table, asked)
        if found is None:
            raise unknown(f"column for {option} in {table.name}:", asked, table.cells)
        return found
    found = match_column(table, trained) if trained is not None else None
    if found is None:
        found = by_name(table, role, taken)
    rest = [name for name in table.cells if name not in taken]
    if found is None and len(rest) == 1:
        found = rest[0]
    if found is None:
        raise DataError(f"{table.name}: no column found for the {role}. Say which with {option}: {', '.join(rest)}")
    return found


def _checked(table: Table, column: str) -> list[str]:
    values = table.cells[column]
    bad = [place for place, value in zip(table.places, values) if not isinstance(value, str) or not value.strip()]
    if bad:
        raise DataError(
            f"{table.name}: column {column!r} has no text in {table.unit} {first_of(bad, SHOWN)}. No row was dropped."
        )
    return list(values)
