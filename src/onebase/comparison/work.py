"""What all parts of a comparison share: the base, the data and its parts, the records, measured costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from onebase.comparison.advice import FULL
from onebase.comparison.forgetting import reference
from onebase.comparison.measuring import alone
from onebase.comparison.records import Book
from onebase.comparison.schedule import HELD, Costs, Sizes
from onebase.comparison.together import Interrupts, Trained
from onebase.data import Data
from onebase.data.rows import digest_of
from onebase.data.splits import sample
from onebase.methods.registry import parse_method
from onebase.tasks import Examples
from onebase.training.full import RATES
from onebase.training.kernels import Kernels
from onebase.training.settings import settings_for

if TYPE_CHECKING:
    from onebase.base import Base

WARM = (256, 32)  # rows of training and validation on which a method is warmed up
LIMITS = (0.2, 5.0)  # within which passes may correct what was measured of methods by themselves


class Work:
    """A comparison at work.

    Args:
        base: the base.
        data: all rows.
        book: the records.
        stop: Ctrl-C.
        say: receives sentences.
    """

    def __init__(self, base: Base, data: Data, book: Book, stop: Interrupts, say: Callable[[str], Any]):
        self.base, self.data, self.book, self.stop, self.say = base, data, book, stop, say
        self.split = "test" if len(data.test) else "validation"
        self.sizes = Sizes(train=len(data.train), validation=len(data.validation), test=len(getattr(data, self.split)))
        self.shared: dict[Any, dict[str, Examples]] = {}
        self.kernels: dict[bool, Kernels] = {}  # by whether the whole base is trained
        self.before = reference(base)
        self._parts: dict[tuple[int, int, bool], Data] = {}

    def part(self, rows: int, held: int = HELD, scored: bool = False) -> Data:
        """Return so many rows of training and validation, classes in proportion, and the test rows if they are scored.

        The split that is scored is always whole, so runs on fewer rows are scored on the same ones.
        """
        data = self.data
        if rows >= len(data.train) and held >= len(data.validation) and scored:
            return data
        key = (rows, held, scored)
        if key not in self._parts:
            running = not data.columns  # consecutive parts of one text: the first ones are taken
            splits = {
                "train": sample(data.train, rows, 0, running, data.kind),
                "validation": sample(data.validation, held, 0, running, data.kind),
                # without test rows all of validation is scored, whatever is looked at in between
                "test": getattr(data, self.split) if scored else data.test.select([]),
            }
            self._parts[key] = replace(data, **splits, digest=digest_of(data.kind, splits))
        return self._parts[key]

    def rate(self, method: str, factor: float) -> float:
        """Return a multiple of a method's default learning rate, three digits."""
        width = self.base.anatomy.hidden_size
        default = RATES[1] if method == FULL else settings_for(parse_method(method), {}, width).lr
        return float(f"{default * factor:.3g}")

    # -- costs -----------------------------------------------------------------------------------------------------

    def warm_up(self, methods: Sequence[str], ends: float) -> None:
        """Measure a few steps of every method by itself; those that time does not reach are taken for average."""
        todo = [m for m in methods if not self.book.has("alone", method=m)]
        if todo:
            self.say(f"measuring a few steps of {len(todo)} methods")
        for number, method in enumerate(todo):
            self.stop.check()
            if number and time.monotonic() > ends:
                return
            self.cost(method)

    def cost(self, method: str) -> dict[str, Any]:
        """Return the record of a method by itself, measured once."""
        found = next(self.book.find("alone", method=method), None)
        if found is None:
            whole = method == FULL
            taken, used = alone(self.base, self.part(*WARM), method, self.rate(method, 1.0), self.kernels.get(whole),
                                self.shared)  # fmt: skip
            self.kernels[whole] = used
            found = {"stage": "alone", "method": method, **asdict(taken)}
            self.book.add(found)
        return found

    def costs(self, methods: Sequence[str], workers: int = 1) -> Costs:
        """Return what is known of the methods' costs, corrected by the passes that were made so far.

        Args:
            methods: of interest.
            workers: how many passes are made at once.
        """
        known = {r["method"]: (r["seconds_per_row"], r["seconds_per_scored"]) for r in self.book.find("alone")}
        usual = tuple(sum(each) / len(known) for each in zip(*known.values()))
        passes = list(self.book.find("pass"))
        expected, taken = (sum(p[key] for p in passes) for key in ("alone", "seconds"))
        ratio = min(max(taken / expected, LIMITS[0]), LIMITS[1]) if expected else 1.0
        of = {m: known.get(m, usual) for m in methods}
        return Costs(per_row={m: both[0] for m, both in of.items()}, per_scored={m: both[1] for m, both in of.items()},
                     ratio=ratio / workers)  # fmt: skip

    def record_of_pass(self, methods: Sequence[str], found: Trained, scored: int) -> dict[str, Any]:
        """Return what a pass took, beside what its methods' costs said of it.

        Args:
            methods: one per candidate.
            found: the pass.
            scored: validation rows that each candidate was scored on.
        """
        known = replace(self.costs(methods), ratio=1.0)
        return {
            "stage": "pass", "methods": list(methods), "rows": found.rows, "seconds": found.seconds,
            "alone": known.of(methods, found.rows - found.before, scored),
            "ended": None if found.stopped is None else type(found.stopped).__name__,
        }  # fmt: skip

    # -- what was scored -------------------------------------------------------------------------------------------

    def rows(self) -> dict[str, Any]:
        """Return what was scored: labels, gold label numbers and texts, where rows have one label each."""
        if self.data.kind != "classification":
            return {}
        scored = getattr(self.data, self.split)
        number = {label: i for i, label in enumerate(self.data.labels)}
        pairs = scored.text_pair
        texts = [t if pairs is None else f"{t} / {pairs[i]}" for i, t in enumerate(scored.text)]
        return {"labels": list(self.data.labels), "gold": [number[x] for x in scored.label or ()], "texts": texts}
