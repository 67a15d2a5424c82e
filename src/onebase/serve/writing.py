"""The threads that write texts: new prompts come in between two steps, or, where a base cannot, group by group.

Tokens are those of `base.generate` in either way. Between two steps the turn is given, so rows that are labelled
meanwhile, and adapters that are attached, wait for one step and not for a text.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.decoding import Decoding, problem_of
from onebase.encode import Encoded
from onebase.errors import OnebaseError, RouteError
from onebase.generation import RowSampler, batches, draw, encode_prompts, write_rows
from onebase.serve.asked import Prompt
from onebase.serve.text import Text, positions_of, wants_chances

if TYPE_CHECKING:
    from onebase.serve.engine import Engine
    from onebase.serve.scheduler import Item

log = logging.getLogger("onebase.serve")
GROUPS = 2  # groups that are written in turns where texts cannot join: a short one need not wait for a long one


class Writer:
    """Writes what is in the engine's queue of prompts.

    Attributes:
        threads: that write.
        apart: why texts of this base cannot come and go while others are written; None where they can, or where
            nobody has looked yet.
    """

    def __init__(self, engine: Engine):
        self.engine, self.base, self.queue = engine, engine.base, engine.prompts
        self.apart: str | None = None
        self.threads = [threading.Thread(target=self._run, name="onebase-writer", daemon=True)]
        self.threads[0].start()

    def _run(self) -> None:
        if not self.queue.wait():  # the proof takes a few forwards: whoever never writes never waits for it
            return
        with self.engine.turns, self.engine.encoding:
            self.apart = problem_of(self.base)
        if self.apart is None:
            self._together()
            return
        log.info("texts are written in groups: %s", self.apart)
        for number in range(1, GROUPS):
            thread = threading.Thread(target=self._in_groups, name=f"onebase-writer-{number}", daemon=True)
            self.threads.append(thread)
            thread.start()
        self._in_groups()

    def _begin(self, batch: Sequence[Item]) -> list[Text]:
        """Encode prompts; each one's error is its own."""
        texts = []
        for item in batch:
            entry, asked = item.payload.entry, item.payload
            name = None if entry is None else entry.name
            try:
                ids = encode_prompts(self.base, [asked.prompt], [name])[0].ids
                texts.append(Text(self.engine, item, ids, name, self._room(len(ids), asked)))
            except Exception as error:
                self._failed([item], error)
        return texts

    def _room(self, read: int, asked: Prompt) -> int:
        """Return how many tokens may be written after `read` tokens of prompt; raise where that is too few."""
        limit, most = self.engine.positions, asked.sampling.max_new_tokens
        left = None if limit is None else limit - read
        if left is not None and left < (0 if self.base.is_encoder_decoder else 1):
            raise RouteError(
                f"the prompt has {read} tokens, and {self.base.id} reads at most {limit}: shorten the prompt"
            )
        if self.base.is_encoder_decoder:  # what is written has positions of its own, one of them before the first
            limit = positions_of(self.base, -1)
            left = None if limit is None else limit - 1
        if left is None or most <= left:
            return most
        if asked.exact:
            raise RouteError(
                f"the prompt has {read} tokens and max_tokens = {most}, and {self.base.id} has {limit} positions: "
                f"max_tokens can be {left} at most here"
            )
        return left

    def _failed(self, items: Sequence[Item], error: Exception) -> None:
        if not isinstance(error, OnebaseError):
            log.error("writing failed", exc_info=error)
        for item in items:
            self.engine.settle(item, error=error)

    def _finish(self, text: Text) -> None:
        try:
            if text.error is not None:
                raise text.error
            if text.late:
                self.engine.drop([text.item])
            else:
                self.engine.settle(text.item, text.written())
        except Exception as error:  # never the end of the thread
            self._failed([text.item], error)

    # -- together ----------------------------------------------------------------------------------------------------

    def _together(self) -> None:
        running: list[Text] = []
        decoding = Decoding(self.base)
        while running or self.queue.wait():
            if texts := self._begin(self._new(running)):
                self._join(decoding, running, texts)
            if running:
                self._step(decoding, running)

    def _new(self, running: Sequence[Text]) -> list[Item]:
        """Take prompts for the places that are free; an adapter that has none finds one, up to as many again."""
        places, batch = self.engine.settings.group_prompts, []
        if (room := places - len(running)) > 0:
            batch, late = self.queue.take(room, room, time.monotonic())
            self.engine.drop(late)
        while len(running) + len(batch) in range(places, 2 * places):
            busy = {*(text.item.queue for text in running), *(item.queue for item in batch)}
            one, late = self.queue.take(1, 1, time.monotonic(), busy)
            self.engine.drop(late)
            if not one:
                break
            batch += one
        return batch

    def _join(self, decoding: Decoding, running: list[Text], texts: list[Text]) -> None:
        try:
            with self.engine.turns:
                scores = decoding.join([text.read for text in texts], [text.name for text in texts])
                tokens = _draw(scores, texts)
        except Exception as error:
            if len(texts) == 1:
                self._failed([texts[0].item], error)
                return
            for text in texts:  # one prompt cannot be read: each by itself, so that its error is its own
                self._join(decoding, running, [text])
            return
        running += texts
        self._take(decoding, running, texts, tokens, scores)

    def _step(self, decoding: Decoding, running: list[Text]) -> None:
        try:
            with self.engine.turns:
                scores = decoding.step([text.ids[-1] for text in running])
                tokens = _draw(scores, running)
        except Exception as error:
            self._failed([text.item for text in running], error)
            running.clear()
            decoding.clear()
            return
        self._take(decoding, running, list(running), tokens, scores)

    def _take(
        self, decoding: Decoding, running: list[Text], texts: Sequence[Text], tokens: Sequence[int], scores: Tensor
    ) -> None:
        """Give texts their tokens; those that are over leave."""
        _deal(self.engine, texts, tokens, scores)
        over = [text for text in running if text.over]
        if over:
            decoding.keep([row for row, text in enumerate(running) if not text.over])
            running[:] = [text for text in running if not text.over]
        for text in over:
            self._finish(text)

    # -- in groups ---------------------------------------------------------------------------------------------------

    def _in_groups(self) -> None:
        while self.queue.wait():
            most = self.engine.settings.group_prompts
            batch, late = self.queue.take(most, most, time.monotonic())
            self.engine.drop(late)
            texts = self._begin(batch)
            for part in batches(self.base, [len(text.read) for text in texts]) if texts else []:
                self._group([texts[i] for i in part])

    def _group(self, texts: Sequence[Text]) -> None:
        rows = [Encoded(tuple(text.read)) for text in texts]
        raw = _Raw()
        sampler = RowSampler(
            [None if text.shape is None else text.asked.seed for text in texts], [text.shape for text in texts]
        )
        processors: list[Any] = [*([raw] if wants_chances(texts) else []), sampler]
        try:
            with self.engine.turns:
                write_rows(
                    self.base, rows, [text.name for text in texts], max(text.most for text in texts), {}, processors,
                    [_Steps(self.engine, texts, raw)],
                )  # fmt: skip
        except Exception as error:
            if len(texts) > 1 and not any(text.ids for text in texts):  # such as a base that takes no padding
                for text in texts:
                    self._group([text])
                return
            self._failed([text.item for text in texts], error)
            return
        for text in texts:
            self._finish(text)


def _draw(scores: Tensor, texts: Sequence[Text]) -> list[int]:
    return draw(scores, [text.shape for text in texts], [text.generator for text in texts]).tolist()


def _deal(engine: Engine, texts: Sequence[Text], tokens: Sequence[int], scores: Tensor | None) -> None:
    """Give each text that goes on its token."""
    on = [(row, text) for row, text in enumerate(texts) if not text.over]
    engine.written.append((time.time(), len(on)))
    for row, text in on:
        try:
            text.take(tokens[row], None if scores is None else scores[row])
        except Exception as error:  # such as a tokenizer that cannot decode: that of this text alone
            text.over, text.error = True, error


class _Raw:
    """A logits processor that remembers what the model gave."""

    scores: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores = scores.clone()
        return scores


class _Steps:
    """Asked by transformers after every step: hands out text and the turn, and ends rows that are over."""

    def __init__(self, engine: Engine, texts: Sequence[Text], raw: _Raw):
        self.engine, self.texts, self.raw = engine, texts, raw

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.engine.turns.give()
        try:
            _deal(self.engine, self.texts, input_ids[:, -1].tolist(), self.raw.scores)
        finally:
            self.engine.turns.take()
        return torch.tensor([text.over for text in self.texts], device=input_ids.device)
