"""Filling masks: the words that a base with a head for masked tokens puts in the places of its mask token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from onebase.encode import Encoded, collate, encode_windows, pad_id
from onebase.errors import DataError, UnsupportedError
from onebase.heads import TiedHead
from onebase.tasks import Prediction, Span, get_task

if TYPE_CHECKING:
    from onebase.base import Base


def fill_masks(
    base: Base, texts: Sequence[str], names: Sequence[str | None], top: int, batch_size: int
) -> list[Prediction]:
    """Fill the masks of texts, each under its own adapter; see `Base.fill`."""
    get_task("masked-lm").check_base(base)
    mask, encoded = base.tokenizer.mask_token_id, []
    for i, (text, name) in enumerate(zip(texts, names)):
        spec = base._spec(name)
        if name is not None and spec["kind"] not in ("masked-lm", "features"):
            raise UnsupportedError(f"adapter {name!r} is for {spec['kind']}: it fills no masks, use base.predict")
        if not base.has_masked_head and "tied" not in spec:
            raise UnsupportedError(
                f"text {i}: {base.id} has no head for masked tokens, so only adapters trained with task=masked-lm fill "
                f"masks on it; {'the plain base was asked' if name is None else f'{name!r} has no head'}"
            )
        with base.encoding:
            (row,) = encode_windows(base.tokenizer, {**spec, "windows": False}, [text], offsets=True)[0]
        if mask not in row.ids:
            lost = f" in its first {len(row.ids)} tokens" if row.cut else ""
            raise DataError(f"text {i} has no {base.tokenizer.mask_token}{lost}: write it where a word is missing")
        encoded.append(row)
    order, found = (
        sorted(range(len(texts)), key=lambda i: len(encoded[i].ids)),
        [Prediction(None, None, {})] * len(texts),
    )
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        rows = [Encoded(encoded[i].ids, encoded[i].types) for i in part]
        batch = collate(rows, pad_id(base.tokenizer), device=base.device)
        with torch.no_grad():
            if base.has_masked_head:
                with base.use([names[i] for i in part]):
                    rows_out = base.model(**batch).logits
            else:
                rows_out = base.states(batch, [names[i] for i in part])
        for i, own in zip(part, rows_out):
            name = names[i]
            head = None if name is None else base.adapters[name].head
            spans: list[Span] = []
            for place, token in enumerate(encoded[i].ids):
                if token == mask:
                    logits = head.logits(head(own[place])) if isinstance(head, TiedHead) else own[place]
                    best = torch.softmax(logits.double(), -1).topk(top)
                    a, b = (encoded[i].offsets or ())[place] or (0, 0)
                    with base.encoding:
                        words = [base.tokenizer.decode([word]).strip() for word in best.indices.tolist()]
                    spans += [Span(a, b, word, "mask", p) for word, p in zip(words, best.values.tolist())]
            found[i] = Prediction(names[i], None, {}, None, encoded[i].cut, spans=tuple(spans))
    return found
