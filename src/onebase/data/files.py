"""Files and Python objects read into tables of strings, exactly as written, each row with its line number."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase.data.splits import FEWEST_ROWS
from onebase.errors import DataError, nearest

EXTENSIONS = (".csv", ".tsv", ".jsonl", ".txt")
_NAMES_OF_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_BOM = b"\xef\xbb\xbf"
# The csv module refuses fields over 128 KiB unless told; a long contract in one cell is legitimate.
_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class Table:
    """One file or object, read: `cells[column][row]` is the string as written, None where there is none."""

    name: str
    """file name as shown in messages"""
    cells: dict[str, list[Any]]
    places: list[int]
    """for each row its line in the file (the header is line 1), or its number from 1 in memory"""
    unit: str = "line"
    """what `places` counts: line or row"""
    running: bool = False
    """True for plain text, whose entries follow one another"""

    def __len__(self) -> int:
        return len(self.places)


def read_source(source: Any) -> tuple[str, dict[str, Table]]:
    """Read whatever `load` accepts into tables by split.

    Args:
        source: a path, a DataFrame, a list of dicts, or a dict of split name -> one of the latter two.

    Returns:
        The display name and the tables; a single file or object is given as the split "train".

    Raises:
        DataError: the path does not exist, or the source or a file cannot be read.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            return path.resolve().name, {split: read_file(file) for split, file in _split_files(path).items()}
        return path.name, {"train": read_file(path)}
    if isinstance(source, Mapping):
        tables: dict[str, Table] = {}
        for key, value in source.items():
            split = _NAMES_OF_SPLITS.get(str(key).lower())
            if split is None or split in tables:
                raise DataError(
                    f"a dict of splits has the key {key!r}; expected train, validation and test, once each "
                    "(for a dict of columns pass pandas.DataFrame(your_dict))"
                )
            tables[split] = _read_object(value, split)
        return "dict of splits", tables
    table = _read_object(source, "rows" if isinstance(source, list | tuple) else "DataFrame")
    return table.name, {"train": table}


def read_file(path: Path) -> Table:
    """Read one .csv, .tsv, .jsonl or .txt file.

    Args:
        path: the file; UTF-8, with or without a byte order mark.

    Returns:
        Its table; a .txt gives one column `text`.

    Raises:
        DataError: no such file, another extension, broken encoding, malformed or no rows.
    """
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no file or folder {str(path)!r}. {nearest(path.name, siblings)}")
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise DataError(
            f"{path.name}: cannot read a {extension or 'file without extension'}; "
            f"expected {', '.join(EXTENSIONS)}. Save it as one of these, or pass a pandas DataFrame."
        )
    text = _decode(path.read_bytes(), path.name)
    if not text.strip():
        raise DataError(f"{path.name}: the file is empty. Expected rows of text; check the export and try again.")
    if extension == ".txt":
        return _parse_text(text, path.name)
    table = _parse_jsonl(text, path.name) if extension == ".jsonl" else _parse_csv(text, path.name, extension)
    if not len(table):
        raise DataError(f"{path.name}: a header but no rows: the file is empty. Expected one row per example.")
    return table


def _split_files(folder: Path) -> dict[str, Path]:
    """Find the train, validation and test files of a folder; other files are not data."""
    usable = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in EXTENSIONS)
    found: dict[str, list[Path]] = {}
    for path in usable:
        if split := _NAMES_OF_SPLITS.get(path.stem.lower()):
            found.setdefault(split, []).append(path)
    names = ", ".join(p.name for p in usable) or "none"
    twice = {split: files for split, files in found.items() if len(files) > 1}
    if twice:
        split, files = next(iter(twice.items()))
        shown = " and ".join(p.name for p in files)
        raise DataError(f"{folder.name}: two files for {split}: {shown}. Keep one, or pass the path of one file.")
    chosen = {split: files[0] for split, files in found.items()}
    if len({p.suffix.lower() for p in chosen.values()}) > 1:
        raise DataError(f"{folder.name}: files of different kinds ({names}). Use one extension for all splits.")
    if "train" not in chosen:
        raise DataError(
            f"{folder.name}: no train file. A folder needs train.csv (or .tsv, .jsonl, .txt) and may have "
            f"validation and test; data files found: {names}. Rename one, or pass the path of one file."
        )
    return chosen


