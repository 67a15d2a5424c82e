"""Documents cut into sentences or paragraphs that stay exact slices of the document.

Rules, not a model, and none tied to one language: a sentence ends at . ! ? … or their counterparts in other
scripts, unless what stands before (an abbreviation, an initial, the number of a clause) or after (a small
letter) says it goes on. What the rules cannot know: "3. Oktober" is read as an end, "Plan B. Then" as an
initial.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from onebase.errors import unknown

By = Literal["sentences", "paragraphs"]


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


# Never the end of a sentence: a name or an example follows.
_LEADS_ON = _words(
    "mr mrs ms dr prof rev hon gen col capt lt sgt gov sen rep pres st messrs mme mmes mlle mm mgr me pr "
    "vve hr fr frau dott sig sra srta dra ing vs v cf e.g i.e eg ie ex viz resp approx env c.-à-d c.à.d "
    "z.b d.h u.a p.ex bzw ca vgl"
)
# The end of a sentence only where a word follows that opens one.
_MAY_END = _words(
    "inc ltd co corp llc plc pte pty bros gmbh cie s.a s.a.s etc al jr sr esq a.m p.m u.s u.k e.u u.n "
    "ph.d blvd ave rd jan feb mar apr jun jul aug sep sept oct nov dec janv févr juil déc dept est"
)
# Not the end where a number follows: "No. 5" but "I said no. Go." Likewise "art. L. 121" and "sec. IV".
_COUNTS = _words(
    "no nos nr n art arts sec secs § p pp pg fig figs vol vols ch chap cl par para tit ann al liv t tab "
    "eq app sched exh"
)
_OPENS_A_SENTENCE = _words(
    "a an the this that these those it its he she they we i you his her their our your my there here in "
    "on at by for from with without if when where while as after before but and or so however any all "
    "each no not what who to is are upon under during until unless please le la les l' un une des du ce "
    "cet cette ces il elle ils elles nous vous on je son sa ses leur leurs dans en à au aux par pour avec "
    "sans si quand mais et ou donc or ni car toute tout tous"
)
# A clause number that starts a line starts a passage, unless the line before waits for it.
_WAITS_FOR_NUMBER = _words(
    "section sections article articles clause clauses paragraph paragraphs schedule annex annexe exhibit "
    "chapter chapitre part partie page and or to of in by under with than et ou à de du la le les par"
)

_OPENERS = "\"'“‘„«»‹([{—–-•*_ \u00a0\u202f"
_CLOSERS = "\"'”’»›)]}"
# "!" or ".»" or "... »": French sets a space, often a no-break one, before the closing mark.
_END = re.compile(
    rf"(?<![.!?…؟۔।])[.!?…؟۔।]++(?:[{re.escape(_CLOSERS)}]|[ \u00a0\u202f]»)*+(?=\s|$)"
    r"|[。！？｡]+[」』）】”’»\"]*"
)
_CLAUSE = re.compile(r"\n\s*(?=(?:\d+(?:\.\d+)+\.?|\d+[.)])[ \t\u00a0]+[^\W\d_a-z])")
# What a passage may hold before the dot of its own number: "12." "12.3." "(a" "IV." "Article 7."
_NUMBER_ONLY = re.compile(
    r"\W*(?:(?:section|article|clause|art|sec|chapter|chapitre|part|partie|schedule|annexe?|exhibit)\.?\s+)?"
    r"(?:\d+(?:\.\d+)*|[ivxlc]+|[a-z])\s*",
    re.IGNORECASE,
)
_NUMBER_AHEAD = re.compile(r"\s*(?:[(\[]?\d|[A-Z]{1,2}[.\-]? ?\d|[A-Z]\.|[IVXLC]+\b)")
# Longest word or run of opening marks that is looked at on either side of a mark; keeps the work linear.
_LOOK = 100
_BLANK_LINES = re.compile(r"(?>\r\n|\r|\n)(?:[^\S\r\n]*(?>\r\n|\r|\n))+")


@dataclass(frozen=True)
class Passage:
    """A piece of a document: `text == document[start:end]`, without white space at its ends."""

    text: str
    start: int
    """position of the first character in the document"""
    end: int
    """position after the last character"""
    index: int
    """number of the passage in the document, from 0"""


def split_passages(text: str, by: By) -> list[Passage]:
    """Cut a document into sentences or paragraphs.

    Paragraphs are what blank lines separate. Sentences never cross a blank line; a single line break inside a
    sentence is part of it, and lists held together by semicolons stay whole.

    Args:
        text: the document.
        by: "sentences" or "paragraphs".

    Returns:
        Passages in order; only white space lies before, between and after them.

    Raises:
        UnknownNameError: `by` is something else.

    Example:
        >>> [p.text for p in split_passages("Mr. Day paid 3.50. He left.", "sentences")]
        ['Mr. Day paid 3.50.', 'He left.']
    """
    if by not in get_args(By):
        raise unknown("way to cut passages", by, get_args(By))
    spans = _paragraphs(text)
    if by == "sentences":
        # Text all in small letters has no capital to wait for.
        cased = any(char.isupper() for char in text)
        spans = (span for start, end in spans for span in _sentences(text, start, end, cased))
    return [Passage(text[start:end], start, end, i) for i, (start, end) in enumerate(spans)]


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for gap in _BLANK_LINES.finditer(text):
        yield from _trimmed(text, start, gap.start())
        start = gap.end()
    yield from _trimmed(text, start, len(text))


def _sentences(text: str, start: int, end: int, cased: bool) -> Iterator[tuple[int, int]]:
    """Yield the sentences of text[start:end]."""
    begin = start
    for position in _borders(text, start, end):
        if position > begin and _ends_here(text, begin, position, end, cased):
            yield from _trimmed(text, begin, position)
            begin = position
    yield from _trimmed(text, begin, end)


def _borders(text: str, start: int, end: int) -> list[int]:
    """List where a sentence might end: after a closing mark, or before a line that has a clause number."""
    marks = {match.end() for match in _END.finditer(text, start, end)}
    return sorted(marks | {match.start() for match in _CLAUSE.finditer(text, start, end)})


def _ends_here(text: str, begin: int, position: int, end: int, cased: bool) -> bool:
    body = text[max(begin, position - _LOOK) : position].rstrip(_CLOSERS + " \u00a0\u202f\r\n\t")
    if not any(map(str.isalnum, body)):
        return False  # ". . ." alone is no sentence
    if body[-1] in "。！？｡":
        return True
    if _CLAUSE.match(text, position, end) and body[-1] not in ".!?…":
        return body[-1] not in ",(" and _last_word(body) not in _WAITS_FOR_NUMBER
    if _goes_on(text, position, end, cased):
        return False
    return not body.endswith(".") or _dot_ends(body, _ahead(text, position, end))


def _ahead(text: str, position: int, end: int) -> str:
    """Show what follows the white space at `position`."""
    while position < end and text[position].isspace():
        position += 1
    return text[position : min(end, position + _LOOK)]


def _goes_on(text: str, position: int, end: int, cased: bool) -> bool:
    """Say whether the text after a mark continues the sentence: nothing left, or a small letter."""
    ahead = _ahead(text, position, end).lstrip(_OPENERS)
    return not ahead or (cased and ahead[0].islower()) or ahead[0] in ",;:.!?)]}"


def _dot_ends(body: str, ahead: str) -> bool:
    """Say whether the dot that closes `body` is a full stop."""
    if body.endswith(".."):
        return not re.search(r"[\[(]\.+$", body)  # "[...]" is a gap, not an end
    if _NUMBER_ONLY.fullmatch(body[:-1]):
        return False
    word = _last_word(body[:-1])
    following = re.match(r"\W*([^\W\d_]+'?)", ahead)
    opens = following is not None and following[1].lower() in _OPENS_A_SENTENCE and following[1][0].isupper()
    if word in _COUNTS and _NUMBER_AHEAD.match(ahead) and not opens:
        return False
    if word in _LEADS_ON or (len(word) == 1 and word.isalpha()):
        return False
    if word in _MAY_END or re.fullmatch(r"(?:[^\W\d_]\.)+[^\W\d_]", word):
        return opens
    return True


def _last_word(body: str) -> str:
    last = body.rsplit(None, 1)[-1] if body.strip() else ""
    return re.split("['’]", last.lstrip(_OPENERS))[-1].casefold()  # "l'art" is "art"


def _trimmed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the span without white space at its ends, or nothing where that is all it holds."""
    kept = text[start:end].strip()
    if kept:
        first = start + len(text[start:end]) - len(text[start:end].lstrip())
        yield first, first + len(kept)
