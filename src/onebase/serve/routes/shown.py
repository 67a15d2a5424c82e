"""What was written as OpenAI's objects: whole, or as a stream of chunks."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import Request

from onebase.serve.asked import Token, Written
from onebase.serve.failures import TYPES, told_of
from onebase.serve.server import Server


class Shown:
    """The shapes of one request.

    Args:
        chat: chat completions; completions otherwise.
        model: as it was asked for.
        who: who answers.
        copies: texts of each prompt.
    """

    def __init__(self, chat: bool, model: str, who: dict[str, Any], copies: int):
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex[:16]}"
        self.chat, self.copies = chat, copies
        self.shape = {"id": name, "created": int(time.time()), "model": model, **who}

    def whole(self, found: Sequence[Written]) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        choices = []
        for place, written in enumerate(found):
            said: dict[str, Any] = {"text": written.text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": written.text}}
            choices.append({"index": place, **said, "logprobs": self.chances(written.tokens),
                            "finish_reason": written.reason})  # fmt: skip
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.shape, "object": kind, "choices": choices, "usage": self.usage(found)}

    def chunk(
        self, place: int, text: str | None, tokens: Sequence[Token] = (), reason: str | None = None, role: bool = False
    ) -> str:
        """Return an event of a stream."""
        said: dict[str, Any] = {"text": text or ""}
        if self.chat:
            said = {"delta": ({"role": "assistant"} if role else {}) | ({} if text is None else {"content": text})}
        return self.event([{"index": place, **said, "logprobs": self.chances(tokens), "finish_reason": reason}])

    def event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        """Return an event with these choices."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return f"data: {json.dumps({**self.shape, 'object': kind, 'choices': choices, **more})}\n\n"

    def usage(self, found: Sequence[Written]) -> dict[str, int]:
        """Count tokens; the copies of a prompt read it once."""
        read, written = sum(w.read for w in found[:: self.copies]), sum(w.written for w in found)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def chances(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Return log probabilities, or None where none were asked for."""
        if not tokens:
            return None
        if not self.chat:
            return {
                "tokens": [token.word for token in tokens], "token_logprobs": [token.chance for token in tokens],
                "top_logprobs": [_best(token) for token in tokens] if tokens[0].top else None,
                "text_offset": [token.start for token in tokens],
            }  # fmt: skip
        content = [
            _word(token.word, token.chance) | {"top_logprobs": [_word(word, chance) for word, chance in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _best(token: Token) -> dict[str, float]:
    """Return the most probable tokens, and the one that was written."""
    found: dict[str, float] = {}
    for word, chance in (*token.top, (token.word, token.chance)):
        found.setdefault(word, chance)  # several tokens may read alike
    return found


def _word(word: str, chance: float) -> dict[str, Any]:
    part = "\ufffd" in word  # a part of a character: its bytes are not known
    return {"token": word, "logprob": chance, "bytes": None if part else list(word.encode())}


class Pieces:
    """Pieces of texts, from the threads that write to the request that streams them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[tuple[int, str, Sequence[Token]]] = asyncio.Queue()

    def teller(self, place: int) -> Callable[[str, Sequence[Token]], None]:
        """Return what a thread calls with each piece of one text."""

        def told(text: str, tokens: Sequence[Token]) -> None:
            self._loop.call_soon_threadsafe(self.queue.put_nowait, (place, text, tokens))

        return told


async def stream(
    server: Server, request: Request, items: Sequence[Any], deadline: float, pieces: Pieces, shown: Shown, usage: bool
) -> AsyncIterator[str]:
    """Give the events of a stream; whoever leaves it ends what is being written."""
    answers, queue, sent = asyncio.ensure_future(server.answers(request, items, deadline)), pieces.queue, False
    try:
        getter = asyncio.ensure_future(queue.get())
        await asyncio.wait({getter, answers}, return_when="FIRST_COMPLETED")
        first = getter.result() if getter.done() else None
        getter.cancel()
        if first is None and queue.empty() and answers.done():
            answers.result()  # nothing was sent: an error has a status of its own
        sent = True
        if shown.chat:
            for place in range(len(items)):
                yield shown.chunk(place, "", role=True)
        if first is not None:
            yield shown.chunk(*first)
        while not answers.done() or not queue.empty():
            getter = asyncio.ensure_future(queue.get())
            await asyncio.wait({getter, answers}, return_when="FIRST_COMPLETED")
            if getter.done():
                yield shown.chunk(*getter.result())
            else:
                getter.cancel()
                await asyncio.sleep(0)  # what the writing thread has said arrives before the end
                if queue.empty():
                    break
        while not queue.empty():
            yield shown.chunk(*queue.get_nowait())
        found = [written for written, _ in await answers]
        for place, written in enumerate(found):
            yield shown.chunk(place, None, reason=written.reason)
        if usage:
            yield shown.event([], usage=shown.usage(found))
        yield "data: [DONE]\n\n"
    except Exception as error:
        if not sent:
            raise
        # the status has been sent: the error is an event
        status, fields = told_of(error)
        kind = TYPES.get(status, "invalid_request_error")
        said = {"message": fields["message"], "type": kind, "param": None, "code": None}
        yield f"data: {json.dumps({'error': said})}\n\n"
    finally:
        if not answers.done():
            answers.cancel()
            server.engine.cancel(items)


async def begun(events: AsyncIterator[str]) -> AsyncIterator[str]:
    """Wait for the first event, and return them all; what fails before it is raised."""
    first = await anext(events)

    async def every() -> AsyncIterator[str]:
        try:
            yield first
            async for event in events:
                yield event
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    return every()
