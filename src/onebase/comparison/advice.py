"""`recommend`: which method, in words, from measured records: never from the mean alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onebase.statistics import holm

ALPHA = 0.05
NEAR = 0.32  # p-value of a difference of one standard error: what lies further from the best is not taken for cheapness
HEAD, FULL = "head only", "full"
ALIKE = 4  # files that differ by less than this factor cost the same: then the higher mean is taken
SLOWER = 1.1  # among equals, a method up to this much slower than the fastest is not held to be slower: timing noise


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one method.

    Attributes:
        method: shorthand, 'head only' or 'full'.
        value: metric on the test rows, mean over seeds.
        low, high: its 95 % interval over seeds and examples.
        values: by seed.
        higher: whether a larger value is better.
        metric: its name.
        parameters, share: trained values, and their share of the base's.
        bytes: of one file.
        seconds: training time of one run by itself, scoring not counted.
        latency: seconds of one text; throughput: texts a second, 16 at once; attached.
        merged_latency, merged_throughput: written into the base's weights; None where that cannot be.
        slowdown: latency over that of the plain base.
        memory: bytes of tensors at the highest point of training, None where not measured.
        mergeable: can become weights of the base; then it costs no time.
        forgetting: change of the base on neutral text with the adapter on, mean over seeds, None where not measured.
        forgetting_measure: 'loss' (nats per token) or 'distance' (1 - cosine of states), see `comparison.forgetting`.
        versus: other method -> (difference to it, p-value), paired on the same rows.
        p_best, p_full: p-values against the highest mean and against full fine-tuning, Holm over the methods.
        lr: the learning rate chosen on validation.
        seeds: of the runs; curves: by seed, the epochs.
        metrics: every metric of the first seed.
        confusion: rows actual, columns predicted, summed over seeds; () where answers are no single labels.
        ece: expected calibration error over all seeds; calibration: per bin (confidence, accuracy, answers).
        fixed, broken: rows that the base's own head got wrong and the first seed right, and the other way round;
            examples: a few of each.
        partial: the budget or an interrupt ended a run before its last epoch.
    """

    method: str
    value: float
    low: float
    high: float
    values: tuple[float, ...] = ()
    higher: bool = True
    metric: str = "accuracy"
    parameters: int = 0
    share: float = 0.0
    bytes: int = 0
    seconds: float = 0.0
    latency: float = 0.0
    throughput: float = 0.0
    slowdown: float = 1.0
    mergeable: bool = False
    merged_latency: float | None = None
    merged_throughput: float | None = None
    memory: int | None = None
    forgetting: float | None = None
    forgetting_measure: str = ""
    versus: dict[str, tuple[float, float]] = field(default_factory=dict)
    lr: float | None = None
    curves: tuple[Any, ...] = ()
    p_best: float | None = None
    p_full: float | None = None
    seeds: tuple[int, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    confusion: tuple[Any, ...] = ()
    ece: float | None = None
    calibration: tuple[Any, ...] = ()
    fixed: int = 0
    broken: int = 0
    examples: dict[str, Any] = field(default_factory=dict)
    partial: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a method may cost.

    Attributes:
        max_share: trained values over the base's, 0.005 is 0.5 %.
        max_slowdown: latency over that of the plain base; a mergeable method has 1.
        must_merge: only what can become weights of the base.
        tasks: how many tasks share the base.
    """

    max_share: float | None = None
    max_slowdown: float | None = None
    must_merge: bool = False
    tasks: int = 1


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A recommendation.

    Attributes:
        method: the one to take, None where nothing fits the limits.
        runner_up: the next one, or None.
        reasons: sentences.
        excluded: method -> why it was not considered.
        front: methods that no other one beats on score, file and speed at once.
        equal: methods whose distance to the best is within the noise.
    """

    method: str | None
    runner_up: str | None
    reasons: tuple[str, ...]
    excluded: dict[str, str]
    front: tuple[str, ...]
    equal: tuple[str, ...]


def speed(result: Result) -> float:
    """Return how much slower than the base a method can be served."""
    return 1.0 if result.mergeable else result.slowdown


def recommend(results: Sequence[Result], limits: Limits | None = None) -> Advice:
    """Recommend a method: of those that fit and are within a standard error of the best, one of those that cost least.

    That a test finds no difference does not mean that there is none: of methods that are further away, within the noise
    or not, some would be found worse with other seeds. So the one-standard-error rule (Breiman et al. 1984,
    Classification and Regression Trees) says which are near enough, and Holm's test which ones are called equal.

    Full fine-tuning comes last: a model per task shares nothing and mixes with nothing. Before it come slow ones. Then
    the size of a file counts by its order of magnitude, and among files alike the score.

    Args:
        results: one per method.
        limits: what it may cost.
    """
    limits = limits or Limits()
    excluded = {r.method: why for r in results if (why := _misfit(r, limits))}
    fit = [r for r in results if r.method not in excluded]
    if not fit:
        said = ("No method fits the limits: " + "; ".join(f"{m}: {why}" for m, why in excluded.items()) + ".",)
        return Advice(method=None, runner_up=None, reasons=said, excluded=excluded, front=(), equal=())
    best = max(fit, key=lambda r: r.value if r.higher else -r.value)
    others = [r for r in fit if r is not best]
    p_values = {r.method: r.versus.get(best.method, (0.0, 1.0))[1] for r in others}
    adjusted = dict(zip(p_values, holm(list(p_values.values()))))
    equal = [best, *(r for r in others if adjusted[r.method] >= ALPHA)]
    near = [r for r in equal if r is best or p_values[r.method] >= NEAR]
    cheap = sorted(near, key=lambda r: _cost(r, near))
    chosen = cheap[0]
    rest = cheap[1:] or sorted(others, key=lambda r: -r.value if r.higher else r.value)
    front = tuple(r.method for r in fit if not any(_beats(o, r) for o in fit))
    reasons = _reasons(chosen, best, equal, rest, adjusted, results, limits)
    return Advice(
        method=chosen.method, runner_up=rest[0].method if rest else None, reasons=tuple(reasons), excluded=excluded,
        front=front, equal=tuple(r.method for r in equal),
    )  # fmt: skip


def _misfit(result: Result, limits: Limits) -> str:
    if limits.must_merge and not result.mergeable and result.method != HEAD:
        return "it cannot be merged into the base"
    if limits.max_share is not None and result.share > limits.max_share:
        return f"it trains {result.share:.2%} of the base, more than {limits.max_share:.2%}"
    if limits.max_slowdown is not None and speed(result) > limits.max_slowdown:
        return f"it answers in {speed(result):.2f} times the base's time, more than {limits.max_slowdown:g}"
    return ""


def _cost(result: Result, equal: Sequence[Result]) -> tuple[bool, bool, int, float, int, float]:
    """Return what equals are sorted by: whether it is a model of its own, whether it is slow, file, score, file, time.

    The file counts by its order of magnitude first; no adapter at all is simpler than the smallest one.
    """
    slow = speed(result) > SLOWER * min((speed(r) for r in equal if r.method != FULL), default=1.0)
    smallest = min((r.bytes for r in equal if r.bytes and r.method != HEAD), default=1)
    magnitude = -1 if not result.bytes or result.method == HEAD else int(math.log(result.bytes / smallest, ALIKE))
    score = -result.value if result.higher else result.value
    return result.method == FULL, slow, magnitude, score, result.bytes, result.seconds


def _beats(one: Result, other: Result) -> bool:
    """Whether one is at least as good in score, file and speed, and better in one of them."""
    sign = 1 if one.higher else -1
    pairs = [(sign * one.value, sign * other.value), (-one.bytes, -other.bytes), (-speed(one), -speed(other))]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


def _reasons(
    chosen: Result, best: Result, equal: Sequence[Result], rest: Sequence[Result], adjusted: dict[str, float],
    results: Sequence[Result], limits: Limits,
) -> list[str]:  # fmt: skip
    said = [
        f"{chosen.method} scores {chosen.metric} {chosen.value:.4f} (95 % interval {chosen.low:.4f} to "
        f"{chosen.high:.4f}), trains {chosen.parameters:,} values and takes {chosen.bytes:,} bytes a task"
        + (f", {limits.tasks * chosen.bytes:,} for {limits.tasks} tasks." if limits.tasks > 1 else ".")
    ]
    if chosen is not best:
        said.append(
            f"{best.method} has the highest mean ({best.value:.4f}), but the difference is below one standard "
            f"error (Holm-adjusted p = {adjusted[chosen.method]:.2f}); {chosen.method} costs less."
        )
    elif len(equal) == 1 and rest:
        said.append(f"It is better than every other method that fits, beyond the noise (p below {ALPHA}).")
    if len(equal) > 1:
        said.append(f"Within the noise of each other: {', '.join(r.method for r in equal)}.")
    full = next((r for r in results if r.method == FULL), None)
    if full is not None and chosen.method != FULL and FULL in chosen.versus:
        difference, p = chosen.versus[FULL]
        p = chosen.p_full if chosen.p_full is not None else p  # over all methods that are compared with it
        word = "within the noise" if p >= ALPHA else f"p = {p:.4f}"
        said.append(f"Against full fine-tuning: {difference:+.4f} ({word}).")
    if chosen.method == HEAD:
        said.append("No adapter was shown to help: a head on the frozen base is enough, or more rows are needed.")
    return said
