"""The passes of a comparison on Ray's workers: every candidate is a task, every worker has the base to itself.

A candidate alone ends as it does among others, up to the rounding of sums, so results are those of one process. Ray
pays on machines with many cores, or on a cluster; on two cores one pass over all candidates is as fast.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from onebase.clusters import connected
from onebase.comparison.engines import T
from onebase.comparison.passes import Pass, run_pass
from onebase.comparison.records import Book
from onebase.comparison.together import Interrupts
from onebase.comparison.work import Work
from onebase.data import Data
from onebase.errors import ConfigError, MismatchError

LOOK = 0.5  # seconds between two looks at Ctrl-C


class Worker:
    """A process with a base of its own.

    Args:
        about: id, fingerprint, device and dtype of the base.
        data: all rows.
        known: the records of what the methods cost by themselves.

    Raises:
        MismatchError: the base of this name is another one here.
    """

    def __init__(self, about: dict[str, str], data: Data, known: Sequence[dict[str, Any]]):
        from onebase.loading import load_base

        base = load_base(about["id"], device=about["device"], dtype=about["dtype"])
        if base.fingerprint() != about["fingerprint"]:
            raise MismatchError(f"{about['id']} is another base on this worker: give all machines the same files")
        book = Book(None, False, {})
        book.records += known
        self.work = Work(base, data, book, Interrupts(_say_nothing), _say_nothing)

    def run(self, one: Pass, seconds: float) -> list[dict[str, Any]]:
        """Make a pass that is over after so many seconds; return its records."""
        return list(run_pass(self.work, one, time.monotonic() + seconds))


class OnRay:
    """Ray's workers, one for each of its CPUs.

    Args:
        ray: the module, initialised.
        work: the comparison; its methods were measured.
    """

    def __init__(self, ray: Any, work: Work):
        self.ray, self.work = ray, work
        self.workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._idle: list[Any] = []
        self._begun = 0

    def groups(self, todo: Sequence[T]) -> list[list[T]]:
        """Every candidate by itself."""
        return [[one] for one in todo]

    def rounds(self, seeds: Sequence[int]) -> list[list[int]]:
        """All at once, the first seed first, so that no worker waits."""
        return [list(seeds)] if len(seeds) else []

    def run(self, passes: Sequence[Pass], ends: float) -> Iterator[dict[str, Any]]:
        """Hand out passes in their order; yield records as workers return them."""
        self._begin(len(passes))
        waiting, running = list(passes), dict[Any, Any]()
        while waiting or running:
            self.work.stop.check()
            while waiting and self._idle and time.monotonic() + waiting[0].closing < ends:
                worker = self._idle.pop()
                running[worker.run.remote(waiting.pop(0), ends - time.monotonic())] = worker
            if not running:
                return
            ready, _ = self.ray.wait(list(running), timeout=LOOK)
            for task in ready:
                self._idle.append(running.pop(task))
                yield from self.ray.get(task)

    def _begin(self, passes: int) -> None:
        """Start workers, once the methods were measured: with all of them at work, times would be others."""
        missing = min(self.workers, passes) - self._begun
        if missing <= 0:
            return
        base = self.work.base
        about = {
            "id": base.id, "fingerprint": base.fingerprint(), "device": str(base.device),
            "dtype": str(next(base.model.parameters()).dtype).removeprefix("torch."),
        }  # fmt: skip
        data, known = self.ray.put(self.work.data), list(self.work.book.find("alone"))
        make = self.ray.remote(num_cpus=1)(Worker)
        self._idle += [make.remote(about, data, known) for _ in range(missing)]
        self._begun += missing


@contextmanager
def on_ray(work: Work) -> Iterator[OnRay]:
    """Use the Ray that is running, or start one on this machine until the block ends.

    Raises:
        ConfigError: Ray is not installed, or the base has no name that workers can load it by.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("ray needs a package that is not installed: pip install 'onebase[ray]'") from None
    if not work.base.id:
        raise ConfigError("ray: this base has no id, and workers load it by that: use ob.load_base, or leave ray out")
    with connected(ray):
        yield OnRay(ray, work)


def _say_nothing(text: str) -> None:
    """Workers report by their records."""
