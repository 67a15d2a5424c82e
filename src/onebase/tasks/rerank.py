"""Reranking: how relevant a document is to a query, from a reader of both (Nogueira & Cho 2019, arXiv 1901.04085)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.encode import Encoded
from onebase.heads import LinearHead
from onebase.statistics import bootstrap_interval, mean
from onebase.tasks.frozen import fit_labels
from onebase.tasks.metrics import average_precision
from onebase.tasks.pooled import PooledTask
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples, Found, Prediction, Scores

if TYPE_CHECKING:
    import numpy as np

    from onebase.base import Base
    from onebase.data import Data, Rows

RELEVANT = 0.5  # of the scaled relevance: the upper half of the grades


@register_task
class Rerank(PooledTask):
    """One logit per query and document. The query is the first text of the pair, the document the second one."""

    kind: ClassVar[str] = "rerank"
    summary: ClassVar[str] = "how relevant a document is to a query"
    options: ClassVar[Mapping[str, Any]] = {"pairs": "auto"}
    learned: ClassVar[tuple[str, ...]] = ("lowest", "highest")

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Take the range of the relevance from the training rows."""
        spec = super().complete(spec | {"pair": True}, base, data, given)
        grades = [float(value) for value in data.train["label"]]
        return spec | {"lowest": min(grades), "highest": max(grades)}

    def without_data(self, spec: dict[str, Any], base: Base) -> dict[str, Any]:
        """Relevance is 0 to 1, unless the spec has a range."""
        return {"lowest": 0.0, "highest": 1.0, **super().without_data(spec | {"pair": True}, base)}

    def texts(self, rows: Rows) -> tuple[Sequence[str], Sequence[str] | None]:
        """Return queries and documents."""
        return rows["query"], rows["document"]

    def targets(self, spec: Mapping[str, Any], rows: Rows) -> Tensor:
        """Return the relevance (n, 1), 0 to 1; a grade outside the range of training counts as its end."""
        grades = torch.tensor([[float(value)] for value in rows["label"]])
        return ((grades - spec["lowest"]) / (spec["highest"] - spec["lowest"])).clamp(0, 1)

    def new_head(self, spec: Mapping[str, Any], width: int) -> LinearHead:
        """A linear map to one logit."""
        return LinearHead(width, 1)

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Encode pairs, and remember which of them share a query."""
        examples = super().encode(base, spec, rows)
        if len(rows):
            number = {query: i for i, query in enumerate(dict.fromkeys(rows["query"]))}
            group = torch.tensor([number[query] for query in rows["query"]])
            for each in (examples, examples.facts["other"]):
                each.facts["group"] = group
        return examples

    def tensor_loss(self, out: Tensor, labels: Tensor, spec: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy against relevance (b,) in 0 to 1."""
        losses = F.binary_cross_entropy_with_logits(out.view(-1), labels.view(-1).to(out.dtype), reduction="none")
        return losses, torch.ones_like(losses)

    def fit_head(
        self, spec: Mapping[str, Any], features: Tensor, targets: Tensor, held: Tensor, held_targets: Tensor
    ) -> LinearHead:
        """Logistic regression."""
        head = self.new_head(spec, features.shape[1])
        fit_labels(head, features, targets, held, held_targets, [1.0])
        return head

    def judge(self, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, found: Found) -> Scores:
        """Compute the mean reciprocal rank where queries have several documents, else average precision.

        A document is relevant where its scaled relevance is at least one half. Queries with a single document, or
        without a relevant one, rank nothing and do not count in the mean reciprocal rank.
        """
        assert examples.targets is not None
        logits, targets = torch.stack(found.values).view(-1), examples.targets.view(-1)
        relevant = (targets >= RELEVANT).double()
        pairs = torch.stack([logits.double(), relevant], 1).numpy()
        ranks = reciprocal_ranks(pairs, examples.facts["group"].tolist())
        metrics: dict[str, Any] = {
            "n": len(pairs),
            "relevance": average_precision(pairs),
            "loss": float(F.binary_cross_entropy_with_logits(logits, targets)),
        }
        if len(ranks):
            metrics |= {"mrr": float(ranks.mean()), "first": float((ranks == 1).mean()), "queries": len(ranks)}
        metric, rows, statistic = ("mrr", ranks, mean) if len(ranks) else ("relevance", pairs, average_precision)
        value = metrics[metric]
        interval = bootstrap_interval(rows, statistic) if len(rows) > 1 else (value, value)
        return Scores(metric, value, interval, metrics, rows)

    def answer(
        self, spec: Mapping[str, Any], head: nn.Module | None, name: str | None, rows: Sequence[Encoded],
        values: Sequence[Tensor], text: str, pair: str | None,
    ) -> Prediction:  # fmt: skip
        """Return the relevance, 0 to 1."""
        logit = self.finished(spec, head, values).double()
        return Prediction(name, None, {}, None, max(row.cut for row in rows), value=float(torch.sigmoid(logit)))


def reciprocal_ranks(pairs: np.ndarray, group: Sequence[int]) -> np.ndarray:
    """Return 1 / rank of the best relevant document of each query that has several documents, one of them relevant.

    Irrelevant documents of the same score stand before it: who gives all the same score knows nothing.

    Args:
        pairs: (n, 2) score, relevant (0 or 1).
        group: n numbers of queries.

    Returns:
        (queries,), in the order in which they first occur.
    """
    import numpy as np

    members: dict[int, list[int]] = defaultdict(list)
    for row, query in enumerate(group):
        members[query].append(row)
    found = []
    for rows in members.values():
        scores, relevant = pairs[rows, 0], pairs[rows, 1] > 0
        if len(rows) > 1 and relevant.any():
            found.append(1.0 / (1 + int((scores[~relevant] >= scores[relevant].max()).sum())))
    return np.array(found)
