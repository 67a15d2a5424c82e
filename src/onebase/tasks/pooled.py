"""Tasks whose head reads a pooled vector: of a text or its windows, of a pair read at once, or of its texts apart.

A pair can be read in two ways. `joint`: both texts in one row, so that attention compares them word by word
(cross-encoder). `apart`: a row for each text, and the head reads ``[u, v, |u - v|, u * v, cos(u, v)]`` of their pooled
vectors at unit length (Sentence-BERT, arXiv 1908.10084, section 3, with the product of InferSent, arXiv 1705.02364, and
the cosine itself). Bases that were trained to embed sentences are strong at the second without any adapter, so the
base's own score is the better of both on validation, whichever the adapter reads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from onebase.encode import OVERLAP, Encoded, encode_windows
from onebase.errors import ConfigError, DataError
from onebase.heads import LinearHead, pool
from onebase.tasks.frozen import frozen_vectors, pair_features, pair_width
from onebase.tasks.task import Examples, Found, Losses, Task, choose_option, first_rows

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows

PAIRS = ("joint", "apart")


class PooledTask(Task):
    """A head on pooled vectors; subclasses say what targets are, what the loss is and how a head is fitted.

    Class attributes:
        default_pairs: how pairs are read unless the caller says otherwise, or the frozen base (`settle`).
    """

    default_pairs: ClassVar[str] = "joint"
    options: ClassVar[Mapping[str, Any]] = {"windows": True, "overlap": OVERLAP, "pairs": "auto"}

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def targets(self, spec: Mapping[str, Any], rows: Rows) -> Tensor:
        """Return what the loss compares with, (n, ...) of n rows."""
        raise NotImplementedError

    def new_head(self, spec: Mapping[str, Any], width: int) -> LinearHead:
        """Build the head for features of `width`."""
        raise NotImplementedError

    def fit_head(
        self, spec: Mapping[str, Any], features: Tensor, targets: Tensor, held: Tensor, held_targets: Tensor
    ) -> LinearHead:
        """Fit a head on features (n, F) of the frozen base, its penalty chosen on the held features."""
        raise NotImplementedError

    # -- what an adapter is given ----------------------------------------------------------------------------------

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settle how pairs are read."""
        return self._choose_pairs(spec)

    def _choose_pairs(self, spec: dict[str, Any]) -> dict[str, Any]:
        how = choose_option("pairs", spec.pop("pairs", "auto"), ("auto", *PAIRS))
        if not spec["pair"]:
            if how != "auto":
                raise ConfigError(f"pairs = {how!r} has no meaning for single texts: leave it out")
            return spec
        if how == "apart" and spec["template"]:
            raise ConfigError("a template joins the two texts, so pairs = 'apart' cannot read them apart: drop one")
        if how == "auto" and (spec["template"] or self.default_pairs == "apart"):
            how = "joint" if spec["template"] else "apart"
        return spec | {"pairs": how}

    def without_data(self, spec: dict[str, Any], base: Base) -> dict[str, Any]:
        """Settle how pairs are read, where no scores on the base can tell.

        Classes weigh the same, unless the spec has weights: there are no rows to count.
        """
        how = spec.pop("class_weights", "none")
        if how not in ("auto", "none"):
            raise ConfigError(f"class_weights = {how!r} are counted in training rows: give weights, one per label")
        spec = self._choose_pairs(spec)
        return spec | {"pairs": "joint"} if spec.get("pairs") == "auto" else spec

    def settle(self, base: Base, spec: dict[str, Any], examples: dict[str, Examples]) -> dict[str, Any]:
        """Read pairs apart where that is clearly better on the frozen base: by more than a standard error.

        A base that was trained to embed sentences knows there what a few thousand joint rows do not teach it.
        """
        if spec.get("pairs") != "auto":
            return spec
        train, validation = examples["train"], examples["validation"]
        ways = {how: {**spec, "pairs": how} for how in PAIRS}
        (_, joint, noise), (_, apart, _) = (self._fitted(base, ways[how], train, validation) for how in PAIRS)
        return ways["apart" if apart > joint + noise else "joint"]

    def settled(self, spec: Mapping[str, Any], examples: dict[str, Examples]) -> dict[str, Examples]:
        """Return rows of pairs as they are read now."""
        if "pairs" not in spec:
            return examples
        return {split: _read_as(spec["pairs"], part) for split, part in examples.items()}

    def head(self, spec: Mapping[str, Any], width: int) -> nn.Module:
        """Build the head for the vectors that the adapter reads."""
        return self.new_head(spec, pair_width(width) if reads_apart(spec) else width)

    def own_head(self, spec: Mapping[str, Any], width: int, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
        """Build the base's own head, which may read pairs in the other way: its weight tells."""
        apart = shapes["weight"][-1] == pair_width(width)
        return self.head({**spec, "pairs": PAIRS[apart]} if "pairs" in spec else spec, width)

    # -- data ------------------------------------------------------------------------------------------------------

    def texts(self, rows: Rows) -> tuple[Sequence[str], Sequence[str] | None]:
        """Return the first and the second texts."""
        return rows.text, rows.text_pair

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Encode texts and targets; of a pair the other way of reading it is kept for the base's own head."""
        if not len(rows):
            return Examples((), torch.zeros(0))
        texts, pairs = self.texts(rows)
        if (pairs is not None) != bool(spec["pair"]):
            raise DataError(f"the adapter was trained on {'pairs of texts' if spec['pair'] else 'single texts'}")
        targets = self.targets(spec, rows)
        if "pairs" not in spec:
            return _with_targets(_rows_of(encode_windows(base.tokenizer, spec, texts, pairs)), targets)
        assert pairs is not None
        ways = {how: _with_targets(self._read_pairs(base, spec, how, texts, pairs), targets) for how in PAIRS}
        apart = reads_apart(spec)
        found, other = ways[PAIRS[apart]], ways[PAIRS[not apart]]
        return replace(found, facts={**found.facts, "other": other, "fits": {}})

    def _read_pairs(
        self, base: Base, spec: Mapping[str, Any], how: str, texts: Sequence[str], pairs: Sequence[str]
    ) -> Examples:
        if how == "joint":
            return _rows_of(encode_windows(base.tokenizer, {**spec, "windows": False}, texts, pairs))
        alone = {**spec, "windows": False, "template": ""}
        one, two = ([many[0] for many in encode_windows(base.tokenizer, alone, side)] for side in (texts, pairs))
        cut = sum(a.cut + b.cut > 0 for a, b in zip(one, two))
        return Examples(tuple(one), cut=cut, facts={"second": tuple(two)})

    def encode_inputs(
        self, base: Base, spec: Mapping[str, Any], texts: Sequence[str], pairs: Sequence[str] | None
    ) -> list[list[Encoded]]:
        """Encode texts to be answered: windows of a text, one row of a pair, or its two rows."""
        if not reads_apart(spec):
            return encode_windows(base.tokenizer, spec, texts, pairs)
        assert pairs is not None
        found = self._read_pairs(base, spec, "apart", texts, pairs)
        return [[one, two] for one, two in zip(found.rows, found.facts["second"])]

    # -- computing -------------------------------------------------------------------------------------------------

    def inputs(self, examples: Examples, index: Sequence[int]) -> list[Encoded]:
        """Return the rows; of pairs that are read apart the second texts follow the first ones."""
        second = examples.facts.get("second")
        return [examples.rows[i] for i in index] + ([] if second is None else [second[i] for i in index])

    def read(self, head: nn.Module | None, states: Tensor, mask: Tensor, spec: Mapping[str, Any]) -> Tensor:
        """Return head outputs; of pairs that are read apart the pooled vectors, for a head needs both."""
        vectors = pool(states, mask, spec["pooling"])
        return vectors if head is None or reads_apart(spec) else head(vectors)

    def losses(
        self, out: Tensor, examples: Examples, index: Sequence[int], spec: Mapping[str, Any], head: nn.Module | None
    ) -> Losses:
        """Compute losses per row, each text counting once."""
        assert examples.targets is not None and head is not None
        if reads_apart(spec):
            out = head(pair_features(out[: len(index)], out[len(index) :]))
        place = torch.tensor(list(index))
        sums, counts = self.tensor_loss(out, examples.targets[place].to(out.device), spec)
        share = 1.0 if examples.weight is None else examples.weight[place].to(out.device)
        return Losses(sums * share, counts * share, out)

    def finished(self, spec: Mapping[str, Any], head: nn.Module | None, values: Sequence[Tensor]) -> Tensor:
        """Return the head outputs of one text's rows, (windows, outputs) float32 on the CPU."""
        assert head is not None
        if reads_apart(spec):
            return head(pair_features(values[0][None], values[1][None])).detach().float().cpu()
        return torch.stack([value.detach().float().cpu() for value in values])

    # -- the base's own answer -------------------------------------------------------------------------------------

    def own(
        self, base: Base, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples
    ) -> tuple[Mapping[str, Any], Examples]:
        """Return spec and examples in the way in which the base's own head reads pairs."""
        if "pairs" not in spec or not isinstance(head, LinearHead) or not len(examples):
            return spec, examples
        apart = head.weight.shape[1] == pair_width(base.anatomy.hidden_size)
        if apart == reads_apart(spec):
            return spec, examples
        return {**spec, "pairs": PAIRS[apart]}, examples.facts["other"]

    def base_heads(
        self, base: Base, spec: Mapping[str, Any], train: Examples, validation: Examples
    ) -> tuple[nn.Module, nn.Module]:
        """Fit heads on frozen vectors, for pairs in both ways: the best one on validation, and the adapter's start."""
        if "pairs" not in spec:
            head = self._fit(base, spec, train, validation)[0]
            return head, head
        start, good, _ = self._fitted(base, spec, train, validation)
        other = {**spec, "pairs": PAIRS[not reads_apart(spec)]}
        rival, better, _ = self._fitted(base, other, train, validation)
        return (rival if better > good else start), start

    def _fitted(
        self, base: Base, spec: Mapping[str, Any], train: Examples, validation: Examples
    ) -> tuple[LinearHead, float, float]:
        """Fit a head for one way of reading pairs, once: it is kept with the training rows, whichever way they show."""
        how, kept = spec["pairs"], train.facts["fits"]
        if how not in kept:
            kept[how] = self._fit(base, spec, _read_as(how, train), _read_as(how, validation))
        head, rank, noise = kept[how]
        return copy.deepcopy(head), rank, noise

    def _fit(
        self, base: Base, spec: Mapping[str, Any], train: Examples, validation: Examples
    ) -> tuple[LinearHead, float, float]:
        """Return the best head of one way of reading, its rank on validation, and the standard error of that."""
        assert train.targets is not None and validation.targets is not None
        vectors, held = frozen_vectors(base, train, spec), frozen_vectors(base, validation, spec)
        targets, held_targets = train.targets[first_rows(train)], validation.targets[first_rows(validation)]
        heads = [self.fit_head(spec, vectors, targets, held, held_targets)]
        if reads_apart(spec):  # the cosine alone: with few rows the rest is noise
            alone = self.fit_head(spec, vectors[:, -1:], targets, held[:, -1:], held_targets)
            heads.append(self._widened(spec, alone, heads[0]))
        if "pairs" not in spec:
            return heads[0], 0.0, 0.0
        ranks = [self._rank(spec, head, held, validation) for head in heads]
        best, (rank, noise) = max(zip(heads, ranks), key=lambda pair: pair[1][0])
        if reads_apart(spec):
            slow_down(best, vectors.shape[1] / base.anatomy.hidden_size)
        return best, rank, noise

    def _rank(
        self, spec: Mapping[str, Any], head: LinearHead, held: Tensor, validation: Examples
    ) -> tuple[float, float]:
        with torch.no_grad():
            found = Found(torch.zeros(len(held)), torch.zeros(len(held)), list(head(held)))
        self.finish(spec, head, validation, found)
        scores = self.judge(spec, head, validation, found)
        return scores.rank, (scores.interval[1] - scores.interval[0]) / (2 * 1.96)

    def _widened(self, spec: Mapping[str, Any], narrow: LinearHead, like: LinearHead) -> LinearHead:
        """Return a head on all features that reads the last one as `narrow` does."""
        wide = self.new_head(spec, like.weight.shape[1])
        wide.load_state_dict(like.state_dict())
        with torch.no_grad():
            wide.weight.zero_()
            wide.weight[:, -1:], wide.bias[:] = narrow.weight, narrow.bias
            wide.center[-1:], wide.scale[-1:] = narrow.center, narrow.scale
        return wide


def slow_down(head: LinearHead, factor: float) -> None:
    """Divide the inputs of a head by a factor and multiply its weights by it: the same outputs, slower to change.

    A step of Adam moves every weight by the rate, and so an output by the rate times the number of features. Pairs that
    are read apart have four times as many, most of them noise beside the cosine: on 400 pairs of STS-B the validation
    correlation fell from .867 to .853 in three epochs, and stayed at .867 with a head that is slower by four.
    """
    with torch.no_grad():
        head.scale.div_(factor)
        head.weight.mul_(factor)


def _read_as(how: str, examples: Examples) -> Examples:
    """Return rows of pairs as one way reads them."""
    other = examples.facts.get("other")
    if other is None or ("second" in examples.facts) == (how == "apart"):
        return examples
    rest = {key: value for key, value in examples.facts.items() if key not in ("other", "second")}
    back = replace(examples, facts={key: v for key, v in examples.facts.items() if key != "other"})
    plain = None if examples.plain is None else _read_as(how, examples.plain)
    return replace(other, facts={**rest, **other.facts, "other": back}, plain=plain)


def reads_apart(spec: Mapping[str, Any]) -> bool:
    """Whether the two texts of a pair are read in rows of their own."""
    return spec.get("pairs") == "apart"


def _rows_of(found: list[list[Encoded]]) -> Examples:
    """Return examples of texts that were encoded as windows: unit and weight are None where no text has several."""
    flat = tuple(row for many in found for row in many)
    cut = sum(many[0].cut > 0 for many in found)
    if len(flat) == len(found):
        return Examples(flat, cut=cut)
    unit = torch.tensor([i for i, many in enumerate(found) for _ in many])
    weight = torch.tensor([1.0 / len(many) for many in found for _ in many])
    return Examples(flat, None, unit, weight, cut)


def _with_targets(examples: Examples, targets: Tensor) -> Examples:
    return replace(examples, targets=targets if examples.unit is None else targets[examples.unit])
