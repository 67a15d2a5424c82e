"""The HTTP server: routes, errors, keys, limits. Everything that is computed is the engine's."""

from __future__ import annotations

import asyncio
import base64
import difflib
import json
import logging
import re
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from onebase import __version__
from onebase.errors import OnebaseError, StoreError, UnknownNameError
from onebase.generation import sample_seed
from onebase.serve import bodies as b
from onebase.serve.catalog import PLAIN, Catalog
from onebase.serve.engine import Engine, Late, Prompt, Row, Sampling
from onebase.serve.keys import Key, Keys
from onebase.serve.metrics import Metrics
from onebase.serve.scheduler import Overloaded
from onebase.serve.training import Trainings, training_routes
from onebase.serve.web import add_page
from onebase.tasks import get_task

if TYPE_CHECKING:
    from onebase.store import Stored

log = logging.getLogger("onebase.serve")
REQUEST_ID = re.compile(r"[\w-]{1,64}")
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 409: "conflict_error", 413: "invalid_request_error", 422: "unusable_adapter_error",
    429: "rate_limit_error", 500: "internal_error", 503: "unavailable_error", 504: "timeout_error",
}  # fmt: skip
POLL = 0.1  # seconds after which a request looks whether its client is still there


class Server:
    """What the routes share.

    Args:
        engine: computes.
        catalog: names.
        keys: who may ask.
        trainings: runs beside the server, or None.
        loopback: only this machine reaches the server; then training needs no key where none is set.
    """

    def __init__(
        self, engine: Engine, catalog: Catalog, keys: Keys, trainings: Trainings | None = None, loopback: bool = True
    ):
        self.engine, self.catalog, self.keys, self.trainings, self.loopback = engine, catalog, keys, trainings, loopback
        self.settings = engine.settings
        self.base = engine.base
        self.digest = self.base.fingerprint()
        self.started = time.time()
        self.counts: Counter[str] = Counter()
        self.by_ref: Counter[str] = Counter()
        self.latencies: deque[tuple[float, float]] = deque(maxlen=10_000)
        self.metrics = Metrics(self)

    # -- names -------------------------------------------------------------------------------------------------------

    def resolve(self, model: str, key: Key) -> Stored | None:
        """Return the version that a name means."""
        stored = self.catalog.resolve(model, key)
        if stored is not None:
            self.by_ref[stored.ref] += 1
        return stored

    def who(self, stored: Stored | None) -> dict[str, Any]:
        """Return who answered."""
        if stored is None:
            return {"adapter": None, "ref": None, "digest": self.digest}
        return {"adapter": stored.name, "ref": stored.ref, "digest": stored.digest}

    # -- waiting -----------------------------------------------------------------------------------------------------

    def deadline(self, request: Request) -> float:
        """Return the time at which nobody waits any more."""
        given = request.headers.get("x-timeout-seconds", "")
        try:
            wished = float(given) if given else self.settings.timeout
        except ValueError:
            wished = -1.0
        if not 0 < wished < float("inf"):
            raise HTTPException(400, f"x-timeout-seconds = {given!r}: expected seconds, more than 0")
        return time.monotonic() + min(wished, self.settings.timeout)

    async def answers(self, request: Request, items: Sequence[Any], deadline: float) -> list[Any]:
        """Wait for all items; nobody waits for them any more once the client is gone or the time is over."""
        futures = [asyncio.wrap_future(item.payload.future) for item in items]
        pending: set[Any] = set(futures)
        try:
            while pending:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Late(f"no answer within {self.settings.timeout:g} seconds or the request's own limit")
                done, pending = await asyncio.wait(pending, timeout=min(left, POLL), return_when="FIRST_EXCEPTION")
                if any(not f.cancelled() and f.exception() for f in done):
                    break
                if pending and await request.is_disconnected():
                    self.counts["cancelled"] += 1
                    raise HTTPException(499, "the client is gone")
            return [f.result() for f in futures if f not in pending or not f.cancel()]
        finally:
            if pending:
                for future in futures:
                    future.cancel()
                self.engine.cancel(items)
            for future in futures:  # their errors were looked at, or nobody wants them
                if future.done() and not future.cancelled():
                    future.exception()


