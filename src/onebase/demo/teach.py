"""Train one adapter of the demo and gather its numbers."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from onebase.demo.run import REVIEWS
from onebase.errors import DataError
from onebase.methods.registry import parse_method
from onebase.statistics import mcnemar_exact
from onebase.training.loop import Reporter
from onebase.training.run import Run, train

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data
    from onebase.tasks import Scores

# Found by a few trials with one seed each, where differences of 3 points mean nothing. With 32 steps per epoch
# and few epochs, the rates are above the recipes of `train`.
SETTINGS: dict[str, dict[str, Any]] = {
    "bottleneck": {"lr": 2e-3, "epochs": 4, "batch_size": 16},
    "lora": {"lr": 2e-3, "epochs": 4, "batch_size": 16},
    "prefix": {"lr": 1.5e-2, "epochs": 5, "batch_size": 16},
    "prompt": {"lr": 5e-2, "epochs": 5, "batch_size": 16},
}


def teach(
    base: Base, data: Data, name: str, method: str, seed: int, epochs: int | None, report: Callable[[str], None]
) -> dict[str, Any]:
    """Train and store one adapter.

    Args:
        base: the base that carries it.
        data: the reviews.
        name: of the adapter.
        method: method or shorthand.
        seed: of initialisation and order of rows.
        epochs: instead of the demo's own number.
        report: receives lines of text.

    Returns:
        The adapter's numbers and the base's on the same rows, as JSON values.
    """
    parsed = parse_method(method)
    settings = {"patience": 0, **SETTINGS.get(parsed.name, {})}
    if epochs is not None:
        settings["epochs"] = epochs
    began = time.perf_counter()
    run = train(base, data, parsed, name=name, seed=seed, report=_Epochs(parsed.name, report), **settings)
    return _facts(run, data, time.perf_counter() - began)


class _Epochs(Reporter):
    """A line per epoch."""

    def __init__(self, method: str, report: Callable[[str], None]):
        self.method, self.report, self.epochs = method, report, 0

    def start(self, steps: int, epochs: int) -> None:
        """Keep how many epochs there are."""
        self.epochs = epochs

    def epoch(self, entry: dict[str, float]) -> None:
        """Say how the validation rows are answered."""
        if entry["epoch"]:
            where = f"{self.method}, epoch {entry['epoch']:g} of {self.epochs}"
            self.report(f"{where}: {100 * entry['accuracy']:.1f} % of the validation rows right")


def _facts(run: Run, data: Data, total: float) -> dict[str, Any]:
    assert run.scores is not None and run.scores.base is not None and run.test is not None
    languages = _languages(data)
    used = run.settings
    return {
        "name": run.name,
        "ref": run.ref,
        "method": run.method,
        "settings": {key: getattr(used, key) for key in ("lr", "head_lr", "epochs", "batch_size", "seed")},
        "measured": run.history.notes,
        "best_epoch": run.history.best,
        "accuracy": run.value,
        "interval": list(run.interval),
        "languages": _by_language(run.scores.adapter, languages),
        "base_accuracy": run.base_value,
        "base_interval": list(run.base_interval),
        "base_languages": _by_language(run.scores.base, languages),
        "gain": run.test.difference,
        "gain_interval": [run.test.low, run.test.high],
        "p_value": run.test.p_value,
        "fixed": run.test.fixed,
        "broken": run.test.broken,
        "sentence": run.test.sentence(),
        "language_gains": _gains(run.scores.adapter, run.scores.base, languages),
        "parameters": run.parameters,
        "share": run.share,
        "bytes": run.bytes,
        "seconds": run.history.seconds,
        "total_seconds": total,
    }


def _languages(data: Data) -> list[str]:
    """Return the language of each test row, in the order in which the rows were read."""
    with (REVIEWS / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if tuple(row["text"] for row in rows) != data.test.text:
        raise DataError("reviews/test.csv has rows that could not be read: install onebase again")
    return [row["language"] for row in rows]


def _gains(adapter: Scores, base: Scores, languages: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the paired test on the rows of each language."""
    found = {}
    for language in sorted(set(languages)):
        rows = [i for i, other in enumerate(languages) if other == language]
        test = mcnemar_exact([base.correct[i] for i in rows], [adapter.correct[i] for i in rows])
        found[language] = {"gain": test.difference, "interval": [test.low, test.high], "sentence": test.sentence()}
    return found


def _by_language(scores: Scores, languages: Sequence[str]) -> dict[str, float]:
    found: dict[str, list[bool]] = {}
    for language, correct in zip(languages, scores.correct):
        found.setdefault(language, []).append(correct)
    return {language: sum(values) / len(values) for language, values in sorted(found.items())}
