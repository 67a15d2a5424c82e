"""`compare`: every method on the same rows under one budget: halving on validation, seeds, then the test rows once."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onebase.comparison.advice import FULL, HEAD, Advice, Limits, Result, recommend
from onebase.comparison.forgetting import forgetting, reference
from onebase.comparison.measuring import alone, answers, speeds
from onebase.comparison.planning import default_methods
from onebase.comparison.records import Book
from onebase.comparison.results import summarize
from onebase.comparison.together import Candidate, Deadline, OutOfTime, rank, trained_together
from onebase.data import Data, load
from onebase.data.rows import digest_of
from onebase.errors import ConfigError, UnsupportedError
from onebase.methods.registry import parse_method
from onebase.training.full import RATES, trained_whole
from onebase.training.prepare import Prepared
from onebase.training.settings import settings_for

if TYPE_CHECKING:
    from onebase.base import Base

# Rates that are tried, over a method's default one: as many for each method. Of Devlin et al.'s 5e-5 for full
# fine-tuning (arXiv 1810.04805) they make 1.25e-5 to 1e-4.
FACTORS = (0.25, 0.5, 1.0, 2.0)
RUNGS = ((4, 256), (2, 512))  # (rates of each method, training rows): half the rates, twice the rows
HELD = 256  # validation rows of the search
SEARCH = 0.4  # share of the budget in which rates are searched; the rest is for the seeds
SCORING = 0.4  # time of a scored row over that of a trained one: no backward pass
LEAST = 256  # training rows below which seeds are left out instead


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a comparison found.

    Attributes:
        base, data, kind, metric: what was compared on what.
        results: one per method that got at least one seed.
        advice: the recommendation.
        cut: what the budget or an interrupt left out, as sentences.
        folder: where the records are.
        base_bytes: of the base, which all adapters share.
        tasks: how many tasks were asked about.
        labels: of the data.
        settings, versions, machine: how, with what, where it ran.
        search: the rates that were tried: method, lr, rows, validation.
        command: the exact command, '' from Python.
    """

    base: str
    data: str
    kind: str
    metric: str
    results: tuple[Result, ...]
    advice: Advice
    cut: tuple[str, ...]
    folder: Path
    base_bytes: int = 0
    tasks: int = 1
    labels: tuple[str, ...] = ()
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    search: tuple[dict[str, Any], ...] = ()
    command: str = ""


