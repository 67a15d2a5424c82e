"""What fits a budget: from measured costs of the methods to rungs, epochs, rows and seeds. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# Rates that are tried, over a method's default one: as many for each method. Of Devlin et al.'s 5e-5 for full
# fine-tuning (arXiv 1810.04805) they make 1.25e-5 to 1e-4.
FACTORS = (0.25, 0.5, 1.0, 2.0)
# Successive halving, the largest first: (rates of each method, training rows) per rung, half the rates, twice the rows.
SEARCHES: tuple[tuple[tuple[int, int], ...], ...] = (
    ((4, 512), (2, 1024)), ((4, 256), (2, 512)), ((4, 128), (2, 256)), (),
)  # fmt: skip
SEARCH = 0.25  # share of the budget that rates may take: defaults are measured, so runs of the seeds are worth more
HELD = 256  # validation rows of the search
MEASURED = 300  # rows scored to time answers, plain, attached and merged, and to see what is forgotten
MARGIN = 0.85  # of the time that is left is planned with: steps of a busy machine are not all alike
FEW_EPOCHS = 2  # epochs below which rows are left out instead
LEAST = 256  # training rows below which nothing is cut any more
PART = 0.25  # of the training rows, below which seeds are left out instead


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows of training, validation and of the split that is scored."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of work.

    Attributes:
        per_row: method -> seconds of a training row by itself, as measured.
        per_scored: method -> seconds of a row that is scored.
        ratio: what passes took over what this said of them.
    """

    per_row: Mapping[str, float]
    per_scored: Mapping[str, float]
    ratio: float = 1.0

    def of(self, methods: Sequence[str], trained: float, scored: float) -> float:
        """Return seconds in which each method trains so many rows and scores so many."""
        return self.ratio * sum(trained * self.per_row[m] + scored * self.per_scored[m] for m in methods)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What is trained.

    Attributes:
        rungs: of the search: (rates of each method, training rows).
        epochs, rows, held: of the seeds' runs: epochs at most, rows of training and of validation.
        seeds: that are expected to fit.
        search_seconds, seconds: that search and seeds are expected to take; 0 for a search that is over.
        cut: what was left out, and why, as sentences.
    """

    rungs: tuple[tuple[int, int], ...]
    epochs: int
    rows: int
    held: int
    seeds: int
    search_seconds: float
    seconds: float
    cut: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return it as a record of a comparison."""
        return {"stage": "plan", **asdict(self)}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Schedule:
        """Read a record."""
        facts = {key: value for key, value in record.items() if key != "stage"}
        return cls(**facts | {"rungs": tuple(map(tuple, facts["rungs"])), "cut": tuple(facts["cut"])})

    def sentence(self) -> str:
        """Say what will be done."""
        tried = ", then ".join(f"{rates} rates a method on {rows:,} rows" for rates, rows in self.rungs)
        search = f"{tried} ({_minutes(self.search_seconds)}); " if self.search_seconds else ""
        return (
            f"plan: {search}{self.seeds} seeds of at most {self.epochs} epochs over {self.rows:,} rows "
            f"({_minutes(self.seconds)})"
        )


def fit(
    costs: Costs, methods: Sequence[str], sizes: Sizes, left: float, epochs: int, seeds: int,
    searched: tuple[tuple[int, int], ...] | None = None,
) -> Schedule:  # fmt: skip
    """Choose what fits, as much for every method: first the search, then epochs, rows and seeds, cut in this order.

    Args:
        costs: measured.
        methods: all of them.
        sizes: of the data.
        left: seconds.
        epochs, seeds: asked for.
        searched: the rungs of the search that is over; None where it is to come.
    """
    usable = MARGIN * left
    rungs, searching = _search(costs, methods, sizes, SEARCH * usable) if searched is None else (searched, 0.0)
    options = list(_options(sizes, epochs, seeds))
    chosen, seconds = options[-1], 0.0
    for option in options:
        seconds = _seconds(costs, methods, sizes, *option)
        if seconds <= usable - searching:
            chosen = option
            break
    cut = _sentences(costs, methods, sizes, chosen, (epochs, sizes.train, seeds), rungs, seconds > usable - searching)
    number, rows, many = chosen
    return Schedule(rungs=rungs, epochs=number, rows=rows, held=held_rows(sizes, rows), seeds=many,
                    search_seconds=searching, seconds=seconds, cut=tuple(cut))  # fmt: skip


