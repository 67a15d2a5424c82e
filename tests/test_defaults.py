"""What is said of the default method is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onebase.comparison.defaults import MEASURED, METHOD, default_method
from onebase.training.prepare import DEFAULT_METHOD

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def runs(data: str, method: str) -> list[dict]:
    """Return the runs of a method with its defaults; of full fine-tuning those of the rate that all seeds had.

    Pairs that were read jointly are left out where the default reads them apart (the row says so).
    """
    found = []
    for name in ("quality", "tasks", "tasks-h100"):
        lines = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found += [r for r in map(json.loads, lines) if (r["data"], r["method"]) == (data, method)]
    found = [r for r in found if r.get("pairs") != "joint"]
    rates = [r.get("lr") for r in found]
    return [r for r in found if r.get("lr") == max(rates, key=rates.count)]


@pytest.mark.parametrize("measured", MEASURED, ids=lambda m: m.data)
def test_scores_are_those_of_the_results(measured) -> None:
    for method, said in measured.scores.items():
        values = [r["base"] for r in runs(measured.data, "lora")] if method == "base" else [
            r["value"] for r in runs(measured.data, method)
        ]  # fmt: skip
        assert values and sum(values) / len(values) == pytest.approx(said, abs=5.01e-4), method
    folder = Path(__file__).parents[2] / "shared" / "data" / measured.data
    if folder.is_dir():
        import onebase as ob

        data = ob.load_data(folder)
        assert (len(data.train), data.kind) == (measured.rows, measured.kind)
        assert (data.train.text_pair is not None) == measured.pair


def test_as_good_as_any_is_true_where_it_is_said() -> None:
    for measured in MEASURED:
        method, why = default_method(measured.kind, measured.rows, measured.pair)
        assert method == METHOD == DEFAULT_METHOD
        best = max(measured.scores.values())
        assert ("as good as any" in why) <= (measured.scores[METHOD] >= best)
        assert measured.what in why and f".{round(1000 * measured.scores[METHOD])}" in why


def test_what_was_not_measured_is_said() -> None:
    assert "says little about 100" in default_method("classification", 100)[1]
    assert "nothing was measured on chat data here" in default_method("chat", 3000)[1]
    assert "compare" in default_method("tokens", 10)[1]
