"""The rows of a data set once it is read, checked and split: a tuple of strings (or messages) per role."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from onebase.errors import DataError

Kind = Literal["classification", "causal-lm", "completion", "seq2seq", "chat", "embeddings", "similarity"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS = ("train", "validation", "test")

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
    source: tuple[str, ...] | None = None
    """what is turned into `target`, for seq2seq"""
    target: tuple[str, ...] | None = None
    """the text to write, for seq2seq"""
    messages: tuple[tuple[dict[str, Any], ...], ...] | None = None
    """conversations of {role, content, ...}, for chat"""
    anchor: tuple[str, ...] | None = None
    """a text, for embeddings"""
    positive: tuple[str, ...] | None = None
    """a text that belongs to the anchor, for embeddings"""
    negative: tuple[str, ...] | None = None
    """a text that does not belong to the anchor, for embeddings; optional"""
    score: tuple[str, ...] | None = None
    """a number, for similarity: how alike text and text_pair are, in any range"""

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self)}  # rows of other roles have no text
        sizes = {role: len(v) for role, v in given.items() if v is not None and (v or role != "text")}
        if len(set(sizes.values())) > 1:
            raise DataError(f"the columns of Rows differ in length: {sizes}. Give every row every column.")

    def __len__(self) -> int:
        return max(len(getattr(self, field.name) or ()) for field in fields(self))

    def __getitem__(self, role: str) -> tuple[Any, ...]:
        """Return the column of a role.

        Raises:
            DataError: there is none; the message lists those there are.
        """
        column = self.get(role)
        if column is None:
            there = ", ".join(field.name for field in fields(self) if getattr(self, field.name)) or "no columns"
            raise DataError(f"these rows have no {role!r}; they have {there}")
        return column

    def get(self, role: str) -> tuple[Any, ...] | None:
        """Return the column of a role, None where there is none."""
        return getattr(self, role, None)

    def joined(self, other: Rows) -> Rows:
        """Return these rows followed by those of `other`, which has the same columns."""
        joined: dict[str, Any] = {}
        for field in fields(self):
            one, two = getattr(self, field.name), getattr(other, field.name)
            joined[field.name] = None if one is None else (*one, *two)
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
            taken[field.name] = column if not column else tuple(column[i] for i in wanted)
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
        columns = [getattr(rows, field.name) for field in fields(rows)]
        # The first four columns enter by position, also where there are none: digests stay what they were.
        columns = [column or None for column in columns[:4]] + [column for column in columns[4:] if column]
        sha.update(f"{name} {len(rows)}\n".encode())
        for i in range(len(rows)):
            # JSON in ASCII keeps row and column borders unambiguous, and takes lone surrogates.
            sha.update(json.dumps([None if c is None else c[i] for c in columns]).encode("ascii") + b"\n")
    return sha.hexdigest()
