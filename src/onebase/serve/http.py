"""The application: who may ask, and every route. Everything that is computed is the engine's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException

from onebase import __version__
from onebase.serve.failures import add_handlers
from onebase.serve.keys import Key
from onebase.serve.outside import Outside
from onebase.serve.routes.adapters import add_adapters
from onebase.serve.routes.rows import add_rows
from onebase.serve.routes.state import add_state
from onebase.serve.routes.texts import add_texts
from onebase.serve.routes.training import training_routes
from onebase.serve.server import Server
from onebase.serve.web import add_page


def create_app(server: Server) -> FastAPI:
    """Return the application."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.engine.close)
        if server.trainings is not None:
            server.trainings.close()

    app = FastAPI(title="onebase", version=__version__, lifespan=life)
    app.add_middleware(Outside, server=server)
    add_handlers(app)

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

    add_state(app, server, use)
    add_rows(app, server, use)
    add_texts(app, server, use)
    add_adapters(app, server, use, admin)
    if server.trainings is not None:
        app.include_router(training_routes(server.trainings, train, use, server.settings.table_bytes))
    add_page(app)
    return app