def held_rows(sizes: Sizes, rows: int) -> int:
    """Return the validation rows of runs over so many training rows: scoring must not take longer than learning."""
    return min(sizes.validation, max(HELD, rows // 4))


def rung_seconds(costs: Costs, methods: Sequence[str], sizes: Sizes, rates: int, rows: int) -> float:
    """Return what a rung takes."""
    return rates * costs.of(methods, rows, min(HELD, sizes.validation))


def seed_seconds(
    costs: Costs, methods: Sequence[str], sizes: Sizes, epochs: int, rows: int, measured: bool
) -> tuple[float, float]:
    """Return what training of a seed takes, validation included, and what is done with it then.

    Args:
        costs, methods, sizes: what is trained.
        epochs, rows: of it.
        measured: whether answers are timed, which happens once.
    """
    training = costs.of(methods, epochs * rows, (epochs + 1) * held_rows(sizes, rows))
    return training, costs.of(methods, 0, sizes.test + held_rows(sizes, rows) + measured * MEASURED)


def _seconds(costs: Costs, methods: Sequence[str], sizes: Sizes, epochs: int, rows: int, seeds: int) -> float:
    first = sum(seed_seconds(costs, methods, sizes, epochs, rows, True))
    other = sum(seed_seconds(costs, methods, sizes, epochs, rows, False))
    own = costs.of(methods, 0, rows + sizes.test) / len(methods)  # the base's own head, fitted once
    return own + first + (seeds - 1) * other


def _search(
    costs: Costs, methods: Sequence[str], sizes: Sizes, left: float
) -> tuple[tuple[tuple[int, int], ...], float]:
    """Return the largest search that fits, with its seconds; rungs that the data is too small for are not there."""
    for rungs in SEARCHES:
        found: list[tuple[int, int]] = []
        for rates, rows in rungs:
            if not found or min(rows, sizes.train) > found[-1][1]:
                found.append((rates, min(rows, sizes.train)))
        seconds = sum(rung_seconds(costs, methods, sizes, *rung) for rung in found)
        if seconds <= left:
            return tuple(found), seconds
    return (), 0.0


def _options(sizes: Sizes, epochs: int, seeds: int) -> Iterator[tuple[int, int, int]]:
    """Yield (epochs, rows, seeds) from the most to the least."""
    few, rows = min(FEW_EPOCHS, epochs), sizes.train
    for number in range(epochs, few - 1, -1):
        yield number, rows, seeds
    while rows > max(LEAST, PART * sizes.train):
        rows = max(LEAST, int(rows * 0.8))
        yield few, rows, seeds
    for many in range(seeds - 1, 0, -1):
        yield few, rows, many
    yield 1, rows, 1
    while rows > LEAST:
        rows = max(LEAST, int(rows * 0.8))
        yield 1, rows, 1


def _sentences(
    costs: Costs, methods: Sequence[str], sizes: Sizes, chosen: tuple[int, int, int], asked: tuple[int, int, int],
    rungs: Sequence[Any], tight: bool,
) -> Iterator[str]:  # fmt: skip
    slow = max(methods, key=lambda m: costs.per_row[m])
    speed = f"a training row takes {1000 * costs.of([slow], 1, 0):.0f} ms with {slow}, the slowest, and " \
            f"{1000 * costs.of(methods, 1, 0):.0f} ms with all {len(methods)} methods"  # fmt: skip
    if rungs != _search(costs, methods, sizes, float("inf"))[0]:
        tried = f"rates are searched on at most {rungs[-1][1]:,} rows" if rungs else "every method has its default rate"
        yield f"to fit the budget {tried}: {speed}"
    if chosen != asked:
        parts = [
            f"{now:,} of {wanted:,} {what}"
            for now, wanted, what in zip(chosen, asked, ("epochs", "training rows", "seeds")) if now != wanted
        ]  # fmt: skip
        yield f"to fit the budget every method is trained with {', '.join(parts)}: {speed}"
    if tight:
        yield "even that is more than the budget is expected to hold: what is reached when it ends counts"


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
