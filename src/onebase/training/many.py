"""`train_many`: many adapters of different methods, tasks and settings in one pass over one frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onebase.data import Data
from onebase.errors import ConfigError, TrainingError
from onebase.methods.method import Method
from onebase.methods.registry import parse_method
from onebase.processes import is_sharded, together
from onebase.training.joint import Member, fit_many
from onebase.training.loop import Reporter
from onebase.training.prepare import Prepared, discard, prepare, reading_options
from onebase.training.run import Run, conclude, kernels_for
from onebase.training.sharing import settle

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store import Store
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


class Job:
    """One adapter to train: data, method, name, and everything else that `train` takes.

    Args:
        data: what `load_data` takes.
        method: a method or its shorthand.
        name: the adapter's, and where it is stored; None attaches it under the method's name and stores nothing.
        more: columns, task options and training settings, as for `train`.

    Example:
        >>> Job(data="reviews.csv", method="bottleneck", name="reviews", lr=1e-3)
        Job('reviews': bottleneck)
    """

    def __init__(self, data: Any, method: str | Method | None = None, name: str | None = None, **more: Any):
        self.data, self.name, self.more = data, name, more
        self.method = None if method is None else parse_method(method)

    def __repr__(self) -> str:
        method = "default method" if self.method is None else self.method.shorthand()
        return f"Job({self.name!r}: {method})"


def train_many(
    base: Base,
    jobs: Sequence[Job],
    *,
    store: Store | None = None,
    report: Reporter | None = None,
    resume: bool = False,
) -> list[Run | Failed]:
    """Train many adapters in one pass; each ends as if alone (with dropout: with another seed of it).

    Rows of all jobs share forward and backward passes. Effective batches, means, optimizer, clipping, schedule, order
    of rows, dropout, early stopping, metrics and checkpoints are each job's own. A job that diverges is stopped and
    reported, and never touches the others.

    Args:
        base: the base; nothing of it changes.
        jobs: what to train; names must differ.
        store: where named jobs are stored; the user's store by default.
        report: receives progress over all jobs.
        resume: go on with the jobs of an interrupted run that are not stored yet.

    Returns:
        One result per job, in their order: a run, or `Failed`.

    Raises:
        ConfigError, DataError, UnsupportedError: before any training, for the first job that cannot start.
    """
    with together(is_sharded(base.model)) as processes:
        return _train_many(base, jobs, store, (report if processes.first else None) or Reporter(), resume)


def _train_many(
    base: Base, jobs: Sequence[Job], store: Store | None, report: Reporter, resume: bool
) -> list[Run | Failed]:
    _check(jobs)
    loaded = _load_once(jobs)
    shared: dict[Any, dict[str, Examples]] = {}
    prepared: list[Prepared] = []
    results: dict[int, Run | Failed] = {}
    try:
        for job, data in zip(jobs, loaded):
            more = _columns_dropped(job.more) if isinstance(data, Data) else job.more
            prepared.append(
                prepare(
                    base,
                    report,
                    data=data,
                    method=job.method,
                    name=job.name,
                    store=store,
                    resume=resume and job.name is not None,
                    shared=shared,
                    **more,
                )
            )
        kernels = kernels_for(base, prepared)
        settle(base, prepared)
        members = [Member(p.state, p.checkpoint) for p in prepared]
        fit_many(base, members, kernels, report)
        for number, (member, mine) in enumerate(zip(members, prepared)):
            if member.failed is None:
                results[number] = conclude(base, mine)
                continue
            results[number] = Failed(mine.attached, mine.adapter.method.shorthand(), member.failed)
            discard(base, mine)
    except BaseException:
        for number, mine in enumerate(prepared):
            if number not in results:
                discard(base, mine)
        raise
    return [results[number] for number in range(len(jobs))]


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
    from onebase.data import load

    seen: dict[Any, Data] = {}
    found = []
    for job in jobs:
        if isinstance(job.data, Data):
            found.append(job.data)
            continue
        options = reading_options(dict(job.more))
        source = job.data if isinstance(job.data, str) else id(job.data)
        key = (source, job.more.get("seed") or 0, repr(sorted(options.items())))
        if key not in seen:
            seen[key] = load(job.data, seed=job.more.get("seed") or 0, **options)
        found.append(seen[key])
    return found


def _columns_dropped(more: dict[str, Any]) -> dict[str, Any]:
    """Return the options without those that were used to read the data."""
    rest = dict(more)
    reading_options(rest)
    return rest
