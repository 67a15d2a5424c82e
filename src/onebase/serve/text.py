"""A text while it is written: when it is over, what of it can be handed out, and what it became."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.data.messages import is_conversation
from onebase.encode import pad_id
from onebase.generation import Shape, end_of, eos_of, until
from onebase.serve.asked import PART, Token, Written

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.serve.engine import Engine
    from onebase.serve.scheduler import Item


STRETCHED = ("linear", "dynamic", "yarn")  # rotary positions whose factor lets a base read further
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of SentencePiece for one byte
LEAST = -9999.0  # OpenAI's number for a token that cannot be: JSON has no infinity


class Text:
    """What is written after one prompt.

    Attributes:
        item: who waits for it.
        read: token ids of the prompt.
        name: adapter on the base, or None.
        ids: token ids written so far, with what ends it.
        most: new tokens, at most.
        shape, generator: how tokens are drawn; None takes the most probable ones.
        over: nothing more is written.
        late: over because its deadline passed: what was written is no answer.
        error: over because it could not be handed out, or None.
    """

    def __init__(self, engine: Engine, item: Item, read: Sequence[int], name: str | None, most: int | None = None):
        base, asked = engine.base, item.payload
        self.engine, self.item, self.asked, self.read, self.name = engine, item, asked, list(read), name
        self.ids: list[int] = []
        self.most = asked.sampling.max_new_tokens if most is None else most
        # an answer to a conversation is a text of its own; anything else goes on where the prompt ends
        self._after = () if is_conversation(asked.prompt) else engine.tail_of(self.read)
        self.shape: Shape | None = asked.sampling.shape
        self.generator = None if self.shape is None else torch.Generator().manual_seed(asked.seed)
        eos = eos_of(base)
        self._eos = set(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
        self._end, self._pad = end_of(base, name), pad_id(base.tokenizer)
        self.over = self.late = False
        self.error: Exception | None = None
        self._handed = 0  # characters
        self._tokens: list[Token] = []
        self._handed_tokens = 0

    def take(self, token: int, scores: Tensor | None = None) -> None:
        """Add a token, and see whether the text is over.

        Args:
            token: its id.
            scores: (V,) the base's logits before they were reshaped; needed where log probabilities are asked for.
        """
        self.late = self.item.deadline is not None and self.item.deadline <= time.monotonic()
        if self.late or self.item.gone:
            self.over = True
            return
        self.ids.append(token)
        if self.asked.logprobs is not None and scores is not None:
            self._tokens.append(self._chances(token, scores))
        ended = token in self._eos or (self._end and tuple(self.ids[-len(self._end) :]) == self._end)
        self.over = bool(ended) or len(self.ids) >= self.most
        if not self.over and (self.asked.told is not None or self.asked.stop):
            self._tell()

    def _chances(self, token: int, scores: Tensor) -> Token:
        chances = scores.float().log_softmax(-1).clamp(min=LEAST)
        before = self._before()
        best = chances.topk(min(self.asked.logprobs, len(chances))) if self.asked.logprobs else None
        top = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist()))
        words = tuple((self._word(i, before), chance) for i, chance in top)
        return Token(token, float(chances[token]), words, self._word(token, before))

    def _before(self) -> tuple[int, ...]:
        """Return the last token before the newest one that reads as whole characters, if any."""
        for token in reversed((*self._after, *self.ids[:-1])):
            text = self.engine.text_of([token])
            if text and PART not in text:
                return (token,)
        return ()

    def _word(self, token: int, before: Sequence[int]) -> str:
        """Return the text of a token, with the space in front of it where it stands after others."""
        with self.engine.encoding:
            decode = self.engine.base.tokenizer.decode
            word = decode([token])
            if PART in word or not before:
                return word
            first = decode(list(before))
            both = decode([*before, token])
            return both[len(first) :] if both.startswith(first) else word

    def _text(self, ids: Sequence[int]) -> str:
        return self.engine.text_of(ids, self._after)

    def _tell(self) -> None:
        """Hand out what is certain; a text that stands among those to stop at ends it."""
        text = self._text(self.ids)
        if _stop(text, self.asked.stop) is not None:
            self.over = True
            return
        held = max((len(stop) for stop in self.asked.stop), default=1) - 1  # the beginning of a stop may be there
        safe = len(text) - held
        if self.asked.told is not None and safe > self._handed and not text.endswith(PART) and not self._in_bytes():
            self._hand(text[:safe], self.ids)

    def _in_bytes(self) -> bool:
        """Whether the newest token is a byte: a later one that is no character takes all of the run with it."""
        newest = next((i for i in reversed(self.ids) if i not in self.engine.special), None)  # those are not decoded
        return newest is not None and bool(
            BYTE.fullmatch(str(self.engine.base.tokenizer.convert_ids_to_tokens(newest)))
        )

    def _hand(self, text: str, ids: Sequence[int]) -> None:
        tokens = self._within(len(text), ids)
        self.asked.told(text[self._handed :], tokens[self._handed_tokens :])
        self._handed, self._handed_tokens = len(text), max(len(tokens), self._handed_tokens)

    def _within(self, characters: int, ids: Sequence[int]) -> list[Token]:
        """Return the tokens that begin within so many characters, with their places."""
        found: list[Token] = []
        for place, token in enumerate(self._tokens[: len(ids)]):
            start = token.start if token.start is not None else len(self._text(ids[:place]))
            self._tokens[place] = token = token.at(start)
            if start >= characters and characters < len(self._text(ids)):
                break
            found.append(token)
        return found

    def written(self) -> Written:
        """Return what it became; the rest is handed out."""
        ids = until(self.ids, self._eos, self._pad, self._end)
        text = self._text(ids)
        cut = _stop(text, self.asked.stop)
        text = text if cut is None else text[:cut]
        tokens = self._within(len(text), ids)
        if self.asked.told is not None and (len(text) > self._handed or len(tokens) > self._handed_tokens):
            self._hand(text, ids)
        reason = "stop" if cut is not None or len(ids) < self.most else "length"
        return Written(text, reason, len(self.read), len(ids), tuple(tokens))


def _stop(text: str, stops: Sequence[str]) -> int | None:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def wants_chances(texts: Sequence[Any]) -> bool:
    """Whether any of these texts asks for log probabilities."""
    return any(text.asked.logprobs is not None for text in texts)


def positions_of(base: Base, stack: int = 0) -> int | None:
    """Return how many tokens a stack of a base reads at most, None where it states no limit."""
    limit = base.anatomy.stacks[stack].position_limit
    config = base.model.config
    if limit is not None or base.is_encoder_decoder:
        return limit
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type")) in STRETCHED:  # the config states what it was trained for
        trained = scaling.get("original_max_position_embeddings") or stated
        return max(stated, int(trained * float(scaling.get("factor") or 1)))
    return stated
