"""Scores of written texts against the texts that were wanted: exact match and chrF."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

ORDER = 6  # longest n-gram of characters, and
BETA = 2.0  # how many times more recall counts than precision: chrF2, the default of the paper's sequel (W16-2341)


def exact_match(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of texts that are equal, white space at the ends apart; 0 to 1."""
    return sum(a.strip() == b.strip() for a, b in zip(written, wanted, strict=True)) / len(wanted)


def chrf(written: Sequence[str], wanted: Sequence[str]) -> float:
    """Compute the character n-gram F-score of a corpus, chrF2 (Popovic 2015, aclanthology W15-3049).

    Matches, n-grams written and n-grams wanted are summed over all texts per order n = 1 .. 6; white space does not
    count. Precision and recall are averaged over the orders that occur on both sides, then
    (1 + b^2) P R / (b^2 P + R).

    Returns:
        0 to 100, as it is usually reported.
    """
    totals = [[0, 0, 0] for _ in range(ORDER)]
    for one, other in zip(written, wanted, strict=True):
        for n, total in enumerate(totals, 1):
            found, sought = _grams("".join(one.split()), n), _grams("".join(other.split()), n)
            for k, count in enumerate((found & sought, found, sought)):
                total[k] += count.total()
    shares = [(hits / found, hits / sought) for hits, found, sought in totals if found and sought]
    if not shares:
        return 0.0
    precision, recall = (sum(share[k] for share in shares) / len(shares) for k in (0, 1))
    below = BETA**2 * precision + recall
    return 100 * (1 + BETA**2) * precision * recall / below if below else 0.0


def _grams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))
