"""The contracts a method can fill, and the one module an adapter is made of.

Shapes used everywhere: B rows, T tokens, d features, P virtual tokens, D width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from onebase.errors import UnsupportedError

if TYPE_CHECKING:
    from onebase.core.bank import Bank
    from onebase.core.plan import At


class Delta(nn.Module):
    """A pointwise change of the value at a site: ``h' = f(x, h)`` on (..., d).

    The leading dimensions carry no meaning: the same delta serves padded, packed, flattened and continuously
    batched tokens. Subclasses implement `forward` and read nothing but its arguments and their own parameters.

    Class attributes:
        positional: reads `at.positions` or `at.lengths`; the leading dimensions are then (b, T), and packed rows,
            which hold several texts, are refused.

    Attributes:
        dropout: rate at which it drops values with `at.dropout` while training.
    """

    positional: ClassVar[bool] = False
    dropout: float = 0.0

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Return the new value at the site.

        Args:
            x: (..., d_in) the input of the tapped module; at an exit site, the tensor the residual carries.
            h: (..., d_out) the value at the site.
            at: where the tokens are (position, real-token mask, prompt length) and this job's dropout.

        Returns:
            (..., d_out), dtype of `h`.
        """
        raise NotImplementedError

    def signature(self) -> Hashable | None:
        """Return all that `forward` uses beside its arguments and the values of parameters: shapes, scales, kinds.

        Deltas of one class with equal signatures are computed together by `bank`. None, the default: by `forward` only.
        `dropping()` is part of it, where `bank` drops values with `Bank.dropout`.
        """
        return None

    def dropping(self) -> float:
        """Return the rate at which values are dropped now: 0 outside of training."""
        return self.dropout if self.training else 0.0

    def bank(self, bank: Bank, x: Tensor, h: Tensor) -> Tensor:
        """Return for several deltas of this signature what `forward` returns for each; an optimisation of `forward`.

        Args:
            bank: gives the parameters of each batch element's delta; this delta's own are not to be read.
            x, h: (b, t, d_in) and (b, t, d_out); the tokens of one batch element belong to one delta.

        Returns:
            (b, t, d_out), dtype of `h`; no element may depend on another.
        """
        raise NotImplementedError

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight and bias with which the base alone would compute what this delta makes of them.

        Args:
            weight: (d_out, d_in) of a linear map, or (d,) the gain of a norm, as the module stores it.
            bias: (d_out,), or None.

        Raises:
            UnsupportedError: the change is no change of weights.
        """
        raise UnsupportedError(f"{type(self).__name__} is no change of weights: it cannot be merged into the base")


class KVDelta(nn.Module):
    """Learned keys and values that every token of an attention module can see (prefix tuning).

    Attributes:
        shift: positions that they take: those of the text start behind them. 0: they have none.
        slides: a sliding window passes over them, as they stand at positions 0 to shift - 1.
    """

    shift: int = 0
    slides: bool = False

    def kv(self) -> tuple[Tensor, Tensor]:
        """Return K and V, each (P, key/value heads, head dim), as the attention function sees them."""
        raise NotImplementedError


class PromptDelta(nn.Module):
    """Virtual tokens placed directly before a row's first real token (prompt tuning).

    Attributes:
        embedded: they stand among what the embeddings return, behind positions and norms: texts keep their positions.
        behind: real tokens of each row that stay in front of them.
        leads: callers get the state of the first of them in place of their own first token's.
    """

    embedded: bool = False
    behind: int = 0
    leads: bool = False

    def tokens(self) -> Tensor:
        """Return the virtual tokens, (P, D), in the space of the embedded input."""
        raise NotImplementedError


class TokenDelta(nn.Module):
    """Learned input embeddings of some token ids."""

    def ids(self) -> Tensor:
        """Return the ids, (k,) long. Ids beyond the base's vocabulary are words that only this adapter knows."""
        raise NotImplementedError

    def rows(self) -> Tensor:
        """Return their embeddings, (k, D), in the space of the embedded input."""
        raise NotImplementedError


SiteDelta = Delta | KVDelta | PromptDelta | TokenDelta


class AdapterModule(nn.Module):
    """What a method builds: one module per adapter, a shared part and deltas by site name.

    Args:
        deltas: site name -> delta. Deltas may refer to `shared`.
        shared: parameters used by several sites (a projection, a reparametrisation), or None.
    """

    def __init__(self, deltas: Mapping[str, SiteDelta], shared: nn.Module | None = None):
        super().__init__()
        if shared is not None:
            self.shared = shared  # registered first, so that a shared tensor is saved under this name
        self.deltas = nn.ModuleDict(dict(deltas))

    def items(self) -> Iterator[tuple[str, SiteDelta]]:
        """Yield (site name, delta)."""
        yield from self.deltas.items()  # type: ignore[misc]

    def fold(self) -> AdapterModule:
        """Return the module to keep when training ends: parts used only for training are folded away.

        The outputs do not change. The default keeps everything.
        """
        return self

    def penalty(self) -> Tensor | None:
        """Return a scalar that training adds to the loss once per optimizer step, or None."""
        return None

    def stepped(self, step: int, steps: int) -> None:
        """Look back on an optimizer step while its gradients are still there. The default does nothing.

        What is kept from one step to the next belongs in persistent buffers: they are part of `tensors()`, so the
        best epoch is restored and a resumed run goes on exactly.

        Args:
            step: optimizer steps made so far, 1 to `steps`.
            steps: of the whole training.
        """

    def fit(self, shapes: Mapping[str, torch.Size]) -> None:
        """Prepare for stored tensors of these shapes, where training decides them. The default does nothing."""

    def tensors(self) -> dict[str, Tensor]:
        """Return every saved tensor once: parameters and persistent buffers, shared ones under one name."""
        seen: set[int] = set()
        found: dict[str, Tensor] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[name] = tensor
        return found

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors`, named as `tensors()` names them, into this module. Names and shapes are checked before."""
        with torch.no_grad():
            for name, own in self.tensors().items():
                own.copy_(tensors[name])
