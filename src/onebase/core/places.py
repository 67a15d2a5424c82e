"""Where the tokens of a call are: computed when the first delta asks, because most never do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Places:
    """Real tokens, their positions and the lengths of prompts in one call of a stack.

    Args:
        batch: B, rows.
        width: T, columns of this call, virtual ones included.
        past: tokens of the cache.
        columns: tokens of the caller in this call.
        mask: (B, past + T) real tokens, or None where nothing is padded.
        stated: the prompt length of each row, where the caller said it.
        device: where tensors live.
    """

    def __init__(
        self,
        batch: int,
        width: int,
        past: int,
        columns: int,
        mask: Tensor | None,
        stated: Sequence[int] | None,
        device: torch.device,
    ):
        self.batch, self.width, self.past, self.columns = batch, width, past, columns
        self.stated, self.device, self._mask = stated, device, mask

    @cached_property
    def _all(self) -> Tensor:
        if self._mask is None:
            return torch.ones(self.batch, self.past + self.width, dtype=torch.bool, device=self.device)
        return self._mask.bool()

    @cached_property
    def real(self) -> Tensor:
        """(B, T) true for real and virtual tokens."""
        return self._all[:, -self.width :]

    @cached_property
    def positions(self) -> Tensor:
        """(B, T) index of each token among the real and virtual ones of its row, those in the cache included."""
        return (self._all.long().cumsum(1) - 1).clamp(min=0)[:, -self.width :]

    @cached_property
    def counts(self) -> Tensor | None:
        """(B,) tokens of the prompt, virtual ones included unless the caller stated it; None: the call cannot tell."""
        if self.stated is not None:
            return torch.tensor(self.stated, device=self.device)
        if self.past and self.columns != 1:
            return None
        return self._all.long().sum(1) - (1 if self.past else 0)
