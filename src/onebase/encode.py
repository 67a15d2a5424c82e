"""From text to token ids: the template, the maximum length and the padding of an adapter's task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onebase.errors import ConfigError, DataError

IGNORED = -100  # label of tokens that carry no loss, transformers' convention


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row of token ids.

    Attributes:
        ids: token ids.
        types: token type ids, or None.
        labels: per token, IGNORED where there is no loss; or None.
        cut: tokens that the maximum length removed.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    cut: int = 0


def render(template: str, fields: dict[str, str]) -> str:
    """Fill ``{name}`` places of a template; any other brace stays as it is.

    Raises:
        ConfigError: the template has no place for one of the fields.
    """
    if not template:
        return fields["text"]
    missing = [name for name in fields if "{" + name + "}" not in template]
    if missing:
        raise ConfigError(f"template {template!r} has no place for {', '.join('{' + m + '}' for m in missing)}")
    pieces, rest = [], template
    while rest:  # one pass, so that braces inside a text are never filled in
        spots = [(rest.find("{" + name + "}"), name) for name in fields if "{" + name + "}" in rest]
        if not spots:
            pieces.append(rest)
            break
        at, name = min(spots)
        pieces += [rest[:at], fields[name]]
        rest = rest[at + len(name) + 2 :]
    return "".join(pieces)


def encode_texts(
    tokenizer: Any, task: dict[str, Any], texts: Sequence[str], pairs: Sequence[str] | None = None
) -> list[Encoded]:
    """Encode texts (or pairs) for a classification or embedding task.

    Args:
        tokenizer: a transformers tokenizer.
        task: its `template` and `max_length` are used.
        texts: n texts.
        pairs: n second texts, or None.

    Returns:
        n rows. `cut` tells how many tokens were removed.
    """
    if any(not isinstance(text, str) for text in texts):
        bad = next((i, text) for i, text in enumerate(texts) if not isinstance(text, str))
        raise DataError(f"text {bad[0]} is {bad[1]!r}: expected a string")
    template, limit = task.get("template") or "", task["max_length"]
    if template:
        fields = [{"text": t} | ({"text_pair": p} if pairs is not None else {}) for t, p in zip(texts, pairs or texts)]
        texts, pairs = [render(template, f) for f in fields], None
    if not texts:
        return []
    second = None if pairs is None else list(pairs)
    full = tokenizer(list(texts), second, add_special_tokens=True, verbose=False)
    short = tokenizer(list(texts), second, add_special_tokens=True, truncation=True, max_length=limit)
    types = short.get("token_type_ids")
    rows = []
    for i, ids in enumerate(short["input_ids"]):
        if not ids:  # an empty text on a tokenizer without special tokens still needs one token
            ids = [pad_id(tokenizer)]
        kind = tuple(types[i]) if types is not None and len(types[i]) == len(ids) else None
        rows.append(Encoded(tuple(ids), kind, cut=max(0, len(full["input_ids"][i]) - len(ids))))
    return rows


def pad_id(tokenizer: Any) -> int:
    """Return the id that fills padding; any id will do where the tokenizer names none, padding is masked."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


def collate(rows: Sequence[Encoded], pad: int, side: str = "right", device: Any = None) -> dict[str, Tensor]:
    """Pad rows to one batch.

    Args:
        rows: B encoded rows.
        pad: id in padded places.
        side: 'right' or 'left'.
        device: where the tensors go.

    Returns:
        input_ids, attention_mask (B, T), token_type_ids and labels where the rows have them.
    """
    width = max(len(row.ids) for row in rows)

    def fill(values: Sequence[int], filler: int) -> list[int]:
        gap = [filler] * (width - len(values))
        return [*gap, *values] if side == "left" else [*values, *gap]

    batch = {
        "input_ids": torch.tensor([fill(row.ids, pad) for row in rows]),
        "attention_mask": torch.tensor([fill([1] * len(row.ids), 0) for row in rows]),
    }
    if all(row.types is not None for row in rows):
        batch["token_type_ids"] = torch.tensor([fill(row.types or (), 0) for row in rows])
    if all(row.labels is not None for row in rows):
        batch["labels"] = torch.tensor([fill(row.labels or (), IGNORED) for row in rows])
    return {name: value.to(device) for name, value in batch.items()}
