"""Evaluation: an adapter's score on data, the base's own beside it, with interval and paired test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onebase.data import Data, load
from onebase.errors import ConfigError, DataError
from onebase.examples import Examples, encode, forward
from onebase.heads import ClassificationHead
from onebase.statistics import (
    PairedTest,
    accuracy_interval,
    classification_metrics,
    mcnemar_exact,
    paired_bootstrap,
    perplexity,
    perplexity_interval,
    token_rows,
)

if TYPE_CHECKING:
    from onebase.base import Base


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one model on one split.

    Attributes:
        metric: the metric that counts: accuracy (higher is better) or perplexity (lower is better).
        value: its value.
        interval: 95 % interval of it: Wilson for accuracy, seeded bootstrap over texts for perplexity.
        metrics: every metric.
        correct: per row, for classification.
        sums, counts: per row: summed loss in nats and number of targets, for language modelling.
        predicted: per row: label, for classification.
    """

    metric: str
    value: float
    interval: tuple[float, float]
    metrics: dict[str, Any]
    correct: tuple[bool, ...] = ()
    sums: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    predicted: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """An adapter's scores beside its base's.

    Attributes:
        split: which rows were scored.
        rows: how many.
        adapter: scores under the adapter.
        base: scores of the base alone (head only, base frozen); None where no such head is at hand.
        test: paired comparison adapter - base, None without base scores.
    """

    split: str
    rows: int
    adapter: Scores
    base: Scores | None
    test: PairedTest | None


def score_classification(logits: torch.Tensor, targets: torch.Tensor, labels: tuple[str, ...]) -> Scores:
    """Score logits (n, labels) against class numbers (n,)."""
    best = logits.argmax(1)
    predicted, actual = [labels[i] for i in best.tolist()], [labels[i] for i in targets.tolist()]
    metrics = classification_metrics(predicted, actual, labels)
    metrics["loss"] = float(torch.nn.functional.cross_entropy(logits.float(), targets))
    correct = tuple((best == targets).tolist())
    interval = accuracy_interval(correct)
    return Scores("accuracy", metrics["accuracy"], interval, metrics, correct=correct, predicted=tuple(predicted))


def score_language(sums: torch.Tensor, counts: torch.Tensor) -> Scores:
    """Score summed losses (n,) in nats over target counts (n,)."""
    kept = counts > 0
    total, targets = float(sums[kept].double().sum()), int(counts[kept].sum())
    if not targets:
        raise DataError("no token is left to score: every target was cut by the maximum length")
    loss = total / targets
    s, c = tuple(sums[kept].double().tolist()), tuple(counts[kept].tolist())
    value = float(torch.tensor(loss, dtype=torch.float64).exp())
    interval = perplexity_interval(s, c) if len(s) > 1 else (value, value)
    metrics = {"n": len(s), "perplexity": value, "loss": loss, "tokens": targets}
    return Scores("perplexity", value, interval, metrics, sums=s, counts=c)


def run_examples(base: Base, name: str | None, examples: Examples, batch_size: int = 64) -> tuple[torch.Tensor, ...]:
    """Run a split under an adapter.

    Returns:
        losses (n,), target counts (n,), logits (n, labels) or (n, 0); on the CPU, in the rows' order.
    """
    losses, counts = torch.zeros(len(examples)), torch.zeros(len(examples), dtype=torch.long)
    logits: torch.Tensor | None = None
    with torch.no_grad():
        for index in examples.batches(range(len(examples)), batch_size):
            loss, count, out = forward(base, name, examples, index)
            losses[index], counts[index] = loss.float().cpu(), count.long().cpu()
            if out.numel():
                logits = torch.zeros(len(examples), out.shape[1]) if logits is None else logits
                logits[index] = out.float().cpu()
    return losses, counts, torch.zeros(len(examples), 0) if logits is None else logits


def score(base: Base, name: str | None, examples: Examples, labels: tuple[str, ...], batch_size: int = 64) -> Scores:
    """Score an adapter (or the plain base, for language modelling) on an encoded split."""
    losses, counts, logits = run_examples(base, name, examples, batch_size)
    if examples.targets is not None:
        return score_classification(logits, examples.targets, labels)
    return score_language(losses, counts)


