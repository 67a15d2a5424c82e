"""Where local bases are on this machine: one small file per fingerprint, so that a command finds a base again.

It stays beside the adapters and is no part of them: a stored adapter names its base by fingerprint and id only, so
no path of this machine leaves it.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def _file(root: Path, fingerprint: str) -> Path:
    return root / "bases" / f"{fingerprint.removeprefix('sha256:')}.txt"


def remember_base(root: Path, fingerprint: str, folder: Path) -> None:
    """Note that the base with this fingerprint was loaded from `folder`. A disk that refuses is no error."""
    target = _file(root, fingerprint)
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        work = target.with_suffix(f".{uuid.uuid4().hex}.tmp")
        work.write_text(str(folder.absolute()), encoding="utf-8")
        os.replace(work, target)


def base_folder(root: Path, fingerprint: str) -> Path | None:
    """Return the folder that a base was last loaded from, or None when it is unknown or gone."""
    try:
        folder = Path(_file(root, fingerprint).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None
    return folder if folder.is_dir() else None
