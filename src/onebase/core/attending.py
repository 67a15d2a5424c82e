"""Attention of packed rows, written out forward and backward.

Composed of single operations, autograd fills a zero gradient of all tokens for every few rows that are cut out, copies
rows for every product, and keeps all of it. Written out, each step is done once, and the softmax is computed in float32
also where values are bfloat16: on a CPU that is four times as fast, and nearer to the true value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from onebase.core.packing import Chunk, Packing

SCORES = 3 << 18  # what `attend` computes at once: 3 MiB of float32 stay in a core's part of the cache
SHORTEST = 16  # queries from which, and columns up to which, `attend` was measured to be faster than the fused function
LONGEST = {torch.float32: 256, torch.bfloat16: 512}


class PackedAttention(torch.autograd.Function):
    """softmax(scale Q K^T) V within each row, (n, H, hd) packed tokens throughout."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, causal: bool, scale: float):
        """Attend, a chunk of rows at a time; keeps each chunk's padded values and probabilities."""
        out, kept = torch.empty_like(query), []
        for chunk in packing.chunks:
            q, k, v = (_padded(part, chunk) for part in (query, key, value))  # (b * H, t, hd)
            p = _probabilities(q, k, _hidden(chunk, causal), scale)
            _put(out, torch.bmm(p, v), chunk)
            kept += [q, k, v, p]
        out[len(packing.real) :] = 0
        ctx.save_for_backward(*kept)
        ctx.packing, ctx.scale = packing, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        """Return the gradients of query, key and value."""
        grad = grads[0]
        found = [grad.new_empty(grad.shape) if needed else None for needed in ctx.needs_input_grad[:3]]
        for number, chunk in enumerate(ctx.packing.chunks):
            q, k, v, p = ctx.saved_tensors[4 * number : 4 * number + 4]
            g = _padded(grad, chunk, zeros=True)
            wide = _wide(p.dtype)
            given = torch.bmm(g, v.mT).to(wide)
            scores = torch.ops.aten._softmax_backward_data(given, p.to(wide), -1, wide).mul_(ctx.scale).to(p.dtype)
            for place, one, other in zip(found, (scores, scores.mT, p.mT), (k, q, g)):
                if place is not None:
                    _put(place, torch.bmm(one, other), chunk)
        for part in found:
            if part is not None:
                part[len(ctx.packing.real) :] = 0
        return *found, None, None, None


def attend_packed(query: Tensor, key: Tensor, value: Tensor, packing: Packing, causal: bool, scale: float) -> Tensor:
    """Return the attention of packed tokens, (1, n, H, hd), each within its own row.

    Args:
        query, key, value: (1, H, n, hd).
        packing: where the rows are.
        causal: tokens see those before them only.
        scale: of the scores.
    """
    own = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
    return PackedAttention.apply(*own, packing, causal, scale)[None]  # type: ignore[index]


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Return softmax(scale Q K^T) V without gradients, (b, t, H, hd), a few rows at a time.

    Args:
        query: (b, H, t, hd).
        key, value: (b, H, s, hd).
        seen: (b or 1, 1, 1 or t, s), true where a token sees a column; None where all see all.
        scale: of the scores.
    """
    b, heads, t, _ = query.shape
    out = query.new_empty(b, t, heads, value.shape[3])
    hidden = None if seen is None else ~seen.expand(b, -1, -1, -1)  # a mask of one row may be everybody's
    step = max(1, SCORES // (heads * t * key.shape[2]))
    for rows in (slice(start, start + step) for start in range(0, b, step)):
        q, k, v = (part[rows].flatten(0, 1) for part in (query, key, value))
        p = _probabilities(q, k, None if hidden is None else hidden[rows], scale)
        out[rows] = torch.bmm(p, v).unflatten(0, (-1, heads)).transpose(1, 2)
    return out


def faster(query: Tensor, key: Tensor) -> bool:
    """Whether `attend` is faster than the fused function of torch for this call: so on a CPU, by measurement.

    16 rows, 12 heads of 32, 128 tokens, two threads: bfloat16 2.9 against 5.5 ms, float32 4.0 against 5.6; 512 tokens:
    bfloat16 9.1 against 13.9 ms (4 rows), float32 15.2 against 11.0.
    """
    if query.device.type != "cpu" or query.dtype not in LONGEST or query.shape[1] != key.shape[1]:
        return False
    return query.shape[2] >= SHORTEST and key.shape[2] <= LONGEST[query.dtype]


def _probabilities(q: Tensor, k: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """Return softmax(scale Q K^T), (b * H, t, s), of (b * H, t, hd) and (b * H, s, hd); 0 where `hidden`, (b, ...)."""
    scores = torch.bmm(q, k.mT).to(_wide(q.dtype)).mul_(scale)
    if hidden is not None:
        scores.unflatten(0, (len(hidden), -1)).masked_fill_(hidden, float("-inf"))
    return scores.softmax(-1).to(q.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _hidden(chunk: Chunk, causal: bool) -> Tensor | None:
    """Return what is not seen, (b, 1, 1 or t, t); None where all see all."""
    if chunk.real is None and not causal:
        return None
    seen = chunk.mask[:, None, None]
    if causal:
        width = chunk.mask.shape[1]
        seen = seen & torch.ones(width, width, dtype=torch.bool, device=seen.device).tril()
    return ~seen


def _padded(values: Tensor, chunk: Chunk, zeros: bool = False) -> Tensor:
    """Return (b * H, t, hd) of a chunk's tokens among (n, H, hd); padding repeats a token of its row, or is zero."""
    own = values[chunk.tokens[0] : chunk.tokens[1]]
    if chunk.real is not None and zeros:
        own = own.new_zeros(len(chunk.fill), *own.shape[1:]).index_copy_(0, chunk.real, own)
    elif chunk.real is not None:
        own = own.index_select(0, chunk.fill)
    return own.unflatten(0, chunk.mask.shape).transpose(1, 2).flatten(0, 1)


def _put(out: Tensor, own: Tensor, chunk: Chunk) -> None:
    """Write (b * H, t, hd) of a chunk to its tokens in (n, H, hd)."""
    flat = own.unflatten(0, (len(chunk.mask), -1)).transpose(1, 2).flatten(0, 1)
    place = out[chunk.tokens[0] : chunk.tokens[1]]
    if chunk.real is None:
        place.copy_(flat)
    else:
        torch.index_select(flat, 0, chunk.real, out=place)
