"""Say how good a score is, and whether two scores on the same examples really differ.

Scores of a base and of an adapter come from the same examples, so every comparison here is paired:
it looks at what changed example by example, which is far sharper than comparing two intervals.

    one score       classification_metrics, spearman, mean, perplexity, macro_f1
    its interval    accuracy_interval (Wilson), bootstrap_interval, perplexity_interval
    two scores      mcnemar_exact for right/wrong answers, paired_bootstrap for anything else -> PairedTest

The bootstraps take per-example rows of shape (n,) or (n, k) and a `statistic` of such rows, and call it on
rows drawn with replacement. `token_rows` and `label_rows` build the rows that `perplexity` and `macro_f1`
read. A statistic of indices is the same thing: pass `np.arange(n)` as the rows.

Sources: Wilson 1927 (J. Am. Stat. Assoc. 22, 209-212); McNemar 1947 (Psychometrika 12, 153-157);
Tango 1998 (Statistics in Medicine 17, 891-908); Efron & Tibshirani 1993 (An Introduction to the Bootstrap,
ch. 13); Koehn 2004 (EMNLP, paired bootstrap); Davison & Hinkley 1997 (Bootstrap Methods, the add-one of p).
numpy and scipy are imported inside the functions, so importing this module is cheap.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onebase.errors import ConfigError, nearest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    Statistic = Callable[[np.ndarray], float]

__all__ = [
    "PairedTest",
    "accuracy_interval",
    "bootstrap_interval",
    "classification_metrics",
    "holm",
    "label_rows",
    "macro_f1",
    "mcnemar_exact",
    "mean",
    "paired_bootstrap",
    "paired_seeds",
    "perplexity",
    "perplexity_interval",
    "spearman",
    "token_rows",
]


# ------------------------------------------------------------------------------------------ the answer


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """How score b differs from score a on the same examples.

    Fields:
        test: name of the test, such as "exact McNemar".
        difference: b - a, in the score's own unit (accuracy 0.71 -> 0.75 is 0.04).
        low, high: ends of the interval of the difference.
        p_value: two-sided, in (0, 1].
        n: number of examples.
        fixed: examples that a got wrong and b got right; None where right and wrong do not apply.
        broken: examples that a got right and b got wrong; None where right and wrong do not apply.
        level: confidence of the interval, in (0, 1).
        unit: how `sentence` names the difference; "points" shows it times 100, anything else as it is.
    """

    test: str
    difference: float
    low: float
    high: float
    p_value: float
    n: int
    fixed: int | None = None
    broken: int | None = None
    level: float = 0.95
    unit: str = "points"

    def __post_init__(self) -> None:
        _check_level(self.level)
        for name in ("difference", "low", "high"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected a finite number")
        if self.low > self.high:
            raise ConfigError(f"the interval runs from {self.low!r} to {self.high!r}, expected low <= high")
        if not 0 < self.p_value <= 1:
            raise ConfigError(f"p_value is {self.p_value!r}, expected 0 < p <= 1")
        if self.n < 1:
            raise ConfigError(f"n is {self.n!r}, expected at least one example")

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of zero."""
        return self.low > 0 or self.high < 0

    def sentence(self) -> str:
        """Say the result in words.

        Returns:
            A phrase such as ``+4.2 points (95 % interval +2.1 to +6.3, exact McNemar p = 0.0001, 61 fixed,
            23 broken)``. It says "within the noise" when the interval includes zero, and "borderline" when
            the interval excludes zero but p is above 1 - level (the exact test is the more cautious one).
        """
        scale, digits = (100.0, 1) if self.unit == "points" else (1.0, 2)
        numbers = [scale * x for x in (self.difference, self.low, self.high)]
        # An end of the interval that is not zero must not be printed as zero; 6 digits is "%f"'s own default.
        while self.excludes_zero and digits < 6 and any(round(x, digits) == 0 for x in numbers):
            digits += 1
        shown, low, high = (f"{round(x, digits) + 0.0:+.{digits}f}" for x in numbers)  # + 0.0: no "-0.0"
        p = f"p = {self.p_value:.4f}" if self.p_value >= 0.0001 else "p < 0.0001"
        verdict = ""
        if not self.excludes_zero:
            verdict = ", within the noise"
        elif self.p_value > 1 - self.level:
            verdict = ", borderline"
        counts = "" if self.fixed is None else f", {self.fixed} fixed, {self.broken} broken"
        interval = f"{100 * self.level:g} % interval {low} to {high}"
        return f"{shown} {self.unit}{verdict} ({interval}, {self.test} {p}{counts})"


