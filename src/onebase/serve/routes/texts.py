"""Texts: completions and chats, whole or as a stream, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from onebase.errors import OnebaseError
from onebase.generation import sample_seed
from onebase.serve import bodies as b
from onebase.serve.asked import Prompt, Sampling
from onebase.serve.failures import TYPES, told_of
from onebase.serve.keys import Key
from onebase.serve.routes.rows import check_texts
from onebase.serve.server import Server


def add_texts(app: FastAPI, server: Server, use: Any) -> None:
    """Add the routes that write."""

    @app.post("/v1/completions")
    async def completions(body: b.Completion, request: Request, key: Key = Depends(use)) -> Any:
        many = isinstance(body.prompt, list) and (not body.prompt or isinstance(body.prompt[0], str))
        prompts: list[Any] = list(body.prompt) if many else [body.prompt]  # type: ignore[arg-type]
        return await _write(server, body, prompts, request, key, chat=False, tokens=body.max_tokens or 16)

    @app.post("/v1/chat/completions")
    async def chat(body: b.Chat, request: Request, key: Key = Depends(use)) -> Any:
        if not body.messages:
            raise HTTPException(400, "messages: expected at least one message")
        turns = [{"role": m.get("role"), "content": m.get("content")} for m in body.messages]
        for place, message in enumerate(body.messages):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise HTTPException(400, f"messages.{place}: expected 'role' and 'content', both texts")
            if more := message.keys() - {"role", "content"}:
                raise HTTPException(400, f"messages.{place}.{sorted(more)[0]}: not supported")
        tokens = body.max_completion_tokens or body.max_tokens or 256
        return await _write(server, body, [turns], request, key, chat=True, tokens=tokens)


async def _write(
    server: Server, body: b.Writing, prompts: list[Any], request: Request, key: Key, *, chat: bool, tokens: int
) -> Any:
    settings = server.settings
    stored = server.resolve(body.model, key)
    stops = tuple([body.stop] if isinstance(body.stop, str) else body.stop or [])
    if len(stops) > 4 or not all(stops):
        raise HTTPException(400, "stop: expected at most 4 texts, none of them empty")
    if tokens > settings.new_tokens:
        raise HTTPException(413, f"max_tokens = {tokens}: at most {settings.new_tokens}")
    check_texts(server, [json.dumps(p) if not isinstance(p, str) else p for p in prompts] * body.n)
    _numbers(server, prompts)
    sampled = bool(body.temperature)
    if not sampled and (body.top_k or body.min_p or (body.top_p or 1.0) < 1.0):
        raise HTTPException(400, "top_p, top_k and min_p have no effect without a temperature above 0")
    sampling = Sampling(tokens)
    if sampled:
        sampling = Sampling(tokens, body.temperature, body.top_k, body.top_p, body.min_p)
    seed = body.seed if body.seed is not None else uuid.uuid4().int % 2**62
    deadline, loop = server.deadline(request), asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
    asked = []
    for prompt in prompts:
        for copy in range(body.n):
            place = len(asked)

            def told(text: str, place: int = place) -> None:
                loop.call_soon_threadsafe(queue.put_nowait, (place, text))

            asked.append(
                Prompt(prompt, stored, sampling, sample_seed(seed, copy), stops, told if body.stream else None)
            )
    items = server.engine.write(asked, deadline)
    name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex[:16]}"
    shape = {"id": name, "created": int(time.time()), "model": body.model, **server.who(stored)}
    if body.stream:
        events = _stream(server, body, request, items, deadline, queue, shape, chat)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    found = [written for written, _ in await server.answers(request, items, deadline)]
    choices = []
    for place, written in enumerate(found):
        said: dict[str, Any] = (
            {"message": {"role": "assistant", "content": written.text}} if chat else {"text": written.text}
        )
        choices.append({"index": place, **said, "logprobs": None, "finish_reason": written.reason})
    return {**shape, "object": "chat.completion" if chat else "text_completion", "choices": choices,
            "usage": _usage(found, body.n)}  # fmt: skip


def _numbers(server: Server, prompts: Sequence[Any]) -> None:
    limit = server.base.anatomy.stacks[-1].embed.weight.shape[0]
    for prompt in prompts:
        if prompt and isinstance(prompt, list) and isinstance(prompt[0], int):
            wrong = next((i for i in prompt if not 0 <= i < limit), None)
            if wrong is not None:
                raise HTTPException(400, f"prompt: token id {wrong} is not among the base's {limit}")


def _usage(found: Sequence[Any], copies: int) -> dict[str, int]:
    read, written = sum(w.read for w in found[::copies]), sum(w.written for w in found)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def _stream(
    server: Server, body: b.Writing, request: Request, items: Sequence[Any], deadline: float, queue: asyncio.Queue,
    shape: dict[str, Any], chat: bool,
) -> AsyncIterator[str]:  # fmt: skip
    kind = "chat.completion.chunk" if chat else "text_completion"

    def event(place: int, text: str | None, reason: str | None = None, role: bool = False) -> str:
        said: dict[str, Any] = {"text": text or ""}
        if chat:
            delta = ({"role": "assistant"} if role else {}) | ({} if text is None else {"content": text})
            said = {"delta": delta}
        choice = {"index": place, **said, "logprobs": None, "finish_reason": reason}
        return f"data: {json.dumps({**shape, 'object': kind, 'choices': [choice]})}\n\n"

    answers = asyncio.ensure_future(server.answers(request, items, deadline))
    try:
        if chat:
            for place in range(len(items)):
                yield event(place, "", role=True)
        while not answers.done() or not queue.empty():
            getter = asyncio.ensure_future(queue.get())
            await asyncio.wait({getter, answers}, return_when="FIRST_COMPLETED")
            if getter.done():
                yield event(*getter.result())
            else:
                getter.cancel()
                await asyncio.sleep(0)  # what the writing thread has said arrives before the end
                if queue.empty():
                    break
        while not queue.empty():
            yield event(*queue.get_nowait())
        found = [written for written, _ in await answers]
        for place, written in enumerate(found):
            yield event(place, None, written.reason)
        if body.stream_options is not None and body.stream_options.include_usage:
            yield f"data: {json.dumps({**shape, 'object': kind, 'choices': [], 'usage': _usage(found, body.n)})}\n\n"
        yield "data: [DONE]\n\n"
    except (OnebaseError, HTTPException) as error:
        status, fields = (
            (error.status_code, {"message": error.detail}) if isinstance(error, HTTPException) else told_of(error)
        )
        said = {
            "message": fields["message"],
            "type": TYPES.get(status, "invalid_request_error"),
            "param": None,
            "code": None,
        }
        yield f"data: {json.dumps({'error': said})}\n\n"
    finally:
        if not answers.done():
            answers.cancel()
            server.engine.cancel(items)
