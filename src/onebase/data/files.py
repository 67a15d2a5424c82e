"""Sources opened by what they are: a file of some format, a folder of splits, an object, a data set of the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onebase.data.delimited import checked_dialect, open_delimited
from onebase.data.excel import open_excel
from onebase.data.hub import is_hub_id, load_hub
from onebase.data.json_rows import nested_splits, open_json
from onebase.data.memory import is_dataset, open_object, split_items
from onebase.data.parquet import open_parquet
from onebase.data.pictures import splits_of
from onebase.data.plain import CONLL, open_conll, open_text
from onebase.data.table import MEMORY, Opened, Table, tabulate
from onebase.data.texts import checked_encoding, extension_of, guarded, plain_name
from onebase.errors import ConfigError, DataError, nearest

EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".xlsx", ".txt", *CONLL)
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_NO_EXTENSION = "file without extension"
_PART = re.compile(r"-0+-of-0*1$")  # how files of the hub are numbered


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a person said about how files are written; None where it is to be found.

    Raises:
        ConfigError: an encoding that does not exist, or a delimiter or quote that is not one character.
    """

    encoding: str | None = None
    """such as cp1252; by default that of the byte order mark, else UTF-8"""
    delimiter: str | None = None
    """between the fields of CSV files: one character, or comma, tab, semicolon, pipe, space"""
    quote: str | None = None
    """around fields of CSV files: one character, or double, single, none"""
    sheet: str | None = None
    """of Excel workbooks"""

    def __post_init__(self) -> None:
        checked_encoding(self.encoding)
        delimiter, quote = checked_dialect(self.delimiter, self.quote)
        object.__setattr__(self, "delimiter", delimiter)
        object.__setattr__(self, "quote", quote)


def read_source(
    source: Any, told: Format | None = None, task: str | None = None, memory: int | None = MEMORY
) -> tuple[str, dict[str, Table], list[str]]:
    """Read whatever `load` accepts into tables by split.

    Args:
        source: a path, a hub id, a DataFrame, a list of dicts, a data set of the `datasets` library, or a dict of
            split name -> one of the latter three.
        told: how its files are written.
        task: the kind of data, where the person said so: a .txt of words and tags is read as such for "tokens".
        memory: bytes of rows to hold per split.

    Returns:
        The display name, the tables, and notes; a single file or object is given as the split "train".

    Raises:
        DataError: the path does not exist, or the source or a file cannot be read.
    """
    told = told or Format()
    if isinstance(source, str | Path):
        if isinstance(source, str) and is_hub_id(source, EXTENSIONS):
            name, splits, notes = load_hub(source, SPLIT_NAMES)
            return name, {split: tabulate(open_object(rows, split), memory) for split, rows in splits.items()}, notes
        with guarded(Path(source)):
            return _read_path(Path(source).expanduser(), told, task, memory)
    if isinstance(source, Mapping):
        tables = {
            split: tabulate(open_object(rows, split), memory) for split, rows, _ in split_items(source, SPLIT_NAMES)
        }
        return "dict of splits", tables, []
    name = "rows" if isinstance(source, list | tuple) else "data set" if is_dataset(source) else "DataFrame"
    return name, {"train": tabulate(open_object(source, name), memory)}, []


def read_file(path: Path, told: Format | None = None) -> Table:
    """Read one file into memory, however large.

    Args:
        path: the file; see `EXTENSIONS`, each also compressed with gzip.
        told: how it is written.

    Returns:
        Its table; a .txt gives one column `text`.

    Raises:
        DataError: no such file, another extension, broken encoding, malformed or no rows.
    """
    return tabulate(open_file(path, told or Format()), None)


def open_file(path: Path, told: Format, task: str | None = None) -> Opened:
    """Open one file by its extension.

    Raises:
        DataError: no such file, a folder, another extension, malformed or empty.
        ConfigError: something was told that has no meaning for its format.
    """
    _refuse_missing(path)
    return replace(_opened(path, told, task), folder=path.parent)


