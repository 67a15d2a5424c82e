"""Deltas of compositions: averages of what parts give, AdapterFusion, and modules that only refer to their parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.contracts import AdapterModule, Delta, SiteDelta
from onebase.core.plan import At

if TYPE_CHECKING:
    from onebase.adapter import Adapter

PENALTY = 0.01  # weight of |I - V|^2 in AdapterFusion's loss: the setting of the authors' library


class Held(AdapterModule):
    """The deltas of another adapter as they are now: nothing is copied, registered, trained or saved."""

    def __init__(self, adapter: Adapter):
        nn.Module.__init__(self)
        self.held = (adapter,)  # a tuple registers nothing

    def items(self) -> Iterator[tuple[str, SiteDelta]]:
        """Yield (site name, delta) of the adapter."""
        yield from self.held[0].module.items()


class Derived(AdapterModule):
    """Deltas that are computed from parts whenever the adapter is built: they are not trained and not saved.

    Args:
        deltas: site name -> delta.
        facts: what was given up, for people.
    """

    def __init__(self, deltas: Mapping[str, SiteDelta], facts: Mapping[str, float] | None = None):
        nn.Module.__init__(self)
        for delta in deltas.values():
            delta.requires_grad_(False).eval()
        self.held, self.facts = (dict(deltas),), dict(facts or {})

    def items(self) -> Iterator[tuple[str, SiteDelta]]:
        """Yield (site name, delta)."""
        yield from self.held[0].items()


class Fused(AdapterModule):
    """AdapterFusion's attention at every site: the only trained part."""

    def penalty(self) -> Tensor | None:
        """Return what keeps V near the identity: .01 times the sum over sites of |I - V|^2."""
        values = [delta.V for _, delta in self.items() if isinstance(delta, FusionDelta)]
        return PENALTY * torch.stack([(v - torch.eye(len(v), device=v.device)).square().sum() for v in values]).sum()


class _Several(Delta):
    """Several deltas of one site, whose parameters belong to others."""

    def __init__(self, deltas: Sequence[Delta]):
        super().__init__()
        self.chain = tuple(deltas)
        self.reads_positions = any(delta.positional for delta in deltas)

    @property
    def positional(self) -> bool:  # type: ignore[override]
        """Whether one of them reads positions."""
        return self.reads_positions


class AverageDelta(_Several):
    """``h + sum_i w_i (f_i(x, h) - h)``: a weighted sum of what each delta changes."""

    def __init__(self, deltas: Sequence[Delta], weights: Sequence[float]):
        super().__init__(deltas)
        self.weights = tuple(weights)

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Add the weighted changes."""
        new = h
        for delta, weight in zip(self.chain, self.weights):
            new = new + weight * (delta(x, h, at) - h)
        return new

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add the weighted changes of weight and bias."""
        new, new_bias = weight, bias
        for delta, share in zip(self.chain, self.weights):
            own, own_bias = delta.merged(weight, bias)
            new = new + share * (own - weight)
            if own_bias is not None:
                change = share * (own_bias if bias is None else own_bias - bias)
                new_bias = change if new_bias is None else new_bias + change
        return new, new_bias


class FusionDelta(_Several):
    """``h + sum_i p_i V u_i`` with u_i = f_i(x, h) - h and p = softmax_i((Q h + q) . (K u_i + k))."""

    def __init__(self, deltas: Sequence[Delta], d: int, generator: torch.Generator):
        super().__init__(deltas)
        self.Q = nn.Parameter(torch.randn(d, d, generator=generator) * 0.02)  # BERT's std, as in the authors' code
        self.K = nn.Parameter(torch.randn(d, d, generator=generator) * 0.02)
        self.q, self.k = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        self.V = nn.Parameter(torch.eye(d))

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Add what attention over the parts gives."""
        changes = torch.stack([delta(x, h, at) - h for delta in self.chain], -2)  # (..., n, d)
        query = F.linear(h, self.Q.to(h.dtype), self.q.to(h.dtype))
        keys = F.linear(changes, self.K.to(h.dtype), self.k.to(h.dtype))
        weights = (query[..., None, :] * keys).sum(-1).softmax(-1)  # (..., n)
        return h + F.linear((weights[..., None] * changes).sum(-2), self.V.to(h.dtype))
