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
from onebase.encode import Encoded, collate, pad_id
from onebase.examples import drawn, row_keys
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

    Returns:
        The losses, without a graph.
    """
    task, spec = get_task(adapter.task["kind"]), adapter.task
    rows = task.inputs(examples, index)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    pieces = [order[start : start + size] for start in range(0, len(order), size)]
    keys = row_keys(index, len(rows))
    outputs: list[Tensor] = []

    def read(piece: list[int]) -> Tensor:
        with drawn(adapter, [keys[i] for i in piece]):
            return _read(base, adapter, [rows[i] for i in piece])

    with torch.no_grad():
        for piece in pieces:
            outputs.append(read(piece))
    place = torch.empty(len(rows), dtype=torch.long)
    place[torch.tensor(order)] = torch.arange(len(rows))
    out = torch.cat(outputs)[place.to(outputs[0].device)].requires_grad_()
    part = task.losses(out, examples, index, spec, adapter.head)
    part.sums.sum().backward()
    assert out.grad is not None
    for piece in pieces:
        torch.autograd.backward(read(piece), out.grad[torch.tensor(piece, device=out.device)])
    return Losses(part.sums.detach(), part.counts.detach())


def _read(base: Base, adapter: Adapter, rows: Sequence[Encoded]) -> Tensor:
    batch = collate([Encoded(row.ids, row.types) for row in rows], pad_id(base.tokenizer), device=base.device)
    task = get_task(adapter.task["kind"])
    return task.read(adapter.head, base.states(batch, adapter.name), batch["attention_mask"], adapter.task)
