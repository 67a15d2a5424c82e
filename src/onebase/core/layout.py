"""Where virtual tokens go: directly before each row's first real token, padding stays on the batch's side.

A batch (B, T) with prompt lengths P_i becomes (B, T + Pmax). Column c of row i moves to ``c + offset_i`` before the
first real token s_i and to ``c + offset_i + P_i`` from there on; offset_i is Pmax - P_i where the padding is on the
left, else 0, so the columns that a shorter prompt leaves over are dead on the padding's side. Tokens generated
later sit behind all of them, at ``c + Pmax``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(eq=False)
class Layout:
    """Places of virtual and original tokens.

    Attributes:
        lengths: (B,) P_i.
        width: Pmax.
        start: (B,) s_i, the column before which the virtual tokens go: each row's first real one, or a later one.
        offset: (B,) dead columns on the left.
        columns: T, columns of the original call.
        leads: (B,) rows that get the state of their first virtual token as their first token's, or None.
    """

    lengths: Tensor
    width: int
    start: Tensor
    offset: Tensor
    columns: int
    leads: Tensor | None = None

    @property
    def rows(self) -> int:
        """B."""
        return len(self.lengths)

    def take(self, rows: Tensor) -> Layout:
        """Return the layout of some rows, which may repeat."""
        lengths, start, offset = (values.index_select(0, rows) for values in (self.lengths, self.start, self.offset))
        leads = None if self.leads is None else self.leads.index_select(0, rows)
        return Layout(lengths, self.width, start, offset, self.columns, leads)

    def where(self) -> Tensor:
        """Return (B, T): the new column of each original column."""
        return self._where(self.columns)

    def _where(self, total: int) -> Tensor:
        column = torch.arange(total, device=self.lengths.device).expand(self.rows, total)
        moved = self.offset[:, None] + torch.where(column >= self.start[:, None], self.lengths[:, None], 0)
        return column + torch.where(column >= self.columns, self.width, moved)

    def virtual(self, row: Tensor, length: int) -> Tensor:
        """Return (len(row), length): the new columns of the virtual tokens of these rows."""
        first = (self.start + self.offset)[row]
        return first[:, None] + torch.arange(length, device=row.device)

    def source(self, first: Tensor, empty: int) -> Tensor:
        """Return where each new column comes from, (B, T + Pmax).

        Args:
            first: (B,) number of each row's first virtual token; the original tokens have the numbers 0 to B * T - 1.
            empty: number of what dead columns hold.
        """
        rows, device = self.rows, first.device
        original = torch.arange(rows * self.columns, device=device).reshape(rows, self.columns)
        out = torch.full((rows, self.columns + self.width + 1), empty, dtype=torch.long, device=device)
        out = out.scatter(1, self.where(), original)
        number = torch.arange(self.width, device=device)
        place = (self.start + self.offset)[:, None] + number
        place = torch.where(number < self.lengths[:, None], place, self.columns + self.width)  # past the end: cut off
        return out.scatter(1, place, first[:, None] + number)[:, :-1]

    def spread(self, values: Tensor, fill: float | int | bool = 0) -> Tensor:
        """Move (B, L, ...) original columns (L >= T when tokens were generated) to their new places.

        Returns:
            (B, L + Pmax, ...) with `fill` in virtual and dead columns.
        """
        place = self._where(values.shape[1])
        shape = (values.shape[0], values.shape[1] + self.width, *values.shape[2:])
        out = values.new_full(shape, fill)
        index = place.reshape(*place.shape, *([1] * (values.dim() - 2))).expand(values.shape)
        return out.scatter(1, index, values)

    def spread_mask(self, mask: Tensor) -> Tensor:
        """Extend a (B, L) mask: virtual tokens are visible, dead columns are not."""
        out = self.spread(mask)
        column = torch.arange(out.shape[1], device=mask.device)
        first = (self.start + self.offset)[:, None]
        virtual = (column >= first) & (column < first + self.lengths[:, None])
        return torch.where(virtual, torch.ones((), dtype=out.dtype, device=out.device), out)

    def gather(self, values: Tensor, dim: int = 1) -> Tensor:
        """Return the original columns of `values`, (B, ..., T + Pmax, ...) along `dim`."""
        place = self.where()
        if self.leads is not None:
            first = torch.arange(self.columns, device=place.device) == self.start[:, None]
            place = place - torch.where(first & self.leads[:, None], self.lengths[:, None], 0)
        if dim == 1:
            flat = (place + torch.arange(self.rows, device=place.device)[:, None] * values.shape[1]).flatten()
            return values.flatten(0, 1).index_select(0, flat).reshape(*place.shape, *values.shape[2:])
        shape = [1] * values.dim()
        shape[0], shape[dim] = self.rows, self.columns
        target = list(values.shape)
        target[dim] = self.columns
        return values.gather(dim, place.reshape(shape).expand(target))


def make_layout(lengths: Tensor, mask: Tensor | None, columns: int, causal: bool, before: Tensor | int = 0) -> Layout:
    """Decide where virtual tokens go.

    Args:
        lengths: (B,) virtual tokens per row.
        mask: (B, T) real tokens, or None when nothing is padded.
        columns: T.
        causal: an unpadded batch of a causal stack is treated as padded on the left, so that the last column stays
            the last token of every row and generation can append to it.
        before: real tokens that stay in front of virtual ones: of every row, or (B,).
    """
    rows = len(lengths)
    if mask is None:
        start = torch.zeros(rows, dtype=torch.long, device=lengths.device)
        left = causal
    else:
        real = mask.bool()
        start = torch.where(real.any(1), real.long().argmax(1), 0)
        left = bool((start > 0).any()) or (causal and bool(real.all()))
    start = start + before
    width = int(lengths.max())
    offset = width - lengths if left else torch.zeros_like(lengths)
    return Layout(lengths, width, start, offset, columns)
