"""Progress of training on stderr: a live line on a terminal, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from typing import Any

from onebase.training.loop import Reporter

EVERY = 10.0  # seconds between plain lines within an epoch


def reporter() -> PlainProgress | LiveProgress:
    """Return the reporter that suits stderr."""
    return LiveProgress() if sys.stderr.isatty() else PlainProgress()


class PlainProgress(Reporter):
    """A line per epoch, and one every 10 seconds."""

    def __init__(self) -> None:
        self.steps = self.epochs = 0
        self.last = time.monotonic()

    def start(self, steps: int, epochs: int) -> None:
        """Say how much there is to do."""
        self.steps, self.epochs, self.last = steps, epochs, time.monotonic()
        self.note(f"training: {steps} steps in {epochs} epoch{'s' if epochs > 1 else ''}")

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        """Print a line when the last one is 10 seconds old."""
        if time.monotonic() - self.last >= EVERY:
            self.note(
                f"step {step}/{self.steps}  loss {loss:.4f}  {rows_per_second:.1f} rows/s  {clock(seconds_left)} left"
            )

    def epoch(self, entry: dict[str, float]) -> None:
        """Print the scores of an epoch."""
        self.note(epoch_line(entry, self.epochs))

    def job_epoch(self, job: str, epochs: int, entry: dict[str, float]) -> None:
        """Print the scores of an epoch of one of several jobs."""
        self.note(f"{job}: {epoch_line(entry, epochs)}")

    def note(self, text: str) -> None:
        """Print a line."""
        self.last = time.monotonic()
        print(text, file=sys.stderr, flush=True)


class LiveProgress(Reporter):
    """A bar with loss, metric, speed and time left."""

    def __init__(self) -> None:
        self.epochs = 0
        self.bar: Any = None
        self.task: Any = None

    def start(self, steps: int, epochs: int) -> None:
        """Show the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.epochs = epochs
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            console=Console(stderr=True, highlight=False),
            expand=True,
            transient=True,
        )
        self.task = self.bar.add_task("training", total=steps, facts="")
        self.facts, self.metric = "", ""
        self.bar.start()

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        """Move the bar."""
        self.facts = f"loss {loss:.3f}{self.metric}  {rows_per_second:.0f} rows/s  {clock(seconds_left)} left"
        self.bar.update(self.task, completed=step, facts=self.facts)

    def epoch(self, entry: dict[str, float]) -> None:
        """Print the scores of an epoch above the bar."""
        name = _metric_of(entry)
        self.metric = f"  {name} {entry[name]:.3f}" if name else ""
        self.note(epoch_line(entry, self.epochs))

    def job_epoch(self, job: str, epochs: int, entry: dict[str, float]) -> None:
        """Print the scores of an epoch of one of several jobs above the bar."""
        self.note(f"{job}: {epoch_line(entry, epochs)}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self.bar is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self.bar.console.print(text, markup=False)

    def end(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def epoch_line(entry: dict[str, float], epochs: int) -> str:
    """Say how an epoch went."""
    facts = [f"{key.replace('_', ' ')} {value:.4f}" for key, value in entry.items() if key != "epoch"]
    return f"epoch {entry['epoch']:.0f}/{epochs}  " + "  ".join(facts)


def clock(seconds: float) -> str:
    """Show seconds as ``0:42`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _metric_of(entry: dict[str, float]) -> str | None:
    return next((name for name in ("accuracy", "perplexity") if name in entry), None)
