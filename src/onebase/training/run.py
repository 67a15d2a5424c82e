"""`train`: data in, a stored adapter out, with the base's own score beside it."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onebase.adapter import Adapter
from onebase.build import build_adapter, default_task
from onebase.data import Data, load
from onebase.data.columns import ROLE_NAMES
from onebase.errors import ConfigError, DataError
from onebase.evaluation import Evaluation, evaluate_examples, score, score_base, with_extras
from onebase.examples import encode, run_examples
from onebase.methods.method import Method
from onebase.methods.registry import parse_method
from onebase.statistics import PairedTest
from onebase.tasks import Examples, Scores, Task, get_task
from onebase.tasks.task import choose_option
from onebase.training.loop import Checked, History, Reporter, fit
from onebase.training.settings import Settings, settings_for

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store import Store

DEFAULT_METHOD = "lora"
KEPT_BASELINES = 4  # heads on frozen vectors that a base remembers


@dataclass(eq=False)
class Run:
    """What training gave.

    Attributes:
        name: the adapter's name on the base; it stays attached.
        ref: name@version in the store, '' when it was not stored.
        method: shorthand of the method.
        kind: task kind.
        split: the rows that were scored: test, or validation where there is no test split.
        metrics: the adapter's metrics on them.
        base_metrics: the base's own metrics on the same rows: head only on the frozen base, or the plain base's
            perplexity.
        interval, base_interval: 95 % intervals of the main metric.
        test: paired test, adapter against base.
        parameters, share: trainable values, and their share of the base's.
        bytes: size of the stored tensors, 0 when not stored.
        history: what happened in training.
        settings: how it was trained.
        notes: what the user should know about data and choices.
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
    method: str | Method = DEFAULT_METHOD,
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
    **settings: Any,
) -> Run:
    """Train one adapter and, when it has a name, store it as the next version.

    Args:
        base: the base; nothing of it changes.
        data: a file, a folder of splits, a DataFrame, a list of rows, or what `load_data` returned.
        method: a method or its shorthand.
        name: stores `name@version` and attaches the adapter under this name; None attaches it under the method's
            name and stores nothing.
        task: 'classification', 'causal-lm', 'completion', 'seq2seq', 'chat', 'embeddings' ...; found from the data by
            default.
        text, text_pair, label, prompt, completion: columns; found by default.
        limit: use at most this many training rows.
        max_length: tokens per row; what the base takes, at most 512, or blocks of 256 for plain text.
        template: e.g. ``"Review: {text}"`` or ``"{prompt}\\n{completion}"``; for conversations "chatml" or a Jinja
            template, the tokenizer's own by default.
        pooling: 'mean', 'first' or 'last'; the family's by default.
        store: where to store; the user's store by default.
        report: receives progress.
        provenance: further facts to keep with the stored adapter.
        settings: see `Settings`: lr, epochs, batch_size, seed, ...; and the options of the task, such as
            class_weights or windows (see `onebase.tasks`), and the columns of further roles: source, target, messages,
            anchor, positive, negative, score.

    Returns:
        The run. The adapter stays attached, with its best epoch.

    Raises:
        DataError, ConfigError, UnsupportedError: before any training.
        TrainingError: the loss became infinite or NaN.
    """
    method = parse_method(method)
    report = report or Reporter()
    if name is not None:
        from onebase.store import Store

        (store or Store()).check(name)
    chosen_seed = settings.get("seed") or 0
    found = _load(
        data, task=task, text=text, text_pair=text_pair, label=label, prompt=prompt, completion=completion,
        limit=limit, seed=chosen_seed, **{role: settings.pop(role) for role in ROLE_NAMES if role in settings},
    )  # fmt: skip
    options = {key: settings.pop(key) for key in list(settings) if key in get_task(found.kind).options}
    spec = make_task(base, found, max_length=max_length, template=template, pooling=pooling, **options)
    chosen = settings_for(method.name, settings, base.anatomy.hidden_size)
    examples = encode(base, spec, found)
    if not len(examples["train"]) or not len(examples["validation"]):
        raise DataError(
            f"{found.source} leaves no rows for {'training' if not len(examples['train']) else 'validation'}"
        )
    attached = name or _free_name(base, method.name)
    old = base.adapters.get(attached)
    adapter = build_adapter(
        base, f"{attached} (training)", method, spec, chosen.seed, frequent=_frequent(examples["train"])
    )
    base._attach(adapter)
    try:
        own = _own_scores(base, adapter, examples, found, report)
        history = fit(base, adapter, examples["train"], _scorer(base, adapter, examples), chosen, report)
        _finish(base, adapter, examples["validation"])
    except BaseException:
        base.remove(adapter.name)
        raise
    if old is not None:
        base.remove(attached)
    base._rename(adapter, attached)
    split = "test" if len(examples["test"]) else "validation"
    adapter.fold()
    result = evaluate_examples(base, attached, examples[split], split, own=own)
    run = _result(base, adapter, method, spec, chosen, history, result, found, examples)
    if name is not None:
        _store(base, adapter, run, found, store, provenance or {})
    return run


def _load(data: Any, *, seed: int, **options: Any) -> Data:
    if isinstance(data, Data):
        given = [key for key, value in options.items() if value is not None]
        if given:
            raise ConfigError(f"{', '.join(given)} given with data that is already loaded: pass them to load_data")
        return data
    return load(data, seed=seed, **options)


