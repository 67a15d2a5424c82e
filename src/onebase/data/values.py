"""Cells turned into the values of a role: text, label, score, labels, words, tags, spans, answers, messages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from onebase.data.messages import as_messages
from onebase.data.misfit import Misfit, short
from onebase.data.table import Broken, Flag, Number

_NOT_TEXT = (list, tuple, dict, set, bytes)
_SEPARATORS = ("|", ";", ",")


class Answer(NamedTuple):
    """One answer to a question: a span of its context.

    Attributes:
        text: the span.
        start: where it starts in the context, in characters from 0.
    """

    text: str
    start: int


class Marked(NamedTuple):
    """A labelled piece of a text.

    Attributes:
        start, end: where it stands in the text, in characters from 0, end excluded.
        label: what it is.
    """

    start: int
    end: int
    label: str


def _written(value: Any, role: str) -> str:
    """Return a cell as it was written."""
    if isinstance(value, _NOT_TEXT):
        raise Misfit(f"{role} that is no text (a {type(value).__name__})", f"{short(value)}; expected text")
    if isinstance(value, Broken):
        raise Misfit(f"error value as {role}", f"{value}; correct the formula")
    if is_missing(value) or not str(value).strip():
        raise Misfit("missing label" if role in ("label", "score") else f"empty {role}")
    return str(value)


def as_text(value: Any, role: str) -> str:
    """Return a text that is not empty."""
    return _written(value, role)


def as_label(value: Any, role: str) -> str:
    """Return the name of a class, as written."""
    if isinstance(value, float) and math.isinf(value):
        raise Misfit("label that is infinite", f"{value}; expected the name of a class")
    return _written(value, role)


def as_score(value: Any, role: str) -> float:
    """Return a finite number."""
    text = _written(value, role)
    try:
        number = float(text) if not isinstance(value, bool) else float(value)
    except ValueError:
        comma = "; write decimals with a point" if "," in text else ""
        raise Misfit(f"{role} that is no number", f"{short(text)}; expected a number{comma}") from None
    if not math.isfinite(number):
        raise Misfit(f"{role} that is not finite", f"{text}; expected a finite number")
    return number


def as_labels(value: Any, role: str, separator: str | None = None) -> tuple[str, ...]:
    """Return the names of classes: of a list, of a list written as JSON, or of a string cut at a separator.

    An empty list or string means that none applies; None means that the row is unlabelled.
    """
    if is_missing(value):
        raise Misfit("missing label", "expected a list, empty where none applies")
    if isinstance(value, str) and not isinstance(value, Broken):
        parsed = _json_list(value)
        parts: Sequence[Any] = parsed if parsed is not None else _cut(value, separator)
    elif isinstance(value, list | tuple):
        parts = value
    else:
        raise Misfit("labels that are no list", f"{short(value)}; expected a list or a string of names")
    names = [
        _written(part, "label") if not isinstance(part, str) or isinstance(part, Broken) else part.strip()
        for part in parts
    ]
    if any(not name for name in names):
        raise Misfit("empty name among labels", f"{short(value)}")
    if len(set(names)) < len(names):
        raise Misfit("label given twice", f"{short(value)}")
    return tuple(sorted(names))  # a set: the order says nothing


def separator_of(values: Sequence[Any]) -> str | None:
    """Find what separates labels written in one string: the first of | ; , that occurs in any."""
    written = [value for value in values if isinstance(value, str) and _json_list(value) is None]
    return next((mark for mark in _SEPARATORS if any(mark in value for value in written)), None)


def as_words(value: Any, role: str) -> tuple[str, ...]:
    """Return words or tags: of a list, of a list written as JSON, or of a string cut at white space."""
    if isinstance(value, str) and not isinstance(value, Broken):
        parsed = _json_list(value)
        value = parsed if parsed is not None else value.split()
    if is_missing(value) or (isinstance(value, list | tuple) and not value):
        raise Misfit(f"empty {role}")
    if not isinstance(value, list | tuple):
        raise Misfit(f"{role} that are no list", f"{short(value)}; expected a list of strings")
    for part in value:
        if isinstance(part, _NOT_TEXT) or is_missing(part) or not str(part).strip():
            raise Misfit(f"{role} with an empty or nested item", f"{short(part)} in {short(value)}")
    return tuple(map(str, value))


def as_spans(value: Any, role: str, text: str) -> tuple[Marked, ...]:
    """Return the labelled pieces of a text in their order: of ``[{"start", "end", "label"}]``, also written as JSON.

    An empty list or string means that nothing is marked; None means that the row is unlabelled. A span's own "text",
    where it has one, must be what stands there; what else it holds is no matter here.
    """
    if is_missing(value):
        raise Misfit(f"missing {role}", "expected a list, empty where nothing is marked")
    if isinstance(value, str) and not isinstance(value, Broken):
        parsed = _json_list(value) if value.strip() else []
        value = value if parsed is None else parsed
    if not isinstance(value, list | tuple):
        raise Misfit(f"{role} that are no list", f"{short(value)}; expected [{{'start': 0, 'end': 4, 'label': ...}}]")
    found = sorted((_marked(item, text) for item in value), key=lambda span: span[:2])
    for one, two in pairwise(found):
        if two.start < one.end:
            shown = " and ".join(f"{span.label!r} from {span.start} to {span.end}" for span in (one, two))
            raise Misfit("two spans that overlap", f"{shown}; expected one label per piece")
    return tuple(found)


def _marked(item: Any, text: str) -> Marked:
    if not isinstance(item, Mapping) or any(is_missing(item.get(key)) for key in ("start", "end", "label")):
        raise Misfit("span without start, end and label", f"{short(item)}; expected all three")
    start, end = _position(item["start"]), _position(item["end"])
    if not 0 <= start < end <= len(text):
        seen = f"from {item['start']} to {item['end']} of a text of {len(text)} characters"
        raise Misfit("span that is not within its text", f"{seen}; expected characters from 0, end excluded")
    piece = text[start:end]
    if not piece.strip():
        raise Misfit("span of white space", f"from {start} to {end}; expected at least one letter or sign")
    if isinstance(item.get("text"), str) and item["text"] != piece:
        raise Misfit(
            "span that is not at its start",
            f"{short(item['text'])} is said to stand from {start} to {end}, where the text has {short(piece)}",
        )
    return Marked(start, end, _written(item["label"], "label"))


def as_answers(value: Any, role: str, context: str, start: Any = None) -> tuple[Answer, ...]:
    """Return answers: ``{"text": [..], "answer_start": [..]}``, ``[{"text", "answer_start"}]``, or a string.

    No answer at all is an empty tuple. An answer without a start, or with a start of -1, stands where the context
    first holds it.
    """
    if isinstance(value, str) and value.startswith(("{", "[")):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Misfit("answers that are not JSON", short(value)) from None
    if is_missing(value) or value == "":
        return ()
    if isinstance(value, Mapping):
        texts, starts = value.get("text", []), value.get("answer_start", value.get("start"))
        texts = [texts] if isinstance(texts, str) else texts
        starts = starts if isinstance(starts, list | tuple) else [starts] * len(_listed(texts))
    elif isinstance(value, list | tuple):
        items = [item if isinstance(item, Mapping) else {"text": item} for item in value]
        texts, starts = [item.get("text") for item in items], [item.get("answer_start") for item in items]
    else:
        texts, starts = [value], [start]
    texts = _listed(texts)
    if len(texts) != len(starts):
        raise Misfit("answers without as many starts", f"{len(texts)} texts, {len(starts)} starts")
    return tuple(_answer(text, at, context) for text, at in zip(texts, starts))


def _listed(texts: Any) -> Sequence[Any]:
    if not isinstance(texts, list | tuple):
        raise Misfit("answers that are no list", short(texts))
    return texts


def _answer(text: Any, start: Any, context: str) -> Answer:
    words = _written(text, "answer")
    if is_missing(start) or str(start).strip() in ("", "-1"):
        at = context.find(words)
        if at < 0:
            raise Misfit("answer that is not in its context", f"{short(words)} does not occur in it")
        return Answer(words, at)
    at = _position(start)
    if at < 0:
        raise Misfit("answer start that is no position", f"{short(start)}; expected characters from 0")
    if context[at : at + len(words)] != words:
        raise Misfit(
            "answer that is not at its start",
            f"{short(words)} is said to start at {at}, where the context has {context[at : at + len(words)][:30]!r}",
        )
    return Answer(words, at)


def _position(value: Any) -> int:
    """Return a number of characters, -1 where the value is none; Parquet and Excel write 3 as 3.0."""
    try:
        number = float(str(value))
    except ValueError:
        return -1
    return int(number) if number.is_integer() else -1


def as_flags(cells: Sequence[Any], columns: Sequence[str]) -> tuple[str, ...]:
    """Return the classes whose columns hold 1."""
    names = []
    for cell, column in zip(cells, columns):
        if is_missing(cell) or str(cell).strip() == "":
            raise Misfit("missing label", f"column {column!r} is empty; expected 0 or 1")
        if str(cell).strip().lower() not in ("0", "1", "0.0", "1.0", "true", "false"):
            raise Misfit("label that is neither 0 nor 1", f"column {column!r} holds {short(cell)}")
        if str(cell).strip().lower() in ("1", "1.0", "true"):
            names.append(column)
    return tuple(sorted(names))


def is_missing(value: Any) -> bool:
    """Say whether a cell holds nothing."""
    # pandas.NA is named, not imported: a list of dicts needs no pandas.
    return (
        value is None or type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    )


def sort_of(value: Any) -> str:
    """Name what a cell is, where the format tells: number, true/false, or word."""
    if isinstance(value, Flag | bool):
        return "true/false"
    if isinstance(value, Number | int | float):
        return "number"
    return "word"


def _json_list(text: str) -> list[Any] | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _cut(text: str, separator: str | None) -> list[str]:
    if not text.strip():
        return []
    return text.split(separator) if separator else [text]


CONVERT: dict[str, Callable[[Any, str], Any]] = {
    "text": as_text,
    "label": as_label,
    "score": as_score,
    "words": as_words,
    "tags": as_words,
    "messages": as_messages,
}
