"""Whose turn it is to compute: one holder at a time, or several that share it, in the order of asking.

Threads that write, label and load share one base. Between two steps each gives its turn to who waits longest, so a long
text never holds up a short one by more than a step. A plain lock would let the same thread take it again at once.
Threads that label texts do not change the base, so they may compute at the same time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class Turns:
    """A lock that is given in the order of asking."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[tuple[threading.Event, bool]] = deque()  # with whether they share
        self._holders = 0
        self._shared = False  # those who hold it share it

    def take(self, shared: bool = False) -> None:
        """Wait for the turn.

        Args:
            shared: others who share may have it at the same time.
        """
        with self._lock:
            if not self._holders or (shared and self._shared and not self._waiting):
                self._holders, self._shared = self._holders + 1, shared
                return
            mine = threading.Event()
            self._waiting.append((mine, shared))
        mine.wait()

    def give(self) -> None:
        """Hand the turn to who waits longest, and to those behind who share it with that one."""
        with self._lock:
            self._holders -= 1
            while self._waiting and (not self._holders or (self._shared and self._waiting[0][1])):
                event, self._shared = self._waiting.popleft()
                self._holders += 1  # it is theirs now
                event.set()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Compute within this block, together with others who share."""
        self.take(shared=True)
        try:
            yield
        finally:
            self.give()

    def __enter__(self) -> None:
        self.take()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give()