def make_task(base: Base, data: Data, **given: Any) -> dict[str, Any]:
    """Return the spec of an adapter's task for this data.

    Args:
        base: the base.
        data: all splits.
        given: max_length, template, pooling and options of the task; None means the default.

    Raises:
        ConfigError: a length beyond what the base takes, an unknown pooling, a template without its places, an option
            that this task does not have.
        DataError, UnsupportedError: the data or the base does not fit the task.
    """
    given = {key: value for key, value in given.items() if value is not None}
    task = get_task(data.kind)
    for key in given.keys() - {"max_length", "template", "pooling"} - task.options.keys():
        choices = ", ".join(task.options) or "no options"
        raise ConfigError(f"{key} = {given[key]!r} has no meaning for {data.kind}, which has {choices}: leave it out")
    spec = default_task(base) | {"kind": data.kind, "labels": list(data.labels)}
    spec["pair"] = task.surface == "states" and data.train.text_pair is not None
    spec |= dict(task.options) | given | {"template": given.get("template", "")}
    longest = base.anatomy.stacks[0].position_limit
    if "max_length" in given and (spec["max_length"] < 4 or (longest is not None and spec["max_length"] > longest)):
        raise ConfigError(f"max_length = {spec['max_length']!r}: expected 4 to {longest or 'any number'} on this base")
    choose_option("pooling", spec["pooling"], ("mean", "first", "last"))
    if "pooling" in given and task.surface == "logits":
        raise ConfigError(f"pooling = {given['pooling']!r} has no effect on {data.kind} data: leave it out")
    spec = task.complete(spec, base, data, given)
    places = [*task.places, *(["text_pair"] if spec["pair"] and "text" in task.places else [])]
    missing = [place for place in places if spec["template"] and "{" + place + "}" not in spec["template"]]
    if missing or (spec["template"] and not places):
        raise ConfigError(f"template {spec['template']!r}: expected places for {places or 'nothing (plain text)'}")
    return spec


def _free_name(base: Base, stem: str) -> str:
    name, count = stem, 1
    while name in base.adapters:
        count += 1
        name = f"{stem}-{count}"
    return name


def _frequent(train: Examples) -> list[int]:
    """Token ids of the training rows, the most frequent first."""
    ids, counts = torch.tensor([i for row in train.rows for i in row.ids]).unique(return_counts=True)
    return ids[counts.argsort(descending=True, stable=True)].tolist()


def _own_scores(base: Base, adapter: Adapter, examples: dict[str, Examples], data: Data, report: Reporter) -> Scores:
    """Score the base alone: with a head that is fitted on its frozen states, from which the adapter's head starts.

    The base keeps the last few results, because several adapters are often trained on the same data.
    """
    spec = adapter.task
    key = (data.digest, json.dumps(spec, sort_keys=True, default=str))
    if key not in base._baselines:
        report.note("scoring the base alone" + (", with its own head on frozen vectors" if adapter.head else ""))
        head = get_task(spec["kind"]).base_head(base, spec, examples["train"], examples["validation"])
        if head is not None:
            head.to(base.device).requires_grad_(False)
            found = run_examples(base, None, examples["validation"], 64, spec, head)
            get_task(spec["kind"]).finish(spec, head, examples["validation"], found)
        split = examples["test" if len(examples["test"]) else "validation"]
        scores = with_extras(base, spec, None, split, score_base(base, spec, head, split))
        while len(base._baselines) >= KEPT_BASELINES:
            base._baselines.pop(next(iter(base._baselines)))
        base._baselines[key] = (head, scores)
    head, scores = base._baselines[key]
    adapter.base_head = head
    if head is not None and adapter.head is not None:
        adapter.head.load_state_dict(head.state_dict())
    return scores


def _finish(base: Base, adapter: Adapter, validation: Examples) -> None:
    """Let the task choose on validation what it has to choose."""
    task = get_task(adapter.task["kind"])
    if type(task).finish is not Task.finish:
        task.finish(adapter.task, adapter.head, validation, run_examples(base, adapter.name, validation))


def _scorer(base: Base, adapter: Adapter, examples: dict[str, Examples]) -> Any:
    def run() -> Checked:
        found = score(base, adapter.name, examples["validation"])
        loss = float(found.metrics.get("loss", 0.0))
        # 95 % of a normal lie within 1.96 standard errors on each side; a loss is compared exactly
        noise = (found.interval[1] - found.interval[0]) / (2 * 1.96) if found.about.higher else 0.0
        return Checked(found.rank, noise, {found.metric: found.value, "validation_loss": loss})

    return run


def _result(
    base: Base,
    adapter: Adapter,
    method: Method,
    spec: dict[str, Any],
    settings: Settings,
    history: History,
    result: Evaluation,
    data: Data,
    examples: dict[str, Examples],
) -> Run:
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
    parameters = adapter.count()
    total = sum(p.numel() for p in base.model.parameters())
    return Run(
        name=adapter.name,
        ref="",
        method=method.shorthand(),
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
        history=history,
        settings=settings,
        labels=adapter.labels,
        notes=notes,
        scores=result,
    )


def _store(base: Base, adapter: Adapter, run: Run, data: Data, store: Store | None, provenance: dict[str, Any]) -> None:
    from importlib.metadata import version

    facts = {
        "data": {"name": data.source, "digest": data.digest, "columns": data.columns},
        "rows": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        "settings": run.settings.plain(),
        "seed": run.settings.seed,
        **({"label_counts": dict(Counter(data.train.label))} if data.train.label else {}),
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
    stored = base.save(adapter.name, store=store, provenance=facts, metrics=metrics)
    run.ref = stored.ref
    run.bytes = (stored.path / "adapter_model.safetensors").stat().st_size


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the single numbers among metrics: tables per label are for the result, not for the stored file."""
    return {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
