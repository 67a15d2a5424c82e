"""Spans of a context as answers: from characters to tokens and back, the best span, and how answers compare."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.encode import Encoded

NOWHERE = 0  # the token that windows without the answer point at: the first one
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Candidate:
    """A possible answer.

    Attributes:
        score: log of the probability of its start times that of its end, in its window.
        start, end: characters of the context, end excluded.
    """

    score: float
    start: int
    end: int


def token_span(row: Encoded, start: int, end: int) -> tuple[int, int]:
    """Return the first and last token of a piece of the context; NOWHERE twice where the window lacks part of it."""
    spots = [(i, spot) for i, spot in enumerate(row.offsets or ()) if spot is not None and spot[0] < spot[1]]
    if not spots or spots[0][1][0] > start or spots[-1][1][1] < end:
        return NOWHERE, NOWHERE
    touched = [i for i, (a, b) in spots if a < end and b > start]
    return (touched[0], touched[-1]) if touched else (NOWHERE, NOWHERE)


def candidates(
    windows: Sequence[Encoded], logits: Sequence[Tensor], context: str, longest: int, top: int
) -> tuple[list[Candidate], float]:
    """Find the best answers over the windows of one context.

    Args:
        windows: the rows of one question, with offsets.
        logits: per window (>= T, 2), of start and end at each token; those of padding are ignored.
        context: the context.
        longest: most tokens of an answer.
        top: how many answers.

    Returns:
        At most `top` answers, best first, each piece of the context once; and the score of "no answer", the least
        over the windows, because an answer in any of them is an answer (Devlin et al. 2019, arXiv 1810.04805, 5.3,
        for the score of a window).
    """
    found: dict[tuple[int, int], float] = {}
    nothing = float("inf")
    for row, values in zip(windows, logits):
        sure = torch.log_softmax(values[: len(row.ids)].double(), 0)  # (T, 2)
        nothing = min(nothing, float(sure[NOWHERE].sum()))
        for score, first, last in _best(sure, row, longest, top):
            start, end = _trimmed(context, row.offsets[first][0], row.offsets[last][1])  # type: ignore[index]
            if start < end:
                found[start, end] = max(score, found.get((start, end), -float("inf")))
    ranked = sorted((Candidate(score, *piece) for piece, score in found.items()), key=lambda c: (-c.score, c.start))
    return ranked[:top], nothing


def _best(sure: Tensor, row: Encoded, longest: int, top: int) -> list[tuple[float, int, int]]:
    """Return (score, first, last) of the best spans of context tokens in one window, all of them compared."""
    inside = torch.tensor([spot is not None and spot[0] < spot[1] for spot in row.offsets or ()], dtype=torch.bool)
    if not inside.any():
        return []
    start, end = sure.masked_fill(~inside[:, None], -float("inf")).unbind(1)
    ends = torch.cat([end, end.new_full((longest - 1,), -float("inf"))]).unfold(0, longest, 1)  # (T, longest)
    total = (start[:, None] + ends).flatten()
    best = total.topk(min(top, int(total.isfinite().sum())))
    return [
        (s, at // longest, at // longest + at % longest) for s, at in zip(best.values.tolist(), best.indices.tolist())
    ]


def _trimmed(context: str, start: int, end: int) -> tuple[int, int]:
    """Leave out white space at the ends: some tokenizers count the space before a word to the word."""
    piece = context[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def normalised(answer: str) -> str:
    """Return an answer in lower case without punctuation, English articles and repeated white space.

    The rule of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1).
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_PUNCTUATION)).split())


def answer_f1(found: str, right: str) -> float:
    """Return the F1 of the words of two answers; where either is empty, whether both are."""
    mine, theirs = normalised(found).split(), normalised(right).split()
    if not mine or not theirs:
        return float(mine == theirs)
    shared = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * shared / (len(mine) + len(theirs))


def compare_answers(found: str, right: Sequence[str]) -> tuple[float, float]:
    """Return (F1, exact match) with the nearest of the right answers; no right answer means that none is right."""
    choices = list(right) or [""]
    return (
        max(answer_f1(found, choice) for choice in choices),
        float(any(normalised(found) == normalised(choice) for choice in choices)),
    )
