"""`train`: data in, a stored adapter out, with the base's own score beside it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.adapter import Adapter
from onebase.data import Data
from onebase.evaluation import Evaluation, evaluate_examples
from onebase.methods.method import Method
from onebase.processes import active, is_sharded, together
from onebase.statistics import PairedTest
from onebase.storing import describe
from onebase.training.job import History
from onebase.training.kernels import Kernels, choose_kernels
from onebase.training.loop import Reporter, fit
from onebase.training.prepare import Prepared, discard, label_counts, prepare
from onebase.training.settings import Settings
from onebase.training.sharing import agreed, settle
from onebase.training.tracking import Tracked, root_of, tracked

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store import Store, Stored


@dataclass(eq=False)
class Run:
    """What training gave.

    Attributes:
        name: the adapter's name on the base; it stays attached.
        ref: name@version in the store, '' when it was not stored.
        method: shorthand of the method.
        kind: task kind.
        split: the rows that were scored: test, or validation where there is no test split.
        metric: name of the main metric, such as accuracy; `value` and `base_value` are of it.
        metrics: the adapter's metrics on them.
        base_metrics: the base's own metrics on the same rows: head only on the frozen base, or the plain base's
            perplexity.
        interval: 95 % interval of the adapter's main metric, (low, high).
        base_interval: that of the base's own.
        test: paired test, adapter against base; None where the base has no score of its own.
        parameters: trained values, head included.
        share: the same over the base's values, 0 to 1.
        bytes: size of the stored tensors, 0 when not stored.
        history: what happened in training.
        settings: how it was trained.
        labels: of the task, in order; () where it has none.
        notes: what the user should know about data and choices.
        scores: the evaluation with the scores of every row; it is not stored.
    """

    name: str
    ref: str
    method: str
    kind: str
    split: str
    metric: str
    metrics: dict[str, Any]
    base_metrics: dict[str, Any]
    interval: tuple[float, float]
    base_interval: tuple[float, float]
    test: PairedTest | None
    parameters: int
    share: float
    bytes: int
    history: History
    settings: Settings
    labels: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    scores: Evaluation | None = field(default=None, repr=False)

    @property
    def value(self) -> float:
        """The adapter's main metric."""
        return float(self.metrics[self.metric])

    @property
    def base_value(self) -> float:
        """The base's main metric."""
        return float(self.base_metrics[self.metric])


def train(
    base: Base,
    data: Data | str | Path | Any,
    method: str | Method | None = None,
    *,
    name: str | None = None,
    task: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    template: str | None = None,
    pooling: str | None = None,
    store: Store | None = None,
    report: Reporter | None = None,
    provenance: dict[str, Any] | None = None,
    resume: bool = False,
    init_from: str | None = None,
    remember: dict[str, Any] | None = None,
    track: str | Sequence[str] | None = None,
    **settings: Any,
) -> Run:
    """Train one adapter and, when it has a name, store it as the next version.

    Args:
        base: the base; nothing of it changes.
        data: a file, a folder of splits, a DataFrame, a list of rows, or what `load_data` returned.
        method: a method or its shorthand; LoRA, or the method of `init_from`, by default.
        name: stores `name@version` and attaches the adapter under this name; None attaches it under the method's
            name and stores nothing.
        task: a kind, see `onebase.tasks.task_kinds`; found from the data by default.
        text, text_pair, label, prompt, completion: columns; found by default. Those of further roles are named alike:
            score=, query=, source=, messages=, ...
        limit: the most rows of each split (a stratified sample); None takes all.
        max_length: tokens per row; what the base takes, at most 512, or blocks of 256 for plain text.
        template: e.g. ``"Review: {text}"`` or ``"{prompt}\\n{completion}"``; for conversations "chatml" or a Jinja
            template, the tokenizer's own by default.
        pooling: 'mean', 'first' or 'last'; the family's by default.
        store: where to store; the user's store by default.
        report: receives progress.
        provenance: further facts to keep with the stored adapter.
        resume: go on with the interrupted run that would have been stored as `name`, from its last checkpoint: the
            final weights are those of an uninterrupted run, bit by bit. Without a checkpoint it starts over.
        init_from: a stored adapter, ``"reviews@3"``, to start from: with new data, and with labels that the data adds.
        remember: further facts that checkpoints keep, JSON values.
        track: also report to 'tensorboard' (files in the store's folder `tracking`), 'wandb' or 'mlflow', or several.
        settings: see `Settings`: lr, epochs, batch_size, seed, ...; and the options of the task, such as
            class_weights or windows (see `onebase.tasks`), and the columns of further roles (`onebase.data.ROLES`).

    Where a launcher such as torchrun started several processes they train one adapter together: all call this with
    the same arguments, each computes a share of every step's rows, and the first one reports and stores.

    Returns:
        The run. The adapter stays attached, with the epoch that the setting `restore` keeps.

    Raises:
        DataError, ConfigError, UnsupportedError: before any training.
        TrainingError: the loss became infinite or NaN.
    """
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(together(is_sharded(base.model)))
        report = (report if processes.first else None) or Reporter()
        report = stack.enter_context(tracked(track, report, name or "run", root_of(store), processes.first))
        prepared = prepare(
            base, report, data=data, method=method, name=name, task=task, text=text, text_pair=text_pair, label=label,
            prompt=prompt, completion=completion, limit=limit, max_length=max_length, template=template,
            pooling=pooling, store=store, provenance=provenance, resume=resume, init_from=init_from,
            remember=remember, **settings,
        )  # fmt: skip
        try:
            kernels = kernels_for(base, [prepared])
            settle(base, [prepared])
            if isinstance(report, Tracked):
                report.configure([prepared])
            fit(base, prepared.state, kernels, report, prepared.checkpoint, [prepared.examples["validation"]])
            run = conclude(base, prepared)
            if isinstance(report, Tracked):
                report.result(run)
            return run
        except BaseException:
            discard(base, prepared)
            raise


