"""Pictures as data: cells that name files, and folders with one folder of pictures per class."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from onebase.data.misfit import Misfit, short
from onebase.errors import ConfigError, DataError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def as_picture(value: Any, role: str, folder: Path | None) -> str:
    """Return the absolute path of a picture that can be opened.

    Args:
        value: a path as written; a relative one starts at the folder of the file that names it.
        role: of the column.
        folder: that folder; None for rows in memory, whose relative paths start at the working folder.
    """
    if isinstance(value, Path):
        value = str(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Misfit(f"empty {role}")
    if not isinstance(value, str):
        raise Misfit(f"{role} that is no path (a {type(value).__name__})", "save pictures as files and name these")
    path = Path(value.strip()).expanduser()
    path = path if path.is_absolute() else (folder or Path()) / path
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("pictures are read with Pillow: pip install 'onebase[images]'") from None
    try:
        with Image.open(path) as image:
            image.verify()
    except FileNotFoundError:
        raise Misfit(f"{role} that is not there", f"{short(value)}; expected a file, looked at {path}") from None
    except Exception as error:  # PIL raises what its readers raise, of any type, on broken files
        raise Misfit(f"{role} that cannot be read", f"{short(value)}: {type(error).__name__}") from None
    return str(path.resolve())


def content_of(path: str) -> str:
    """Return the hash of a file's bytes: the same picture under another name is the same example."""
    facts = Path(path).stat()
    return _content(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=2**20)
def _content(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def class_folders(folder: Path) -> list[tuple[Path, str]]:
    """Return (picture, class) of a folder with one folder of pictures per class, by name; [] where it is none."""
    found = []
    for inside in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found += [
            (file, inside.name)
            for file in sorted(inside.iterdir())
            if file.is_file() and file.suffix.lower() in PICTURES
        ]
    return found


def splits_of(folder: Path, names: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """Return the rows of a folder of pictures by split: ``train/cat/1.png``, or ``cat/1.png`` for train alone.

    Args:
        folder: the folder.
        names: name of a folder -> its split.

    Raises:
        DataError: two folders for one split, or no train among splits.
    """
    parts: dict[str, list[tuple[Path, str]]] = {}
    for inside in sorted(p for p in folder.iterdir() if p.is_dir()):
        split = names.get(inside.name.lower())
        if split and (rows := class_folders(inside)):
            if split in parts:
                raise DataError(f"{folder.name}: two folders for {split}. Keep one.")
            parts[split] = rows
    if parts and "train" not in parts:
        raise DataError(f"{folder.name}: folders of pictures for {', '.join(parts)}, and none for train. Add it.")
    if not parts and (rows := class_folders(folder)):
        parts["train"] = rows
    return {
        split: [{"image": str(path.relative_to(folder)), "label": label} for path, label in rows]
        for split, rows in parts.items()
    }
