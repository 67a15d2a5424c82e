"""Data sets of the Hugging Face hub, by id, through the `datasets` library (extra `data`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onebase.errors import DataError

PREFIX = "hf://"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.+-]+)?")


def is_hub_id(source: str, extensions: tuple[str, ...]) -> bool:
    """Say whether a string names a data set of the hub: ``hf://name``, or ``owner/name[:config]`` that is no path."""
    if source.startswith(PREFIX):
        return True
    if not _ID.fullmatch(source) or source.lower().endswith((*extensions, ".gz")):
        return False
    return not Path(source).exists() and not Path(source.split("/")[0]).is_dir()


def load_hub(source: str, names: Mapping[str, str]) -> tuple[str, dict[str, Any], list[str]]:
    """Load a data set by id.

    Args:
        source: ``hf://name[:config]`` or ``owner/name[:config]``; a local folder after ``hf://`` is loaded likewise.
        names: split names -> train, validation or test.

    Returns:
        The display name, split -> Dataset, and notes on splits that are not used.

    Raises:
        DataError: the library is missing, there is no such data set, or it has no train split.
    """
    wanted = source.removeprefix(PREFIX)
    path, _, config = wanted.rpartition(":") if ":" in wanted and not Path(wanted).exists() else (wanted, "", "")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: reading data sets of the hub needs the library datasets: pip install 'onebase[data]'. "
            "(If this is meant as a path: there is no such file or folder.)"
        ) from None
    try:
        loaded = datasets.load_dataset(path, config or None)
    except Exception as error:  # network, hub, config names, formats: the library has no common class
        lines = str(error).strip().splitlines() or ["no message"]
        raise DataError(
            f"{source}: the data set cannot be loaded: {type(error).__name__}: {' '.join(lines)[:400]} "
            "(If this is meant as a path: there is no such file or folder.)"
        ) from None
    splits: dict[str, Any] = {}
    unused = []
    for key, value in loaded.items():
        split = names.get(str(key).lower())
        if split is None or split in splits:
            unused.append(f"{key} ({len(value):,} rows)")
        else:
            splits[split] = value
    if "train" not in splits:
        raise DataError(f"{source}: no train split; it has {', '.join(map(str, loaded))}. Load one and pass its rows.")
    notes = [f"These splits of {wanted} are not used: {', '.join(unused)}."] if unused else []
    return wanted.rstrip("/").rsplit("/", 1)[-1], splits, notes