def create_app(server: Server) -> FastAPI:
    """Return the application."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.engine.close)
        if server.trainings is not None:
            server.trainings.close()

    app = FastAPI(title="onebase", version=__version__, lifespan=life)
    app.add_middleware(_Outside, server=server)
    _errors(app)

    def allowed(scope: str) -> Callable[[Request], Key]:
        def check(request: Request) -> Key:
            key = server.keys.find(request.headers.get("authorization"))
            if key is None:
                raise HTTPException(401, "no valid API key: send 'Authorization: Bearer KEY'")
            if scope == "admin" and not server.keys.admin:
                raise HTTPException(403, "admin routes are off: no key with the scope admin is set")
            if not key.may(scope):
                raise HTTPException(403, f"this key lacks the scope {scope}")
            request.state.key = key  # errors name only what it may use
            return key

        return check

    use, admin = allowed("use"), allowed("admin")

    def train(request: Request) -> Key:
        if not server.keys and server.loopback:
            return use(request)
        return admin(request)

    _state(app, server, use)
    _answers(app, server, use)
    _texts(app, server, use)
    _adapters(app, server, use, admin)
    if server.trainings is not None:
        app.include_router(training_routes(server.trainings, train, use))
    add_page(app)
    return app


# -- errors and limits -------------------------------------------------------------------------------------------------


def _error(status: int, message: str, param: str | None = None, code: str | None = None, **more: Any) -> JSONResponse:
    after = more.pop("after", None)
    headers = {"Retry-After": str(max(1, round(after)))} if after is not None else None
    body = {
        "message": message,
        "type": TYPES.get(status, "invalid_request_error"),
        "param": param,
        "code": code,
        **more,
    }
    return JSONResponse({"error": body}, status, headers)


def _told(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Return status and fields of an error."""
    message = str(error)
    if isinstance(error, Overloaded):
        closing = "shutting down" in message
        return (503 if closing else 429), {"message": message, "after": error.after}
    if isinstance(error, Late):
        return 504, {"message": message}
    if isinstance(error, UnknownNameError):
        return 404, {"message": message, "param": "model", "code": "model_not_found"}
    if isinstance(error, StoreError):
        return 422, {"message": message}
    if isinstance(error, OnebaseError):
        return 400, {"message": message}
    log.error("a request failed", exc_info=error)
    return 500, {"message": "the server failed to answer; its log says why"}


def _errors(app: FastAPI) -> None:
    async def ours(request: Request, error: Exception) -> JSONResponse:
        status, fields = _told(error)
        if status == 404:
            said = re.search(r"'([^']*)'", fields["message"])
            known = request.app.state.server.catalog.visible(request.state.key)
            fields["nearest"] = difflib.get_close_matches(said.group(1) if said else "", known, 3)
        return _error(status, **fields)

    async def plain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _error(error.status_code, str(error.detail))

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"][1:])
        return _error(400, f"{place or 'body'}: {first['msg']}", param=place or None)

    app.add_exception_handler(OnebaseError, ours)
    app.add_exception_handler(HTTPException, plain)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, ours)


class _Outside:
    """Around every request: an id, limits of the body, a line in the log, counts."""

    def __init__(self, app: Any, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["app"].state.server = self.server
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
        given = headers.get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        began, status = time.perf_counter(), 500
        counts = self.server.counts
        limit = self.server.settings.body_bytes

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        counts["total"] += 1
        counts["running"] += 1
        try:
            body, refused = b"", None
            if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
                try:
                    body, refused = await asyncio.wait_for(_read(receive, limit), self.server.settings.body_timeout)
                except TimeoutError:
                    refused = (408, f"the body did not arrive within {self.server.settings.body_timeout:g} seconds")
            if refused is not None:
                await _error(*refused)(scope, receive, told)
                return
            sent = False

            async def again() -> Any:
                nonlocal sent
                if sent or scope["method"] == "GET":
                    return await receive()
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}

            await self.app(scope, again, told)
        finally:
            counts["running"] -= 1
            counts["errors"] += status >= 500
            counts["rejected"] += status == 429
            took = time.perf_counter() - began
            if scope["path"].startswith("/v1/") and scope["method"] == "POST" and status < 400:
                self.server.latencies.append((time.time(), took * 1e3))
            self.server.metrics.request(scope["path"], status, took)
            facts = {
                "id": name,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(took * 1e3, 1),
            }
            log.info(json.dumps(facts))


async def _read(receive: Any, limit: int) -> tuple[bytes, tuple[int, str] | None]:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"", (400, "the client left")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            return b"", (413, f"the body has more than {limit} bytes")
        if not message.get("more_body"):
            return b"".join(parts), None


# -- state of the server -----------------------------------------------------------------------------------------------


