"""Dealing groups of rows to the sides of a split: class by class, or by several labels at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows that belong together, as numbers only: millions of groups take a few bytes each.

    Attributes:
        order: (n,) row numbers, group after group, ascending within each.
        bounds: (groups + 1,) where each group starts in `order`.
    """

    order: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return self.order[self.bounds[number] : self.bounds[number + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each group."""
        return self.bounds[1:] - self.bounds[:-1]

    def rows(self, chosen: np.ndarray) -> np.ndarray:
        """Return the rows of some groups (a mask over them), ascending."""
        rows = self.order[chosen.repeat(self.sizes)]
        rows.sort()
        return rows


def deal_class(sizes: np.ndarray, held_out: int, share: float) -> np.ndarray:
    """Deal the groups of one class: each held-out side takes groups in order while they fit in its share.

    Args:
        sizes: rows of each group, in the order they are considered; at least one group per side.
        held_out: how many sides take a share; the rest is train.
        share: of the rows, for each of them.

    Returns:
        (groups,) the side of each: 0 for train, then the held-out sides.
    """
    import numpy as np

    sides = np.zeros(len(sizes), dtype=np.int8)
    target = max(1, round(share * int(sizes.sum())))
    for side in range(1, held_out + 1):
        left = np.flatnonzero(sides == 0)
        spare = len(left) - (held_out - side + 1)  # what follows needs one group each, train included
        room, taken = target, 0
        for number in left:
            if not room or taken >= spare:
                break
            if sizes[number] <= room:
                sides[number] = side
                room, taken = room - int(sizes[number]), taken + 1
        if not taken:
            sides[left[sizes[left].argmin()]] = side
    return sides


def deal_by_labels(
    groups: Groups, labels: Sequence[Sequence[str]], held_out: Sequence[str], share: float
) -> np.ndarray:
    """Deal groups of rows with several labels each so that every label is met in proportion, as nearly as greed does.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011, "On the stratification of multi-label data",
    algorithm 1): the label with the fewest rows left goes first, each of its groups to the side that still wants most
    of that label, then to the one that wants most rows; ties go to train. A label with one group stays in train.

    Args:
        groups: in the order they are to be considered.
        labels: labels of each row.
        held_out: the sides that take a share; "train" gets the rest.
        share: of the rows, for each of them.

    Returns:
        (groups,) the side of each: 0 for train, then the held-out sides; no side is empty.
    """
    import numpy as np

    shares = {"train": 1 - share * len(held_out), **dict.fromkeys(held_out, share)}
    counted = [_counts(groups[number], labels) for number in range(len(groups))]
    holders: dict[str, list[int]] = {}
    for number, counts in enumerate(counted):
        for label in counts:
            holders.setdefault(label, []).append(number)
    totals = {label: sum(counted[i][label] for i in found) for label, found in holders.items()}
    wanted = {side: {label: total * part for label, total in totals.items()} for side, part in shares.items()}
    room = {side: part * len(groups.order) for side, part in shares.items()}
    taken: dict[str, list[int]] = {side: [] for side in shares}
    free = [True] * len(groups)

    def give(number: int, side: str) -> None:
        free[number] = False
        taken[side].append(number)
        room[side] -= len(groups[number])
        for label, n in counted[number].items():
            wanted[side][label] -= n
            totals[label] -= n

    while any(totals.values()):
        rarest = min((label for label, n in totals.items() if n), key=lambda label: (totals[label], label))
        for number in holders[rarest]:
            if free[number]:
                lone = len(holders[rarest]) == 1
                give(number, "train" if lone else max(shares, key=lambda s: (wanted[s][rarest], room[s])))
    for number in range(len(groups)):
        if free[number]:
            give(number, max(shares, key=lambda side: room[side]))
    for side in held_out:
        if not taken[side]:
            taken[side].append(taken["train"].pop())
    sides = np.zeros(len(groups), dtype=np.int8)
    for number, side in enumerate(held_out, 1):
        sides[taken[side]] = number
    return sides


def _counts(group: np.ndarray, labels: Sequence[Sequence[str]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in group:
        for label in labels[int(row)]:
            counts[label] = counts.get(label, 0) + 1
    return counts
