"""Interrupted training goes on bit by bit; training starts from a stored adapter."""

from __future__ import annotations

import csv
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import onebase as ob
from onebase.errors import ConfigError, CorruptError
from onebase.store import Store
from onebase.training import checkpoint as checkpoints
from onebase.training.loop import Reporter

GOOD = ["lovely", "great", "superb", "fine", "pleasant", "brilliant", "charming", "delightful"]
BAD = ["awful", "poor", "dreadful", "bad", "nasty", "dull", "broken", "horrid"]
THINGS = ["room", "meal", "film", "book", "phone"]
ROWS = [
    {"text": f"The {thing} was {word}.", "label": "good" if word in GOOD else "bad"}
    for thing in THINGS
    for word in GOOD + BAD
]
SETTINGS = {
    "epochs": 3, "batch_size": 8, "accumulate": 2, "save_steps": 2, "attention": "keep", "dtype": "float32", "seed": 5
}  # fmt: skip
METHOD = "lora(rank=2, dropout=0.2)"


class Stop(Reporter):
    """Interrupts training at a step, as Ctrl-C does."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.seen: list[int] = []

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        self.seen.append(step)
        if step == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def base() -> ob.Base:
    return ob.load_base("minilm")


@pytest.fixture(scope="module")
def whole(base: ob.Base) -> dict[str, torch.Tensor]:
    """Tensors of an uninterrupted run."""
    run = ob.train(base, ROWS, METHOD, **SETTINGS)
    tensors = base.adapters[run.name].snapshot()
    base.remove(run.name)
    return tensors


@pytest.mark.parametrize("at", [1, 2, 5, 9, 10, 12])
def test_a_resumed_run_ends_with_the_same_bits(base, whole, tmp_path, at) -> None:
    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ob.train(base, ROWS, METHOD, name="r", store=store, report=Stop(at), **SETTINGS)
    assert not base.adapters and checkpoints.place(tmp_path, "r").exists() and not store.list()
    again = Stop(-1)
    run = ob.train(base, ROWS, METHOD, name="r", store=store, resume=True, report=again, **SETTINGS)
    # every second step is saved, and every epoch (5 steps each)
    last = max(
        step for step in [0, 2, 4, 5, 6, 8, 10, 12, 14, 15] if step < at or (step == at and at % 5 == 0 and False)
    )
    assert again.seen[0] == last + 1
    own = base.adapters["r"].tensors()
    assert own.keys() == whole.keys() and all(torch.equal(own[key], whole[key]) for key in own)
    assert run.ref == "r@1" and not checkpoints.place(tmp_path, "r").exists()
    base.remove("r")


def test_a_run_that_ended_while_an_epoch_was_scored_goes_on_with_the_next_order(base, whole, tmp_path) -> None:
    """Step 8 is saved, as every second one is; it is the last one of the second epoch, which is scored after that."""

    class Scoring(Reporter):
        def epoch(self, entry: dict[str, float]) -> None:
            if entry["epoch"] == 2:
                raise KeyboardInterrupt

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ob.train(base, ROWS, METHOD, name="r", store=store, report=Scoring(), **SETTINGS)
    _, about = checkpoints.read(checkpoints.place(tmp_path, "r"))
    assert (about["state"]["epoch"], about["state"]["history"]["steps"]) == (1, 8), "no step of the epoch is left"
    ob.train(base, ROWS, METHOD, name="r", store=store, resume=True, **SETTINGS)
    own = base.adapters["r"].tensors()
    assert own.keys() == whole.keys() and all(torch.equal(own[key], whole[key]) for key in own)
    base.remove("r")


def test_resume_refuses_another_run_and_damage(base, tmp_path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ConfigError, match="needs name"):
        ob.train(base, ROWS, METHOD, resume=True, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        ob.train(base, ROWS, METHOD, name="r", store=store, report=Stop(4), **SETTINGS)
    for change, words in (
        ({"lr": 0.5}, r"training settings: lr was 0\.002, is 0\.5"),
        ({"method": "lora(rank=3)"}, "method: was"),
        ({"data": ROWS[:-2]}, "data"),
        ({"max_length": 40}, "max_length was"),
    ):
        asked = {"data": ROWS, "method": METHOD, **SETTINGS, **change}
        with pytest.raises(ConfigError, match=words):
            ob.train(base, asked.pop("data"), asked.pop("method"), name="r", store=store, resume=True, **asked)
    path = checkpoints.place(tmp_path, "r")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CorruptError, match="not a whole checkpoint"):
        ob.train(base, ROWS, METHOD, name="r", store=store, resume=True, **SETTINGS)
    assert not base.adapters


def test_without_a_checkpoint_resume_starts_over_and_says_so(base, whole, tmp_path) -> None:
    said: list[str] = []
    report = Reporter()
    report.note = said.append  # type: ignore[method-assign]
    ob.train(base, ROWS, METHOD, name="r", store=Store(tmp_path), resume=True, report=report, **SETTINGS)
    assert any("no checkpoint of r" in sentence for sentence in said)
    assert all(torch.equal(base.adapters["r"].tensors()[key], whole[key]) for key in whole)
    base.remove("r")


# -- warm start ----------------------------------------------------------------------------------------------------


def test_training_goes_on_from_a_stored_adapter_with_a_new_label(base, tmp_path) -> None:
    store = Store(tmp_path)
    first = ob.train(base, ROWS, "lora(rank=2)", name="r", store=store, template="Review: {text}", **SETTINGS)
    mean = base.predict([row["text"] for row in ROWS], "r")
    base.remove("r")
    new = [{"text": f"Please send the {t} to number {n}.", "label": "other"} for t in THINGS for n in range(6)]
    more, still = [*ROWS, *new], {"lr": 1e-12, "head_lr": 1e-12}
    run = ob.train(base, more, name="r", store=store, init_from="r@1", **SETTINGS | still)
    assert run.ref == "r@2" and run.method == first.method and run.labels == ("bad", "good", "other")
    adapter = base.adapters["r"]
    assert adapter.task["template"] == "Review: {text}"
    assert adapter.config["provenance"]["parent"]["ref"] == "r@1"
    texts = [row["text"] for row in ROWS]
    for then, now in zip(
        mean, base.predict(texts, "r")
    ):  # nothing moved: old labels answer as before, among themselves
        share = {k: now.probabilities[k] for k in then.probabilities}
        total = sum(share.values())
        assert {k: v / total for k, v in share.items()} == pytest.approx(then.probabilities, abs=1e-4)
    base.remove("r")
    with pytest.raises(ConfigError, match="leave the method out"):
        ob.train(base, more, "bottleneck", init_from="r@1", store=store, **SETTINGS)
    with pytest.raises(ob.errors.UnknownNameError):
        ob.train(base, more, init_from="nobody@1", store=store, **SETTINGS)


def test_how_rows_are_read_is_taken_over(base, tmp_path) -> None:
    """Otherwise the head would see other vectors than it was trained on, or of another width."""
    store = Store(tmp_path)
    ob.train(base, ROWS, "lora(rank=2)", name="r", store=store, windows=False, overlap=3, **SETTINGS)
    base.remove("r")
    run = ob.train(base, ROWS, init_from="r@1", store=store, overlap=5, **SETTINGS)
    task = base.adapters[run.name].task
    assert (task["windows"], task["overlap"]) == (False, 5)
    base.remove(run.name)
    twice = itertools.pairwise(ROWS)
    pairs = [{"text": a["text"], "text_pair": b["text"], "label": a["label"]} for a, b in twice]
    for asked, other in (("apart", "joint"), ("joint", "apart")):
        ob.train(base, pairs, "lora(rank=2)", name="p", store=store, pairs=asked, **SETTINGS)
        base.remove("p")
        run = ob.train(base, pairs, init_from="p", store=store, **SETTINGS)
        assert base.adapters[run.name].task["pairs"] == asked
        base.remove(run.name)
        with pytest.raises(ConfigError, match="leave pairs out"):
            ob.train(base, pairs, init_from="p", store=store, pairs=other, **SETTINGS)


def test_labels_of_another_task_get_a_new_head(base, tmp_path) -> None:
    store = Store(tmp_path)
    ob.train(base, ROWS, "lora(rank=2)", name="r", store=store, **SETTINGS)
    base.remove("r")
    other = [{"text": row["text"], "label": "yes" if "meal" in row["text"] else "no"} for row in ROWS]
    run = ob.train(base, other, init_from="r@1", store=store, **SETTINGS)
    assert run.labels == ("no", "yes")
    base.remove(run.name)


# -- killed processes ------------------------------------------------------------------------------------------------


def _command(folder: Path, name: str, *more: str) -> list[str]:
    sets = [f"--set={key}={value}" for key, value in SETTINGS.items() if key != "dtype"]
    return [
        sys.executable, "-m", "onebase", "train", "-d", str(folder / "rows.csv"), "-m", METHOD, "--name", name, *sets,
        "--set=train.dtype=float32", *more,
    ]  # fmt: skip


def _rows_file(folder: Path) -> None:
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)


def _tensors(store: Store, ref: str) -> dict[str, torch.Tensor]:
    return store.resolve(ref).tensors()


def kill_and_resume(folder: Path, kills: int, seed: int) -> None:
    """Kill training at random moments, resume, and compare with an uninterrupted run."""
    _rows_file(folder)
    home = folder / "home"
    environment = {**os.environ, "ONEBASE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    subprocess.run(_command(folder, "whole"), env=environment, check=True, capture_output=True)
    takes = time.monotonic() - began
    store, draw = Store(home), random.Random(seed)
    expected = _tensors(store, "whole")
    for number in range(kills):
        name = f"killed-{number}"
        process = subprocess.Popen(
            _command(folder, name), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(draw.uniform(0.3, 1.0) * takes)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not [found for found in store.list() if found.name == name]:
            again = subprocess.run(
                [sys.executable, "-m", "onebase", *_command(folder, name, "--resume")[3:]],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert again.returncode == 0, again.stderr
        own = _tensors(store, name)
        assert own.keys() == expected.keys() and all(torch.equal(own[key], expected[key]) for key in own), number
    left = [
        p for p in (home / "runs").rglob("*") if p.is_file() and p.suffix not in (".svg", ".json", ".html", ".lock")
    ]
    assert left == []  # what a run tells about itself stays, its checkpoint does not


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_runs_resume_to_the_same_bits(tmp_path) -> None:
    kill_and_resume(tmp_path, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_fifty_killed_runs_resume_to_the_same_bits(tmp_path) -> None:
    kill_and_resume(tmp_path, kills=50, seed=2)


def test_resume_alone_finds_the_latest_run(tmp_path) -> None:
    """`onebase train --resume` needs no other option: data, method and settings come from the run."""
    _rows_file(tmp_path)
    environment = {**os.environ, "ONEBASE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        _command(tmp_path, "r"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    run_file = checkpoints.place(tmp_path / "home", "r")
    while not run_file.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run(
        [sys.executable, "-m", "onebase", "train", "--resume"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert "going on with r" in again.stderr and Store(tmp_path / "home").resolve("r@1")
    nothing = subprocess.run(
        [sys.executable, "-m", "onebase", "train", "--resume"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert nothing.returncode == 2 and "no interrupted run" in nothing.stderr
