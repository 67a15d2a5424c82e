"""Dense: an unrestricted change of linear maps.

Formula: h' = h + x dW^T + db,  dW (d_out, d_in), db (d_out,) where `bias` is on.
Parameters: sum over sites of d_in * d_out (+ d_out).
Start: dW and db zero, so the start is exactly the base.
Use: it holds what has no smaller exact form: combinations of adapters, and foreign methods whose change of W is full.
    As a method of training it is fine-tuning of linear maps that can be routed per row.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.bank import Bank, add_product
from onebase.core.contracts import AdapterModule, Delta
from onebase.core.plan import At
from onebase.core.site import Site
from onebase.methods.method import Init, Method, match_linears
from onebase.methods.registry import register


class DenseDelta(Delta):
    """``h + x dW^T + db``."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight)  # (d_out, d_in)
        self.bias = None if bias is None else nn.Parameter(bias)  # (d_out,)

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Add the map of x."""
        bias = None if self.bias is None else self.bias.to(h.dtype)
        return h + F.linear(x.to(h.dtype), self.weight.to(h.dtype), bias)

    def signature(self) -> Hashable | None:
        """Return shapes."""
        return (self.weight.shape, self.bias is None)

    def bank(self, bank: Bank, x: Tensor, h: Tensor) -> Tensor:
        """Add each one's map of x."""
        if self.bias is not None:
            h = h + bank.vector("bias", h)
        return add_product(h, x.to(h.dtype), bank.stacked("weight", h))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add dW and db; a db of zero needs no bias."""
        if self.bias is None or (bias is None and not bool(self.bias.any())):
            return weight + self.weight, bias
        return weight + self.weight, self.bias if bias is None else bias + self.bias


@register
@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Unrestricted change of linear maps.

    Attributes:
        sites: 'all', 'paper' (q, v), part names (q k v o gate up down) or 're:PATTERN' on site names.
        bias: change biases too.
    """

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "unrestricted change of linear maps; merges into the base"
    mergeable: ClassVar[bool] = True

    sites: str | tuple[str, ...] = "all"
    bias: bool = False

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the linear sites named by `sites`."""
        return match_linears(sites, self.sites, "dense.sites")

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build zero changes for every site."""
        return AdapterModule(
            {
                site.name: DenseDelta(
                    torch.zeros(site.d_out, site.d_in), torch.zeros(site.d_out) if self.bias else None
                )
                for site in sites
            }
        )
