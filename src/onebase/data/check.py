"""Every problem of a data set, collected over all its files and raised once, by place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onebase.data.columns import Columns, match_column
from onebase.data.disk import Coded, DiskColumn
from onebase.data.kinds import KINDS, TARGETS
from onebase.data.misfit import Misfit
from onebase.data.pictures import as_picture
from onebase.data.rows import Rows, names_in, natural_order
from onebase.data.splits import FEWEST_ROWS
from onebase.data.table import Number, Table
from onebase.data.tags import OUTSIDE, entity_type, is_bio
from onebase.data.values import (
    CONVERT,
    Answer,
    Marked,
    as_answers,
    as_flags,
    as_labels,
    as_spans,
    separator_of,
    sort_of,
)
from onebase.errors import DataError

_SHOWN = 10
_KEPT = 1000  # problems remembered with their places; beyond that they are counted
_LONGEST_LABEL = 200  # characters; what is longer is a text in the wrong column


class Problems:
    """A list of what is wrong and where, that becomes one DataError."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[tuple[str, str]] = []
        self.counts: Counter[str] = Counter()

    def add(self, what: str, where: str) -> None:
        """Note one problem: `what` is counted in the summary, `where` is shown for the first ones."""
        self.counts[what] += 1
        if len(self.found) < _KEPT:
            self.found.append((what, where))

    def __len__(self) -> int:
        return sum(self.counts.values())

    def raise_any(self) -> None:
        """Raise what was found, if anything was.

        Raises:
            DataError: with the total, the count of each problem, and where the first 10 are; its attribute
                `problems` has up to 1000 of them as (what, where).
        """
        total = len(self)
        if not total:
            return
        kinds = ", ".join(f"{count} x {what}" for what, count in self.counts.items())
        lines = [f"  {where}" for _, where in self.found[:_SHOWN]]
        if total > _SHOWN:
            lines.append(f"  and {total - _SHOWN} more")
        error = DataError(
            f"{self.source}: {total} problem{'s' if total > 1 else ''} ({kinds}):\n"
            + "\n".join(lines)
            + "\nNo row was dropped. Correct or remove these in the file, then load it again."
        )
        error.problems = tuple(self.found)
        raise error


def checked_rows(
    table: Table, columns: Columns, kind: str, problems: Problems, group: str | None = None
) -> Rows | None:
    """Take the columns in use out of a table as values of their roles, noting every cell that cannot be used.

    Args:
        table: one split; a large one is read from its start, and its values are kept on disk.
        columns: role -> columns, as found in the train split.
        kind: the kind of data.
        problems: where problems are noted.
        group: column of the groups that stay together, read as text into the role "group".

    Returns:
        The rows, or None where a problem was noted.
    """
    before = len(problems)
    wanted = {**columns, **({"group": (group,)} if group else {})}
    present = _present(table, wanted, problems)
    readers = {role: _reader(table, role, names, kind) for role, names in present.items()}
    used = [name for names in present.values() for name in names]
    spans, at = {}, 0
    for role, names in present.items():
        spans[role] = slice(at, at + len(names))
        at += len(names)
    stores: dict[str, Any] = {role: _store(table, role, kind) for role in present if role != "answer_start"}
    places: Any = [] if table.again is None else _Places()
    for place, cells in table.scan(used):  # row by row, so that problems come in the order of the file
        places.append(place)
        values: dict[str, Any] = {}
        row = {role: cells[span] for role, span in spans.items()}
        for role, reader in readers.items():
            try:
                values[role] = reader(row, values)
            except Misfit as misfit:
                where = f"{table.name}, {table.unit} {place}, column {present[role][0]!r}: {misfit.what}"
                problems.add(misfit.what, where + (f": {misfit.detail}" if misfit.detail else ""))
                values[role] = None
        _check_row(table, place, present, values, problems)
        if len(problems) == before:
            for role, store in stores.items():
                store.append(values[role])
    if len(problems) > before:
        return None
    for role, store in stores.items():
        stores[role] = tuple(store) if isinstance(store, list) else store
        if not isinstance(store, list):
            store.flush()
    numbers = tuple(places) if isinstance(places, list) else places.finished()
    return Rows(places=numbers, file=table.name, unit=table.unit, **stores)


def note_mixtures(table: Table, columns: Columns, problems: Problems) -> list[str]:
    """Note a label column of numbers and words; return notes on numbers among texts.

    Only formats that tell numbers from words are looked at, and of a large file only its first rows.
    """
    notes = []
    for role, names in columns.items():
        sorts: dict[str, int] = {}
        for i, value in enumerate(table.cells.get(names[0], ())):
            if value is not None and not isinstance(value, list | tuple | dict):
                sorts.setdefault(sort_of(value), i)
        if len(sorts) < 2:
            continue
        shown = ", ".join(
            f"{sort} {table.cells[names[0]][i]!r} in {table.unit} {table.places[i]}"
            for sort, i in sorted(sorts.items())
        )
        numeric = all(_is_number(value) for value in table.cells[names[0]] if value is not None)
        if role == "label" and not numeric:
            problems.add(
                "label column of mixed types", f"{table.name}, column {names[0]!r}: {shown}; expected one type"
            )
        elif role != "label":
            notes.append(f"{table.name}: column {names[0]!r} mixes types ({shown}); all are read as they are written.")
    return notes


