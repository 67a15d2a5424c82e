"""Who makes the passes of a comparison: this process, one after the other, with as many candidates as fit in each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar

from onebase.comparison.advice import FULL
from onebase.comparison.passes import Pass, run_pass
from onebase.comparison.work import Work

T = TypeVar("T", bound=tuple[str, Any])  # a method, and what of it is to be trained


class Engine(Protocol):
    """Makes passes.

    Attributes:
        workers: passes that are made at once.
    """

    workers: int

    def groups(self, todo: Sequence[T]) -> list[list[T]]:
        """Say which candidates are trained side by side; each entry begins with the method."""
        ...

    def rounds(self, seeds: Sequence[int]) -> list[list[int]]:
        """Say which seeds are begun together."""
        ...

    def run(self, passes: Sequence[Pass], ends: float) -> Iterator[dict[str, Any]]:
        """Make passes and yield their records as they come; nothing is begun after time.monotonic() is `ends`."""
        ...


class Here:
    """This process: all adapters in one pass, full fine-tuning by itself, a seed after the other.

    Args:
        work: the comparison.
    """

    workers = 1

    def __init__(self, work: Work):
        self.work = work

    def groups(self, todo: Sequence[T]) -> list[list[T]]:
        """All adapters together; full fine-tuning would change the base of the others."""
        together = [one for one in todo if one[0] != FULL]
        return [*([together] if together else []), *([one] for one in todo if one[0] == FULL)]

    def rounds(self, seeds: Sequence[int]) -> list[list[int]]:
        """One seed at a time, so that whole seeds are there when time ends."""
        return [[seed] for seed in seeds]

    def run(self, passes: Sequence[Pass], ends: float) -> Iterator[dict[str, Any]]:
        """Make one pass after the other; each has its share of the time that is left, so that none goes without."""
        for number, one in enumerate(passes):
            self.work.stop.check()
            left = ends - time.monotonic()
            if number and left < one.closing:
                return
            share = self._expected(one) / sum(map(self._expected, passes[number:]))
            yield from run_pass(self.work, one, time.monotonic() + left * share)

    def _expected(self, one: Pass) -> float:
        costs = self.work.costs(one.methods)
        return costs.of(one.methods, one.epochs * one.rows, (one.epochs + 1) * one.held) + one.closing
