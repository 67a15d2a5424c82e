"""Examples under an adapter: encoding the splits of a data set, and losses and outputs of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.encode import IGNORED, Encoded, collate, pad_id
from onebase.tasks import Examples, Losses, get_task
from onebase.tasks.task import Found

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data

SPLITS = ("train", "validation", "test")


def encode(base: Base, spec: Mapping[str, Any], data: Data) -> dict[str, Examples]:
    """Encode the splits of a data set for a task.

    Returns:
        train, validation and test; empty splits stay empty.

    Raises:
        DataError: nothing is left to learn from (every target token was cut).
        UnsupportedError: the base cannot learn this kind of task.
    """
    task = get_task(spec["kind"])
    task.check_base(base)
    return {name: task.encode(base, spec, getattr(data, name)) for name in SPLITS}


def forward(
    base: Base,
    name: str | None,
    examples: Examples,
    index: Sequence[int],
    spec: Mapping[str, Any] | None = None,
    head: nn.Module | None = None,
) -> Losses:
    """Compute losses of some examples under one adapter.

    Args:
        base: the base.
        name: the adapter; None for the plain base, with `spec` and `head`.
        examples: the split.
        index: which.
        spec, head: of the adapter by default.
    """
    if name is not None:
        adapter = base.adapters[name]
        spec, head = adapter.task, adapter.head
    assert spec is not None
    task = get_task(spec["kind"])
    rows = task.inputs(examples, index)
    if task.surface == "logits":
        out: Any = token_logits(base, name, rows)
    else:
        batch = collate([Encoded(row.ids, row.types) for row in rows], pad_id(base.tokenizer), device=base.device)
        out = task.read(head, base.states(batch, name), batch["attention_mask"], spec)
    return task.losses(out, examples, index, spec, head)


def token_logits(base: Base, name: str | None, rows: Sequence[Encoded]) -> Tensor:
    """Return LM logits (b, T, V); of an encoder-decoder those at the rows' labels."""
    batch = collate([Encoded(row.ids) for row in rows], pad_id(base.tokenizer), device=base.device)
    more: dict[str, Any] = {}
    if base.is_encoder_decoder:
        width = max(len(row.labels or ()) for row in rows)
        filled = [[*(row.labels or ()), *([IGNORED] * (width - len(row.labels or ())))] for row in rows]
        more["decoder_input_ids"] = base.model.prepare_decoder_input_ids_from_labels(
            labels=torch.tensor(filled, device=base.device)
        )
    if base.anatomy.stacks[-1].causal:
        more["use_cache"] = False
    with base.use(name):
        return base.model(**batch, **more).logits


def run_examples(
    base: Base,
    name: str | None,
    examples: Examples,
    batch_size: int = 64,
    spec: Mapping[str, Any] | None = None,
    head: nn.Module | None = None,
) -> Found:
    """Run a split without gradients; see `forward`."""
    sums, counts = torch.zeros(len(examples)), torch.zeros(len(examples))
    values: list[Tensor | None] = [None] * len(examples)
    with torch.no_grad():
        for index in examples.batches(range(len(examples)), batch_size):
            part = forward(base, name, examples, index, spec, head)
            sums[index], counts[index] = part.sums.float().cpu(), part.counts.float().cpu()
            for i, value in zip(index, part.values):
                values[i] = value.cpu()
    return Found(sums, counts, [value for value in values if value is not None])
