"""What there is to know about data before training: balance, lengths, repeats, leaks and contradictions, by place."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onebase.data.kinds import KINDS
from onebase.data.rows import Data, Rows, class_names
from onebase.data.splits import keys

SHOWN = 5  # places shown per finding
_QUANTILES = (0.0, 0.5, 0.95, 1.0)
_LEAST_SHARE = 0.1  # of the largest class: fewer rows than that is called imbalanced


@dataclass(frozen=True)
class Spread:
    """The distribution of lengths.

    Attributes:
        shortest, median, p95, longest: in words or tokens.
        mean: the average.
    """

    shortest: int
    median: int
    p95: int
    longest: int
    mean: float


@dataclass(frozen=True)
class Repeats:
    """Rows that are the same as others.

    Attributes:
        exact: rows with all the text of an earlier row (white space at the ends apart); labels are not text.
        normalised: rows that equal an earlier one but for case, punctuation, accents' spelling and white space; the
            exact ones among them.
        places: (row, earlier row) of the first ones.
    """

    exact: int
    normalised: int
    places: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Findings:
    """What there is to know about a data set.

    Attributes:
        rows: split -> rows.
        labels: split -> label -> rows (or tags); empty for kinds without classes.
        scores: split -> (lowest, mean, highest), for measurements.
        words: split -> lengths of the input in words; {} where it is no text.
        repeats: split -> repeats inside of it.
        leaks: held-out split -> its rows that are also in train.
        conflicts: inputs with more than one target within train, and the first of them with their targets.
        warnings: what a person should look at, one sentence each.
    """

    rows: dict[str, int]
    labels: dict[str, dict[str, int]]
    scores: dict[str, tuple[float, float, float]]
    words: dict[str, Spread]
    repeats: dict[str, Repeats]
    leaks: dict[str, Repeats]
    conflicts: tuple[int, tuple[str, ...]]
    warnings: tuple[str, ...]


def find(data: Data) -> Findings:
    """Look at every row of a data set once per question; large data stays on disk.

    Args:
        data: what `load` returned.

    Returns:
        The findings. Repeats are compared by 64 bits of a hash, so their number is exact but for one chance in 10^9.
    """
    splits = {name: rows for name, rows in data.splits.items() if len(rows)}
    known = KINDS[data.kind].known or KINDS[data.kind].same
    hashes = {name: _both(rows, data.kind, known) for name, rows in splits.items()}
    repeats = {}
    for name, rows in splits.items():
        roles = _text_roles(rows, data.kind)
        repeats[name] = _repeats(rows, *(hashes[name] if set(roles) == set(known) else _both(rows, data.kind, roles)))
    leaks = {
        name: _leaks(rows, splits["train"], hashes[name], hashes["train"])
        for name, rows in splits.items()
        if name != "train"
    }
    labels = {name: _balance(rows, data.kind) for name, rows in splits.items()}
    conflicts = _conflicts(splits["train"], hashes["train"][0], data.kind)
    return Findings(
        rows={name: len(rows) for name, rows in data.splits.items()},
        labels={name: counts for name, counts in labels.items() if counts},
        scores={name: found for name, rows in splits.items() if (found := _scores(rows, data.kind))},
        words={
            name: spread([len(text.split()) for text in inputs(rows, data.kind)])
            for name, rows in splits.items()
            if _text_roles(rows, data.kind)
        },
        repeats=repeats,
        leaks=leaks,
        conflicts=conflicts,
        warnings=tuple(_warnings(data, labels, repeats, leaks, conflicts)),
    )


def inputs(rows: Rows, kind: str) -> Iterator[str]:
    """Yield all text of each row that a base reads, its roles joined by spaces; labels and scores are not text."""
    for values in zip(*(rows[role] for role in _text_roles(rows, kind))):
        yield " ".join(map(_as_text, values))


def spread(lengths: Sequence[int]) -> Spread:
    """Return the distribution of lengths; at least one."""
    import numpy as np

    found = np.quantile(np.asarray(lengths), _QUANTILES, method="inverted_cdf")
    shortest, median, p95, longest = (int(value) for value in found)
    return Spread(shortest, median, p95, longest, float(np.mean(lengths)))


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return " ".join(item if isinstance(item, str) else item["content"] for item in value)


def _text_roles(rows: Rows, kind: str) -> list[str]:
    return [role for role in rows.roles if KINDS[kind].form(role) in ("text", "words", "messages")]


def _both(rows: Rows, kind: str, roles: Sequence[str]) -> tuple[Any, Any]:
    """Return hashes of rows as they are, and normalised."""
    return _hashes(keys(rows, kind, roles)), _hashes(_normalised(rows, kind, roles))


def _normalised(rows: Rows, kind: str, roles: Sequence[str]) -> Iterator[str]:
    for key in keys(rows, kind, roles):
        plain = unicodedata.normalize("NFKC", key).casefold()
        kept = "".join(c if c.isalnum() or c == "\0" else " " for c in plain)
        # A text of marks only has no letters to be compared by.
        yield " ".join(kept.split()) if kept.strip(" \0") else key


def _hashes(texts: Iterable[str]) -> Any:
    """Return 64 bits of a hash per text (uint64)."""
    import numpy as np

    return np.fromiter(
        (
            int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
            for text in texts
        ),
        dtype=np.uint64,
    )


def _earlier(hashes: Any) -> tuple[Any, Any]:
    """Return the rows whose hash stood before, and for each the first row that has it."""
    import numpy as np

    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    origin = first[inverse]
    again = np.flatnonzero(origin != np.arange(len(hashes)))
    return again, origin[again]


def _repeats(rows: Rows, exact: Any, normalised: Any) -> Repeats:
    again, origin = _earlier(normalised)
    pairs = zip(again[:SHOWN].tolist(), origin[:SHOWN].tolist())
    places = tuple((rows.place(row), rows.place(other)) for row, other in pairs)
    return Repeats(len(_earlier(exact)[0]), len(again), places)


def _leaks(rows: Rows, train: Rows, own: tuple[Any, Any], known: tuple[Any, Any]) -> Repeats:
    import numpy as np

    shared = [np.flatnonzero(np.isin(mine, theirs)) for mine, theirs in zip(own, known)]
    places = []
    for row in shared[1][:SHOWN].tolist():
        other = int(np.flatnonzero(known[1] == own[1][row])[0])
        places.append((rows.place(row), train.place(other)))
    return Repeats(len(shared[0]), len(shared[1]), tuple(places))


def _balance(rows: Rows, kind: str) -> dict[str, int]:
    return dict(Counter(class_names(rows, kind)).most_common())


def _scores(rows: Rows, kind: str) -> tuple[float, float, float] | None:
    role = next((role for role in rows.roles if KINDS[kind].form(role) == "score"), None)
    if role is None:
        return None
    values = list(rows[role])
    return min(values), sum(values) / len(values), max(values)


def _conflicts(train: Rows, exact: Any, kind: str) -> tuple[int, tuple[str, ...]]:
    """Count the inputs of train that are there with different labels; other targets may well differ."""
    role = next(
        (role for role in ("label", "labels", "tags", "spans") if kind != "rerank" and role in train.roles), None
    )
    if role is None:
        return 0, ()
    again, origin = _earlier(exact)
    targets = train[role]
    found: dict[int, str] = {}
    for row, first in zip(again.tolist(), origin.tolist()):
        if first not in found and targets[row] != targets[first]:
            found[first] = f"{train.place(first)}: {_shown(targets[first])}, {train.place(row)}: {_shown(targets[row])}"
    return len(found), tuple(list(found.values())[:SHOWN])


def _shown(target: Any) -> str:
    return repr(target) if isinstance(target, str) else json.dumps(target, ensure_ascii=False)


def _warnings(
    data: Data,
    labels: dict[str, dict[str, int]],
    repeats: dict[str, Repeats],
    leaks: dict[str, Repeats],
    conflicts: tuple[int, tuple[str, ...]],
) -> Iterator[str]:
    for split, found in leaks.items():
        if found.normalised and data.kind not in ("causal-lm", "masked-lm"):
            where = "; ".join(f"{row} = {other}" for row, other in found.places[:2])
            yield (
                f"Leak: {found.normalised:,} of {len(data.splits[split]):,} rows of {split} are also in train "
                f"({found.exact:,} exactly): the score on {split} is too good. First: {where}."
            )
    train = repeats["train"]
    if train.normalised:
        yield f"{train.normalised:,} rows of train repeat an earlier one ({train.exact:,} exactly)."
    if conflicts[0]:
        yield f"{conflicts[0]:,} inputs stand in train with different labels. First: {conflicts[1][0]}."
    counts = labels["train"] if data.kind != "tokens" else {}
    if counts:
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        if counts[least] < _LEAST_SHARE * counts[most]:
            share = counts[most] / len(data.train)
            yield (
                f"Imbalanced: {counts[most]:,} rows of {most!r}, {counts[least]:,} of {least!r}. Always answering "
                f"{most!r} is right on {100 * share:.1f} % of train; look at macro F1, not at accuracy."
            )
    for split in ("validation", "test"):
        lost = [name for name in data.labels if name not in labels.get(split, {})] if len(data.splits[split]) else []
        if labels.get(split) and lost:
            yield f"{split} has no row of {', '.join(map(repr, lost[:SHOWN]))}{' ...' if len(lost) > SHOWN else ''}."
