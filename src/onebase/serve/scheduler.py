"""Which rows go into the next forward: a queue per adapter, served by deficit round robin. No tensors here.

Deficit round robin (Shreedhar and Varghese, SIGCOMM 1995): in each round a queue may spend `quantum` tokens more, and
what it does not spend it keeps while it has rows. So an adapter with ten times the load gets no more than its share
while others wait, and long rows cost what they weigh. A row costs at least its place in a batch, as short ones fill a
batch by their number.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from onebase.errors import OnebaseError

QUANTUM = 512  # tokens per round: a text of BERT's full length, so that every queue sends a row in every round


class Overloaded(OnebaseError):
    """The server holds as much as it may.

    Attributes:
        after: seconds after which to try again.
    """

    def __init__(self, message: str, after: float = 1.0):
        super().__init__(message)
        self.after = after


@dataclass(eq=False)
class Item:
    """One row, or one prompt, that waits.

    Attributes:
        queue: whose it is.
        cost: tokens.
        payload: what the engine computes.
        deadline: time after which nobody waits for it, or None.
        gone: nobody waits for it any more.
    """

    queue: str
    cost: int
    payload: Any
    deadline: float | None = None
    gone: bool = False


@dataclass
class _Queue:
    items: deque[Item] = field(default_factory=deque)
    deficit: int = 0


class Scheduler:
    """Queues of items, and the next batch of them. Safe to use from several threads.

    Args:
        quantum: tokens that a queue may spend more in each round.
    """

    def __init__(self, quantum: int = QUANTUM):
        self._quantum = quantum
        self._queues: dict[str, _Queue] = {}
        self._ring: deque[str] = deque()  # queues that have items, the next one first
        self._resumed = False  # the first queue of the ring was cut off by a full batch, its round goes on
        self.changed = threading.Condition()
        self.closed = False

    def put(self, items: list[Item]) -> None:
        """Add items, each behind those of its queue."""
        with self.changed:
            for item in items:
                queue = self._queues.get(item.queue)
                if queue is None:
                    queue = self._queues[item.queue] = _Queue()
                    self._ring.append(item.queue)
                queue.items.append(item)
            self.changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there are items; False when the scheduler is closed and empty."""
        with self.changed:
            self.changed.wait_for(lambda: bool(self._queues) or self.closed, timeout)
            return bool(self._queues) or not self.closed

    def close(self) -> None:
        """Let waiters go once everything is served."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def waiting(self) -> int:
        """Return how many items wait."""
        with self.changed:
            return sum(len(queue.items) for queue in self._queues.values())

    def take(
        self, budget: int, rows: int, now: float, without: Collection[str] = (), most: int | None = None
    ) -> tuple[list[Item], list[Item]]:
        """Take the next batch.

        Args:
            budget: most tokens; the first item may have more.
            rows: most items of any batch.
            now: the time that deadlines are compared with.
            without: queues that nothing is taken from now.
            most: most items of this batch; by default `rows`.

        Returns:
            The batch, and the items that are gone or whose deadline has passed.
        """
        place = budget // rows  # the tokens that a row's place in a batch stands for
        rows = rows if most is None else min(rows, most)
        with self.changed:
            batch: list[Item] = []
            late: list[Item] = []
            used = passed = 0
            while passed < len(self._ring):
                name = self._ring[0]
                if name in without:
                    self._ring.rotate(-1)
                    self._resumed, passed = False, passed + 1
                    continue
                passed = 0
                queue = self._queues[name]
                if not self._resumed:
                    queue.deficit += self._quantum
                self._resumed = False
                while queue.items:
                    item = queue.items[0]
                    if item.gone or (item.deadline is not None and item.deadline <= now):
                        queue.items.popleft()
                        late.append(item)
                        continue
                    weight = max(item.cost, place)
                    if weight > queue.deficit:
                        break
                    if batch and (len(batch) == rows or used + item.cost > budget):
                        self._resumed = True
                        return batch, late
                    queue.items.popleft()
                    queue.deficit -= weight
                    used += item.cost
                    batch.append(item)
                self._ring.popleft()
                if queue.items:
                    self._ring.append(name)
                else:
                    del self._queues[name]
            return batch, late

    def sizes(self) -> tuple[dict[str, int], int]:
        """Return items per queue, and tokens of all."""
        with self.changed:
            waiting = {name: [i for i in queue.items if not i.gone] for name, queue in self._queues.items()}
        counts = {name: len(items) for name, items in waiting.items() if items}
        return counts, sum(item.cost for items in waiting.values() for item in items)


class Admission:
    """How many rows may be in the server at once.

    Args:
        most: of all adapters together.
        most_each: of one adapter.
        rate: returns rows answered per second, for the time to wait.
        what: 'rows' or 'prompts', for messages.
    """

    def __init__(self, most: int, most_each: int, rate: Callable[[], float], what: str = "rows"):
        self._most, self._most_each, self._rate, self._what = most, most_each, rate, what
        self._each: Counter[str] = Counter()
        self._lock = threading.Lock()
        self.total = 0

    def enter(self, queue: str, count: int) -> None:
        """Count rows in.

        Raises:
            Overloaded: there is no room; nothing was counted.
        """
        with self._lock:
            full = self.total + count > self._most
            if full or self._each[queue] + count > self._most_each:
                whose = "the server holds" if full else "this adapter has"
                held, limit = (self.total, self._most) if full else (self._each[queue], self._most_each)
                wait = min(30.0, max(1.0, held / max(self._rate(), 1.0)))
                raise Overloaded(
                    f"{whose} {held} {self._what} waiting, {count} more than {limit} allow: try later", wait
                )
            self.total += count
            self._each[queue] += count

    def leave(self, queue: str, count: int) -> None:
        """Count rows out."""
        with self._lock:
            self.total -= count
            self._each[queue] -= count
            if not self._each[queue]:
                del self._each[queue]