def compare(
    base: Base, data: Any, *, folder: str | Path, methods: Sequence[str] | None = None, seeds: int = 3,
    budget: float = 900.0, limits: Limits | None = None, resume: bool = False, say: Any = lambda text: None,
    epochs: int = 5, limit: int | None = None, command: str = "",
) -> Comparison:  # fmt: skip
    """Compare methods on one data set under equal budgets.

    Learning rates are found by successive halving on validation, all adapters in one pass: every method tries four
    rates on 256 rows, the better two on 512. The best one is trained with every seed, all methods of a seed in one
    pass, and each of these runs scores the test rows once.
    Epochs, and then rows, are as many as fit into the budget, the
    same for all. Every finished run is a line of `records.jsonl` in the folder.

    Args:
        base: the base; nothing of it changes.
        data: what `load_data` takes.
        folder: where records go.
        methods: shorthands; "full" is full fine-tuning. By default full fine-tuning and every registered method that
            the base carries. The base's own head is always among the results.
        seeds: runs of each method.
        budget: seconds in all; what does not fit is left out and said.
        limits: what the recommended method may cost.
        resume: go on with the records that are there; those of the same data, base and settings count.
        say: receives sentences.
        epochs: passes over the training rows, at most; every method stops early by the same rule.
        limit: most rows of each split.
        command: what the user typed, for the report.

    Returns:
        The results per method, what was cut to fit the budget, and the recommendation. Records are in the folder.

    Raises:
        ConfigError: the folder has records and `resume` is not given, or nothing was finished.
    """
    if base.adapters:
        raise ConfigError(f"compare needs a base without adapters: remove {', '.join(base.adapters)}")
    began = time.monotonic()
    found = data if isinstance(data, Data) else load(data, limit=limit)
    wanted = list(methods) if methods else [FULL, *(m.shorthand() for m in default_methods())]
    kept, refused = carried(base, wanted)
    identity = {
        "data": found.digest, "base": base.id, "fingerprint": base.fingerprint(), "epochs": epochs,
        "factors": list(FACTORS), "rungs": [list(r) for r in RUNGS],
        "dtype": str(next(base.model.parameters()).dtype),
    }  # fmt: skip
    work = _Work(base, found, Book(Path(folder), resume, identity), began, budget, epochs, say)
    work.cut += refused
    try:
        work.search(kept)
        work.finals(kept, seeds)
    except OutOfTime:
        work.cut.append(f"the budget of {budget:.0f} s ended before everything was trained")
    except KeyboardInterrupt:
        work.cut.append("interrupted: what was finished is below; --resume goes on")
    results = summarize(work.book.records, work.rows())
    if not results:
        raise ConfigError(
            f"budget = {budget:.0f} s: no method finished a run; give more time, or fewer rows or methods"
        )
    return Comparison(
        base=base.id, data=found.source, kind=found.kind, metric=results[0].metric, results=tuple(results),
        advice=recommend(results, limits), cut=tuple(work.cut), folder=work.book.folder,
        base_bytes=sum(p.numel() * p.element_size() for p in base.model.parameters()),
        tasks=limits.tasks if limits else 1, labels=found.labels,
        settings={"seeds": seeds, "budget": budget, "methods": kept, "split": work.split, **identity, **work.plan()},
        versions=versions(), machine={"threads": torch.get_num_threads(), "cores": os.cpu_count(),
                                      "device": str(base.device)},
        search=tuple(work.book.find("search")), command=command,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """Return versions of what computes."""
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "onebase")}}


