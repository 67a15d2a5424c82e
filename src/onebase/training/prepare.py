"""Before the first step: data read, the task decided, rows encoded, the adapter attached, the base scored."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from onebase.adapter import Adapter
from onebase.build import build_adapter, default_task
from onebase.compose.binding import bind
from onebase.compose.kept import check_kept
from onebase.compose.recipes import Composition
from onebase.data import Data
from onebase.data.kinds import ROLES
from onebase.data.load import taken
from onebase.data.rows import class_names
from onebase.errors import ConfigError, DataError
from onebase.evaluation import score_base, with_extras
from onebase.examples import encode, run_examples
from onebase.methods.method import Method, plain_number
from onebase.methods.registry import parse_method
from onebase.processes import active
from onebase.tasks import Examples, Scores, get_task
from onebase.tasks.spec import check_options, check_spec
from onebase.training import checkpoint as checkpoints
from onebase.training.job import Checked, JobState
from onebase.training.kernels import Kernels, kernels_of
from onebase.training.settings import settings_for
from onebase.training.warm import Parent, parent_method, read_parent
from onebase.words import view

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store import Store
    from onebase.training.loop import Reporter

DEFAULT_METHOD = "lora"
PAIRS_READ = {
    "joint": "the texts of a pair are read in one row (pairs=apart would read each alone)",
    "apart": "the texts of a pair are read apart, where the frozen base is clearly better (pairs=joint compares words)",
}
WHILE_TRAINING = " (training)"  # follows an adapter's name until its last step
KEPT_BASELINES = 4  # heads on frozen vectors that a base remembers
# What is passed on to `load_data`, beside the columns by role.
READING = ("task", "limit", "columns", "group", "encoding", "delimiter", "quote", "sheet")


@dataclass(eq=False)
class Prepared:
    """A run that can start.

    Attributes:
        attached: name that the adapter will have on the base.
        stored: name that it will have in the store, None for none.
        state: the adapter in training, new or restored from a checkpoint.
        data, examples: what it learns from.
        own: scores of the base alone.
        store: where it goes.
        checkpoint: where its state is written, None where it is not stored.
        kernels: how an interrupted run computed, None for a new one.
        parent: the adapter it starts from, or None.
        provenance: further facts to keep with the stored adapter.
    """

    attached: str
    stored: str | None
    state: JobState
    data: Data
    examples: dict[str, Examples]
    own: Scores
    store: Store
    checkpoint: checkpoints.Checkpoint | None
    kernels: Kernels | None
    parent: Parent | None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        """The adapter."""
        return self.state.adapter


def prepare(
    base: Base,
    report: Reporter,
    *,
    data: Any,
    method: str | Method | None = None,
    name: str | None = None,
    attach: str | None = None,
    store: Store | None = None,
    provenance: dict[str, Any] | None = None,
    resume: bool = False,
    init_from: str | None = None,
    remember: dict[str, Any] | None = None,
    max_length: int | None = None,
    template: str | None = None,
    pooling: str | None = None,
    shared: dict[Any, dict[str, Examples]] | None = None,
    build: Callable[..., Adapter] = build_adapter,
    **more: Any,
) -> Prepared:
    """Do everything that comes before the first step; see `train` for the arguments.

    Args:
        attach: name on the base of an adapter that is not stored; by default the method's.
        shared: encoded data of other jobs, by what it depends on; this job's is added.
        build: makes the adapter; as `build_adapter`, which it is by default.
        more: columns, training settings and options of the task.

    Returns:
        The run; its adapter is attached under a name of its own. `discard` takes it away again.
    """
    store = _store_of(name, store)
    if resume and name is None:
        raise ConfigError("resume=True needs name=: an interrupted run is found by the name it would be stored as")
    reading = reading_options(more)
    parent = None if init_from is None else read_parent(base, init_from, store)
    method = parent_method(parent, method) if parent else parse_method(method or DEFAULT_METHOD)
    if isinstance(method, Composition):
        method = bind(base, method)
        if method.trained is None:
            raise ConfigError(f"{method.shorthand()} has nothing to train: base.add attaches it as it is")
        if name is not None:
            check_kept(method, store)  # before hours of training
    found = taken(data, seed=plain_number(more.get("seed") or 0), **reading)
    options = {key: more.pop(key) for key in list(more) if key in get_task(found.kind).options}
    options |= {"max_length": max_length, "template": template, "pooling": pooling}
    if parent:
        found, options = parent.widened(found, options)
    spec = make_task(base, found, **options)
    settings = settings_for(method, more, base.anatomy.hidden_size)
    examples = _encoded(base, spec, found, method, {} if shared is None else shared)
    asked, spec = spec, _settled(base, spec, found, examples)
    examples = get_task(spec["kind"]).settled(spec, examples)
    if asked.get("pairs") == "auto":
        report.note(PAIRS_READ[spec["pairs"]])
    plain = {split: part.for_base for split, part in examples.items()}
    attached = name or attach or _free_name(base, method.name)
    adapter = build(
        base, f"{attached}{WHILE_TRAINING}", method, spec, settings.seed, frequent=_frequent(plain["train"]),
        empty=parent is not None,
    )  # fmt: skip
    base._attach(adapter)
    try:
        own = _own_scores(base, adapter, plain, found, report)
        if parent:
            report.note(parent.start(adapter))
        state = JobState(base, adapter, examples["train"], _scorer(base, adapter, examples), settings)
        checkpoint, kernels = None, None
        if name is not None:
            checkpoint = checkpoints.Checkpoint(checkpoints.place(store.root, name), {}, remember)
            checkpoint.identity |= {
                "base": base.fingerprint(), "data": found.digest, "init_from": parent.digest if parent else None,
                "method": identity(method), "settings": settings.plain(), "task": dict(spec),
            }  # fmt: skip
            kernels = _restore(base, state, checkpoint, resume, report)
    except BaseException:
        base.remove(adapter.name)
        raise
    return Prepared(
        attached, name, state, found, examples, own, store, checkpoint, kernels, parent, dict(provenance or {})
    )


def identity(method: Method) -> str:
    """Return what tells a method from others: its shorthand, and what the names of a composition mean."""
    if not isinstance(method, Composition):
        return method.shorthand()
    return " ".join([method.shorthand(), *(part.digest for part in method.adapters())])


def discard(base: Base, prepared: Prepared) -> None:
    """Take the adapter of a run that did not end off the base; its checkpoint stays."""
    prepared.state.release()
    if prepared.adapter.name in base.adapters:
        base.remove(prepared.adapter.name)


def _store_of(name: str | None, store: Store | None) -> Store:
    from onebase.store import Store

    store = store or Store()
    if name is not None:
        store.check(name)
    return store


def _restore(
    base: Base, state: JobState, checkpoint: checkpoints.Checkpoint, resume: bool, report: Reporter
) -> Kernels | None:
    """Put an interrupted run's state back; return how it computed."""
    before = active().only_first(checkpoint.found) if resume else None
    if before is not None:
        state.restore(before[0], before[1]["state"])
        report.note(f"going on with {checkpoint.path.stem} at step {state.history.steps} of {state.steps}")
        return kernels_of(base, before[1]["facts"]["kernels"])
    if resume:
        report.note(f"no checkpoint of {checkpoint.path.stem}: starting from the beginning")
    elif checkpoint.path.exists():
        report.note(f"the interrupted run {checkpoint.path.stem} is replaced (resume would have gone on with it)")
    return None


