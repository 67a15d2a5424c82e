"""Rows: labels and scores, embeddings, rankings."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import Depends, FastAPI, Request
from starlette.exceptions import HTTPException

from onebase.serve import bodies as b
from onebase.serve.asked import Row
from onebase.serve.keys import Key
from onebase.serve.server import Server
from onebase.tasks import get_task


def check_texts(server: Server, texts: Sequence[str]) -> None:
    """Refuse what has no rows, too many rows, or a text that is too long."""
    settings = server.settings
    if len(texts) > settings.request_rows:
        raise HTTPException(413, f"{len(texts)} rows; a request has at most {settings.request_rows}")
    if not texts:
        raise HTTPException(400, "input: expected at least one text")
    longest = max(len(text) for text in texts)
    if longest > settings.text_length:
        raise HTTPException(413, f"a text has {longest} characters; at most {settings.text_length} are taken")


def add_rows(app: FastAPI, server: Server, use: Any) -> None:
    """Add the routes that label, embed and rank."""

    def usage(items: Sequence[Any]) -> dict[str, int]:
        count = sum(item.cost for item in items)
        return {"prompt_tokens": count, "completion_tokens": 0, "total_tokens": count}

    @app.post("/v1/classify")
    async def classify(body: b.Classify, request: Request, key: Key = Depends(use)) -> dict[str, Any]:
        listed = [body.input] if isinstance(body.input, str) else body.input
        asked = [b.RowBody(text=one) if isinstance(one, str) else one for one in listed]
        each = [one.model if one.model is not None else body.model for one in asked]
        count = sum(len(names) if isinstance(names, list) else 1 for names in each)
        if count > server.settings.request_rows:  # before there are as many rows
            raise HTTPException(413, f"{count} rows; a request has at most {server.settings.request_rows}")
        wanted = []  # (place of the input, name, row)
        stored: dict[str, Any] = {}
        for place, (one, names) in enumerate(zip(asked, each)):
            if not names:
                raise HTTPException(400, "model: expected the name of an adapter, or a list of names")
            for name in [names] if isinstance(names, str) else names:
                if name not in stored:
                    stored[name] = server.resolve(name, key)
                wanted.append((place, name, Row(one.text, one.pair, stored[name])))
        check_texts(server, [row.text + (row.pair or "") for _, _, row in wanted])
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
        check_texts(server, texts)
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
        check_texts(server, [body.query + text for text in texts])
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
