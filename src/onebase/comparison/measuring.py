"""What is measured of one trained run: answers and their confidence, speed, time and memory of training alone."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from onebase.comparison.advice import FULL
from onebase.comparison.footprint import Watch
from onebase.data import Data
from onebase.errors import UnsupportedError
from onebase.evaluation import with_extras
from onebase.examples import encode_rows, forward, run_examples
from onebase.merging import merge, restore
from onebase.tasks import Examples, Scores, get_task
from onebase.tasks.task import per_unit
from onebase.training.full import Full, opened
from onebase.training.kernels import Kernels
from onebase.training.loop import Reporter, _step
from onebase.training.prepare import Prepared, discard, prepare
from onebase.training.run import kernels_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from onebase.base import Base

ROUNDS = 5  # of every timing, plain and adapted in turn, of which the median counts
MANY = 16  # rows of a throughput call
STEPS = 2  # optimizer steps of a run by itself that are timed, after two that are not


def answers(
    base: Base, name: str | None, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples
) -> tuple[Scores, dict[str, Any]]:
    """Score a split, and return the answers of a classification: label numbers and the probability of each.

    Args:
        base: the base.
        name: the adapter, or None for the base's own head.
        spec, head: what answers.
        examples: the split.
    """
    task = get_task(spec["kind"])
    if name is None:
        spec, examples = task.own(base, spec, head, examples)
    found = run_examples(base, name, examples, 64, spec, head)
    scores = with_extras(base, spec, name, examples, task.judge(spec, head, examples, found))
    if spec["kind"] != "classification":
        return scores, {"predicted": None, "confidence": None}
    shares = torch.softmax(per_unit(examples, found.values).double(), -1)
    best = shares.max(1)
    confidence = [round(p, 6) for p in best.values.tolist()]
    return scores, {"predicted": best.indices.tolist(), "confidence": confidence}


def speeds(base: Base, name: str, data: Data) -> dict[str, Any]:
    """Time one row and 16 at once, plain, with the adapter, and merged where it can be.

    Returns:
        latency, throughput: seconds of a row, rows a second, attached; plain_*: of the base with its own head;
        slowdown: latency over the plain one; merged_latency: None where it cannot be merged; merged_throughput.
    """
    adapter = base.adapters[name]
    rows = data.validation.select(range(min(MANY, len(data.validation))))
    examples = encode_rows(base, adapter.task, rows, base.tokenizer_of(name))
    task = get_task(adapter.task["kind"])
    own_spec, own = task.own(base, adapter.task, adapter.base_head, examples.for_base)
    plain = (None, own, own_spec, adapter.base_head)
    attached = (name, examples, None, None)
    one, base_one = _timed(base, (attached, plain), 1)
    many, base_many = _timed(base, (attached, plain), len(examples))
    found: dict[str, Any] = {
        "latency": one, "throughput": len(examples) / many, "plain_latency": base_one,
        "plain_throughput": len(examples) / base_many, "slowdown": one / base_one, "rows_at_once": len(examples),
        "merged_latency": None, "merged_throughput": None,
    }  # fmt: skip
    if adapter.method.mergeable and adapter.method.name != "full":
        try:
            weights = merge(base, name)  # not `base.merge`, which refuses everything but direct calls meanwhile
        except UnsupportedError:  # this base has not what the method would change
            return found
        try:
            merged = (None, examples, adapter.task, adapter.head)
            found["merged_latency"] = _timed(base, (merged,), 1)[0]
            found["merged_throughput"] = len(examples) / _timed(base, (merged,), len(examples))[0]
        finally:
            restore(weights)
    return found


def _timed(base: Base, ways: Sequence[tuple[Any, ...]], rows: int) -> list[float]:
    """Return the median seconds of calls, made in turn so that a busy moment meets all of them."""
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(ROUNDS):
        for who, times in zip(ways, taken):
            name, examples, spec, head = who
            began = time.perf_counter()
            with torch.no_grad():
                forward(base, name, examples, range(rows), spec, head)
            if base.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return [sorted(times)[ROUNDS // 2] for times in taken]


@dataclass(frozen=True, kw_only=True)
class Alone:
    """What training one adapter by itself takes: in a joint pass nobody could say whose time it was.

    Attributes:
        seconds_per_row: of an optimizer step over its rows, scoring not counted.
        seconds_per_scored: of a row that is scored, in the base's own dtype.
        memory: bytes of tensors at the highest point of a step, weights and optimizer included.
    """

    seconds_per_row: float
    seconds_per_scored: float
    memory: int


def alone(
    base: Base, data: Data, method: str, lr: float, kernels: Kernels | None = None,
    shared: dict[Any, dict[str, Examples]] | None = None,
) -> tuple[Alone, Kernels]:  # fmt: skip
    """Take a few steps of a method by itself, on the clock.

    Args:
        base: the base.
        data: rows to train on.
        method: shorthand, or 'full'.
        lr: its rate.
        kernels: how the base computes; measured by default, and returned.
        shared: encoded data, which is added to.
    """
    whole = method == FULL
    with contextlib.ExitStack() as stack:
        more: dict[str, Any] = {"build": stack.enter_context(opened(base))} if whole else {}
        prepared = prepare(base, Reporter(), data=data, method=Full() if whole else method, lr=lr, epochs=2 * STEPS,
                           shared=shared, **more)  # fmt: skip
        stack.callback(discard, base, prepared)
        base.model.requires_grad_(whole)
        kernels = kernels or kernels_for(base, [prepared])
        return _steps(base, prepared, kernels), kernels


def _steps(base: Base, prepared: Prepared, kernels: Kernels) -> Alone:
    """Take steps: the first makes the optimizer's moments, the second is watched, those after it are timed."""
    state, quiet = prepared.state, Reporter()
    cuda = base.device.type == "cuda"
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    held = sum(p.numel() * p.element_size() for p in state.parameters)
    state.adapter.train()
    with kernels.active():
        _step(base, state, quiet)
        _next(state)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with Watch() as watch:
            _step(base, state, quiet)
        rows, seconds = state.history.rows, 0.0
        for _ in range(STEPS):
            _next(state)
            began = time.perf_counter()
            _step(base, state, quiet)
            seconds += time.perf_counter() - began
    # trained values, the copy of the best epoch, two moments; a trained base is its own trained values
    own = 4 * held if held < weights else 3 * held
    memory = torch.cuda.max_memory_allocated() if cuda else weights + own + watch.peak
    return Alone(
        seconds_per_row=seconds / max(1, state.history.rows - rows), seconds_per_scored=_scored(base, prepared),
        memory=int(memory),
    )  # fmt: skip


def _scored(base: Base, prepared: Prepared) -> float:
    """Return the seconds of a validation row, as scoring takes them."""
    prepared.adapter.train(False)
    held = prepared.examples["validation"]
    index = range(min(2 * MANY, len(held)))
    with torch.no_grad():
        forward(base, prepared.adapter.name, held, index[: len(index) // 2 + 1])  # warms up
        began = time.perf_counter()
        forward(base, prepared.adapter.name, held, index)
        return (time.perf_counter() - began) / len(index)


def _next(state: Any) -> None:
    """Begin another epoch where this one is over, without scoring it."""
    if state.epoch_is_over:
        state.epoch, state.place, state.shuffled = state.epoch + 1, 0, None