# ------------------------------------------------------------------------------------------ one score


def classification_metrics(
    predicted: Sequence[str | int], actual: Sequence[str | int], labels: Sequence[str | int]
) -> dict[str, Any]:
    """Score predicted labels against the actual ones.

    precision = tp / (tp + fp), recall = tp / (tp + fn), f1 = 2 tp / (2 tp + fp + fn), and 0 where the divisor
    is 0 (van Rijsbergen, Information Retrieval, 1979, ch. 7). Macro F1 is the plain mean over the labels that
    occur, as predicted or as actual (scikit-learn's default; Opitz & Burst 2019, arXiv 1911.03347, the
    "averaged F1"); weighted F1 weights by support. A label that never occurs has f1 0 and counts in neither.

    Args:
        predicted: one label per example.
        actual: the right label per example, same length.
        labels: every label, in the order of the confusion matrix; no duplicates.

    Returns:
        ``n``, ``accuracy``, ``macro_f1``, ``weighted_f1``, ``labels`` (the list), ``per_label`` (label ->
        ``precision``, ``recall``, ``f1``, ``support``) and ``confusion`` (rows actual, columns predicted),
        in plain Python numbers.

    Raises:
        ConfigError: lengths differ, there is no example, a label repeats or is not among `labels`.

    Example:
        >>> classification_metrics(["a", "b", "b"], ["a", "a", "b"], ["a", "b"])["confusion"]
        [[1, 1], [0, 1]]
    """
    import numpy as np

    rows = label_rows(predicted, actual, labels)  # (n, 2)
    names = [label.item() if isinstance(label, np.generic) else label for label in labels]  # fit for JSON
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)  # (L, L), rows actual
    np.add.at(confusion, (rows[:, 1], rows[:, 0]), 1)
    hits, support, chosen = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)  # (L,) each
    f1 = _ratio(2 * hits, support + chosen)
    columns = {
        "precision": _ratio(hits, chosen).tolist(),
        "recall": _ratio(hits, support).tolist(),
        "f1": f1.tolist(),
        "support": support.tolist(),
    }
    return {
        "n": len(rows),
        "accuracy": float(hits.sum() / len(rows)),
        "macro_f1": float(f1[support + chosen > 0].mean()),
        "weighted_f1": float(f1 @ support / len(rows)),
        "labels": names,
        "per_label": {name: {key: column[i] for key, column in columns.items()} for i, name in enumerate(names)},
        "confusion": confusion.tolist(),
    }


def spearman(predicted: ArrayLike, actual: ArrayLike) -> float:
    """Correlate the ranks of predicted and actual numbers (Spearman 1904, Am. J. Psychology 15, 72-101).

    rho is Pearson's correlation of the ranks; tied values share their mean rank.

    Args:
        predicted: (n,) finite numbers.
        actual: (n,) finite numbers, not all equal.

    Returns:
        rho in [-1, 1]; nan when all predictions are equal, which ranks nothing (a collapsed model is a
        result, not a mistake of the caller).

    Raises:
        ConfigError: lengths differ, fewer than two examples, a value is not finite, or `actual` is constant.
    """
    import numpy as np
    from scipy.stats import spearmanr

    predicted, actual = _numbers("predicted", predicted, ndim=1), _numbers("actual", actual, ndim=1)
    _same_length(predicted=predicted, actual=actual)
    _at_least_two(len(actual), "a rank correlation")
    if np.ptp(actual) == 0:
        raise ConfigError(f"all {len(actual)} actual values are {actual[0]:g}: there is no order to predict")
    if np.ptp(predicted) == 0:
        return math.nan
    result: Any = spearmanr(predicted, actual)
    return float(result.statistic)


def mean(rows: np.ndarray) -> float:
    """Average per-example values: the statistic for accuracy, error or any score with one value per example.

    Args:
        rows: (n,) values.

    Returns:
        sum(rows) / n.
    """
    return float(rows.mean())


