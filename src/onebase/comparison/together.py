"""Candidates of a comparison trained in one pass over the base, which time or Ctrl-C may end at any step."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.comparison.advice import FULL
from onebase.data import Data
from onebase.errors import OnebaseError, TrainingError
from onebase.methods.registry import parse_method
from onebase.tasks import Examples
from onebase.tasks.metrics import metric_of
from onebase.training.full import Full, opened
from onebase.training.joint import Member, fit_many
from onebase.training.kernels import Kernels, kernels_of
from onebase.training.loop import Reporter
from onebase.training.passes import PassCheckpoint
from onebase.training.prepare import Prepared, discard, prepare
from onebase.training.run import kernels_for

if TYPE_CHECKING:
    from onebase.base import Base


class Stopped(OnebaseError):
    """A pass was ended between two steps."""


class OutOfTime(Stopped):
    """The time of a pass is used up."""


class Interrupted(Stopped):
    """Somebody pressed Ctrl-C."""


class Interrupts:
    """Ctrl-C as a wish that passes ask for between their steps; a second one ends everything at once.

    Args:
        say: told what happens now.
    """

    def __init__(self, say: Callable[[str], Any]):
        self.say, self.asked = say, False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # elsewhere no handler can be set
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.say("stopping after this step, then scoring what is there; press Ctrl-C again to leave at once")

    def check(self) -> None:
        """Raise Interrupted where somebody asked for it."""
        if self.asked:
            raise Interrupted("interrupted")


class Deadline(Reporter):
    """Ends a pass before the step that would be over too late.

    Args:
        ends: time.monotonic() at which the last step must be over.
        stop: asked between steps, too.
    """

    def __init__(self, ends: float, stop: Interrupts | None = None):
        self.ends, self.stop = ends, stop
        self.last: float | None = None

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        """Raise OutOfTime or Interrupted."""
        if self.stop is not None:
            self.stop.check()
        now = time.monotonic()
        taken = 0.0 if self.last is None else now - self.last
        if now + taken > self.ends:
            raise OutOfTime("the time is used up")
        self.last = now


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with a learning rate and a seed; 'full' is full fine-tuning, which has a pass of its own."""

    method: str
    lr: float
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Trained:
    """What a pass gave.

    Attributes:
        runs: per candidate its run, attached, with the kept epoch in place; None where its loss was not finite.
        stopped: what ended the pass before its last step, or None.
        rows: training rows that every candidate has seen, unless it was over before.
        before: how many of them were seen by the pass that this one goes on with.
        seconds: the pass took.
    """

    runs: tuple[Prepared | None, ...]
    stopped: Stopped | None
    rows: int
    before: int
    seconds: float


@contextmanager
def trained_together(
    base: Base, data: Data, candidates: Sequence[Candidate], epochs: int, report: Reporter, *, score_start: bool = True,
    place: Path | None = None, kernels: Kernels | None = None, shared: dict[Any, dict[str, Examples]] | None = None,
    **settings: Any,
) -> Iterator[Trained]:  # fmt: skip
    """Train candidates in one pass; they leave the base when the block ends, and full fine-tuning is undone.

    Candidates take their steps side by side, so a pass that ends early leaves all of them at the same step: each is
    scored there, and has the best of its epochs and of that point.

    Args:
        base, data, candidates: what to train on what.
        epochs: passes over the training rows, at most.
        report: receives progress, and may end the pass by raising `Stopped`.
        score_start: score validation before the first step, too.
        place: file to which a pass that ends early writes its state, and from which it goes on with the same bits.
        kernels: how the base computes; measured by default.
        shared: encoded data, which is added to.
        settings: further ones of training, the same for all.
    """
    whole = any(c.method == FULL for c in candidates)
    assert not whole or len(candidates) == 1, "full fine-tuning changes the base of the others"
    shared = {} if shared is None else shared
    prepared: list[Prepared] = []
    with contextlib.ExitStack() as stack:
        more: dict[str, Any] = {"build": stack.enter_context(opened(base))} if whole else {}
        stack.callback(_discard, base, prepared)
        for c in candidates:
            method = Full() if c.method == FULL else parse_method(c.method)
            prepared.append(prepare(base, Reporter(), data=data, method=method, lr=c.lr, seed=c.seed, epochs=epochs,
                                    shared=shared, **more, **settings))  # fmt: skip
        members = [Member(p.attached, p.state) for p in prepared]
        if not score_start:  # a start that is in the history is not scored again
            for member in members:
                member.state.history.epochs.append({"epoch": 0})
        checkpoint = None if place is None else PassCheckpoint(place, [_identity(base, p) for p in prepared])
        if checkpoint is not None and checkpoint.restore(members):
            kernels = kernels_of(base, checkpoint.facts["kernels"])
        before = _seen(members)
        base.model.requires_grad_(whole)
        kernels = kernels or kernels_for(base, prepared)
        began = time.monotonic()
        stopped = _fit(base, members, kernels, report, checkpoint)
        base.model.requires_grad_(False)
        for each in prepared:
            each.adapter.fold()
        runs = tuple(None if member.failed else each for member, each in zip(members, prepared))
        yield Trained(runs, stopped, _seen(members), before, time.monotonic() - began)


def _seen(members: Sequence[Member]) -> int:
    return max((m.state.history.rows for m in members if m.failed is None), default=0)


def _discard(base: Base, prepared: Sequence[Prepared]) -> None:
    for each in prepared:
        discard(base, each)


def _identity(base: Base, prepared: Prepared) -> dict[str, Any]:
    """Return what must be the same for a pass to go on."""
    return {
        "base": base.fingerprint(), "data": prepared.data.digest, "method": prepared.adapter.method.shorthand(),
        "settings": prepared.state.settings.plain(), "task": dict(prepared.adapter.task), "init_from": None,
    }  # fmt: skip


def _fit(
    base: Base, members: Sequence[Member], kernels: Kernels, report: Reporter, checkpoint: PassCheckpoint | None
) -> Stopped | None:
    """Train, and return what ended training early, with every member at its kept epoch."""
    try:
        fit_many(base, members, kernels, report)
    except Stopped as error:
        if not any(member.live for member in members):  # it was the last step of all
            for member in members:
                member.state.end()
            _forget(checkpoint)
            return None
        if checkpoint is not None:
            checkpoint.facts["kernels"] = kernels.facts()
            checkpoint.write(members)
        with kernels.active():  # as every epoch of this pass was scored
            for member in members:
                if member.failed is None and member.over is None:
                    _end_early(member)
        return error
    _forget(checkpoint)
    return None


def _forget(checkpoint: PassCheckpoint | None) -> None:
    if checkpoint is not None:
        checkpoint.remove()


def _end_early(member: Member) -> None:
    try:
        member.state.end_early()
    except TrainingError as error:
        member.failed = error


def rank(entry: dict[str, float], metric: str) -> float:
    """Return how good an epoch is on validation: its metric, and of two equal ones the smaller loss."""
    value = entry[metric] if metric_of(metric).higher else -entry[metric]
    return value - 1e-6 * min(entry.get("validation_loss", 0.0), 100.0)
