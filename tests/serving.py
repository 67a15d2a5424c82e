"""A server in this process, on a real port: uvicorn in a thread, so that tests see the engine from both sides."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn

from onebase.serve.catalog import Catalog
from onebase.serve.engine import Engine
from onebase.serve.http import create_app
from onebase.serve.keys import Key, Keys, hashed
from onebase.serve.server import Server
from onebase.serve.settings import ServeSettings
from onebase.serve.training import Trainings
from onebase.store import Store

ADMIN = "admin-key-of-this-test"


class Here:
    """A running server.

    Attributes:
        engine, server: its parts.
        address: where it listens.
        client: asks it without a key.
    """

    def __init__(self, server: Server, address: str):
        self.server, self.engine, self.address = server, server.engine, address
        self.client = httpx.Client(base_url=address, timeout=60)

    def call(self, method: str, path: str, body: Any = None, key: str | None = ADMIN, **more: Any) -> httpx.Response:
        """Ask it."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.client.request(method, path, json=body, headers=headers, **more)


@contextmanager
def serving(base: Any, store: Store, keys: Sequence[Key] = (), **settings: Any) -> Iterator[Here]:
    """Serve a base and the adapters of a store until the block ends.

    Args:
        base: a Base that nothing else uses meanwhile.
        store: of the adapters.
        keys: beside ADMIN, which may do everything.
        settings: of `ServeSettings`.
    """
    engine = Engine(base, ServeSettings(**settings))
    known = Keys([Key(hashed(ADMIN), frozenset({"use", "admin"})), *keys])
    server = Server(engine, Catalog([store], [base.id]), known, Trainings("minilm", store.root))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = uvicorn.Server(
        uvicorn.Config(create_app(server), host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    try:
        for _ in range(600):
            if running.started:
                break
            time.sleep(0.05)
        assert running.started
        here = Here(server, f"http://127.0.0.1:{port}")
        with here.client:
            yield here
    finally:
        running.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def until(true: Any, what: str, seconds: float = 30.0) -> None:
    """Wait for something to become true."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, what
        time.sleep(0.01)
