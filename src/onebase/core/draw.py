"""Dropout of a job as a function, not a stream: the same element is dropped whatever else is in the batch.

A generator gives numbers in the order of computing, so what a row draws would depend on the rows beside it, on padding,
packing and the cut into micro-batches. Here the bits of an element are a hash of (job's seed, step, row, token, site,
feature). So a job draws alone what it draws among others, a layer that is computed again draws the same, and a resumed
run needs no state of a generator.

The hash is made of two tables, one for tokens and one for pairs of features (SplitMix64, Steele et al. 2014), and of
one round of multiply, shift and multiply (as in MurmurHash3) for each pair, which gives 16 bits to each feature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from onebase.errors import RouteError

BITS = 1 << 16  # a rate is rounded to 1/65536, and the rescaling is by the rounded one
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, SplitMix64's step
FIRST, SECOND = -1640531535, -2048144777  # 2654435761 and 2246822519 as signed 32-bit numbers (xxHash's primes)


@dataclass(frozen=True)
class Draw:
    """What dropout of a job is drawn from now.

    Attributes:
        seed: the job's.
        step: optimizer steps made.
        keys: of the job's rows in the call, in order: what a row is, wherever it is computed. None: their numbers.
    """

    seed: int
    step: int
    keys: Sequence[int] | None = None


class Draws:
    """Hashes of the tokens of one group of rows in one call.

    Args:
        draw: of the group's job.
        rows: b, how many rows the group has.
        device: where to compute.
    """

    def __init__(self, draw: Draw, rows: int, device: torch.device):
        keys = range(rows) if draw.keys is None else draw.keys
        if len(keys) != rows:
            raise RouteError(f"dropout has keys for {len(keys)} rows, but the adapter has {rows} in this call")
        start = _signed(_splitmix(_splitmix(draw.seed) ^ draw.step))
        self.rows = _mixed(torch.tensor(list(keys), dtype=torch.long, device=device) + start)  # (b,)
        self.packed: Tensor | None = None
        self.made: dict[int, Tensor] = {}

    def pack(self, lengths: Tensor) -> None:
        """Follow rows of these lengths (b,) that are put one after the other."""
        first = lengths.cumsum(0) - lengths
        column = torch.arange(int(lengths.sum()), device=lengths.device) - first.repeat_interleave(lengths)
        self.packed = _mixed(self.rows.repeat_interleave(lengths) + column).to(torch.int32)

    def tokens(self, count: int) -> Tensor:
        """Return the hash of each token, (count,) int32: of the packed ones, or of rows of count / b columns."""
        if self.packed is not None:
            return self.packed
        if count not in self.made:
            columns = torch.arange(count // len(self.rows), device=self.rows.device)
            self.made[count] = _mixed(self.rows[:, None] + columns).flatten().to(torch.int32)
        return self.made[count]


class Joined:
    """Hashes of the tokens of several groups in one call, in the order in which a bank computes them.

    Args:
        draws: of the groups.
        order: numbers of their rows, or of their packed tokens, counted group after group; None: in this order.
    """

    def __init__(self, draws: Sequence[Draws], order: Tensor | None):
        self.draws, self.order = draws, order
        self.made: dict[int, Tensor] = {}

    def tokens(self, count: int) -> Tensor:
        """Return the hash of each token, (count,) int32."""
        if count not in self.made:
            if self.draws[0].packed is not None:
                every = torch.cat([one.packed for one in self.draws if one.packed is not None])
            else:
                columns = count // sum(len(one.rows) for one in self.draws)
                every = torch.cat([one.tokens(len(one.rows) * columns).view(-1, columns) for one in self.draws])
            self.made[count] = (every if self.order is None else every.index_select(0, self.order)).flatten()
        return self.made[count]


def drop(x: Tensor, rate: float, draws: Draws | Joined, site: str, number: int) -> Tensor:
    """Zero each element with probability `rate` and rescale.

    Args:
        x: (..., d) of all tokens of the group.
        rate: 0 to below 1.
        draws: hashes of the tokens.
        site, number: where, and which of the draws there.
    """
    cut = min(round(rate * BITS), BITS - 1)
    width = x.shape[-1]
    pairs = _features(site, number, (width + 1) // 2, x.device)
    bits = draws.tokens(x.numel() // width)[:, None] ^ pairs  # (n, d / 2)
    bits.mul_(FIRST)
    bits.bitwise_xor_(bits.bitwise_right_shift(15))
    bits.mul_(SECOND)
    keep = (bits.view(torch.int16)[:, :width] >= cut - BITS // 2).view(x.shape)
    return x * keep.to(x.dtype).mul_(BITS / (BITS - cut))


@lru_cache(maxsize=4096)
def _features(site: str, number: int, count: int, device: torch.device) -> Tensor:
    """Return the hashes of the pairs of features at a place, (count,) int32."""
    place = int.from_bytes(hashlib.blake2b(f"{site}#{number}".encode(), digest_size=8).digest(), "little")
    return _mixed(torch.arange(count, device=device) + _signed(place)).to(torch.int32)


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64 of int64 tensors; products wrap."""
    z = z * _signed(GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # >> of signed numbers would fill with the sign


def _splitmix(z: int) -> int:
    z = (z + 1) * GOLDEN % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - 2**64 if z >= 2**63 else z
