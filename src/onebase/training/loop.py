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
from onebase.examples import forward
from onebase.tasks import Examples, get_task
from onebase.training.cached import backward_cached, exceeds
from onebase.training.kernels import MICRO, choose_kernels
from onebase.training.settings import Settings

if TYPE_CHECKING:
    from onebase.base import Base


@dataclass(frozen=True)
class Checked:
    """A score on validation.

    Attributes:
        rank: what training maximises.
        noise: standard error of it, as far as epochs within it are as good as each other; 0 where it is exact.
        metrics: for people, by name.
    """

    rank: float
    noise: float
    metrics: dict[str, float]


Score = Callable[[], Checked]


@dataclass
class History:
    """What happened.

    Attributes:
        epochs: one entry per epoch: epoch, loss, and the validation metrics.
        best: number of the epoch that was kept (1 is the first; 0 the start), see `Settings.restore`.
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
        score: computes a score on validation.
        settings: how.
        report: receives progress.

    Raises:
        TrainingError: the loss is not finite.
    """
    history, order = History(), torch.Generator().manual_seed(settings.seed)
    per_step = settings.batch_size * settings.accumulate
    steps = math.ceil(len(train) / per_step) * settings.epochs
    optimizer, schedule = _optimizer(adapter, settings, steps)
    report.start(steps, settings.epochs)
    kernels = choose_kernels(base, adapter, train, settings)
    history.notes["kernels"] = kernels.facts()
    report.note(kernels.sentence())
    with kernels.active():
        best, kept, waited = score(), adapter.snapshot(), 0
    top = best.rank
    base.gradient_checkpointing(settings.checkpointing)
    adapter.routed.generator = torch.Generator(base.device).manual_seed(settings.seed + 1)
    adapter.train()
    try:
        history.epochs.append({"epoch": 0, **best.metrics})
        for epoch in range(1, settings.epochs + 1):
            with kernels.active():
                loss = _epoch(base, adapter, train, settings, optimizer, schedule, order, history, steps, report)
                adapter.train(False)
                checked = score()
                adapter.train()
            _check_finite(checked.metrics, history, settings, steps)
            history.epochs.append({"epoch": epoch, "loss": loss, **checked.metrics})
            report.epoch(history.epochs[-1])
            slack = checked.noise if settings.restore == "latest" and history.best else 0.0
            good = checked.rank > top or (slack > 0 and checked.rank >= top - slack)
            top, waited = max(top, checked.rank), 0 if good else waited + 1
            if good:
                kept, history.best = adapter.snapshot(), epoch
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
        if settings.clip:
            nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        total, targets = total + loss, targets + count
        history.steps += 1
        history.rows += len(batch)
        history.seconds += time.perf_counter() - began
        left = history.seconds / history.steps * (steps - history.steps)
        report.step(history.steps, loss / max(count, 1.0), history.rows / history.seconds, left)
    return total / max(targets, 1e-12)


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
    """Leave the gradient of the mean over the effective batch; return (summed loss, weight of the targets).

    Sums and counts are added up apart: the mean is over all targets of the batch, never a mean of the micro-batches'
    means. Micro-batches hold rows of similar length, so that little of the work is padding.
    """
    piece = size
    if get_task(adapter.task["kind"]).whole_batch:
        size = len(batch)
    elif base.device.type == "cpu":
        size = min(size, MICRO)
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for micro in train.batches(batch, size):
        if exceeds(adapter.task, train, micro):
            part = backward_cached(base, adapter, train, micro, MICRO if base.device.type == "cpu" else piece)
        else:
            part = forward(base, adapter.name, train, micro)
            part.sums.sum().backward()
        total += part.sums.detach().double().sum().cpu()
        count += part.counts.sum().double().cpu()
    for parameter in adapter.parameters():
        if parameter.grad is not None:
            parameter.grad /= max(float(count), 1e-12)
    return float(total), float(count)


def _optimizer(adapter: Adapter, settings: Settings, steps: int) -> tuple[Any, Any]:
    """AdamW with weight decay on matrices only, and a linear rise and fall of the rate."""
    head = {id(p) for p in adapter.head.parameters()} if adapter.head is not None else set()
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in adapter.parameters():
        rate = settings.head_lr if id(parameter) in head else settings.lr
        decay = settings.weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate, "weight_decay": d} for (rate, d), p in groups.items()])
    warm = max(1, round(settings.warmup * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
