"""Embeddings: vectors in which texts that belong together are close. Pairs and triplets, or pairs with a similarity.

`embeddings`: anchors with a positive each, and optionally a negative. Every positive (and negative) of the effective
batch is a candidate for every anchor, and the right one is to be told from the others:

    loss_i = -log( exp(cos(a_i, p_i) / t) / sum_j exp(cos(a_i, c_j) / t) ),   t = 0.05

InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, eq. 4) with in-batch negatives (Henderson et al. 2017, arXiv
1705.00652, eq. 6); t of SimCSE (Gao et al. 2021, arXiv 2104.08821). Candidates that are right too are left out of the
sum: texts equal to the positive or to the anchor, and positives of an equal anchor.

`similarity`: pairs of texts with a number, of which only the order counts, so that any range will do. CoSENT (Su 2022,
https://kexue.fm/archives/8847):

    loss = log( 1 + sum over pairs with s_i > s_j of exp(20 (cos_j - cos_i)) )

There is no head: the base's own score is that of its pooled states as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.encode import Encoded, encode_texts
from onebase.errors import ConfigError, DataError
from onebase.statistics import bootstrap_interval
from onebase.tasks.metrics import rank_correlation
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples, Found, Losses, Prediction, Scores, Task

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows

TEMPERATURE = 0.05
SCALE = 20.0  # of CoSENT: 1 / TEMPERATURE
# Padded tokens of an effective batch beyond which its gradients are computed in two passes: about 300 kB of
# activations a token on a base of 6 layers of 384, so some 2 GB.
CACHE_TOKENS = 8192
CANDIDATES = 10_000  # anchors of a split that are scored, and positives among which each is sought: 400 MB at once


class _Vectors(Task):
    """What both kinds share: several texts per example through the base at once, and embeddings as answers."""

    whole_batch: ClassVar[bool] = True
    embeds: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]]

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check the options."""
        if not isinstance(spec["normalize"], bool):
            raise ConfigError(f"normalize = {spec['normalize']!r}: expected True or False")
        tokens = spec["cache_tokens"]
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ConfigError(f"cache_tokens = {tokens!r}: expected a number of tokens of at least 1")
        return spec | {"pair": False}

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Encode the texts of each role; rows of the examples are the first role's."""
        if not len(rows):
            return Examples(())
        columns = [column for role in self.roles if (column := rows.get(role)) is not None]
        encoded = [encode_texts(base.tokenizer, spec, column) for column in columns]
        numbers: dict[str, int] = {}
        texts = torch.tensor([[numbers.setdefault(t.strip(), len(numbers)) for t in column] for column in columns])
        cut = sum(any(row.cut for row in many) for many in zip(*encoded))
        return Examples(
            tuple(encoded[0]), self.targets(rows), cut=cut, facts={"others": encoded[1:], "texts": texts.t()}
        )

    def targets(self, rows: Rows) -> Tensor | None:
        """Return what the loss compares with, None where the pairs themselves say it."""
        return None

    def inputs(self, examples: Examples, index: Sequence[int]) -> list[Encoded]:
        """Return the rows of the first role, then those of the second, ..."""
        return [column[i] for column in (examples.rows, *examples.facts["others"]) for i in index]

    def encode_inputs(
        self, base: Base, spec: Mapping[str, Any], texts: Sequence[str], pairs: Sequence[str] | None
    ) -> list[list[Encoded]]:
        """Encode texts to be embedded."""
        return [[row] for row in encode_texts(base.tokenizer, spec, texts)]

    def answer(
        self, spec: Mapping[str, Any], head: nn.Module | None, name: str | None, rows: Sequence[Encoded],
        values: Sequence[Tensor], text: str, pair: str | None,
    ) -> Prediction:  # fmt: skip
        """Return the embedding, of length 1 unless the spec says otherwise."""
        vector = values[0].float().cpu()
        return Prediction(name, None, {}, F.normalize(vector, dim=0) if spec["normalize"] else vector, rows[0].cut)


