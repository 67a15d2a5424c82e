"""Classification: one label per text or pair of texts. Long texts are read in windows, rare classes weigh more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import log
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.encode import Encoded
from onebase.errors import DataError
from onebase.heads import LinearHead, make_head
from onebase.statistics import accuracy_interval, bootstrap_interval, classification_metrics, label_rows, macro_f1
from onebase.tasks.frozen import fit_classes
from onebase.tasks.pooled import PooledTask
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples, Found, Prediction, Scores, choose_option, first_rows, per_unit

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows

# Classes are uneven where the entropy of their shares is below this part of the largest possible: 89 % against 11 %
# has 0.50, 75 % against 25 % 0.81, 70 % against 30 % 0.88, the six classes of TREC have 0.93.
UNEVEN = 0.9


def evenness(counts: Sequence[int]) -> float:
    """Return the entropy of class shares over the largest possible: 1 where all classes are equally frequent."""
    total = sum(counts)
    shares = [count / total for count in counts if count]
    return -sum(p * log(p) for p in shares) / log(len(counts)) if len(counts) > 1 else 1.0


@register_task
class Classification(PooledTask):
    """One label per text."""

    kind: ClassVar[str] = "classification"
    summary: ClassVar[str] = "one label per text or pair"
    labelled: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Any]] = {**PooledTask.options, "class_weights": "auto"}
    learned: ClassVar[tuple[str, ...]] = ("metric", "weights", "head")

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Decide whether classes are uneven: then rare ones weigh more, and macro F1 is what counts."""
        how = choose_option("class_weights", spec.pop("class_weights"), ("auto", "balanced", "none"))
        spec = super().complete(spec, base, data, given)
        counts = [Counter(data.train.label or ())[label] for label in spec["labels"]]
        uneven = evenness(counts) < UNEVEN
        spec["metric"] = "macro_f1" if uneven else "accuracy"
        if how == "balanced" or (how == "auto" and uneven):
            spec["weights"] = [round(sum(counts) / (len(counts) * max(count, 1)), 6) for count in counts]
        return spec

    def targets(self, spec: Mapping[str, Any], rows: Rows) -> Tensor:
        """Return class numbers (n,)."""
        number = {label: i for i, label in enumerate(spec["labels"])}
        unseen: dict[str, int] = {}
        for i, label in enumerate(rows.label or ()):
            if label not in number:
                unseen.setdefault(label, i)
        if unseen:
            first, known = next(iter(unseen.values())), list(spec["labels"])[:10]
            raise DataError(
                f"{rows.place(first)}: labels {sorted(unseen)[:5]} are not among the adapter's labels {known}. Name "
                "the column that has those, or write the labels as the adapter has them."
            )
        return torch.tensor([number[label] for label in rows.label or ()], dtype=torch.long)

    def new_head(self, spec: Mapping[str, Any], width: int) -> LinearHead:
        """A linear map to one logit per label, behind the hidden layer of an imported head where it has one."""
        return make_head(width, len(spec["labels"]), spec.get("head"))

    def tensor_loss(self, out: Tensor, labels: Tensor, spec: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross-entropy against class numbers (b,)."""
        weight = torch.ones(len(labels), device=out.device)
        if spec.get("weights"):
            weight = torch.tensor(spec["weights"], device=out.device)[labels]
        return F.cross_entropy(out, labels, reduction="none") * weight, weight

    def fit_head(
        self, spec: Mapping[str, Any], features: Tensor, targets: Tensor, held: Tensor, held_targets: Tensor
    ) -> LinearHead:
        """Logistic regression."""
        return fit_classes(features, targets, held, held_targets, len(spec["labels"]), bool(spec.get("weights")))

    def judge(self, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, found: Found) -> Scores:
        """Compute accuracy and F1; the logits of a text's windows are averaged."""
        assert examples.targets is not None
        labels = list(spec["labels"])
        logits, targets = per_unit(examples, found.values), examples.targets[first_rows(examples)]
        best = logits.argmax(1)
        predicted, actual = [labels[i] for i in best.tolist()], [labels[i] for i in targets.tolist()]
        metrics = classification_metrics(predicted, actual, labels)
        metrics["loss"] = float(F.cross_entropy(logits, targets))
        correct = tuple((best == targets).tolist())
        rows = label_rows(predicted, actual, labels)
        if spec.get("metric", "accuracy") == "accuracy":
            interval = accuracy_interval(correct)
            return Scores("accuracy", metrics["accuracy"], interval, metrics, rows, correct, tuple(predicted))
        value = metrics["macro_f1"]
        interval = bootstrap_interval(rows, macro_f1) if len(rows) > 1 else (value, value)
        return Scores("macro_f1", value, interval, metrics, rows, correct, tuple(predicted))

    def answer(
        self, spec: Mapping[str, Any], head: nn.Module | None, name: str | None, rows: Sequence[Encoded],
        values: Sequence[Tensor], text: str, pair: str | None,
    ) -> Prediction:  # fmt: skip
        """Return label probabilities; the logits of a text's windows are averaged."""
        labels, out = list(spec["labels"]), self.finished(spec, head, values)
        shares = torch.softmax(out.mean(0).double(), -1).tolist()
        best = max(range(len(shares)), key=shares.__getitem__)
        cut = max(row.cut for row in rows)
        return Prediction(name, labels[best], dict(zip(labels, shares)), None, cut, len(out))
