"""Records become results: one per method, intervals, paired tests, confusion, calibration, rows fixed and broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onebase.comparison.advice import FULL, HEAD, Result
from onebase.statistics import calibration, holm, paired_seeds, seeds_interval
from onebase.tasks.metrics import metric_of

SHOWN = 5  # rows that were fixed and rows that were broken, in a report


def summarize(records: Sequence[Mapping[str, Any]], rows: Mapping[str, Any] | None = None) -> list[Result]:
    """Make one result per method of the records of its seeds, with paired tests between all methods.

    Args:
        records: of stages 'final' and 'partial'; partial ones count for methods that have no final one: the mean of a
            whole run and a part of one would say less than the whole one.
        rows: what was scored: "labels", "gold" label numbers, "texts"; None where rows have no labels.
    """
    finals = _by_method(records)
    found = [_result(method, runs, finals, rows or {}) for method, runs in finals.items()]
    found.sort(key=lambda r: -r.value if r.higher else r.value)
    against_best = _adjusted(found, found[0].method) if found else {}
    against_full = _adjusted(found, FULL)
    return [replace(r, p_best=against_best.get(r.method), p_full=against_full.get(r.method)) for r in found]


def _by_method(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    finals: dict[str, dict[int, Mapping[str, Any]]] = {}
    for stage in ("partial", "final"):
        for record in records:
            if record.get("stage") == stage:
                finals.setdefault(record["method"], {})[record["seed"]] = record
    return {method: _counting([runs[seed] for seed in sorted(runs)]) for method, runs in finals.items()}


def _counting(runs: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [r for r in runs if r["stage"] == "final"] or runs


def _adjusted(found: Sequence[Result], other: str) -> dict[str, float]:
    """Return p-values against one method, adjusted for how many methods are compared with it (Holm)."""
    tested = [r for r in found if r.method != other and other in r.versus]
    return dict(zip([r.method for r in tested], holm([r.versus[other][1] for r in tested])))


def _result(
    method: str, runs: Sequence[Mapping[str, Any]], finals: Mapping[str, Sequence[Mapping[str, Any]]],
    rows: Mapping[str, Any],
) -> Result:  # fmt: skip
    about = metric_of(runs[0]["metric"])
    mine = [r["rows"] for r in runs]
    versus = {}
    for other, theirs in finals.items():
        if other != method:
            test = paired_seeds([r["rows"] for r in theirs], mine, about.statistic)
            versus[other] = (test.difference, test.p_value)
    low, high = seeds_interval(mine, about.statistic)
    first, measured = runs[0], next((r for r in runs if r.get("latency")), runs[0])
    change = [r["forgetting"]["change"] for r in runs if r.get("forgetting")]
    result = Result(
        method=method, value=_mean(r["value"] for r in runs), low=low, high=high,
        values=tuple(r["value"] for r in runs), seeds=tuple(r["seed"] for r in runs), higher=about.higher,
        metric=about.name, parameters=first["parameters"], share=first["share"], bytes=first["bytes"],
        seconds=_mean(r["seconds"] for r in runs), latency=measured["latency"], throughput=measured["throughput"],
        slowdown=measured["slowdown"], merged_latency=measured.get("merged_latency"),
        merged_throughput=measured.get("merged_throughput"), memory=measured.get("memory"),
        mergeable=first["mergeable"], versus=versus, lr=first["lr"], curves=tuple(r["curve"] for r in runs),
        forgetting=_mean(change) if change else None,
        forgetting_measure=first["forgetting"]["measure"] if first.get("forgetting") else "",
        partial=any(r["stage"] == "partial" for r in runs), metrics=first.get("metrics", {}),
    )  # fmt: skip
    return _with_answers(result, runs, finals.get(HEAD), rows)


def _with_answers(
    result: Result, runs: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]] | None, rows: Mapping[str, Any]
) -> Result:
    """Add what only answers with labels have: confusion over all seeds, calibration, and rows of the first seed."""
    gold = rows.get("gold")
    if gold is None or any(not r.get("predicted") for r in runs):
        return result
    size = len(rows["labels"])
    table = [[0] * size for _ in range(size)]
    for run in runs:
        for actual, predicted in zip(gold, run["predicted"]):
            table[actual][predicted] += 1
    sure = [p for r in runs for p in r["confidence"]]
    right = [a == b for r in runs for a, b in zip(gold, r["predicted"])]
    error, bins = calibration(sure, right)
    fixed, broken = [], []
    if own is not None and result.method != HEAD:
        for i, (actual, before, now) in enumerate(zip(gold, own[0]["predicted"], runs[0]["predicted"])):
            if (before == actual) != (now == actual):
                (fixed if now == actual else broken).append(_shown(rows, i, actual, before, now))
    return replace(
        result, confusion=tuple(map(tuple, table)), ece=error, calibration=tuple(map(tuple, bins)),
        fixed=len(fixed), broken=len(broken), examples={"fixed": fixed[:SHOWN], "broken": broken[:SHOWN]},
    )  # fmt: skip


def _shown(rows: Mapping[str, Any], i: int, actual: int, before: int, now: int) -> dict[str, Any]:
    labels = rows["labels"]
    return {"row": i, "text": rows["texts"][i], "label": labels[actual], "base": labels[before], "method": labels[now]}


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)