def check_classes(
    tables: Mapping[str, Table], splits: Mapping[str, Rows], role: str, column: str, problems: Problems
) -> None:
    """Note classes that nothing can be learned from: one only, one per row, and held-out ones that train lacks."""
    train = tables["train"]
    known: Counter[str] = Counter()
    for value in splits["train"][role]:
        known.update(names_in(value))
    names = natural_order(known)
    rows = len(splits["train"])
    if len(names) < (1 if role in ("labels", "spans") else 2):
        shown = (
            f"every label in column {column!r} is {names[0]!r}; expected at least 2 classes"
            if names
            else (f"no row has any label in column {column!r}; expected at least one class")
        )
        problems.add("one class only" if names else "no class", f"{train.name}: {shown}")
    elif role == "label" and len(names) == rows >= FEWEST_ROWS:
        problems.add(
            "label that is unique per row",
            f"{train.name}: each of the {rows} rows has a label of its own in column {column!r} ({names[0][:40]!r}, "
            f"{names[1][:40]!r} ...); expected classes that repeat. Name another column with --label",
        )
        return
    longest = max(names, key=len, default="")
    if role == "label" and len(longest) > _LONGEST_LABEL:
        problems.add("label that is a text", f"{train.name}: column {column!r}: {longest[:40]!r}... as a label")
    types = {OUTSIDE, *map(entity_type, known)} if role == "tags" and is_bio(known) else set()
    for rows_of in splits.values():
        for i, value in enumerate(rows_of[role]):
            for name in names_in(value):
                # B-X teaches what I-X is: only a type of entity can be new where tags mark entities.
                if name not in known and not (is_bio((name, "B-any")) and entity_type(name) in types):
                    problems.add(
                        "label that train lacks",
                        f"{rows_of.place(i)}, column {column!r}: {name!r} is not a label of train",
                    )


def check_scores(table: Table, rows: Rows, role: str, column: str, problems: Problems, learning: bool = True) -> None:
    """Note measurements that are all the same: no order is to be learned, or to be compared where none is learned."""
    values = iter(rows[role])
    first = next(values, None)
    if all(value == first for value in values):
        problems.add(
            "one value only",
            f"{table.name}, column {column!r}: every {role} is {first}; there is nothing to "
            f"{'learn' if learning else 'put in order'}. Name another column where this is not the one",
        )


def check_count(table: Table, rows: Rows, problems: Problems) -> None:
    """Note a train split with too few rows to learn from."""
    if len(rows) < FEWEST_ROWS:
        problems.add("too few rows", f"{table.name}: {len(rows)} rows to train on; expected at least {FEWEST_ROWS}")


def _present(table: Table, wanted: Columns, problems: Problems) -> Columns:
    """Return the columns as this split names them; missing ones are noted."""
    present: Columns = {}
    shown = ", ".join(map(repr, table.cells))
    for role, names in wanted.items():
        found = [match_column(table, name) for name in names]
        if all(column is not None for column in found):
            present[role] = tuple(column for column in found if column is not None)
            continue
        lost = [name for name, column in zip(names, found) if column is None]
        unlabelled = f"; its {len(table)} rows are unlabelled" if role in TARGETS else ""
        problems.add(
            "missing column", f"{table.name}: no column {', '.join(map(repr, lost))}{unlabelled}; columns: {shown}"
        )
    return present


Reader = Callable[[Mapping[str, Sequence[Any]], Mapping[str, Any]], Any]


def _reader(table: Table, role: str, names: Sequence[str], kind: str) -> Reader:
    """Return the function that makes a role's value of a row's cells and the values before it."""
    form = "label" if role == "group" else KINDS[kind].form(role) if role != "answer_start" else "start"
    if form == "start":
        return lambda row, values: None
    if form == "answers":
        return lambda row, values: _within(
            values.get("context"),
            lambda text: as_answers(row[role][0], role, text, row.get("answer_start", (None,))[0]),
        )
    if form == "spans":
        return lambda row, values: _within(values.get("text"), lambda text: as_spans(row[role][0], role, text))
    if form == "image":
        return lambda row, values: as_picture(row[role][0], role, table.folder)
    if form == "labels" and len(names) > 1:
        return lambda row, values: as_flags(row[role], names)
    if form == "labels":
        separator = separator_of(table.cells[names[0]])
        return lambda row, values: as_labels(row[role][0], role, separator)
    convert = CONVERT[form]
    return lambda row, values: convert(row[role][0], role)


def _within(text: str | None, read: Callable[[str], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Read pieces of a text; where the text itself was refused they are not judged."""
    return () if text is None else read(text)


def _check_row(table: Table, place: int, present: Columns, values: Mapping[str, Any], problems: Problems) -> None:
    tokens, tags = values.get("tokens"), values.get("tags")
    if tokens is not None and tags is not None and len(tokens) != len(tags):
        problems.add(
            "tags that do not match the tokens",
            f"{table.name}, {table.unit} {place}, column {present['tags'][0]!r}: {len(tags)} tags for {len(tokens)} "
            "tokens; expected one each",
        )


def _store(table: Table, role: str, kind: str) -> Any:
    if table.again is None:
        return []
    form = "label" if role == "group" else KINDS[kind].form(role)
    if form == "label":
        return Coded()
    restore = {
        "labels": tuple,
        "words": tuple,
        "tags": tuple,
        "messages": tuple,
        "answers": lambda found: tuple(Answer(*item) for item in found),
        "spans": lambda found: tuple(Marked(*item) for item in found),
    }.get(form)
    return DiskColumn(form in ("text", "image"), restore)


class _Places:
    """Places of many rows in little memory."""

    def __init__(self) -> None:
        from array import array

        self.numbers = array("Q")

    def append(self, place: int) -> None:
        self.numbers.append(place)

    def finished(self) -> Any:
        return self.numbers


def _is_number(value: Any) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return isinstance(value, Number | int | float | str)
