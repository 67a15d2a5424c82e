"""Metrics by name: which way is better, how to show them, how they are computed from one row per unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onebase import statistics
from onebase.errors import unknown

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: its name.
        higher: a larger value is better.
        percent: shown times 100.
        statistic: computes it from rows (n, k), one row per unit.
        own: what the base's own score is, for people.
    """

    name: str
    higher: bool
    percent: bool
    statistic: Callable[[np.ndarray], float]
    own: str = "its own head, base frozen"


def micro_f1(rows: np.ndarray) -> float:
    """Compute micro F1 of sets of labels or spans, 2 tp / (2 tp + fp + fn).

    Args:
        rows: (n, 3) counts per unit: right, wrongly found, missed.

    Returns:
        Micro F1; 1 where there was nothing to find and nothing was found.
    """
    hits, extra, missed = rows.sum(0)
    return 1.0 if hits + extra + missed == 0 else float(2 * hits / (2 * hits + extra + missed))


def pooled_share(rows: np.ndarray) -> float:
    """Compute the share of right parts over all units.

    Args:
        rows: (n, 2) right parts and all parts of each unit.
    """
    right, total = rows.sum(0)
    return float(right / total) if total else 0.0


def rank_correlation(rows: np.ndarray) -> float:
    """Compute Spearman's rank correlation, tied values sharing their mean rank; 0 where either column is constant.

    It is `statistics.spearman` without its checks and p-value: a bootstrap calls it thousands of times.

    Args:
        rows: (n, 2) predicted, actual.
    """
    import numpy as np

    def ranks(values: np.ndarray) -> np.ndarray:
        _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
        middle = np.cumsum(counts) - (counts - 1) / 2
        return middle[group] - (len(values) + 1) / 2

    one, two = ranks(rows[:, 0]), ranks(rows[:, 1])
    size = float(np.sqrt((one @ one) * (two @ two)))
    return float(one @ two) / size if size > 0 else 0.0


def average_precision(rows: np.ndarray) -> float:
    """Compute average precision, sum over the relevant rows of precision at their score, over their number.

    Rows of equal score are one step, as in scikit-learn's average_precision_score. 0 where nothing is relevant.

    Args:
        rows: (n, 2) score, relevant (0 or 1).
    """
    import numpy as np

    order = np.argsort(-rows[:, 0], kind="stable")
    scores, hits = rows[order, 0], np.cumsum(rows[order, 1])
    if hits[-1] == 0:
        return 0.0
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # last row of each distinct score
    return float((np.diff(hits[ends], prepend=0.0) * hits[ends] / (ends + 1)).sum() / hits[-1])


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", True, True, statistics.mean),
        Metric("macro_f1", True, True, statistics.macro_f1),
        Metric("micro_f1", True, True, micro_f1),
        Metric("spearman", True, False, rank_correlation),
        Metric("entity_f1", True, True, micro_f1),
        Metric("token_accuracy", True, True, pooled_share),
        Metric("answer_f1", True, True, statistics.mean),
        Metric("mrr", True, False, statistics.mean, "plain base"),
        Metric("relevance", True, True, average_precision),
        Metric("cosine_spearman", True, False, rank_correlation, "plain base"),
        Metric("perplexity", False, False, statistics.perplexity, "plain base"),
    )
}


def metric_of(name: str) -> Metric:
    """Return a metric by name.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in METRICS:
        raise unknown("metric", name, METRICS)
    return METRICS[name]