@register_task
class Embeddings(_Vectors):
    """Anchors and positives, told from the other texts of the batch."""

    kind: ClassVar[str] = "embeddings"
    summary: ClassVar[str] = "embeddings, from texts that belong together"
    roles: ClassVar[tuple[str, ...]] = ("anchor", "positive", "negative")
    options: ClassVar[Mapping[str, Any]] = {
        "temperature": TEMPERATURE,
        "normalize": True,
        "cache_tokens": CACHE_TOKENS,
    }

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check the options."""
        if not isinstance(spec["temperature"], (int, float)) or not 0 < spec["temperature"] <= 1:
            raise ConfigError(f"temperature = {spec['temperature']!r}: expected a number above 0, at most 1")
        return super().complete(spec, base, data, given)

    def losses(
        self, out: Tensor, examples: Examples, index: Sequence[int], spec: Mapping[str, Any], head: nn.Module | None
    ) -> Losses:
        """Compute InfoNCE among the texts of these examples: `out` is (k b, D), role by role."""
        vectors = F.normalize(out.float().view(-1, len(index), out.shape[-1]), dim=-1)  # (k, b, D)
        texts = examples.facts["texts"][torch.tensor(list(index))]  # (b, k)
        also = right_too(texts).to(out.device)
        found = (vectors[0] @ vectors[1:].flatten(0, 1).t() / spec["temperature"]).masked_fill(also, float("-inf"))
        sums = F.cross_entropy(found, torch.arange(len(index), device=out.device), reduction="none")
        return Losses(sums, torch.ones_like(sums), vectors.transpose(0, 1))

    def judge(self, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, found: Found) -> Scores:
        """Seek each anchor's positive among all positives of the split (the first 10,000 of a larger one).

        Equal distances count against the answer. Other positives of an equal anchor are neither right nor wrong.
        """
        taken = min(len(examples), CANDIDATES)
        vectors, texts = torch.stack(found.values[:taken]), examples.facts["texts"][:taken]
        ranks = positive_ranks(vectors[:, 0], vectors[:, 1], texts)
        mutual = (1 / ranks.double()).numpy()
        value = float(mutual.mean())
        metrics = {
            "n": taken,
            "mrr": value,
            "recall@1": float((ranks <= 1).double().mean()),
            "recall@10": float((ranks <= 10).double().mean()),
            "candidates": len(texts[:, 1].unique()),
            "loss": float(found.sums.sum() / found.counts.sum()),
        }
        interval = bootstrap_interval(mutual) if taken > 1 else (value, value)
        return Scores("mrr", value, interval, metrics, rows=mutual)


@register_task
class Similarity(_Vectors):
    """Pairs whose cosine should be ordered as their scores are."""

    kind: ClassVar[str] = "similarity"
    summary: ClassVar[str] = "embeddings, from pairs of texts with a similarity"
    roles: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    options: ClassVar[Mapping[str, Any]] = {"normalize": True, "cache_tokens": CACHE_TOKENS}

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse scores that are all equal: there is no order to learn."""
        scores = {float(score) for score in data.train["score"]}
        if len(scores) < 2:
            raise DataError(f"every score of {data.source} is {scores.pop():g}: expected similarities that differ")
        return super().complete(spec, base, data, given)

    def targets(self, rows: Rows) -> Tensor | None:
        """Return the similarities, (n,)."""
        return torch.tensor([float(score) for score in rows["score"]], dtype=torch.float64)

    def losses(
        self, out: Tensor, examples: Examples, index: Sequence[int], spec: Mapping[str, Any], head: nn.Module | None
    ) -> Losses:
        """Compute CoSENT among these pairs, spread evenly over them; `out` is (2 b, D), first texts first."""
        assert examples.targets is not None
        first, second = out.float().view(2, len(index), -1)
        cosine = F.cosine_similarity(first, second, dim=-1)  # (b,)
        actual = examples.targets[torch.tensor(list(index))].to(out.device)
        above = actual[:, None] > actual[None, :]  # i should be closer than j
        wrong = SCALE * (cosine[None, :] - cosine[:, None])[above]
        loss = torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong]), 0)
        return Losses(loss.expand(len(index)), torch.ones_like(cosine), cosine)

    def judge(self, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, found: Found) -> Scores:
        """Compute Spearman's correlation of cosines and scores."""
        assert examples.targets is not None
        rows = torch.stack([torch.stack(found.values).double(), examples.targets], 1).numpy()
        value = rank_correlation(rows)
        metrics = {"n": len(rows), "cosine_spearman": value, "loss": float(found.sums.sum() / found.counts.sum())}
        interval = bootstrap_interval(rows, rank_correlation) if len(rows) > 1 else (value, value)
        return Scores("cosine_spearman", value, interval, metrics, rows=rows)


def right_too(texts: Tensor) -> Tensor:
    """Say which candidates of each anchor are right as well, beside its own positive.

    Args:
        texts: (b, k) numbers of the texts of each example: anchor, positive, and the negative if any; equal texts have
            equal numbers.

    Returns:
        (b, (k - 1) b) True for candidates to leave out: all positives in order, then all negatives.
    """
    anchor, positive = texts[:, 0], texts[:, 1]
    candidates = texts[:, 1:].t().flatten()  # (k - 1) b
    also = (candidates[None] == positive[:, None]) | (candidates[None] == anchor[:, None])
    also[:, : len(texts)] |= anchor[None] == anchor[:, None]
    also[:, : len(texts)].fill_diagonal_(False)
    return also


def positive_ranks(anchors: Tensor, positives: Tensor, texts: Tensor, block: int = 1024) -> Tensor:
    """Rank each anchor's positive among all distinct positives by cosine, 1 is the closest.

    Args:
        anchors, positives: (n, D) of length 1.
        texts: (n, k) numbers of the texts, as in `right_too`.
        block: anchors at once.

    Returns:
        (n,) ranks; candidates as close as the positive come before it.
    """
    seen: dict[int, int] = {}
    for i, text in enumerate(texts[:, 1].tolist()):
        seen.setdefault(text, i)
    first = torch.tensor(list(seen.values()))  # one row of each distinct positive
    place = {text: j for j, text in enumerate(seen)}
    right: dict[int, list[int]] = {}
    for anchor, positive in texts[:, :2].tolist():
        right.setdefault(anchor, []).append(place[positive])
    ranks = []
    for start in range(0, len(anchors), block):
        part = slice(start, start + block)
        near = anchors[part] @ positives[first].t()  # (block, candidates)
        own = torch.tensor([place[text] for text in texts[part, 1].tolist()])
        to_beat = near[torch.arange(len(near)), own].clone()
        for i, anchor in enumerate(texts[part, 0].tolist()):
            near[i, right[anchor]] = -2.0  # below every cosine
        ranks.append(1 + (near >= to_beat[:, None]).sum(1))
    return torch.cat(ranks)
