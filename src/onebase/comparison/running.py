"""`compare`: every method on the same rows under one budget: search on validation, seeds, then the test rows once."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onebase.comparison.advice import FULL, HEAD, Advice, Limits, Result, recommend
from onebase.data import Data, load
from onebase.data.rows import digest_of
from onebase.errors import ConfigError, OnebaseError, UnsupportedError
from onebase.examples import encode_rows, forward
from onebase.methods.registry import parse_method
from onebase.statistics import paired_seeds
from onebase.tasks.metrics import metric_of
from onebase.training import Failed, Job, Run, train_many
from onebase.training.full import RATES, trained_whole
from onebase.training.loop import Reporter
from onebase.training.settings import settings_for

if TYPE_CHECKING:
    from onebase.base import Base

METHODS = (
    FULL, "bottleneck", "bottleneck(preset='pfeiffer')", "bottleneck(preset='parallel')", "lora", "dora", "prefix",
    "prompt", "ia3", "bitfit", "layernorm",
)  # fmt: skip
FACTORS = (1.0, 0.3, 3.0)  # of a method's default rate: as many tries for each method; the default comes first
SEARCH = 0.4  # share of the budget in which rates are searched; the rest is for the seeds
SEARCH_ROWS = 256  # training rows of a search trial
ROUNDS = 5  # of every timing, of which the median counts


class OutOfTime(OnebaseError):
    """The budget is used up."""


class Deadline(Reporter):
    """Stops training when the budget is over.

    Args:
        ends: time.monotonic() at which it is.
    """

    def __init__(self, ends: float):
        self.ends = ends

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        """Raise OutOfTime when the time is up."""
        if time.monotonic() > self.ends:
            raise OutOfTime("the budget is used up")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison found.

    Attributes:
        base, data, kind, metric: what was compared on what.
        results: one per method that got at least one seed.
        advice: the recommendation.
        cut: what the budget or an interrupt left out, as sentences.
        folder: where the records are.
    """

    base: str
    data: str
    kind: str
    metric: str
    results: tuple[Result, ...]
    advice: Advice
    cut: tuple[str, ...]
    folder: Path


def compare(
    base: Base, data: Any, *, folder: str | Path, methods: Sequence[str] = METHODS, seeds: int = 3,
    budget: float = 900.0, limits: Limits | None = None, resume: bool = False, say: Any = lambda text: None,
    epochs: int = 5, limit: int | None = None,
) -> Comparison:  # fmt: skip
    """Compare methods on one data set under equal budgets.

    Every method tries as many learning rates on as many rows, the best one on validation is trained with every seed,
    and each of these runs scores the test rows once. Every finished run is a line of `records.jsonl` in the folder.

    Args:
        base: the base; nothing of it changes.
        data: what `load_data` takes.
        folder: where records go.
        methods: shorthands; "full" is full fine-tuning. The base's own head is always among the results.
        seeds: runs of each method.
        budget: seconds in all; what does not fit is left out and said.
        limits: what the recommended method may cost.
        resume: go on with the records that are there.
        say: receives sentences.
        epochs: passes over the training rows, at most; every method stops early by the same rule.
        limit: most rows of each split.

    Raises:
        ConfigError: the folder has records and `resume` is not given, or nothing was finished.
    """
    if base.adapters:
        raise ConfigError(f"compare needs a base without adapters: remove {', '.join(base.adapters)}")
    found = data if isinstance(data, Data) else load(data, limit=limit)
    methods, refused = _carried(base, methods)
    book = _Book(Path(folder), resume, {"data": found.digest, "base": base.id, "epochs": epochs})
    work = _Work(base, found, book, time.monotonic(), budget, epochs, say)
    work.cut += refused
    try:
        work.search_all(methods)
        for seed in range(seeds):
            work.finals(methods, seed)
    except OutOfTime:
        work.cut.append(f"the budget of {budget:.0f} s ended before everything was trained")
    except KeyboardInterrupt:
        work.cut.append("interrupted: what was finished is below; --resume goes on")
    results = summarize(book.records, found.kind)
    if not results:
        raise ConfigError(
            f"budget = {budget:.0f} s: no method finished a run; give more time, or fewer rows or methods"
        )
    advice = recommend(results, limits)
    return Comparison(
        base=base.id, data=found.source, kind=found.kind, metric=results[0].metric, results=tuple(results),
        advice=advice, cut=tuple(work.cut), folder=book.folder,
    )  # fmt: skip


