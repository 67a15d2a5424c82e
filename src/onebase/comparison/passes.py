"""What one pass of a comparison trains, and the records that it leaves: of rates that are tried, or of a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.adapter import Adapter
from onebase.build import new_head
from onebase.comparison.advice import FULL, HEAD
from onebase.comparison.forgetting import forgetting
from onebase.comparison.measuring import answers, speeds
from onebase.comparison.together import Candidate, Deadline, rank, trained_together
from onebase.comparison.work import Work
from onebase.core.contracts import AdapterModule
from onebase.methods.method import Method
from onebase.training.full import Full
from onebase.training.loop import Reporter
from onebase.training.prepare import Prepared, discard, prepare

if TYPE_CHECKING:
    from onebase.base import Base

SPEEDS = ("latency", "throughput", "slowdown", "merged_latency", "merged_throughput")


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Candidates that are trained side by side.

    Attributes:
        stage: 'search' or 'final'.
        candidates: what is trained; full fine-tuning is alone in its pass.
        factors: of a search: the rates over the default ones.
        epochs, rows, held: passes over so many training rows, validation rows.
        measured: methods whose answers are timed.
        closing: seconds that are kept for scoring when training is over.
    """

    stage: str
    candidates: tuple[Candidate, ...]
    factors: tuple[float, ...] = ()
    epochs: int = 1
    rows: int
    held: int
    measured: tuple[str, ...] = ()
    closing: float = 0.0

    @property
    def methods(self) -> list[str]:
        """The method of each candidate."""
        return [c.method for c in self.candidates]

    def place(self, folder: Path | None) -> Path | None:
        """Return the file to which the pass writes its state if it ends early, None where it starts over."""
        if folder is None or self.stage == "search":
            return None
        key = json.dumps([[asdict(c) for c in self.candidates], self.epochs, self.rows, self.held])
        return folder / "passes" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def run_pass(work: Work, one: Pass, ends: float) -> Iterator[dict[str, Any]]:
    """Train the candidates and yield their records; a pass that time or Ctrl-C ends yields what each has reached.

    Args:
        work: the comparison.
        one: the pass.
        ends: time.monotonic() at which scoring must be over, too.
    """
    final = one.stage == "final"
    data = work.part(one.rows, one.held, final)
    report = Deadline(ends - one.closing, work.stop)
    whole = one.methods == [FULL]
    with trained_together(
        work.base, data, one.candidates, one.epochs, report, score_start=final, place=one.place(work.book.folder),
        kernels=work.kernels.get(whole), shared=work.shared,
    ) as found:  # fmt: skip
        for number, (candidate, run) in enumerate(zip(one.candidates, found.runs)):
            if final:
                yield from _final(work, one, candidate, run, found.stopped is None)
            else:
                yield _tried(candidate, one.factors[number], one.rows, run)
        left = [run for run in found.runs if run is not None]
        scored = one.held * max((len(run.state.history.epochs) - (not final) for run in left), default=0)
        yield work.record_of_pass(one.methods, found, scored)


def _tried(candidate: Candidate, factor: float, rows: int, run: Prepared | None) -> dict[str, Any]:
    """Return the record of a rate: its score on validation at the last point that the whole pass reached."""
    history = None if run is None else run.state.history
    return {
        "stage": "search", "method": candidate.method, "factor": factor, "lr": candidate.lr, "rows": rows,
        "reached": rows if history is None else history.rows,
        "validation": None if run is None else rank(run.state.history.epochs[-1], run.own.metric),
    }  # fmt: skip


# -- the runs of a seed ------------------------------------------------------------------------------------------------


def _final(work: Work, one: Pass, candidate: Candidate, run: Prepared | None, whole: bool) -> Iterator[dict[str, Any]]:
    facts = {"method": candidate.method, "seed": candidate.seed, "lr": candidate.lr}
    if run is None:
        yield {"stage": "failed", **facts}
        return
    base, adapter, history = work.base, run.adapter, run.state.history
    scores, told = answers(base, adapter.name, adapter.task, adapter.head, run.examples[_scored(work, one)])
    speed = speeds(base, adapter.name, work.data) if candidate.method in one.measured else {}
    total = sum(p.numel() for p in base.model.parameters())
    if candidate.method == FULL:
        stored, cost = 4 * adapter.count(), next(work.book.find("alone", method=FULL), {})
        speed |= {"slowdown": 1.0} if speed else {}  # the base it was timed against is trained, too
    else:
        stored = sum(t.numel() * t.element_size() for t in adapter.folded_tensors().values())
        cost = work.cost(candidate.method)
    per_row = cost.get("seconds_per_row", history.seconds / max(1, history.rows))
    yield {
        "stage": "final" if whole else "partial", **facts, **_scores(scores), **told,
        "seconds": per_row * history.rows, "parameters": adapter.count(), "share": adapter.count() / total,
        "bytes": stored, "mergeable": adapter.method.mergeable, "curve": history.epochs, "seen": history.rows,
        "forgetting": forgetting(base, adapter.name, work.before), "memory": cost.get("memory"),
        **{key: speed.get(key) for key in SPEEDS},
    }  # fmt: skip


def _scored(work: Work, one: Pass) -> str:
    """Return which split of a part holds the rows that are scored."""
    whole = work.part(one.rows, one.held, True) is work.data
    return work.split if whole else "test"


def _scores(scores: Any) -> dict[str, Any]:
    # an accuracy is the mean of right answers; the rows of its scores are labels, for macro F1
    told_right = scores.metric == "accuracy"
    rows = [float(c) for c in scores.correct] if told_right or scores.rows is None else scores.rows.tolist()
    numbers = {k: v for k, v in scores.metrics.items() if isinstance(v, (int, float))}
    return {"metric": scores.metric, "value": scores.value, "rows": rows, "metrics": numbers}


def own_record(work: Work, rows: int, held: int) -> dict[str, Any]:
    """Score the base with its own head, which is fitted on the same rows as the methods are trained on."""
    base = work.base
    run = prepare(base, Reporter(), data=work.part(rows, held, True), method=Full(), build=_bare, shared=work.shared)
    try:
        adapter = run.adapter
        split = _scored(work, Pass(stage="final", candidates=(), rows=rows, held=held))
        scores, told = answers(base, None, adapter.task, adapter.base_head, run.examples[split].for_base)
        taken = speeds(base, adapter.name, work.data)
        count, values = adapter.count(), sum(p.numel() for p in base.model.parameters())
        kept = (tensor for name, tensor in adapter.tensors().items() if name.startswith("base_head."))
        return {
            "stage": "final", "method": HEAD, "seed": 0, "lr": None, **_scores(scores), **told, "seconds": 0.0,
            "parameters": count, "share": count / values, "bytes": sum(tensor.nbytes for tensor in kept),
            "mergeable": False, "curve": [], "forgetting": None, "memory": None, "latency": taken["plain_latency"],
            "throughput": taken["plain_throughput"], "slowdown": 1.0, "merged_latency": None, "merged_throughput": None,
        }  # fmt: skip
    finally:
        discard(base, run)


def _bare(base: Base, name: str, method: Method, task: dict[str, Any], seed: int, **_: Any) -> Adapter:
    """Build an adapter that changes nothing, for the head that is fitted beside it."""
    adapter = Adapter(name, method, AdapterModule({}), task)
    adapter.head = new_head(base, task)
    return adapter
