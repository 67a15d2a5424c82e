"""The training loop: micro-batches, gradients of sums, steps, epochs, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from onebase.devices import micro_rows, packed_tokens
from onebase.examples import forward
from onebase.processes import active
from onebase.tasks import Examples
from onebase.training.cached import backward_cached, exceeds
from onebase.training.checkpoint import Checkpoint
from onebase.training.job import History, JobState
from onebase.training.kernels import Kernels
from onebase.training.lower import kept_states, parts_of, sentence
from onebase.training.sharing import add_up, idle, share, whole_batch

if TYPE_CHECKING:
    from onebase.base import Base


class Reporter:
    """Where progress goes; the default says nothing."""

    def start(self, steps: int, epochs: int) -> None:
        """Training begins."""

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        """An optimizer step was made."""

    def epoch(self, entry: dict[str, float]) -> None:
        """An epoch was scored."""

    def job_epoch(self, job: str, epochs: int, entry: dict[str, float]) -> None:
        """An epoch of one of several jobs was scored; `epochs` are that job's."""
        self.epoch(entry)

    def job_end(self, job: str, sentence: str) -> None:
        """One of several jobs is over: stored, finished or stopped, as the sentence says."""
        self.note(f"{job}: {sentence}")

    def note(self, text: str) -> None:
        """Something worth a line."""

    def end(self) -> None:
        """Training is over."""


def fit(
    base: Base,
    job: JobState,
    kernels: Kernels,
    report: Reporter,
    checkpoint: Checkpoint | None = None,
    held_out: Sequence[Examples] = (),
) -> History:
    """Train an attached adapter and leave its best epoch in place.

    Args:
        base: the base that carries the adapter.
        job: the adapter with its data and state, new or restored.
        kernels: how the base computes meanwhile.
        report: receives progress.
        held_out: rows that are scored after every epoch.
        checkpoint: where the state is written every `Settings.save_steps` steps and after every epoch; None: nowhere.

    Raises:
        TrainingError: the loss is not finite.
    """
    report.start(job.steps, job.settings.epochs)
    job.history.notes["kernels"] = kernels.facts()
    report.note(kernels.sentence())
    base.gradient_checkpointing(job.settings.checkpointing)
    job.adapter.train()
    try:
        with kernels.active(), kept_states(base, [job], held_out) as kept:
            if kept:
                job.history.notes["kept"] = kept
                report.note(sentence(kept))
            _epochs(base, job, report, checkpoint)
    except BaseException:
        job.release()
        raise
    finally:
        base.gradient_checkpointing(False)
        report.end()
    job.end()
    return job.history


def _epochs(base: Base, job: JobState, report: Reporter, checkpoint: Checkpoint | None) -> None:
    job.begin()
    if checkpoint is not None:
        checkpoint.write(job)
    while not job.finished:
        while not job.epoch_is_over:
            _step(base, job, report)
            if checkpoint is not None and job.history.steps % job.settings.save_steps == 0:
                checkpoint.write(job)
        report.epoch(job.end_epoch())
        if checkpoint is not None:
            checkpoint.write(job)


def _step(base: Base, job: JobState, report: Reporter) -> None:
    began, batch = time.perf_counter(), job.batch()
    loss, count = _accumulate(base, job, batch)
    job.step(loss, count, len(batch), began)
    history = job.history
    report.step(history.steps, loss / max(count, 1e-12), history.rows / history.seconds, job.seconds_left)


def _accumulate(base: Base, job: JobState, batch: list[int]) -> tuple[float, float]:
    """Add up the gradient of the loss summed over the effective batch; return (summed loss, weight of the targets).

    Sums and counts are added up apart: the mean is over all targets of the batch, never a mean of the micro-batches'
    means. Micro-batches hold rows of similar length, so that little of the work is padding. Where several processes
    train together each takes a share of the rows, and all end with the gradient of all rows.
    """
    size = piece = job.settings.batch_size
    tokens = None
    together, whole = active(), whole_batch(job)
    mine = batch if whole else share(job, batch)
    if whole:
        size = len(batch)
    elif base.packs(job.adapter.name):
        tokens = packed_tokens(base.device)
    else:
        size = micro_rows(base.device, size)
    total, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    parts = [mine] if whole else parts_of(base, job, mine)
    micros = [micro for part in parts for micro in job.train.batches(part, size, tokens)]
    more = together.rounds(len(micros)) - len(micros)  # asked before any call, so that all processes ask at once
    for micro in micros:
        if whole and ((together.size > 1 and not together.sharded) or exceeds(job.adapter.task, job.train, micro)):
            part = backward_cached(base, job.adapter, job.train, micro, micro_rows(base.device, piece))
        else:
            part = forward(base, job.adapter.name, job.train, micro)
            part.sums.sum().backward()
        total += part.sums.detach().double().sum().cpu()
        count += part.counts.sum().double().cpu()
    for _ in range(more):
        idle(base, job, batch[0])
    sums, counts = add_up([job], total[None], count[None], repeated=whole and together.sharded)
    return float(sums), float(counts)