def perplexity(rows: np.ndarray) -> float:
    """Compute token-weighted perplexity exp(sum of losses / number of tokens) (Jelinek et al. 1977).

    It is the exponential of one ratio of sums, never a mean of per-example perplexities.

    Args:
        rows: (n, 2) from `token_rows`: summed loss in nats, number of target tokens.

    Returns:
        The perplexity over all tokens of the rows.

    Raises:
        ConfigError: the mean loss is too large for a float (above about 709 nats).
    """
    loss = float(rows[:, 0].sum() / rows[:, 1].sum())
    try:
        return math.exp(loss)
    except OverflowError as error:
        raise ConfigError(
            f"a mean loss of {loss:g} nats per token is a perplexity too large for a float. "
            "Are `sums` in nats and `counts` in tokens?"
        ) from error


def macro_f1(rows: np.ndarray) -> float:
    """Compute macro F1 as `classification_metrics` does: the mean over the labels that occur in the rows.

    Args:
        rows: (n, 2) integers from `label_rows`: index of the predicted label, index of the actual one.

    Returns:
        Macro F1 in [0, 1].
    """
    import numpy as np

    size = int(rows.max()) + 1
    hits = np.bincount(rows[rows[:, 0] == rows[:, 1], 0], minlength=size)  # (L,)
    occurs = np.bincount(rows.ravel(), minlength=size)  # (L,): support + chosen
    return float(_ratio(2 * hits, occurs)[occurs > 0].mean())


def token_rows(sums: ArrayLike, counts: ArrayLike) -> np.ndarray:
    """Lay out summed losses and token counts as the rows that `perplexity` reads.

    Args:
        sums: (n,) summed loss of each example, nats.
        counts: (n,) target tokens of each example, at least 1.

    Returns:
        (n, 2) float64: sum, count.

    Raises:
        ConfigError: lengths differ, nothing is given, a value is not finite or a count is below 1.
    """
    import numpy as np

    sums, counts = _numbers("sums", sums, ndim=1), _numbers("counts", counts, ndim=1)
    _same_length(sums=sums, counts=counts)
    if (counts < 1).any():
        row = int(np.argmax(counts < 1))
        raise ConfigError(
            f"counts[{row}] is {counts[row]:g}, expected at least 1 target token: drop examples without one"
        )
    return np.stack([sums, counts], axis=1).astype(np.float64)


def label_rows(predicted: Sequence[str | int], actual: Sequence[str | int], labels: Sequence[str | int]) -> np.ndarray:
    """Lay out labels as the index rows that `macro_f1` reads.

    Args:
        predicted: one label per example.
        actual: the right label per example, same length.
        labels: every label; no duplicates.

    Returns:
        (n, 2) int64: index of the predicted label in `labels`, index of the actual one.

    Raises:
        ConfigError: lengths differ, there is no example, a label repeats or is not among `labels`.
    """
    import numpy as np

    for name, given in (("predicted", predicted), ("actual", actual), ("labels", labels)):
        if isinstance(given, str):
            raise ConfigError(f"{name} is the single text {given!r}, expected a sequence of labels")
        if len(given) == 0:
            raise ConfigError(f"{name} is empty, expected at least one label")
    _same_length(predicted=predicted, actual=actual)
    index: dict[Hashable, int] = {}
    for position, label in enumerate(labels):
        if index.setdefault(label, position) != position:
            raise ConfigError(f"label {label!r} is given twice in labels, at {index[label]} and {position}")
    return np.stack([_indices("predicted", predicted, index), _indices("actual", actual, index)], axis=1)


# ------------------------------------------------------------------------------------------ its interval


def accuracy_interval(correct: Sequence[bool], level: float = 0.95) -> tuple[float, float]:
    """Bracket an accuracy with Wilson's score interval (Wilson 1927, J. Am. Stat. Assoc. 22, 209-212).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), without continuity correction; it stays
    sensible at 0 % and 100 % and for few examples, where the Wald interval collapses (Newcombe 1998).

    Args:
        correct: (n,) whether each example was right; True/False or 1/0.
        level: confidence, in (0, 1).

    Returns:
        (low, high), both in [0, 1].

    Raises:
        ConfigError: nothing is given, a value is not true or false, or `level` is outside (0, 1).
    """
    right = _flags("correct", correct)
    n, z = len(right), _normal_quantile(level)
    share = float(right.mean())
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    # At 0 % and 100 % the end is exactly 0 or 1; rounding would leave 1e-18 or so.
    return (0.0 if share == 0 else max(0.0, low)), (1.0 if share == 1 else min(1.0, high))


