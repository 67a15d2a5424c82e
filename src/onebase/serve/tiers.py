"""Where adapters are: on disk, in memory, or attached to the base on its device; least recently used go first.

One thread loads and evicts, one adapter after the other. It builds and checks with a copy of the tokenizer of its own,
so others wait for nothing but the probes of what is attached. An adapter is what its digest says: a folder that changes
under the same name is another entry. Who uses an entry holds a lease; an entry with leases is never moved.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onebase.adapter import Adapter
from onebase.devices import give_back_memory
from onebase.errors import OnebaseError, StoreError
from onebase.serve.scheduler import Overloaded
from onebase.storing import attach_stored, build_stored
from onebase.words import seen

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.serve.turns import Turns
    from onebase.store import Stored

log = logging.getLogger("onebase.serve")
RETRY = 2.0  # seconds in which a failed load is not tried again: a client that repeats would only reread a broken file


@dataclass(eq=False)
class Entry:
    """One adapter that somebody asked for.

    Attributes:
        stored: where it comes from.
        name: what routes call it; holds the digest.
        state: disk, loading, memory, device, draining or failed.
        adapter: built, or None.
        bytes: of its tensors, once it was built.
        leases: who uses it now.
        doomed: it goes when the last lease is given back.
        used: when it was last asked for.
    """

    stored: Stored
    name: str
    state: str = "disk"
    adapter: Adapter | None = None
    bytes: int = 0
    leases: int = 0
    pinned: bool = False
    doomed: bool = False
    used: float = 0.0
    loaded_ms: float | None = None
    error: OnebaseError | None = None
    failed: float = 0.0
    waiting: list[Future] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Its identity."""
        return self.stored.digest


