"""Columns kept on disk: written once while a large file is read, then read row by row by position.

A column is one temporary file of values, one after another, and the position of each. It needs no library, takes any
JSON value and any string, is removed by the system when it is closed (a crash leaves nothing behind), and unlike a
memory map its pages do not count as memory of the process.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onebase.data.rows import Picked
from onebase.errors import DataError

_BLOCK = 1 << 20  # bytes read at a time while iterating


class DiskColumn(Sequence[Any]):
    """A column of strings or JSON values in a temporary file.

    Args:
        plain: every value is a string; else values are kept as JSON, and come back as ``restore(value)``.
        restore: makes the value of what JSON gives (JSON has no tuples).
    """

    def __init__(self, plain: bool, restore: Any = None) -> None:
        self._file = tempfile.TemporaryFile(dir=_folder(), prefix="onebase-rows-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # the column owns the file; selections hold the column
        self._ends = array("Q", [0])
        self._plain, self._restore = plain, restore
        self._lock = threading.Lock()
        self._unwritten: list[bytes] = []
        self._waiting = 0

    def append(self, value: Any) -> None:
        """Add a value at the end.

        Raises:
            DataError: the disk is full.
        """
        text = value if self._plain else json.dumps(value)
        raw = text.encode("utf-8", "surrogatepass")  # JSON may spell half of a surrogate pair
        self._unwritten.append(raw)
        self._ends.append(self._ends[-1] + len(raw))
        self._waiting += len(raw)
        if self._waiting > _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting; call it once after the last value."""
        if not self._unwritten:
            return
        try:
            self._file.seek(0, os.SEEK_END)
            self._file.write(b"".join(self._unwritten))
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"cannot keep rows on disk in {_folder()}: {error.strerror}. Free some space, or set TMPDIR to a "
                "folder on another disk."
            ) from None
        self._unwritten, self._waiting = [], 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            import numpy as np

            return Picked(self, np.arange(*index.indices(len(self)), dtype=np.int64))
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._value(self._read(self._ends[at], self._ends[at + 1]))

    def __iter__(self) -> Iterator[Any]:
        first = 0
        while first < len(self):
            last = first + 1
            while last < len(self) and self._ends[last] - self._ends[first] < _BLOCK:
                last += 1
            start = self._ends[first]
            block = self._read(start, self._ends[last])
            for i in range(first, last):
                yield self._value(block[self._ends[i] - start : self._ends[i + 1] - start])
            first = last

    def _value(self, raw: bytes) -> Any:
        text = raw.decode("utf-8", "surrogatepass")
        if self._plain:
            return text
        value = json.loads(text)
        return value if self._restore is None else self._restore(value)

    def _read(self, start: int, end: int) -> bytes:
        if hasattr(os, "pread"):  # no shared position: safe in threads and in forked workers
            return _pread(self._file.fileno(), start, end - start)
        with self._lock:
            self._file.seek(start)
            return self._file.read(end - start)


class Coded(Sequence[str]):
    """A column of few distinct strings in memory: a number per row."""

    def __init__(self) -> None:
        self._codes = array("i")
        self._names: list[str] = []
        self._code_of: dict[str, int] = {}

    def append(self, value: str) -> None:
        """Add a value at the end."""
        code = self._code_of.get(value)
        if code is None:
            code = self._code_of[value] = len(self._names)
            self._names.append(value)
        self._codes.append(code)

    def flush(self) -> None:
        """Nothing waits to be written."""

    def __len__(self) -> int:
        return len(self._codes)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self._names[code] for code in self._codes[index])
        return self._names[self._codes[index]]

    def __iter__(self) -> Iterator[str]:
        return (self._names[code] for code in self._codes)


def _pread(descriptor: int, start: int, size: int) -> bytes:
    """Read exactly `size` bytes: one call may give fewer (Linux stops at 2 GiB)."""
    parts = []
    while size:
        part = os.pread(descriptor, size, start)
        if not part:
            raise DataError("rows kept on disk were cut off: the temporary file was changed by something else")
        parts.append(part)
        start, size = start + len(part), size - len(part)
    return b"".join(parts)


def _folder() -> Path:
    """Return where temporary rows go: TMPDIR where the person set it, else /var/tmp, which is never in memory."""
    if not os.environ.get("TMPDIR") and Path("/var/tmp").is_dir() and os.access("/var/tmp", os.W_OK):
        return Path("/var/tmp")
    return Path(tempfile.gettempdir())
