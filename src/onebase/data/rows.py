"""The rows of a data set once it is read, checked and split: plain tuples of strings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from onebase.errors import DataError

Kind = Literal["classification", "causal-lm", "completion", "tokens", "qa", "masked-lm"]
KINDS: tuple[Kind, ...] = ("classification", "causal-lm", "completion", "tokens", "qa", "masked-lm")
SPLITS = ("train", "validation", "test")
_BY_POSITION = ("text", "text_pair", "label", "completion")

# A plain decimal number. float() would also take "nan", "inf" and "1_000", which are names of classes.
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?", re.ASCII)
# Half-star ratings have 10 to 11 values and are classes; STS-B, a similarity from 0 to 5, has 136 in train.
_MOST_GRADES = 20


@dataclass(frozen=True)
class Rows:
    """Rows of one split, column by column; every tuple has the same length."""

    text: tuple[str, ...] = ()
    """the text to classify, the prompt to complete, or a document or paragraph to model"""
    text_pair: tuple[str, ...] | None = None
    """the second text of each row, for tasks on pairs"""
    label: tuple[str, ...] | None = None
    """the label of each row exactly as written, for classification"""
    completion: tuple[str, ...] | None = None
    """what should follow each prompt, for completion"""
    tokens: tuple[tuple[str, ...], ...] | None = None
    """the words of each row, for tokens"""
    tags: tuple[tuple[str, ...], ...] | None = None
    """one tag for each of `tokens`"""
    spans: tuple[tuple[tuple[int, int, str], ...], ...] | None = None
    """(start, end, label) of the labelled pieces of each text, for tokens given as text"""
    question: tuple[str, ...] | None = None
    """the question of each row, for qa"""
    context: tuple[str, ...] | None = None
    """where the answer to each question stands"""
    answers: tuple[tuple[tuple[str, int], ...], ...] | None = None
    """(text, start) of the right answers in each context, () where there is none"""

    def __post_init__(self) -> None:
        sizes = {role: len(self[role]) for role in self.roles}
        if len(set(sizes.values())) > 1:
            raise DataError(f"the columns of Rows differ in length: {sizes}. Give every row every column.")

    def __len__(self) -> int:
        return len(self[self.roles[0]])

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that have a column; kinds without a text leave `text` empty."""
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        without = not self.text and any(role in ("tokens", "question") for role in given)
        return tuple(role for role in given if role != "text" or not without)

    def __getitem__(self, role: str) -> tuple[Any, ...]:
        """Return the column of a role.

        Raises:
            DataError: there is none; the message lists those there are.
        """
        column = getattr(self, role, None)
        if column is None:
            raise DataError(f"these rows have no {role!r}; they have {', '.join(self.roles)}")
        return column

    def get(self, role: str) -> tuple[Any, ...] | None:
        """Return the column of a role, None where there is none."""
        return self[role] if role in self.roles else None

    def place(self, index: int) -> str:
        """Name a row in messages."""
        return f"row {index + 1}"

    def joined(self, other: Rows) -> Rows:
        """Return these rows followed by those of `other`, which has the same columns."""
        joined: dict[str, Any] = {}
        for field in fields(self):
            one, two = getattr(self, field.name), getattr(other, field.name)
            joined[field.name] = None if one is None or two is None else (*one, *two)
        return Rows(**joined)

    def select(self, indices: Iterable[int]) -> Rows:
        """Take some rows, in the order asked for.

        Args:
            indices: positions from 0; negative ones count from the end; repeats are allowed.

        Returns:
            New rows with the same columns.

        Raises:
            IndexError: a position is outside the rows.
        """
        wanted = list(indices)
        taken = {}
        for field in fields(self):
            column = getattr(self, field.name)
            taken[field.name] = tuple(column[i] for i in wanted) if field.name in self.roles else column
        return Rows(**taken)


@dataclass(frozen=True)
class Data:
    """A data set ready to encode: three splits of strings, and where they came from."""

    kind: Kind
    train: Rows
    validation: Rows
    test: Rows
    labels: tuple[str, ...]
    """names of the classes in natural order; empty unless kind is "classification" """
    source: str
    """display name of the file or folder, without its path"""
    digest: str
    """sha256 over the kind and the contents of all splits, hexadecimal"""
    splits_made: bool
    """True where validation or test was cut from the rows given, False where the data came split"""
    columns: dict[str, str]
    """role -> name of the column used; empty for plain text"""
    notes: tuple[str, ...] = ()
    """what a person should know about the splits and labels, one sentence each"""

    @property
    def scores(self) -> bool:
        """Whether the labels are measurements (0.33, 4.75 ...) rather than names of classes."""
        return are_scores(self.labels)


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


def are_scores(labels: Sequence[str]) -> bool:
    """Say whether distinct labels are measurements: many numbers, some with a fraction."""
    return (
        len(labels) > _MOST_GRADES
        and all(_NUMBER.fullmatch(label) for label in labels)
        and any(not float(label).is_integer() for label in labels)
    )


def digest_of(kind: str, splits: dict[str, Rows]) -> str:
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
        # The first four by position, so that the digest of a kind never depends on what other kinds have.
        columns = [rows.get(role) for role in _BY_POSITION]
        columns += [rows[role] for role in rows.roles if role not in _BY_POSITION]
        sha.update(f"{name} {len(rows)}\n".encode())
        for i in range(len(rows)):
            # JSON in ASCII keeps row and column borders unambiguous, and takes lone surrogates.
            sha.update(json.dumps([None if c is None else c[i] for c in columns]).encode("ascii") + b"\n")
    return sha.hexdigest()
