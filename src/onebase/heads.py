"""Task heads: what an adapter reads from the backbone's states, per group of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.base import Base

Pooling = Literal["mean", "first", "last"]


def pool(states: Tensor, mask: Tensor, how: str) -> Tensor:
    """Make one vector of each sequence.

    Args:
        states: (B, T, D).
        mask: (B, T), 1 for real tokens.
        how: 'mean' over real tokens, 'first' or 'last' real token.

    Returns:
        (B, D) in float32.
    """
    states, real = states.float(), mask.bool()
    if how == "mean":
        weight = real.float()
        return (states * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1.0)
    column = torch.arange(states.shape[1], device=states.device)
    if how == "first":
        index = torch.where(real, column, states.shape[1]).amin(1).clamp(max=states.shape[1] - 1)
    elif how == "last":
        index = torch.where(real, column, 0).amax(1)
    else:
        raise ConfigError(f"pooling {how!r}: expected mean, first or last")
    return states[torch.arange(len(states), device=states.device), index]


class LinearHead(nn.Module):
    """A linear map from a vector to one number per output, with a fixed standardisation of the vector.

    The vector is centred and scaled by statistics of the base's vectors on the training texts (identity when they
    are not given): bases differ by orders of magnitude in the scale of their states, and one learning rate then fits
    all of them.

    Args:
        width: D.
        outputs: number of labels or values.
    """

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, width))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.center = nn.Buffer(torch.zeros(width))
        self.scale = nn.Buffer(torch.ones(width))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (..., outputs), float32, of vectors (..., D)."""
        with torch.autocast(vectors.device.type, enabled=False):  # a head is too small to gain from bfloat16
            return nn.functional.linear((vectors.float() - self.center) * self.scale, self.weight, self.bias)

    def take(self, stored: Mapping[str, Tensor], rows: Sequence[tuple[int, int]]) -> None:
        """Compute the same outputs as a stored head, for some outputs.

        The own centre and scale stay: weights and biases are converted to them.

        Args:
            stored: weight, bias, center, scale of a head for vectors of the same width.
            rows: (own output, stored output) pairs.
        """
        other = {name: t.to(self.weight.device, self.weight.dtype) for name, t in stored.items()}
        weight = other["weight"] * other["scale"] / self.scale
        bias = other["bias"] + other["weight"] @ ((self.center - other["center"]) * other["scale"])
        with torch.no_grad():
            for own, old in rows:
                self.weight[own], self.bias[own] = weight[old], bias[old]

    def standardize(self, vectors: Tensor) -> None:
        """Take centre and scale from vectors (n, D)."""
        self.center.copy_(vectors.mean(0))
        spread = vectors.std(0)
        self.scale.copy_(1.0 / spread.clamp(min=1e-2 * float(spread.mean()) + 1e-12))  # a dead feature stays small


class TiedHead(LinearHead):
    """Logits of words from a base's own embeddings, for encoders whose checkpoint has no head for masked tokens.

    A state is mapped to the width of the embeddings; a word's logit is the product with its embedding, plus a bias
    (tied weights: Press and Wolf 2017, arXiv 1608.05859). The embeddings stay the base's.

    Args:
        width: D of the states.
        embedding: width of the base's embeddings.
        words: V, rows of the base's embeddings.
    """

    def __init__(self, width: int, embedding: int, words: int):
        super().__init__(width, embedding)
        self.words = nn.Parameter(torch.zeros(words))
        self._table: Callable[[], Tensor] | None = None  # a function, so that a copied head shares the base's table

    def tie(self, base: Base) -> TiedHead:
        """Read the embeddings of a base.

        Raises:
            ConfigError: they have another size.
        """
        module: Any = base.anatomy.stacks[0].embed
        own, stated = tuple(module.weight.shape), (len(self.words), len(self.bias))
        if own != stated:
            raise ConfigError(f"a head for {stated[0]} words of width {stated[1]}, but the base's embeddings are {own}")
        self._table = lambda: module.weight.detach()
        return self

    def logits(self, vectors: Tensor) -> Tensor:
        """Return (n, V) logits, float32, of mapped states (n, embedding width): what `forward` gives."""
        assert self._table is not None, "a tied head is tied when it is built"
        with torch.autocast(vectors.device.type, enabled=False):
            return nn.functional.linear(vectors.float(), self._table().float(), self.words)


ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": nn.functional.gelu}


class DenseHead(LinearHead):
    """A linear map behind a hidden layer: ``W f(V x + v) + b``, the form of many imported heads.

    What `LinearHead` standardises is the hidden vector.

    Args:
        width: D.
        outputs: number of labels or values.
        hidden: units of the hidden layer.
        activation: f: tanh, relu or gelu.

    Raises:
        ConfigError: another activation.
    """

    def __init__(self, width: int, outputs: int, hidden: int, activation: str):
        super().__init__(hidden, outputs)
        if activation not in ACTIVATIONS:
            raise ConfigError(f"head activation {activation!r}: expected {', '.join(ACTIVATIONS)}")
        self.inner_weight = nn.Parameter(torch.zeros(hidden, width))
        self.inner_bias = nn.Parameter(torch.zeros(hidden))
        self.activation = activation

    def forward(self, vectors: Tensor) -> Tensor:
        """Return (..., outputs), float32, of vectors (..., D)."""
        with torch.autocast(vectors.device.type, enabled=False):
            inner = nn.functional.linear(vectors.float(), self.inner_weight, self.inner_bias)
            return super().forward(ACTIVATIONS[self.activation](inner))

    def take(self, stored: Mapping[str, Tensor], rows: Sequence[tuple[int, int]]) -> None:
        """Compute the same outputs as a stored head of this form, for some outputs."""
        super().take(stored, rows)
        with torch.no_grad():
            self.inner_weight.copy_(stored["inner_weight"])
            self.inner_bias.copy_(stored["inner_bias"])


def make_head(width: int, outputs: int, form: Mapping[str, Any] | None) -> LinearHead:
    """Build a head: linear, or with the hidden layer that `form` states: {"hidden": units, "activation": name}."""
    return LinearHead(width, outputs) if not form else DenseHead(width, outputs, **form)
