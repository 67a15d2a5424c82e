"""The rows of a data set once it is read, checked and split: columns by role, and where each row stood."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onebase.data.kinds import KINDS, MEASURED, TARGETS
from onebase.data.pictures import content_of
from onebase.errors import DataError

SPLITS = ("train", "validation", "test")

# A plain decimal number. float() would also take "nan", "inf" and "1_000", which are names of classes.
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?", re.ASCII)
# Half-star ratings have 10 to 11 values and are classes; STS-B, a similarity from 0 to 5, has 136 in train.
_MOST_GRADES = 20
# The roles whose values enter the digest by position, so that digests stay what they were with fewer kinds.
_BY_POSITION = ("text", "text_pair", "label", "completion")


class Rows:
    """Rows of one split, column by column under the roles of their kind; every column has the same length.

    A task asks for its roles by name: ``rows["tokens"]``, ``rows.get("text_pair")``. A column is a tuple, or a
    sequence of the same values kept on disk where the data is large: index it, or iterate over it.

    Args:
        places: for each row its line or number in its file; None where rows are made in memory.
        file: name of the file or object, for messages.
        unit: what `places` counts: line, row, or record.
        columns: role -> values; a column that is None is not there.

    Raises:
        DataError: the columns differ in length.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, *, places: Sequence[int] | None = None, file: str = "", unit: str = "row", **columns: Sequence[Any] | None
    ) -> None:
        self._columns: dict[str, Sequence[Any]] = {k: v for k, v in columns.items() if v is not None}
        self.places, self.file, self.unit = places, file, unit
        sizes = {role: len(values) for role, values in self._columns.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(f"the columns of Rows differ in length: {sizes}. Give every row every column.")

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), ()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        return self.roles == other.roles and all(
            a is b or (len(a) == len(b) and all(x == y for x, y in zip(a, b)))
            for a, b in ((self[role], other[role]) for role in self.roles)
        )

    def __repr__(self) -> str:
        return (
            f"Rows({len(self)} rows of {', '.join(self.roles) or 'nothing'}{' from ' + self.file if self.file else ''})"
        )

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that have a column."""
        return tuple(self._columns)

    def __getitem__(self, role: str) -> Sequence[Any]:
        """Return the column of a role.

        Raises:
            DataError: there is none; the message lists those there are.
        """
        if role not in self._columns:
            raise DataError(f"these rows have no {role!r}; they have {', '.join(self.roles) or 'no columns'}")
        return self._columns[role]

    def get(self, role: str) -> Sequence[Any] | None:
        """Return the column of a role, None where there is none."""
        return self._columns.get(role)

    @property
    def text(self) -> Sequence[str]:
        """The text to classify, the prompt to complete, or a document or paragraph to model; empty where none is."""
        return self._columns.get("text", self._columns.get("prompt", ()))

    @property
    def text_pair(self) -> Sequence[str] | None:
        """The second text of each row, for tasks on pairs."""
        return self.get("text_pair")

    @property
    def label(self) -> Sequence[str] | None:
        """The label of each row exactly as written, for classification."""
        return self.get("label")

    @property
    def prompt(self) -> Sequence[str] | None:
        """What is to be completed, for completion."""
        return self.get("prompt")

    @property
    def completion(self) -> Sequence[str] | None:
        """What should follow each prompt, for completion."""
        return self.get("completion")

    def row(self, index: int) -> dict[str, Any]:
        """Return one row as role -> value."""
        return {role: values[index] for role, values in self._columns.items()}

    def place(self, index: int) -> str:
        """Say where a row stood: ``train.csv, line 12``."""
        number = index + 1 if self.places is None else self.places[index]
        return f"{self.file or 'rows'}, {self.unit} {number}"

    def joined(self, other: Rows) -> Rows:
        """Return these rows followed by those of `other`, which has the same columns."""
        places = None if self.places is None or other.places is None else (*self.places, *other.places)
        columns = {role: (*values, *other[role]) for role, values in self._columns.items()}
        return Rows(places=places, file=self.file, unit=self.unit, **columns)

    def select(self, indices: Iterable[int]) -> Rows:
        """Take some rows, in the order asked for.

        Args:
            indices: positions from 0; negative ones count from the end; repeats are allowed.

        Returns:
            New rows with the same columns. Rows on disk stay there.

        Raises:
            IndexError: a position is outside the rows.
        """
        columns = [*self._columns.values(), *(() if self.places is None else (self.places,))]
        if all(isinstance(values, tuple) for values in columns):
            wanted = list(indices)
            found = [tuple(values[i] for i in wanted) for values in columns]
        else:
            positions = _positions(indices, len(self))  # one array, shared by all columns
            found = [_picked(values, positions) for values in columns]
        taken = dict(zip(self._columns, found))
        places = None if self.places is None else found[-1]
        return Rows(places=places, file=self.file, unit=self.unit, **taken)


@dataclass(frozen=True)
class Data:
    """A data set ready to encode: three splits of rows, and where they came from."""

    kind: str
    """the kind of data; `onebase.data.KINDS` lists them with their roles"""
    train: Rows
    """rows to learn from"""
    validation: Rows
    """rows that decide what is chosen in training: rate, epoch, thresholds"""
    test: Rows
    """rows that are scored when training is over; may be empty"""
    labels: tuple[str, ...]
    """names of the classes (classification, multilabel), tags or labels of spans (tokens) in natural order; empty for
    other kinds"""
    source: str
    """display name of the file or folder, without its path"""
    digest: str
    """sha256 over the kind and the contents of all splits, hexadecimal"""
    splits_made: bool
    """True where validation or test was cut from the rows given, False where the data came split"""
    columns: dict[str, str]
    """role -> name of the column used (several are joined by commas); empty for plain text"""
    given: tuple[str, ...] = SPLITS
    """names of the splits that the data came with; ("train",) where one file or table was cut"""
    notes: tuple[str, ...] = ()
    """what a person should know about the splits and labels, one sentence each"""

    @property
    def scores(self) -> bool:
        """Whether what is to be predicted is a measurement (0.33, 4.75 ...) rather than the name of a class."""
        return self.kind in MEASURED

    @property
    def splits(self) -> Mapping[str, Rows]:
        """The rows by name of their split; empty splits included."""
        return {name: getattr(self, name) for name in SPLITS}


class Picked(Sequence[Any]):
    """Some positions of a sequence that is not in memory, in a given order; nothing is read before it is asked for.

    Args:
        values: the sequence.
        positions: int64 array (n,) of positions in it.
    """

    def __init__(self, values: Sequence[Any], positions: Any) -> None:
        self.values, self.positions = values, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Picked(self.values, self.positions[index])
        return self.values[int(self.positions[index])]

    def __iter__(self) -> Iterator[Any]:
        return (self.values[int(position)] for position in self.positions)


def _positions(indices: Iterable[int], count: int) -> Any:
    """Return positions as an array of integers from 0 to `count` - 1."""
    import numpy as np

    given = indices if isinstance(indices, np.ndarray) else np.array(list(indices), dtype=np.int64)
    if len(given) and not (-count <= given.min() and given.max() < count):
        raise IndexError(f"rows {given.min()} to {given.max()} of {count}")
    return np.where(given < 0, given + count, given) if len(given) and given.min() < 0 else given


def _picked(values: Sequence[Any], positions: Any) -> Sequence[Any]:
    if isinstance(values, tuple):
        return tuple(values[i] for i in positions)
    if isinstance(values, Picked):
        return Picked(values.values, values.positions[positions])
    return Picked(values, positions)


def natural_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort distinct labels: by value where all are numbers, else alphabetically.

    Args:
        labels: labels as written, repeats allowed.

    Returns:
        Each label once. Numbers of equal value ("1", "01") are ordered as strings.
    """
    distinct = set(labels)
    if all(_NUMBER.fullmatch(label) for label in distinct):
        return tuple(sorted(distinct, key=lambda label: (float(label), label)))
    return tuple(sorted(distinct))


