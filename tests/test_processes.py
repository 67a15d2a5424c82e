"""Several processes train what one would: real processes, connected by gloo, against one process.

Adapters are trained in float64 here, over float64 bases. Heads stay in float32, so what has a head agrees to their
rounding (1e-6), what has none to 1e-8.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onebase.store import Store
from onebase.training import checkpoint as checkpoints

HERE = Path(__file__).parent
WORKER = HERE / "worker_processes.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
HEADED = 1e-6


def work(folder: Path, count: int, case: str, *more: str, fails: bool = False) -> dict[str, torch.Tensor]:
    """Run a case in `count` processes; return the tensors that the first one wrote."""
    folder.mkdir(exist_ok=True)
    launcher = [*TORCHRUN, "--standalone", "--nproc-per-node", str(count)] if count > 1 else [sys.executable]
    done = subprocess.run([*launcher, str(WORKER), case, str(folder), *more], capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return {} if fails else load_file(folder / "tensors.safetensors")


def gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return the largest difference."""
    assert one.keys() == other.keys()
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


@pytest.mark.parametrize(
    ("case", "count", "tolerance"),
    [
        ("classification", 2, HEADED),
        pytest.param("one-row", 2, HEADED, marks=pytest.mark.slow),
        pytest.param("last", 3, HEADED, marks=pytest.mark.slow),
        pytest.param("union", 2, HEADED, marks=pytest.mark.slow),
        pytest.param("adalora", 2, HEADED, marks=pytest.mark.slow),
        pytest.param("completion", 2, 1e-8, marks=pytest.mark.slow),
        pytest.param("embeddings", 2, 1e-8, marks=pytest.mark.slow),
        pytest.param("many", 2, HEADED, marks=pytest.mark.slow),
    ],
)
def test_processes_equal_one(case, count, tolerance, tmp_path) -> None:
    """Weights, scores and steps are those of one process; shares of rows are uneven and some are empty."""
    one = work(tmp_path / "one", 1, case)
    together = work(tmp_path / "together", count, case)
    assert gap(one, together) <= tolerance
    names = {stored.ref for stored in Store(tmp_path / "one" / "store").list()}
    assert names == {stored.ref for stored in Store(tmp_path / "together" / "store").list()} != set()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, tmp_path) -> None:
    whole = work(tmp_path / "whole", 1, "interrupted", "0")
    work(tmp_path / "cut", before, "interrupted", "7", fails=True)
    assert checkpoints.place(tmp_path / "cut" / "store", "r").exists()
    again = work(tmp_path / "cut", after, "interrupted", "0")
    assert gap(whole, again) <= HEADED
    assert not checkpoints.place(tmp_path / "cut" / "store", "r").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["classification", "one-row", "completion", "embeddings", "union", "dora", "hira", "prompt", "checkpointed"]
)
def test_a_split_base_equals_a_whole_one(case, tmp_path) -> None:
    one = work(tmp_path / "one", 1, case)
    assert gap(one, work(tmp_path / "split", 2, case, "shard")) <= HEADED
    (stored,) = Store(tmp_path / "split" / "store").list()
    assert not stored.config.provenance.get("quantization")  # a part of a tensor is no tensor of fewer bits


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run onebase on a small file of reviews."""
    data = folder / "reviews.csv"
    if not data.exists():
        rows = [
            f"The {thing} was {word}.,{label}"
            for thing in ("room", "meal", "film", "book")
            for label, many in (("good", ("lovely", "great", "fine")), ("bad", ("awful", "poor", "nasty")))
            for word in many
        ]
        data.write_text("\n".join(["text,label", *rows]))
    settings = ["--epochs", "1", "--batch-size", "8", "--set", "attention=keep", "--set", "train.dtype=float32"]
    own = {**os.environ, "ONEBASE_HOME": str(folder / "home")}
    given = [sys.executable, "-m", "onebase", "train", "-d", str(data), "-b", "minilm", *settings, *words]
    return subprocess.run(given, capture_output=True, text=True, env=own)


def test_the_command_line_starts_processes_and_prints_once(tmp_path) -> None:
    done = command(tmp_path, "--processes", "2", "--name", "r")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("r@1") == 1 and done.stderr.count("epoch 1/1") == 1
    assert [stored.ref for stored in Store(tmp_path / "home").list()] == ["r@1"]


def test_a_mistake_is_said_once_with_its_own_exit_code(tmp_path) -> None:
    done = command(tmp_path, "--processes", "2", "--label", "nope", "--name", "r")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.count("error:") == 1 and "'nope'" in done.stderr and "Traceback" not in done.stderr
    alone = command(tmp_path, "--shard", "--name", "r")
    assert alone.returncode == 2 and "--processes N" in alone.stderr
