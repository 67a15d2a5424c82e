"""Many jobs in one pass over one frozen base: rows of all jobs share batches, everything else is each job's own.

Every optimizer step of a job sees exactly the rows, the mean, the clipping and the rate that it would see alone; only
the micro-batches are shared. Losses are summed over jobs and differentiated once: parameters of different jobs never
meet in a row, so the gradient of a job's parameters is the gradient of its own sum, and a NaN stays in its own rows.
Dropout is a function of job, step and row (`core.draw`), so it is the same alone and among others.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.devices import shared_tokens
from onebase.errors import TrainingError
from onebase.examples import forward_mixed
from onebase.processes import active
from onebase.tasks import Examples, get_task
from onebase.training.job import JobState
from onebase.training.kernels import Kernels
from onebase.training.loop import Reporter
from onebase.training.lower import kept_states, not_kept, sentence
from onebase.training.passes import PassCheckpoint
from onebase.training.sharing import add_up, shares

if TYPE_CHECKING:
    from onebase.base import Base


@dataclass(eq=False)
class Member:
    """A job in a joint run.

    Attributes:
        name: the job's.
        state: the job.
        failed: why it was stopped, or None.
        over: its last state, once it takes no further step; None before.
    """

    name: str
    state: JobState
    failed: TrainingError | None = None
    over: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    @property
    def live(self) -> bool:
        """Whether steps are left."""
        return self.over is None and self.failed is None and not self.state.finished

    def close(self) -> None:
        """Leave the kept epoch in the adapter, which takes no further step."""
        self.over = self.over or self.state.last()
        self.state.end()


@dataclass(frozen=True)
class Piece:
    """Some rows of one job in a micro-batch: the job's number, and row numbers of its examples."""

    job: int
    rows: list[int]


def fit_many(
    base: Base,
    members: Sequence[Member],
    kernels: Kernels,
    report: Reporter,
    checkpoint: PassCheckpoint | None = None,
    finished: Callable[[Member], None] | None = None,
    held_out: Sequence[Examples] = (),
) -> None:
    """Train attached adapters together and leave each one's kept epoch in place.

    A job whose loss is not finite is stopped, its adapter goes back to its kept epoch, and `failed` says why.

    Args:
        base: the base that carries them.
        members: the jobs, new or restored.
        kernels: how the base computes meanwhile.
        report: receives progress, over all jobs together.
        checkpoint: where the state of all of them is written: before the first step, every `Settings.save_steps`
            steps of a job, and when a job is over. None: nowhere.
        finished: called for each job once, as soon as it is over or was stopped; the others wait meanwhile.
        held_out: rows that each job is scored on after every epoch.
    """
    report.start(sum(m.state.steps for m in members), max(m.state.settings.epochs for m in members))
    report.note(kernels.sentence())
    base.gradient_checkpointing(any(m.state.settings.checkpointing for m in members))
    waiting = list(members)  # those that `finished` has not seen
    try:
        with contextlib.ExitStack() as run:
            with kernels.active():
                kept = run.enter_context(kept_states(base, [m.state for m in members], held_out))
                if kept:
                    report.note(sentence(kept))
                for member in (m for m in members if m.live):
                    member.state.adapter.train()
                    member.state.history.notes |= {"kernels": kernels.facts()} | ({"kept": kept} if kept else {})
                    member.state.begin()
            _save(checkpoint, members)
            while waiting:
                for member in [m for m in waiting if not m.live]:
                    waiting.remove(member)
                    member.close()
                    _save(checkpoint, members)  # first: a kill after it is stored must find that it is over
                    if finished is not None:
                        with not_kept(base):  # scored in the base's own dtype, so nothing of the training's is used
                            finished(member)
                with kernels.active():
                    while waiting and all(m.live for m in waiting):
                        _round(base, waiting, members, report)
                        if any(m.live and m.state.history.steps % m.state.settings.save_steps == 0 for m in waiting):
                            _save(checkpoint, members)
    except BaseException:
        for member in members:
            member.state.release()
        raise
    finally:
        base.gradient_checkpointing(False)
        report.end()


