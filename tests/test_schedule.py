"""What fits a budget, as plain arithmetic; and rates, of which those count that were compared at the same point."""

from __future__ import annotations

import pytest

from onebase.comparison.schedule import FACTORS, LEAST, MARGIN, SEARCHES, Costs, Schedule, Sizes, fit
from onebase.comparison.searching import best_factor

CR = Sizes(train=2825, validation=376, test=564)
SEVEN = [f"method{i}" for i in range(7)]
# rows a second of two quiet cores: 150 in joint passes of adapters, 70 of full fine-tuning
EIGHT = [*SEVEN, "full"]
COSTS = Costs(per_row={**dict.fromkeys(SEVEN, 1 / 150), "full": 1 / 70}, per_scored=dict.fromkeys(EIGHT, 1 / 300))


def test_eight_methods_and_three_seeds_fit_half_an_hour() -> None:
    found = fit(COSTS, EIGHT, CR, 1800, epochs=5, seeds=3)
    assert (found.rows, found.seeds) == (CR.train, 3) and found.epochs >= 2 and found.rungs
    assert found.search_seconds + found.seconds <= MARGIN * 1800
    assert any("epochs" in sentence and "ms" in sentence for sentence in found.cut)


def test_with_time_nothing_is_cut() -> None:
    found = fit(COSTS, EIGHT, CR, 1e6, epochs=5, seeds=3)
    assert (found.epochs, found.rows, found.seeds, found.held) == (5, CR.train, 3, CR.validation)
    assert found.rungs == SEARCHES[0] and found.cut == ()


def test_less_time_never_gives_more() -> None:
    before = None
    for left in (1e5, 3000, 1800, 900, 600, 300, 120, 60, 10):
        found = fit(COSTS, EIGHT, CR, left, epochs=5, seeds=3)
        amount = found.epochs * found.rows * found.seeds
        assert before is None or amount <= before, left
        assert found.rows >= LEAST and found.epochs >= 1 and found.seeds >= 1
        fits = found.search_seconds + found.seconds <= MARGIN * left
        assert fits or "even that" in found.cut[-1], left
        before = amount
    assert Schedule.of(found.record()) == found


def test_when_the_search_is_over_all_time_is_for_the_seeds() -> None:
    before = fit(COSTS, EIGHT, CR, 1800, epochs=5, seeds=3)
    after = fit(COSTS, EIGHT, CR, 1800, epochs=5, seeds=3, searched=before.rungs)
    assert (after.rungs, after.search_seconds) == (before.rungs, 0) and after.epochs >= before.epochs


def test_rungs_are_never_larger_than_the_data() -> None:
    found = fit(COSTS, SEVEN, Sizes(train=100, validation=20, test=20), 1e6, epochs=5, seeds=1)
    assert found.rungs == ((len(FACTORS), 100),) and found.rows == 100


def tried(factor: float, reached: int, validation: float | None) -> dict:
    return {"factor": factor, "reached": reached, "validation": validation}


@pytest.mark.parametrize(
    ("records", "factor"),
    [
        ([], 1.0),
        ([tried(0.5, 96, 0.7)], 1.0),  # nothing to compare it with
        ([tried(0.5, 96, 0.7), tried(2.0, 96, 0.8)], 2.0),  # a rung that ended early counts
        ([tried(0.5, 256, 0.7), tried(2.0, 256, 0.8), tried(0.5, 512, 0.9)], 2.0),  # one alone says nothing
        ([tried(0.5, 256, 0.7), tried(2.0, 256, 0.8), tried(0.5, 512, 0.9), tried(2.0, 512, 0.8)], 0.5),
        ([tried(0.5, 256, 0.7), tried(2.0, 256, None)], 0.5),  # a loss that was not finite has lost
        ([tried(0.5, 256, None), tried(2.0, 256, None)], 1.0),
    ],
)
def test_rates_are_compared_at_the_last_common_point(records: list, factor: float) -> None:
    assert best_factor(records) == factor