def bootstrap_interval(
    per_example: ArrayLike,
    statistic: Statistic = mean,
    *,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bracket any score by drawing examples with replacement (percentile interval, Efron & Tibshirani 1993).

    A bootstrap knows only the values it was given: where all are equal the interval has no width. For an
    accuracy `accuracy_interval` is the better choice.

    Args:
        per_example: (n,) or (n, k) finite numbers, one row per example.
        statistic: a function of such rows; `mean`, `perplexity`, `macro_f1` or your own.
        seed: of the draws; the same seed and rows give the same interval.
        draws: number of resamples; Efron & Tibshirani advise 1000 or more for percentile intervals.
        level: confidence, in (0, 1).

    Returns:
        (low, high), in the statistic's unit.

    Raises:
        ConfigError: fewer than two examples, a value is not finite, a setting is out of range, or the
            statistic gives a number that is not finite on some draw.
    """
    import numpy as np

    rows = _numbers("per_example", per_example)
    _at_least_two(len(rows), "a bootstrap")
    tails = _tails(level, draws)
    scores = [_score(statistic, rows[drawn]) for drawn in _resamples(len(rows), seed, draws)]
    low, high = np.quantile(scores, tails)
    return float(low), float(high)


def perplexity_interval(
    sums: ArrayLike, counts: ArrayLike, *, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Bracket exp(sum(sums) / sum(counts)) by drawing whole examples, whose tokens are not independent.

    Args:
        sums: (n,) summed loss of each example, nats.
        counts: (n,) target tokens of each example, at least 1.
        seed: of the draws.
        draws: number of resamples.
        level: confidence, in (0, 1).

    Returns:
        (low, high) perplexity.

    Raises:
        ConfigError: as `token_rows` and `bootstrap_interval`.
    """
    return bootstrap_interval(token_rows(sums, counts), perplexity, seed=seed, draws=draws, level=level)


# ------------------------------------------------------------------------------------------ two scores


def mcnemar_exact(correct_a: Sequence[bool], correct_b: Sequence[bool], level: float = 0.95) -> PairedTest:
    """Test whether b is right more or less often than a on the same examples (McNemar 1947, exact form).

    Only the examples on which they disagree count: without a difference fixed ~ Binomial(fixed + broken, 1/2)
    and p = min(1, 2 P(X <= min(fixed, broken))). The interval of the difference inverts Tango's score test
    (Tango 1998); it excludes zero exactly when McNemar's chi-square without continuity correction rejects, so
    near the border the exact p can be slightly above 1 - level while the interval excludes zero.

    Args:
        correct_a: (n,) whether a was right; True/False or 1/0.
        correct_b: (n,) whether b was right, same examples in the same order.
        level: confidence of the interval, in (0, 1).

    Returns:
        A `PairedTest` with difference = accuracy of b - accuracy of a = (fixed - broken) / n.
        p is floored at the smallest normal float, because 2^-fixed can underflow to 0.

    Raises:
        ConfigError: lengths differ, nothing is given, a value is not true or false, `level` not in (0, 1).

    Example:
        >>> mcnemar_exact([0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]).p_value
        0.03125
    """
    from scipy.stats import binom

    a, b = _flags("correct_a", correct_a), _flags("correct_b", correct_b)
    _same_length(correct_a=a, correct_b=b)
    fixed, broken, n = int((b & ~a).sum()), int((a & ~b).sum()), len(a)
    p = min(1.0, 2 * float(binom.cdf(min(fixed, broken), fixed + broken, 0.5))) if fixed + broken else 1.0
    z = _normal_quantile(level)
    return PairedTest(
        test="exact McNemar",
        difference=(fixed - broken) / n,
        low=-_tango_upper(broken, fixed, n, z) + 0.0,
        high=_tango_upper(fixed, broken, n, z),
        p_value=max(p, sys.float_info.min),
        n=n,
        fixed=fixed,
        broken=broken,
        level=level,
    )


def paired_bootstrap(
    per_example_a: ArrayLike,
    per_example_b: ArrayLike,
    statistic: Statistic = mean,
    *,
    seed: int = 0,
    draws: int = 5000,
    level: float = 0.95,
    unit: str = "points",
) -> PairedTest:
    """Test whether a statistic differs between a and b, drawing the same examples for both (Koehn 2004).

    d* = statistic(b[drawn]) - statistic(a[drawn]). The interval is the percentile interval of d* (Efron &
    Tibshirani 1993, ch. 13); p inverts it, p = min(1, 2 (1 + min(#{d* <= 0}, #{d* >= 0})) / (draws + 1)),
    where the one that is added keeps p from 0, which no finite simulation can show (Davison & Hinkley 1997;
    Phipson & Smyth 2010, arXiv 1603.05766). So p is never below 2 / (draws + 1).

    Args:
        per_example_a: (n,) or (n, k) finite numbers, one row per example.
        per_example_b: the same shape, the same examples in the same order.
        statistic: a function of such rows; `mean`, `perplexity`, `macro_f1` or your own.
        seed: of the draws; the same seed and rows give the same result.
        draws: number of resamples.
        level: confidence of the interval, in (0, 1).
        unit: how the difference is named; "points" for shares (shown times 100), or such as "perplexity".

    Returns:
        A `PairedTest` with difference = statistic of b - statistic of a on all rows.

    Raises:
        ConfigError: shapes differ, fewer than two examples, a value is not finite, a setting is out of range,
            or the statistic gives a number that is not finite on some draw.
    """
    import numpy as np

    a, b = _numbers("per_example_a", per_example_a), _numbers("per_example_b", per_example_b)
    _same_length(per_example_a=a, per_example_b=b)
    if a.shape != b.shape:
        raise ConfigError(f"per_example_a has shape {a.shape} and per_example_b {b.shape}, expected the same")
    _at_least_two(len(a), "a bootstrap")
    tails = _tails(level, draws)
    difference = _score(statistic, b) - _score(statistic, a)
    drawn_differences = np.array(
        [_score(statistic, b[drawn]) - _score(statistic, a[drawn]) for drawn in _resamples(len(a), seed, draws)]
    )  # (draws,)
    low, high = np.quantile(drawn_differences, tails)
    against = min(int((drawn_differences <= 0).sum()), int((drawn_differences >= 0).sum()))
    return PairedTest(
        test="paired bootstrap",
        difference=difference,
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2 * (1 + against) / (draws + 1)),
        n=len(a),
        level=level,
        unit=unit,
    )


