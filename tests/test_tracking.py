"""Trackers: what a run reports is found in the files of the real libraries."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import onebase as ob
from onebase.cli.main import app
from onebase.errors import ConfigError, UnknownNameError
from onebase.store import Store
from onebase.training import tracking
from onebase.training.loop import Reporter

WORDS = {"good": ["lovely", "great", "fine"], "bad": ["awful", "poor", "nasty"]}
ROWS = [
    {"text": f"The {thing} was {word}.", "label": label}
    for thing in ("room", "meal", "film", "book")
    for label, words in WORDS.items()
    for word in words
]
SETTINGS = {"epochs": 2, "batch_size": 8, "patience": 0, "attention": "keep", "dtype": "float32"}


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of every tag in TensorBoard's event files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        events = accumulator.EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


class Kept(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.entries: list[dict[str, float]] = []

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        self.losses[step] = loss

    def epoch(self, entry: dict[str, float]) -> None:
        self.entries.append(entry)


@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_tensorboard_holds_a_run_and_a_pass(tmp_path) -> None:
    base, report = ob.load_base("minilm", dtype="float32"), Kept()
    store = Store(tmp_path)
    run = ob.train(base, ROWS, "bitfit", store=store, track="tensorboard", report=report, **SETTINGS)
    (folder,) = (tmp_path / "tracking").iterdir()
    found = scalars(folder)
    logged = [step for step in report.losses if step == 1 or step % tracking.EVERY == 0]
    assert found["loss"] == [(step, pytest.approx(report.losses[step])) for step in logged]
    ends = [len(report.losses) // 2, len(report.losses)]
    assert found["validation_loss"] == [(n, pytest.approx(e["validation_loss"])) for n, e in zip(ends, report.entries)]
    assert found["test/accuracy"] == [(run.history.steps, pytest.approx(run.value))]
    assert found["test/base_accuracy"] == [(run.history.steps, pytest.approx(run.base_value))]
    jobs = [ob.Job(ROWS, "bitfit", "a", **SETTINGS), ob.Job(ROWS, "ia3", "b", **SETTINGS)]
    runs = ob.train_many(base, jobs, store=store, track=["tensorboard"], save=False)
    (folder,) = (entry for entry in (tmp_path / "tracking").iterdir() if entry.name.startswith("jobs"))
    found = scalars(folder)
    for job in runs:
        assert isinstance(job, ob.training.Run)
        assert found[f"{job.name}/test/accuracy"][0][1] == pytest.approx(job.value)
        assert [v for _, v in found[f"{job.name}/epoch_loss"]] == pytest.approx(
            [entry["loss"] for entry in job.history.epochs[1:]]
        )


def test_what_cannot_be_tracked_is_refused_before_anything_is_read(monkeypatch) -> None:
    base = ob.load_base("minilm", dtype="float32")
    with pytest.raises(UnknownNameError, match="tensorboard"):
        ob.train(base, "/no/such/file.csv", track="tensorbord")
    monkeypatch.setitem(tracking.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install 'onebase\[wandb\]'"):
        ob.train_many(base, [ob.Job(ROWS)], track=["tensorboard", "wandb"])
    found = CliRunner().invoke(app, ["train", "-d", "/no/such/file.csv", "--track", "mlflows"])
    assert found.exit_code != 0
    assert "mlflow" in f"{found.exception} {found.output} {found.stderr}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_the_command_line_tracks(tmp_path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("\n".join(["text,label", *(f"{row['text']},{row['label']}" for row in ROWS)]))
    words = [
        "train",
        "-d",
        str(data),
        "-m",
        "bitfit",
        "--epochs",
        "1",
        "--set",
        "attention=keep",
        "--track",
        "tensorboard",
    ]
    found = CliRunner(env={"ONEBASE_HOME": str(tmp_path)}).invoke(app, words)
    assert found.exit_code == 0, found.output
    (folder,) = (tmp_path / "tracking").iterdir()
    assert folder.name.startswith("rows-") and "test/accuracy" in scalars(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_mlflow_holds_a_run(tmp_path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    base = ob.load_base("minilm", dtype="float32")
    run = ob.train(base, ROWS, "bitfit", store=Store(tmp_path), track="mlflow", **SETTINGS)
    (found,) = mlflow.search_runs(experiment_names=[tracking.PROJECT], output_format="list")
    assert found.data.metrics["test/accuracy"] == pytest.approx(run.value)
    assert found.data.params["method"].startswith("bitfit") and found.data.params["epochs"] == "2"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_wandb_writes_offline(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    base = ob.load_base("minilm", dtype="float32")
    ob.train(base, ROWS, "bitfit", store=Store(tmp_path), track="wandb", **SETTINGS)
    (log,) = (tmp_path / "tracking" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"base_accuracy" in log.read_bytes()
