"""What a task is: rows to tokens, head, loss, score and answer, as functions of plain values.

A task holds no state. What belongs to one adapter (labels, pooling, maximum length, template, ...) is its `spec`, a
mapping of JSON values that is stored with it; what is learned is the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from onebase.encode import Encoded, prompt_ids
from onebase.errors import ConfigError, UnsupportedError
from onebase.heads import pool
from onebase.tasks.metrics import Metric, metric_of

if TYPE_CHECKING:
    import numpy as np

    from onebase.base import Base
    from onebase.data import Data, Rows

# What a forward gives the task: states of the stack that heads read, or logits of the base's own LM head.
Surface = Literal["states", "logits"]


@dataclass(frozen=True, eq=False)
class Examples:
    """A split, encoded once.

    A unit is what is scored: a text, a pair, a document. A long document gives several rows (windows).

    Attributes:
        rows: n encoded rows.
        targets: (n, ...) what the loss compares with; None where the rows' token labels are the targets.
        unit: (n,) number of the unit each row belongs to; None: row i is unit i.
        weight: (n,) share of a row in the loss, 1 / windows of its unit; None: 1.
        cut: units that lost tokens to the maximum length.
        facts: what else scoring needs, by name.
        plain: the same units as the base's own tokenizer cuts them, where the adapter's view of it has more words.
    """

    rows: tuple[Encoded, ...]
    targets: Tensor | None = None
    unit: Tensor | None = None
    weight: Tensor | None = None
    cut: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    plain: Examples | None = None

    @property
    def for_base(self) -> Examples:
        """What the plain base can read: it knows no word of an adapter."""
        return self if self.plain is None else self.plain

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.rows) if self.unit is None else int(self.unit.max()) + 1 if len(self.unit) else 0

    def batches(self, order: Sequence[int], size: int, tokens: int | None = None) -> Iterator[list[int]]:
        """Cut indices into batches of rows with similar length.

        Args:
            order: which rows.
            size: most rows of a batch.
            tokens: most tokens of a batch, padding not counted; a single row may have more. None: any number.
        """
        batch: list[int] = []
        total = 0
        for i in sorted(order, key=lambda i: len(self.rows[i].ids)):
            length = len(self.rows[i].ids)
            if batch and (len(batch) == size or (tokens is not None and total + length > tokens)):
                yield batch
                batch, total = [], 0
            batch.append(i)
            total += length
        if batch:
            yield batch


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses of some rows.

    Attributes:
        sums: (b,) loss of each row, weighted and summed over its targets.
        counts: (b,) weight of each row's targets: a mean is sums.sum() / counts.sum().
        values: what scoring reads of each row: head outputs, first dimension b, or a list of b tensors; () if nothing.
    """

    sums: Tensor
    counts: Tensor
    values: Tensor | Sequence[Tensor] = ()


