"""The state of the server, and what it can answer as."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from onebase.errors import OnebaseError
from onebase.serve.failures import refusal
from onebase.serve.keys import Key
from onebase.serve.server import Server
from onebase.store.names import PLAIN
from onebase.tasks import get_task

if TYPE_CHECKING:
    from onebase.store import Stored


def add_state(app: FastAPI, server: Server, use: Any) -> None:
    """Add health, readiness, metrics, statistics and the list of models."""
    engine = server.engine

    @app.get("/health")
    def health() -> JSONResponse:
        return JSONResponse({"status": "ok" if engine.alive else "failed"}, 200 if engine.alive else 503)

    @app.get("/ready")
    def ready() -> JSONResponse:
        if engine.closing or not engine.alive:
            return refusal(503, "the server is shutting down", after=5.0)
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
            "max_length": server.engine.positions,
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
        "parameters": config.parameters, "bytes": stored_bytes(stored), "metrics": config.metrics,
        "generates": task.writes, "classifies": not task.writes and not task.embeds, "embeds": task.embeds,
        "max_length": config.task.get("max_length"), "state": entry.state if entry else "disk",
        "pinned": bool(entry and entry.pinned),
    }  # fmt: skip


def stored_bytes(stored: Stored) -> int:
    """Return the bytes of a version's files."""
    return sum(file.stat().st_size for file in stored.path.iterdir() if file.is_file())


def _seconds(created: str) -> int:
    from datetime import datetime

    return int(datetime.fromisoformat(created).timestamp())
