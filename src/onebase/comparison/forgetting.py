"""What an adapter makes of the base on neutral text: how much of what the base knew is another answer with it on.

A base with an LM head (causal, or for masked tokens) is asked for its own loss on neutral sentences, in nats per
token, with and without the adapter: `loss`. A base without one has no loss; there the measure is `distance`, the mean
over tokens of 1 - cos(state with the adapter, state without).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from onebase.data import load
from onebase.encode import Encoded, collate, encode_texts, pad_id
from onebase.evaluation import whole
from onebase.examples import encode_rows, token_logits
from onebase.tasks import get_task
from onebase.training.prepare import make_task

if TYPE_CHECKING:
    from onebase.base import Base

# Sentences that are about nothing in particular, written for this.
NEUTRAL = (
    "The meeting starts at nine and ends before noon.", "Please sign the form and send it back by Friday.",
    "Water boils at a lower temperature on high mountains.", "The library is open every day except Sunday.",
    "She put the keys on the table and closed the window.", "A triangle has three sides and three angles.",
    "The train to the coast leaves from the second platform.", "Most birds build their nests in spring.",
    "He wrote a short letter to his brother and went for a walk.", "The river runs through the middle of the town.",
    "Bread is made of flour, water, salt and yeast.", "The museum shows maps that are four hundred years old.",
    "In winter the days are short and the nights are long.", "The teacher asked the class to open their books.",
    "Two roads meet behind the old mill.", "The ship carried wood and grain across the sea.",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Reference:
    """The plain base on neutral text.

    Attributes:
        measure: 'loss' or 'distance'.
        loss: of the base alone, nats per token; 0 where the measure is 'distance'.
        states: (B, T, D) of the base alone, None where the measure is 'loss'.
    """

    measure: str
    loss: float = 0.0
    states: Any = None


def reference(base: Base) -> Reference:
    """Run the plain base, while nothing of it is changed."""
    if _kind(base):
        return Reference("loss", _loss(base, None))
    return Reference("distance", states=_states(base, None)[0])


def forgetting(base: Base, name: str | None, before: Reference) -> dict[str, Any]:
    """Measure an attached adapter, or, with name None, a base that was trained itself.

    Returns:
        {"measure", "base", "adapter", "change"}: change is the adapter's loss minus the base's, or the distance.
    """
    if before.measure == "loss":
        now = _loss(base, name)
        return {"measure": "loss", "base": before.loss, "adapter": now, "change": now - before.loss}
    states, mask = _states(base, name)
    far = 1 - F.cosine_similarity(states, before.states, dim=-1)  # (B, T)
    change = float((far * mask).sum() / mask.sum())
    return {"measure": "distance", "base": 0.0, "adapter": change, "change": change}


def _kind(base: Base) -> str | None:
    if base.has_masked_head and getattr(base.tokenizer, "mask_token_id", None) is not None:
        return "masked-lm"
    return "causal-lm" if base.has_lm_head and not base.is_encoder_decoder else None


def _loss(base: Base, name: str | None) -> float:
    kind = _kind(base)
    assert kind is not None
    data = load([{"text": text} for text in NEUTRAL], task=kind)
    spec, task = make_task(base, data), get_task(kind)
    examples = encode_rows(base, spec, whole(data))
    index = list(range(len(examples)))
    with torch.no_grad():
        out = token_logits(base, name, task.inputs(examples, index), task.prompted)
        found = task.losses(out, examples, index, spec, None)
    return float(found.sums.double().sum() / found.counts.double().sum())


def _states(base: Base, name: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    rows = encode_texts(base.tokenizer, {"template": "", "max_length": 64}, NEUTRAL, None)
    batch = collate([Encoded(r.ids, r.types) for r in rows], pad_id(base.tokenizer), device=base.device)
    with torch.no_grad():
        return base.states(batch, name).float(), batch["attention_mask"].float()
