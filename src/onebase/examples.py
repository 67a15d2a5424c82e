"""Examples under an adapter: encoding the splits of a data set, and losses and outputs of their rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.encode import IGNORED, Encoded, collate, pad_id, real_tokens
from onebase.errors import DataError
from onebase.processes import active
from onebase.tasks import Examples, Losses, Task, get_task
from onebase.tasks.task import Found, Surface
from onebase.words import seen, vocabulary_size

if TYPE_CHECKING:
    from onebase.adapter import Adapter
    from onebase.base import Base
    from onebase.data import Data, Rows

SPLITS = ("train", "validation", "test")
ROLE_BITS = 40  # rows of a data set have smaller numbers
LOGIT_ROWS = 16  # rows scored at once through an LM head: 256 tokens x 50,000 logits are 51 MB a row in float32


def encode(base: Base, spec: Mapping[str, Any], data: Data, tokenizer: Any = None) -> dict[str, Examples]:
    """Encode the splits of a data set for a task.

    Args:
        base: the base.
        spec: what for.
        data: the splits.
        tokenizer: an adapter's view of the base's tokenizer; the base's own by default.

    Returns:
        train, validation and test; empty splits stay empty.

    Raises:
        DataError: nothing is left to learn from, or a word that only the adapter knows is to be predicted.
        UnsupportedError: the base cannot learn this kind of task.
    """
    get_task(spec["kind"]).check_base(base)
    return {name: encode_rows(base, spec, getattr(data, name), tokenizer, name) for name in SPLITS}


def encode_rows(
    base: Base, spec: Mapping[str, Any], rows: Rows, tokenizer: Any = None, split: str = "data"
) -> Examples:
    """Encode one split; see `encode`."""
    task, own = get_task(spec["kind"]), seen(base, tokenizer)
    found = task.encode(own, spec, rows)
    if own is base:
        return found
    _check_targets(base, tokenizer, found, split)
    return replace(found, plain=task.encode(base, spec, rows))


def _check_targets(base: Base, own: Any, examples: Examples, split: str) -> None:
    """Raise DataError where a target is a word that the base's LM head has no row for."""
    known = vocabulary_size(base)
    for number, row in enumerate(examples.rows):
        new = [label for label in row.labels or () if label >= known]
        if new:
            raise DataError(
                f"{split} row {number}: the word {own.convert_ids_to_tokens(new[0])!r} is to be predicted, but a new "
                "word is an input only, the LM head has no row for it. Leave it out of tokens(words=...), or out of "
                "the texts."
            )


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
    with drawn(None if name is None else base.adapters[name], row_keys(index, len(rows))):
        if task.surface_of(spec) == "logits":
            out: Any = token_logits(base, name, rows, task.prompted)
        else:
            batch = collate([row.bare for row in rows], pad_id(base.tokenizer), device=base.device)
            states = base.states(batch, name)
            out = task.read(head, states, real_tokens(batch, states), spec)
    return task.losses(out, examples, index, spec, head)


