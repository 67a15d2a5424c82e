"""Words and their tags: where words are, what entities BIO tags mark, and how two taggings differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from onebase.data.tags import ENTITY_TAG, OUTSIDE, is_bio
from onebase.encode import Encoded

__all__ = [
    "OUTSIDE", "Entity", "bio_tags", "entities", "entity_counts", "find_words", "is_bio", "place_words",
    "tag_counts", "words_of_span",
]  # fmt: skip

Entity = tuple[int, int, str]  # first word, end word (excluded), type

# A word: a run of letters, digits and underscores, or any other single character that is no white space. Coarser
# than most corpora ("don't" is three words), but the same for every language that separates words.
_WORD = re.compile(r"\w+|[^\w\s]")


def find_words(text: str) -> list[tuple[int, int]]:
    """Return where the words of a text are, as (start, end) in characters.

    A word is a run of letters, digits and underscores; every other character but white space is a word of its own.
    """
    return [match.span() for match in _WORD.finditer(text)]


def entities(tags: Sequence[str]) -> list[Entity]:
    """Return the entities that tags mark, by the rules of the CoNLL-2000 scorer (Tjong Kim Sang & Buchholz 2000).

    B, S and U begin an entity; I, E and L continue one of the same type, and begin one where there is none to
    continue (so IOB1, where B stands only between two entities, is read rightly); E, S, L and U end one.
    """
    found: list[Entity] = []
    start, kind = 0, ""  # of the entity that is open, '' for none
    for i, tag in enumerate([*tags, OUTSIDE]):
        match = ENTITY_TAG.fullmatch(tag)
        prefix, own = match.groups() if match else ("O", "")
        if kind and (prefix in "OBSU" or own != kind):
            found.append((start, i, kind))
            kind = ""
        if own and not kind:
            start, kind = i, own
        if kind and prefix in "ESLU":
            found.append((start, i + 1, kind))
            kind = ""
    return found


def bio_tags(marked: Iterable[Entity], count: int) -> list[str]:
    """Return the BIO (IOB2) tags of `count` words that mark these entities."""
    tags = [OUTSIDE] * count
    for start, end, kind in marked:
        tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return tags


def entity_counts(predicted: Sequence[str], actual: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Count per type the entities found exactly, wrongly found, and missed."""
    mine, right = set(entities(predicted)), set(entities(actual))
    return _by_kind(mine & right, mine - right, right - mine)


def tag_counts(predicted: Sequence[str], actual: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Count per tag but O the words tagged rightly, wrongly tagged so, and missed."""
    mine = {(i, i + 1, tag) for i, tag in enumerate(predicted) if tag != OUTSIDE}
    right = {(i, i + 1, tag) for i, tag in enumerate(actual) if tag != OUTSIDE}
    return _by_kind(mine & right, mine - right, right - mine)


def _by_kind(hits: set[Entity], extra: set[Entity], missed: set[Entity]) -> dict[str, tuple[int, int, int]]:
    found: dict[str, list[int]] = {}
    for column, marked in enumerate((hits, extra, missed)):
        for _, _, kind in marked:
            found.setdefault(kind, [0, 0, 0])[column] += 1
    return {kind: (counts[0], counts[1], counts[2]) for kind, counts in found.items()}


def words_of_span(words: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """Return (first, end) of the words that a piece of text touches; equal where it touches none."""
    touched = [i for i, (a, b) in enumerate(words) if a < end and b > start]
    return (touched[0], touched[-1] + 1) if touched else (0, 0)


def place_words(
    rows: Sequence[Encoded], text: str, words: Sequence[tuple[int, int]]
) -> list[tuple[int, int] | None]:  # fmt: skip
    """Find the first token of each word, in the window where it has most context.

    Context is the number of tokens to the nearer end of the window; an end that is the text's own does not count. Of
    equal windows the first is taken.

    Args:
        rows: the windows of one text, with offsets.
        text: the text.
        words: (start, end) of its words, in order.

    Returns:
        Per word (window, token), None where no token covers it (it was cut, or the tokenizer drops it).
    """
    first = [len(text)] * len(words)  # where the first token of each word begins; later windows may begin inside it
    seen: list[tuple[int, int, int, int, int]] = []  # word, begin, window, token, context
    for window, row in enumerate(rows):
        pieces = _pieces(row, text)
        low, high = (pieces[0][0], pieces[-1][0]) if pieces else (0, 0)
        at = 0
        for token, start, end in pieces:
            while at and words[at - 1][1] > start:  # two tokens may share characters
                at -= 1
            while at < len(words) and words[at][1] <= start:
                at += 1
            for word in range(at, len(words)):
                if words[word][0] >= end:
                    break
                left = token - low if window else len(text)
                right = high - token if window + 1 < len(rows) else len(text)
                seen.append((word, start, window, token, min(left, right)))
                first[word] = min(first[word], start)
    best: list[tuple[int, int, int] | None] = [None] * len(words)  # context, window, token
    for word, start, window, token, context in seen:
        now = best[word]
        if start == first[word] and (now is None or context > now[0]):
            best[word] = (context, window, token)
    return [None if found is None else (found[1], found[2]) for found in best]


def _pieces(row: Encoded, text: str) -> list[tuple[int, int, int]]:
    """Return (token, start, end) of the tokens of a text, without the white space that some tokenizers count in."""
    found = []
    for token, spot in enumerate(row.offsets or ()):
        if spot is None:
            continue
        start, end = spot
        while start < end and text[start].isspace():
            start += 1
        if start < end:
            found.append((token, start, end))
    return found
