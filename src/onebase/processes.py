"""Several processes that train one adapter: which rows are whose, and how their gradients become those of all rows.

Every process holds the same adapter and draws the same order of rows; it computes a share of each optimizer step's
rows. Losses are sums and counts, so the gradients of sums, the sums and the counts are added up over the processes, in
one buffer, and every process divides once and takes the same step. Shares may be uneven or empty. The first process
alone measures, prints and stores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onebase.errors import ConfigError, TrainingError

T = TypeVar("T")

LOCAL = "LOCAL_RANK"
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun tells its processes


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: number of this process, 0 is the first.
        size: how many there are.
        sharded: the base is split over them: all must call it equally often.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this process prints and stores."""
        return self.rank == 0

    def share(self, rows: Sequence[int], lengths: Callable[[int], int]) -> list[int]:
        """Return this process's part of some rows: every `size`-th in the order of their lengths."""
        if self.size == 1:
            return list(rows)
        return sorted(rows, key=lengths)[self.rank :: self.size]

    def add_up(self, parameters: Sequence[nn.Parameter], numbers: Tensor) -> Tensor:
        """Add gradients and some numbers up over all processes.

        A parameter without a gradient in every process keeps none, so that an optimizer skips it as it would alone.

        Args:
            parameters: the same in every process, in the same order; their `grad` is changed.
            numbers: (n,) float64 on the CPU.

        Returns:
            (n,) the sums of the numbers.
        """
        if self.size == 1:
            return numbers
        there = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float64)
        small = torch.cat([numbers, there])
        small = _sum(small.to(_device(parameters))).cpu()
        there = small[len(numbers) :] > 0
        live = [p for p, some in zip(parameters, there.tolist()) if some]
        for dtype in sorted({p.dtype for p in live}, key=str):
            mine = [p for p in live if p.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in mine])
            parts = _sum(flat).split([p.numel() for p in mine])
            for parameter, part in zip(mine, parts):
                parameter.grad = part.view_as(parameter).clone()
        return small[: len(numbers)]

    def from_first(self, value: T) -> T:
        """Return the first process's value everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def only_first(self, do: Callable[[], T]) -> T:
        """Do something in the first process, and return what it gave everywhere; its error is raised everywhere.

        Where the base is sharded all processes would have to take part in what calls it: see `sharded`.
        """
        if self.size == 1:
            return do()
        value: Any = None
        error: Exception | None = None
        if self.first:
            try:
                value = do()
            except Exception as caught:
                error = caught
        value, said = self.from_first((value, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        if said is not None:
            raise TrainingError(f"the first process stopped with {said}")
        return value

    def same(self, what: str, value: Any) -> None:
        """Raise ConfigError where processes differ in something that must be the same."""
        found = self.gather(value)
        if any(other != found[0] for other in found):
            shown = "; ".join(f"process {rank}: {other!r}" for rank, other in enumerate(found))
            raise ConfigError(f"the processes have different {what}: {shown}. Start them all with the same command.")

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's values of these tensors, in place."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in tensors:
                    if tensor.numel():
                        whole = tensor.detach().contiguous()
                        dist.broadcast(whole, src=0)
                        tensor.copy_(whole)

    def rounds(self, mine: int) -> int:
        """Return how often this process must call the base where it has `mine` calls to make."""
        return max(self.gather(mine)) if self.sharded else mine


def is_sharded(model: nn.Module) -> bool:
    """Whether some weights of a model are split over processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


ALONE = Processes()
_active: ContextVar[Processes] = ContextVar("onebase_processes", default=ALONE)


def active() -> Processes:
    """Return the processes that train together now; one alone outside of training."""
    return _active.get()


def launched() -> int:
    """Return how many processes a launcher such as torchrun started, this one included."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    if not all(os.environ.get(name) for name in NEEDED):
        return 1
    return int(os.environ["WORLD_SIZE"])


def rank() -> int:
    """Return the number of this process among those that a launcher started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() > 1 else 0


def join() -> None:
    """Connect the processes that a launcher started, once; does nothing where this process was started alone."""
    if launched() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        local = int(os.environ.get(LOCAL, "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"{local + 1} processes on this machine, but {torch.cuda.device_count()} CUDA devices: start at most "
                "one process for each"
            )
        torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def leave() -> None:
    """Disconnect, at the end of a program."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def together(sharded: bool = False) -> Iterator[Processes]:
    """Train with all processes that were started together inside the block."""
    join()
    if launched() == 1:
        yield ALONE
        return
    found = Processes(dist.get_rank(), dist.get_world_size(), sharded)
    token = _active.set(found)
    try:
        yield found
    finally:
        _active.reset(token)


def _sum(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def _device(parameters: Sequence[nn.Parameter]) -> torch.device:
    device = parameters[0].device if parameters else torch.device("cpu")
    return device if device.type == "cuda" else torch.device("cpu")
