"""Training beside a server: a real process, real rows, a stored adapter; and how it is refused and stopped."""

from __future__ import annotations

import time

import pytest

from onebase.demo.run import REVIEWS
from onebase.errors import ConfigError, OnebaseError, TrainingError, UnknownNameError
from onebase.serve.training import Training, TrainingRequest, Trainings


def finished(run: Training) -> dict:
    assert run.concluded.wait(600), run.plain()
    return run.plain()


def table(rows: int) -> str:
    return "".join((REVIEWS / "validation.csv").read_text(encoding="utf-8").splitlines(keepends=True)[: rows + 1])


def test_a_table_is_trained_on_and_the_adapter_is_stored(tmp_path) -> None:
    from onebase.store import Store

    stored = []
    trainings = Trainings("minilm", tmp_path, stored.append)
    asked = TrainingRequest(name="mine", method="bitfit", csv=table(40), text="text", label="label", epochs=2)
    run = trainings.start(asked)
    with pytest.raises(TrainingError, match="one adapter is trained at a time"):
        trainings.start(TrainingRequest(sample="reviews"))
    facts = finished(run)
    assert facts["state"] == "done", facts
    assert stored == [facts["ref"]] == ["mine@1"]
    assert [entry["epoch"] for entry in facts["history"]] == [1, 2]
    assert facts["losses"][-1][0] == facts["total_steps"]
    config = Store(tmp_path).resolve("mine@1").config
    assert config.metrics["adapter"]["accuracy"] == facts["metrics"]["accuracy"]
    assert config.metrics["base"]["accuracy"] == facts["base_metrics"]["accuracy"]
    assert run.folder is not None and not run.folder.exists()


def test_a_run_that_is_stopped_stores_nothing(tmp_path) -> None:
    from onebase.store import Store

    trainings = Trainings("minilm", tmp_path)
    run = trainings.start(TrainingRequest(sample="reviews", name="gone"))
    time.sleep(0.5)
    assert trainings.stop(run.id).plain()["state"] == "cancelled"
    assert Store(tmp_path).list() == []


def test_what_the_process_cannot_use_is_said(tmp_path) -> None:
    run = Trainings("minilm", tmp_path).start(TrainingRequest(name="odd", csv="text,label\nonly one row,a\n"))
    facts = finished(run)
    assert facts["state"] == "failed" and "table.csv" in facts["error"], facts


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"sample": "reviews", "method": "loro"}, UnknownNameError),
        ({"sample": "revews"}, UnknownNameError),
        ({"sample": "reviews", "name": "../up"}, OnebaseError),
        ({}, ConfigError),
        ({"sample": "reviews", "csv": "text,label\n"}, ConfigError),
    ],
)
def test_requests_that_are_refused(tmp_path, asked, error) -> None:
    trainings = Trainings("minilm", tmp_path)
    with pytest.raises(error):
        trainings.start(TrainingRequest(**asked))
    assert not trainings.runs
