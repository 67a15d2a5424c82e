"""Steps that processes take together: shares of rows, the sum of their gradients, one start; see `processes`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onebase.examples import forward
from onebase.processes import active
from onebase.tasks import get_task
from onebase.training.job import JobState
from onebase.training.kernels import Kernels, kernels_of

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.training.prepare import Prepared


def whole_batch(job: JobState) -> bool:
    """Whether the loss of a job couples all rows of a step."""
    return get_task(job.adapter.task["kind"]).whole_batch


def shares(jobs: Sequence[JobState], batches: Sequence[list[int]]) -> list[list[int]]:
    """Return this process's rows of each job's step.

    Rows that a loss couples stay together: the jobs that have such a loss are dealt out. Over a sharded base, whose
    calls must be equally many in all processes, each computes all rows, and `add_up` takes the first one's.
    """
    together = active()
    if together.sharded:
        return [list(batch) for batch in batches]
    found = []
    for number, (job, batch) in enumerate(zip(jobs, batches)):
        if whole_batch(job):
            found.append(list(batch) if number % together.size == together.rank else [])
        else:
            found.append(share(job, batch))
    return found


def share(job: JobState, batch: Sequence[int]) -> list[int]:
    """Return this process's rows of a step."""
    return active().share(batch, lambda row: len(job.train.rows[row].ids))


def add_up(jobs: Sequence[JobState], sums: Tensor, counts: Tensor, repeated: bool = False) -> tuple[Tensor, Tensor]:
    """Add up gradients, sums of losses (jobs,) and their counts (jobs,) over all processes; see `Processes.add_up`.

    Args:
        jobs: whose gradients.
        sums, counts: float64 on the CPU.
        repeated: every process computed all rows: the first one's are taken.
    """
    together = active()
    parameters = [parameter for job in jobs for parameter in job.parameters]
    numbers = torch.cat([sums, counts])
    if repeated and not together.first:
        numbers = torch.zeros_like(numbers)
        for parameter in parameters:
            parameter.grad = None
    numbers = together.add_up(parameters, numbers)
    return numbers[: len(sums)], numbers[len(sums) :]


def idle(base: Base, job: JobState, row: int) -> None:
    """Call a sharded base forward and backward without adding anything, because other processes have more rows."""
    (forward(base, job.adapter.name, job.train, [row]).sums.sum() * 0.0).backward()


def settle(base: Base, runs: Sequence[Prepared]) -> None:
    """Let all processes start alike: check that they do the same, and take the first one's values.

    Raises:
        ConfigError: data, settings, method, task or base differ.
    """
    together = active()
    if together.size == 1:
        return
    for run in runs:
        about = {
            "name": run.attached, "data": run.data.digest, "settings": run.state.settings.plain(),
            "method": run.adapter.method.shorthand(), "task": run.adapter.task, "base": base.fingerprint(),
        }  # fmt: skip
        together.same(f"runs of {run.attached!r}", json.dumps(about, sort_keys=True, default=str))
        tensors = run.adapter.tensors()
        together.send([tensors[key] for key in sorted(tensors)])
        together.send([run.state.kept[key] for key in sorted(run.state.kept)])


def agreed(base: Base, kernels: Kernels) -> Kernels:
    """Return the first process's choice: it was measured, and all must compute alike."""
    return kernels if active().size == 1 else kernels_of(base, active().from_first(kernels.facts()))
