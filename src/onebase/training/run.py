"""`train`: data in, a stored adapter out, with the base's own score beside it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onebase.adapter import Adapter
from onebase.baseline import fit_head, frozen_vectors
from onebase.build import build_adapter, default_task
from onebase.data import Data, load
from onebase.errors import ConfigError, DataError
from onebase.evaluation import Evaluation, Scores, evaluate_examples, score, score_base_head
from onebase.examples import Examples, encode
from onebase.heads import ClassificationHead
from onebase.methods.method import Method
from onebase.methods.registry import parse_method
from onebase.statistics import PairedTest
from onebase.training.loop import History, Reporter, fit
from onebase.training.settings import Settings, settings_for

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store import Store

DEFAULT_METHOD = "lora"
LM_BLOCK = 256  # tokens per block of plain text: long enough for context, short enough for a laptop
KEPT_BASELINES = 4  # heads on frozen vectors that a base remembers
TRAINED = ("classification", "causal-lm", "completion")
COMPLETION_TEMPLATE = "{prompt}\n{completion}"


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
        task: 'classification', 'causal-lm' or 'completion'; found from the data by default.
        text, text_pair, label, prompt, completion: columns; found by default.
        limit: use at most this many training rows.
        max_length: tokens per row; what the base takes, at most 512, or blocks of 256 for plain text.
        template: e.g. ``"Review: {text}"`` or ``"{prompt}\\n{completion}"``.
        pooling: 'mean', 'first' or 'last'; the family's by default.
        store: where to store; the user's store by default.
        report: receives progress.
        provenance: further facts to keep with the stored adapter.
        settings: see `Settings`: lr, epochs, batch_size, seed, ...

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
        limit=limit, seed=chosen_seed,
    )  # fmt: skip
    spec = make_task(base, found, max_length, template, pooling)
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
        own = _start_head(base, adapter, examples, found, report)
        history = fit(base, adapter, examples["train"], _scorer(base, adapter, examples), chosen, report)
    except BaseException:
        base.remove(adapter.name)
        raise
    if old is not None:
        base.remove(attached)
    base._rename(adapter, attached)
    split = "test" if len(examples["test"]) else "validation"
    adapter.fold()
    result = evaluate_examples(base, attached, examples[split], split, own=own.get(split))
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


def make_task(
    base: Base, data: Data, max_length: int | None, template: str | None, pooling: str | None
) -> dict[str, Any]:
    """Return the task of an adapter for this data.

    Raises:
        ConfigError: a length beyond what the base takes, an unknown pooling, a template without its places.
    """
    if data.kind not in TRAINED:
        what = f"{data.kind} (its labels are measurements)" if data.scores else data.kind
        raise DataError(
            f"{data.source} is {what} data, which cannot be trained yet; known are {', '.join(TRAINED)}. Name one that "
            "fits with --task, or pass other columns."
        )
    spec = default_task(base) | {"kind": data.kind, "labels": list(data.labels)}
    spec["pair"] = data.kind == "classification" and data.train.text_pair is not None
    longest = spec["max_length"]
    if data.kind == "causal-lm":
        spec["max_length"] = min(LM_BLOCK, longest)
    if max_length is not None:
        limit = base.anatomy.stacks[0].position_limit
        if max_length < 4 or (limit is not None and max_length > limit):
            raise ConfigError(f"max_length = {max_length!r}: expected 4 to {limit or 'any number'} on this base")
        spec["max_length"] = max_length
    if pooling is not None:
        if pooling not in ("mean", "first", "last"):
            raise ConfigError(f"pooling = {pooling!r}: expected mean, first or last")
        if data.kind != "classification":
            raise ConfigError(f"pooling = {pooling!r} has no effect on {data.kind} data: leave it out")
        spec["pooling"] = pooling
    spec["template"] = template or (COMPLETION_TEMPLATE if data.kind == "completion" else "")
    places = {"classification": ["text"] + ["text_pair"] * spec["pair"], "completion": ["prompt", "completion"]}
    missing = [p for p in places.get(data.kind, []) if spec["template"] and "{" + p + "}" not in spec["template"]]
    if missing or (data.kind == "causal-lm" and template):
        raise ConfigError(
            f"template {template!r}: expected places for {places.get(data.kind) or 'nothing (plain text)'}"
        )
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


def _start_head(
    base: Base, adapter: Adapter, examples: dict[str, Examples], data: Data, report: Reporter
) -> dict[str, Scores]:
    """Fit the base's own head on frozen vectors, start the adapter's head from it, and score the base.

    The base keeps the last few results, because several adapters are often trained on the same data.
    """
    if not isinstance(adapter.head, ClassificationHead):
        return {}
    task = adapter.task
    key = (data.digest, task["pooling"], task["max_length"], task["template"])
    if key not in base._baselines:
        report.note("fitting the base's own head on its frozen vectors")
        pooling, train, held = task["pooling"], examples["train"], examples["validation"]
        assert train.targets is not None and held.targets is not None
        vectors, others = frozen_vectors(base, train, pooling), frozen_vectors(base, held, pooling)
        head = fit_head(vectors, train.targets, others, held.targets, len(adapter.labels))
        head.to(base.device).requires_grad_(False)
        split = "test" if len(examples["test"]) else "validation"
        scores = score_base_head(base, head, examples[split], adapter.labels, pooling)
        while len(base._baselines) >= KEPT_BASELINES:
            base._baselines.pop(next(iter(base._baselines)))
        base._baselines[key] = (head, {split: scores})
    head, scores = base._baselines[key]
    adapter.base_head = head
    adapter.head.load_state_dict(head.state_dict())
    return scores


def _scorer(base: Base, adapter: Adapter, examples: dict[str, Examples]) -> Any:
    def run() -> tuple[float, dict[str, float]]:
        found = score(base, adapter.name, examples["validation"], adapter.labels)
        if found.metric == "perplexity":
            return -found.metrics["loss"], {"perplexity": found.value, "validation_loss": found.metrics["loss"]}
        # rows of validation are few: of two equal accuracies the smaller loss is the better guess
        rank = found.value - 1e-6 * min(found.metrics["loss"], 100.0)
        return rank, {"accuracy": found.value, "validation_loss": found.metrics["loss"]}

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
        notes.append(f"{cut} of {len(examples['train'])} training rows were cut to {spec['max_length']} tokens.")
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
    keep = ("n", "accuracy", "macro_f1", "perplexity", "loss", "tokens")
    metrics: dict[str, Any] = {
        "split": run.split,
        "adapter": {k: v for k, v in run.metrics.items() if k in keep} | {"interval": list(run.interval)},
        "base": {k: v for k, v in run.base_metrics.items() if k in keep} | {"interval": list(run.base_interval)},
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
