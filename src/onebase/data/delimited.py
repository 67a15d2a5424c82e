"""CSV and TSV read row by row: delimiter and quoting found or told, malformed rows named by line."""

from __future__ import annotations

import csv
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TextIO

from onebase.data.table import Opened, Records, refuse_repeats
from onebase.data.texts import extension_of, opened_text
from onebase.errors import ConfigError, DataError

# One cell may hold a long contract; a quote that is never closed must not swallow gigabytes.
LONGEST_FIELD = 64 * 2**20
_AT_ONCE = 256
_SHOWN = 10
_LOOK = 4 * 2**20  # characters that quoting is found by
DELIMITERS = (",", "\t", ";", "|")
_NAMES = {"comma": ",", "tab": "\t", "\\t": "\t", "semicolon": ";", "pipe": "|", "space": " "}
BLANK = "blank lines hold no row"
_field_limit = threading.Lock()  # the csv module has one limit for the whole process


@dataclass(frozen=True)
class Dialect:
    """How fields are told apart.

    Attributes:
        delimiter: one character between fields.
        quote: the character around a field that holds delimiters; '' where quotes are ordinary characters.
    """

    delimiter: str
    quote: str = '"'


def checked_dialect(delimiter: str | None, quote: str | None) -> tuple[str | None, str | None]:
    """Return the characters that a person named, by name or as they are.

    Raises:
        ConfigError: not one character.
    """
    found = None if delimiter is None else _NAMES.get(delimiter.lower(), delimiter)
    if found is not None and (len(found) != 1 or found in '\r\n"\0'):
        raise ConfigError(
            f"delimiter {delimiter!r}: expected one character that is no quote or line end, or {', '.join(_NAMES)}"
        )
    mark = None if quote is None else {"none": "", "double": '"', "single": "'"}.get(quote.lower(), quote)
    if mark is not None and (len(mark) > 1 or mark in ("\r", "\n", "\0") or (mark and mark == found)):
        raise ConfigError(f"quote {quote!r}: expected one character such as '\"', or none, double, single")
    return found, mark


def open_delimited(path: Path, delimiter: str | None, quote: str | None, encoding: str | None) -> Opened:
    """Open a CSV or TSV.

    Args:
        path: the file.
        delimiter, quote: told by the person; None where found. A quote of '' means that quotes are characters.
        encoding: told by the person.

    Raises:
        DataError: no header, a repeated column name, or text that cannot be decoded.
    """
    with opened_text(path, encoding) as stream:
        look = stream.read(_LOOK)
    if not look.strip():
        raise DataError(f"{path.name}: the file is empty. Expected rows of text; check the export and try again.")
    dialect, notes = _dialect(look, path, delimiter, quote)

    def lines() -> Iterator[str]:
        with opened_text(path, encoding) as stream:
            yield from _lines(stream)

    first = next(_records(lines, path.name, dialect), None)
    header = first[1] if first else []
    if "\0" in "".join(header):
        raise DataError(f"{path.name}: a NUL byte in the header {header!r}: this is no CSV. Export it again.")
    refuse_repeats(path.name, header)

    def records(skipped: Counter[str]) -> Records:
        return _rows(_records(lines, path.name, dialect, skipped), header, dialect, path.name)

    return Opened(path.name, records, columns=tuple(header), notes=notes)


def _dialect(look: str, path: Path, delimiter: str | None, quote: str | None) -> tuple[Dialect, tuple[str, ...]]:
    header = look.lstrip("\r\n").splitlines()[0]
    tabbed = extension_of(path) == ".tsv"
    mark = quote if quote is not None else _quote_of(header)
    dialect = Dialect(delimiter or ("\t" if tabbed else _delimiter_of(header, mark)), mark)
    if quote is None and dialect.delimiter == "\t" and mark in look and _reads_better_unquoted(look, dialect):
        note = (
            f"{path.name}: quotes are read as characters, because rows are whole only that way (quote says otherwise)."
        )
        return replace(dialect, quote=""), (note,)
    return dialect, ()


