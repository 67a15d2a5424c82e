"""The runs of the seeds: every method with its rate, as many epochs and rows for all, the test rows scored once."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from onebase.comparison.advice import HEAD
from onebase.comparison.passes import Pass, own_record
from onebase.comparison.schedule import Schedule, seed_seconds
from onebase.comparison.searching import best_factor
from onebase.comparison.together import Candidate
from onebase.comparison.work import Work

if TYPE_CHECKING:
    from onebase.comparison.engines import Engine

ENOUGH = 0.8  # share of its expected time with which a further seed is begun


def rates_of(work: Work, methods: Sequence[str]) -> dict[str, float]:
    """Return each method's rate, settled once: all seeds have the same, also after going on."""
    settled = {r["method"]: r["lr"] for r in work.book.find("rate")}
    for method in methods:
        if method not in settled:
            factor = best_factor(list(work.book.find("search", method=method)))
            settled[method] = work.rate(method, factor)
            work.book.add({"stage": "rate", "method": method, "factor": factor, "lr": settled[method]})
    return {m: settled[m] for m in methods}


def finals(
    work: Work, methods: Sequence[str], seeds: range, schedule: Schedule, engine: Engine, ends: float
) -> Iterator[str]:
    """Train and score; yield sentences on what was cut.

    Args:
        work: the comparison.
        methods: all of them.
        seeds: asked for; a further one is begun only if it is expected to end in time.
        schedule: epochs and rows.
        engine: makes the passes.
        ends: time.monotonic() at which everything is over.
    """
    rates = rates_of(work, methods)
    if not work.book.has("final", method=HEAD):
        work.book.add(own_record(work, schedule.rows, schedule.held))
    for some in engine.rounds(seeds):
        work.stop.check()
        todo = [(m, seed) for seed in some for m in methods if not _over(work, m, seed)]
        if not todo:
            continue
        costs = work.costs(methods, engine.workers)
        needed = sum(seed_seconds(costs, [m for m, _ in todo], work.sizes, schedule.epochs, schedule.rows, False))
        if some[0] != seeds[0] and time.monotonic() + ENOUGH * needed > ends:
            names = "every method has" if len(todo) == len(methods) else ", ".join(m for m, _ in todo) + " have"
            yield f"no time for seed {some[0]}, which would take about {needed:.0f} s: {names} fewer runs"
            return
        ended = False
        for record in engine.run(
            [_pass(work, rates, group, schedule, seeds[0]) for group in engine.groups(todo)], ends
        ):
            work.book.add(record)
            ended |= record.get("ended") is not None
            if record["stage"] in ("final", "partial"):
                work.say(f"{record['method']} seed {record['seed']}: {record['metric']} {record['value']:.4f}"
                         + ("" if record["stage"] == "final" else f", after {record['seen']:,} rows"))  # fmt: skip
            elif record["stage"] == "failed":
                yield f"{record['method']} seed {record['seed']}: its loss was not finite with lr = {record['lr']:g}"
        yield from _left(work, todo)
        if ended:
            return


def _left(work: Work, todo: Sequence[tuple[str, int]]) -> Iterator[str]:
    """Say which runs ended early and which were not begun."""
    left = [(m, seed) for m, seed in todo if not _over(work, m, seed)]
    for seed in dict.fromkeys(seed for _, seed in left):
        begun = [m for m, s in left if s == seed and work.book.has("partial", method=m, seed=seed)]
        never = [m for m, s in left if s == seed and m not in begun]
        if begun:
            yield f"seed {seed}: ended before the last epoch of {', '.join(begun)}; what they reached is scored"
        if never:
            yield f"seed {seed}: no time for {', '.join(never)}"


def _over(work: Work, method: str, seed: int) -> bool:
    return any(work.book.has(stage, method=method, seed=seed) for stage in ("final", "failed"))


def _pass(
    work: Work, rates: dict[str, float], group: Sequence[tuple[str, int]], schedule: Schedule, first: int
) -> Pass:
    methods = [m for m, _ in group]
    measured = tuple(m for m, seed in group if _first(work, m, seed, first))
    closing = seed_seconds(work.costs(methods), methods, work.sizes, 0, schedule.rows, bool(measured))[1]
    return Pass(
        stage="final", candidates=tuple(Candidate(method=m, lr=rates[m], seed=seed) for m, seed in group),
        epochs=schedule.epochs, rows=schedule.rows, held=schedule.held, measured=measured, closing=closing,
    )  # fmt: skip


def _first(work: Work, method: str, seed: int, first: int) -> bool:
    """Whether a run is the first of its method that will be whole: then its answers are timed."""
    return not any(work.book.has("final", method=method, seed=other) for other in range(seed + 1)) and all(
        work.book.has("failed", method=method, seed=other) for other in range(first, seed)
    )