def _carried(base: Base, methods: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the methods that the base can carry, and a sentence for each of the others."""
    kept, refused = [], []
    for method in dict.fromkeys(methods):
        try:
            if method != FULL:
                base.add("candidate", parse_method(method))
                base.remove("candidate")
            kept.append(method)
        except UnsupportedError as error:
            refused.append(f"{method}: not on this base: {error}")
    return kept, refused


class _Book:
    """The records of a comparison, a line each, written as they come.

    Args:
        folder: where.
        resume: whether records may be there.
        identity: what must be the same for them to count.
    """

    def __init__(self, folder: Path, resume: bool, identity: dict[str, Any]):
        self.folder, self.path = folder, folder / "records.jsonl"
        self.records: list[dict[str, Any]] = []
        if self.path.exists():
            if not resume:
                raise ConfigError(f"{self.path} is there already: pass --resume to go on, or another folder")
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # the last one may be cut
            self.records = [json.loads(line) for line in whole]
            known = self.records[0]["identity"] if self.records else identity
            if known != identity:
                raise ConfigError(f"{self.path} was made with {known}, not {identity}: use another folder")
            self.path.write_text("".join(whole), encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        if not self.records:
            self.add({"stage": "start", "identity": identity})

    def add(self, record: dict[str, Any]) -> None:
        """Write a record."""
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def has(self, **facts: Any) -> bool:
        """Whether a record with these facts is there."""
        return any(all(r.get(k) == v for k, v in facts.items()) for r in self.records)


class _Work:
    def __init__(self, base: Base, data: Data, book: _Book, began: float, budget: float, epochs: int, say: Any):
        self.base, self.data, self.book, self.say, self.epochs = base, data, book, say, epochs
        self.searching, self.ends = began + SEARCH * budget, began + budget
        self.cut: list[str] = []
        rows = data.train.select(range(min(SEARCH_ROWS, len(data.train))))
        splits = {"train": rows, "validation": data.validation, "test": data.test.select([])}
        self.small = replace(data, **splits, digest=digest_of(data.kind, splits))

    def search_all(self, methods: Sequence[str]) -> None:
        """Search rates for as long as the search may take; what it began and did not end counts for no method."""
        try:
            for factor in FACTORS:
                self.search(methods, factor)
        except OutOfTime:
            self.cut.append("the search of learning rates ran out of time: only rates that every method tried count")

    def search(self, methods: Sequence[str], factor: float) -> None:
        """Try one rate of every method; all or none, so that every method has as many tries."""
        todo = [m for m in methods if not self.book.has(stage="search", method=m, factor=factor)]
        if factor != 1.0 and todo:
            spent = sum(r["seconds"] for r in self.book.records if r.get("stage") == "search" and r["factor"] == 1.0)
            if time.monotonic() + spent > self.searching:
                self.cut.append(f"no method tried {factor:g} times its default learning rate: no time")
                return
        for method, run, seconds in self._runs(todo, self.small, factor, 0, 1, self.searching):
            value = None if run is None else max(self._rank(e, run.metric) for e in run.history.epochs)
            lr = _rate(method, factor, self.base)
            self.book.add({"stage": "search", "method": method, "factor": factor, "lr": lr, "validation": value,
                           "seconds": seconds})  # fmt: skip
            self.say(f"search {method} lr={lr:g}: {'failed' if value is None else f'{value:.4f}'} ({seconds:.0f} s)")

    def _rank(self, entry: dict[str, float], metric: str) -> float:
        return entry[metric] if metric_of(metric).higher else -entry[metric]

    def finals(self, methods: Sequence[str], seed: int) -> None:
        """Train every method with one seed and the rate that was best on validation."""
        tried = [r for r in self.book.records if r.get("stage") == "search" and r["validation"] is not None]
        every = {r["factor"] for r in tried if all(self.book.has(stage="search", method=m, factor=r["factor"])
                                                   for m in methods)}  # fmt: skip
        for method in sorted(methods, key=lambda m: m == FULL):  # the slowest last
            mine = [r for r in tried if r["method"] == method and r["factor"] in every]
            if self.book.has(stage="final", method=method, seed=seed):
                continue
            before = [r["seconds"] for r in self.book.records if r.get("stage") == "final" and r["method"] == method]
            if before and time.monotonic() + max(before) > self.ends:
                self.cut.append(f"{method} has no seed {seed}: no time")
                continue
            default = {"factor": 1.0, "lr": _rate(method, 1.0, self.base), "validation": 0.0}
            best = max(mine or [default], key=lambda r: r["validation"])
            for _, run, seconds in self._runs([method], self.data, best["factor"], seed, self.epochs, self.ends):
                if run is not None:
                    self._record(method, run, seed, best["lr"], seconds)

    def _runs(self, methods: Sequence[str], data: Data, factor: float, seed: int, epochs: int, ends: float) -> Any:
        """Train methods, adapters of a search in one pass, and yield (method, run or None, seconds)."""
        deadline = Deadline(ends)
        if time.monotonic() > ends:
            raise OutOfTime("the budget is used up")
        adapters = [m for m in methods if m != FULL]
        began = time.monotonic()
        if adapters:
            jobs = [Job(data, m, None, lr=_rate(m, factor, self.base), seed=seed, epochs=epochs) for m in adapters]
            runs = train_many(self.base, jobs, report=deadline)
            seconds = (time.monotonic() - began) / len(adapters)
            for method, run in zip(adapters, runs):
                try:
                    yield method, None if isinstance(run, Failed) else run, seconds
                finally:
                    if isinstance(run, Run):
                        self.base.remove(run.name)
        if FULL in methods:
            began = time.monotonic()
            with trained_whole(
                self.base, data, report=deadline, lr=_rate(FULL, factor, self.base), seed=seed, epochs=epochs
            ) as run:
                yield FULL, run, time.monotonic() - began

    def _record(self, method: str, run: Run, seed: int, lr: float, seconds: float) -> None:
        assert run.scores is not None and run.scores.base is not None
        self.say(f"{method} seed {seed}: {run.metric} {run.value:.4f} ({seconds:.0f} s)")
        if not self.book.has(stage="final", method=HEAD):
            own = run.scores.base
            self.book.add(_facts(HEAD, own, seed=0, lr=None, seconds=0.0, parameters=0, share=0.0, bytes=0,
                                 mergeable=False, curve=[], **self._speed(run.name, True), slowdown=1.0))  # fmt: skip
        adapter = self.base.adapters[run.name]
        stored = (
            4 * run.parameters
            if method == FULL
            else sum(t.numel() * t.element_size() for t in adapter.folded_tensors().values())
        )
        speed, plain = self._speed(run.name, False), self._speed(run.name, True)
        self.book.add(_facts(
            method, run.scores.adapter, seed=seed, lr=lr, seconds=run.history.seconds, parameters=run.parameters,
            share=run.share, bytes=stored, mergeable=adapter.method.mergeable, curve=run.history.epochs, **speed,
            slowdown=1.0 if method == FULL else speed["latency"] / plain["latency"],
        ))  # fmt: skip

    def _speed(self, name: str, plain: bool) -> dict[str, float]:
        """Time one row, and 32 at once."""
        adapter = self.base.adapters[name]
        rows = self.data.validation.select(range(min(32, len(self.data.validation))))
        examples = encode_rows(self.base, adapter.task, rows)
        who = (None, examples, adapter.task, adapter.base_head) if plain else (name, examples, None, None)
        return {"latency": self._median(who, 1), "throughput": 32 / self._median(who, min(32, len(examples)))}

    def _median(self, who: tuple[Any, Any, Any, Any], rows: int) -> float:
        name, examples, spec, head = who
        taken = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            with torch.no_grad():
                forward(self.base, name, examples, range(rows), spec, head)
            taken.append(time.perf_counter() - began)
        return sorted(taken)[ROUNDS // 2]


def _rate(method: str, factor: float, base: Base) -> float:
    default = RATES[1] if method == FULL else settings_for(parse_method(method), {}, base.anatomy.hidden_size).lr
    return float(f"{default * factor:.3g}")


def _facts(method: str, scores: Any, **more: Any) -> dict[str, Any]:
    # an accuracy is the mean of right answers; the rows of its scores are labels, for macro F1
    right = scores.metric == "accuracy" or scores.rows is None
    rows = [float(c) for c in scores.correct] if right else scores.rows.tolist()  # type: ignore[union-attr]
    return {"stage": "final", "method": method, "metric": scores.metric, "value": scores.value, "rows": rows, **more}


def summarize(records: Sequence[dict[str, Any]], kind: str) -> list[Result]:
    """Make one result per method of the records of its seeds, with paired tests between all methods."""
    finals: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record.get("stage") == "final":
            finals.setdefault(record["method"], []).append(record)
    found = []
    for method, runs in finals.items():
        about = metric_of(runs[0]["metric"])
        rows = [r["rows"] for r in runs]
        versus, own = {}, None
        for other, theirs in finals.items():
            test = paired_seeds([r["rows"] for r in theirs], rows, about.statistic)
            if other != method:
                versus[other] = (test.difference, test.p_value)
        flat = [[0.0 * v for v in r] if not isinstance(r[0], list) else r for r in rows[:1]]
        if about.name == "accuracy":  # against a score of nothing right: the interval of the score itself
            own = paired_seeds(flat, rows, about.statistic)
        last = runs[-1]
        value = sum(r["value"] for r in runs) / len(runs)
        found.append(Result(
            method=method, value=value, low=own.low if own else min(r["value"] for r in runs),
            high=own.high if own else max(r["value"] for r in runs), values=tuple(r["value"] for r in runs),
            higher=about.higher, metric=about.name, parameters=last["parameters"], share=last["share"],
            bytes=last["bytes"], seconds=sum(r["seconds"] for r in runs) / len(runs),
            latency=min(r["latency"] for r in runs), throughput=max(r["throughput"] for r in runs),
            slowdown=sorted(r["slowdown"] for r in runs)[len(runs) // 2], mergeable=last["mergeable"],
            versus=versus, lr=last["lr"], curves=tuple(r["curve"] for r in runs),
        ))  # fmt: skip
    return sorted(found, key=lambda r: -r.value if r.higher else r.value)


def document(found: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON values."""
    return {**asdict(found), "folder": str(found.folder)}