def _encoded(
    base: Base, spec: dict[str, Any], data: Data, method: Method, shared: dict[Any, dict[str, Examples]]
) -> dict[str, Examples]:
    """Encode data, once for all jobs that read it alike."""
    own = view(base, method.vocabulary())
    words = () if own is base.tokenizer else tuple(method.vocabulary())
    key = (data.digest, json.dumps(spec, sort_keys=True, default=str), words)
    if key not in shared:
        shared[key] = encode(base, spec, data, own)
    examples = shared[key]
    for split, use in (("train", "training"), ("validation", "validation")):
        if not len(examples[split]):
            raise DataError(f"{data.source} leaves no rows for {use}")
    return examples


def reading_options(more: dict[str, Any]) -> dict[str, Any]:
    """Take out of `more` what `load_data` takes: its options, and columns by role, such as ``score="rating"``."""
    found = {key: more.pop(key) for key in (*READING, *ROLES) if key in more}
    return {key: value for key, value in found.items() if value is not None}


def make_task(base: Base, data: Data, **given: Any) -> dict[str, Any]:
    """Return the spec of an adapter's task for this data.

    Args:
        base: the base.
        data: all splits.
        given: max_length, template, pooling and options of the task; None means the default.

    Raises:
        ConfigError: a length beyond what the base takes, an unknown pooling, a template without its places, an option
            that this task does not have, or a value of the wrong type or range.
        DataError, UnsupportedError: the data or the base does not fit the task.
    """
    given = {key: plain_number(value) for key, value in given.items() if value is not None}
    task = get_task(data.kind)
    for key in given.keys() - {"max_length", "template", "pooling"} - task.options.keys():
        choices = ", ".join(task.options) or "no options"
        raise ConfigError(f"{key} = {given[key]!r} has no meaning for {data.kind}, which has {choices}: leave it out")
    spec = default_task(base) | {"kind": data.kind, "labels": list(data.labels)}
    spec["pair"] = task.surface == "states" and data.train.text_pair is not None
    spec |= dict(task.options) | given | {"template": given.get("template", "")}
    limit = base.anatomy.stacks[0].position_limit
    check_options(task, spec, limit)
    if "pooling" in given and task.surface == "logits":
        raise ConfigError(f"pooling = {given['pooling']!r} has no effect on {data.kind} data: leave it out")
    spec = task.complete(spec, base, data, given)
    check_spec(spec, limit)  # before hours of training: what fails here would be stored and never load
    return spec


