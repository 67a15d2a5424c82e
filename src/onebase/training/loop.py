"""The training loop of one job: batches, loss over the effective batch, schedule, early stopping, best epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.adapter import Adapter
from onebase.errors import TrainingError
from onebase.examples import Examples, forward
from onebase.training.kernels import MICRO, choose_kernels
from onebase.training.settings import Settings, shares

if TYPE_CHECKING:
    from onebase.base import Base

Score = Callable[[], tuple[float, dict[str, float]]]


@dataclass
class History:
    """What happened.

    Attributes:
        epochs: one entry per epoch: epoch, loss, and the validation metrics.
        best: number of the epoch that was kept (1 is the first; 0 the start).
        steps, rows, seconds: optimizer steps, rows seen, wall time of training without evaluation.
        notes: choices that were measured.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


class Reporter:
    """Where progress goes; the default says nothing."""

    def start(self, steps: int, epochs: int) -> None:
        """Training begins."""

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        """An optimizer step was made."""

    def epoch(self, entry: dict[str, float]) -> None:
        """An epoch was scored."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def end(self) -> None:
        """Training is over."""


def fit(
    base: Base,
    adapter: Adapter,
    train: Examples,
    score: Score,
    settings: Settings,
    report: Reporter,
) -> History:
    """Train an attached adapter and leave its best epoch in place.

    Args:
        base: the base that carries the adapter.
        adapter: what is trained.
        train: training rows.
        score: computes (score to maximise, metrics) on validation.
        settings: how.
        report: receives progress.

    Raises:
        TrainingError: the loss is not finite.
    """
    history, order = History(), torch.Generator().manual_seed(settings.seed)
    per_step = settings.batch_size * settings.accumulate
    steps = math.ceil(len(train) / per_step) * settings.epochs
    optimizer, schedule = _optimizer(adapter, settings, steps, base.anatomy.hidden_size)
    report.start(steps, settings.epochs)
    kernels = choose_kernels(base, adapter, train, settings)
    history.notes["kernels"] = kernels.facts()
    report.note(kernels.sentence())
    with kernels.active():
        best, kept, waited = score(), adapter.snapshot(), 0
    base.gradient_checkpointing(settings.checkpointing)
    adapter.routed.generator = torch.Generator(base.device).manual_seed(settings.seed + 1)
    adapter.train()
    try:
        history.epochs.append({"epoch": 0, **best[1]})
        for epoch in range(1, settings.epochs + 1):
            with kernels.active():
                loss = _epoch(base, adapter, train, settings, optimizer, schedule, order, history, steps, report)
                adapter.train(False)
                value, metrics = score()
                adapter.train()
            _check_finite(metrics, history, settings, steps)
            history.epochs.append({"epoch": epoch, "loss": loss, **metrics})
            report.epoch(history.epochs[-1])
            waited = 0 if value > best[0] else waited + 1
            if value > best[0]:
                best, kept, history.best = (value, metrics), adapter.snapshot(), epoch
            if settings.patience and waited >= settings.patience:
                break
    finally:
        base.gradient_checkpointing(False)
        adapter.train(False)
        adapter.routed.generator = None
        report.end()
    adapter.put(kept)
    return history


def _epoch(
    base: Base,
    adapter: Adapter,
    train: Examples,
    settings: Settings,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    order: torch.Generator,
    history: History,
    steps: int,
    report: Reporter,
) -> float:
    """Run one epoch; return the mean loss per target."""
    total, targets = 0.0, 0.0
    parameters = list(adapter.parameters())
    for batch in _effective_batches(len(train), settings, order):
        began = time.perf_counter()
        loss, count = _accumulate(base, adapter, train, batch, settings.batch_size)
        _check_finite({"loss": loss}, history, settings, steps)
        penalty = adapter.module.penalty()
        if penalty is not None:
            penalty.backward()
        if settings.clip:
            nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        adapter.module.stepped(history.steps + 1, steps)
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        total, targets = total + loss, targets + count
        history.steps += 1
        history.rows += len(batch)
        history.seconds += time.perf_counter() - began
        left = history.seconds / history.steps * (steps - history.steps)
        report.step(history.steps, loss / max(count, 1.0), history.rows / history.seconds, left)
    return total / max(targets, 1.0)


def _check_finite(metrics: dict[str, float], history: History, settings: Settings, steps: int) -> None:
    """Raise TrainingError when a value is infinite or NaN."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name.replace('_', ' ')} became {value} at step {history.steps + 1} of {steps} with "
                f"lr = {settings.lr:g}: nothing was stored. Try a lower rate, e.g. lr = {settings.lr / 3:.1g}."
            )


def _effective_batches(rows: int, settings: Settings, order: torch.Generator) -> Iterator[list[int]]:
    """Yield the row numbers of each optimizer step, in the seeded order of this epoch."""
    shuffled = torch.randperm(rows, generator=order).tolist()
    size = settings.batch_size * settings.accumulate
    for start in range(0, rows, size):
        yield shuffled[start : start + size]


def _accumulate(base: Base, adapter: Adapter, train: Examples, batch: list[int], size: int) -> tuple[float, float]:
    """Add up gradients of the mean over the effective batch; return (summed loss, targets).

    The mean is over all targets of the batch, never a mean of the micro-batches' means. Micro-batches hold rows of
    similar length, so that little of the work is padding.
    """
    if train.targets is not None:
        count = float(len(batch))
    else:
        count = float(sum(_target_count(train, i) for i in batch))
    total = torch.zeros((), dtype=torch.float64)
    for micro in train.batches(batch, max(1, min(size, MICRO if base.device.type == "cpu" else size))):
        losses, _, _ = forward(base, adapter.name, train, micro)
        loss = losses.sum() / max(count, 1.0)
        loss.backward()
        total += loss.detach().double().cpu() * max(count, 1.0)
    return float(total), count


def _target_count(train: Examples, row: int) -> int:
    labels = train.rows[row].labels or ()
    first = 0 if len(labels) != len(train.rows[row].ids) else 1  # decoder-only: the first token has no prediction
    return sum(label >= 0 for label in labels[first:])


def _optimizer(adapter: Adapter, settings: Settings, steps: int, width: int) -> tuple[Any, Any]:
    """AdamW with weight decay on matrices only, and a linear rise and fall of the rate."""
    head = {id(p) for p in adapter.head.parameters()} if adapter.head is not None else set()
    groups: dict[tuple[float, float], list[Tensor]] = {}
    parts = shares(adapter, width)
    for parameter in adapter.parameters():
        times, decays = parts.get(id(parameter), (1.0, True))
        rate = settings.head_lr if id(parameter) in head else settings.lr * times
        decay = settings.weight_decay if decays and parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate, "weight_decay": d} for (rate, d), p in groups.items()])
    warm = max(1, round(settings.warmup * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
