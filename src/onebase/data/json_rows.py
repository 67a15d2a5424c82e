"""JSON and JSON Lines read row by row, numbers in their spelling; and the shapes that whole JSON files come in."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from onebase.data.delimited import BLANK
from onebase.data.table import Flag, Number, Opened, Records
from onebase.data.texts import opened_text
from onebase.errors import DataError

_BLOCK = 1 << 20
# A row may be a long document; a bracket that is never closed must not swallow gigabytes.
LONGEST_VALUE = 64 * 2**20
EXAMPLE = '{"text": "...", "label": "..."}'
_LISTS = ("data", "rows", "examples", "train")  # keys that hold the rows where a file is one object


class _Repeated(ValueError):
    """An object names a key twice."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = sorted(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise _Repeated(f"the keys {twice} stand twice in one object")
    return found


# Numbers keep their spelling: 1.50 stays "1.50". NaN and Infinity, which JSON lacks but many write, are floats.
_DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=float, object_pairs_hook=_pairs)


def decoded(text: str, where: str) -> Any:
    """Decode one JSON value.

    Raises:
        DataError: malformed, too deep, or a key twice; `where` begins the message.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, column {error.colno}: not JSON ({error.msg}). Expected {EXAMPLE}.") from None
    except _Repeated as error:
        raise DataError(f"{where}: {error}. Give each key its own name.") from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deep to read. Expected {EXAMPLE}.") from None


def open_json(path: Path, encoding: str | None) -> Opened:
    """Open a .json or .jsonl file: an array of objects, objects one after another, or one object around them.

    Raises:
        DataError: malformed; also while it is read.
    """
    lines = path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson"))
    with opened_text(path, encoding) as stream:
        head = stream.read(_BLOCK).lstrip()
    if not head:
        raise DataError(f"{path.name}: the file is empty. Expected rows of text; check the export and try again.")
    if lines or (head[0] == "{" and _is_lines(head)):
        return Opened(path.name, lambda skipped: _lines(path, encoding, skipped))
    if head[0] == "[":
        return Opened(path.name, lambda skipped: _array(path, encoding), unit="record")
    return Opened(path.name, lambda skipped: _whole(path, encoding), unit="record")


def nested_splits(path: Path, encoding: str | None, names: Mapping[str, str]) -> dict[str, list[Any]] | None:
    """Return split -> rows where a .json file is one object of splits such as ``{"train": [...]}``, else None."""
    if path.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        return None
    with opened_text(path, encoding) as stream:
        head = stream.read(_BLOCK)
        if not head.lstrip().startswith("{") or _is_lines(head.lstrip()):
            return None
        value = decoded(head + _rest(stream, path.name), f"{path.name}: line 1")
    keys = {str(key).lower() for key in value}
    if "train" not in keys or not keys <= names.keys() or not all(isinstance(v, list) for v in value.values()):
        return None
    return {
        key: [_row(row, f"{path.name}: {key} record {i}") for i, row in enumerate(rows, 1)]
        for key, rows in value.items()
    }


def _is_lines(head: str) -> bool:
    """Say whether a file that starts with an object goes on with another one."""
    try:
        _, end = _DECODER.raw_decode(head)
    except (ValueError, RecursionError):
        first = head.split("\n", 1)[0].rstrip()  # damaged lines are still lines
        return first.endswith("}") and len(first) < len(head.rstrip())
    return head[end:].strip() != ""


def _lines(path: Path, encoding: str | None, skipped: Counter[str]) -> Records:
    with opened_text(path, encoding) as stream:
        for line, content in _json_lines(stream, path.name):
            if not content.strip():
                skipped[BLANK] += 1
                continue
            where = f"{path.name}: line {line}"
            yield line, _row(decoded(content, where), where, content.strip())


def _json_lines(stream: TextIO, name: str) -> Iterator[tuple[int, str]]:
    """Yield (number, line). A lone carriage return ends no line: only what JSON writers end lines with does."""
    line, kept = 1, ""
    while part := stream.readline(LONGEST_VALUE + 1):
        kept += part
        if len(kept) > LONGEST_VALUE:
            raise DataError(f"{name}: line {line} is longer than {LONGEST_VALUE // 2**20} million characters")
        if kept.endswith("\n"):
            yield line, kept
            line, kept = line + 1, ""
    if kept:
        yield line, kept


def _row(value: Any, where: str, written: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        shown = (written or json.dumps(value))[:40]
        raise DataError(f"{where}: {shown!r} is not an object. Expected one object a row, such as {EXAMPLE}.")
    return {key: _flag(cell) for key, cell in value.items()}


def _flag(value: Any) -> Any:
    """Keep true and false as JSON spells them, not as Python does."""
    return Flag("true" if value else "false") if isinstance(value, bool) else value


def _array(path: Path, encoding: str | None) -> Records:
    """Read an array of objects piece by piece."""
    with opened_text(path, encoding) as stream:
        buffer, number = "", 0
        at, ended, between = 0, False, "["
        while True:
            at = _skip_space(buffer, at)
            if len(buffer) - at < 2 and not ended:
                more = stream.read(_BLOCK)
                ended, buffer, at = not more, buffer[at:] + more, 0
                continue
            mark = buffer[at : at + 1]
            if between == "value":
                value, at, buffer, ended = _next_value(stream, buffer, at, ended, f"{path.name}: record {number + 1}")
                number += 1
                yield number, _row(value, f"{path.name}: record {number}")
                between = ",]"
            elif mark == "]" and between in (",]", "[]"):
                if (buffer[at + 1 :] + stream.read(_BLOCK)).strip():
                    raise DataError(f"{path.name}: text after the end of the array. Expected one array of objects.")
                return
            elif between == "[]":
                between = "value"
            elif mark and mark in between:
                at, between = at + 1, "value" if mark == "," else "[]"
            else:
                raise DataError(
                    f"{path.name}: after record {number}: {mark or 'the end of the file'!r}; expected ',' or ']'. The "
                    "file is malformed or cut off: export it again."
                )


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _next_value(stream: TextIO, buffer: str, at: int, ended: bool, where: str) -> tuple[Any, int, str, bool]:
    """Decode the value at a position, reading on while it is not whole."""
    step = _BLOCK
    while True:
        try:
            value, end = _DECODER.raw_decode(buffer, at)
            if end < len(buffer) or ended:  # a number at the end of the buffer may go on
                return value, end, buffer, ended
        except _Repeated as error:
            raise DataError(f"{where}: {error}. Give each key its own name.") from None
        except RecursionError:
            raise DataError(f"{where}: JSON nested too deep to read. Expected {EXAMPLE}.") from None
        except json.JSONDecodeError as error:
            if ended or len(buffer) - at > LONGEST_VALUE:
                raise DataError(f"{where}: not JSON ({error.msg}). Expected {EXAMPLE}.") from None
        more = stream.read(step)
        ended, buffer, at, step = not more, buffer[at:] + more, 0, 2 * step


def _rest(stream: TextIO, name: str) -> str:
    text = stream.read(LONGEST_VALUE)
    if len(text) == LONGEST_VALUE:
        raise DataError(
            f"{name}: one JSON object of more than {LONGEST_VALUE // 2**20} million characters, which would have to be "
            "read in one piece. Write its rows as JSONL, one object a line."
        )
    return text


def _whole(path: Path, encoding: str | None) -> Records:
    """Read a file that is one object: rows under a key, columns of values, or SQuAD's articles."""
    with opened_text(path, encoding) as stream:
        value = decoded(_rest(stream, path.name), f"{path.name}: line 1")
    if not isinstance(value, dict):
        raise DataError(f"{path.name}: {str(value)[:40]!r} is no row. Expected an array of objects such as {EXAMPLE}.")
    listed = next((value[key] for key in _LISTS if isinstance(value.get(key), list)), None)
    if listed is not None and all(isinstance(item, dict) for item in listed):
        rows: Any = _squad(listed, path.name) if _is_squad(listed) else listed
    elif value and all(isinstance(column, list) for column in value.values()):
        rows = _from_columns(value, path.name)
    elif value and all(isinstance(column, dict) for column in value.values()):  # as pandas writes a frame
        rows = _from_columns({key: list(column.values()) for key, column in value.items()}, path.name)
    else:
        rows = [value]
    for number, row in enumerate(rows, 1):
        yield number, _row(row, f"{path.name}: record {number}")


def _from_columns(columns: Mapping[str, list[Any]], name: str) -> list[dict[str, Any]]:
    sizes = {key: len(column) for key, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{name}: its lists differ in length: {sizes}. Expected one value per row in each.")
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def _is_squad(articles: list[dict[str, Any]]) -> bool:
    return bool(articles) and all(isinstance(article.get("paragraphs"), list) for article in articles)


def _squad(articles: list[dict[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Yield a row per question of files in SQuAD's own nesting (articles, paragraphs, qas)."""
    for number, article in enumerate(articles, 1):
        for paragraph in article["paragraphs"]:
            questions = paragraph.get("qas") if isinstance(paragraph, dict) else None
            if not isinstance(questions, list) or not all(isinstance(question, dict) for question in questions):
                raise DataError(f"{name}: article {number}: a paragraph without a list 'qas' of questions")
            for question in questions:
                yield {
                    "id": question.get("id"),
                    "question": question.get("question"),
                    "context": paragraph.get("context"),
                    "answers": question.get("answers", []),
                }