def _free_name(base: Base, stem: str) -> str:
    name, count = stem, 1
    while name in base.adapters or f"{name}{WHILE_TRAINING}" in base.adapters:
        count += 1
        name = f"{stem}-{count}"
    return name


def _frequent(train: Examples) -> list[int]:
    """Token ids of the training rows, the most frequent first."""
    rows = train.facts.get("plain", train.rows)  # rows with masked tokens say nothing about what is frequent
    ids, counts = torch.tensor([i for row in rows for i in row.ids]).unique(return_counts=True)
    return ids[counts.argsort(descending=True, stable=True)].tolist()


def _settled(base: Base, spec: dict[str, Any], data: Data, examples: dict[str, Examples]) -> dict[str, Any]:
    """Return the final spec; what was settled for the same data before is remembered."""
    key = _key(data, spec)
    if key not in base._settled:
        plain = {split: part.for_base for split, part in examples.items()}
        base._settled[key] = get_task(spec["kind"]).settle(base, spec, plain)
    return dict(base._settled[key])


def _key(data: Data, spec: dict[str, Any]) -> tuple[str, str]:
    """Return what results on the frozen base depend on."""
    return data.digest, json.dumps(spec, sort_keys=True, default=str)


def _own_scores(base: Base, adapter: Adapter, examples: dict[str, Examples], data: Data, report: Reporter) -> Scores:
    """Score the base alone: with a head that is fitted on its frozen states, from which the adapter's head starts.

    The base keeps the last few results, because several adapters are often trained on the same data.
    """
    spec = adapter.task
    key = _key(data, spec)
    if key not in base._baselines:
        report.note("scoring the base alone" + (", with its own head on frozen vectors" if adapter.head else ""))
        task = get_task(spec["kind"])
        head, start = task.base_heads(base, spec, examples["train"], examples["validation"])
        for each in (head, start):
            if each is not None:
                each.to(base.device).requires_grad_(False)
        if head is not None:
            own_spec, held = task.own(base, spec, head, examples["validation"])
            task.finish(own_spec, head, held, run_examples(base, None, held, 64, own_spec, head))
        split = examples["test" if len(examples["test"]) else "validation"]
        scores = with_extras(base, spec, None, split, score_base(base, spec, head, split))
        while len(base._baselines) >= KEPT_BASELINES:
            base._baselines.pop(next(iter(base._baselines)))
        base._baselines[key] = (head, start, scores)
    head, start, scores = base._baselines[key]
    adapter.base_head = head
    if start is not None and adapter.head is not None:
        adapter.head.load_state_dict(start.state_dict())
    return scores


def _scorer(base: Base, adapter: Adapter, examples: dict[str, Examples]) -> Any:
    def run() -> Checked:
        task, validation = get_task(adapter.task["kind"]), examples["validation"]
        raw = run_examples(base, adapter.name, validation)
        task.finish(adapter.task, adapter.head, validation, raw)  # what is chosen on validation belongs to the epoch
        found = task.judge(adapter.task, adapter.head, validation, raw)
        loss = float(found.metrics.get("loss", 0.0))
        # 95 % of a normal lie within 1.96 standard errors on each side; a loss is compared exactly
        noise = (found.interval[1] - found.interval[0]) / (2 * 1.96) if found.about.higher else 0.0
        checked = Checked(found.rank, noise, {found.metric: found.value, "validation_loss": loss})
        return active().from_first(checked)  # all must stop at the same epoch

    return run


def label_counts(data: Data) -> Counter[str]:
    """Count how often each label or tag occurs in the training rows."""
    return Counter(class_names(data.train, data.kind))
