"""Evaluation: an adapter's score on data, the base's own beside it, with interval and paired test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from onebase.data import Data
from onebase.data.load import load, taken
from onebase.errors import ConfigError, DataError, first_of, unknown
from onebase.examples import SPLITS, encode, encode_rows, run_examples
from onebase.statistics import PairedTest, mcnemar_exact, paired_bootstrap
from onebase.tasks import Examples, Scores, get_task

if TYPE_CHECKING:
    from onebase.base import Base

WHOLE = "all"  # every row, whatever its split
SHOWN = 5  # labels that an error names


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An adapter's scores beside its base's.

    Attributes:
        split: which rows were scored.
        rows: how many units (texts, pairs, documents).
        adapter: scores under the adapter.
        base: scores of the base alone (head only, base frozen); None where no such head is at hand.
        test: paired comparison adapter - base, None without base scores.
    """

    split: str
    rows: int
    adapter: Scores
    base: Scores | None
    test: PairedTest | None


def score(base: Base, name: str, examples: Examples, batch_size: int = 64) -> Scores:
    """Score an attached adapter on an encoded split."""
    adapter = base.adapters[name]
    found = run_examples(base, name, examples, batch_size)
    return get_task(adapter.task["kind"]).judge(adapter.task, adapter.head, examples, found)


def score_base(
    base: Base, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, batch_size: int = 64
) -> Scores:
    """Score the plain base on a task, with a head that was fitted on its frozen states where the task has one."""
    task = get_task(spec["kind"])
    spec, examples = task.own(base, spec, head, examples)
    found = run_examples(base, None, examples, batch_size, spec, head)
    return task.judge(spec, head, examples, found)


def with_extras(
    base: Base, spec: Mapping[str, Any], name: str | None, examples: Examples, scores: Scores, rows: int | None = None
) -> Scores:
    """Add to scores what a task measures beside them, see `Task.extras`; `rows` None means as the spec says."""
    asked = int(spec.get("generate", 0)) if rows is None else rows
    more = get_task(spec["kind"]).extras(base, spec, name, examples, asked)
    return replace(scores, metrics=scores.metrics | more) if more else scores


def compare(adapter: Scores, base: Scores, seed: int = 0) -> PairedTest | None:
    """Test the adapter against the base on the same units: exact McNemar for accuracy, else a paired bootstrap.

    None where a single unit was scored: nothing can be said about others from it. The difference is adapter minus
    base in the metric's own unit, so a lower perplexity is a negative number.
    """
    if adapter.metric == "accuracy":
        return mcnemar_exact(base.correct, adapter.correct)
    if adapter.rows is None or base.rows is None or len(adapter.rows) < 2:
        return None
    about = adapter.about
    return paired_bootstrap(
        base.rows, adapter.rows, about.statistic, seed=seed, unit="points" if about.percent else about.name
    )


def evaluate(
    base: Base,
    data: Data | str | Path | Any,
    adapter: str,
    *,
    split: str | None = None,
    batch_size: int = 64,
    generate: int | None = None,
    **columns: Any,
) -> Evaluation:
    """Score an attached adapter on data, beside its base.

    Args:
        base: the base that carries the adapter.
        data: what `load_data` takes, or what it returned.
        adapter: the adapter's name.
        split: train, validation, test, or all of them. By default what is given as one file or table is scored whole,
            and of what comes in splits, or was loaded before, test.
        batch_size: rows per forward.
        generate: also score what is written for the first rows, at most this many (seq2seq); None: as in training.
        columns: text=, label= ... as for `load_data`.

    Returns:
        The adapter's scores with a 95 % interval, the base's own beside them, and a paired test of the two.

    Raises:
        UnknownNameError: no such adapter.
        DataError: the data does not fit the adapter's task, or the split is empty.
    """
    spec = base.adapters[adapter].task
    if spec["kind"] == "features":
        raise ConfigError(f"adapter {adapter!r} has no head to score: it gives embeddings")
    if split is not None and split not in (*SPLITS, WHOLE):
        raise unknown("split", split, (*SPLITS, WHOLE))
    if isinstance(data, Data):
        found = taken(data, **columns)
    else:
        found = load(data, task=spec["kind"], whole=split in (None, WHOLE), **columns)
    if found.kind != spec["kind"]:
        raise DataError(f"{found.source} is {found.kind} data, but adapter {adapter!r} was trained for {spec['kind']}")
    _check_labels(found, spec, adapter)
    if split is None:
        uncut = not (len(found.validation) or len(found.test))
        split = WHOLE if found.given == ("train",) and uncut else "test"
    if split == WHOLE:
        task = get_task(spec["kind"])
        task.check_base(base)
        examples = encode_rows(base, spec, whole(found), base.tokenizer_of(adapter))
    else:
        examples = encode(base, spec, found, base.tokenizer_of(adapter))[split]
    if not len(examples):
        raise DataError(f"{found.source} has no {split} rows")
    return evaluate_examples(base, adapter, examples, split, batch_size, generate=generate)


def _check_labels(data: Data, spec: Mapping[str, Any], adapter: str) -> None:
    """Raise DataError where labels are not the adapter's, naming the column that they were read from."""
    column = next((data.columns[role] for role in ("label", "labels") if role in data.columns), None)
    known = [str(label) for label in spec.get("labels") or ()]
    strange = [label for label in data.labels if label not in known]
    if column is None or not known or not strange:  # a task without names of classes has nothing to compare
        return
    shown, verb = first_of(strange, SHOWN, repr), "are" if len(strange) > 1 else "is"
    raise DataError(
        f"{data.source}, column {column!r}: {shown} {verb} not among the labels of adapter {adapter!r}, which are "
        f"{first_of(known, SHOWN, repr)}. Name the column that has those (--label COLUMN; label= in Python), or write "
        "the labels as the adapter has them."
    )


def whole(data: Data) -> Any:
    """Return all rows of a data set as one split, in the order train, validation, test."""
    parts = [getattr(data, name) for name in SPLITS if len(getattr(data, name))]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.joined(part)
    return joined


def evaluate_examples(
    base: Base,
    adapter: str,
    examples: Examples,
    split: str,
    batch_size: int = 64,
    own: Scores | None = None,
    generate: int | None = None,
) -> Evaluation:
    """Score an adapter on an encoded split, beside its base where the base can answer.

    Args:
        base, adapter, examples: what to score on what.
        split: name of the rows, for the result.
        batch_size: rows per forward.
        own: scores of the base, when they are known already.
        generate: see `evaluate`.
    """
    attached = base.adapters[adapter]
    spec = attached.task
    found = with_extras(base, spec, adapter, examples, score(base, adapter, examples, batch_size), generate)
    if own is None and (attached.head is None or attached.base_head is not None):
        own = score_base(base, spec, attached.base_head, examples.for_base, batch_size)
        own = with_extras(base, spec, None, examples.for_base, own, generate)
    return Evaluation(split, examples.units, found, own, None if own is None else compare(found, own))
