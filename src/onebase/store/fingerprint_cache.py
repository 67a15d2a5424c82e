"""Remembers fingerprints of model folders between processes; a cache that fails is a cache that is empty."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FILE = "fingerprints.json"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
ENTRIES_KEPT = 256  # about 40 kB
FILES_LOOKED_AT = 512  # a folder with more is no plain model folder: not cached


def default_folder() -> Path:
    """Return ``$ONEBASE_HOME/cache``, else ``$XDG_CACHE_HOME/onebase``, else ``~/.cache/onebase``."""
    if home := os.environ.get("ONEBASE_HOME"):
        return Path(home).expanduser() / "cache"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "onebase"


@dataclass(frozen=True)
class Entry:
    """The place of one fingerprint in the cache."""

    folder: Path
    key: str

    def read(self) -> str | None:
        """Return the fingerprint kept, or None when there is none that can be read."""
        value = self._all().get(self.key)
        return value if isinstance(value, str) and DIGEST.fullmatch(value) else None

    def write(self, fingerprint: str) -> None:
        """Keep a fingerprint, if the disk allows. Of two writers at once, one may lose: it hashes again."""
        kept = {**{k: v for k, v in self._all().items() if k != self.key}, self.key: fingerprint}
        newest = dict([*kept.items()][-ENTRIES_KEPT:])
        part = self.folder / f".{FILE}.{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):  # hashing again is the only cost of not writing
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                part.write_text(json.dumps(newest, indent=0), encoding="utf-8")
                os.replace(part, self.folder / FILE)
            finally:
                part.unlink(missing_ok=True)

    def _all(self) -> dict[str, Any]:
        try:
            kept = json.loads((self.folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return kept if isinstance(kept, dict) else {}


def open_for(model: torch.nn.Module, tensors: list[tuple[str, torch.Tensor]], folder: Path | None) -> Entry | None:
    """Find the place in the cache of a model that was loaded from a local folder.

    Args:
        model: the model; its config says where it came from.
        tensors: its names and tensors. Names, shapes and dtypes enter the key, as one folder gives different
            models by class and by the arguments of ``from_pretrained``.
        folder: the cache. None takes `default_folder`.

    Returns:
        The place, or None when the model was not loaded from a local folder.
    """
    source = getattr(getattr(model, "config", None), "_name_or_path", None)  # any nn.Module may come here
    if not isinstance(source, str) or not source or not os.path.isdir(source):
        return None
    try:
        files = _files(Path(source))
        where = str(Path(source).resolve())
    except OSError:
        return None
    if files is None:
        return None
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    loaded = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors]
    key = hashlib.sha256(json.dumps([where, files, kind, loaded]).encode()).hexdigest()
    return Entry(folder or default_folder(), key)


def _files(folder: Path) -> list[list[Any]] | None:
    """Return name, size and time of change of every file, or None when there are too many."""
    found: list[list[Any]] = []
    for where, _, names in os.walk(folder):
        for name in names:
            path = Path(where, name)
            state = path.stat()
            found.append([path.relative_to(folder).as_posix(), state.st_size, state.st_mtime_ns])
            if len(found) > FILES_LOOKED_AT:
                return None
    return sorted(found)
