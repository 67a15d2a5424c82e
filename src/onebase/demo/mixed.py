"""One batch whose rows alternate over the adapters and the plain base, compared with each row alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch

from onebase.base import Prediction

if TYPE_CHECKING:
    from onebase.base import Base

# (sentence, what its writer meant); the first two are in the test split, the rest in no split
SENTENCES = (
    ("The product is okay but the delivery was catastrophic.", "negative"),
    ("Le produit est correct mais la livraison a été catastrophique.", "negative"),
    ("I would buy these boots again tomorrow, they are wonderful.", "positive"),
    ("La table est livrée en trois cartons avec une notice en quatre langues.", "neutral"),
    ("The kettle leaked on the first day and nobody answers my emails.", "negative"),
    ("Quelle belle surprise, ce restaurant nous a enchantés du début à la fin !", "positive"),
    ("The jacket has two pockets and comes in grey or green.", "neutral"),
    ("Une honte : trois mois d'attente pour un appareil en panne.", "negative"),
    ("Breakfast was superb and the staff could not have been kinder.", "positive"),
    ("Le chargeur mesure douze centimètres et pèse cent grammes.", "neutral"),
)
CLOSE = 1e-4  # float32 kernels sum in another order at another batch width: 1e-6 is usual, 1e-4 would be a mistake


def answer(base: Base, adapters: Sequence[str]) -> dict[str, Any]:
    """Answer all sentences in one `predict` call, then each alone.

    Args:
        base: the base that carries the adapters.
        adapters: their names; rows alternate over them and the plain base.

    Returns:
        rows, the largest difference of a probability and of an embedding value, and whether both are tiny.
    """
    texts = [text for text, _ in SENTENCES]
    turns = cycle([*adapters, None])
    names = [next(turns) for _ in texts]
    together = base.predict(texts, adapter=names, batch_size=len(texts))
    alone = [base.predict(text, adapter=name)[0] for text, name in zip(texts, names)]
    pairs = list(zip(together, alone))
    probability = max(_probability_gap(a, b) for a, b in pairs)
    embedding = max((_embedding_gap(a, b) for a, b in pairs if a.adapter is None), default=0.0)
    return {
        "rows": [_row(found, text, meant) for found, (text, meant) in zip(together, SENTENCES)],
        "max_probability_difference": probability,
        "max_embedding_difference": embedding,
        "equal": max(probability, embedding) < CLOSE,
    }


def _row(found: Prediction, text: str, meant: str) -> dict[str, Any]:
    return {
        "adapter": found.adapter,
        "text": text,
        "meant": meant,
        "label": found.label,
        "probabilities": found.probabilities,
        "embedding_size": None if found.embedding is None else len(found.embedding),
    }


def _probability_gap(a: Prediction, b: Prediction) -> float:
    return max((abs(a.probabilities[label] - b.probabilities[label]) for label in a.probabilities), default=0.0)


def _embedding_gap(a: Prediction, b: Prediction) -> float:
    assert a.embedding is not None and b.embedding is not None
    return float(torch.max(torch.abs(a.embedding - b.embedding)))