def _state(app: FastAPI, server: Server, use: Any) -> None:
    engine = server.engine

    @app.get("/health")
    def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if engine.alive else "failed"}, 200 if engine.alive else 503)

    @app.get("/ready")
    def ready() -> JSONResponse:
        if engine.closing or not engine.alive:
            return _error(503, "the server is shutting down", after=5.0)
        return JSONResponse({"status": "ready", "base": server.base.id})

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics(key: Key = Depends(use)) -> PlainTextResponse:
        if key.adapters is not None:
            raise HTTPException(403, "the metrics name every adapter, and this key may use some only")
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/stats")
    def stats(key: Key = Depends(use)) -> dict[str, Any]:
        return server.metrics.stats(key)

    @app.get("/v1/models")
    def models(key: Key = Depends(use)) -> dict[str, Any]:
        found = []
        for name in server.catalog.visible(key):
            try:
                found.append(_model(server, server.catalog.resolve(name, key), name))
            except OnebaseError:
                continue  # damaged: /v1/adapters says why
        return {"object": "list", "data": found}

    @app.get("/v1/models/{name:path}")
    def model(name: str, key: Key = Depends(use)) -> dict[str, Any]:
        return _model(server, server.catalog.resolve(name, key), name)


def _model(server: Server, stored: Stored | None, name: str) -> dict[str, Any]:
    base = server.base
    if stored is None:
        return {
            "id": PLAIN, "object": "model", "created": int(server.started), "owned_by": "onebase", "root": base.id,
            "parent": None, **server.who(None), "task": "features", "labels": [], "method": None,
            "generates": base.has_lm_head, "classifies": False, "embeds": True,
            "max_length": base.anatomy.stacks[0].position_limit,
        }  # fmt: skip
    config = stored.config
    task = get_task(config.task["kind"])
    _, shelf = server.catalog.shelf(stored.name)
    entry = server.engine.tiers.state_of(stored.digest)
    return {
        "id": name, "object": "model", "created": _seconds(config.created), "owned_by": "onebase", "root": stored.ref,
        "parent": PLAIN, **server.who(stored), "version": config.version, "versions": sorted(shelf.versions),
        "aliases": dict(shelf.aliases), "task": config.task["kind"], "labels": list(config.task.get("labels") or []),
        "pair": bool(config.task.get("pair")), "method": config.method.name, "method_settings": config.method.settings,
        "parameters": config.parameters, "bytes": _bytes(stored), "metrics": config.metrics,
        "generates": task.writes, "classifies": not task.writes and not task.embeds, "embeds": task.embeds,
        "max_length": config.task.get("max_length"), "state": entry.state if entry else "disk",
        "pinned": bool(entry and entry.pinned),
    }  # fmt: skip


def _bytes(stored: Stored) -> int:
    return sum(file.stat().st_size for file in stored.path.iterdir() if file.is_file())


def _seconds(created: str) -> int:
    from datetime import datetime

    return int(datetime.fromisoformat(created).timestamp())


# -- rows --------------------------------------------------------------------------------------------------------------


def _limits(server: Server, texts: Sequence[str]) -> None:
    settings = server.settings
    if len(texts) > settings.request_rows:
        raise HTTPException(413, f"{len(texts)} rows; a request has at most {settings.request_rows}")
    if not texts:
        raise HTTPException(400, "input: expected at least one text")
    longest = max(len(text) for text in texts)
    if longest > settings.text_length:
        raise HTTPException(413, f"a text has {longest} characters; at most {settings.text_length} are taken")


