"""Sequence to sequence: a source text and the target that is written for it, on encoder-decoders and on decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from onebase.encode import IGNORED, Encoded, prompt_ids, render
from onebase.errors import ConfigError
from onebase.tasks.language import LanguageTask, completion_examples
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples
from onebase.tasks.written import chrf, exact_match

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows

TARGET = "{target}"
TEMPLATE = "{source}\n" + TARGET  # on a decoder, which needs to see where the source ends
WRITTEN_AT_ONCE = 16  # rows per batch of generation


@register_task
class Seq2Seq(LanguageTask):
    """The loss is on the target and the end of text; an encoder reads the source where the base has one."""

    kind: ClassVar[str] = "seq2seq"
    summary: ClassVar[str] = "source texts and the targets to write for them"
    writes: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ("source", "target")
    options: ClassVar[Mapping[str, Any]] = {"generate": 0}

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Choose a template; for an encoder-decoder it may be of the source alone, such as "summarize: {source}"."""
        rows = spec["generate"]
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            raise ConfigError(f"generate = {rows!r}: expected how many rows are scored by what is written, 0 for none")
        return self.without_data(spec, base)

    def without_data(self, spec: dict[str, Any], base: Base) -> dict[str, Any]:
        """Set the template."""
        template = spec["template"] or ("{source}" if base.is_encoder_decoder else TEMPLATE)
        if base.is_encoder_decoder and TARGET not in template:
            template += TARGET
        if template.count(TARGET) > 1 or "{source}" in template.partition(TARGET)[2]:
            raise ConfigError(f"template {template!r}: expected one {{source}}, and after it one {TARGET}")
        return spec | {"template": template}

    def prompt(self, base: Base, spec: Mapping[str, Any], prompt: Any) -> list[int]:
        """Fill the template up to where the target begins."""
        if isinstance(prompt, str):
            prompt = render(spec["template"].partition(TARGET)[0], {"source": prompt})
        return super().prompt(base, spec, prompt)

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Encode sources and targets; what is too long loses its end, the source's template stays whole."""
        if not len(rows):
            return completion_examples(base, [])
        before, _, after = spec["template"].partition(TARGET)
        limit, encoded = spec["max_length"], []
        for source, target in zip(rows["source"], rows["target"]):
            tail = target_ids(base, target + after)
            if base.is_encoder_decoder:
                head, cut = fit_source(base, before, source, limit)
                cut += max(0, len(tail) - limit)
                encoded.append(Encoded(tuple(head), labels=tuple(tail[:limit]), cut=cut))
                continue
            full = prompt_ids(base.tokenizer, render(before, {"source": source}), False)
            lost = max(0, len(tail) - (limit - min(len(full), limit // 2)))  # a source keeps half of the room
            tail = tail[: len(tail) - lost]
            head, cut = fit_source(base, before, source, limit - len(tail))
            encoded.append(Encoded((*head, *tail), labels=(*([IGNORED] * len(head)), *tail), cut=cut + lost))
        examples = completion_examples(base, encoded)
        examples.facts["targets"] = tuple(rows["target"])
        return examples

    def extras(
        self, base: Base, spec: Mapping[str, Any], name: str | None, examples: Examples, rows: int
    ) -> dict[str, Any]:
        """Write the targets of the first rows greedily, as long as the longest wanted one, and compare."""
        rows = min(rows, len(examples))
        if not rows:
            return {}
        chosen = examples.rows[:rows]
        longest = max(sum(label != IGNORED for label in row.labels or ()) for row in chosen)
        prompts = [list(row.ids) if base.is_encoder_decoder else source_of(row) for row in chosen]
        written: list[str] = []
        for start in range(0, rows, WRITTEN_AT_ONCE):
            part = prompts[start : start + WRITTEN_AT_ONCE]
            written += base.generate(part, name, max_new_tokens=longest)
        wanted = examples.facts["targets"][:rows]
        return {"generated": rows, "exact_match": exact_match(written, wanted), "chrf": chrf(written, wanted)}


def source_of(row: Encoded) -> list[int]:
    """Return the tokens of a decoder's row before the first one with a loss."""
    first = next((i for i, label in enumerate(row.labels or ()) if label != IGNORED), len(row.ids))
    return list(row.ids[:first])


def target_ids(base: Base, text: str) -> list[int]:
    """Token ids of a target with its end: on an encoder-decoder with what its tokenizer adds (BART starts with BOS)."""
    ids = list(base.tokenizer(text_target=text, add_special_tokens=base.is_encoder_decoder)["input_ids"])
    end = base.tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def fit_source(base: Base, before: str, source: str, room: int) -> tuple[list[int], int]:
    """Encode a source in its template, its end cut to fit.

    Args:
        base: the base.
        before: the template up to the target.
        source: the text.
        room: most tokens.

    Returns:
        Token ids, and how many were cut.

    Raises:
        ConfigError: the template alone needs more tokens.
    """
    full = prompt_ids(base.tokenizer, render(before, {"source": source}), base.is_encoder_decoder)
    if len(full) <= room:
        return full, 0
    pieces, kept = list(base.tokenizer(source, add_special_tokens=False, verbose=False)["input_ids"]), full
    keep = len(pieces) - (len(full) - room)
    while keep >= 0:  # a text cut at a token may need another number of tokens at the seam
        text = base.tokenizer.decode(pieces[:keep], skip_special_tokens=True)
        kept = prompt_ids(base.tokenizer, render(before, {"source": text}), base.is_encoder_decoder)
        if len(kept) <= room:
            return kept, len(full) - len(kept)
        keep -= max(1, len(kept) - room)
    raise ConfigError(f"template {before!r} alone needs {len(kept)} tokens, but {room} are left: raise max_length")
