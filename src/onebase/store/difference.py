"""How two stored adapters differ: settings, metrics, and how far apart their tensors are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from onebase.store.stored import Stored


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What differs from `a` to `b`.

    Attributes:
        a, b: references.
        same: whether both have the same tensors and settings.
        settings: dotted field of method, task, base, tokenizer or provenance -> (value of a, of b).
        metrics: dotted metric -> (value of a, of b).
        tensors: name -> Euclidean distance over the norm of a's tensor; None where shapes differ or one has it not.
        distance: Euclidean distance over all common tensors.
        relative: `distance` over the norm of a's common tensors; None where that is 0.
    """

    a: str
    b: str
    same: bool
    settings: dict[str, tuple[Any, Any]]
    metrics: dict[str, tuple[Any, Any]]
    tensors: dict[str, float | None]
    distance: float
    relative: float | None


PARTS = ("method", "task", "base", "tokenizer", "provenance")


def compare(a: Stored, b: Stored) -> Difference:
    """Compare two adapters, after verifying both.

    Raises:
        CorruptError: one of them is damaged.
    """
    one, two = a.tensors(), b.tensors()
    tensors: dict[str, float | None] = {}
    gaps = norms = 0.0  # sums of squares
    for name in sorted(one.keys() | two.keys()):
        if name not in one or name not in two or one[name].shape != two[name].shape:
            tensors[name] = None
            continue
        x, y = one[name].double(), two[name].double()
        gap, norm = float((x - y).square().sum()), float(x.square().sum())
        tensors[name] = math.sqrt(gap / norm) if norm else (0.0 if gap == 0 else math.inf)
        gaps, norms = gaps + gap, norms + norm
    docs = [stored.config.model_dump(mode="json") for stored in (a, b)]
    settings = _changed(*({part: doc[part] for part in PARTS} for doc in docs))
    return Difference(
        a=a.ref,
        b=b.ref,
        same=not settings and all(value == 0 for value in tensors.values()),
        settings=settings,
        metrics=_changed(docs[0]["metrics"], docs[1]["metrics"]),
        tensors=tensors,
        distance=math.sqrt(gaps),
        relative=math.sqrt(gaps / norms) if norms else None,
    )


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    one, two = dict(_flat(a)), dict(_flat(b))
    names = dict.fromkeys([*one, *two])
    return {n: (one.get(n), two.get(n)) for n in names if n not in one or n not in two or one[n] != two[n]}


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value
