"""What the engine is asked: rows to answer and prompts to continue."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from onebase.errors import OnebaseError
from onebase.serve.scheduler import Admission
from onebase.serve.tiers import Entry
from onebase.store import Stored


class Late(OnebaseError):
    """The deadline of a request passed."""


@dataclass(eq=False)
class Row:
    """A text to answer."""

    text: str
    pair: str | None
    stored: Stored | None
    future: Future = field(default_factory=Future)
    entry: Entry | None = None
    admission: Admission | None = None


@dataclass(frozen=True)
class Sampling:
    """How prompts are continued; prompts with the same settings share a batch."""

    max_new_tokens: int
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(eq=False)
class Prompt:
    """A prompt to continue."""

    prompt: Any
    stored: Stored | None
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    told: Callable[[str], None] | None = None  # receives every piece of text, in the writing thread
    future: Future = field(default_factory=Future)
    entry: Entry | None = None
    admission: Admission | None = None
    ids: list[int] = field(default_factory=list)  # of the prompt


@dataclass(frozen=True)
class Written:
    """What a prompt became.

    Attributes:
        text: without what ended it.
        reason: stop or length.
        read, written: tokens of the prompt and of the text.
    """

    text: str
    reason: str
    read: int
    written: int
