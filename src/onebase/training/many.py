"""`train_many`: many adapters of different methods, tasks and settings in one pass over one frozen base."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.data import Data
from onebase.errors import ConfigError, TrainingError
from onebase.processes import is_sharded, together
from onebase.training.jobs import Job, data_of, jobs_of
from onebase.training.joint import Member, fit_many
from onebase.training.kernels import kernels_of
from onebase.training.loop import Reporter
from onebase.training.passes import PassCheckpoint, place_of_pass
from onebase.training.prepare import Prepared, discard, prepare, reading_options
from onebase.training.run import Run, conclude, kernels_for
from onebase.training.sharing import settle
from onebase.training.tracking import Tracked, root_of, tracked

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store import Store, Stored
    from onebase.tasks import Examples

SHARED = ("attention", "dtype", "checkpointing")  # settings of the base's computing, which all jobs share


@dataclass(frozen=True, eq=False)
class Failed:
    """A job that was stopped.

    Attributes:
        name: the job's.
        method: shorthand of its method.
        error: why.
    """

    name: str
    method: str
    error: TrainingError


def train_many(
    base: Base,
    jobs: Sequence[Job] | str | Path,
    *,
    store: Store | None = None,
    report: Reporter | None = None,
    resume: bool = False,
    save: bool = True,
    remember: dict[str, Any] | None = None,
    track: str | Sequence[str] | None = None,
) -> list[Run | Failed]:
    """Train many adapters in one pass; each ends as if alone.

    Rows of all jobs share forward and backward passes. Effective batches, means, optimizer, clipping, schedule, order
    of rows, dropout, early stopping, metrics and checkpoints are each job's own. A job that diverges is stopped and
    reported, and never touches the others. A job that is over is stored at once.

    Args:
        base: the base; nothing of it changes.
        jobs: what to train; names must differ. Or a file of jobs (`training.jobs.read_jobs`), or a folder of data
            sets, one job each. `training.jobs.grid_jobs` makes the jobs of a grid of settings.
        store: where named jobs are stored; the user's store by default.
        report: receives progress over all jobs.
        resume: go on with the interrupted pass over jobs of these names, from its last checkpoint: all weights are
            then those of an uninterrupted pass, bit by bit. Without a checkpoint it starts over.
        save: False stores nothing and writes no checkpoint; the adapters stay attached under their names.
        remember: further facts that checkpoints keep, JSON values.
        track: also report to 'tensorboard', 'wandb' or 'mlflow', or several, as in `train`: one run for the pass, with
            each job's values under its name.

    Returns:
        One result per job, in their order: a run, or `Failed`.

    Raises:
        ConfigError, DataError, UnsupportedError: before any training, for the first job that cannot start.
    """
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(together(is_sharded(base.model)))
        report = (report if processes.first else None) or Reporter()
        report = stack.enter_context(tracked(track, report, "jobs", root_of(store), processes.first))
        return _train_many(base, jobs_of(jobs), store, report, resume, save, remember)


def _train_many(
    base: Base, jobs: Sequence[Job], store: Store | None, report: Reporter, resume: bool, save: bool,
    remember: dict[str, Any] | None,
) -> list[Run | Failed]:  # fmt: skip
    _check(jobs)
    loaded = _load_once(jobs)
    shared: dict[Any, dict[str, Examples]] = {}
    prepared: list[Prepared] = []
    results: dict[str, Run | Failed] = {}
    try:
        for job, data in zip(jobs, loaded):
            more = _columns_dropped(job.more) if isinstance(data, Data) else job.more
            one = prepare(
                base, report, data=data, method=job.method, name=job.name if save else None,
                attach=job.name, store=store, shared=shared, **more,
            )  # fmt: skip
            prepared.append(one)
        members = [Member(p.attached, p.state) for p in prepared]
        checkpoint = _checkpoint(jobs, prepared, remember)
        going_on = _go_on(checkpoint, members, report) if resume else False
        kernels = kernels_of(base, checkpoint.facts["kernels"]) if checkpoint and going_on else None
        kernels = kernels or kernels_for(base, prepared)
        if checkpoint is not None:
            checkpoint.facts["kernels"] = kernels.facts()
        settle(base, prepared)
        if isinstance(report, Tracked):
            report.configure(prepared)
        of = {one.attached: one for one in prepared}

        def finished(member: Member) -> None:
            mine = of[member.name]
            if member.failed is not None:
                results[member.name] = Failed(member.name, mine.adapter.method.shorthand(), member.failed)
                discard(base, mine)
                report.job_end(member.name, f"stopped: {member.failed}")
                return
            if checkpoint is not None:
                mine.provenance["pass"] = checkpoint.mark
            before = _stored_before(mine, checkpoint) if going_on else None
            results[member.name] = run = conclude(base, mine, before)
            if isinstance(report, Tracked):
                report.result(run, several=True)
            scores = f"{run.metric} {run.value:.4f}, base {run.base_value:.4f}"
            report.job_end(member.name, f"{f'stored as {run.ref}' if run.ref else 'done'}: {scores}")

        fit_many(base, members, kernels, report, checkpoint, finished, [p.examples["validation"] for p in prepared])
    except BaseException:
        for mine in prepared:  # also those that are over: what was to be stored of them is stored
            if mine.adapter in base.adapters.values():
                discard(base, mine)
        raise
    if checkpoint is not None:
        checkpoint.remove()
    return [results[mine.attached] for mine in prepared]


def _checkpoint(
    jobs: Sequence[Job], prepared: Sequence[Prepared], remember: dict[str, Any] | None
) -> PassCheckpoint | None:
    """Return where the pass writes its state; None where nothing of it will be stored."""
    own = [one.checkpoint for one in prepared if one.checkpoint is not None]
    if not own:
        return None
    path = place_of_pass(prepared[0].store.root, [job.name for job in jobs])
    identities = [{} if one.checkpoint is None else one.checkpoint.identity for one in prepared]
    return PassCheckpoint(path, identities, dict(remember or {}))


def _go_on(checkpoint: PassCheckpoint | None, members: Sequence[Member], report: Reporter) -> bool:
    """Put an interrupted pass back, if there is one."""
    if checkpoint is None:
        raise ConfigError("resume=True needs jobs with names: an interrupted pass is found by them")
    if not checkpoint.restore(members):
        report.note("no checkpoint of these jobs: starting from the beginning")
        return False
    done, steps = sum(m.state.history.steps for m in members), sum(m.state.steps for m in members)
    report.note(f"going on with {len(members)} jobs at step {done} of {steps}")
    return True


def _stored_before(mine: Prepared, checkpoint: PassCheckpoint | None) -> Stored | None:
    """Return the version that the interrupted pass had stored of a job, if it had come so far."""
    if mine.stored is None or checkpoint is None:
        return None
    versions = [s for s in mine.store.list() if s.name == mine.stored]
    return next((s for s in versions if s.config.provenance.get("pass") == checkpoint.mark), None)


def _check(jobs: Sequence[Job]) -> None:
    names = [job.name for job in jobs if job.name is not None]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"several jobs are called {', '.join(map(repr, twice))}: give each its own name")
    if not jobs:
        raise ConfigError("train_many needs at least one job")
    for key in SHARED:
        values = {job.more.get(key) for job in jobs}
        if len(values) > 1:
            shown = ", ".join(map(repr, sorted(values, key=str)))
            raise ConfigError(f"{key} must be the same for all jobs, which share one pass: found {shown}")


def _load_once(jobs: Sequence[Job]) -> list[Any]:
    """Read every source that several jobs name alike once."""
    seen: dict[Any, Data] = {}
    found = []
    for job in jobs:
        if isinstance(job.data, Data):
            found.append(data_of(job))
            continue
        options = reading_options(dict(job.more))
        source = job.data if isinstance(job.data, str) else id(job.data)
        key = (source, job.more.get("seed") or 0, repr(sorted(options.items())))
        if key not in seen:
            seen[key] = data_of(job)
        found.append(seen[key])
    return found


def _columns_dropped(more: dict[str, Any]) -> dict[str, Any]:
    """Return the options without those that were used to read the data."""
    rest = dict(more)
    reading_options(rest)
    return rest
