"""Experiment trackers: what a run reports also goes to TensorBoard, Weights & Biases or MLflow.

The trackers are accelerate's. Each keeps to its own configuration: where MLflow's server is, whether wandb is offline.
TensorBoard's files go to the folder `tracking` of the store. Off by default; of several processes the first one writes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.errors import ConfigError, unknown
from onebase.training.loop import Reporter

if TYPE_CHECKING:
    from onebase.store import Store
    from onebase.training.prepare import Prepared
    from onebase.training.run import Run

PROJECT = "onebase"
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}  # tracker -> what it imports
EVERY = 10  # optimizer steps between two losses: a tracker may be a server


class Tracked(Reporter):
    """A reporter that also writes to trackers.

    Args:
        inner: receives everything as ever.
        trackers: of accelerate, started.
    """

    def __init__(self, inner: Reporter, trackers: Sequence[Any]):
        self.inner, self.trackers = inner, trackers
        self.steps = 0  # optimizer steps made, over all jobs: every value is logged at one of them

    def log(self, values: Mapping[str, Any]) -> None:
        """Write numbers at the present step."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
        for tracker in self.trackers:
            tracker.log(numbers, step=self.steps)

    def configure(self, runs: Sequence[Prepared]) -> None:
        """Write how the runs are trained, before the first step."""
        several = len(runs) > 1
        facts: dict[str, Any] = {}
        for run in runs:
            about = {
                "method": run.adapter.method.shorthand(),
                "data": run.data.source,
                "task": run.adapter.task["kind"],
            }
            about |= run.state.settings.plain()
            facts |= {f"{run.attached}/{key}" if several else key: value for key, value in about.items()}
        for tracker in self.trackers:
            tracker.store_init_configuration(facts)

    def result(self, run: Run, several: bool = False) -> None:
        """Write what an adapter and its base score at the end."""
        prefix = f"{run.name}/{run.split}" if several else run.split
        found = {f"{prefix}/{name}": value for name, value in run.metrics.items()}
        self.log(found | {f"{prefix}/base_{name}": value for name, value in run.base_metrics.items()})

    def start(self, steps: int, epochs: int) -> None:
        """Training begins."""
        self.inner.start(steps, epochs)

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        """Write the loss of the first step and of every tenth."""
        self.inner.step(step, loss, rows_per_second, seconds_left)
        first, self.steps = self.steps == 0, step
        if first or step % EVERY == 0:
            self.log({"loss": loss, "rows_per_second": rows_per_second})

    def epoch(self, entry: dict[str, float]) -> None:
        """Write the scores of an epoch."""
        self.inner.epoch(entry)
        self.log({("epoch_loss" if name == "loss" else name): value for name, value in entry.items()})

    def job_epoch(self, job: str, epochs: int, entry: dict[str, float]) -> None:
        """Write the scores of an epoch of one of several jobs."""
        self.inner.job_epoch(job, epochs, entry)
        self.log({f"{job}/{'epoch_loss' if name == 'loss' else name}": value for name, value in entry.items()})

    def job_end(self, job: str, sentence: str) -> None:
        """Pass it on."""
        self.inner.job_end(job, sentence)

    def note(self, text: str) -> None:
        """Pass it on."""
        self.inner.note(text)

    def end(self) -> None:
        """Training is over; the trackers wait for the results."""
        self.inner.end()


def root_of(store: Store | None) -> Path:
    """Return the folder of a store; the user's store by default."""
    from onebase.store import Store

    return (store or Store()).root


@contextmanager
def tracked(
    track: str | Sequence[str] | None, report: Reporter, title: str, root: Path, first: bool = True
) -> Iterator[Reporter]:
    """Let a reporter write to trackers too, as long as the block runs; `Tracked` where there are any.

    Args:
        track: 'tensorboard', 'wandb' or 'mlflow', or several; None: nothing changes.
        report: what receives progress.
        title: of the run.
        root: of the store.
        first: whether this is the process that reports.

    Raises:
        UnknownNameError: a tracker that does not exist.
        ConfigError: its package is not installed.
    """
    names = [track] if isinstance(track, str) else list(track or ())
    check_trackers(names)
    if not names or not first:
        yield report
        return
    from accelerate import PartialState

    PartialState()  # accelerate's trackers ask for it
    found: list[Any] = []
    try:
        for name in names:
            found.append(_tracker(name, title, root / "tracking"))
        yield Tracked(report, found)
    finally:
        for tracker in found:
            tracker.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Raise where a tracker does not exist or its package is missing; see `tracked`."""
    for name in names:
        if name not in PACKAGES:
            raise unknown("tracker", name, PACKAGES)
        missing = [package for package in ("accelerate", PACKAGES[name]) if find_spec(package) is None]
        if missing:
            raise ConfigError(f"track = {name!r} needs {' and '.join(missing)}: pip install 'onebase[{name}]'")


def _tracker(name: str, title: str, folder: Path) -> Any:
    """Return a started tracker of accelerate."""
    from accelerate import tracking

    run = f"{title}-{time.strftime('%Y%m%d-%H%M%S')}"
    if name == "tensorboard":
        folder.mkdir(parents=True, exist_ok=True)
        tracker: Any = tracking.TensorBoardTracker(run, folder)
    elif name == "wandb":
        folder.mkdir(parents=True, exist_ok=True)
        tracker = tracking.WandBTracker(PROJECT, name=run, dir=str(folder))
    else:
        tracker = tracking.MLflowTracker(PROJECT, run_name=run)
    tracker.main_process_only = False  # this is the first process, which alone comes here
    tracker.start()
    return tracker
