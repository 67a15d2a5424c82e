"""Masked language modelling: words hidden in plain text are predicted by the base's own head, or by one that is made of
its embeddings.

Devlin et al. 2019 (arXiv 1810.04805, section 3.1 and appendix A.1): of each row 15 % of the tokens are predicted, at
least one; of those 80 % are replaced by the mask token, 10 % by a random token, and 10 % stay. Unlike there, rows are
masked anew in every epoch (Liu et al. 2019, arXiv 1907.11692, section 4.1); what is scored is masked once and for all.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.encode import IGNORED, Encoded, encode_windows
from onebase.errors import ConfigError, UnsupportedError
from onebase.heads import TiedHead
from onebase.tasks.language import BLOCK, LanguageTask
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples, Found, Losses, Scores, Surface
from onebase.tasks.tied import fit_tied, tied_sizes

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows

SHARE, MASKED, RANDOM = 0.15, 0.8, 0.1
FIXED = "fixed"  # what seeds the masks of rows that are scored


@register_task
class MaskedLM(LanguageTask):
    """Plain text whose hidden words are predicted."""

    kind: ClassVar[str] = "masked-lm"
    summary: ClassVar[str] = "plain text whose hidden words are predicted"
    places: ClassVar[tuple[str, ...]] = ()
    learned: ClassVar[tuple[str, ...]] = ("tied",)

    def check_base(self, base: Base) -> None:
        """Require an encoder that reads text, and a mask token."""
        if base.reads_images or base.is_encoder_decoder or base.anatomy.stacks[-1].causal:
            raise UnsupportedError(
                f"{self.kind} needs an encoder that reads text; {base.id} is a {type(base.model).__name__}. Load a "
                "checkpoint such as BERT's; decoders learn plain text with task=causal-lm."
            )
        if getattr(base.tokenizer, "mask_token_id", None) is None:
            raise UnsupportedError(f"{self.kind} needs a tokenizer with a mask token; that of {base.id} has none")

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Read long texts in windows that a laptop can take, unless a length was asked for."""
        if "max_length" not in given:
            spec["max_length"] = min(BLOCK, spec["max_length"])
        if spec["max_length"] < 8:
            raise ConfigError(f"max_length = {spec['max_length']}: expected at least 8 tokens to hide some of")
        return self.without_data(spec, base)

    def without_data(self, spec: dict[str, Any], base: Base) -> dict[str, Any]:
        """Size the head where the base has none."""
        return spec if base.has_masked_head or "tied" in spec else spec | {"tied": tied_sizes(base)}

    def surface_of(self, spec: Mapping[str, Any]) -> Surface:
        """Logits of the base's own head; states where the head is the adapter's."""
        return "states" if "tied" in spec else "logits"

    def head(self, spec: Mapping[str, Any], width: int) -> nn.Module | None:
        """Return a head made of the base's embeddings where the base has none."""
        return TiedHead(width, **spec["tied"]) if "tied" in spec else None

    def base_head(self, base: Base, spec: Mapping[str, Any], train: Examples, validation: Examples) -> nn.Module | None:
        """The same head, fitted on frozen states."""
        return fit_tied(base, spec["tied"], train, validation) if "tied" in spec else None

    def read(self, head: nn.Module | None, states: Tensor, mask: Tensor, spec: Mapping[str, Any]) -> Tensor:
        """Return states (b, T, embedding width) that logits are made of where they are needed."""
        assert head is not None
        return head(states)

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Encode texts, in windows without overlap where long, with the masks that scores are computed on.

        `facts` hold the rows without masks as `plain`, and what masking needs: the `mask` token, and `ordinary`
        tokens, those that are neither special nor added without an embedding.
        """
        self.check_base(base)
        facts: dict[str, Any] = {"shifted": False, "plain": ()}
        if not len(rows):
            return Examples((), facts=facts)
        found = encode_windows(base.tokenizer, {**spec, "windows": True, "overlap": 0}, rows.text)
        special = set(base.tokenizer.all_special_ids)
        size = min(len(base.tokenizer), int(base.anatomy.stacks[0].embed.weight.shape[0]))  # type: ignore[union-attr,index]
        facts |= {
            "plain": tuple(row for many in found for row in many),
            "mask": int(base.tokenizer.mask_token_id),
            "ordinary": tuple(i for i in range(size) if i not in special),
        }
        unit = torch.tensor([i for i, many in enumerate(found) for _ in many])
        return masked(Examples((), unit=unit if len(unit) > len(found) else None, facts=facts), FIXED)

    def for_epoch(self, examples: Examples, seed: int, epoch: int) -> Examples:
        """Hide other tokens in every epoch."""
        return masked(examples, f"{seed}/{epoch}")

    def encode_inputs(
        self, base: Base, spec: Mapping[str, Any], texts: Sequence[str], pairs: Sequence[str] | None
    ) -> list[list[Encoded]]:
        """Refuse: masks are filled by `Base.fill`."""
        raise UnsupportedError(f"a {self.kind} adapter fills masks: use base.fill(texts, adapter=...)")

    def losses(
        self, out: Tensor, examples: Examples, index: Sequence[int], spec: Mapping[str, Any], head: nn.Module | None
    ) -> Losses:
        """Sum the losses of the hidden tokens, nats; values are how many of them are predicted rightly."""
        spots = [
            (i, t, label)
            for i, number in enumerate(index)
            for t, label in enumerate(examples.rows[number].labels or ())
            if label != IGNORED
        ]
        row, token, gold = torch.tensor(spots, dtype=torch.long, device=out.device).view(-1, 3).unbind(1)
        logits = out[row, token].float()  # (hidden, V): the head's other rows need no softmax
        if isinstance(head, TiedHead):
            logits = head.logits(logits)
        each = F.cross_entropy(logits, gold, reduction="none")
        none = torch.zeros(len(index), device=out.device)
        right = none.index_add(0, row, (logits.detach().argmax(-1) == gold).float())
        return Losses(none.index_add(0, row, each), none.index_add(0, row, torch.ones_like(each)), right)

    def tensor_loss(self, out: Tensor, labels: Tensor, spec: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Sum the cross-entropies of logits (b, T, V) against token ids (b, T), IGNORED where nothing was hidden."""
        each = F.cross_entropy(out.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return each.sum(1), (labels != IGNORED).sum(1)

    def judge(self, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, found: Found) -> Scores:
        """Compute the perplexity of the hidden tokens, over texts, and the share that is predicted rightly."""
        right = torch.stack(found.values).double().sum()
        unit = torch.arange(len(examples)) if examples.unit is None else examples.unit
        sums, counts = (torch.zeros(examples.units).index_add(0, unit, part) for part in (found.sums, found.counts))
        scores = super().judge(spec, head, examples, Found(sums, counts, []))
        scores.metrics["masked_accuracy"] = float(right / counts.double().sum())
        return scores


def masked(examples: Examples, seed: str) -> Examples:
    """Return examples with tokens hidden; what is hidden depends on the seed and the number of the row only.

    Args:
        examples: with the facts of `MaskedLM.encode`.
        seed: any text.
    """
    facts = examples.facts
    ordinary = facts["ordinary"] if facts["plain"] else ()
    common = frozenset(ordinary)
    rows = tuple(
        hide(row, random.Random(f"{seed}/{number}"), facts["mask"], ordinary, common)
        for number, row in enumerate(facts["plain"])
    )
    return Examples(rows, None, examples.unit, None, examples.cut, facts)


def hide(row: Encoded, draw: random.Random, mask: int, ordinary: Sequence[int], common: frozenset[int]) -> Encoded:
    """Hide 15 % of the ordinary tokens of a row, at least one.

    Args:
        row: the row as it is.
        draw: the random numbers.
        mask: id of the mask token.
        ordinary: ids that a random token is drawn from.
        common: the same ids, to look them up.

    Returns:
        The row with labels where tokens were chosen; without ordinary tokens there are none.
    """
    places = [place for place, token in enumerate(row.ids) if token in common]
    chosen = draw.sample(places, min(len(places), max(1, round(SHARE * len(places)))))
    ids, labels = list(row.ids), [IGNORED] * len(row.ids)
    for place in chosen:
        labels[place] = ids[place]
        kind = draw.random()
        if kind < MASKED:
            ids[place] = mask
        elif kind < MASKED + RANDOM:
            ids[place] = draw.choice(ordinary)
    return Encoded(tuple(ids), row.types, tuple(labels), row.cut)
