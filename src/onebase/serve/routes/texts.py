"""Texts: completions and chats, in OpenAI's shapes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from onebase.generation import sample_seed
from onebase.serve import bodies as b
from onebase.serve.asked import Prompt, Sampling
from onebase.serve.keys import Key
from onebase.serve.routes.rows import check_texts
from onebase.serve.routes.shown import Pieces, Shown, begun, stream
from onebase.serve.server import Server


def add_texts(app: FastAPI, server: Server, use: Any) -> None:
    """Add the routes that write."""

    @app.post("/v1/completions")
    async def completions(body: b.Completion, request: Request, key: Key = Depends(use)) -> Any:
        many = isinstance(body.prompt, list) and (not body.prompt or isinstance(body.prompt[0], str))
        prompts: list[Any] = list(body.prompt) if many else [body.prompt]  # type: ignore[arg-type]
        return await _write(server, body, prompts, request, key, chat=False, asked=body.max_tokens, usual=16)

    @app.post("/v1/chat/completions")
    async def chat(body: b.Chat, request: Request, key: Key = Depends(use)) -> Any:
        if not body.messages:
            raise HTTPException(400, "messages: expected at least one message")
        turns = [{"role": m.get("role"), "content": m.get("content")} for m in body.messages]
        for place, message in enumerate(body.messages):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise HTTPException(400, f"messages.{place}: expected 'role' and 'content', both texts")
            given = {name for name, value in message.items() if value not in (None, [], {})}
            if more := given - {"role", "content"}:
                raise HTTPException(400, f"messages.{place}.{sorted(more)[0]}: not supported")
        most = body.max_completion_tokens or body.max_tokens
        return await _write(server, body, [turns], request, key, chat=True, asked=most, usual=256)


async def _write(
    server: Server, body: b.Writing, prompts: list[Any], request: Request, key: Key, *, chat: bool,
    asked: int | None, usual: int,
) -> Any:  # fmt: skip
    stored = server.resolve(body.model, key)
    sampling, stops = _settings(server, body, asked or usual)
    check_texts(server, [json.dumps(p) if not isinstance(p, str) else p for p in prompts] * body.n)
    _numbers(server, prompts)
    seed = body.seed if body.seed is not None else uuid.uuid4().int % 2**62
    deadline, pieces = server.deadline(request), Pieces()
    wanted = []
    for prompt in prompts:
        for copy in range(body.n):
            told = pieces.teller(len(wanted)) if body.stream else None
            own = sample_seed(seed, copy)
            exact = asked is not None
            wanted.append(Prompt(prompt, stored, sampling, own, stops, told, logprobs=body.places(), exact=exact))
    items = server.engine.write(wanted, deadline)
    shown = Shown(chat, body.model, server.who(stored), body.n)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        events = await begun(stream(server, request, items, deadline, pieces, shown, usage))
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    return shown.whole([written for written, _ in await server.answers(request, items, deadline)])


def _settings(server: Server, body: b.Writing, tokens: int) -> tuple[Sampling, tuple[str, ...]]:
    """Return how tokens are drawn, and the texts that end a text."""
    stops = tuple([body.stop] if isinstance(body.stop, str) else body.stop or [])
    if len(stops) > 4 or not all(stops):
        raise HTTPException(400, "stop: expected at most 4 texts, none of them empty")
    if tokens > server.settings.new_tokens:
        raise HTTPException(413, f"max_tokens = {tokens}: at most {server.settings.new_tokens}")
    if body.temperature:
        return Sampling(tokens, body.temperature, body.top_k, body.top_p, body.min_p), stops
    if body.top_k or body.min_p or (body.top_p or 1.0) < 1.0:
        raise HTTPException(400, "top_p, top_k and min_p have no effect without a temperature above 0")
    return Sampling(tokens), stops


def _numbers(server: Server, prompts: Sequence[Any]) -> None:
    limit = server.base.anatomy.stacks[-1].embed.weight.shape[0]
    for prompt in prompts:
        if prompt and isinstance(prompt, list) and isinstance(prompt[0], int):
            wrong = next((i for i in prompt if not 0 <= i < limit), None)
            if wrong is not None:
                raise HTTPException(400, f"prompt: token id {wrong} is not among the base's {limit}")