def _round(base: Base, live: list[Member], members: Sequence[Member], report: Reporter) -> None:
    """Take one optimizer step of every live job."""
    began = time.perf_counter()
    batches = [member.state.batch() for member in live]
    sums = torch.zeros(len(live), dtype=torch.float64)
    counts = torch.zeros(len(live), dtype=torch.float64)
    states = [member.state for member in live]
    packs = all(base.packs(state.adapter.name) for state in states)
    for pieces in micro_batches(states, shares(states, batches), shared_tokens(base.device), packs):
        parts = [(live[p.job].state.adapter.name, live[p.job].state.train, p.rows) for p in pieces]
        total = torch.zeros((), device=base.device)
        for piece, part in zip(pieces, forward_mixed(base, parts)):
            loss = part.sums.sum()
            total = total + loss
            sums[piece.job] += loss.detach().double().cpu()
            counts[piece.job] += part.counts.sum().double().cpu()
        total.backward()
    sums, counts = add_up(states, sums, counts, repeated=active().sharded)
    rows = sum(len(batch) for batch in batches)
    for i, member in enumerate(live):
        # a job's share of the time, by its rows: what its own speed is measured by
        share = (time.perf_counter() - began) * len(batches[i]) / rows
        _step(member, float(sums[i]), float(counts[i]), len(batches[i]), time.perf_counter() - share, report)
    done = sum(m.state.history.steps for m in members)
    loss = float(sums.sum() / counts.sum().clamp(min=1e-12))
    left = max(m.state.seconds_left for m in live) * len(live)
    report.step(done, loss, rows / (time.perf_counter() - began), left)


def _step(member: Member, loss: float, count: float, rows: int, began: float, report: Reporter) -> None:
    state = member.state
    try:
        state.step(loss, count, rows, began)
        if state.epoch_is_over:
            report.job_epoch(member.name, state.settings.epochs, state.end_epoch())
    except TrainingError as error:
        member.failed = error
        state.optimizer.zero_grad(set_to_none=True)


def _save(checkpoint: PassCheckpoint | None, members: Sequence[Member]) -> None:
    if checkpoint is not None:
        checkpoint.write(members)


def micro_batches(
    jobs: Sequence[JobState], batches: Sequence[Sequence[int]], tokens: int, packed: bool = False
) -> list[list[Piece]]:
    """Cut the effective batches of several jobs into shared micro-batches.

    Padded rows are sorted by length, whatever their jobs. Where rows are computed without their padding, a job's rows
    stay together, because every job more in a call is another small product at every site.

    Args:
        jobs: the jobs.
        batches: row numbers of each job's effective batch.
        tokens: most tokens of a micro-batch; a single row may have more.
        packed: rows are computed without their padding, so that only their own tokens count.

    Returns:
        Micro-batches; in each, every job's rows are one piece. Jobs whose loss couples rows have one of their own.
    """
    found: list[list[Piece]] = []
    parts: list[list[Length]] = []  # of one job each
    for number, (job, batch) in enumerate(zip(jobs, batches)):
        if get_task(job.adapter.task["kind"]).whole_batch:
            found += [[Piece(number, list(batch))]] if batch else []
            continue
        for rows in job.train.batches(sorted(batch), len(batch), tokens) if packed else [batch]:
            parts.append([(len(job.train.rows[row].ids), number, row) for row in rows])
    for part in _by_job(parts, tokens) if packed else _by_length(parts, tokens):
        of: dict[int, list[int]] = {}
        for _, number, row in part:
            of.setdefault(number, []).append(row)
        found.append([Piece(number, of[number]) for number in sorted(of)])
    return found


Length = tuple[int, int, int]  # of a row: (tokens, job, row)


def _by_length(parts: Sequence[list[Length]], tokens: int) -> list[list[Length]]:
    """Return the rows of all parts by similar lengths, `tokens` in all with their padding."""
    found: list[list[Length]] = []
    for row in sorted(row for part in parts for row in part):
        if not found or row[0] * (len(found[-1]) + 1) > tokens:
            found.append([])
        found[-1].append(row)
    return found


def _by_job(parts: Sequence[list[Length]], tokens: int) -> list[list[Length]]:
    """Return parts of jobs, several in one where they fit into `tokens`: first fit, the largest first."""
    shared: list[tuple[int, list[Length]]] = []
    for size, part in sorted(((sum(row[0] for row in part), part) for part in parts), key=lambda known: -known[0]):
        place = next((i for i, (taken, _) in enumerate(shared) if taken + size <= tokens), None)
        if place is None:
            shared.append((size, part))
        else:
            shared[place] = shared[place][0] + size, shared[place][1] + part
    return [part for _, part in shared]
