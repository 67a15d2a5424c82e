"""Dealing groups of rows to the sides of a split: class by class, or by several labels at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def deal_class(groups: list[np.ndarray], held_out: Sequence[str], share: float) -> dict[str, list[np.ndarray]]:
    """Deal the groups of one class: each held-out side takes groups in order while they fit in its share.

    Args:
        groups: arrays of row numbers, at least one per side.
        held_out: the sides that take a share; "train" gets the rest.
        share: of the rows, for each of them.
    """
    left = groups
    target = max(1, round(share * sum(map(len, groups))))
    sides: dict[str, list[np.ndarray]] = {}
    for position, side in enumerate(held_out):
        spare = len(left) - (len(held_out) - position)  # what follows needs one group each, train included
        room, chosen = target, set()
        for number, group in enumerate(left):
            if not room:
                break
            if len(group) <= room and len(chosen) < spare:
                chosen.add(number)
                room -= len(group)
        chosen = chosen or {min(range(len(left)), key=lambda number: len(left[number]))}
        sides[side] = [left[number] for number in sorted(chosen)]
        left = [group for number, group in enumerate(left) if number not in chosen]
    return sides | {"train": left}


def deal_by_labels(
    members: list[np.ndarray], labels: Sequence[Sequence[str]], held_out: Sequence[str], share: float
) -> dict[str, Any]:
    """Deal groups of rows with several labels each so that every label is met in proportion, as nearly as greed does.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011, "On the stratification of multi-label data",
    algorithm 1): the label with the fewest rows left goes first, each of its groups to the side that still wants most
    of that label, then to the one that wants most rows; ties go to train. A label with one group stays in train.

    Args:
        members: groups of row numbers in the order they are to be considered.
        labels: labels of each row.
        held_out: the sides that take a share; "train" gets the rest.
        share: of the rows, for each of them.

    Returns:
        side -> row numbers; no side is empty.
    """
    import numpy as np

    shares = {"train": 1 - share * len(held_out), **dict.fromkeys(held_out, share)}
    counted = [_counts(group, labels) for group in members]
    holders: dict[str, list[int]] = {}
    for number, counts in enumerate(counted):
        for label in counts:
            holders.setdefault(label, []).append(number)
    totals = {label: sum(counted[i][label] for i in found) for label, found in holders.items()}
    wanted = {side: {label: total * part for label, total in totals.items()} for side, part in shares.items()}
    room = {side: part * sum(map(len, members)) for side, part in shares.items()}
    taken: dict[str, list[int]] = {side: [] for side in shares}
    free = [True] * len(members)

    def give(number: int, side: str) -> None:
        free[number] = False
        taken[side].append(number)
        room[side] -= len(members[number])
        for label, n in counted[number].items():
            wanted[side][label] -= n
            totals[label] -= n

    while any(totals.values()):
        rarest = min((label for label, n in totals.items() if n), key=lambda label: (totals[label], label))
        for number in holders[rarest]:
            if free[number]:
                lone = len(holders[rarest]) == 1
                give(number, "train" if lone else max(shares, key=lambda s: (wanted[s][rarest], room[s])))
    for number in range(len(members)):
        if free[number]:
            give(number, max(shares, key=lambda side: room[side]))
    for side in held_out:
        if not taken[side]:
            taken[side].append(taken["train"].pop())
    return {side: np.concatenate([members[i] for i in numbers]) for side, numbers in taken.items()}


def _counts(group: np.ndarray, labels: Sequence[Sequence[str]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in group:
        for label in labels[int(row)]:
            counts[label] = counts.get(label, 0) + 1
    return counts
