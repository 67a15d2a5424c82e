"""Rates by successive halving, as many tries for every method; what a rung that ended early has reached counts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from onebase.comparison.passes import Pass
from onebase.comparison.schedule import FACTORS, HELD, Schedule, rung_seconds
from onebase.comparison.together import Candidate
from onebase.comparison.work import Work

if TYPE_CHECKING:
    from onebase.comparison.engines import Engine

SLACK = 1.5  # times its expected seconds that a rung may take


def search(work: Work, methods: Sequence[str], schedule: Schedule, engine: Engine, seed: int) -> Iterator[str]:
    """Try the rates of a schedule's rungs; yield sentences on what was cut.

    Args:
        work: the comparison.
        methods: all of them.
        schedule: says which rungs.
        engine: makes the passes.
        seed: of every one of them.
    """
    alive = {method: list(FACTORS) for method in methods}
    for keep, rows in schedule.rungs:
        alive = {m: factors[:keep] for m, factors in alive.items()}
        todo = [(m, f) for m, factors in alive.items() for f in factors if not _tried(work, m, f, rows)]
        if todo:
            costs = work.costs(methods, engine.workers)
            ends = time.monotonic() + SLACK * rung_seconds(costs, methods, work.sizes, keep, rows) + 10
            ended = False
            for record in engine.run([_pass(work, group, rows, seed) for group in engine.groups(todo)], ends):
                work.book.add(record)
                ended |= record.get("ended") is not None
            if ended or any(not _tried(work, m, f, rows) for m, f in todo):
                yield f"the search on {rows:,} rows ended early: rates are compared by the last point they all reached"
                return
        alive = {m: ranked(work, m, factors, rows) for m, factors in alive.items()}


def _pass(work: Work, group: Sequence[tuple[str, float]], rows: int, seed: int) -> Pass:
    candidates = tuple(Candidate(method=m, lr=work.rate(m, f), seed=seed) for m, f in group)
    methods, held = [m for m, _ in group], min(HELD, work.sizes.validation)
    closing = work.costs(methods).of(methods, 0, held)
    return Pass(stage="search", candidates=candidates, factors=tuple(f for _, f in group), rows=rows, held=held,
                closing=closing)  # fmt: skip


def _tried(work: Work, method: str, factor: float, rows: int) -> bool:
    """Whether a rate was tried on all rows of a rung."""
    return any(r["reached"] >= rows for r in work.book.find("search", method=method, factor=factor, rows=rows))


def ranked(work: Work, method: str, factors: Sequence[float], rows: int) -> list[float]:
    """Return rates from the best to the worst on a rung."""
    known = {r["factor"]: r["validation"] for r in work.book.find("search", method=method, rows=rows)}
    return sorted(factors, key=lambda f: -1e9 if known[f] is None else known[f], reverse=True)


def best_factor(records: Sequence[dict[str, Any]]) -> float:
    """Return the rate to take: the best of those that were compared after the most rows, else the default.

    A comparison is of at least two rates that have seen as many rows; one whose loss was not finite has lost.

    Args:
        records: of one method's search.
    """
    at: dict[int, dict[float, float | None]] = {}
    for r in records:
        at.setdefault(r["reached"], {})[r["factor"]] = r["validation"]
    for reached in sorted(at, reverse=True):
        finite = {f: v for f, v in at[reached].items() if v is not None}
        if len(at[reached]) > 1 and finite:
            return max(finite, key=lambda f: finite[f])
    return 1.0
