"""Cells of the kinds whose values are no plain strings: words, tags, spans of a text, answers in a context."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

_SHOWN = 60  # characters of a value that an error shows

Span = tuple[int, int, str]
Answer = tuple[str, int]


class Misfit(ValueError):
    """A cell that cannot be read: what is wrong, with the value seen."""


def words_of(value: Any) -> tuple[str, ...]:
    """Read words or tags: a list, a list written as JSON, or a string that white space separates.

    Raises:
        Misfit: there are none, or one is empty or no text.
    """
    value = _parsed(value)
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, Sequence) or not value:
        raise Misfit(f"a list of words is expected, got {_short(value)}")
    bad = [item for item in value if isinstance(item, Mapping | Sequence) and not isinstance(item, str)]
    if bad or any(not str(item).strip() for item in value):
        raise Misfit(f"every word must be text that is not empty, got {_short(bad[0] if bad else value)}")
    return tuple(str(item) for item in value)


def spans_of(value: Any, text: str) -> tuple[Span, ...]:
    """Read the labelled pieces of a text: a list, or its JSON, of ``{"start", "end", "label"}``, possibly none.

    Args:
        value: the cell; offsets count characters, the end is excluded.
        text: the text of the same row.

    Raises:
        Misfit: no list, a key is missing, offsets lie outside of the text, or two pieces overlap.
    """
    value = _parsed(value)
    if value is None or value == "":
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Misfit(f"a list of {{start, end, label}} is expected, got {_short(value)}")
    found = []
    for item in value:
        if not isinstance(item, Mapping) or not {"start", "end", "label"} <= set(item):
            raise Misfit(f"a span needs start, end and label, got {_short(item)}")
        start, end, label = _whole(item["start"]), _whole(item["end"]), str(item["label"]).strip()
        if start is None or end is None or not 0 <= start < end <= len(text):
            raise Misfit(f"a span from {item['start']!r} to {item['end']!r} of a text of {len(text)} characters")
        if not label or not text[start:end].strip():
            raise Misfit(f"a span without {'text' if label else 'label'}: {_short(item)}")
        found.append((start, end, label))
    found.sort()
    for one, two in pairwise(found):
        if two[0] < one[1]:
            raise Misfit(f"two spans overlap: {one} and {two}; one label per word")
    return tuple(found)


def answers_of(value: Any, start: Any, context: str) -> tuple[Answer, ...]:
    """Read the right answers to a question as (text, start), none where the context has no answer.

    Args:
        value: a string; a list of strings or of ``{"text", "answer_start"}``; SQuAD's
            ``{"text": [...], "answer_start": [...]}``; any of them as JSON; nothing: there is no answer.
        start: where a plain string starts, in characters of the context; None or -1: where it occurs first.
        context: the context of the same row.

    Raises:
        Misfit: an answer does not occur in the context, or not where it is said to start.
    """
    value = _parsed(value)
    if value is None or value == "":
        return ()
    if isinstance(value, Mapping):
        texts = _listed(value.get("text", []))
        starts = _listed(value.get("answer_start", [None] * len(texts)))
        if len(texts) != len(starts):
            raise Misfit(f"{len(texts)} answers but {len(starts)} starts")
        pairs = list(zip(texts, starts))
    elif isinstance(value, str) or not isinstance(value, Sequence):
        pairs = [(value, start)]
    else:
        pairs = [(v.get("text"), v.get("answer_start")) if isinstance(v, Mapping) else (v, None) for v in value]
    return tuple(_answer(text, at, context) for text, at in pairs)


def _answer(text: Any, start: Any, context: str) -> Answer:
    if text is None or not str(text).strip():
        raise Misfit("an answer is empty; leave the answers empty where the context has none")
    words, missing = str(text), start is None or str(start).strip() in ("", "-1", "nan")
    at = context.find(words) if missing else _whole(start)
    if at is None or at < 0:
        raise Misfit(
            f"the answer {_short(words)} does not occur in its context"
            if missing
            else f"the start {start!r} of the answer {_short(words)} is no position"
        )
    if context[at : at + len(words)] != words:
        raise Misfit(
            f"the answer {_short(words)} is said to start at {at}, where the context has "
            f"{_short(context[at : at + len(words)])}"
        )
    return words, at


def _parsed(value: Any) -> Any:
    """Return a cell, read as JSON where it is a string that holds a list or an object."""
    if hasattr(value, "tolist"):  # arrays, as data frames hold them
        value = value.tolist()
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _whole(value: Any) -> int | None:
    """Return a whole number, also one that is written as a string; None for anything else."""
    try:
        return int(value) if not isinstance(value, bool) and float(value).is_integer() else None
    except (TypeError, ValueError, OverflowError):
        return None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"


# role -> how a cell becomes a value, given the raw cells of its row by role
READERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "tokens": lambda row: words_of(row["tokens"]),
    "tags": lambda row: words_of(row["tags"]),
    "spans": lambda row: spans_of(row["spans"], str(row["text"])),
    "answers": lambda row: answers_of(row["answers"], row.get("answer_start"), str(row["context"])),
}
