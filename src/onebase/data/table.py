"""A table as it was read: columns of cells as written, each row with its place; in memory, or read again as needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from onebase.errors import DataError

# Rows up to this many bytes (as Python objects, roughly) are held in memory, more are kept on disk.
MEMORY = 64 * 2**20
_PER_CELL = 60  # bytes that a Python string needs beside its characters, with its slot in a list
_HEAD = 2_000  # rows of a large file that its columns are found by
_HEAD_BYTES = 8 * 2**20

Records = Iterator[tuple[int, Mapping[Any, Any]]]


class Number(str):
    """A number as it was written; kept apart from a string that looks like one."""

    __slots__ = ()


class Flag(str):
    """true or false as it was written."""

    __slots__ = ()


class Broken(str):
    """The error that a formula of a sheet gave, such as #N/A."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """One file or object, read: `cells[column][row]` is the string as written, None where there is none."""

    name: str
    """file name as shown in messages"""
    cells: dict[str, list[Any]]
    """every cell, or those of the first rows where `again` is set"""
    places: list[int]
    """for each row its line in the file (the header is line 1), or its number from 1 in memory"""
    unit: str = "line"
    """what `places` counts: line or row"""
    running: bool = False
    """True for plain text, whose entries follow one another"""
    again: Callable[[], Records] | None = None
    """reads all rows once more; set where they are too many to hold"""
    skipped: Counter[str] | None = None
    """what was passed over because it holds no row, complete once the rows were read"""
    notes: tuple[str, ...] = ()
    """what a person should know about how it was read"""
    folder: Path | None = None
    """of the file, where relative paths in cells start"""

    def __len__(self) -> int:
        return len(self.places)

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Yield (place, cells) of every row, for some columns."""
        if self.again is None:
            yield from zip(self.places, zip(*(self.cells[column] for column in columns)))
        else:
            for place, record in self.again():
                yield place, tuple(record.get(column) for column in columns)

    def said(self) -> list[str]:
        """Return what a person should know about how it was read, one sentence each."""
        return [*self.notes, *(f"{self.name}: {n:,} {what}." for what, n in (self.skipped or {}).items() if n)]


@dataclass(frozen=True)
class Opened:
    """A file or object that can be read from its start any number of times."""

    name: str
    records: Callable[[Counter[str]], Records]
    """yields (place, column -> cell); counts what it passes over"""
    unit: str = "line"
    running: bool = False
    columns: tuple[str, ...] = ()
    """known before the first row, where the format has a header"""
    notes: tuple[str, ...] = ()
    folder: Path | None = None
    """of the file, where relative paths in cells start"""


def tabulate(opened: Opened, memory: int | None = MEMORY) -> Table:
    """Read a table; hold its rows where they fit.

    Args:
        opened: what to read.
        memory: bytes of rows to hold at most; None holds them all.

    Returns:
        All rows, or the first ones and the means to read all again.

    Raises:
        DataError: a row is malformed, or there is none.
    """
    skipped: Counter[str] = Counter()
    places: list[int] = []
    cells: dict[str, list[Any]] = {column: [] for column in opened.columns}
    used = 0
    rows = opened.records(skipped)
    for place, record in rows:
        if record.keys() != cells.keys():
            _widen(cells, record, len(places))
        for column, values in cells.items():
            value = record.get(column)
            values.append(value)
            used += _PER_CELL + (len(value) if isinstance(value, str | bytes) else _nested(value))
        places.append(place)
        if memory is not None and used > memory and (len(places) >= _HEAD or used > _HEAD_BYTES):
            break
    if memory is not None and used > memory:
        return _large(opened, cells, places)
    if not places:
        raise DataError(
            f"{opened.name}: no rows{' below the header' if opened.columns else ''}: the file is empty. Expected one "
            "row per example; check the export and try again."
        )
    return Table(
        opened.name, cells, places, opened.unit, running=opened.running, skipped=skipped, notes=opened.notes,
        folder=opened.folder,
    )  # fmt: skip


def _widen(cells: dict[str, list[Any]], record: Mapping[Any, Any], count: int) -> None:
    for key in record:
        if key not in cells:
            cells[key] = [None] * count


def _nested(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(_PER_CELL + _nested(item) for item in value)
    if isinstance(value, Mapping):
        return sum(2 * _PER_CELL + _nested(item) for item in value.values())
    return len(value) if isinstance(value, str) else 0


def _large(opened: Opened, cells: dict[str, list[Any]], places: list[int]) -> Table:
    kept, size = 0, 0
    for row in islice(zip(*cells.values()), _HEAD):
        size += sum(_PER_CELL + _nested(value) for value in row)
        if size > _HEAD_BYTES and kept:
            break
        kept += 1
    skipped: Counter[str] = Counter()

    def again() -> Records:
        skipped.clear()
        return opened.records(skipped)

    head = {column: values[:kept] for column, values in cells.items()}
    return Table(
        opened.name, head, places[:kept], opened.unit, opened.running, again, skipped=skipped, notes=opened.notes,
        folder=opened.folder,
    )  # fmt: skip


def refuse_repeats(name: str, header: Sequence[str]) -> None:
    """Refuse a header that names a column twice.

    Raises:
        DataError: with the names.
    """
    twice = sorted(column for column, n in Counter(header).items() if n > 1)
    if twice:
        raise DataError(
            f"{name}: the header names {twice} more than once. Give each column its own name; where the first line is "
            "an example, add one with column names before it."
        )
