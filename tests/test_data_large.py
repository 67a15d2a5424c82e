"""Large data and splits of every kind: bounded memory, rows read by index, groups together, labels in proportion."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.data import load
from onebase.data.disk import DiskColumn
from onebase.errors import ConfigError, DataError, UnknownNameError

# Held while loading: 64 MiB of rows before disk takes over, and the interpreter's own overhead on them; and per row
# its place, where its text ends on disk, its class, the rank of its text, and its position in a split.
ALLOWED = 150 * 2**20

MEASURE = """
import resource, sys, threading, time
import numpy, csv, json
from onebase.data import load
import onebase.data.excel, onebase.data.splits
def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, peak, done = now(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, now())
        time.sleep(0.01)
thread = threading.Thread(target=watch)
thread.start()
data = load(sys.argv[1])
characters = 0
for rows in data.splits.values():
    for text, label in zip(rows.text, rows.label):
        characters += len(text)
assert data.train.text[-1].startswith("row ") and data.train.text[len(data.train) // 2]
done = True
thread.join()
print(peak - before, len(data.train), len(data.validation), len(data.test), characters)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
@pytest.mark.parametrize("width", [60, 1000], ids=["short rows", "long rows"])
def test_memory_stays_bounded(width: int, tmp_path: Path) -> None:
    path = tmp_path / "big.csv"
    count = 0
    with path.open("w") as stream:
        stream.write("text,label\n")
        while stream.tell() < 300_000_000 // (1 if width > 100 else 4):
            stream.writelines(f"row {count + i} {'word ' * (width // 5)},c{i % 3}\n" for i in range(1000))
            count += 1000
    ran = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    grown, *sizes, characters = map(int, ran.stdout.split())
    assert sum(sizes) == count and characters > 0.9 * path.stat().st_size
    assert grown < ALLOWED, f"{grown / 2**20:.0f} MiB for {path.stat().st_size / 2**20:.0f} MiB"


def test_rows_on_disk_are_rows() -> None:
    rows = [{"text": f"é 日 \ud800 {i}" * (i % 5 + 1), "label": f"c{i % 3}"} for i in range(300)]
    held, kept = load(rows), load(rows, memory=1000)
    assert isinstance(held.train.text, tuple) and not isinstance(kept.train.text, tuple)
    assert kept.train == held.train and kept.digest == held.digest and kept.labels == held.labels
    assert list(kept.train.text) == list(held.train.text) and kept.train.text[-1] == held.train.text[-1]
    assert list(kept.train.text[5:9]) == list(held.train.text[5:9])
    assert kept.train.select([3, 0, -1, 3]) == held.train.select([3, 0, -1, 3])
    assert kept.train.select([7, 5]).select([1]).place(0) == held.train.select([7, 5]).select([1]).place(0)
    assert load(rows, memory=1000, limit=30).digest == load(rows, limit=30).digest
    for bad in (300, -301):
        with pytest.raises(IndexError):
            kept.train.select([bad])
        with pytest.raises(IndexError):
            kept.train.text[bad]


def test_problems_are_the_same_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"{'' if i % 9 == 4 else f't {i}'},c{i % 2}\n" for i in range(100)))
    messages = []
    for memory in (2**26, 100):
        with pytest.raises(DataError, match=r"11 x empty text.*") as caught:
            load(path, memory=memory)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "a.csv, line 6, column 'text'" in messages[0]


def test_columns_on_disk_leave_no_file_open() -> None:
    column = DiskColumn(plain=False, restore=tuple)
    for value in ([1, "a"], [], ["é"]):
        column.append(value)
    column.flush()
    assert list(column) == [(1, "a"), (), ("é",)] and column[-1] == ("é",)
    file = column._file
    del column
    assert file.closed
    with pytest.raises(TypeError):
        pickle.dumps(DiskColumn(plain=True))  # a temporary file goes nowhere else


# --- splits ---

labelled = st.lists(st.sets(st.sampled_from("abcd")), min_size=30, max_size=120)


@settings(deadline=None, max_examples=40)
@given(labels=labelled, seed=st.integers(0, 3))
def test_several_labels_are_stratified(labels: list[set[str]], seed: int) -> None:
    rows = [{"text": f"t {i}", "labels": sorted(found)} for i, found in enumerate([{"a"}, {"b"}, *labels])]
    data = load(rows, seed=seed)
    assert data == load(rows, seed=seed)
    whole = Counter(name for row in rows for name in row["labels"])
    sides = {split: Counter(name for found in part["labels"] for name in found) for split, part in data.splits.items()}
    assert sum(sides.values(), Counter()) == whole and sum(map(len, data.splits.values())) == len(rows)
    for split in ("validation", "test"):
        assert abs(len(data.splits[split]) - 0.1 * len(rows)) <= 4
        for name, count in whole.items():
            assert abs(sides[split][name] - 0.1 * count) <= 2 + 0.05 * count
    assert set(sides["train"]) == set(whole)


def test_rare_labels_are_spread_better_than_by_chance() -> None:
    draw = random.Random(0)
    shares = {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.05, "e": 0.02, "f": 0.02}
    rows = [{"text": f"t {i}", "labels": [c for c, p in shares.items() if draw.random() < p]} for i in range(1000)]
    data = load(rows)
    whole = Counter(name for row in rows for name in row["labels"])
    for split in ("validation", "test"):
        found = Counter(name for labels in data.splits[split]["labels"] for name in labels)
        assert all(abs(found[name] - count / 10) <= 1.5 for name, count in whole.items()), (found, whole)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), memory=st.sampled_from([2**26, 500]))
def test_groups_stay_together(data: st.DataObject, memory: int) -> None:
    owners = data.draw(st.lists(st.integers(0, 25), min_size=40, max_size=100))
    texts = data.draw(st.lists(st.integers(0, 400), min_size=len(owners), max_size=len(owners)))
    rows = [
        {"text": f"t {text}", "author": f"g {owner}", "label": "ab"[i % 2]}
        for i, (owner, text) in enumerate(zip([*owners, *range(100, 112)], [*texts, *range(1000, 1012)]))
    ]
    found = load(rows, group="author", memory=memory)
    where = {row["text"]: set() for row in rows}
    groups = {row["author"]: set() for row in rows}
    assert found.train.places is not None and "group" not in found.train.roles
    for split, part in found.splits.items():
        for place in part.places or ():
            where[rows[place - 1]["text"]].add(split)
            groups[rows[place - 1]["author"]].add(split)
    assert all(len(sides) == 1 for sides in [*where.values(), *groups.values()])
    assert sum(map(len, found.splits.values())) == len(rows)


def test_groups_must_be_there_and_many() -> None:
    rows = [{"text": f"t {i}", "label": "ab"[i % 2], "who": f"{i % 5}"} for i in range(40)]
    with pytest.raises(UnknownNameError, match=r"column for --group.*'author'"):
        load(rows, group="author")
    with pytest.raises(DataError, match=r"5 groups in 40 rows"):
        load(rows, group="who")
    with pytest.raises(DataError, match=r"row 4, column 'who': .*group"):
        load([*rows[:3], rows[3] | {"who": None}, *rows[4:]], group="who")
    with pytest.raises(ConfigError, match=r"limit is 1"):
        load(rows, limit=1)
