"""Every exception onebase raises on purpose.

    OnebaseError
    ├── ConfigError          a setting has a wrong name, type or value
    ├── UnknownNameError     a name (adapter, method, site, label) does not exist; names the nearest ones
    ├── RouteError           the rows of a call do not fit the adapters asked for
    ├── UnsupportedError     this base cannot do what was asked, and why
    ├── DataError            a data file cannot be used; names file, row and column
    ├── StoreError           the store refuses or cannot finish an operation
    │   ├── CorruptError     a stored adapter is damaged or incomplete; lists everything wrong
    │   └── MismatchError    an adapter was made for another base or tokenizer
    └── TrainingError        training cannot start or go on

Each message says what happened, the value seen, what was expected and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence


class OnebaseError(Exception):
    """Base class: a mistake or limit that onebase can explain."""


class ConfigError(OnebaseError, ValueError):
    """A setting has a wrong name, type or value."""


class UnknownNameError(OnebaseError, LookupError):
    """A name does not exist; the message lists the nearest ones."""


class RouteError(OnebaseError, ValueError):
    """The rows of a call do not fit the adapters asked for."""


class UnsupportedError(OnebaseError):
    """This base cannot do what was asked; the message says why."""


class DataError(OnebaseError, ValueError):
    """A data file cannot be used; the message names file, row and column.

    Attributes:
        problems: (what, where) of single rows, up to 1000, where rows are what is wrong.
    """

    problems: tuple[tuple[str, str], ...] = ()


class StoreError(OnebaseError):
    """The store refuses or cannot finish an operation."""


class CorruptError(StoreError):
    """A stored adapter is damaged or incomplete; the message lists everything wrong."""


class MismatchError(StoreError):
    """An adapter was made for another base or tokenizer."""


class TrainingError(OnebaseError):
    """Training cannot start or go on."""


def first_of(things: Sequence[object], most: int, write: Callable[[object], str] = str) -> str:
    """Name the first of several things, and say how many more there are."""
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(map(write, things[:most])) + more


def nearest(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """Say which of `choices` come closest to `name`, as the end of an error message.

    Args:
        name: the name that was not found.
        choices: every name that exists.
        limit: how many close names to show.

    Returns:
        A sentence such as ``Did you mean 'lora'? Known: bottleneck, lora, prefix, prompt.``
    """
    known = sorted(set(choices))
    if not known:
        return "There are none yet."
    plain = {choice.casefold(): choice for choice in reversed(known)}  # of names that differ in case only, the first
    close = [plain[found] for found in difflib.get_close_matches(name.casefold(), plain, n=limit, cutoff=0.5)]
    hint = f"Did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    shown = first_of(known, 20)
    return f"{hint}Known: {shown}."


def unknown(kind: str, name: object, choices: Iterable[str]) -> UnknownNameError:
    """Build the error for a name of some `kind` that is not among `choices`."""
    return UnknownNameError(f"unknown {kind} {name!r}. {nearest(str(name), choices)}")
