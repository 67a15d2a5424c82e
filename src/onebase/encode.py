"""From text to token ids: the template, the maximum length and the padding of an adapter's task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.errors import ConfigError, DataError

if TYPE_CHECKING:
    from onebase.pictures import Picture

IGNORED = -100  # label of tokens that carry no loss, transformers' convention


@dataclass(frozen=True, eq=False)
class Encoded:
    """One row of token ids, or a picture.

    Attributes:
        ids: token ids.
        types: token type ids, or None.
        labels: per token, IGNORED where there is no loss; or None.
        cut: tokens that the maximum length removed.
        offsets: per token its (start, end) in the text, None for tokens of no text; or None where nobody asked.
        image: the picture, for a base that reads images; `ids` then has a blank per token that it becomes.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    cut: int = 0
    offsets: tuple[tuple[int, int] | None, ...] | None = None
    image: Picture | None = None

    @property
    def bare(self) -> Encoded:
        """What the base reads of it, without labels."""
        return Encoded(self.ids, self.types, image=self.image)

    @property
    def content(self) -> tuple[Any, ...]:
        """What the base's states depend on: two rows with the same content have the same states."""
        return self.ids, self.types, None if self.image is None else self.image.key


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


def encode_windows(
    tokenizer: Any,
    spec: Mapping[str, Any],
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    offsets: bool = False,
) -> list[list[Encoded]]:
    """Encode texts or pairs; a text that is longer than the maximum length is read in windows, or cut.

    Args:
        tokenizer: a transformers tokenizer.
        spec: `template`, `max_length`; `windows` with `overlap`, the tokens that neighbouring windows share: without
            them, and for pairs, what is too long is cut.
        texts: n texts.
        pairs: n second texts, or None.
        offsets: keep where each token is in its text (in the second text, of a pair).

    Returns:
        Per text its rows, at least one. `cut` tells how many tokens were removed.

    Raises:
        DataError: something is no text.
    """
    _check_texts(texts)
    template, limit = spec.get("template") or "", spec["max_length"]
    if template:
        fields = [{"text": t} | ({"text_pair": p} if pairs is not None else {}) for t, p in zip(texts, pairs or texts)]
        texts, pairs = [render(template, f) for f in fields], None
    if not texts:
        return []
    second = None if pairs is None else list(pairs)
    whole = tokenizer(list(texts), second, add_special_tokens=True, verbose=False)
    full = whole["input_ids"]
    long = any(len(ids) > limit for ids in full)
    windowed = bool(spec.get("windows")) and pairs is None and long
    if windowed and not tokenizer.is_fast:
        raise ConfigError("windows need a fast tokenizer: pass windows=False to cut long texts instead")
    more: dict[str, Any] = {}
    if windowed:
        more = {"return_overflowing_tokens": True, "stride": min(spec.get("overlap", OVERLAP), limit // 2)}
    if offsets:
        more["return_offsets_mapping"] = True
    short = whole
    if long or more:
        short = tokenizer(list(texts), second, add_special_tokens=True, truncation=True, max_length=limit, **more)
    types, of = short.get("token_type_ids"), short.get("overflow_to_sample_mapping")
    found: list[list[Encoded]] = [[] for _ in texts]
    for i, ids in enumerate(short["input_ids"]):
        text = i if of is None else of[i]
        ids = ids or [pad_id(tokenizer)]  # an empty text on a tokenizer without special tokens still needs one token
        kind = tuple(types[i]) if types is not None and len(types[i]) == len(ids) else None
        cut = 0 if windowed else max(0, len(full[text]) - len(ids))
        spots = _spots(short, i, pairs is not None) if offsets else None
        found[text].append(Encoded(tuple(ids), kind, cut=cut, offsets=spots))
    return found


OVERLAP = 64  # tokens that neighbouring windows share by default: a sentence or two


def _spots(batch: Any, row: int, second: bool) -> tuple[tuple[int, int] | None, ...]:
    """Return the place of each token in the text that is asked about, None for all other tokens."""
    wanted = 1 if second else 0
    spots = zip(batch["offset_mapping"][row], batch.sequence_ids(row))
    return tuple((int(a), int(b)) if of == wanted else None for (a, b), of in spots)


def encode_contexts(
    tokenizer: Any, spec: Mapping[str, Any], questions: Sequence[str], contexts: Sequence[str]
) -> list[list[Encoded]]:
    """Encode questions, each with its context, which is read in windows (or cut) where it is too long.

    Args:
        tokenizer: a fast tokenizer.
        spec: `max_length`; `windows` with `overlap` as for `encode_windows`.
        questions: n questions. A question may take half of the length; what is beyond is cut.
        contexts: n contexts.

    Returns:
        Per question its rows, with the offsets of the tokens of the context. `cut` tells how many tokens were removed.
    """
    _check_texts([*questions, *contexts])
    if not questions:
        return []
    limit, windowed = spec["max_length"], bool(spec.get("windows"))
    room = limit // 2 - tokenizer.num_special_tokens_to_add(pair=True)
    own = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    lost = [max(0, len(ids) - room) for ids in own["input_ids"]]
    asked = [q[: own["offset_mapping"][i][room - 1][1]] if lost[i] else q for i, q in enumerate(questions)]
    more: dict[str, Any] = {"return_offsets_mapping": True}
    if windowed:
        more |= {"return_overflowing_tokens": True, "stride": min(spec.get("overlap", OVERLAP), limit // 4)}
    else:
        full = tokenizer(asked, list(contexts), verbose=False)["input_ids"]
    batch = tokenizer(asked, list(contexts), truncation="only_second", max_length=limit, **more)
    types, of = batch.get("token_type_ids"), batch.get("overflow_to_sample_mapping")
    found: list[list[Encoded]] = [[] for _ in questions]
    for i, ids in enumerate(batch["input_ids"]):
        row = i if of is None else of[i]
        kind = None if types is None else tuple(types[i])
        cut = lost[row] + (0 if windowed else len(full[row]) - len(ids))
        found[row].append(Encoded(tuple(ids), kind, cut=cut, offsets=_spots(batch, i, True)))
    return found


def encode_texts(
    tokenizer: Any, spec: Mapping[str, Any], texts: Sequence[str], pairs: Sequence[str] | None = None
) -> list[Encoded]:
    """Encode texts or pairs as one row each; what is too long is cut."""
    return [rows[0] for rows in encode_windows(tokenizer, {**spec, "windows": False}, texts, pairs)]


def _check_texts(texts: Sequence[str]) -> None:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {i} is {text!r}: expected a string")


def prompt_ids(tokenizer: Any, text: str, encoder: bool) -> list[int]:
    """Token ids of a text that will be continued: with BOS where the tokenizer adds one, never with EOS."""
    ids = list(tokenizer(text)["input_ids"])
    if not encoder and ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


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
        input_ids, attention_mask (B, T), token_type_ids and labels where the rows have them; of pictures pixel_values
        (B, C, H, W).
    """
    images = [row.image for row in rows]
    if any(image is not None for image in images):
        return {"pixel_values": torch.stack([image.pixels() for image in images if image is not None]).to(device)}
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


def real_tokens(batch: Mapping[str, Tensor], states: Tensor) -> Tensor:
    """Return which tokens of states (B, T, D) are real, (B, T): those of the mask, or all where images have none."""
    mask = batch.get("attention_mask")
    return torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask
