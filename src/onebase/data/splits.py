"""Cutting rows into train, validation and test so that the same text is never on two sides.

Order comes from sha256 of (seed, text), not from a random generator: the same rows give the same splits on
every machine and version, in whatever order they are listed. Only numbers are held per row, never its text.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from onebase.data.balance import Groups, deal_by_labels, deal_class
from onebase.data.kinds import KINDS
from onebase.data.pictures import content_of
from onebase.data.rows import Rows, are_scores, natural_order
from onebase.errors import DataError

if TYPE_CHECKING:
    import numpy as np

# 80/10/10. With fewer than 8 rows a tenth is not even close to one row.
SHARE = 0.1
FEWEST_ROWS = 8
# One text of each class for each of train, validation and test.
FEWEST_PER_CLASS = 3


def make_splits(
    rows: Rows, held_out: Sequence[str], seed: int, running: bool, name: str, kind: str = "classification"
) -> dict[str, Rows]:
    """Cut a tenth for each held-out split; the rest is train.

    Classes are stratified: exactly where a row has one, approximately where it has several. Running text is cut in
    place (train first, the held-out parts last) so that sentences keep their neighbours; the seed plays no part there.

    Args:
        rows: all rows; where they have a role "group", rows of one group stay together.
        held_out: the splits to cut, out of "validation" and "test".
        seed: another seed, another choice of rows.
        running: whether the rows are consecutive parts of one text.
        name: the file, for messages.
        kind: the kind of data; it says what makes two rows the same, and what is stratified.

    Returns:
        Rows by split, each in the order of the file; every row is in exactly one of them, and rows with the
        same text (white space at the ends apart) or the same group are all in the same one.

    Raises:
        DataError: too few distinct texts, in all or of a class.
    """

    groups = _together(rows, kind, seed)
    if len(groups) < FEWEST_ROWS:
        what = "groups" if rows.get("group") is not None else "different texts"
        raise DataError(
            f"{name}: {len(groups)} {what} in {len(rows)} rows, too few to cut "
            f"{' and '.join(held_out)} from; expected at least {FEWEST_ROWS}. Add rows, or pass a folder "
            "with files train, validation and test."
        )
    classes = KINDS[kind].classes
    if running:
        sides = _cut_in_place(rows, groups, held_out)
    elif classes == "labels":
        sides = deal_by_labels(groups, rows["labels"], held_out, SHARE)
    else:
        sides = _cut_by_class(rows, groups, held_out, name, classes)
    found = {}
    for number, side in enumerate(("train", *held_out)):
        found[side] = rows.select(groups.rows(sides == number))
    return found


def sample(rows: Rows, limit: int, seed: int, running: bool, kind: str = "classification") -> Rows:
    """Take at most `limit` rows, the classes in proportion and each at least once where the limit allows.

    Args:
        rows: the rows of one split.
        limit: the most rows to keep, at least 1.
        seed: another seed, another choice.
        running: whether the rows are consecutive parts of one text; then the first ones are taken.
        kind: the kind of data.

    Returns:
        The sample in the order of the rows. Where a row can have several classes they are met in proportion as far as
        chance does it.
    """
    import numpy as np

    if len(rows) <= limit:
        return rows
    if running:
        return rows.select(range(limit))
    names, strata = _strata(rows, KINDS[kind].classes)
    quotas = _quotas(dict(zip(names, np.bincount(strata, minlength=len(names)).tolist())), limit)
    ranks = _ranks(keys(rows, kind), seed, "sample", len(rows))
    order = np.lexsort((ranks, strata))
    chosen, first = [], 0
    for number, size in enumerate(np.bincount(strata, minlength=len(names)).tolist()):
        chosen.append(order[first : first + quotas[names[number]]])
        first += size
    return rows.select(np.sort(np.concatenate(chosen)))  # type: ignore[arg-type]


def keys(rows: Rows, kind: str, roles: Sequence[str] = ()) -> Iterator[str]:
    """Yield what makes two rows the same: the text, or both texts, without white space at the ends; a file's bytes.

    Args:
        rows: the rows.
        kind: their kind.
        roles: what to compare them by; by default what decides that they stay together in splits.
    """
    used = [role for role in roles or KINDS[kind].same if rows.get(role) is not None]
    for values in zip(*(map(content_of, rows[role]) if role == "image" else rows[role] for role in used)):
        yield "\0".join(value.strip() if isinstance(value, str) else json.dumps(value) for value in values)


def _together(rows: Rows, kind: str, seed: int) -> Groups:
    """Return the rows that belong together, ordered by the rank of their text."""
    import numpy as np

    ranks = _ranks(keys(rows, kind), seed, "split", len(rows))
    groups = rows.get("group")
    if groups is not None:
        ranks = _joined(ranks, _ranks(iter(groups), seed, "group", len(rows)))
    order = np.argsort(ranks, kind="stable").astype(np.int32 if len(ranks) < 2**31 else np.int64)
    ranks = ranks[order]
    return Groups(order, np.append(0, np.append(np.flatnonzero(ranks[1:] != ranks[:-1]) + 1, len(order))))


def _ranks(texts: Iterator[str], seed: int, purpose: str, count: int) -> np.ndarray:
    """Return 64 bits of sha256 per text (uint64): two texts in 10^19 would share them, and only stay together."""
    import numpy as np

    return np.fromiter((_rank(seed, purpose, text) for text in texts), dtype=np.uint64, count=count)


def _rank(seed: int, purpose: str, key: str) -> int:
    # surrogatepass: JSON may spell half of a surrogate pair.
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def _joined(texts: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Give rows that share a text or a group, directly or through others, the same rank."""
    import numpy as np

    _, text_of = np.unique(texts, return_inverse=True)
    group_names, group_of = np.unique(groups, return_inverse=True)
    root = np.arange(len(group_names))  # a forest over the groups; a text joins all groups that hold it

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    order = np.argsort(text_of, kind="stable")
    for a, b in pairwise(order.tolist()):
        if text_of[a] == text_of[b]:
            one, other = sorted((find(int(group_of[a])), find(int(group_of[b]))))
            root[other] = one
    return group_names[np.array([find(i) for i in range(len(root))], dtype=np.int64)[group_of]]