def _quote_of(header: str) -> str:
    """Say which quote is used: a single one only where every field of the header stands in them."""
    fields = header.strip()
    return "'" if len(fields) > 2 and fields[0] == fields[-1] == "'" and '"' not in fields else '"'


def _delimiter_of(header: str, quote: str) -> str:
    """Find the delimiter outside quoted names; a comma wins, because the others occur inside of names."""
    outside = "".join(header.split(quote)[::2]) if quote and header.count(quote) % 2 == 0 else header
    if "," in outside:
        return ","
    best = max(DELIMITERS, key=outside.count)
    return best if outside.count(best) else ","


def _reads_better_unquoted(look: str, quoted: Dialect) -> bool:
    """Say whether tab-separated lines are whole without quoting while quoting breaks or merges some of them."""
    whole = look if len(look) < _LOOK else look[: look.rfind("\n") + 1]
    rows = [line for line in whole.splitlines() if line]
    plain = [line.count(quoted.delimiter) for line in rows]
    if len(set(plain)) != 1:
        return False
    try:
        merged = sum(1 for _ in _records(lambda: iter(whole.splitlines(keepends=True)), "", quoted))
    except DataError:
        return True
    return merged < len(rows)


def _lines(stream: TextIO) -> Iterator[str]:
    """Yield lines; one without an end in sight is no line of a table."""
    while line := stream.readline(LONGEST_FIELD + 1):
        if len(line) > LONGEST_FIELD:
            raise DataError(
                f"{getattr(stream, 'name', 'the file')}: a line of more than {LONGEST_FIELD // 2**20} million "
                "characters. Expected one row per line; check how it was exported."
            )
        yield line


def _records(
    lines: Callable[[], Iterator[str]], name: str, dialect: Dialect, skipped: Counter[str] | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, fields) of each row; lines that hold nothing at all are no rows."""
    quoting = csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE
    reader = csv.reader(
        lines(), delimiter=dialect.delimiter, quotechar=dialect.quote or None, quoting=quoting, strict=True
    )
    while True:
        batch, problem = _batch(reader)
        for line, record in batch:
            if record:
                yield line, record
            elif skipped is not None:
                skipped[BLANK] += 1
        if problem is not None:
            line, error = problem
            raise DataError(
                f"{name}: malformed row that starts on line {line}: {error}. A field in quotes must be closed, be "
                f"followed by the delimiter {dialect.delimiter!r}, and write a quote inside it twice; where quotes are "
                "ordinary characters pass quote 'none' (--quote none)."
            )
        if not batch:
            return


def _batch(reader: object) -> tuple[list[tuple[int, list[str]]], tuple[int, csv.Error] | None]:
    """Read some rows under a limit of the field size that is put back before anybody else runs."""
    rows: list[tuple[int, list[str]]] = []
    with _field_limit:
        before = csv.field_size_limit(LONGEST_FIELD)
        try:
            for _ in range(_AT_ONCE):
                line = reader.line_num + 1  # type: ignore[attr-defined]
                try:
                    rows.append((line, next(reader)))  # type: ignore[call-overload]
                except StopIteration:
                    break
                except csv.Error as error:
                    return rows, (line, error)
        finally:
            csv.field_size_limit(before)
    return rows, None


def _rows(records: Iterator[tuple[int, list[str]]], header: list[str], dialect: Dialect, name: str) -> Records:
    """Yield rows as mappings; rows of another width are collected and raised together at the end."""
    wrong, shown = 0, []
    width = len(header)
    for line, record in islice(records, 1, None):
        if len(record) == width:
            if not wrong:
                yield line, dict(zip(header, record))
            continue
        wrong += 1
        if wrong <= _SHOWN:
            shown.append(f"  line {line}: {len(record)} fields, starting {record[0][:40]!r}")
    if wrong:
        more = f"\n  and {wrong - _SHOWN} more" if wrong > _SHOWN else ""
        listed = "\n".join(shown)
        raise DataError(
            f"{name}: {wrong} malformed rows; the header has {width} fields split by {dialect.delimiter!r}:\n"
            f"{listed}{more}\nPut double quotes around a field that contains {dialect.delimiter!r} or a line break; if "
            "the delimiter is another, name it (--delimiter)."
        )