def carried(base: Base, methods: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the methods that the base can carry, and a sentence for each of the others."""
    kept, refused = [], []
    for method in dict.fromkeys(m if m == FULL else parse_method(m).shorthand() for m in methods):
        try:
            if method != FULL:
                base.add("candidate", parse_method(method))
                base.remove("candidate")
            kept.append(method)
        except UnsupportedError as error:
            refused.append(f"{method}: not on this base: {error}")
    return kept, refused


class _Work:
    def __init__(self, base: Base, data: Data, book: Book, began: float, budget: float, epochs: int, say: Any):
        self.base, self.data, self.book, self.say, self.epochs = base, data, book, say, epochs
        self.searching, self.ends = began + SEARCH * budget, began + budget
        self.split = "test" if len(data.test) else "validation"
        self.cut: list[str] = []
        self.before = reference(base)

    def rows(self) -> dict[str, Any]:
        """Return what was scored: labels, gold label numbers and texts, where rows have one label each."""
        if self.data.kind != "classification":
            return {}
        scored = getattr(self.data, self.split)
        number = {label: i for i, label in enumerate(self.data.labels)}
        pairs = scored.text_pair
        texts = [t if pairs is None else f"{t} / {pairs[i]}" for i, t in enumerate(scored.text)]
        return {"labels": list(self.data.labels), "gold": [number[x] for x in scored.label or ()], "texts": texts}

    # -- learning rates --------------------------------------------------------------------------------------------

    def search(self, methods: Sequence[str]) -> None:
        """Halve the rates of every method; a rung counts only if every method ended it."""
        alive = {method: list(FACTORS) for method in methods}
        try:
            for keep, rows in RUNGS:
                alive = {m: factors[:keep] for m, factors in alive.items()}
                self._rung(alive, rows)
                alive = {m: self._ranked(m, factors, rows) for m, factors in alive.items()}
        except OutOfTime:
            self.cut.append("the search of learning rates ran out of time: only what every method tried counts")

    def _rung(self, alive: dict[str, list[float]], rows: int) -> None:
        todo = [(m, f) for m, factors in alive.items() for f in factors
                if not self.book.has("search", method=m, factor=f, rows=rows)]  # fmt: skip
        small = self._part(rows)
        adapters = [(m, f) for m, f in todo if m != FULL]
        if adapters:
            candidates = [Candidate(method=m, lr=rate(m, f, self.base)) for m, f in adapters]
            report = Deadline(self.searching, hopeless=True)
            try:
                with trained_together(self.base, small, candidates, 1, report, score_start=False) as found:
                    if found.stopped is not None:
                        raise found.stopped
                    for (m, f), run in zip(adapters, found.runs):
                        self._tried(m, f, rows, run and run.state.history, run and run.own.metric,
                                    found.seconds / len(todo))  # fmt: skip
            except OutOfTime:
                if report.per_row is not None:  # the runs of the seeds are still fitted into what is left
                    self.book.add({"stage": "speed", "per_row": report.per_row})
                raise
        for m, f in todo:
            if m == FULL:
                began, report = time.monotonic(), Deadline(self.searching, hopeless=True)
                with trained_whole(self.base, small, report=report, lr=rate(m, f, self.base), epochs=1) as run:
                    self._tried(m, f, rows, run.history, run.metric, time.monotonic() - began)

    def _tried(self, method: str, factor: float, rows: int, history: Any, metric: Any, seconds: float) -> None:
        value = None if history is None else rank(history.epochs[-1], metric)
        lr = rate(method, factor, self.base)
        per_row = None if history is None else history.seconds / max(1, history.rows)
        self.book.add({"stage": "search", "method": method, "factor": factor, "rows": rows, "lr": lr,
                       "validation": value, "seconds": seconds, "per_row": per_row})  # fmt: skip
        self.say(f"search {method} lr={lr:g}, {rows} rows: {'failed' if value is None else f'{value:.4f}'}")

    def _ranked(self, method: str, factors: Sequence[float], rows: int) -> list[float]:
        known = {r["factor"]: r["validation"] for r in self.book.find("search", method=method, rows=rows)}
        return sorted(factors, key=lambda f: -1e9 if known[f] is None else known[f], reverse=True)

    def _part(self, rows: int, held: int = HELD) -> Data:
        splits = {
            "train": self.data.train.select(range(min(rows, len(self.data.train)))),
            "validation": self.data.validation.select(range(min(held, len(self.data.validation)))),
            "test": self.data.test.select([]),
        }
        return replace(self.data, **splits, digest=digest_of(self.data.kind, splits))

    def chosen(self, methods: Sequence[str]) -> dict[str, float]:
        """Return each method's rate: the best of the last rung that all methods ended, else its default."""
        found = dict.fromkeys(methods, 1.0)
        for keep, rows in RUNGS:
            tried = {m: list(self.book.find("search", method=m, rows=rows)) for m in methods}
            if any(len(many) < min(keep, len(FACTORS)) for many in tried.values()):
                break
            found = {m: self._ranked(m, [r["factor"] for r in many], rows)[0] for m, many in tried.items()}
        return {m: rate(m, f, self.base) for m, f in found.items()}

    # -- seeds -----------------------------------------------------------------------------------------------------

    def plan(self) -> dict[str, Any]:
        """Return epochs and training rows of the seeds' runs, {} before they are settled."""
        settled = next(self.book.find("plan"), None)
        return {} if settled is None else {k: settled[k] for k in ("run_epochs", "run_rows")}

    def _settle(self, methods: Sequence[str], seeds: int) -> tuple[int, int]:
        """Fit epochs, then rows, into what is left of the budget; as many for every method."""
        if not self.plan():
            epochs, rows = self.epochs, len(self.data.train)
            left = self.ends - time.monotonic()
            while self._predicted(methods, epochs, rows) * seeds > left and epochs > 1:
                epochs -= 1
            while self._predicted(methods, epochs, rows) * seeds > left and rows > LEAST:
                rows = max(LEAST, int(rows * 0.8))
            if (epochs, rows) != (self.epochs, len(self.data.train)):
                self.cut.append(f"to fit the budget every run has at most {epochs} of {self.epochs} epochs over {rows} "
                                f"of {len(self.data.train)} training rows")  # fmt: skip
            self.book.add({"stage": "plan", "run_epochs": epochs, "run_rows": rows})
        found = self.plan()
        return found["run_epochs"], found["run_rows"]

    def _predicted(self, methods: Sequence[str], epochs: int, rows: int) -> float:
        """Return seconds of one seed of all methods, by the speed of its search, or of any."""
        scored = (epochs + 1) * len(self.data.validation) + len(getattr(self.data, self.split))
        total, known = 0.0, [r["per_row"] for stage in ("search", "speed") for r in self.book.find(stage)
                             if r["per_row"]]  # fmt: skip
        usual = sum(known) / len(known) if known else 0.0
        for method in methods:
            speed = [r["per_row"] for r in self.book.find("search", method=method) if r["per_row"]]
            total += (epochs * rows + SCORING * scored) * (sum(speed) / len(speed) if speed else usual)
        return total

    def finals(self, methods: Sequence[str], seeds: int) -> None:
        """Train every method with its rate, a seed of all adapters in one pass, then full fine-tuning."""
        rates = self.chosen(methods)
        epochs, rows = self._settle(methods, seeds)
        data = self.data if rows == len(self.data.train) else replace(
            self.data, train=self.data.train.select(range(rows)), digest=f"{self.data.digest}/{rows}"
        )  # fmt: skip
        for seed in range(seeds):
            todo = [m for m in methods if not self.book.has("final", method=m, seed=seed)]
            if seed and todo and time.monotonic() + 0.8 * self._predicted(todo, epochs, rows) > self.ends:
                self.cut.append(f"no time for seed {seed}: {len(todo)} methods have one run less")
                return
            self._seed([m for m in todo if m != FULL], rates, seed, epochs, data)
            if FULL in todo:
                self._whole(rates[FULL], seed, epochs, data)

    def _seed(self, methods: Sequence[str], rates: dict[str, float], seed: int, epochs: int, data: Data) -> None:
        if not methods:
            return
        candidates = [Candidate(method=m, lr=rates[m], seed=seed) for m in methods]
        scoring = SCORING * len(getattr(data, self.split)) * self._predicted(methods, 1, 1) / (1 + SCORING * (
            2 * len(data.validation) + len(getattr(data, self.split))))  # fmt: skip
        with trained_together(self.base, data, candidates, epochs, Deadline(self.ends - scoring)) as found:
            stage = "final" if found.stopped is None else "partial"
            for method, run in zip(methods, found.runs):
                if run is None:
                    self.cut.append(f"{method} seed {seed}: its loss was not finite")
                else:
                    self._record(stage, method, run, seed, rates[method])
        if found.stopped is not None:
            self.cut.append(f"seed {seed} was ended early: every adapter has its best epoch until then")
            raise found.stopped

    def _whole(self, lr: float, seed: int, epochs: int, data: Data) -> None:
        with trained_whole(self.base, data, report=Deadline(self.ends), lr=lr, seed=seed, epochs=epochs) as run:
            assert run.scores is not None
            adapter = self.base.adapters[run.name]
            examples = self._examples(run.name)
            scores, told = answers(self.base, run.name, adapter.task, adapter.head, examples)
            weights = sum(p.numel() * p.element_size() for p in self.base.model.parameters())
            self._write("final", FULL, run.name, scores, told, seed, lr, run.history, run.history.seconds,
                        4 * run.parameters, run.parameters, memory=6 * weights)  # fmt: skip

    def _examples(self, name: str) -> Any:
        from onebase.examples import encode_rows

        return encode_rows(self.base, self.base.adapters[name].task, getattr(self.data, self.split),
                           self.base.tokenizer_of(name))  # fmt: skip

    def _record(self, stage: str, method: str, run: Prepared, seed: int, lr: float) -> None:
        adapter = run.adapter
        examples = run.examples[self.split]
        if not self.book.has("final", method=HEAD):
            scores, told = answers(self.base, None, adapter.task, adapter.base_head, examples.for_base)
            self.book.add(self._facts("final", HEAD, scores, told, seed=0, lr=None, seconds=0.0, parameters=0,
                                      share=0.0, bytes=0, mergeable=False, curve=[], forgetting=None,
                                      **self._plain(adapter.name)))  # fmt: skip
        scores, told = answers(self.base, adapter.name, adapter.task, adapter.head, examples)
        stored = sum(t.numel() * t.element_size() for t in adapter.folded_tensors().values())
        cost = next(self.book.find("alone", method=method), None)
        if cost is None:
            taken = alone(self.base, self._part(256, 32), method, lr)
            cost = {"stage": "alone", "method": method, **asdict(taken)}
            self.book.add(cost)
        seconds = cost["seconds_per_row"] * run.state.history.rows
        self._write(stage, method, adapter.name, scores, told, seed, lr, run.state.history, seconds, stored,
                    adapter.count(), memory=cost["memory"])  # fmt: skip

    def _write(
        self, stage: str, method: str, name: str, scores: Any, told: dict[str, Any], seed: int, lr: float, history: Any,
        seconds: float, stored: int, parameters: int, memory: int,
    ) -> None:  # fmt: skip
        self.say(f"{method} seed {seed}: {scores.metric} {scores.value:.4f}")
        measured = next((r for r in self.book.find("final", method=method) if r.get("latency")), None)
        keys = ("latency", "throughput", "slowdown", "merged_latency", "merged_throughput")
        speed = speeds(self.base, name, self.data) if measured is None else {k: measured[k] for k in keys}
        if method == FULL:
            speed["slowdown"] = 1.0
        total = sum(p.numel() for p in self.base.model.parameters())
        self.book.add(self._facts(
            stage, method, scores, told, seed=seed, lr=lr, seconds=seconds, parameters=parameters,
            share=parameters / total, bytes=stored, mergeable=self.base.adapters[name].method.mergeable,
            curve=history.epochs, forgetting=forgetting(self.base, name, self.before), memory=memory, **speed,
        ))  # fmt: skip

    def _plain(self, name: str) -> dict[str, Any]:
        found = speeds(self.base, name, self.data)
        return {"latency": found["plain_latency"], "throughput": found["plain_throughput"], "slowdown": 1.0}

    def _facts(self, stage: str, method: str, scores: Any, told: dict[str, Any], **more: Any) -> dict[str, Any]:
        # an accuracy is the mean of right answers; the rows of its scores are labels, for macro F1
        told_right = scores.metric == "accuracy" or scores.rows is None
        rows = [float(c) for c in scores.correct] if told_right or scores.rows is None else scores.rows.tolist()
        numbers = {k: v for k, v in scores.metrics.items() if isinstance(v, (int, float))}
        return {"stage": stage, "method": method, "metric": scores.metric, "value": scores.value, "rows": rows,
                "metrics": numbers, **told, **more}  # fmt: skip


def rate(method: str, factor: float, base: Base) -> float:
    """Return a multiple of a method's default learning rate, three digits."""
    default = RATES[1] if method == FULL else settings_for(parse_method(method), {}, base.anatomy.hidden_size).lr
    return float(f"{default * factor:.3g}")


def document(found: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON values, with the bytes that its tasks take by each method."""
    import json

    values = {**asdict(found), "folder": str(found.folder)}
    for result in values["results"]:
        own = result["bytes"] * found.tasks
        result["total_bytes"] = own if result["method"] == FULL else found.base_bytes + own
    return json.loads(json.dumps(values))