def _cut_by_class(rows: Rows, groups: Groups, held_out: Sequence[str], name: str, classes: str) -> np.ndarray:
    import numpy as np

    names, labels = _strata(rows, classes)
    strata = labels[groups.order[groups.bounds[:-1]]]
    for number in np.flatnonzero(groups.sizes > 1).tolist():
        strata[number] = _most_frequent(labels[groups[number]], names)
    _refuse_small_classes(np.bincount(strata, minlength=len(names)), names, labels, held_out, name)
    sides = np.zeros(len(groups), dtype=np.int8)
    order = np.argsort(strata, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(strata[order])) + 1):
        sides[members] = deal_class(groups.sizes[members], len(held_out), SHARE)
    return sides


def _most_frequent(labels: np.ndarray, names: Sequence[str]) -> int:
    """Return the class that a text listed under several labels counts for."""
    counts = Counter(labels.tolist())
    return min(counts, key=lambda label: (-counts[label], names[label]))


def _cut_in_place(rows: Rows, groups: Groups, held_out: Sequence[str]) -> np.ndarray:
    """Cut running text at tenths of its characters; a repeated entry goes where it first stands."""
    import numpy as np

    sizes = np.fromiter((len(text) for text in rows.text), dtype=np.int64, count=len(rows))
    ends = np.cumsum(sizes)
    first = groups.order[groups.bounds[:-1]]
    order = np.argsort(first, kind="stable")
    starts = (ends - sizes)[first[order]]
    sides = np.zeros(len(groups), dtype=np.int8)
    begin = 0
    for number in range(1, len(held_out) + 1):
        left = len(held_out) - number + 1
        cut = int(np.searchsorted(starts, int(ends[-1]) * (1 - SHARE * left)))
        begin = max(begin + 1, min(cut, len(groups) - left))  # every side has an entry
        sides[order[begin:]] = number
    return sides


def _refuse_small_classes(
    different: np.ndarray, names: Sequence[str], labels: np.ndarray, held_out: Sequence[str], name: str
) -> None:
    import numpy as np

    small = np.flatnonzero(different < FEWEST_PER_CLASS)
    if len(small):
        counts = np.bincount(labels, minlength=len(names))
        shown = ", ".join(f"{names[i]!r} ({counts[i]} rows, {different[i]} different)" for i in small[:10])
        raise DataError(
            f"{name}: {len(small)} classes have too few rows to cut {' and '.join(held_out)} from: {shown}. "
            f"Expected at least {FEWEST_PER_CLASS} different texts of each class. Add rows, merge or remove "
            "these classes, or pass a folder with files train, validation and test."
        )


def _strata(rows: Rows, classes: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the classes in natural order, and the number of each row's (n,); one class where there are none."""
    import numpy as np

    labels = rows.get(classes) if classes == "label" else None
    names = natural_order(labels) if labels is not None else ()
    if labels is None or are_scores(names):
        return ("",), np.zeros(len(rows), dtype=np.int32)
    number = {label: i for i, label in enumerate(names)}
    return names, np.fromiter((number[label] for label in labels), dtype=np.int32, count=len(rows))


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
