"""Damage: 500 broken files of every format; each loads with the rows that it holds, or is refused with a reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from onebase.data.files import Format, read_source
from onebase.data.load import load
from onebase.errors import DataError, OnebaseError

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet", "xlsx", "txt", "conll", "csv.gz", "jsonl.gz")
CASES = 50  # per format: 500 files


def rows_of(seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    words = ["café", "the", "日本", 'a "quote"', "x;y", "tab\there", "line\nbreak", "comma, here", "ok", "0", "null"]
    return [
        {"text": f"{i} " + " ".join(draw.choices(words, k=draw.randint(1, 8))), "label": draw.choice("ab") + str(i % 2)}
        for i in range(40)
    ]


def written(form: str, seed: int, folder: Path) -> bytes:
    rows = rows_of(seed)
    kind = form.removesuffix(".gz")
    if kind in ("csv", "tsv"):
        raw = pandas.DataFrame(rows).to_csv(index=False, sep="\t" if kind == "tsv" else ",").encode()
    elif kind == "jsonl":
        raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    elif kind == "json":
        raw = json.dumps(rows, ensure_ascii=False).encode()
    elif kind == "txt":
        raw = "\n\n".join(row["text"] for row in rows).encode()
    elif kind == "conll":
        raw = "".join(f"{word}\tO\n" for row in rows for word in [*row["text"].split()]).encode()
        raw = raw.replace("café\tO\n".encode(), "café\tB-X\n\n".encode())
    else:
        path = folder / f"whole.{kind}"
        frame = pandas.DataFrame(rows)
        frame.to_parquet(path) if kind == "parquet" else frame.to_excel(path, index=False)
        raw = path.read_bytes()
    return gzip.compress(raw, mtime=0) if form.endswith(".gz") else raw


def flip(raw: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(raw)
    for _ in range(draw.choice((1, 3, 30))):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def cut(raw: bytes, draw: random.Random) -> bytes:
    return raw[: draw.randrange(len(raw))]


def swap(raw: bytes, draw: random.Random) -> bytes:
    one, other = draw.sample([b",", b"\t", b";", b'"', b"\n", b"{", b"}", b"[", b":"], 2)
    return raw.replace(one, other, draw.choice((1, 5, -1)))


def recode(raw: bytes, draw: random.Random) -> bytes:
    try:
        return raw.decode().encode(
            draw.choice(("utf-16", "utf-16-le", "cp1252", "utf-32", "utf-7", "shift_jis")), "replace"
        )
    except UnicodeError:
        return raw[::-1]


def insert(raw: bytes, draw: random.Random) -> bytes:
    piece = draw.choice(
        (b"\0", b'"', b"\xff\xfe", b"\r", b"\n\n\n", b"\xc3", b",,,,", b"NaN", b"[" * 3000, b"\0" * 500)
    )
    at = draw.randrange(len(raw) + 1)
    return raw[:at] + piece + raw[at:]


def drop(raw: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(raw))
    return raw[:at] + raw[at + draw.randint(1, 60) :]


DAMAGE = (flip, cut, swap, recode, insert, drop)


def text_of(raw: bytes) -> str:
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    for mark, encoding in (
        (b"\xef\xbb\xbf", "utf-8-sig"),
        (b"\xff\xfe\0\0", "utf-32"),
        (b"\xff\xfe", "utf-16"),
        (b"\xfe\xff", "utf-16"),
    ):
        if raw.startswith(mark):
            return raw.decode(encoding)
    return raw.decode()


def independently(form: str, raw: bytes, path: Path, quoted: bool) -> list[list[str]]:
    """Read the damaged bytes another way: rows of values as text; the reference that loading is compared with."""
    kind = form.removesuffix(".gz")
    if kind == "parquet":
        import pyarrow.parquet

        columns = pyarrow.parquet.ParquetFile(io.BytesIO(raw)).read().columns  # whole, where loading goes by batches
        return [[str(v) for v in row] for row in zip(*(column.to_pylist() for column in columns))]
    if kind == "xlsx":
        frame = pandas.read_excel(path, engine="openpyxl", dtype=str, keep_default_na=False, na_filter=False).dropna(
            how="all"
        )
        return [[str(v) for v in row] for row in frame.itertuples(index=False)]
    text = text_of(raw)
    if kind in ("jsonl", "json"):
        try:
            rows = json.loads(text, parse_int=str, parse_float=str)
            rows = rows if isinstance(rows, list) else [rows]
        except ValueError:
            rows = [json.loads(line, parse_int=str, parse_float=str) for line in text.split("\n") if line.strip()]
        keys = list(dict.fromkeys(key for row in rows for key in row))
        return [[str(row.get(key)) for key in keys] for row in rows]
    if kind == "txt":
        return [[text]]
    if kind == "conll":
        return [
            [line.split()[0]] for line in text.split("\n") if line.strip() and not line.startswith(("# ", "-DOCSTART-"))
        ]
    sniffed = "\t" if kind == "tsv" else next((d for d in ",\t;|" if d in text.lstrip("\r\n").splitlines()[0]), ",")
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    found = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=sniffed, quoting=quoting) if row]
    return found[1:]


def values(form: str, table: Any) -> list[list[str]]:
    kind = form.removesuffix(".gz")
    rows = [list(row) for _, row in table.scan(list(table.cells))]
    if kind == "txt":
        return [["\n".join(row[0] for row in rows)]]
    if kind == "conll":
        return [[word] for row in rows for word in row[list(table.cells).index("tokens")]]
    return [["" if kind == "xlsx" and value is None else str(value) for value in row] for row in rows]


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files_load_right_or_are_refused(form: str, tmp_path: Path) -> None:
    loaded = refused = 0
    for case in range(CASES):
        draw = random.Random(f"{form} {case}")
        whole = written(form, case, tmp_path)
        damage: Callable[[bytes, random.Random], bytes] = DAMAGE[case % len(DAMAGE)]
        raw = damage(whole, draw)
        path = tmp_path / f"damaged.{form}"
        path.write_bytes(raw)
        memory = draw.choice((2**26, 300))
        try:
            table = read_source(path, Format(), None, memory)[1]["train"]
            seen = values(form, table)
        except DataError as error:
            assert path.name in str(error), f"{form} {case} {damage.__name__}: {error} does not name the file"
            refused += 1
        except Exception:
            pytest.fail(f"{form} {case} {damage.__name__}: {traceback.format_exc()}")
        else:
            quoted = not any("quotes are read as characters" in note for note in table.said())
            assert seen == independently(form, raw, path, quoted), f"{form} {case} {damage.__name__}"
            loaded += 1
        try:
            data = load(path, memory=memory)
            assert all(len(rows[role]) == len(rows) for rows in data.splits.values() for role in rows.roles)
        except OnebaseError as error:
            assert isinstance(error, DataError), f"{form} {case} {damage.__name__}: {error!r}"
        except Exception:
            pytest.fail(f"{form} {case} {damage.__name__}: {traceback.format_exc()}")
    assert refused > 3 and loaded + refused == CASES