def _answers(app: FastAPI, server: Server, use: Any) -> None:
    def usage(items: Sequence[Any]) -> dict[str, int]:
        count = sum(item.cost for item in items)
        return {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}

    @app.post("/v1/classify")
    async def classify(body: b.Classify, request: Request, key: Key = Depends(use)) -> dict[str, Any]:
        listed = [body.input] if isinstance(body.input, str) else body.input
        asked = [b.RowBody(text=one) if isinstance(one, str) else one for one in listed]
        wanted = []  # (place of the input, name, row)
        stored: dict[str, Any] = {}
        for place, one in enumerate(asked):
            names = one.model if one.model is not None else body.model
            if not names:
                raise HTTPException(400, "model: expected the name of an adapter, or a list of names")
            for name in [names] if isinstance(names, str) else names:
                if name not in stored:
                    stored[name] = server.resolve(name, key)
                wanted.append((place, name, Row(one.text, one.pair, stored[name])))
        _limits(server, [row.text + (row.pair or "") for _, _, row in wanted])
        for _, name, row in wanted:
            if row.stored is not None and get_task(row.stored.config.task["kind"]).embeds:
                raise HTTPException(400, f"adapter {name!r} embeds texts: ask /v1/embeddings")
        deadline, began = server.deadline(request), time.perf_counter()
        items = server.engine.ask([row for _, _, row in wanted], deadline)
        found = await server.answers(request, items, deadline)
        took = round((time.perf_counter() - began) * 1e3, 2)
        data = [
            {"object": "classification", "index": place, "model": name, **server.who(row.stored),
             "task": "features" if row.stored is None else row.stored.config.task["kind"], **answer.facts(),
             "latency_ms": took}
            for (place, name, row), (answer, _) in zip(wanted, found)
        ]  # fmt: skip
        return {
            "id": f"cls-{uuid.uuid4().hex[:12]}", "object": "list", "model": body.model, "created": int(time.time()),
            "data": data, "usage": usage(items),
        }  # fmt: skip

    @app.post("/v1/embeddings")
    async def embeddings(body: b.Embed, request: Request, key: Key = Depends(use)) -> dict[str, Any]:
        stored = server.resolve(body.model, key)
        if stored is not None and not get_task(stored.config.task["kind"]).embeds:
            raise HTTPException(400, f"adapter {body.model!r} does not embed texts: ask /v1/classify, or 'base'")
        texts = [body.input] if isinstance(body.input, str) else body.input
        _limits(server, texts)
        deadline = server.deadline(request)
        items = server.engine.ask([Row(text, None, stored) for text in texts], deadline)
        found = await server.answers(request, items, deadline)
        data = []
        for place, (answer, _) in enumerate(found):
            values = answer.embedding.tolist()
            coded: Any = values
            if body.encoding_format == "base64":
                coded = base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": place, "embedding": coded})
        count = usage(items)
        return {
            "object": "list", "model": body.model, "data": data, **server.who(stored),
            "usage": {"prompt_tokens": count["prompt_tokens"], "total_tokens": count["total_tokens"]},
        }  # fmt: skip

    @app.post("/v1/rerank")
    async def rerank(body: b.Rerank, request: Request, key: Key = Depends(use)) -> dict[str, Any]:
        stored = server.resolve(body.model, key)
        if stored is None or stored.config.task["kind"] != "rerank":
            raise HTTPException(400, f"model {body.model!r} is no adapter for the task rerank")
        texts = [one if isinstance(one, str) else one.text for one in body.documents]
        _limits(server, [body.query + text for text in texts])
        deadline = server.deadline(request)
        items = server.engine.ask([Row(body.query, text, stored) for text in texts], deadline)
        found = await server.answers(request, items, deadline)
        ranked = sorted(range(len(texts)), key=lambda i: -found[i][0].value)[: body.top_n]
        results = [
            {"index": i, "relevance_score": found[i][0].value}
            | ({"document": {"text": texts[i]}} if body.return_documents else {})
            for i in ranked
        ]
        return {"id": f"rank-{uuid.uuid4().hex[:12]}", "model": body.model, **server.who(stored), "results": results,
                "usage": usage(items)}  # fmt: skip


# -- texts -------------------------------------------------------------------------------------------------------------


def _texts(app: FastAPI, server: Server, use: Any) -> None:
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
    _limits(server, [json.dumps(p) if not isinstance(p, str) else p for p in prompts] * body.n)
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
            (error.status_code, {"message": error.detail}) if isinstance(error, HTTPException) else _told(error)
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


# -- adapters ----------------------------------------------------------------------------------------------------------


