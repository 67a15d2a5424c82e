"""`compare`: every method on the same rows under one budget: halving on validation, seeds, then the test rows once."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onebase.comparison.advice import FULL, HEAD, Advice, Limits, Result, recommend
from onebase.comparison.engines import Engine, Here
from onebase.comparison.finals import finals
from onebase.comparison.planning import default_methods
from onebase.comparison.records import Book
from onebase.comparison.results import summarize
from onebase.comparison.schedule import FACTORS, Schedule, fit
from onebase.comparison.searching import search
from onebase.comparison.together import Interrupted, Interrupts
from onebase.comparison.work import Work
from onebase.data.load import taken
from onebase.errors import ConfigError, UnsupportedError
from onebase.methods.registry import parse_method
from onebase.training.full import check_trainable

if TYPE_CHECKING:
    from onebase.base import Base

WARMING = 0.2  # share of the budget after which methods that were not measured are taken for average


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
    epochs: int = 5, limit: int | None = None, command: str = "", ray: bool = False, seed: int = 0, **reading: Any,
) -> Comparison:  # fmt: skip
    """Compare methods on one data set under equal budgets.

    A few steps of every method are measured first, and what fits the budget is planned from that: rates are found by
    successive halving on validation, all adapters in one pass; then every method is trained with every seed, all
    adapters of a seed in one pass, and each of these runs scores the test rows once. Epochs and rows are the same for
    all methods. Where time ends in the middle of a pass, all its runs are scored where they are. Everything finished
    is a line of `records.jsonl` in the folder.

    Ctrl-C ends the pass after its step and gives the results of what is there; a second one leaves at once.

    Args:
        base: the base; nothing of it changes.
        data: what `load_data` takes.
        folder: where records go.
        methods: shorthands; "full" is full fine-tuning. By default full fine-tuning and every registered method that
            the base carries. The base's own head, "head", is always among the results.
        seeds: runs of each method.
        budget: seconds in all; what does not fit is left out and said.
        limits: what the recommended method may cost.
        resume: go on with the records that are there, under their plan; those of the same data, base and settings
            count. The budget is for what is left.
        say: receives sentences.
        epochs: passes over the training rows, at most; every method stops early by the same rule.
        limit: most rows of each split.
        command: what the user typed, for the report.
        seed: the first of the seeds.
        ray: train every candidate as a task of its own on Ray's workers, which load the base by its name.
        reading: what else `load_data` takes: task=, columns by role such as label="toxic", encoding= ...

    Returns:
        The results per method, what was cut to fit the budget, and the recommendation. Records are in the folder.

    Raises:
        ConfigError: the folder has records and `resume` is not given, or no method has any result.
    """
    if base.adapters:
        raise ConfigError(f"compare needs a base without adapters: remove {', '.join(base.adapters)}")
    began = time.monotonic()
    found = taken(data, limit=limit, **reading)
    wanted = list(methods) if methods else [FULL, *(m.shorthand() for m in default_methods())]
    kept, refused = carried(base, [method for method in wanted if method not in ("head", HEAD)])
    if not kept:
        why = "; ".join(refused) or "the base's own head is what methods are compared with, so name one more"
        raise ConfigError(f"no method is left to compare: {why}")
    identity = {
        "data": found.digest, "base": base.id, "fingerprint": base.fingerprint(), "epochs": epochs,
        "factors": list(FACTORS), "dtype": str(next(base.model.parameters()).dtype),
    }  # fmt: skip
    cut = list(refused)
    with Interrupts(say) as stop:
        work = Work(base, found, Book(Path(folder), resume, identity), stop, say)
        try:
            with _engine(work, ray) as engine:
                for sentence in _steps(work, kept, range(seed, seed + seeds), epochs, began, budget, engine):
                    cut.append(sentence)
                    say(sentence)
                stop.check()
        except (Interrupted, KeyboardInterrupt):
            if not _trained(work):
                raise KeyboardInterrupt from None
            cut.append("interrupted: what was finished counts; --resume goes on")
    results = summarize(work.book.records, work.rows())
    if not _trained(work):
        raise ConfigError(f"budget = {budget:.0f} s: no method was trained; give more time, or fewer rows or methods")
    settled = list(work.book.find("plan"))[-1]
    return Comparison(
        base=base.id, data=found.source, kind=found.kind, metric=results[0].metric, results=tuple(results),
        advice=recommend(results, limits), cut=tuple(cut), folder=Path(folder),
        base_bytes=sum(p.numel() * p.element_size() for p in base.model.parameters()),
        tasks=limits.tasks if limits else 1, labels=found.labels,
        settings={"seeds": seeds, "seed": seed, "budget": budget, "methods": kept, "split": work.split, **identity,
                  "rungs": settled["rungs"], "run_epochs": settled["epochs"], "run_rows": settled["rows"]},
        versions=versions(), machine={"threads": torch.get_num_threads(), "cores": os.cpu_count(),
                                      "device": str(base.device)},
        search=tuple(work.book.find("search")), command=command,
    )  # fmt: skip


def _steps(
    work: Work, methods: Sequence[str], seeds: range, epochs: int, began: float, budget: float, engine: Engine
) -> Iterator[str]:
    """Warm up, plan, search and train; yield sentences on what was cut."""
    ends = began + budget
    work.warm_up(methods, began + WARMING * budget)

    def planned(searched: Any = None) -> Schedule:
        costs = work.costs(methods, engine.workers)
        found = fit(costs, methods, work.sizes, ends - time.monotonic(), epochs, len(seeds), searched)
        work.book.add(found.record())
        return found

    plans = list(work.book.find("plan"))
    schedule = Schedule.of(plans[-1]) if plans else planned()
    work.say(schedule.sentence())
    if not work.book.has("rate"):
        yield from search(work, methods, schedule, engine, seeds[0])
        schedule = planned(schedule.rungs)  # by now it is known what passes take
        work.say(schedule.sentence())
    yield from schedule.cut
    yield from finals(work, methods, seeds, schedule, engine, ends)


def _engine(work: Work, ray: bool) -> AbstractContextManager[Engine]:
    """Return what makes the passes."""
    if not ray:
        return nullcontext(Here(work))
    from onebase.comparison.on_ray import on_ray

    return on_ray(work)


def _trained(work: Work) -> bool:
    """Whether a method has a result, beside the base's own head."""
    return any(r["method"] != HEAD for stage in ("final", "partial") for r in work.book.find(stage))


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
            if method == FULL:
                check_trainable(base)
            else:
                base.add("candidate", parse_method(method))
                base.remove("candidate")
            kept.append(method)
        except UnsupportedError as error:
            refused.append(f"{method}: not on this base: {error}")
    return kept, refused


def document(found: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON values, with the bytes that its tasks take by each method."""
    import json

    values = {**asdict(found), "folder": str(found.folder)}
    for result in values["results"]:
        own = result["bytes"] * found.tasks
        result["total_bytes"] = own if result["method"] == FULL else found.base_bytes + own
    return json.loads(json.dumps(values))