def _decode(raw: bytes, name: str) -> str:
    skipped = len(_BOM) if raw.startswith(_BOM) else 0
    try:
        return raw[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        position = error.start + skipped
        line = raw.count(b"\n", 0, position) + 1
        raise DataError(
            f"{name}: not UTF-8: byte 0x{raw[position]:02x} at byte position {position}, line {line}. "
            "Save the file as UTF-8 (in Excel: 'CSV UTF-8'), or convert it, for example from Windows-1252: "
            f"iconv -f cp1252 -t utf-8 {name} > utf8-{name}"
        ) from None


def _delimiter(text: str, extension: str) -> str:
    if extension == ".tsv":
        return "\t"
    header = text.lstrip("\r\n").splitlines()[0]
    if "," in header or not ("\t" in header or ";" in header):
        return ","
    return "\t" if header.count("\t") > header.count(";") else ";"


def _parse_csv(text: str, name: str, extension: str) -> Table:
    delimiter = _delimiter(text, extension)
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        records = list(_csv_records(text, name, delimiter))
    finally:
        csv.field_size_limit(before)
    header = records[0][1]
    _refuse_repeats(name, header)
    wrong = [(line, record) for line, record in records if len(record) != len(header)]
    if wrong:
        shown = "\n".join(f"  line {line}: {len(r)} fields, starting {r[0][:40]!r}" for line, r in wrong[:10])
        more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise DataError(
            f"{name}: {len(wrong)} malformed rows; the header has {len(header)} fields split by "
            f"{delimiter!r}:\n{shown}{more}\n"
            f"Put double quotes around a field that contains {delimiter!r} or a line break."
        )
    body = records[1:]
    cells = {column: [record[i] for _, record in body] for i, column in enumerate(header)}
    return Table(name, cells, [line for line, _ in body])


def _csv_records(text: str, name: str, delimiter: str) -> Iterable[tuple[int, list[str]]]:
    """Yield (first line, fields) of each row; lines that hold nothing at all are no rows."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{name}: malformed row that starts on line {line}: {error}. A field in double quotes must "
                'be closed, be followed by the delimiter, and write a quote inside it twice ("").'
            ) from None
        if record:
            yield line, record


def _parse_jsonl(text: str, name: str) -> Table:
    records: list[Mapping[str, Any]] = []
    places: list[int] = []
    # Not splitlines(): U+2028 may stand unescaped inside a JSON string.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            # Numbers keep their spelling: 1.50 stays "1.50".
            record = json.loads(content, parse_int=str, parse_float=str, parse_constant=str)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{name}: line {line}, column {error.colno}: not JSON ({error.msg}). Expected one object a "
                'line, such as {"text": "...", "label": "..."}.'
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{name}: line {line}: {content.strip()[:40]!r} is not an object. Expected one object a "
                'line, such as {"text": "...", "label": "..."}.'
            )
        records.append({key: _json_bool(value) for key, value in record.items()})
        places.append(line)
    return Table(name, _columns_of(records), places)


def _json_bool(value: Any) -> Any:
    """Keep true and false as JSON spells them, not as Python does."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else value


def _parse_text(text: str, name: str) -> Table:
    """Cut plain text so that "\\n".join(entries) is the file again, blank lines and line ends included.

    Entries are the paragraphs between blank lines; where a file has too few of those to be cut into splits
    (one paragraph per line, with a blank line here and there), they are its lines.
    """
    lines = text.split("\n")
    for by_line in (False, True):
        entries, places = _group_lines(lines, by_line)
        if len(entries) >= FEWEST_ROWS:
            break
    return Table(name, {"text": entries}, places, running=True)


def _group_lines(lines: list[str], by_line: bool) -> tuple[list[str], list[int]]:
    groups: list[list[str]] = []
    places: list[int] = []
    open_group = False
    for number, line in enumerate(lines, 1):
        blank = not line.strip()
        if not groups or not (blank or open_group):
            groups.append([])
            places.append(number)
        groups[-1].append(line)
        # Blank lines stay at the end of the entry before them (leading ones at the start of the first).
        only_blank = blank and all(not other.strip() for other in groups[-1])
        open_group = only_blank or not (blank or by_line)
    return ["\n".join(group) for group in groups], places


def _read_object(value: Any, name: str) -> Table:
    if isinstance(value, list | tuple) and all(isinstance(row, Mapping) for row in value):
        cells, count = _columns_of(value), len(value)
    elif _is_frame(value):
        cells, count = _columns_of_frame(value, name), len(value)
    else:
        raise DataError(
            f"cannot read data from a {type(value).__name__}. Expected a path, a pandas DataFrame, a list of "
            "dicts such as {'text': ..., 'label': ...}, or a dict of split name -> list of dicts."
        )
    if not count:
        raise DataError(f"{name}: no rows: the data is empty. Expected one row per example.")
    return Table(name, cells, list(range(1, count + 1)), unit="row")


def _is_frame(value: Any) -> bool:
    """Recognise a DataFrame without importing pandas: who has one has imported it."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, pandas.DataFrame)


def _columns_of_frame(frame: Any, name: str) -> dict[str, list[Any]]:
    _refuse_repeats(name, [str(column) for column in frame.columns])
    present = frame.astype(object).where(frame.notna(), None)
    return {str(column): present[column].tolist() for column in present.columns}


def _columns_of(records: Iterable[Mapping[Any, Any]]) -> dict[str, list[Any]]:
    """Turn rows into columns in order of first appearance; what a row lacks is None."""
    records = list(records)
    keys = list(dict.fromkeys(key for record in records for key in record))
    return {str(key): [record.get(key) for record in records] for key in keys}


def _refuse_repeats(name: str, header: list[str]) -> None:
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise DataError(f"{name}: the header names {twice} more than once. Give each column its own name.")