def _adapters(app: FastAPI, server: Server, use: Any, admin: Any) -> None:
    catalog, tiers = server.catalog, server.engine.tiers

    def entries(name: str) -> list[dict[str, Any]]:
        _, shelf = catalog.shelf(name)
        waiting, _tokens = server.engine.rows.sizes()
        found = []
        for number in sorted({*shelf.versions, *shelf.broken}):
            ref = f"{name}@{number}"
            stored = shelf.versions.get(number)
            entry = None if stored is None else tiers.state_of(stored.digest)
            state = "failed" if stored is None else "disk" if entry is None else entry.state
            if ref in catalog.withdrawn or name in catalog.withdrawn:
                state = "withdrawn"
            error = shelf.broken.get(number) or (str(entry.error) if entry and entry.error else None)
            found.append({
                "object": "adapter", "name": name, "version": number, "ref": ref,
                "digest": None if stored is None else stored.digest,
                "aliases": sorted(a for a, v in shelf.aliases.items() if v == number), "newest": number == shelf.newest,
                "state": state, "pinned": bool(entry and entry.pinned), "running": entry.leases if entry else 0,
                "queued": waiting.get(ref, 0), "bytes": _bytes(stored) if stored else 0, "requests": server.by_ref[ref],
                "method": stored.config.method.name if stored else None,
                "task": stored.config.task["kind"] if stored else None,
                "labels": list(stored.config.task.get("labels") or []) if stored else [],
                "error": error, "loaded_ms": entry.loaded_ms if entry else None,
            })  # fmt: skip
        return found

    @app.get("/v1/adapters")
    def every(key: Key = Depends(use)) -> dict[str, Any]:
        data = [
            one for name in catalog.visible(key) if name != PLAIN and name not in catalog.extra for one in entries(name)
        ]
        return {"object": "list", "data": data, "tiers": server.metrics.tiers(len(data))}

    @app.get("/v1/adapters/{name}")
    def history(name: str, key: Key = Depends(use)) -> dict[str, Any]:
        if not key.allows(name):
            raise catalog._unknown(name, key)
        store, _ = catalog.shelf(name)
        aliases = {a: {"version": h[-1], "history": list(h)} for a, h in store._histories(name).items()}
        return {"object": "adapter.history", "name": name, "versions": entries(name), "aliases": aliases}

    @app.post("/v1/adapters")
    async def load(body: b.Load, key: Key = Depends(admin)) -> JSONResponse:
        name = body.ref.partition("@")[0]
        catalog.withdrawn -= {name, body.ref}
        stored = catalog.resolve(body.ref, key)
        if stored is None:
            raise HTTPException(400, "ref: the base is always loaded")
        lease = tiers.lease(stored)
        if body.pin:
            tiers.pin(stored.digest, True)
        if not body.wait:
            tiers.abandon(lease)
        else:
            entry = await asyncio.wait_for(asyncio.wrap_future(lease), server.settings.timeout)
            tiers.release(entry)
        shown = next(one for one in entries(stored.name) if one["ref"] == stored.ref)
        return JSONResponse(shown, 200 if body.wait else 202)

    @app.delete("/v1/adapters/{ref}")
    def withdraw(ref: str, remove: bool = False, key: Key = Depends(admin)) -> dict[str, Any]:
        name, _, version = ref.partition("@")
        store, shelf = catalog.shelf(name)
        if version and (not version.isdecimal() or int(version) not in {*shelf.versions, *shelf.broken}):
            raise UnknownNameError(f"adapter {name!r} has no version {version!r}")
        gone = [v for v in shelf.versions.values() if not version or v.ref == ref]
        if remove:
            try:
                store.remove(ref)
            except StoreError as error:
                raise HTTPException(409, str(error)) from None
            catalog.forget(name)
        else:
            catalog.withdrawn.add(ref)
        freed = [stored.ref for stored in gone if tiers.withdraw(stored.digest)]
        return {"ref": ref, "withdrawn": [stored.ref for stored in gone], "freed": freed, "removed": remove}

    def moved(action: Callable[[], Any], name: str, alias: str) -> dict[str, Any]:
        try:
            action()
        except UnknownNameError:
            raise
        except OnebaseError as error:
            raise HTTPException(409, str(error)) from None
        catalog.forget(name)
        stored = catalog.resolve(f"{name}@{alias}")
        assert stored is not None
        return {
            "name": name,
            "alias": alias,
            "version": stored.config.version,
            "ref": stored.ref,
            "digest": stored.digest,
        }

    @app.post("/v1/adapters/{name}/promote")
    def promote(name: str, body: b.Promote, key: Key = Depends(admin)) -> dict[str, Any]:
        store, _ = catalog.shelf(name)
        return moved(lambda: store.promote(f"{name}@{body.version}", body.alias), name, body.alias)

    @app.post("/v1/adapters/{name}/rollback")
    def rollback(name: str, body: b.Rollback, key: Key = Depends(admin)) -> dict[str, Any]:
        store, _ = catalog.shelf(name)
        return moved(lambda: store.rollback(name, body.alias), name, body.alias)

    @app.post("/v1/load_lora_adapter")
    async def load_lora(body: b.LoraLoad, key: Key = Depends(admin)) -> PlainTextResponse:
        stored = catalog.resolve(body.lora_path, key)
        if stored is None:
            raise HTTPException(400, "lora_path: expected a stored adapter, such as reviews@3")
        if body.lora_name in catalog.names() and catalog.extra.get(body.lora_name) != stored.ref:
            raise HTTPException(400, f"lora_name {body.lora_name!r} is taken")
        tiers.release(await asyncio.wait_for(asyncio.wrap_future(tiers.lease(stored)), server.settings.timeout))
        catalog.extra[body.lora_name] = stored.ref
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    def unload_lora(body: b.LoraUnload, key: Key = Depends(admin)) -> PlainTextResponse:
        if catalog.extra.pop(body.lora_name, None) is None:
            raise UnknownNameError(f"no adapter was loaded as {body.lora_name!r}")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
