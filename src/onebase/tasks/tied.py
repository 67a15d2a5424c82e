"""Where a head for masked tokens starts that is made of a base's own embeddings (`heads.TiedHead`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onebase.encode import IGNORED
from onebase.errors import UnsupportedError
from onebase.heads import TiedHead
from onebase.tasks.frozen import ridge, row_states
from onebase.tasks.task import Examples

if TYPE_CHECKING:
    from onebase.base import Base

# The start: hidden tokens whose frozen states are kept (float32: 31 MB at width 384), ridge penalties per token for
# standardised states, and factors on the product with the embeddings. The last two are chosen on validation.
MOST = 20_000
PENALTIES = (1e-2, 1e-1, 1.0)
FACTORS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0)
CHUNK = 512  # hidden tokens whose logits are held at once: 62 MB at 30,000 words


def tied_sizes(base: Base) -> dict[str, int]:
    """Return the sizes of a tied head for a base.

    Raises:
        UnsupportedError: its embeddings are not at hand as one table.
    """
    from onebase.core.offload import is_offloaded
    from onebase.processes import is_sharded

    table = getattr(base.anatomy.stacks[0].embed, "weight", None)
    if table is None or not table.is_floating_point() or is_offloaded(base.model) or is_sharded(base.model):
        raise UnsupportedError(
            f"{base.id} has no head for masked tokens, and its embeddings are quantized, offloaded or split, so none "
            "can be made of them. Load it whole, or a checkpoint that has such a head: its config names a "
            "...ForMaskedLM"
        )
    return {"words": int(table.shape[0]), "embedding": int(table.shape[1])}


def fit_tied(base: Base, sizes: dict[str, Any], train: Examples, validation: Examples) -> TiedHead:
    """Fit a head on the frozen base: biases to the words' frequency, the map by ridge regression.

    The map is the one of least squares from the states of hidden tokens to the embeddings of the words that stood
    there; penalty and scale of it are chosen on validation by the loss.

    Args:
        base: the base.
        sizes: see `tied_sizes`.
        train, validation: rows with masked tokens.
    """
    head = TiedHead(base.anatomy.hidden_size, **sizes).to(base.device).tie(base)
    vectors, gold = _hidden(base, train)
    held, held_gold = _hidden(base, validation)
    table = base.anatomy.stacks[0].embed.weight.detach().float()  # type: ignore[union-attr,operator]
    with torch.no_grad():
        seen = torch.tensor([i for row in train.facts["plain"] for i in row.ids], device=base.device)
        counts = torch.bincount(seen, minlength=len(table)).float()
        head.words.copy_(((counts + 0.1) / (counts + 0.1).sum()).log())
        head.standardize(vectors)
        inputs = ((vectors - head.center) * head.scale).double()
        targets = table[gold].double()
        trials = []
        for solution in ridge(inputs, targets - targets.mean(0), PENALTIES):
            weight = solution.T.float()
            # in the scale of logits: a mapped state of typical length points at its own word by about 1
            weight = weight / (inputs.float() @ weight.T).square().sum(1).mean().clamp(min=1e-12)
            for factor in FACTORS:
                head.weight.copy_(weight * factor)
                trials.append((_loss(head, held, held_gold), len(trials), weight * factor))
        head.weight.copy_(min(trials)[2])
    return head


def _loss(head: TiedHead, vectors: Tensor, gold: Tensor) -> float:
    parts = zip(vectors.split(CHUNK), gold.split(CHUNK))
    return float(sum(F.cross_entropy(head.logits(head(v)), g, reduction="sum").double() for v, g in parts))


def _hidden(base: Base, examples: Examples, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Return frozen states of hidden tokens (n, D), and their words (n,); of the first rows that hold MOST of them."""
    chosen, count = [], 0
    for i, row in enumerate(examples.rows):
        chosen.append(i)
        count += sum(label != IGNORED for label in row.labels or ())
        if count >= MOST:
            break
    states, words = [], []
    for i, own in row_states(base, examples, chosen, batch_size):
        labels = torch.tensor(examples.rows[i].labels, device=own.device)
        states.append(own[labels != IGNORED].float())
        words.append(labels[labels != IGNORED])
    return torch.cat(states), torch.cat(words)
