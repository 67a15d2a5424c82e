"""Gradients of a loss that couples a whole batch, in the memory of a small one (GradCache, arXiv 2101.06983).

Pass 1 computes all outputs without a graph; the loss and its gradient with respect to the outputs need only these.
Pass 2 computes the outputs again, piece by piece with a graph, and sends the pieces of that gradient through it. By
the chain rule the sum is the gradient of the whole batch; it costs one more forward. Dropout draws the same masks in
both passes, because it is a function of the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.adapter import Adapter
from onebase.encode import Encoded, collate, pad_id, real_tokens
from onebase.examples import drawn, row_keys
from onebase.processes import active
from onebase.tasks import Examples, Losses, get_task

if TYPE_CHECKING:
    from onebase.base import Base


def exceeds(spec: Mapping[str, Any], examples: Examples, index: Sequence[int]) -> bool:
    """Say whether a batch has more padded tokens than the task allows in one graph (its option `cache_tokens`)."""
    limit = spec.get("cache_tokens")
    if limit is None:
        return False
    rows = get_task(spec["kind"]).inputs(examples, index)
    return len(rows) * max(len(row.ids) for row in rows) > limit


def backward_cached(base: Base, adapter: Adapter, examples: Examples, index: Sequence[int], size: int) -> Losses:
    """Add the gradient of the summed losses of some examples to the adapter's parameters.

    Args:
        base: the base that carries the adapter.
        adapter: what is trained; its task reads states.
        examples, index: the whole batch.
        size: rows per forward.

    Where several processes train together each computes a share of the texts in both passes; the loss is that of all
    of them. Every process has the gradient of its own texts, and the first one alone has the losses.

    Returns:
        The losses, without a graph.
    """
    together = active()
    task, spec = get_task(adapter.task["kind"]), adapter.task
    rows = task.inputs(examples, index)
    order = together.share(range(len(rows)), lambda i: len(rows[i].ids))
    order.sort(key=lambda i: len(rows[i].ids))
    pieces = [order[start : start + size] for start in range(0, len(order), size)]
    keys = row_keys(index, len(rows))
    outputs: list[Tensor] = []

    def read(piece: list[int]) -> Tensor:
        with drawn(adapter, [keys[i] for i in piece]):
            return _read(base, adapter, [rows[i] for i in piece])

    with torch.no_grad():
        for piece in pieces:
            outputs.append(read(piece))
    out = _placed(order, outputs, len(rows), base.device).requires_grad_()
    part = task.losses(out, examples, index, spec, adapter.head)
    part.sums.sum().backward()
    assert out.grad is not None
    for piece in pieces:
        torch.autograd.backward(read(piece), out.grad[torch.tensor(piece, device=out.device)])
    told = 1.0 if together.first else 0.0
    return Losses(part.sums.detach() * told, part.counts.detach() * told)


def _placed(order: Sequence[int], outputs: Sequence[Tensor], n: int, device: torch.device) -> Tensor:
    """Return the outputs (n, ...) of all processes in the order of the texts."""
    mine = torch.cat(list(outputs)) if outputs else None
    found = [(list(order), mine)]
    if active().size > 1:
        found = active().gather((list(order), None if mine is None else mine.cpu()))
    place = torch.empty(n, dtype=torch.long, device=device)
    place[torch.tensor([i for own, _ in found for i in own], device=device)] = torch.arange(n, device=device)
    return torch.cat([many.to(device) for _, many in found if many is not None])[place]


def _read(base: Base, adapter: Adapter, rows: Sequence[Encoded]) -> Tensor:
    batch = collate([row.bare for row in rows], pad_id(base.tokenizer), device=base.device)
    task, states = get_task(adapter.task["kind"]), base.states(batch, adapter.name)
    return task.read(adapter.head, states, real_tokens(batch, states), adapter.task)