# ------------------------------------------------------------------------------------------ the parts


def _tango_upper(fixed: int, broken: int, n: int, z: float) -> float:
    """Return the largest difference that Tango's score test accepts; the lower end is minus this, swapped.

    The test accepts d when (fixed - broken - n d)^2 <= z^2 n (2 q + d (1 - d)), q the share of broken pairs
    that is most likely given d: the root of 2n q^2 + (2n d - d (fixed - broken) - fixed - broken) q
    - broken d (1 - d) = 0. Acceptance ends once on the way from the estimate to 1.
    """

    def accepts(d: float) -> bool:
        slope = (2 * n - fixed + broken) * d - fixed - broken
        constant = -broken * d * (1 - d)
        root = math.sqrt(max(0.0, slope * slope - 8 * n * constant))
        # Two forms of the same root: the one without cancellation for this sign of the slope.
        q = (root - slope) / (4 * n) if slope <= 0 else -2 * constant / (slope + root)
        return (fixed - broken - n * d) ** 2 <= z * z * n * max(0.0, 2 * q + d * (1 - d))

    inside, outside = (fixed - broken) / n, 1.0
    for _ in range(sys.float_info.mant_dig):  # halve until the float is used up
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if accepts(middle) else (inside, middle)
    return inside


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Divide elementwise, with 0 where the divisor is 0."""
    import numpy as np

    return np.divide(top, bottom, out=np.zeros(top.shape), where=bottom > 0)


def _resamples(n: int, seed: int, draws: int) -> Iterator[np.ndarray]:
    """Yield `draws` index arrays of shape (n,), drawn with replacement; one at a time, to bound memory."""
    import numpy as np

    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ConfigError(f"seed is {seed!r}, expected a whole number of 0 or more")
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield generator.integers(0, n, size=n)


def _score(statistic: Statistic, rows: np.ndarray) -> float:
    """Apply a statistic and refuse what is not a finite number."""
    value = float(statistic(rows))
    if not math.isfinite(value):
        name = getattr(statistic, "__name__", repr(statistic))
        raise ConfigError(
            f"statistic {name} gave {value!r} on {len(rows)} rows, expected a finite number: "
            "it must be defined on every resample of the examples"
        )
    return value


def _tails(level: float, draws: int) -> list[float]:
    """Return the two quantiles of a `level` interval, after checking that `draws` reach into both tails."""
    _check_level(level)
    needed = math.ceil(round(2 / (1 - level), 6))  # one draw in each tail; round: 2 / (1 - 0.95) is 39.99..96
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < needed:
        raise ConfigError(f"draws is {draws!r}, expected a whole number of at least {needed} for level {level}")
    return [(1 - level) / 2, (1 + level) / 2]


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        hint = f" Did you mean {level / 100:g}?" if 1 < level < 100 else ""
        raise ConfigError(f"level is {level!r}, expected a share between 0 and 1, such as 0.95.{hint}")


def _normal_quantile(level: float) -> float:
    """Return z with P(|Z| <= z) = level for a standard normal Z."""
    from scipy.special import ndtri

    _check_level(level)
    return float(ndtri((1 + level) / 2))


def _numbers(name: str, values: ArrayLike, ndim: int | None = None) -> np.ndarray:
    """Turn `values` into a non-empty finite array of one or two dimensions; floats become float64."""
    import numpy as np

    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ConfigError(f"{name} cannot be made an array of numbers: {error}") from error
    if array.dtype.kind in "bf":
        array = array.astype(np.int64 if array.dtype.kind == "b" else np.float64)
    if array.size and array.dtype.kind not in "iuf":
        raise ConfigError(f"{name} holds {array.ravel().tolist()[0]!r}, expected numbers")
    if array.ndim not in ((ndim,) if ndim else (1, 2)):
        wanted = f"{ndim} dimension" if ndim else "(n,) or (n, k)"
        raise ConfigError(f"{name} has shape {array.shape}, expected {wanted}")
    if array.size == 0:
        raise ConfigError(f"{name} is empty (shape {array.shape}), expected at least one example")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        where = ", ".join(map(str, bad[0]))
        raise ConfigError(f"{name}[{where}] is {array[tuple(bad[0])]}, expected finite numbers ({len(bad)} are not)")
    return array


def _flags(name: str, values: Sequence[bool]) -> np.ndarray:
    """Turn true/false or 1/0 into a bool array of shape (n,)."""
    import numpy as np

    array = _numbers(name, values, ndim=1)
    bad = np.flatnonzero((array != 0) & (array != 1))
    if len(bad):
        raise ConfigError(f"{name}[{bad[0]}] is {array[bad[0]]}, expected True or False (or 1 or 0)")
    return array.astype(bool)


def _indices(name: str, values: Sequence[Hashable], index: dict[Hashable, int]) -> np.ndarray:
    """Look up the position of every label."""
    import numpy as np

    found = np.empty(len(values), dtype=np.int64)
    for row, value in enumerate(values):
        if value not in index:
            hint = nearest(str(value), map(str, index))
            raise ConfigError(f"{name}[{row}] is {value!r}, which is not among labels. {hint}")
        found[row] = index[value]
    return found


def _same_length(**columns: Any) -> None:
    (name_a, a), (name_b, b) = columns.items()
    if len(a) != len(b):
        raise ConfigError(f"{name_a} has {len(a)} examples and {name_b} has {len(b)}, expected the same examples")


def _at_least_two(n: int, what: str) -> None:
    if n < 2:
        raise ConfigError(f"{what} needs at least 2 examples, got {n}")


# ------------------------------------------------------------------------------------------ several runs and methods


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for how many were looked at (Holm 1979, Scand. J. Statistics 6, 65-70).

    Args:
        p_values: each in (0, 1].

    Returns:
        Adjusted p-values in the same order: rejecting those below alpha errs in the whole family at most so often.

    Raises:
        ConfigError: a value is not a probability.
    """
    for i, p in enumerate(p_values):
        if not 0 < p <= 1:
            raise ConfigError(f"p_values[{i}] is {p!r}, expected 0 < p <= 1")
    found, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        found[i] = largest
    return found


