"""Language modelling with the base's own LM head: plain text, and prompts with what should follow them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.encode import IGNORED, Encoded, prompt_ids, render
from onebase.errors import DataError, UnsupportedError
from onebase.statistics import perplexity_interval, token_rows
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples, Found, Losses, Scores, Task

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows

BLOCK = 256  # tokens per block of plain text: long enough for context, short enough for a laptop
COMPLETION_TEMPLATE = "{prompt}\n{completion}"


class LanguageTask(Task):
    """A loss per token, perplexity as the score."""

    surface: ClassVar[Any] = "logits"

    def losses(
        self, out: Tensor, examples: Examples, index: Sequence[int], spec: Mapping[str, Any], head: nn.Module | None
    ) -> Losses:
        """Sum the losses of the labelled tokens, nats."""
        rows = [examples.rows[i] for i in index]
        width = max(len(row.labels or ()) for row in rows)
        filled = [[*(row.labels or ()), *([IGNORED] * (width - len(row.labels or ())))] for row in rows]
        targets, out = torch.tensor(filled, device=out.device), out[:, :width]  # a shared batch may be wider
        if examples.facts.get("shifted", True):  # the logits at a token predict the next one of the same row
            out, targets = out[:, :-1], targets[:, 1:]
        losses = F.cross_entropy(out.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
        return Losses(losses.view(targets.shape).sum(1), (targets != IGNORED).sum(1))

    def judge(self, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, found: Found) -> Scores:
        """Compute perplexity over all targets; texts without a target do not count."""
        kept = found.counts > 0
        total, targets = float(found.sums[kept].double().sum()), int(found.counts[kept].sum())
        if not targets:
            raise DataError("no token is left to score: every target was cut by the maximum length")
        loss = total / targets
        sums, counts = found.sums[kept].double().tolist(), found.counts[kept].tolist()
        value = float(torch.tensor(loss, dtype=torch.float64).exp())
        interval = perplexity_interval(sums, counts) if len(sums) > 1 else (value, value)
        metrics = {"n": len(sums), "perplexity": value, "loss": loss, "tokens": targets}
        return Scores("perplexity", value, interval, metrics, rows=token_rows(sums, counts))


@register_task
class CausalLM(LanguageTask):
    """Plain text: each token but a block's first is predicted."""

    kind: ClassVar[str] = "causal-lm"
    summary: ClassVar[str] = "plain text, predicted token by token"
    writes: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ()

    def check_base(self, base: Base) -> None:
        """Require a decoder."""
        super().check_base(base)
        if base.is_encoder_decoder:
            raise UnsupportedError("plain-text language modelling needs a decoder-only base")

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Cut into blocks that a laptop can take, unless a length was asked for."""
        return spec if "max_length" in given else spec | {"max_length": min(BLOCK, spec["max_length"])}

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Join the texts by newlines and cut blocks of `max_length` tokens."""
        if not len(rows):
            return Examples(())
        ids = list(base.tokenizer("\n".join(rows.text), add_special_tokens=False, verbose=False)["input_ids"])
        start = [base.tokenizer.bos_token_id] if base.tokenizer.bos_token_id is not None else []
        step = spec["max_length"] - len(start)
        blocks = [start + ids[i : i + step] for i in range(0, len(ids), step)]
        blocks = [block for block in blocks if len(block) > 1]
        return Examples(tuple(Encoded(tuple(b), labels=(IGNORED, *b[1:])) for b in blocks))


@register_task
class Completion(LanguageTask):
    """Prompt, completion, end of text; the loss is on completion and end."""

    kind: ClassVar[str] = "completion"
    summary: ClassVar[str] = "prompts and what should follow them"
    writes: ClassVar[bool] = True
    prompted: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ("prompt", "completion")

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Separate prompt and completion by a newline, unless a template says otherwise."""
        return self.without_data(spec, base)

    def without_data(self, spec: dict[str, Any], base: Base) -> dict[str, Any]:
        """Set the template."""
        return spec | {"template": spec["template"] or COMPLETION_TEMPLATE}

    def prompt(self, base: Base, spec: Mapping[str, Any], prompt: Any) -> list[int]:
        """Fill the template up to where the completion begins."""
        before = (spec["template"] or "").split("{completion}")[0]
        return super().prompt(base, spec, render(before, {"prompt": prompt}) if before else prompt)

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Encode prompts and completions."""
        before, after = (spec["template"] or "{prompt}{completion}").split("{completion}")
        encoded = []
        for prompt, completion in zip(rows.text, rows.completion or ()):
            head = prompt_ids(base.tokenizer, render(before, {"prompt": prompt}), base.is_encoder_decoder)
            tail = list(base.tokenizer(completion + after, add_special_tokens=False)["input_ids"])
            encoded.append(join_completion(base, head, tail, spec["max_length"]))
        return completion_examples(base, encoded)


def join_completion(base: Base, head: list[int], tail: list[int], limit: int) -> Encoded:
    """Join the tokens of a prompt and of what follows it; the end of text is learned too.

    Args:
        base: says whether an encoder reads the prompt.
        head: tokens of the prompt.
        tail: tokens of the completion, without the end.
        limit: most tokens of the row (of each side, for an encoder-decoder).
    """
    tail = tail + ([] if base.tokenizer.eos_token_id is None else [base.tokenizer.eos_token_id])
    if base.is_encoder_decoder:
        cut = max(0, len(head) - limit) + max(0, len(tail) - limit)
        return Encoded(tuple(head[:limit]), labels=tuple(tail[:limit]), cut=cut)
    cut = max(0, len(head) + len(tail) - limit)
    tail = tail[: limit - 1]
    head = head[-(limit - len(tail)) :]  # the end of a prompt is nearest to what must follow
    return Encoded((*head, *tail), labels=(*([IGNORED] * len(head)), *tail), cut=cut)


def completion_examples(base: Base, encoded: list[Encoded]) -> Examples:
    """Return examples of prompts with labelled completions."""
    facts = {"shifted": not base.is_encoder_decoder}
    return Examples(tuple(encoded), cut=sum(row.cut > 0 for row in encoded), facts=facts)
