"""Regression: a number per text or pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from onebase.encode import Encoded
from onebase.heads import LinearHead
from onebase.statistics import bootstrap_interval
from onebase.tasks.frozen import fit_numbers
from onebase.tasks.metrics import rank_correlation
from onebase.tasks.pooled import PooledTask
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples, Found, Prediction, Scores, first_rows, per_unit

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows


class NumberHead(LinearHead):
    """A linear map to one number in the target's own unit, computed at a mean of 0 and a deviation of 1.

    The targets of data sets differ by orders of magnitude; standardised, one learning rate fits all of them.

    Args:
        width: D.
        center, scale: mean and standard deviation of the targets in training.
    """

    def __init__(self, width: int, center: float, scale: float):
        super().__init__(width, 1)
        self.target_center = nn.Buffer(torch.tensor(float(center)))
        self.target_scale = nn.Buffer(torch.tensor(float(scale)))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (..., 1), float32, of vectors (..., D)."""
        return super().forward(vectors) * self.target_scale + self.target_center


@register_task
class Regression(PooledTask):
    """A number per text. Predictions are not held within the range of the training targets: a limit would tie them,
    and what lies outside says that the text is unlike those of training."""

    kind: ClassVar[str] = "regression"
    summary: ClassVar[str] = "a number per text or pair"
    # STS-B, embedded base, LoRA with its defaults, Spearman on test: .848 read apart, .828 the frozen base.
    default_pairs: ClassVar[str] = "apart"
    learned: ClassVar[tuple[str, ...]] = ("center", "scale")

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Take mean and deviation of the targets from the training rows."""
        spec = super().complete(spec, base, data, given)
        targets = self.targets(spec, data.train).double()
        return spec | {"center": float(targets.mean()), "scale": float(targets.std()) or 1.0}

    def without_data(self, spec: dict[str, Any], base: Base) -> dict[str, Any]:
        """Numbers are as they are, unless the spec has a mean and a deviation."""
        return {"center": 0.0, "scale": 1.0, **super().without_data(spec, base)}

    def targets(self, spec: Mapping[str, Any], rows: Rows) -> Tensor:
        """Return the numbers (n,)."""
        return torch.tensor([float(value) for value in rows["score"]])

    def new_head(self, spec: Mapping[str, Any], width: int) -> LinearHead:
        """A linear map to the number."""
        return NumberHead(width, spec["center"], spec["scale"])

    def tensor_loss(self, out: Tensor, labels: Tensor, spec: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Squared error against numbers (b,), in units of the training targets' variance."""
        error = (out.view(-1) - labels.view(-1).to(out.dtype)) / spec["scale"]
        return error**2, torch.ones_like(error)

    def fit_head(
        self, spec: Mapping[str, Any], features: Tensor, targets: Tensor, held: Tensor, held_targets: Tensor
    ) -> LinearHead:
        """Ridge regression."""
        head = self.new_head(spec, features.shape[1])
        first, second = ((t - spec["center"]) / spec["scale"] for t in (targets, held_targets))
        fit_numbers(head, features, first, held, second)
        return head

    def judge(self, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, found: Found) -> Scores:
        """Compute rank correlation and errors; the numbers of a text's windows are averaged."""
        import numpy as np

        assert examples.targets is not None
        values, targets = per_unit(examples, found.values).view(-1), examples.targets[first_rows(examples)]
        rows = torch.stack([values, targets], 1).double().numpy()
        error = rows[:, 0] - rows[:, 1]
        varied = bool(np.ptp(rows[:, 0]) and np.ptp(rows[:, 1]))
        value = rank_correlation(rows)
        metrics: dict[str, Any] = {
            "n": len(rows),
            "spearman": value,
            "pearson": float(np.corrcoef(rows.T)[0, 1]) if varied else 0.0,
            "mae": float(np.abs(error).mean()),
            "rmse": float(np.sqrt((error**2).mean())),
            "loss": float((error**2).mean()) / spec["scale"] ** 2,
        }
        interval = bootstrap_interval(rows, rank_correlation) if len(rows) > 1 else (value, value)
        return Scores("spearman", value, interval, metrics, rows)

    def answer(
        self, spec: Mapping[str, Any], head: nn.Module | None, name: str | None, rows: Sequence[Encoded],
        values: Sequence[Tensor], text: str, pair: str | None,
    ) -> Prediction:  # fmt: skip
        """Return the number, the mean over the windows of a long text."""
        out = self.finished(spec, head, values)
        return Prediction(name, None, {}, None, max(row.cut for row in rows), len(out), value=float(out.mean()))