def paired_seeds(
    runs_a: Sequence[ArrayLike],
    runs_b: Sequence[ArrayLike],
    statistic: Statistic = mean,
    *,
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
    unit: str = "points",
) -> PairedTest:
    """Test whether two methods differ, over seeds and examples: both are drawn with replacement.

    Each draw takes the same examples for every run, and runs of a and of b apart; a score is the mean over the runs
    drawn. The interval is a percentile interval, p inverts it as in `paired_bootstrap`. With three runs a resample
    understates the spread over seeds, so close calls are closer than they look.

    Args:
        runs_a, runs_b: per run rows (n,) or (n, k), the same examples in all.
        statistic, seed, draws, level, unit: as in `paired_bootstrap`.

    Returns:
        A `PairedTest` with difference = mean score of b - mean score of a.

    Raises:
        ConfigError: no run, or rows of different shapes.
    """
    import numpy as np

    if not runs_a or not runs_b:
        raise ConfigError(f"got {len(runs_a)} and {len(runs_b)} runs, expected at least one of each")
    a, b = ([_numbers("rows", run) for run in runs] for runs in (runs_a, runs_b))
    shapes = {run.shape for run in (*a, *b)}
    if len(shapes) > 1:
        raise ConfigError(f"the runs have rows of shapes {sorted(shapes)}, expected the same")
    _at_least_two(len(a[0]), "a bootstrap")
    tails = _tails(level, draws)
    generator = np.random.default_rng(seed)

    def score(runs: list[np.ndarray], picks: Any, rows: Any) -> float:
        return sum(_score(statistic, runs[i][rows]) for i in picks) / len(picks)

    everything = np.arange(len(a[0]))
    difference = score(b, range(len(b)), everything) - score(a, range(len(a)), everything)
    found = []
    for drawn in _resamples(len(a[0]), seed, draws):
        one, two = (generator.integers(0, len(runs), len(runs)) for runs in (a, b))
        found.append(score(b, two, drawn) - score(a, one, drawn))
    drawn_differences = np.array(found)
    low, high = np.quantile(drawn_differences, tails)
    against = min(int((drawn_differences <= 0).sum()), int((drawn_differences >= 0).sum()))
    return PairedTest(
        test="bootstrap over seeds and examples", difference=difference, low=float(low), high=float(high),
        p_value=min(1.0, 2 * (1 + against) / (draws + 1)), n=len(a[0]), level=level, unit=unit,
    )  # fmt: skip


