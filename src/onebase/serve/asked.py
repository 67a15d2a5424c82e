"""What the engine is asked: rows to answer and prompts to continue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from onebase.errors import OnebaseError
from onebase.generation import Shape
from onebase.serve.scheduler import Admission
from onebase.serve.tiers import Entry
from onebase.store import Stored

PART = "\ufffd"  # what a part of a character is decoded as


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
    """How a prompt is continued; no temperature takes the most probable tokens."""

    max_new_tokens: int
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @property
    def shape(self) -> Shape | None:
        """How tokens are drawn, None where they are not."""
        return None if self.temperature is None else Shape(self.temperature, self.top_k, self.top_p, self.min_p)


@dataclass(frozen=True)
class Token:
    """A token that was written.

    Attributes:
        id: in the vocabulary.
        chance: natural logarithm of its probability, as the adapter gives it: before temperature and cuts.
        top: the most probable tokens in its place with theirs, the first ones first.
        word: its own text.
        start: characters of the text before it, once they are known.
    """

    id: int
    chance: float
    top: tuple[tuple[str, float], ...]
    word: str
    start: int | None = None

    def at(self, start: int) -> Token:
        """Return it with its place."""
        return self if self.start == start else replace(self, start=start)


@dataclass(eq=False)
class Prompt:
    """A prompt to continue.

    Attributes:
        prompt: a text, a conversation or token ids.
        stop: texts that end it.
        told: receives every piece of text with its tokens, in a writing thread; tokens only where `logprobs` is given.
        logprobs: how many of the most probable tokens to name in each place; None: no probabilities.
        exact: the number of new tokens was asked for: refused where the base has no room for so many, else as many as
            there is room for are written.
    """

    prompt: Any
    stored: Stored | None
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    told: Callable[[str, Sequence[Token]], None] | None = None
    logprobs: int | None = None
    exact: bool = False
    future: Future = field(default_factory=Future)
    entry: Entry | None = None
    admission: Admission | None = None


@dataclass(frozen=True)
class Written:
    """What a prompt became.

    Attributes:
        text: without what ended it.
        reason: stop or length.
        read, written: tokens of the prompt and of the text.
        tokens: of the text, where probabilities were asked for.
    """

    text: str
    reason: str
    read: int
    written: int
    tokens: tuple[Token, ...] = ()