def names_in(value: Any) -> tuple[str, ...]:
    """Return the names in a label, in a list of labels or tags, or in labelled pieces of a text."""
    return (value,) if isinstance(value, str) else tuple(v if isinstance(v, str) else v.label for v in value)


def class_names(rows: Rows, kind: str) -> Iterator[str]:
    """Yield the class of each row, or each of its classes, tags or labels of spans; nothing for other kinds."""
    role = next((role for role in TARGETS if role in rows.roles), None)
    if role is None or KINDS[kind].form(role) == "score":
        return iter(())
    return (name for value in rows[role] for name in names_in(value))


def are_scores(labels: Iterable[str]) -> bool:
    """Say whether labels are measurements: many numbers, some with a fraction.

    What stands for a missing measurement ("nan", "inf", nothing) is no reason to take the others for classes.
    """
    distinct = {label for label in labels if label.strip().lower().lstrip("+-") not in NOT_FINITE}
    return (
        len(distinct) > _MOST_GRADES
        and all(_NUMBER.fullmatch(label) for label in distinct)
        and any(not float(label).is_integer() for label in distinct)
    )


NOT_FINITE = frozenset({"", "nan", "inf", "infinity", "na", "n/a", "null", "none"})


def digest_of(kind: str, splits: Mapping[str, Rows]) -> str:
    """Hash the contents of all splits, so that the same rows give the same digest on any machine.

    Args:
        kind: the kind of data.
        splits: split name -> rows.

    Returns:
        A sha256 in hexadecimal; file names, column names and unused columns do not enter it.
    """
    sha = hashlib.sha256(f"onebase data 1 {kind}\n".encode())
    for name in SPLITS:
        rows = splits[name]
        sha.update(f"{name} {len(rows)}\n".encode())
        if not len(rows):
            continue
        absent = (None,) * len(rows)
        if set(rows.roles) <= {*_BY_POSITION, "prompt"}:
            known = {"text": rows.text, "text_pair": rows.text_pair, "label": rows.label, "completion": rows.completion}
            columns = [absent if known[role] is None else known[role] or absent for role in _BY_POSITION]
        else:
            sha.update(f"{' '.join(rows.roles)}\n".encode())
            columns = [map(content_of, rows[role]) if role == "image" else rows[role] for role in rows.roles]
        for values in zip(*columns):
            # JSON in ASCII keeps row and column borders unambiguous, and takes lone surrogates.
            sha.update(json.dumps(values).encode("ascii") + b"\n")
    return sha.hexdigest()
