"""States below the first delta are computed once per run, and kept for every epoch.

The base is frozen and has no dropout while adapters train, so the states that enter the lowest layer with a delta are
the same in every epoch. They are computed before the first step, in batches that depend on the data alone: a run that
was interrupted finds the same bits again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from onebase.core.kept import Memory, Passing, Text, passing
from onebase.core.trunk import first_layer
from onebase.devices import packed_tokens
from onebase.encode import Encoded, collate, pad_id
from onebase.processes import is_sharded
from onebase.tasks import Examples, Task, get_task
from onebase.training.job import JobState

if TYPE_CHECKING:
    from onebase.base import Base

ROWS = 64  # most rows of a batch whose states are recorded
TOKENS = 4096  # most tokens of one where the device sets no limit


@contextmanager
def kept_states(base: Base, jobs: Sequence[JobState], held_out: Sequence[Examples]) -> Iterator[dict[str, Any] | None]:
    """Keep the states below the first delta of all jobs as long as the block runs; they are used by every call.

    Rows of training come first, in their order, then those of `held_out`, as far as `Settings.keep_mb` goes.

    Args:
        base: the base that carries the jobs' adapters.
        jobs: what is trained in the block.
        held_out: what is scored in every epoch.

    Yields:
        What was kept, as JSON values: layer, texts, bytes, seconds; None where nothing is.
    """
    layer, limit = _layer(base, jobs), max(job.settings.keep_mb for job in jobs) * 2**20
    if not layer or not limit or all(job.settings.epochs == 1 for job in jobs):
        yield None
        return
    stack = base.anatomy.stacks[0]
    memory = Memory(stack, layer)
    began = time.perf_counter()
    texts: dict[Text, None] = {}
    for examples, job in [*((job.train, job) for job in jobs), *zip(held_out, jobs)]:
        texts |= dict.fromkeys(_texts(job, examples))
    width = stack.width * max(4, torch.finfo(base.anatomy.stacks[0].embed.weight.dtype).bits // 8)  # type: ignore[union-attr,type-var]
    chosen: list[Text] = []
    size = 0  # as if states were float32, or what the base computes in where that is wider
    for text in texts:
        size += len(text[0]) * width
        if size > limit:
            break
        chosen.append(text)
    token = base._memory.set(memory)
    try:
        with passing(stack.layers, base._installed.runtime) as layers:
            if not chosen or not _fits(base, memory, layers, chosen[0]):
                base._memory.set(None)
                yield None
                return
            _record(base, memory, chosen)
            yield {
                "layer": layer,
                "texts": len(chosen),
                "of": len(texts),
                "bytes": sum(states.nbytes for states in memory.known.values()),
                "seconds": round(time.perf_counter() - began, 3),
            }
    finally:
        base._memory.reset(token)


@contextmanager
def not_kept(base: Base) -> Iterator[None]:
    """Compute everything in the block, as if nothing were kept."""
    token = base._memory.set(None)
    try:
        yield
    finally:
        base._memory.reset(token)


def sentence(facts: dict[str, Any]) -> str:
    """Say what was kept."""
    return (
        f"states that enter layer {facts['layer']} are kept: {facts['texts']} of {facts['of']} texts, "
        f"{facts['bytes'] / 2**20:.0f} MiB, computed in {facts['seconds']:.1f} s"
    )


def parts_of(base: Base, job: JobState, batch: Sequence[int]) -> list[list[int]]:
    """Cut a batch into rows whose states are kept, and others, so that no row loses what is kept of it."""
    memory = base._memory.get()
    if memory is None:
        return [list(batch)]
    task = get_task(job.adapter.task["kind"])
    known = [all(text in memory.known for text in _texts_of(task, job.train, [i])) for i in batch]
    parts = [[i for i, own in zip(batch, known) if own is wanted] for wanted in (True, False)]
    return [part for part in parts if part]


def _layer(base: Base, jobs: Sequence[JobState]) -> int:
    """Return the lowest layer that a job touches, or 0 where states cannot be kept."""
    stack = base.anatomy.stacks[0]
    if not stack.trunk or base.is_encoder_decoder or base.reads_images:
        return 0  # a picture has no token ids that would tell it from others
    if is_sharded(base.model):
        return 0  # all processes must call every layer equally often
    if any(parameter.requires_grad for parameter in base.model.parameters()):
        return 0  # the base itself is trained
    tasks = [type(get_task(job.adapter.task["kind"])) for job in jobs]
    if any(task.for_epoch is not Task.for_epoch for task in tasks):  # other tokens in every epoch
        return 0
    count = len(stack.layers)
    # an adapter without deltas, a head alone, still needs the last layer: something has to be computed
    return min(count - 1, *(first_layer(job.adapter.routed, stack.name, count) for job in jobs))


def _texts(job: JobState, examples: Examples) -> Iterator[Text]:
    task = get_task(job.adapter.task["kind"])
    for i in range(len(examples)):
        yield from _texts_of(task, examples, [i])


def _texts_of(task: Task, examples: Examples, index: Sequence[int]) -> list[Text]:
    typed = task.surface == "states"
    rows = task.inputs(examples, index)
    return [(tuple(row.ids), tuple(row.types) if typed and row.types is not None else None) for row in rows]


def _fits(base: Base, memory: Memory, layers: Sequence[Passing], text: Text) -> bool:
    """Compute one text as ever and see whether every layer is called once and returns nothing but states."""
    with torch.no_grad():
        base.states(_batch(base, [text]), None)
    return all(layer.calls == 1 and layer.more is not None for layer in layers)


def _record(base: Base, memory: Memory, texts: Sequence[Text]) -> None:
    """Compute the layers below for all texts."""
    limit = packed_tokens(base.device) or TOKENS
    memory.recording = True
    try:
        with torch.no_grad():
            for part in _batches(sorted(texts, key=lambda text: (len(text[0]), text[0])), limit):
                base.states(_batch(base, part), None)
                assert memory.last is not None
                memory.known |= dict(zip(part, memory.last.rows, strict=True))
    finally:
        memory.recording, memory.last = False, None


def _batches(texts: Sequence[Text], limit: int) -> Iterator[list[Text]]:
    part: list[Text] = []
    for text in texts:
        if part and (len(part) == ROWS or (len(part) + 1) * len(text[0]) > limit):
            yield part
            part = []
        part.append(text)
    if part:
        yield part


def _batch(base: Base, texts: Sequence[Text]) -> dict[str, torch.Tensor]:
    return collate([Encoded(*text) for text in texts], pad_id(base.tokenizer), device=base.device)
