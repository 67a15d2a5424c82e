"""Regular expressions out of files: adapters name places by them, and a hostile one could keep a process busy.

Python's engine tries alternatives one after the other, so an unlimited repetition of something that itself repeats
takes exponential time on a text that does not match, and several repetitions in a row polynomial time. Names of
modules are short, so what is left after refusing the first and limiting the second takes no time that anybody notices.
"""

from __future__ import annotations

import re
import warnings
from functools import lru_cache

from onebase.errors import ConfigError

LONGEST = 100_000  # characters: lists of every module of a large base are long
REPEATS = 6  # unlimited repetitions: to this power goes the length of a name, of which regexes use a few letters each


@lru_cache(maxsize=1024)
def safe_pattern(text: str) -> re.Pattern[str]:
    """Compile a regular expression that comes from a file.

    Raises:
        ConfigError: it is none, or could take very long on some names.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"a regular expression of {len(text)} characters: expected at most {LONGEST}")
    shown = text if len(text) < 80 else text[:77] + "..."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what a later Python may read otherwise
            pattern = re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{shown!r} is no regular expression: {error}") from None
    problem = _problem(text)
    if problem:
        raise ConfigError(f"{shown!r} {problem}, which can take very long: write it with fewer '*' and '+'")
    return pattern


def _problem(text: str) -> str:
    """Say why an expression could take very long, '' if it could not."""
    inner = [0]  # unlimited repetitions inside each open group
    closed = total = place = 0  # `closed`: repetitions inside the group that ends just before `place`
    while place < len(text):
        sign, closed_now = text[place], 0
        if sign == "\\":
            if text[place + 1 : place + 2].isdigit():
                return "refers back to a group"
            place += 2
        elif sign == "[":
            place = _after_class(text, place)
        elif sign == "(":
            inner.append(0)
            place += 1
        elif sign == ")":
            closed_now = inner.pop() if len(inner) > 1 else 0
            inner[-1] += closed_now
            place += 1
        elif sign in "*+" or (sign == "{" and re.match(r"\{\d*,\}", text[place:])):
            if closed:
                return "repeats something that repeats"
            inner[-1] += 1
            total += 1
            place = text.index("}", place) + 1 if sign == "{" else place + 1
        else:
            place += 1
        closed = closed_now
    return f"has {total} unlimited repetitions, more than {REPEATS}" if total > REPEATS else ""


def _after_class(text: str, place: int) -> int:
    """Return the place behind a character class that begins at `place`."""
    place += 2 if text[place + 1 : place + 2] == "^" else 1
    place += 1  # a bracket that comes first stands for itself
    while place < len(text) and text[place] != "]":
        place += 2 if text[place] == "\\" else 1
    return place + 1
