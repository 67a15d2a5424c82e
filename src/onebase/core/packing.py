"""Packing: a padded batch computed without its padding, as one row of all real tokens.

Texts of different lengths share a batch, so a third to two thirds of a padded batch is padding. Everything in a base
but attention is pointwise, so it may as well be computed on (1, n, d), the n real tokens of all rows one after the
other. Attention alone puts rows side by side again, few at a time, because rows of similar length need little padding.
Callers hand in padded rows and get padded rows back.

A CPU's matrix products are compiled for each shape, and every batch has another number of tokens: a third of a
millisecond and half a megabyte for each of a dozen products, again and again. So the last row may get a few more
tokens (`extra`) that bring n to a round number. They repeat its last one, attend to nothing, and nobody reads them.
What attention pads gets a round width too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 8  # rows that attention computes together: fewer cost calls, more cost padding; rows come sorted
JUMP = 8  # columns more than a row in front of it has: from there a chunk that has half its rows ends
WIDTH = 4  # what the columns of a chunk are a multiple of, where shapes are to repeat
WORTH = 1.04  # padded over real tokens, from which packing pays for its indexing


@dataclass(frozen=True, eq=False)
class Chunk:
    """Neighbouring rows whose attention is computed together.

    Attributes:
        rows: (first, last + 1).
        tokens: their packed tokens, (first, last + 1).
        mask: (b, t) real tokens when the rows are padded to the chunk's own longest one, or a little more.
        fill: (b * t,) packed token, counted from the first of the chunk, in each place; padding repeats a token of its
            own row, so that no value of another row, NaN included, is ever near it.
        real: (n,) places of the packed tokens among the b * t; None where no place is padding.
    """

    rows: tuple[int, int]
    tokens: tuple[int, int]
    mask: Tensor
    fill: Tensor
    real: Tensor | None


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the real tokens of a padded batch are.

    Attributes:
        rows, columns: B and T of the padded batch.
        real: (n,) places of the real tokens among the B * T, in order.
        lengths: packed tokens of each row: the real ones, and the extra ones of the last row.
        chunks: how attention takes the rows.
        extra: packed tokens behind the real ones, copies of the last.
        masks: attention masks of the chunks, kept for the layers of one call.
    """

    rows: int
    columns: int
    real: Tensor
    lengths: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    extra: int = 0
    masks: dict[Any, list[Tensor | None]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """n, the extra ones among them."""
        return len(self.real) + self.extra

    def pack(self, values: Tensor) -> Tensor:
        """Return (1, n, ...), the real tokens of values (B, T, ...), and the extra ones."""
        taken = self.real if not self.extra else torch.cat([self.real, self.real[-1:].expand(self.extra)])
        return values.flatten(0, 1).index_select(0, taken)[None]

    def unpack(self, values: Tensor) -> Tensor:
        """Return (B, T, ...) with zeros in padding, of values (1, n, ...)."""
        out = values.new_zeros(self.rows * self.columns, *values.shape[2:])
        return out.index_copy(0, self.real, values[0, : len(self.real)]).unflatten(0, (self.rows, self.columns))

    def of_rows(self, rows: Tensor) -> Tensor:
        """Return the packed tokens of some rows, row after row."""
        lengths = torch.tensor(self.lengths, device=rows.device)
        first = lengths.cumsum(0) - lengths
        own = lengths[rows]
        within = torch.arange(int(own.sum()), device=rows.device) - (own.cumsum(0) - own).repeat_interleave(own)
        return first[rows].repeat_interleave(own) + within


def make_packing(
    mask: Tensor, always: bool = False, multiple: int = 1, kinds: Sequence[int] | None = None
) -> Packing | None:
    """Return how to pack a batch, or None where little of it is padding.

    Args:
        mask: (B, T), true for real tokens.
        always: pack also where little is padding.
        multiple: what the number of packed tokens is to be a multiple of.
        kinds: of the rows; those of different kinds do not share a chunk. None: all are of one.
    """
    real = mask.bool()
    lengths = real.sum(1).tolist()
    if min(lengths) < 1 or (not always and len(lengths) * real.shape[1] < WORTH * sum(lengths)):
        return None
    chunks, token = [], 0
    for start, stop in _cuts(lengths, kinds or [0] * len(lengths)):
        own = lengths[start:stop]
        chunks.append(_chunk(start, token, own, mask.device, WIDTH if multiple > 1 else 1))
        token += sum(own)
    place = real.flatten().nonzero()[:, 0]
    extra = -token % multiple
    lengths[-1] += extra
    return Packing(real.shape[0], real.shape[1], place, tuple(lengths), tuple(chunks), extra)


def _cuts(lengths: list[int], kinds: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of the rows of each chunk: as many as are worth a call, of one kind and like lengths."""
    start = 0
    for row in range(1, len(lengths) + 1):
        count = row - start
        if row < len(lengths) and count < CHUNK_ROWS and kinds[row] == kinds[start]:
            wider = lengths[row] - max(lengths[start:row])
            if 2 * count < CHUNK_ROWS or wider < JUMP:
                continue
        yield start, row
        start = row


def _chunk(row: int, token: int, lengths: list[int], device: torch.device, multiple: int) -> Chunk:
    count, width, total = len(lengths), max(lengths), sum(lengths)
    if min(lengths) < width:  # padded anyway
        width = -(-width // multiple) * multiple
    length = torch.tensor(lengths, device=device)
    column = torch.arange(width, device=device)
    mask = column < length[:, None]  # (b, t)
    first = length.cumsum(0) - length
    fill = first[:, None] + torch.minimum(column, length[:, None] - 1)
    places = None if total == count * width else mask.flatten().nonzero()[:, 0]
    return Chunk((row, row + count), (token, token + total), mask, fill.flatten(), places)


class Spread(torch.autograd.Function):
    """Packed tokens (n, ...) of a chunk to padded rows (b * t, ...).

    The backward pass takes the gradients of the real places alone: masked places have none.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, fill: Tensor, real: Tensor) -> Tensor:
        """Repeat a row's last token in its padding."""
        ctx.save_for_backward(real)
        return values.index_select(0, fill)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Take the real places."""
        (real,) = ctx.saved_tensors
        return grads[0].index_select(0, real), None, None


class Gather(torch.autograd.Function):
    """Padded rows (b * t, ...) to the packed tokens (n, ...) of a chunk."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, real: Tensor) -> Tensor:
        """Take the real places."""
        ctx.save_for_backward(real)
        ctx.places = len(values)
        return values.index_select(0, real)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Leave zeros in padding."""
        (real,) = ctx.saved_tensors
        out = grads[0].new_zeros(ctx.places, *grads[0].shape[1:])
        return out.index_copy_(0, real, grads[0]), None


def spread(values: Tensor, chunk: Chunk) -> Tensor:
    """Return (b, heads, t, head dim) of packed values (1, heads, n, head dim) of all rows."""
    own = values[0, :, chunk.tokens[0] : chunk.tokens[1]].transpose(0, 1)  # (n of the chunk, heads, head dim)
    if chunk.real is not None:
        own = Spread.apply(own, chunk.fill, chunk.real)
    return own.unflatten(0, chunk.mask.shape).transpose(1, 2)


def gather(values: Tensor, chunk: Chunk) -> Tensor:
    """Return packed (n of the chunk, ...) of padded values (b, t, ...)."""
    flat = values.flatten(0, 1)
    return flat if chunk.real is None else Gather.apply(flat, chunk.real)
