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


def rank_correlation(rows: np.ndarray) -> float:
    """Compute Spearman's rank correlation; 0 where either column is constant.

    Args:
        rows: (n, 2) predicted, actual.
    """
    import numpy as np

    if np.ptp(rows[:, 0]) == 0 or np.ptp(rows[:, 1]) == 0:
        return 0.0
    from scipy.stats import rankdata

    ranks = rankdata(rows, axis=0)  # Pearson's of the ranks; bootstraps call this thousands of times
    ranks -= ranks.mean(0)
    return float((ranks[:, 0] @ ranks[:, 1]) / np.sqrt((ranks**2).sum(0).prod()))


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", True, True, statistics.mean),
        Metric("macro_f1", True, True, statistics.macro_f1),
        Metric("micro_f1", True, True, micro_f1),
        Metric("spearman", True, False, rank_correlation),
        Metric("entity_f1", True, True, micro_f1),
        Metric("answer_f1", True, True, statistics.mean),
        Metric("mrr", True, False, statistics.mean, "plain base"),
        Metric("relevance", True, True, statistics.mean),
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
