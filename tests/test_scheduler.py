"""Queues: shares, order, bounds and deadlines, by a clock that the test moves."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

pytest.importorskip("fastapi")

from onebase.serve.scheduler import Admission, Item, Overloaded, Scheduler

BUDGET, ROWS = 4096, 64


def latencies(rates: dict[str, float], seconds: float, seed: int = 0) -> dict[str, list[float]]:
    """Serve Poisson arrivals of rows of 20 to 60 tokens; a forward takes 2 ms and 20 us a token. Returns seconds."""
    chance, scheduler = random.Random(seed), Scheduler()
    arrivals = []
    for name, rate in rates.items():
        at = chance.expovariate(rate)
        while at < seconds:
            arrivals.append((at, name, chance.randrange(20, 61)))
            at += chance.expovariate(rate)
    arrivals.sort()
    found, now, place, held = defaultdict(list), 0.0, 0, 0
    while place < len(arrivals) or held:
        if not held:
            now = max(now, arrivals[place][0])
        while place < len(arrivals) and arrivals[place][0] <= now:
            at, name, cost = arrivals[place]
            scheduler.put([Item(name, cost, at)])
            place, held = place + 1, held + 1
        batch, _ = scheduler.take(BUDGET, ROWS, now)
        held -= len(batch)
        now += 0.002 + 2e-5 * sum(item.cost for item in batch)
        for item in batch:
            found[item.queue].append(now - item.payload)
    return found


def p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * len(values))]


@pytest.mark.parametrize("rate", [10, 30])
def test_ten_times_the_load_at_most_doubles_the_waiting_of_others(rate: float) -> None:
    """Ten adapters; then one of them asks ten times as often, and half of the server is busy."""
    names = [f"a{i}" for i in range(10)]
    even = latencies(dict.fromkeys(names, rate), 6)
    uneven = latencies({**dict.fromkeys(names, rate), "a0": 10 * rate}, 6)
    before, after = ([x for n in names[1:] for x in found[n]] for found in (even, uneven))
    assert p99(after) <= 2 * p99(before), (p99(before), p99(after))


def test_who_asks_for_more_than_there_is_waits_alone() -> None:
    """One adapter asks for more than the server can do: others wait for two full batches at most, it for ever more."""
    names = [f"a{i}" for i in range(10)]
    found = latencies({**dict.fromkeys(names, 30), "a0": 1500}, 4)
    others = [x for n in names[1:] for x in found[n]]
    assert p99(others) <= 2 * (0.002 + 2e-5 * BUDGET)
    assert p99(found["a0"]) > 5 * p99(others)


def test_short_rows_of_a_busy_queue_do_not_fill_batch_after_batch() -> None:
    """Rows of two tokens fill a batch by their number."""
    scheduler = Scheduler()
    scheduler.put([Item("busy", 2, i) for i in range(1000)])
    scheduler.put([Item("light", 2, i) for i in range(3)])
    batch, _ = scheduler.take(BUDGET, ROWS, 0.0)
    assert len(batch) == ROWS
    assert [item.payload for item in batch if item.queue == "light"] == [0, 1, 2]


def test_everything_is_served_once_and_in_the_order_of_its_queue() -> None:
    """Random rows, some longer than a batch."""
    chance, scheduler = random.Random(3), Scheduler()
    costs = {}
    for i in range(500):
        name = chance.choice("abc")
        costs[i] = chance.choice([1, 30, 600, 5000])
        scheduler.put([Item(name, costs[i], i)])
    served: dict[str, list[int]] = defaultdict(list)
    while sum(map(len, served.values())) < 500:
        batch, late = scheduler.take(BUDGET, ROWS, 0.0)
        assert not late
        assert len(batch) == 1 or (len(batch) <= ROWS and sum(costs[i.payload] for i in batch) <= BUDGET)
        for item in batch:
            served[item.queue].append(item.payload)
    assert sorted(i for many in served.values() for i in many) == list(range(500))
    assert all(many == sorted(many) for many in served.values())


def test_late_and_left_items_are_told_apart_and_take_no_place() -> None:
    """A deadline that has passed, and a client that is gone."""
    scheduler = Scheduler()
    items = [Item("a", 1, i, deadline=float(i)) for i in range(4)]
    items[3].gone = True
    scheduler.put(items)
    batch, late = scheduler.take(BUDGET, 1, 1.5)
    assert [i.payload for i in batch] == [2] and [i.payload for i in late] == [0, 1, 3]
    assert scheduler.take(BUDGET, 1, 1.5) == ([], [])


def test_admission_counts_in_and_out() -> None:
    """Who does not fit is refused whole, and told when to come again."""
    admission = Admission(10, 6, lambda: 2.0)
    admission.enter("a", 6)
    with pytest.raises(Overloaded, match="this adapter has 6 rows") as error:
        admission.enter("a", 1)
    assert error.value.after == 3.0  # six rows at two a second
    admission.enter("b", 4)
    with pytest.raises(Overloaded, match="the server holds 10"):
        admission.enter("c", 1)
    admission.leave("a", 6)
    admission.enter("c", 6)
    assert admission.total == 10


def test_prompts_of_adapters_take_turns() -> None:
    """A place that becomes free goes to the adapter whose turn it is, however many prompts another has."""
    scheduler = Scheduler(quantum=1)
    scheduler.put([Item("busy", 1, i) for i in range(10)])
    scheduler.put([Item("light", 1, i) for i in range(2)])
    order = [scheduler.take(1, 1, 0.0)[0][0].queue for _ in range(6)]
    assert order.count("light") == 2 and "light" in order[:2]


def test_nothing_is_taken_from_queues_that_are_left_out() -> None:
    """They keep their items and their turn; where no other has any, nothing is taken."""
    scheduler = Scheduler(quantum=1)
    scheduler.put([Item("busy", 1, i) for i in range(3)])
    scheduler.put([Item("light", 1, 0)])
    batch, _ = scheduler.take(4, 4, 0.0, {"busy"})
    assert [item.queue for item in batch] == ["light"]
    assert scheduler.take(4, 4, 0.0, {"busy"}) == ([], [])
    assert [item.payload for item in scheduler.take(4, 4, 0.0)[0]] == [0, 1, 2]
