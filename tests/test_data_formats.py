"""Formats: the same rows give the same data from every format, and what a file hides is found or told."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest

from onebase.data import load
from onebase.errors import ConfigError, DataError, UnknownNameError

ROWS = [{"text": f'Été n° {i}, with "quotes";\tand 日本 {i % 7}', "label": ("été", "b c")[i % 2]} for i in range(40)]
PLAIN = [{"text": f"text {i} of some words", "label": f"c{i % 2}"} for i in range(40)]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    text = pandas.DataFrame(rows).to_csv(index=False, sep=delimiter)
    raw = text.encode(encoding)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def write_json(path: Path, value: Any) -> Path:
    raw = json.dumps(value).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def write_frame(path: Path, rows: list[dict[str, Any]]) -> Path:
    frame = pandas.DataFrame(rows)
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_excel(path, index=False)
    return path


def dataset_of(rows: list[dict[str, Any]]) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_list(rows)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.csv": lambda p: write_csv(p, ROWS),
    "a.csv.gz": lambda p: write_csv(p, ROWS),
    "semicolon.csv": lambda p: write_csv(p, ROWS, ";"),
    "pipe.csv": lambda p: write_csv(p, ROWS, "|"),
    "a.tsv": lambda p: write_csv(p, ROWS, "\t"),
    "bom.csv": lambda p: write_csv(p, ROWS, encoding="utf-8-sig"),
    "utf16.csv": lambda p: write_csv(p, ROWS, encoding="utf-16"),
    "utf16.tsv": lambda p: write_csv(p, ROWS, "\t", encoding="utf-16"),
    "utf32.csv.gz": lambda p: write_csv(p, ROWS, encoding="utf-32"),
    "a.jsonl": lambda p: write_jsonl(p, ROWS),
    "a.ndjson": lambda p: write_jsonl(p, ROWS),
    "a.jsonl.gz": lambda p: write_jsonl(p, ROWS),
    "lines.json": lambda p: write_jsonl(p, ROWS),
    "a.json": lambda p: write_json(p, ROWS),
    "a.json.gz": lambda p: write_json(p, ROWS),
    "wrapped.json": lambda p: write_json(p, {"version": 1, "data": ROWS}),
    "columns.json": lambda p: write_json(p, {key: [row[key] for row in ROWS] for key in ROWS[0]}),
    "frame.json": lambda p: write_json(p, {k: {str(i): row[k] for i, row in enumerate(ROWS)} for k in ROWS[0]}),
    "a.parquet": lambda p: write_frame(p, ROWS),
    "a.xlsx": lambda p: write_frame(p, ROWS),
    "frame": lambda p: pandas.DataFrame(ROWS),
    "list": lambda p: ROWS,
    "dataset": lambda p: dataset_of(ROWS),
    "streamed": lambda p: dataset_of(ROWS).to_iterable_dataset(),
    "text path": lambda p: str(write_csv(p.with_name("a b.csv"), ROWS)),
}


@pytest.fixture(scope="module")
def expected() -> str:
    return load(ROWS).digest


@pytest.mark.parametrize("memory", [2**26, 300], ids=["held", "on disk"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_data(name: str, memory: int, tmp_path: Path, expected: str) -> None:
    data = load(WRITERS[name](tmp_path / name), memory=memory)
    assert data.digest == expected and data.labels == ("b c", "été")
    assert {row["text"]: row["label"] for row in ROWS} == {
        text: label for rows in data.splits.values() for text, label in zip(rows.text, rows.label or ())
    }


def test_splits_come_from_folders_json_and_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    splits = {"train": PLAIN[:20], "dev": PLAIN[20:30], "test": PLAIN[30:]}
    folder = tmp_path / "folder"
    folder.mkdir()
    for split, rows in splits.items():
        write_jsonl(folder / f"{split}.jsonl.gz", rows)
    shards = tmp_path / "shards"
    shards.mkdir()
    for split, rows in splits.items():
        write_frame(shards / f"{split}-00000-of-00001.parquet", rows)
    sources = [
        folder,
        shards,
        write_json(tmp_path / "all.json", splits),
        datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}),
        splits,
    ]
    found = [load(source) for source in sources]
    assert len({data.digest for data in found}) == 1 and not found[0].splits_made
    assert [len(rows) for rows in found[0].splits.values()] == [20, 10, 10]


def test_hub_ids_go_through_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "reviews"
    folder.mkdir(parents=True)
    for split, rows in {"train": PLAIN[:30], "validation": PLAIN[30:]}.items():
        write_csv(folder / f"{split}.csv", rows)
    data = load(f"hf://{folder}")
    assert data.source == "reviews" and (len(data.train), len(data.validation)) == (30, 10)
    assert load(folder).digest == data.digest
    with pytest.raises(DataError, match=r"nobody/nothing.*cannot be loaded.*no such file or folder"):
        load("nobody/nothing")
    with pytest.raises(DataError, match=r"no file or folder 'some/path\.csv'"):
        load("some/path.csv")


def test_class_numbers_of_data_sets_are_named() -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    numbered = [{"text": row["text"], "label": i % 2} for i, row in enumerate(PLAIN)]
    train = datasets.Dataset.from_list(numbered, features=features)
    hidden = datasets.Dataset.from_list([{"text": "x", "label": -1}], features=features)
    data = load({"train": train, "validation": train, "test": hidden})
    assert data.labels == ("no", "yes") and len(data.test) == 0
    assert any("test has no labels: its 1 rows are not used" in note for note in data.notes)


def test_encodings_are_found_or_told(tmp_path: Path) -> None:
    rows = [{"text": f"café {i}", "label": "été" if i % 2 else "b"} for i in range(20)]
    for encoding in ("cp1252", "latin-1"):
        path = write_csv(tmp_path / f"{encoding}.csv", rows, encoding=encoding)
        assert load(path, encoding=encoding).digest == load(rows).digest
        with pytest.raises(DataError, match=r"byte 0xe9 at byte position 14, line 2.*--encoding cp1252"):
            load(path)
    with pytest.raises(DataError, match=r"NUL: it is no UTF-8.*utf-16-le"):
        load(write_csv(tmp_path / "bare.csv", rows, encoding="utf-16-le"))
    assert load(tmp_path / "bare.csv", encoding="utf-16-le").digest == load(rows).digest
    with pytest.raises(DataError, match=r"byte order mark of utf-8.*'cp1252' was given"):
        load(write_csv(tmp_path / "bom.csv", rows, encoding="utf-8-sig"), encoding="cp1252")
    for name in ("klingon", "base64", "rot13"):
        with pytest.raises(ConfigError, match=rf"encoding '{name}'"):
            load(tmp_path / "bom.csv", encoding=name)
    with pytest.raises(ConfigError, match=r"encoding 'utf-8' has no meaning for a \.parquet"):
        load(write_frame(tmp_path / "a.parquet", rows), encoding="utf-8")


def test_quoting_is_found_or_told(tmp_path: Path) -> None:
    literal = "".join(f'"{i} he said\t{i % 2}\n' for i in range(20))
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + literal)
    data = load(path)
    assert data.train.text[0].startswith('"') and any("quotes are read as characters" in note for note in data.notes)
    assert load(path, quote="none").digest == data.digest
    with pytest.raises(DataError, match=r"malformed row that starts on line 2"):
        load(path, quote="double")
    single = tmp_path / "b.csv"
    single.write_text("'text','label'\n" + "".join(f"'it, {i}','c{i % 2}'\n" for i in range(20)))
    assert load(single).train.text[0].startswith("it, ")
    named = tmp_path / "c.csv"
    named.write_text('"text, whole";label\n' + "".join(f'"a, {i}";c{i % 2}\n' for i in range(20)))
    assert load(named, text="text, whole").labels == ("c0", "c1")
    with pytest.raises(ConfigError, match=r"delimiter ',,'"):
        load(named, delimiter=",,")
    assert load(named, delimiter="semicolon", text="text, whole").labels == ("c0", "c1")


def test_workbooks(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    path = tmp_path / "a.xlsx"
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "rows"
    sheet.append(["text", "label", "note"])
    for i in range(20):
        sheet.append([f"text {i}", i % 2, "#N/A" if i == 3 else None])
        if i == 4:
            sheet.append([None, None, None])
    book.create_sheet("empty")
    book.save(path)
    data = load(path)
    assert data.labels == ("0", "1") and any("1 empty rows of the sheet" in note for note in data.notes)
    book.create_sheet("more").append(["something"])
    sheet["B6"] = "#DIV/0!"
    book.save(path)
    with pytest.raises(DataError, match=r"several sheets hold something: 'rows', 'more'.*--sheet"):
        load(path)
    with pytest.raises(DataError, match=r"a\.xlsx, row 6, column 'label': error value as label: #DIV/0!"):
        load(path, sheet="rows")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'rows'"):
        load(path, sheet="row")


def test_blank_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"t {i},c{i % 2}\n\n" for i in range(20)))
    assert any("a.csv: 20 blank lines hold no row" in note for note in load(path).notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a", "label": "b"}, {"text": "c"', r"record 2: not JSON"),
        ('[{"text": "a", "label": "b"} {"text": 1}]', r"after record 1: '\{'; expected ',' or '\]'"),
        ('[{"text": "a", "label": "b"}', r"after record 1: 'the end of the file'"),
        ('[{"text": "a", "label": "b"},]', r"record 2: not JSON"),
        ('[{"text": "a", "label": "b"}] x', r"text after the end of the array"),
        ('[{"text": "a", "text": "b"}]', r"record 1: the keys \['text'\] stand twice"),
        ("[1, 2]", r"record 1: '\"1\"' is not an object"),
        ("[]", r"no rows"),
        ("3", r"is no row"),
        ("[" * 100_000, r"nested too deep"),
        ('{"text": ["a", "b"], "label": ["c"]}', r"differ in length"),
        ('{"text": "a"', r"not JSON"),
    ],
)
def test_malformed_json(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"a\.json: .*{message}"):
        load(path)


def test_json_rows_larger_than_the_buffer(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + "é" * 700_000, "label": f"c{i % 2}"} for i in range(10)]
    assert load(write_json(tmp_path / "a.json", rows)).digest == load(rows).digest


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.csv\.gz: the gzip file is damaged or cut off"):
        load(path)
    path.write_text("text,label\n")
    with pytest.raises(DataError, match=r"not compressed with gzip"):
        load(path)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "train.csv").mkdir(parents=True)
    with pytest.raises(DataError, match=r"train\.csv: a folder stands where a file is expected"):
        load(folder)
    with pytest.raises(DataError, match=r"neither a file nor a folder"):
        load("/dev/null")
    with pytest.raises(DataError, match=r"cannot be read|no file or folder"):
        load("x" * 5000)
    pdf = tmp_path / "a.csv"
    for magic, what in ((b"%PDF-1.4", "a PDF"), (b"PK\x03\x04zip", "a zip or Excel file"), (b"PAR1", "a Parquet")):
        pdf.write_bytes(magic)
        with pytest.raises(DataError, match=what):
            load(pdf)


def test_missing_libraries_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    write_frame(tmp_path / "a.parquet", PLAIN)
    write_frame(tmp_path / "a.xlsx", PLAIN)
    for module, source, extra in (
        ("pyarrow", tmp_path / "a.parquet", "data"),
        ("openpyxl", tmp_path / "a.xlsx", "excel"),
        ("datasets", "owner/name", "data"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(DataError, match=rf"onebase\[{extra}\]"):
            load(source)