def kernels_for(base: Base, runs: Sequence[Prepared]) -> Kernels:
    """Choose how runs compute together: as an interrupted one did, else as is fastest for the first of them."""
    first = runs[0]
    memory = None if first.stored is None else first.store.root / "measured.json"  # what is not stored leaves nothing
    kernels = next((run.kernels for run in runs if run.kernels), None) or choose_kernels(
        base, first.adapter, first.examples["train"], first.state.settings, memory
    )
    kernels = agreed(base, kernels)
    for run in runs:
        if run.checkpoint is not None:
            run.checkpoint.facts["kernels"] = kernels.facts()
    return kernels


def conclude(base: Base, prepared: Prepared, stored: Stored | None = None) -> Run:
    """Score a trained adapter beside its base, give it its name, and store it.

    Args:
        base: the base.
        prepared: a run whose last step was taken.
        stored: the version under which it was stored before, by a pass that was then interrupted; None: it was not.
    """
    adapter, examples = prepared.adapter, prepared.examples
    if prepared.attached in base.adapters:
        base.remove(prepared.attached)
    base._rename(adapter, prepared.attached)
    split = "test" if len(examples["test"]) else "validation"
    adapter.fold()
    result = evaluate_examples(base, adapter.name, examples[split], split, own=prepared.own)
    run = _result(base, prepared, result)
    if stored is not None:
        _point(run, stored)
    elif prepared.stored is not None:
        facts = {**prepared.provenance, **(prepared.parent.facts() if prepared.parent else {})}
        _store(base, adapter, run, prepared.data, prepared.store, facts)
        assert prepared.checkpoint is not None
        prepared.checkpoint.remove()
    return run


def _result(base: Base, prepared: Prepared, result: Evaluation) -> Run:
    adapter, data, examples, state = prepared.adapter, prepared.data, prepared.examples, prepared.state
    spec = adapter.task
    assert result.base is not None
    notes = list(data.notes)
    cut = examples["train"].cut
    if cut:
        notes.append(f"{cut} of {examples['train'].units} training rows were cut to {spec['max_length']} tokens.")
    if examples["train"].units < len(examples["train"]):
        notes.append(
            f"{len(examples['train'])} windows of at most {spec['max_length']} tokens were made of "
            f"{examples['train'].units} training rows, some of which are longer."
        )
    notes += examples["train"].facts.get("notes", ())
    parameters = adapter.count()
    total = sum(p.numel() for p in base.model.parameters())
    return Run(
        name=adapter.name,
        ref="",
        method=adapter.method.shorthand(),
        kind=spec["kind"],
        split=result.split,
        metric=result.adapter.metric,
        metrics=result.adapter.metrics,
        base_metrics=result.base.metrics,
        interval=result.adapter.interval,
        base_interval=result.base.interval,
        test=result.test,
        parameters=parameters,
        share=parameters / total,
        bytes=0,
        history=state.history,
        settings=state.settings,
        labels=adapter.labels,
        notes=notes,
        scores=result,
    )


def _store(base: Base, adapter: Adapter, run: Run, data: Data, store: Store, provenance: dict[str, Any]) -> None:
    from importlib.metadata import version

    facts = {
        "data": {"name": data.source, "digest": data.digest, "columns": data.columns},
        "rows": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        "settings": run.settings.plain(),
        "seed": run.settings.seed,
        **({"label_counts": dict(label_counts(data))} if data.labels else {}),
        "epochs": run.history.epochs,
        "best_epoch": run.history.best,
        "seconds": round(run.history.seconds, 2),
        "measured": run.history.notes,
        "versions": {p: version(p) for p in ("torch", "transformers", "onebase")},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **provenance,
    }
    metrics: dict[str, Any] = {
        "split": run.split,
        "metric": run.metric,
        "adapter": _numbers(run.metrics) | {"interval": list(run.interval)},
        "base": _numbers(run.base_metrics) | {"interval": list(run.base_interval)},
    }
    if run.test is not None:
        metrics["test"] = {
            "name": run.test.test,
            "difference": run.test.difference,
            "interval": [run.test.low, run.test.high],
            "p_value": run.test.p_value,
        }

    def save() -> tuple[str, int]:
        stored = base.save(adapter.name, store=store, provenance=facts, metrics=metrics)
        return stored.ref, _size(stored)

    processes = active()
    if processes.sharded and not processes.first:
        describe(base, adapter)  # the probes of what is stored need every process
    run.ref, run.bytes = processes.only_first(save)


def _point(run: Run, stored: Stored) -> None:
    run.ref, run.bytes = stored.ref, _size(stored)


def _size(stored: Stored) -> int:
    return (stored.path / "adapter_model.safetensors").stat().st_size


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the single numbers among metrics: tables per label are for the result, not for the stored file."""
    return {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
