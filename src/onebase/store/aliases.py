"""Aliases: names such as ``prod`` that point to a version of an adapter, with what they pointed to before.

All aliases of an adapter are in one small file beside its versions, which is replaced by one rename. Whoever writes it,
or removes a version, holds the adapter's lock: the operating system's own, which a killed process lets go of. Readers
need none.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from onebase.errors import ConfigError, CorruptError, StoreError
from onebase.store import disk
from onebase.store.schema import read_json

ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}")  # begins with a letter: never a version
FILE = ".aliases.json"
FILE_BYTES = 2**24  # 16 MiB, thousands of aliases with full histories
KEPT = 100  # versions that an alias remembers
WAIT = 60.0  # seconds for a lock, which is held for milliseconds

Histories = dict[str, list[int]]  # alias -> versions it named, the last one is what it names


def check_alias(alias: str) -> str:
    """Return `alias`, or raise ConfigError where it cannot be one."""
    if not isinstance(alias, str) or not ALIAS.fullmatch(alias):
        raise ConfigError(
            f"alias {alias!r} cannot be used; expected 1 to 32 of letters, digits, '_' and '-', beginning with a "
            "letter, e.g. 'prod'."
        )
    return alias


def read_aliases(home: Path) -> Histories:
    """Read the aliases of the adapter in `home`, {} where it has none.

    Raises:
        CorruptError: the file is damaged.
    """
    path = home / FILE
    try:
        raw = read_json(disk.read_regular(path, FILE_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise CorruptError(f"{path} {error.strerror}. Remove it, and promote again.") from error
    except ValueError as error:
        raise CorruptError(f"{path} is not valid JSON: {error}. Remove it, and promote again.") from None
    whole = isinstance(raw, dict) and all(
        ALIAS.fullmatch(alias)
        and isinstance(history, list)
        and history
        and all(type(version) is int and version > 0 for version in history)
        for alias, history in raw.items()
    )
    if not whole:
        raise CorruptError(f"{path} does not list versions by alias. Remove it, and promote again.")
    return raw


def write_aliases(home: Path, histories: Mapping[str, list[int]]) -> None:
    """Replace the aliases of the adapter in `home`; its lock must be held."""
    work = home / f"{FILE}.{uuid.uuid4().hex}.tmp"
    kept = {alias: history[-KEPT:] for alias, history in sorted(histories.items())}
    try:
        disk.write_file(work, json.dumps(kept, indent=2).encode())
        os.replace(work, home / FILE)
        disk.sync_folder(home)
    finally:
        work.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Hold the lock of the adapter `name` in the store `root`.

    Raises:
        StoreError: another process holds it for a minute.
    """
    from filelock import FileLock, Timeout

    folder = root / ".locks"
    disk.make_folder(folder)
    lock = FileLock(folder / f"{name.lower()}.lock", timeout=WAIT)
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(f"another process has been changing {name!r} in {root} for {WAIT:g} s; try again.") from None
    try:
        yield
    finally:
        lock.release()
