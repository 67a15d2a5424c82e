"""Every problem of a data set, collected over all its files and raised once, by place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from onebase.data.columns import match_column
from onebase.data.files import Table
from onebase.data.messages import as_messages
from onebase.data.rows import Kind, Rows, are_scores, natural_order
from onebase.data.splits import FEWEST_ROWS
from onebase.errors import DataError

_SHOWN = 10
_NOT_TEXT = (list, tuple, dict, set, bytes)


class Problems:
    """A list of what is wrong and where, that becomes one DataError."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[tuple[str, str]] = []

    def add(self, what: str, where: str) -> None:
        """Note one problem: `what` is counted in the summary, `where` is shown for the first ones."""
        self.found.append((what, where))

    def raise_any(self) -> None:
        """Raise what was found, if anything was.

        Raises:
            DataError: with the total, the count of each problem, and where the first 10 are.
        """
        if not self.found:
            return
        total = len(self.found)
        kinds = ", ".join(f"{count} x {what}" for what, count in Counter(w for w, _ in self.found).items())
        lines = [f"  {where}" for _, where in self.found[:_SHOWN]]
        if total > _SHOWN:
            lines.append(f"  and {total - _SHOWN} more")
        raise DataError(
            f"{self.source}: {total} problem{'s' if total > 1 else ''} ({kinds}):\n"
            + "\n".join(lines)
            + "\nNo row was dropped. Correct or remove these in the file, then load it again."
        )


def checked_rows(table: Table, columns: Mapping[str, str], kind: Kind, problems: Problems) -> Rows | None:
    """Take the columns in use out of a table as strings, noting every cell that cannot be used.

    Args:
        table: one split.
        columns: role -> column, as found in the train split.
        kind: the kind of data.
        problems: where problems are noted.

    Returns:
        The rows, or None where a problem was noted.
    """
    before = len(problems.found)
    present: dict[str, str] = {}
    for role, wanted in columns.items():
        column = match_column(table, wanted)
        if column is not None:
            present[role] = column
        else:
            unlabelled = f"; its {len(table)} rows are unlabelled" if role == "label" else ""
            shown = ", ".join(map(repr, table.cells))
            problems.add("missing column", f"{table.name}: no column {wanted!r}{unlabelled}; columns: {shown}")
    taken: dict[str, list[Any]] = {role: [] for role in present}
    for i in range(len(table)):  # row by row, so that problems come in the order of the file
        for role, column in present.items():
            taken[role].append(_written(table, i, role, column, problems))
    if len(problems.found) > before:
        return None
    values = {role: tuple(column) for role, column in taken.items()}
    if kind == "completion":
        return Rows(text=values["prompt"], completion=values["completion"])
    return Rows(**values)


def check_classes(tables: Mapping[str, Table], splits: Mapping[str, Rows], column: str, problems: Problems) -> None:
    """Note a train split of one class, and held-out labels that train lacks.

    Scores are measurements: a value that train happens not to hold is no unknown class.
    """
    labels = {split: rows.label or () for split, rows in splits.items()}
    known = set(labels["train"])
    if len(known) < 2:
        problems.add(
            "one class only",
            f"{tables['train'].name}: every label in column {column!r} is {next(iter(known), '')!r}; "
            "expected at least 2 classes",
        )
    if are_scores(natural_order(known)) and are_scores(natural_order(known.union(*labels.values()))):
        return
    for split, values in labels.items():
        table = tables[split]
        for place, label in zip(table.places, values):
            if label not in known:
                where = f"{table.name}, {table.unit} {place}, column {column!r}"
                problems.add("label that train lacks", f"{where}: {label!r} is not a label of train")


def check_count(table: Table, rows: Rows, problems: Problems) -> None:
    """Note a train split with too few rows to learn from."""
    if len(rows) < FEWEST_ROWS:
        problems.add("too few rows", f"{table.name}: {len(rows)} rows to train on; expected at least {FEWEST_ROWS}")


def _written(table: Table, i: int, role: str, column: str, problems: Problems) -> Any:
    value = table.cells[column][i]
    what = None
    if role == "messages":
        try:
            return as_messages(value)
        except ValueError as error:
            problems.add("conversation that cannot be used", f"{table.name}, {table.unit} {table.places[i]}: {error}")
            return ()
    if role == "score" and not _is_missing(value) and str(value).strip() and not _is_finite(value):
        what = "score that is no finite number"
    elif isinstance(value, _NOT_TEXT):
        what = f"{role} that is no text (a {type(value).__name__})"
    elif _is_missing(value) or not str(value).strip():
        what = "missing label" if role == "label" else f"empty {role}"
    if what is None:
        return str(value)
    problems.add(what, f"{table.name}, {table.unit} {table.places[i]}, column {column!r}: {what}")
    return ""


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(float(str(value)))
    except ValueError:
        return False


def _is_missing(value: Any) -> bool:
    # pandas.NA is named, not imported: a list of dicts needs no pandas.
    return value is None or type(value).__name__ in ("NAType", "NaTType") or (value != value) is True
