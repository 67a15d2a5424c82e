"""Cutting rows into train, validation and test so that the same text is never on two sides.

Order comes from sha256 of (seed, text), not from a random generator: the same rows give the same splits on
every machine and version, in whatever order they are listed.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate

from onebase.data.rows import Rows, are_scores, natural_order
from onebase.errors import DataError

# 80/10/10. With fewer than 8 rows a tenth is not even close to one row.
SHARE = 0.1
FEWEST_ROWS = 8
# One text of each class for each of train, validation and test.
FEWEST_PER_CLASS = 3


def make_splits(rows: Rows, held_out: Sequence[str], seed: int, running: bool, name: str) -> dict[str, Rows]:
    """Cut a tenth for each held-out split; the rest is train.

    Labels are stratified, except scores, which have no classes. Running text is cut in place (train first,
    the held-out parts last) so that sentences keep their neighbours; the seed plays no part there.

    Args:
        rows: all rows.
        held_out: the splits to cut, out of "validation" and "test".
        seed: another seed, another choice of rows.
        running: whether the rows are consecutive parts of one text.
        name: the file, for messages.

    Returns:
        Rows by split, each in the order of the file; every row is in exactly one of them, and rows with the
        same text (white space at the ends apart) are all in the same one.

    Raises:
        DataError: too few distinct texts, in all or of a class.
    """
    groups = _same_text(rows)
    if len(groups) < FEWEST_ROWS:
        raise DataError(
            f"{name}: {len(groups)} different texts in {len(rows)} rows, too few to cut "
            f"{' and '.join(held_out)} from; expected at least {FEWEST_ROWS}. Add rows, or pass a folder "
            "with files train, validation and test."
        )
    if running:
        sides = _cut_in_place(rows, groups, held_out)
    else:
        sides = _cut_by_class(rows, groups, held_out, seed, name)
    return {side: rows.select(sorted(sides[side])) for side in ("train", *held_out)}


def sample(rows: Rows, limit: int, seed: int, running: bool) -> Rows:
    """Take at most `limit` rows, the classes in proportion and each at least once where the limit allows.

    Args:
        rows: the rows of one split.
        limit: the most rows to keep, at least 1.
        seed: another seed, another choice.
        running: whether the rows are consecutive parts of one text; then the first ones are taken.

    Returns:
        The sample in the order of the rows.
    """
    if len(rows) <= limit:
        return rows
    if running:
        return rows.select(range(limit))
    strata: dict[str, list[int]] = defaultdict(list)
    for i, stratum in enumerate(_strata(rows)):
        strata[stratum].append(i)
    quotas = _quotas({stratum: len(members) for stratum, members in strata.items()}, limit)
    keys = _keys(rows)
    chosen: list[int] = []
    for stratum, members in strata.items():
        members.sort(key=lambda i: (_rank(seed, "sample", keys[i]), i))
        chosen += members[: quotas[stratum]]
    return rows.select(sorted(chosen))


def _cut_by_class(
    rows: Rows, groups: dict[str, list[int]], held_out: Sequence[str], seed: int, name: str
) -> dict[str, list[int]]:
    labels = _strata(rows)
    strata: dict[str, list[list[int]]] = {label: [] for label in natural_order(labels)}
    for key in sorted(groups, key=lambda key: _rank(seed, "split", key)):
        # A text that is listed under several labels counts for the most frequent one.
        counts = Counter(labels[i] for i in groups[key])
        strata[min(counts, key=lambda label: (-counts[label], label))].append(groups[key])
    _refuse_small_classes(strata, Counter(labels), held_out, name)
    sides: dict[str, list[int]] = {side: [] for side in ("train", *held_out)}
    for stratum in strata.values():
        for side, members in _deal(stratum, held_out).items():
            sides[side] += members
    return sides


def _deal(groups: list[list[int]], held_out: Sequence[str]) -> dict[str, list[int]]:
    """Deal one class: each held-out side takes groups in order while they fit in its tenth."""
    left = list(groups)
    target = max(1, round(SHARE * sum(map(len, groups))))
    sides: dict[str, list[int]] = {}
    for position, side in enumerate(held_out):
        spare = len(left) - (len(held_out) - position)  # what follows needs one group each, train included
        taken: list[list[int]] = []
        room = target
        for group in left:
            if len(group) <= room and len(taken) < spare:
                taken.append(group)
                room -= len(group)
        taken = taken or [min(left, key=len)]
        chosen = {group[0] for group in taken}
        left = [group for group in left if group[0] not in chosen]
        sides[side] = [i for group in taken for i in group]
    return sides | {"train": [i for group in left for i in group]}


def _cut_in_place(rows: Rows, groups: dict[str, list[int]], held_out: Sequence[str]) -> dict[str, list[int]]:
    """Cut running text at tenths of its characters; a repeated entry goes where it first stands."""
    ends = list(accumulate(map(len, rows.text)))
    starts = [ends[members[0]] - len(rows.text[members[0]]) for members in groups.values()]
    cuts = [0]
    for left in range(len(held_out), 0, -1):
        cut = bisect_left(starts, ends[-1] * (1 - SHARE * left))
        cuts.append(max(cuts[-1] + 1, min(cut, len(groups) - left)))  # every side has an entry
    cuts.append(len(groups))
    members = list(groups.values())
    return {
        side: [i for group in members[begin:end] for i in group]
        for side, begin, end in zip(("train", *held_out), cuts, cuts[1:])
    }


def _refuse_small_classes(
    strata: dict[str, list[list[int]]], counts: Counter[str], held_out: Sequence[str], name: str
) -> None:
    small = {label: groups for label, groups in strata.items() if len(groups) < FEWEST_PER_CLASS}
    if small:
        shown = ", ".join(
            f"{label!r} ({counts[label]} rows, {len(groups)} different)" for label, groups in list(small.items())[:10]
        )
        raise DataError(
            f"{name}: {len(small)} classes have too few rows to cut {' and '.join(held_out)} from: {shown}. "
            f"Expected at least {FEWEST_PER_CLASS} different texts of each class. Add rows, merge or remove "
            "these classes, or pass a folder with files train, validation and test."
        )


def _strata(rows: Rows) -> Sequence[str]:
    if rows.label is None or are_scores(natural_order(rows.label)):
        return [""] * len(rows)
    return rows.label


def _keys(rows: Rows) -> list[str]:
    """Give what makes two rows the same: the text, or both texts, without white space at the ends."""
    if rows.messages is not None:
        return [json.dumps(messages, sort_keys=True) for messages in rows.messages]
    for own in (rows.source, rows.anchor):
        if own is not None:
            return [text.strip() for text in own]
    if rows.text_pair is None:
        return [text.strip() for text in rows.text]
    return [f"{a.strip()}\0{b.strip()}" for a, b in zip(rows.text, rows.text_pair)]


def _same_text(rows: Rows) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, key in enumerate(_keys(rows)):
        groups[key].append(i)
    return dict(groups)


def _rank(seed: int, purpose: str, key: str) -> bytes:
    # surrogatepass: JSON may spell half of a surrogate pair.
    return hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode("utf-8", "surrogatepass")).digest()


def _quotas(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """Share out `limit` by largest remainder, one each first where there are enough."""
    total = sum(sizes.values())
    floor = 1 if limit >= len(sizes) else 0
    quotas = {name: max(floor, limit * size // total) for name, size in sizes.items()}
    while sum(quotas.values()) > limit:  # the ones given to rare classes come from the largest quota
        quotas[max(quotas, key=lambda name: (quotas[name], name))] -= 1
    owed = sorted(sizes, key=lambda name: (quotas[name] - limit * sizes[name] / total, name))
    for name in owed[: limit - sum(quotas.values())]:
        quotas[name] += 1
    return quotas
