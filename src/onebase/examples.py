"""Examples: a split of data as token ids and targets, and its loss under an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onebase.data import Data, Rows
from onebase.encode import IGNORED, Encoded, collate, encode_texts, pad_id, render
from onebase.errors import DataError, UnsupportedError
from onebase.generation import prompt_ids
from onebase.words import vocabulary_size

if TYPE_CHECKING:
    from onebase.base import Base


@dataclass(frozen=True, eq=False)
class Examples:
    """A split, encoded once.

    Attributes:
        rows: n encoded rows.
        targets: (n,) class numbers for classification, None for language modelling (targets are the rows' labels).
        cut: rows that lost tokens to the maximum length.
        plain: the same rows as the base's own tokenizer cuts them, where the adapter's view of it has more words.
    """

    rows: tuple[Encoded, ...]
    targets: Tensor | None = None
    cut: int = 0
    plain: Examples | None = None

    @property
    def for_base(self) -> Examples:
        """The rows that the plain base can read: it knows no word of an adapter."""
        return self if self.plain is None else self.plain

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, order: Sequence[int], size: int) -> Iterator[list[int]]:
        """Cut indices into batches of rows with similar length."""
        ranked = sorted(order, key=lambda i: len(self.rows[i].ids))
        for start in range(0, len(ranked), size):
            yield ranked[start : start + size]


def encode(base: Base, task: dict[str, Any], data: Data, tokenizer: Any = None) -> dict[str, Examples]:
    """Encode the splits of a data set for a task.

    Args:
        base: the base.
        task: what for.
        data: the splits.
        tokenizer: an adapter's view of the base's tokenizer; the base's own by default.

    Returns:
        train, validation and test; empty splits stay empty.

    Raises:
        DataError: a word that only the adapter knows is to be predicted.
        UnsupportedError: the base cannot learn this kind of task.
    """
    kind = task["kind"]
    if kind in ("causal-lm", "completion") and not base.has_lm_head:
        raise UnsupportedError(
            f"{kind} needs a base that writes text; {base.id} is an encoder. Use a decoder, or label the rows."
        )
    if kind == "causal-lm" and base.is_encoder_decoder:
        raise UnsupportedError("plain-text language modelling needs a decoder-only base")
    encoder = {"classification": _classification, "causal-lm": _text, "completion": _completion}[kind]
    own = base.tokenizer if tokenizer is None else tokenizer
    found = {}
    for name in ("train", "validation", "test"):
        rows = getattr(data, name)
        found[name] = encoder(base, task, rows, own)
        if own is not base.tokenizer:
            _check_targets(base, own, found[name], name)
            found[name] = replace(found[name], plain=encoder(base, task, rows, base.tokenizer))
    return found


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


def _classification(base: Base, task: dict[str, Any], rows: Rows, tokenizer: Any) -> Examples:
    if not len(rows):
        return Examples((), torch.zeros(0, dtype=torch.long))
    number = {label: i for i, label in enumerate(task["labels"])}
    encoded = encode_texts(tokenizer, task, rows.text, rows.text_pair)
    unseen = sorted({label for label in rows.label or () if label not in number})
    if unseen:
        raise DataError(f"labels {unseen[:5]} are not among the adapter's labels {task['labels'][:10]}")
    targets = torch.tensor([number[label] for label in rows.label or ()])
    return Examples(tuple(encoded), targets, sum(row.cut > 0 for row in encoded))


def _text(base: Base, task: dict[str, Any], rows: Rows, tokenizer: Any) -> Examples:
    """Join the texts by newlines and cut blocks of `max_length` tokens; each token but a block's first is a target."""
    if not len(rows):
        return Examples(())
    ids = list(tokenizer("\n".join(rows.text), add_special_tokens=False, verbose=False)["input_ids"])
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    step = task["max_length"] - len(start)
    blocks = [start + ids[i : i + step] for i in range(0, len(ids), step)]
    blocks = [block for block in blocks if len(block) > 1]
    return Examples(tuple(Encoded(tuple(b), labels=(IGNORED, *b[1:])) for b in blocks))


def _completion(base: Base, task: dict[str, Any], rows: Rows, tokenizer: Any) -> Examples:
    """Prompt, completion, end of text; the loss is on completion and end."""
    limit = task["max_length"]
    before, after = (task["template"] or "{prompt}{completion}").split("{completion}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = []
    for prompt, completion in zip(rows.text, rows.completion or ()):
        head = prompt_ids(tokenizer, render(before, {"prompt": prompt}), base.is_encoder_decoder)
        tail = list(tokenizer(completion + after, add_special_tokens=False)["input_ids"]) + end
        if base.is_encoder_decoder:
            cut = max(0, len(head) - limit) + max(0, len(tail) - limit)
            encoded.append(Encoded(tuple(head[:limit]), labels=tuple(tail[:limit]), cut=cut))
            continue
        cut = max(0, len(head) + len(tail) - limit)
        tail = tail[: limit - 1]
        head = head[-(limit - len(tail)) :]  # the end of a prompt is nearest to what must follow
        encoded.append(Encoded((*head, *tail), labels=(*([IGNORED] * len(head)), *tail), cut=cut))
    return Examples(tuple(encoded), cut=sum(row.cut > 0 for row in encoded))


def forward(base: Base, name: str | None, examples: Examples, index: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute losses of some rows under one adapter.

    Args:
        base: the base.
        name: the adapter; None for the plain base (language modelling only).
        examples: the split.
        index: b row numbers.

    Returns:
        Summed loss per row (b,), number of targets per row (b,), and logits (b, labels) for classification or an
        empty tensor.
    """
    rows = [examples.rows[i] for i in index]
    if examples.targets is not None:
        batch = collate(rows, pad_id(base.tokenizer), device=base.device)
        adapter = base.adapters[name or ""]
        assert adapter.head is not None
        logits = adapter.head(base.vectors(batch, name, adapter.task["pooling"]))
        targets = examples.targets[torch.tensor(index)].to(logits.device)
        losses = F.cross_entropy(logits, targets, reduction="none")
        return losses, torch.ones_like(losses), logits
    return _lm_loss(base, name, rows)


def _prompts(base: Base, name: str | None, rows: list[Encoded]) -> list[int] | None:
    """Return the prompt's tokens of each row of a completion task; None where the whole row is one text."""
    if name is None or base.adapters[name].task["kind"] != "completion":
        return None
    return [next((i for i, label in enumerate(row.labels or ()) if label != IGNORED), len(row.ids)) for row in rows]


def _lm_loss(base: Base, name: str | None, rows: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    pad = pad_id(base.tokenizer)
    if base.is_encoder_decoder:
        batch = collate([Encoded(row.ids) for row in rows], pad, device=base.device)
        width = max(len(row.labels or ()) for row in rows)
        filled = [[*(row.labels or ()), *([IGNORED] * (width - len(row.labels or ())))] for row in rows]
        targets = torch.tensor(filled, device=base.device)
        with base.use(name):
            logits = base.model(**batch, decoder_input_ids=base.model._shift_right(targets), use_cache=False).logits
    else:
        batch = collate(rows, pad, device=base.device)
        targets = batch.pop("labels")[:, 1:]
        with base.use(name, prompts=_prompts(base, name, rows)):
            logits = base.model(**batch, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    losses = losses.view(targets.shape)
    return losses.sum(1), (targets != IGNORED).sum(1), logits.new_zeros(0)