def row_keys(index: Sequence[int], rows: int) -> list[int]:
    """Return what tells the rows of some examples apart in dropout: `Task.inputs` gives them role after role."""
    return [i + (role << ROLE_BITS) for role in range(rows // len(index)) for i in index]


@contextmanager
def drawn(adapter: Adapter | None, keys: Sequence[int]) -> Iterator[None]:
    """Draw dropout of an adapter in training by these keys of its rows, whatever else is in the batch."""
    draw = None if adapter is None else adapter.routed.draw
    if adapter is None or draw is None:
        yield
        return
    adapter.routed.draw = replace(draw, keys=keys)
    try:
        yield
    finally:
        adapter.routed.draw = draw


def forward_mixed(base: Base, parts: Sequence[tuple[str, Examples, Sequence[int]]]) -> list[Losses]:
    """Compute losses of examples of several adapters in one forward (one more where some of them use the LM head).

    Args:
        base: the base.
        parts: (adapter, its examples, which of them), each adapter once.

    Returns:
        One entry per part, as `forward` gives it.
    """
    found: dict[int, Losses] = {}
    for surface in ("states", "logits"):
        mine = [i for i, (name, _, _) in enumerate(parts) if _surface(base, name) == surface]
        if not mine:
            continue
        rows = [_task(base, parts[i][0]).inputs(parts[i][1], parts[i][2]) for i in mine]
        names = [parts[i][0] for i, many in zip(mine, rows) for _ in many]
        flat = [row for many in rows for row in many]
        prompted: set[bool] = set()
        if surface == "logits":
            prompted = {_task(base, parts[i][0]).prompted for i in mine}
            if len(prompted) > 1:  # texts and prompts: the end of a prompt must be said for all rows or for none
                return [forward_mixed(base, [part])[0] for part in parts]
        with contextlib.ExitStack() as stack:
            for i, many in zip(mine, rows):
                stack.enter_context(drawn(base.adapters[parts[i][0]], row_keys(parts[i][2], len(many))))
            if surface == "logits":
                out, mask = token_logits(base, names, flat, prompted.pop()), None
            else:
                batch = collate([row.bare for row in flat], pad_id(base.tokenizer), device=base.device)
                out = base.states(batch, names)
                mask = real_tokens(batch, out)
        first = 0
        for i, many in zip(mine, rows):
            (name, examples, index), place = parts[i], slice(first, first + len(many))
            adapter, task = base.adapters[name], _task(base, name)
            own = out[place] if mask is None else task.read(adapter.head, out[place], mask[place], adapter.task)
            found[i] = task.losses(own, examples, index, adapter.task, adapter.head)
            first += len(many)
    return [found[i] for i in range(len(parts))]


def _task(base: Base, name: str) -> Task:
    return get_task(base.adapters[name].task["kind"])


def _surface(base: Base, name: str) -> Surface:
    return _task(base, name).surface_of(base.adapters[name].task)


def _prompts(rows: Sequence[Encoded]) -> list[int]:
    """Return the tokens of each row before its first target: its prompt, or the whole row where there is none."""
    return [next((i for i, label in enumerate(row.labels or ()) if label != IGNORED), len(row.ids)) for row in rows]


def token_logits(
    base: Base, name: str | Sequence[str | None] | None, rows: Sequence[Encoded], prompted: bool = False
) -> Tensor:
    """Return LM logits (b, T, V); of an encoder-decoder those at the rows' labels.

    Args:
        base, name, rows: what to run.
        prompted: the tokens before a row's first target are its prompt.
    """
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
    with base.packed(name, prompts=_prompts(rows) if prompted and not base.is_encoder_decoder else None):
        return base.model(**batch, **more).logits


def run_examples(
    base: Base,
    name: str | None,
    examples: Examples,
    batch_size: int = 64,
    spec: Mapping[str, Any] | None = None,
    head: nn.Module | None = None,
) -> Found:
    """Run a split without gradients; see `forward`. Processes that train together share its batches."""
    sums, counts = torch.zeros(len(examples)), torch.zeros(len(examples))
    values: list[Tensor | None] = [None] * len(examples)
    about = base.adapters[name].task if name is not None else spec or {}
    if get_task(about["kind"]).surface_of(about) == "logits":
        batch_size = min(batch_size, LOGIT_ROWS)
    together = active()
    batches = list(examples.batches(range(len(examples)), batch_size))
    mine = batches[together.rank :: together.size]
    found: list[tuple[list[int], Tensor, Tensor, list[Tensor]]] = []
    more = together.rounds(len(mine)) - len(mine)
    with torch.no_grad():
        for index in mine:
            part = forward(base, name, examples, index, spec, head)
            found.append((index, part.sums.float().cpu(), part.counts.float().cpu(), [v.cpu() for v in part.values]))
        for _ in range(more):
            forward(base, name, examples, batches[0], spec, head)  # all must call a sharded base equally often
    for index, losses, weights, own in (piece for many in together.gather(found) for piece in many):
        sums[index], counts[index] = losses, weights
        for i, value in zip(index, own):
            values[i] = value
    return Found(sums, counts, [value for value in values if value is not None])
