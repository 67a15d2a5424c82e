"""File operations that are whole or absent, on POSIX and Windows, also when the process is killed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import time
import uuid
from pathlib import Path

STALE_SECONDS = 24 * 3600  # a save takes seconds; a day leaves room for suspended machines


def write_file(path: Path, data: bytes) -> str:
    """Write a new file through to the disk.

    Args:
        path: the file; must not exist.
        data: its content.

    Returns:
        The sha256 of `data`, as hex.
    """
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def sync_folder(path: Path) -> None:
    """Write a folder's list of names through to the disk."""
    if os.name == "nt":
        return  # Windows opens no folders as files; NTFS journals its names
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, where missing, through to the disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def move_folder(source: Path, target: Path) -> bool:
    """Rename a folder in one step, unless the target is taken.

    Args:
        source: a folder.
        target: its new place, on the same file system.

    Returns:
        False when something is at `target` already; `source` then stays.

    Raises:
        OSError: for any other reason.
    """
    try:
        os.rename(source, target)
    except OSError:
        if os.path.lexists(target) and os.path.lexists(source):
            return False
        raise
    sync_folder(target.parent)
    return True


def claim_number(folder: Path, above: int) -> int:
    """Take the next free number for ever, also against other processes.

    One empty file per number, rather than one file with a counter, because creating a file
    is atomic everywhere, while updating a counter needs a lock. A number is never given twice,
    even when what it was taken for is removed.

    Args:
        folder: where the numbers are kept; created when missing.
        above: the number is greater than this one and than every number taken.

    Returns:
        The number.
    """
    make_folder(folder)
    number = max([above, *(int(n) for n in os.listdir(folder) if n.isascii() and n.isdigit())])
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            os.close(os.open(folder / str(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            sync_folder(folder)
            return number


def new_work(folder: Path, purpose: str) -> Path:
    """Return an unused path in `folder`, which is created when missing."""
    make_folder(folder)
    return folder / f"{purpose}-{uuid.uuid4().hex}"


def discard(path: Path) -> None:
    """Delete a work folder as far as possible; `sweep` takes what is left on a later day."""
    shutil.rmtree(path, ignore_errors=True)


def sweep(folder: Path, older_than: float = STALE_SECONDS) -> None:
    """Delete what killed processes left in the work folder `folder`.

    Args:
        folder: the work folder; may be missing.
        older_than: age in seconds, by the time of the last change.
    """
    before = time.time() - older_than
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(folder)):
            # another process may sweep at the same time: a vanished entry is the goal reached
            with contextlib.suppress(OSError):
                if entry.stat(follow_symlinks=False).st_mtime < before:
                    if entry.is_dir(follow_symlinks=False):
                        discard(Path(entry.path))
                    else:
                        os.unlink(entry.path)


def read_regular(path: Path, most: int) -> bytes:
    """Return what a regular file holds; a link to one is fine, as hub caches have.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        OSError: it is missing, a folder, a device or a pipe (which may never end), or larger.
    """
    size = _regular(path)
    if size > most:
        raise OSError(errno.EFBIG, f"{size} bytes, more than the {most} it may have")
    return path.read_bytes()


def _regular(path: Path) -> int:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "no regular file")
    return found.st_size


def sha256_file(path: Path) -> str:
    """Return the sha256 of a regular file, as hex."""
    _regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
