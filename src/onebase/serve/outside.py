"""Around every request: an id, limits of the body, a line in the log, counts."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from onebase.serve.failures import refusal

if TYPE_CHECKING:
    from onebase.serve.server import Server

log = logging.getLogger("onebase.serve")
REQUEST_ID = re.compile(r"[\w-]{1,64}")


class Outside:
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
        limit = self.server.settings.body_limit(scope["path"])

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
                await refusal(*refused)(scope, receive, told)
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