@dataclass(frozen=True, eq=False)
class Found:
    """Losses and values of a whole split, on the CPU, in the order of its rows.

    Attributes:
        sums, counts: (n,) as in `Losses`.
        values: n tensors, or [] where the task reads none.
    """

    sums: Tensor
    counts: Tensor
    values: list[Tensor]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one model on one split.

    Attributes:
        metric: name of the metric that counts, see `metrics.METRICS`.
        value: its value.
        interval: 95 % interval of it.
        metrics: every metric; `n` is the number of units.
        rows: (units, k) what the metric is computed from, for paired tests.
        correct: per unit whether the answer was right, where answers are right or wrong.
        predicted: per unit the answer as text, where there is one.
    """

    metric: str
    value: float
    interval: tuple[float, float]
    metrics: dict[str, Any]
    rows: np.ndarray | None = field(default=None, repr=False)
    correct: tuple[bool, ...] = field(default=(), repr=False)
    predicted: tuple[str, ...] = field(default=(), repr=False)

    @property
    def about(self) -> Metric:
        """The metric that counts."""
        return metric_of(self.metric)

    @property
    def rank(self) -> float:
        """What training maximises: the metric, and of two equal ones the smaller loss (validation rows are few)."""
        value = self.value if self.about.higher else -self.value
        return value - 1e-6 * min(float(self.metrics.get("loss", 0.0)), 100.0)


@dataclass(frozen=True)
class Span:
    """A piece of a text.

    Attributes:
        start, end: character offsets, end excluded.
        text: the piece.
        label: what it is: an entity's type, 'mask' for a filled mask, 'no answer'; '' for an answer to a question.
        probability: of the piece, 0 to 1.
    """

    start: int
    end: int
    text: str
    label: str = ""
    probability: float = 1.0


@dataclass(frozen=True, eq=False)
class Prediction:
    """What one text gives. Fields that do not belong to the adapter's task keep their defaults.

    Attributes:
        adapter: the adapter that answered, None for the plain base.
        label: most probable label, None where there is none.
        probabilities: label -> probability.
        embedding: (D,) pooled states, float32, for rows without a head; else None.
        cut: tokens that the maximum length removed from this text.
        windows: pieces that the text was read in.
        value: a number: of a regression, or a relevance in 0 to 1.
        labels: labels above their thresholds, of a task with several labels per text; else None.
        spans: entities, or answers, best first; else None.
    """

    adapter: str | None
    label: str | None
    probabilities: dict[str, float]
    embedding: Tensor | None = None
    cut: int = 0
    windows: int = 1
    value: float | None = None
    labels: tuple[str, ...] | None = None
    spans: tuple[Span, ...] | None = None

    def facts(self) -> dict[str, Any]:
        """Return what this prediction says, as JSON values, without the fields that do not belong to its task."""
        found: dict[str, Any] = {}
        if self.label is not None:
            found |= {"label": self.label, "probability": self.probabilities.get(self.label)}
        if self.labels is not None:
            found["labels"] = list(self.labels)
        if self.probabilities:
            found["probabilities"] = self.probabilities
        if self.value is not None:
            found["value"] = self.value
        if self.spans is not None:
            found["spans"] = [vars(span) for span in self.spans]
        if self.embedding is not None:
            found["embedding"] = self.embedding.tolist()
        return found | {"cut": self.cut} | ({"windows": self.windows} if self.windows > 1 else {})


class Task:
    """One kind of task. Subclasses override what differs; the defaults are those of a head on a pooled vector.

    Class attributes:
        kind: the registered name.
        summary: one line for lists.
        surface: what a forward must give, where the spec does not decide: see `surface_of`.
        writes: answers by generating text; else by `predict`.
        labelled: the spec has label names.
        places: places that a template may have, each must be there.
        options: settings of the task beside max_length, template and pooling -> default.
        learned: keys that `complete` adds to the spec.
        prompted: the tokens before a row's first target are a prompt, which deltas at positions tell from its answer.
        whole_batch: the loss couples the rows of an effective batch, which is then never cut into micro-batches.
        embeds: answers with an embedding, and nothing else.
        reads: what its inputs are: 'text', or 'images'.
    """

    kind: ClassVar[str]
    summary: ClassVar[str] = ""
    surface: ClassVar[Surface] = "states"
    writes: ClassVar[bool] = False
    labelled: ClassVar[bool] = False
    places: ClassVar[tuple[str, ...]] = ("text",)
    options: ClassVar[Mapping[str, Any]] = {}
    learned: ClassVar[tuple[str, ...]] = ()
    prompted: ClassVar[bool] = False
    whole_batch: ClassVar[bool] = False
    embeds: ClassVar[bool] = False
    reads: ClassVar[str] = "text"

    # -- what an adapter is given ----------------------------------------------------------------------------------

    def check_base(self, base: Base) -> None:
        """Raise UnsupportedError where a base cannot do this task."""
        if base.reads_images:
            raise UnsupportedError(
                f"{base.id} reads images, and {self.kind} data is text: bring a column of picture files (image, "
                "label), or a folder with one folder of pictures per class"
            )
        if self.surface == "logits" and not base.has_lm_head:
            raise UnsupportedError(
                f"{self.kind} needs a base that writes text; {base.id} is an encoder. Use a decoder, or label the rows."
            )

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Add to a spec what this task reads from the training data; checks what the data must have.

        Args:
            spec: kind, labels, pooling, max_length, template, pair and the task's options are set already.
            base: the base.
            data: the whole data set.
            given: what the caller set: max_length, template, pooling, options.
        """
        return spec

    def without_data(self, spec: dict[str, Any], base: Base) -> dict[str, Any]:
        """Add to a spec that is given by hand what `complete` would take from training data, where it is missing.

        Args:
            spec: kind, labels, pooling, max_length, template, pair and the task's options are set already.
            base: the base.
        """
        return spec

    def settle(self, base: Base, spec: dict[str, Any], examples: dict[str, Examples]) -> dict[str, Any]:
        """Return the final spec: what the frozen base's answers to the encoded rows decide is settled."""
        return spec

    def settled(self, spec: Mapping[str, Any], examples: dict[str, Examples]) -> dict[str, Examples]:
        """Return encoded rows as the spec that was settled for them reads them."""
        return examples

    def surface_of(self, spec: Mapping[str, Any]) -> Surface:
        """Return what a forward must give for an adapter of this spec."""
        return self.surface

    def head(self, spec: Mapping[str, Any], width: int) -> nn.Module | None:
        """Build the head for vectors of `width`; None where there is none."""
        return None

    # -- data ------------------------------------------------------------------------------------------------------

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Encode a split with its targets. An empty split gives empty examples."""
        raise NotImplementedError

    def encode_inputs(
        self, base: Base, spec: Mapping[str, Any], texts: Sequence[str], pairs: Sequence[str] | None
    ) -> list[list[Encoded]]:
        """Encode texts to be answered: per text its rows (one, or its windows)."""
        raise UnsupportedError(f"a {self.kind} adapter writes text: use base.generate")

    def for_epoch(self, examples: Examples, seed: int, epoch: int) -> Examples:
        """Return the training rows of an epoch: a function of the seed, the epoch and the rows, so that runs repeat.

        Args:
            examples: the encoded training rows.
            seed: of the run.
            epoch: 1 is the first.
        """
        return examples

    def prompt(self, base: Base, spec: Mapping[str, Any], prompt: Any) -> list[int]:
        """Return the token ids of a prompt, as the training data of this task presents it.

        Args:
            base: the base.
            spec: the adapter's; {} for the plain base.
            prompt: a text; a conversation where the task takes one.
        """
        if not isinstance(prompt, str):
            raise ConfigError(f"a {self.kind} adapter takes text as a prompt, no conversation: pass a string")
        return prompt_ids(base.tokenizer, prompt, base.is_encoder_decoder)

    # -- computing -------------------------------------------------------------------------------------------------

    def inputs(self, examples: Examples, index: Sequence[int]) -> list[Encoded]:
        """Return the rows that go through the base for the examples `index`."""
        return [examples.rows[i] for i in index]

    def read(self, head: nn.Module | None, states: Tensor, mask: Tensor, spec: Mapping[str, Any]) -> Any:
        """Return a head's output per row.

        Args:
            head: the adapter's head, the base's own, or None.
            states: (b, T, D) of the rows, at the callers' tokens.
            mask: (b, T).
            spec: the adapter's.

        Returns:
            (b, ...) or b tensors.
        """
        vectors = pool(states, mask, spec.get("pooling") or "mean")
        return vectors if head is None else head(vectors)

    def losses(
        self, out: Any, examples: Examples, index: Sequence[int], spec: Mapping[str, Any], head: nn.Module | None
    ) -> Losses:
        """Compute losses of the examples `index`.

        Args:
            out: what `read` gave, or LM logits (rows, T, V), for the rows of `inputs(examples, index)`.
            examples, index: which.
            spec, head: the adapter's.
        """
        raise NotImplementedError

    def tensor_loss(self, out: Any, labels: Tensor, spec: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute losses of head outputs against a tensor of labels, for training loops of other libraries.

        Returns:
            Sums and counts per row, as in `Losses`.
        """
        raise UnsupportedError(f"a {self.kind} adapter is trained by onebase.train, not through as_model")

    # -- results ---------------------------------------------------------------------------------------------------

    def base_head(self, base: Base, spec: Mapping[str, Any], train: Examples, validation: Examples) -> nn.Module | None:
        """Fit a head on the frozen base: the base's own answer to this task, and where the adapter's head starts."""
        return None

    def base_heads(
        self, base: Base, spec: Mapping[str, Any], train: Examples, validation: Examples
    ) -> tuple[nn.Module | None, nn.Module | None]:
        """Fit the base's own head, and the head that the adapter's starts from: the same one, unless they read
        different things."""
        head = self.base_head(base, spec, train, validation)
        return head, head

    def own(
        self, base: Base, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples
    ) -> tuple[Mapping[str, Any], Examples]:
        """Return the spec and the examples that the base's own head answers: the adapter's, unless it reads others."""
        return spec, examples

    def own_head(self, spec: Mapping[str, Any], width: int, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module | None:
        """Build the base's own head for stored tensors of these shapes."""
        return self.head(spec, width)

    def finish(self, spec: Mapping[str, Any], head: nn.Module | None, validation: Examples, found: Found) -> None:
        """Set what is chosen on validation when training is over (thresholds), in the head's buffers."""

    def judge(self, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, found: Found) -> Scores:
        """Score a split."""
        raise NotImplementedError

    def extras(
        self, base: Base, spec: Mapping[str, Any], name: str | None, examples: Examples, rows: int
    ) -> dict[str, Any]:
        """Measure what needs more than one forward (writing texts), when results are final.

        Args:
            base: the base.
            spec: the adapter's.
            name: the adapter; None scores the plain base.
            examples: the split.
            rows: at most this many of its first rows; 0 where nobody asked.

        Returns:
            Further metrics.
        """
        if rows:
            raise ConfigError(
                f"generate = {rows}: {self.kind} adapters are not scored by what they write; leave it out"
            )
        return {}

    def answer(
        self, spec: Mapping[str, Any], head: nn.Module | None, name: str | None, rows: Sequence[Encoded],
        values: Sequence[Tensor], text: str, pair: str | None,
    ) -> Prediction:  # fmt: skip
        """Turn the outputs of one text's rows into a prediction.

        Args:
            spec, head: the adapter's.
            name: its name.
            rows: the text's rows.
            values: output of each row.
            text, pair: the text.
        """
        raise NotImplementedError


def per_unit(examples: Examples, values: Sequence[Tensor]) -> Tensor:
    """Average row outputs over the windows of each unit.

    Returns:
        (units, ...) float32.
    """
    stacked = torch.stack([value.float() for value in values])
    if examples.unit is None:
        return stacked
    total = torch.zeros(examples.units, *stacked.shape[1:]).index_add_(0, examples.unit, stacked)
    count = torch.bincount(examples.unit, minlength=examples.units).view(-1, *[1] * (stacked.dim() - 1))
    return total / count


def first_rows(examples: Examples) -> Tensor:
    """Return the number of each unit's first row, (units,)."""
    if examples.unit is None:
        return torch.arange(len(examples))
    first = torch.full((examples.units,), len(examples), dtype=torch.long)
    return first.scatter_reduce(0, examples.unit, torch.arange(len(examples)), "amin")


def choose_option(where: str, value: Any, choices: Sequence[Any]) -> Any:
    """Return a value that is one of `choices`.

    Raises:
        ConfigError: it is not.
    """
    if value not in choices:
        raise ConfigError(f"{where} = {value!r}: expected {', '.join(map(repr, choices))}")
    return value