def seeds_interval(
    runs: Sequence[ArrayLike],
    statistic: Statistic = mean,
    *,
    seed: int = 0,
    draws: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bracket the mean score of several runs by drawing runs and examples with replacement, as `paired_seeds` does.

    Args:
        runs: per run rows (n,) or (n, k), the same examples in all.
        statistic, seed, draws, level: as in `bootstrap_interval`.

    Returns:
        (low, high), in the statistic's unit.

    Raises:
        ConfigError: no run, or rows of different shapes.
    """
    import numpy as np

    if not runs:
        raise ConfigError("got no runs, expected at least one")
    rows = [_numbers("rows", run) for run in runs]
    shapes = {run.shape for run in rows}
    if len(shapes) > 1:
        raise ConfigError(f"the runs have rows of shapes {sorted(shapes)}, expected the same")
    _at_least_two(len(rows[0]), "a bootstrap")
    tails, generator = _tails(level, draws), np.random.default_rng(seed)
    found = []
    for drawn in _resamples(len(rows[0]), seed, draws):
        picks = generator.integers(0, len(rows), len(rows))
        found.append(sum(_score(statistic, rows[i][drawn]) for i in picks) / len(picks))
    low, high = np.quantile(found, tails)
    return float(low), float(high)


def calibration(confidence: ArrayLike, correct: Sequence[bool], bins: int = 15) -> tuple[float, list[list[float]]]:
    """Compare confidence with being right: expected calibration error over bins of equal width.

    ECE = sum over bins of n_b / n * |accuracy_b - confidence_b| (Guo et al. 2017, arXiv 1706.04599, eq. 3).

    Args:
        confidence: (n,) probability of each answer, 0 to 1.
        correct: (n,) whether it was right.
        bins: of equal width; 15 as in the paper.

    Returns:
        (ECE, per bin that holds answers [mean confidence, accuracy, answers]).

    Raises:
        ConfigError: lengths differ, a value is no probability, or no bins.
    """
    import numpy as np

    sure, right = _numbers("confidence", confidence, 1), _flags("correct", correct)
    _same_length(confidence=sure, correct=right)
    if bins < 1:
        raise ConfigError(f"bins is {bins!r}, expected at least 1")
    if sure.min() < 0 or sure.max() > 1:
        raise ConfigError(f"confidence has values from {sure.min()} to {sure.max()}, expected 0 to 1")
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)  # bins are (low, high], as in the paper
    found, error = [], 0.0
    for number in range(bins):
        mine = place == number
        if mine.any():
            found.append([float(sure[mine].mean()), float(right[mine].mean()), int(mine.sum())])
            error += mine.sum() / len(sure) * abs(found[-1][1] - found[-1][0])
    return float(error), found
