"""Banks: the deltas of several adapters at one site, computed together where they only differ in their numbers.

A bank stacks the parameters of its deltas for the call and computes one batched product instead of one small product
per adapter. The loop over adapters is right for every method; a bank is the same value sooner. Each batch element holds
rows of one adapter only, so a NaN stays in the rows of its adapter, in the backward pass too.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from onebase.core.contracts import Delta
    from onebase.core.plan import At

# Rows per adapter, on average, up to which every row gets its own copy of the weights where the rows of an adapter are
# not one run of equal length. Beyond it the copies cost more than the loop's calls (benchmarks/forward.py --spread).
COPIES = 4
# Places per token, up to which groups of packed tokens are padded to the largest group: a bank's products cost a third
# of the loop's calls, so that twice the places are still less.
PADDED = 2


class Bank:
    """The deltas of one signature, and whose each batch element is.

    Args:
        deltas: G deltas whose signatures are equal.
        index: (b,) number of the delta of each batch element; None: element i belongs to delta i.
        at: draws for all of them, each element what it draws alone; None where nothing is dropped.
    """

    def __init__(self, deltas: Sequence[Delta], index: Tensor | None = None, at: At | None = None):
        self.deltas, self.index, self.at = deltas, index, at

    def stacked(self, name: str, like: Tensor) -> Tensor:
        """Return a parameter of each batch element's delta, (b, *shape), in the dtype of `like`.

        Args:
            name: attribute of the deltas that holds it.
            like: gives the dtype.
        """
        stack = torch.stack([getattr(delta, name) for delta in self.deltas]).to(like.dtype)
        return stack if self.index is None else stack.index_select(0, self.index)

    def vector(self, name: str, like: Tensor) -> Tensor:
        """Return a vector of each batch element's delta as (b, 1, d), to be used on all of its tokens."""
        return self.stacked(name, like)[:, None]

    def link(self, number: int) -> Bank:
        """Return the bank of the deltas at place `number` of chains."""
        return Bank([delta.chain[number] for delta in self.deltas], self.index, self.at)  # type: ignore[union-attr,index]

    def dropout(self, x: Tensor) -> Tensor:
        """Drop values of x (b, t, d) at the deltas' rate, which is part of their signature."""
        rate = self.deltas[0].dropping()
        if not rate:
            return x
        assert self.at is not None
        return self.at.dropout(x, rate, True)

    def compute(self, x: Tensor, h: Tensor) -> Tensor:
        """Return the new values, (b, t, d_out).

        Args:
            x: (b, t, d_in) the deltas' input.
            h: (b, t, d_out) the values at the site.
        """
        return self.deltas[0].bank(self, x, h)


def add_product(h: Tensor, inner: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``h + scale * inner @ weight^T`` per batch element, in the dtype of `h`.

    Args:
        h: (b, t, d_out), or (b, 1, d_out) for a bias.
        inner: (b, t, r).
        weight: (b, d_out, r).
    """
    if torch.is_autocast_enabled(h.device.type):  # would cast h, too
        return h + scale * torch.bmm(inner, weight.mT)
    return torch.baddbmm(h, inner, weight.mT, alpha=scale)


def key_of(delta: Delta) -> Hashable | None:
    """Return what must be equal for deltas to share a bank, or None where a delta is computed by itself.

    A class that changes `forward` and inherits `bank` would be computed by another formula than its own, and a hook on
    the delta would not run: both are computed by themselves.
    """
    if delta.positional or delta._forward_hooks or delta._forward_pre_hooks or delta._backward_hooks:
        return None
    own = _SAME.get(type(delta))
    if own is None:
        own = _SAME[type(delta)] = _same_formula(type(delta))
    if not own or "forward" in delta.__dict__:
        return None
    signature = delta.signature()
    return None if signature is None else (type(delta), signature)


_SAME: dict[type, bool] = {}  # class -> whether its bank was written for its forward


def _same_formula(cls: type) -> bool:
    """Whether `bank` and `signature` are defined where `forward` is, or below."""
    places = {name: i for i, base in reversed(list(enumerate(cls.__mro__))) for name in base.__dict__}
    return max(places["bank"], places["signature"]) <= places["forward"]


def partition(deltas: Sequence[Delta]) -> tuple[list[list[int]], list[int]]:
    """Split deltas into banks and those that are computed by themselves.

    Returns:
        Numbers of the deltas of each bank, at least two, and the numbers of the others.
    """
    found: dict[Hashable, list[int]] = {}
    rest: list[int] = []
    for number, delta in enumerate(deltas):
        key = key_of(delta)
        if key is None:
            rest.append(number)
        else:
            found.setdefault(key, []).append(number)
    banks = [numbers for numbers in found.values() if len(numbers) > 1]
    rest += [numbers[0] for numbers in found.values() if len(numbers) == 1]
    return banks, sorted(rest)
