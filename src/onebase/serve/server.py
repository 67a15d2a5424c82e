"""What all routes share: the engine, names, who may ask, and waiting for answers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.exceptions import HTTPException

from onebase.serve.asked import Late
from onebase.serve.catalog import Catalog
from onebase.serve.engine import Engine
from onebase.serve.keys import Key, Keys
from onebase.serve.metrics import Metrics
from onebase.serve.tiers import Entry
from onebase.serve.training import Trainings

if TYPE_CHECKING:
    from onebase.store import Stored

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
        return time.monotonic() + self._seconds(request)[0]

    def _seconds(self, request: Request) -> tuple[float, str]:
        """Return the seconds that a request has, and what says so."""
        given = request.headers.get("x-timeout-seconds", "")
        try:
            wished = float(given) if given else self.settings.timeout
        except ValueError:
            wished = -1.0
        if not 0 < wished < float("inf"):
            raise HTTPException(400, f"x-timeout-seconds = {given!r}: expected seconds, more than 0")
        if given and wished <= self.settings.timeout:
            return wished, "x-timeout-seconds of the request"
        return self.settings.timeout, "the server's --timeout"

    def _late(self, request: Request) -> Late:
        seconds, limit = self._seconds(request)
        return Late(f"no answer within {seconds:g} seconds ({limit})")

    async def loaded(self, lease: Future[Entry]) -> Entry:
        """Wait for an adapter to be on the device."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(lease), self.settings.timeout)
        except TimeoutError:
            raise Late(f"the adapter was not loaded within {self.settings.timeout:g} seconds") from None

    async def answers(self, request: Request, items: Sequence[Any], deadline: float) -> list[Any]:
        """Wait for all items; nobody waits for them any more once the client is gone or the time is over."""
        futures = [asyncio.wrap_future(item.payload.future) for item in items]
        pending: set[Any] = set(futures)
        try:
            while pending:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._late(request)
                done, pending = await asyncio.wait(pending, timeout=min(left, POLL), return_when="FIRST_EXCEPTION")
                if any(not f.cancelled() and f.exception() for f in done):
                    break
                if pending and await request.is_disconnected():
                    self.counts["cancelled"] += 1
                    raise HTTPException(499, "the client is gone")
            return [f.result() for f in futures if f not in pending or not f.cancel()]
        except Late:  # of a row, which knows no limits
            raise self._late(request) from None
        finally:
            if pending:
                for future in futures:
                    future.cancel()
                self.engine.cancel(items)
            for future in futures:  # their errors were looked at, or nobody wants them
                if future.done() and not future.cancelled():
                    future.exception()
