"""Several labels per text, each with a threshold of its own.

A text that is longer than the maximum length is read in windows, and a label applies to the text as it does to the
window where it is most probable: a clause anywhere in a contract counts. In training each window is compared with the
labels of its text, and together they weigh as much as one short text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.encode import Encoded
from onebase.errors import DataError
from onebase.heads import LinearHead
from onebase.statistics import bootstrap_interval
from onebase.tasks.frozen import fit_labels
from onebase.tasks.metrics import micro_f1
from onebase.tasks.pooled import PooledTask
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples, Found, Prediction, Scores, choose_option, first_rows

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows

# A threshold moves from one half towards the best one of validation by p / (p + PRIOR), p its positive rows there: with
# 10 it goes half of the way. A choice, not a measurement: ten rows put a standard error of about .15 on a recall.
PRIOR = 10
# Largest weight of a positive row under class_weights="auto": beyond it a few rows of the rarest labels would decide
# every step of a batch of 32. "balanced" has no limit.
HEAVIEST = 10.0


class LabelsHead(LinearHead):
    """A linear map to one logit per label, with the probability from which on each label is given.

    Args:
        width: D.
        labels: number of labels.
    """

    def __init__(self, width: int, labels: int):
        super().__init__(width, labels)
        self.thresholds = nn.Buffer(torch.full((labels,), 0.5))


@register_task
class MultiLabel(PooledTask):
    """Any number of labels per text."""

    kind: ClassVar[str] = "multilabel"
    summary: ClassVar[str] = "any number of labels per text or pair"
    labelled: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {**PooledTask.options, "class_weights": "auto"}
    learned: ClassVar[tuple[str, ...]] = ("weights",)

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Weigh the positive rows of labels that apply to less than half of the rows by negatives over positives."""
        how = choose_option("class_weights", spec.pop("class_weights"), ("auto", "balanced", "none"))
        spec = super().complete(spec, base, data, given)
        if how == "none":
            return spec
        positive = self.targets(spec, data.train).sum(0)
        ratio = (len(data.train) - positive) / positive.clamp(min=1)
        weights = ratio.clamp(1.0, HEAVIEST) if how == "auto" else ratio.clamp(min=1e-3)
        return spec | {"weights": [round(float(w), 4) for w in weights]}

    def targets(self, spec: Mapping[str, Any], rows: Rows) -> Tensor:
        """Return 1 where a label applies, (n, labels)."""
        number = {label: i for i, label in enumerate(spec["labels"])}
        unseen = sorted({label for many in rows["labels"] for label in many} - number.keys())
        if unseen:
            raise DataError(f"labels {unseen[:5]} are not among the adapter's labels {list(spec['labels'])[:10]}")
        found = torch.zeros(len(rows), len(number))
        for row, many in enumerate(rows["labels"]):
            found[row, [number[label] for label in many]] = 1.0
        return found

    def new_head(self, spec: Mapping[str, Any], width: int) -> LinearHead:
        """A linear map to one logit per label, and thresholds."""
        return LabelsHead(width, len(spec["labels"]))

    def tensor_loss(self, out: Tensor, labels: Tensor, spec: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy, the mean over the labels, against 0 and 1 (b, labels)."""
        weight = torch.tensor(spec["weights"], device=out.device) if spec.get("weights") else None
        losses = F.binary_cross_entropy_with_logits(out, labels.to(out.dtype), reduction="none", pos_weight=weight)
        return losses.mean(1), torch.ones(len(out), device=out.device)

    def fit_head(
        self, spec: Mapping[str, Any], features: Tensor, targets: Tensor, held: Tensor, held_targets: Tensor
    ) -> LinearHead:
        """One-vs-rest logistic regression."""
        head = self.new_head(spec, features.shape[1])
        weights = spec.get("weights") or [1.0] * len(spec["labels"])
        fit_labels(head, features, targets, held, held_targets, weights)
        return head

    def finish(self, spec: Mapping[str, Any], head: nn.Module | None, validation: Examples, found: Found) -> None:
        """Choose the thresholds on validation, see `best_threshold`."""
        assert isinstance(head, LabelsHead) and validation.targets is not None
        chances = torch.sigmoid(highest(validation, found.values).double())
        targets = validation.targets[first_rows(validation)]
        chosen = [best_threshold(chances[:, i], targets[:, i]) for i in range(chances.shape[1])]
        with torch.no_grad():
            head.thresholds.copy_(torch.tensor(chosen))

    def judge(self, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, found: Found) -> Scores:
        """Compute F1 over all labels and rows, and label by label."""
        assert isinstance(head, LabelsHead) and examples.targets is not None
        logits, targets = highest(examples, found.values), examples.targets[first_rows(examples)]
        given = torch.sigmoid(logits) >= head.thresholds.cpu()
        actual = targets.bool()
        rows = torch.stack([(given & actual).sum(1), (given & ~actual).sum(1), (~given & actual).sum(1)], 1)
        rows = rows.double().numpy()
        per_label = label_table(list(spec["labels"]), given, actual)
        occurring = [f["f1"] for i, f in enumerate(per_label.values()) if bool((given | actual)[:, i].any())]
        value = micro_f1(rows)
        metrics: dict[str, Any] = {
            "n": len(rows),
            "micro_f1": value,
            "macro_f1": sum(occurring) / max(len(occurring), 1),
            "exact_match": float((given == actual).all(1).double().mean()),
            "loss": float(F.binary_cross_entropy_with_logits(logits, targets)),
            "per_label": per_label,
        }
        interval = bootstrap_interval(rows, micro_f1) if len(rows) > 1 else (value, value)
        return Scores("micro_f1", value, interval, metrics, rows)

    def answer(
        self, spec: Mapping[str, Any], head: nn.Module | None, name: str | None, rows: Sequence[Encoded],
        values: Sequence[Tensor], text: str, pair: str | None,
    ) -> Prediction:  # fmt: skip
        """Return the labels that reach their thresholds, and every probability, of the window where it is highest."""
        assert isinstance(head, LabelsHead)
        out = self.finished(spec, head, values)
        chances = torch.sigmoid(out.amax(0).double())
        given = chances.float() >= head.thresholds.cpu()
        names = list(spec["labels"])
        labels = tuple(label for label, yes in zip(names, given.tolist()) if yes)
        cut = max(row.cut for row in rows)
        return Prediction(name, None, dict(zip(names, chances.tolist())), None, cut, len(out), labels=labels)


def highest(examples: Examples, values: Sequence[Tensor]) -> Tensor:
    """Return the highest logit of each label over the windows of each unit, (units, labels) float32."""
    stacked = torch.stack([value.float() for value in values])
    if examples.unit is None:
        return stacked
    top = torch.full((examples.units, stacked.shape[1]), -torch.inf)
    return top.scatter_reduce(0, examples.unit[:, None].expand_as(stacked), stacked, "amax")


def best_threshold(chances: Tensor, targets: Tensor) -> float:
    """Return the probability from which on a label is given.

    The one with the best F1 lies half way between two neighbouring probabilities. What few positive rows say is mostly
    noise, so one half is approached from there: ``t = 1/2 + p / (p + PRIOR) (best - 1/2)`` with p positive rows. It is
    1/2 where there are no positive rows, and where t would have a lower F1 on these rows than 1/2.

    Args:
        chances: (n,) probabilities.
        targets: (n,) 0 or 1.

    Returns:
        A threshold in (0, 1).
    """
    positive = float(targets.sum())
    if positive == 0:
        return 0.5
    order = chances.argsort(descending=True)
    ranked, hits = chances[order].double(), targets[order].double().cumsum(0)
    size = torch.arange(1, len(ranked) + 1)
    f1 = 2 * hits / (size + positive)
    after = torch.cat([ranked[1:], torch.zeros(1, dtype=ranked.dtype)])
    f1 = torch.where(ranked > after, f1, -1.0)  # equal probabilities cannot be told apart
    best = int(f1.argmax())
    middle = float((ranked[best] + after[best]) / 2)
    found = 0.5 + positive / (positive + PRIOR) * (middle - 0.5)

    def score(threshold: float) -> float:
        given = chances >= threshold
        return float(2 * (given * targets).sum() / (given.sum() + positive))

    return found if score(found) > score(0.5) else 0.5


def label_table(labels: Sequence[str], given: Tensor, actual: Tensor) -> dict[str, dict[str, float]]:
    """Return precision, recall, F1 and support by label; 0 where the divisor is 0.

    Args:
        labels: names.
        given, actual: (n, labels) booleans.
    """
    hits, found, support = (t.sum(0).tolist() for t in (given & actual, given, actual))
    return {
        label: {
            "precision": h / max(f, 1),
            "recall": h / max(s, 1),
            "f1": 2 * h / max(f + s, 1),
            "support": s,
        }
        for label, h, f, s in zip(labels, hits, found, support)
    }
