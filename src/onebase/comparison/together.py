"""Candidates of a comparison trained in one pass over the base, without scoring anything but validation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onebase.data import Data
from onebase.errors import OnebaseError
from onebase.methods.registry import parse_method
from onebase.tasks import Examples
from onebase.tasks.metrics import metric_of
from onebase.training.joint import Member, fit_many
from onebase.training.loop import Reporter
from onebase.training.prepare import Prepared, discard, prepare
from onebase.training.run import kernels_for

if TYPE_CHECKING:
    from onebase.base import Base

SURE = 5  # steps after which the estimate of what is left is believed


class OutOfTime(OnebaseError):
    """The budget is used up."""


class Deadline(Reporter):
    """Stops training when the time is up.

    Args:
        ends: time.monotonic() at which it is.
        hopeless: stop already when the steps that are left cannot end in time, because a pass that does not end counts
            for nothing.
    """

    def __init__(self, ends: float, hopeless: bool = False):
        self.ends, self.hopeless, self.steps = ends, hopeless, 0
        self.per_row: float | None = None  # seconds, as of the last step

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        """Raise OutOfTime when the time is up."""
        self.steps, self.per_row = self.steps + 1, 1 / max(rows_per_second, 1e-9)
        left = self.ends - time.monotonic()
        if left < 0 or (self.hopeless and self.steps >= SURE and seconds_left > left):
            raise OutOfTime("the budget is used up")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with a learning rate and a seed."""

    method: str
    lr: float
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Trained:
    """What a joint pass gave.

    Attributes:
        runs: per candidate its run, attached, with the kept epoch in place; None where its loss was not finite.
        stopped: what ended the pass before its last step, or None.
        seconds: the pass took.
    """

    runs: tuple[Prepared | None, ...]
    stopped: BaseException | None
    seconds: float


@contextmanager
def trained_together(
    base: Base, data: Data, candidates: Sequence[Candidate], epochs: int, report: Reporter, *, score_start: bool = True
) -> Iterator[Trained]:
    """Train candidates in one pass; they leave the base when the block ends.

    A pass that time or an interrupt ends counts as far as it came, if every candidate has an epoch by then.

    Args:
        base, data, candidates: what to train on what.
        epochs: passes over the training rows, at most.
        report: receives progress, and may stop the pass by raising OutOfTime.
        score_start: score validation before the first step, too.

    Raises:
        OutOfTime, KeyboardInterrupt: the pass ended before every candidate had an epoch.
    """
    shared: dict[Any, dict[str, Examples]] = {}
    prepared: list[Prepared] = []
    began, stopped = time.monotonic(), None
    try:
        for c in candidates:
            prepared.append(prepare(
                base, Reporter(), data=data, method=parse_method(c.method), lr=c.lr, seed=c.seed, epochs=epochs,
                shared=shared,
            ))  # fmt: skip
        members = [Member(p.state) for p in prepared]
        if not score_start:  # a start that is in the history is not scored again
            for member in members:
                member.state.history.epochs.append({"epoch": 0})
        try:
            fit_many(base, members, kernels_for(base, prepared), report)
        except (OutOfTime, KeyboardInterrupt) as error:
            if any(member.failed is None and member.state.epoch < 1 for member in members):
                raise
            stopped = error
            for member in members:
                member.state.end()
        for each in prepared:
            each.adapter.fold()
        runs = tuple(None if member.failed else each for member, each in zip(members, prepared))
        yield Trained(runs, stopped, time.monotonic() - began)
    finally:
        for each in prepared:
            discard(base, each)


def rank(entry: dict[str, float], metric: str) -> float:
    """Return how good an epoch is on validation: its metric, and of two equal ones the smaller loss."""
    value = entry[metric] if metric_of(metric).higher else -entry[metric]
    return value - 1e-6 * min(entry.get("validation_loss", 0.0), 100.0)