class Tiers:
    """The adapters of one server.

    Args:
        base: they are attached to.
        turns: held while the base changes.
        device_bytes, memory_bytes: budgets.
    """

    def __init__(self, base: Base, turns: Turns, device_bytes: int, memory_bytes: int):
        self._base, self._turns = base, turns
        # tokenizers cannot be used by two threads at once; a copy cuts texts as the original does
        self._seen = seen(base, copy.deepcopy(base.tokenizer))
        self.limits = {"device": device_bytes, "memory": memory_bytes}
        self.entries: dict[str, Entry] = {}
        self.counts: Counter[str] = Counter()  # hits, misses, loads, load_failures, evictions
        self._todo: deque[Entry] = deque()
        self._cv = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="onebase-loader", daemon=True)
        self._thread.start()

    # -- asking ----------------------------------------------------------------------------------------------------

    def lease(self, stored: Stored) -> Future[Entry]:
        """Ask for an adapter on the device.

        Returns:
            The entry, when it is there; give it back with `release`. A load that fails is the future's error.
        """
        future: Future[Entry] = Future()
        with self._cv:
            entry = self.entries.get(stored.digest)
            if entry is None:
                name = f"{stored.ref}#{stored.digest[7:19]}"
                entry = self.entries[stored.digest] = Entry(stored, name)
            entry.used, entry.doomed = time.monotonic(), False
            if self._closed:
                future.set_exception(Overloaded("the server is shutting down"))
            elif entry.state == "device":
                self.counts["hits"] += 1
                entry.leases += 1
                future.set_result(entry)
            elif entry.state == "failed" and time.monotonic() - entry.failed < RETRY:
                future.set_exception(entry.error)
            else:
                self.counts["misses"] += 1
                entry.waiting.append(future)
                if len(entry.waiting) == 1:
                    self._later(entry)
        return future

    def release(self, entry: Entry) -> None:
        """Give a lease back."""
        with self._cv:
            entry.leases -= 1
            if entry.doomed and not entry.leases:
                self._later(entry)
            self._cv.notify_all()

    def abandon(self, lease: Future[Entry]) -> None:
        """Give up a lease that may or may not have been granted."""
        if not lease.cancel():
            lease.add_done_callback(lambda done: None if done.exception() else self.release(done.result()))

    def pin(self, digest: str, pinned: bool) -> None:
        """Keep an adapter on the device, or no longer."""
        with self._cv:
            if digest in self.entries:
                self.entries[digest].pinned = pinned
                self._cv.notify_all()

    def withdraw(self, digest: str) -> bool:
        """Free an adapter once the last lease is given back; says whether it was held at all."""
        with self._cv:
            entry = self.entries.get(digest)
            if entry is None:
                return False
            entry.doomed, entry.pinned = True, False
            if not entry.leases:
                self._later(entry)
            return True

    def state_of(self, digest: str) -> Entry | None:
        """Return what is known of an adapter."""
        return self.entries.get(digest)

    def usage(self, shown: Callable[[str], bool] = lambda name: True) -> dict[str, dict[str, int]]:
        """Return adapters, bytes and limit of device and memory.

        Args:
            shown: whether an adapter of this name counts.
        """
        with self._cv:
            entries = [entry for entry in self.entries.values() if shown(entry.stored.name)]
        found = {}
        for tier, states in (("device", ("device", "draining")), ("memory", ("memory",))):
            here = [entry for entry in entries if entry.state in states]
            found[tier] = {"adapters": len(here), "bytes": sum(e.bytes for e in here), "limit": self.limits[tier]}
        return found

    def close(self) -> None:
        """Stop loading."""
        with self._cv:
            self._closed = True
            self._cv.notify_all()
        self._thread.join()

    # -- the loader --------------------------------------------------------------------------------------------------

    def _later(self, entry: Entry) -> None:
        self._todo.append(entry)
        self._cv.notify_all()

    def _run(self) -> None:
        while True:
            with self._cv:
                self._cv.wait_for(lambda: self._todo or self._closed)
                if self._closed:
                    for entry in self.entries.values():
                        self._answer(entry, Overloaded("the server is shutting down"))
                    return
                entry = self._todo.popleft()
                free = entry.doomed and not entry.leases and not entry.waiting
                if free:
                    entry.state = "draining"
            try:
                if free:
                    self._free(entry)
                    give_back_memory()
                elif entry.waiting:
                    self._load(entry)
            except Exception as error:
                self._fail(entry, error)

    def _load(self, entry: Entry) -> None:
        start = time.perf_counter()
        if entry.state != "device":
            if entry.adapter is None:
                entry.state = "loading"
                entry.adapter = build_stored(self._seen, entry.name, entry.stored)
                entry.bytes = sum(t.numel() * t.element_size() for t in entry.adapter.tensors().values())
            self._make_room(entry)
            with self._turns:
                _move(entry.adapter, self._base.device)
                attach_stored(self._seen, entry.adapter, entry.stored)
            entry.loaded_ms = round((time.perf_counter() - start) * 1e3, 3)
        with self._cv:
            entry.state, entry.error = "device", None
            self.counts["loads"] += 1
            self._answer(entry, None)
            if entry.doomed and not entry.leases:
                self._later(entry)

    def _answer(self, entry: Entry, error: Exception | None) -> None:
        waiting, entry.waiting = entry.waiting, []
        for future in waiting:
            if future.set_running_or_notify_cancel():
                if error is None:
                    entry.leases += 1
                    future.set_result(entry)
                else:
                    future.set_exception(error)

    def _fail(self, entry: Entry, error: Exception) -> None:
        if not isinstance(error, OnebaseError):
            log.error("loading failed", exc_info=error, extra={"facts": {"ref": entry.stored.ref}})
            error = StoreError(f"{entry.stored.ref} cannot be loaded ({type(error).__name__})")
        with self._cv:
            held = isinstance(error, Overloaded) and entry.adapter is not None
            entry.state, entry.error, entry.failed = ("memory" if held else "failed"), error, time.monotonic()
            if not held:
                entry.adapter, entry.bytes = None, 0
            self.counts["load_failures"] += 1
            self._answer(entry, error)

    def _make_room(self, entry: Entry) -> None:
        """Evict until an entry fits on the device; waits for leases to be given back.

        Raises:
            StoreError: it never fits.
            Overloaded: what is pinned leaves no room.
        """
        limit = self.limits["device"]
        if entry.bytes > limit:
            raise StoreError(f"{entry.stored.ref} has {entry.bytes} bytes, the server's device budget is {limit}")
        while True:
            with self._cv:
                here = [e for e in self.entries.values() if e.state == "device"]
                if sum(e.bytes for e in here) + entry.bytes <= limit:
                    return
                if sum(e.bytes for e in here if e.pinned) + entry.bytes > limit:
                    raise Overloaded(f"pinned adapters leave no room for {entry.stored.ref}", 30.0)
                idle = [e for e in here if not e.leases and not e.pinned]
                if not idle:
                    if self._closed:
                        raise Overloaded("the server is shutting down")
                    self._cv.wait(1.0)
                    continue
                victim = min(idle, key=lambda e: e.used)
                victim.state = "draining"
            self._detach(victim)
            with self._cv:
                victim.state = "memory"
                self.counts["evictions"] += 1
            self._trim()

    def _trim(self) -> None:
        """Drop from memory what is over its budget."""
        with self._cv:
            held = sorted((e for e in self.entries.values() if e.state == "memory"), key=lambda e: e.used)
            over = sum(e.bytes for e in held) - self.limits["memory"]
            for entry in held:
                if over <= 0:
                    break
                if not entry.waiting:
                    over -= entry.bytes
                    entry.adapter, entry.state = None, "disk"

    def _detach(self, entry: Entry) -> None:
        assert entry.adapter is not None
        with self._turns:
            self._base.remove(entry.name)
        _move(entry.adapter, "cpu")

    def _free(self, entry: Entry) -> None:
        if entry.name in self._base.adapters:
            self._detach(entry)
        with self._cv:
            entry.adapter, entry.bytes, entry.state = None, 0, "disk"
            if entry.waiting:
                self._later(entry)
            else:
                self.entries.pop(entry.digest, None)


def _move(adapter: Adapter, device: Any) -> None:
    for module in (adapter.module, adapter.head, adapter.base_head):
        if module is not None:
            module.to(device)