def _opened(path: Path, told: Format, task: str | None) -> Opened:
    extension = extension_of(path)
    if extension not in EXTENSIONS:
        raise DataError(
            f"{path.name}: cannot read a {extension or _NO_EXTENSION}; expected {', '.join(EXTENSIONS)} (or one of "
            "these with .gz). Save it as one of these, or pass a pandas DataFrame."
        )
    packed = path.name.lower().endswith(".gz")
    if packed and extension in (".parquet", ".xlsx"):
        raise DataError(f"{path.name}: {extension} files are compressed inside. Unpack it: gunzip {path.name}")
    _refuse_meaningless(path.name, extension, told)
    if extension == ".parquet":
        return open_parquet(path)
    if extension == ".xlsx":
        return open_excel(path, told.sheet)
    if extension in (".json", ".jsonl", ".ndjson"):
        return open_json(path, told.encoding)
    if extension in CONLL or (extension == ".txt" and task == "tokens"):
        return open_conll(path, told.encoding)
    if extension == ".txt":
        return open_text(path, told.encoding)
    return open_delimited(path, told.delimiter, told.quote, told.encoding)


def _read_path(
    path: Path, told: Format, task: str | None, memory: int | None
) -> tuple[str, dict[str, Table], list[str]]:
    if path.is_dir():
        if not _data_files(path) and (pictures := splits_of(path, SPLIT_NAMES)):
            return path.resolve().name, {
                split: tabulate(replace(open_object(rows, split), folder=path), memory)
                for split, rows in pictures.items()
            }, []  # fmt: skip
        files = _split_files(path)
        tables = {split: tabulate(open_file(file, told, task), memory) for split, file in files.items()}
        return path.resolve().name, tables, []
    if path.is_file() and extension_of(path) == ".json":
        inside = nested_splits(path, told.encoding, SPLIT_NAMES)
        if inside is not None:
            _, tables, notes = read_source(inside, told, task, memory)
            return path.name, tables, notes
    return path.name, {"train": tabulate(open_file(path, told, task), memory)}, []


def _refuse_missing(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path.name}: a folder stands where a file is expected. Pass the file inside, or rename it.")
    if path.exists() and not path.is_file():
        raise DataError(f"{path.name}: neither a file nor a folder (a device, a pipe?). Save its rows in a file.")
    if not path.is_file():
        try:
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        except OSError:
            siblings = []
        raise DataError(f"no file or folder {str(path)!r}. {nearest(path.name, siblings)}")


def _refuse_meaningless(name: str, extension: str, told: Format) -> None:
    meant = {
        "encoding": extension not in (".parquet", ".xlsx"),
        "delimiter": extension in (".csv", ".tsv"),
        "quote": extension in (".csv", ".tsv"),
        "sheet": extension == ".xlsx",
    }
    for setting, means in meant.items():
        value = getattr(told, setting)
        if value is not None and not means:
            raise ConfigError(f"{name}: {setting} {value!r} has no meaning for a {extension} file. Leave it out.")


def _data_files(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder.name}: the folder cannot be read: {error.strerror}. Check who may read it.") from None
    return [p for p in entries if extension_of(p) in EXTENSIONS]


def _split_files(folder: Path) -> dict[str, Path]:
    """Find the train, validation and test files of a folder; other files are not data."""
    usable, shown_as = _data_files(folder), folder.resolve().name or str(folder)  # the name of "." is empty
    found: dict[str, list[Path]] = {}
    for path in usable:
        if split := SPLIT_NAMES.get(_PART.sub("", Path(plain_name(path)).stem)):
            found.setdefault(split, []).append(path)
    names = ", ".join(p.name for p in usable) or "none"
    twice = {split: files for split, files in found.items() if len(files) > 1}
    if twice:
        split, files = next(iter(twice.items()))
        shown = " and ".join(p.name for p in files)
        raise DataError(f"{shown_as}: two files for {split}: {shown}. Keep one, or pass the path of one file.")
    chosen = {split: files[0] for split, files in found.items()}
    if len({extension_of(p) for p in chosen.values()}) > 1:
        raise DataError(f"{shown_as}: files of different kinds ({names}). Use one extension for all splits.")
    if "train" not in chosen:
        raise DataError(
            f"{shown_as}: no train file. A folder needs train.csv (or another of {', '.join(EXTENSIONS)}) and may "
            f"have validation and test; data files found: {names}. Rename one, or pass the path of one file."
        )
    return chosen
