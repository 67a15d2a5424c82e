"""Bytes of a file as text: compression and encoding found or told, and damage named by byte and line."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from onebase.errors import ConfigError, DataError

_GZIP = b"\x1f\x8b"
# Longer marks first: the mark of UTF-32 begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NOT_TEXT = {
    b"PK\x03\x04": "a zip or Excel file",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an old Office file",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "a SQLite database",
    b"7z\xbc\xaf": "a 7z archive",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
}
_LOOK = 4096
_CHUNK = 1 << 20
# UTF-16 of Latin letters has a NUL every second byte; text has none.
_NUL_SHARE = 0.2


def plain_name(path: Path) -> str:
    """Return the name of a file in lower case without ``.gz``."""
    return path.name.lower().removesuffix(".gz")


def extension_of(path: Path) -> str:
    """Return the extension that tells the format: ``.csv`` of ``a.csv.gz``."""
    return Path(plain_name(path)).suffix


@contextmanager
def opened_text(path: Path, encoding: str | None = None) -> Iterator[TextIO]:
    """Open a text file, decompressed and decoded, its line ends as they are.

    Args:
        path: a file; gzip is recognised by its first bytes.
        encoding: told by the person; by default that of the byte order mark, else UTF-8.

    Raises:
        ConfigError: no such encoding.
        DataError: the file cannot be opened, is damaged, is no text, or is in another encoding; also while it is read.
    """
    with guarded(path):
        stream, found = _opened(path, encoding)
        with stream:
            try:
                yield io.TextIOWrapper(cast(io.BufferedReader, stream), found, newline="")
            except UnicodeError:
                raise _misfit(path, found, encoding) from None


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn what goes wrong while bytes are read into one error that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path.name}: the gzip file is damaged or cut off ({error}). Make or download it again; "
            f"gzip -t {path.name} tests it."
        ) from None
    except OSError as error:
        raise DataError(
            f"{path.name}: cannot be read: {error.strerror or error}. Check that it exists, and who may read it."
        ) from None


def checked_encoding(encoding: str | None) -> None:
    """Refuse an encoding that Python does not know or that is no encoding of text.

    Raises:
        ConfigError: with examples.
    """
    if encoding is None:
        return
    try:
        "a".encode(encoding)
        b"".decode(encoding)
    except (LookupError, UnicodeError, ValueError, TypeError):
        raise ConfigError(
            f"encoding {encoding!r} is not one that text is read with. Known are utf-8, utf-16, cp1252 (Windows, "
            "Western Europe), latin-1, cp1250, cp1251, shift_jis, gb18030 ..."
        ) from None


def _opened(path: Path, encoding: str | None) -> tuple[BinaryIO, str]:
    checked_encoding(encoding)
    with path.open("rb") as raw:
        packed = raw.read(len(_GZIP)) == _GZIP
    stream = cast(BinaryIO, gzip.open(path) if packed else path.open("rb"))  # noqa: SIM115
    try:
        head = stream.read(_LOOK)
        stream.seek(0)
        if head and not packed and path.name.lower().endswith(".gz"):
            raise DataError(
                f"{path.name}: the name ends in .gz, but it is not compressed with gzip (it begins with {head[:4]!r}). "
                "Rename it, or compress it again."
            )
        return stream, _encoding_of(path, head, encoding)
    except BaseException:
        stream.close()
        raise


def _encoding_of(path: Path, head: bytes, told: str | None) -> str:
    mark, marked = next(((m, e) for m, e in _MARKS if head.startswith(m)), (b"", None))
    if told is not None:
        name = codecs.lookup(told).name
        if marked is not None and re.sub("-(le|be|sig)$", "", name) != marked.removesuffix("-sig"):
            raise DataError(
                f"{path.name}: it begins with the byte order mark of {marked.removesuffix('-sig')} ({mark.hex(' ')}), "
                f"but encoding {told!r} was given. Leave the encoding out."
            )
        return marked or name
    if marked is not None:
        return marked
    for magic, what in _NOT_TEXT.items():
        if head.startswith(magic):
            raise DataError(
                f"{path.name}: this is {what}, not text (it begins with {magic!r}). Give it the extension of what it "
                "is, or export it as CSV or JSONL."
            )
    if head.count(0) > _NUL_SHARE * len(head):
        even, odd = head[::2].count(0), head[1::2].count(0)
        guess = "utf-16-le" if odd > even else "utf-16-be"
        raise DataError(
            f"{path.name}: {head.count(0)} of its first {len(head)} bytes are NUL: it is no UTF-8 text. If it is "
            f"UTF-16 without a byte order mark, pass encoding {guess!r} (--encoding {guess})."
        )
    return "utf-8"


def _misfit(path: Path, found: str, told: str | None) -> DataError:
    """Find the byte that does not fit, by reading the file once more."""
    codec = "utf-8" if found == "utf-8-sig" else found  # which would count positions from after the mark
    decoder = codecs.getincrementaldecoder(codec)()
    before, line, raw, position = 0, 1, b"", 0
    reason = "cut off"
    stream, _ = _opened(path, told)
    with stream:
        while True:
            chunk = stream.read(_CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                line += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeError as error:
                if isinstance(error, UnicodeDecodeError):
                    raw, reason = error.object[error.start : error.start + 1], error.reason
                    position = before - pending + error.start
                    good = error.object[: error.start].decode(codec, "ignore")
                    line += good.count("\n")
                else:
                    reason = str(error)
                break
            before += len(chunk)
            if not chunk:
                break
    shown = f"byte 0x{raw[0]:02x} at byte position {position}" if raw else "the end of the file"
    name = "UTF-8" if found.startswith("utf-8") else found
    advice = (
        "Save the file as UTF-8 (in Excel: 'CSV UTF-8'), or say what it is, for example encoding 'cp1252' "
        "(--encoding cp1252) for Windows in Western Europe."
        if told is None
        else f"It is not what encoding {told!r} says; leave the encoding out, or pass another."
    )
    return DataError(f"{path.name}: not {name}: {shown}, line {line} ({reason}). {advice}")