def compare(adapter: Scores, base: Scores, seed: int = 0) -> PairedTest | None:
    """Test the adapter against the base on the same rows: exact McNemar for accuracy, else a paired bootstrap.

    None where a single text was scored: nothing can be said about others from it.

    The difference is in the direction of better: accuracy gained, perplexity lost (shown as a negative number).
    """
    if adapter.metric == "accuracy":
        return mcnemar_exact(base.correct, adapter.correct)
    if len(adapter.sums) < 2:
        return None
    return paired_bootstrap(
        token_rows(base.sums, base.counts),
        token_rows(adapter.sums, adapter.counts),
        perplexity,
        seed=seed,
        unit="perplexity",
    )


def evaluate(
    base: Base,
    data: Data | str | Path | Any,
    adapter: str,
    *,
    split: str = "test",
    batch_size: int = 64,
    **columns: Any,
) -> Evaluation:
    """Score an attached adapter on data, beside its base.

    Args:
        base: the base that carries the adapter.
        data: what `load_data` takes; a single file is scored whole.
        adapter: the adapter's name.
        split: train, validation or test, for data that comes in splits.
        batch_size: rows per forward.
        columns: text=, label= ... as for `load_data`.

    Raises:
        UnknownNameError: no such adapter.
        DataError: the data does not fit the adapter's task, or the split is empty.
    """
    task = base.adapters[adapter].task
    if task["kind"] == "features":
        raise ConfigError(f"adapter {adapter!r} has no head to score: it gives embeddings")
    found = data if isinstance(data, Data) else load(data, task=task["kind"], **columns)
    if found.kind != task["kind"]:
        raise DataError(f"{found.source} is {found.kind} data, but adapter {adapter!r} was trained for {task['kind']}")
    if found.splits_made:  # one file: the splits are ours, score all of it
        examples = _whole(encode(base, task, found, base.tokenizer_of(adapter)))
        split = "all"
    else:
        examples = encode(base, task, found, base.tokenizer_of(adapter))[split]
    if not len(examples):
        raise DataError(f"{found.source} has no {split} rows")
    return evaluate_examples(base, adapter, examples, split, batch_size)


def _whole(splits: dict[str, Examples]) -> Examples:
    parts = [e for e in splits.values() if len(e)]
    rows = tuple(row for part in parts for row in part.rows)
    targets = None if parts[0].targets is None else torch.cat([p.targets for p in parts if p.targets is not None])
    plain = None if parts[0].plain is None else _whole({name: e.for_base for name, e in splits.items()})
    return Examples(rows, targets, sum(p.cut for p in parts), plain)


def evaluate_examples(
    base: Base, adapter: str, examples: Examples, split: str, batch_size: int = 64, own: Scores | None = None
) -> Evaluation:
    """Score an adapter on an encoded split, beside its base where the adapter carries the base's head.

    Args:
        base, adapter, examples: what to score on what.
        split: name of the rows, for the result.
        batch_size: rows per forward.
        own: scores of the base, when they are known already.
    """
    attached = base.adapters[adapter]
    found = score(base, adapter, examples, attached.labels, batch_size)
    if own is None and examples.targets is None:
        own = score(base, None, examples.for_base, (), batch_size)
    elif own is None and attached.base_head is not None:
        own = score_base_head(base, attached.base_head, examples.for_base, attached.labels, attached.task["pooling"])
    return Evaluation(split, len(examples), found, own, None if own is None else compare(found, own))


def score_base_head(
    base: Base, head: ClassificationHead, examples: Examples, labels: tuple[str, ...], pooling: str
) -> Scores:
    """Score the base's own head on its frozen vectors."""
    from onebase.baseline import frozen_vectors

    assert examples.targets is not None
    vectors = frozen_vectors(base, examples, pooling)
    with torch.no_grad():
        logits = head(vectors.to(head.weight.device)).cpu()
    return score_classification(logits, examples.targets, labels)
