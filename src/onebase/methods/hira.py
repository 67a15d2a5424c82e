"""HiRA: a high-rank change of linear maps, the Hadamard product of W with a low-rank matrix.

Paper: Huang et al. 2025, HiRA: Parameter-Efficient Hadamard High-Rank Adaptation, arXiv 2501.02137.
Formula: h' = h + s * (W * B A) x, * elementwise; the rank of the change is up to rank(W) * r.
Parameters: sum over sites of r * (d_in + d_out).
Start: A kaiming uniform as LoRA, B zero, so the start is exactly the base.
Differs: nothing in the maths at the default s = 1. A weight that is zero stays zero: B A is a relative change.
Cost: W * B A is made at every call, d_in * d_out * (r + 1) products per site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.contracts import AdapterModule, Delta
from onebase.core.plan import At
from onebase.core.site import Site
from onebase.methods.dora import check_matrix
from onebase.methods.lora import down_map
from onebase.methods.method import Init, Method, check, match_linears
from onebase.methods.registry import register


class HiRADelta(Delta):
    """``h + s * (W * B A) dropout(x)``."""

    def __init__(self, site: Site, a: Tensor, scale: float, dropout: float):
        super().__init__()
        self.site, self.scale, self.dropout = site, scale, dropout
        self.A = nn.Parameter(a)  # (r, d_in)
        self.B = nn.Parameter(torch.zeros(site.d_out, len(a)))  # (d_out, r)

    def change(self) -> Tensor:
        """Return s * W * B A, (d_out, d_in), float32."""
        weight = self.site.weight()
        with torch.autocast(weight.device.type, enabled=False):
            return self.scale * weight.float() * (self.B @ self.A)

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Add the map of x."""
        return h + F.linear(at.dropout(x, self.dropout, self.training), self.change().to(h.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add the change to the weight."""
        return weight + self.change().to(weight.dtype), bias


@register
@dataclass(frozen=True, kw_only=True)
class HiRA(Method):
    """The Hadamard product of W with a low-rank matrix (arXiv 2501.02137).

    Attributes:
        rank: r, 1 to 512; the paper's main results use 32.
        scale: s; the paper has none, which is 1.
        sites: 'all', 'paper' (q, v), part names (q k v o gate up down) or 're:PATTERN' on site names.
        dropout: rate on x while training, 0 to below 1.
    """

    name: ClassVar[str] = "hira"
    summary: ClassVar[str] = "high-rank change of linear maps, W times a low-rank matrix; reads W, merges into the base"
    mergeable: ClassVar[bool] = True

    rank: int = 32
    scale: float = 1.0
    sites: str | tuple[str, ...] = "all"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check(isinstance(self.rank, int) and 1 <= self.rank <= 512, "hira.rank", self.rank, "an integer from 1 to 512")
        check(self.scale > 0 and math.isfinite(self.scale), "hira.scale", self.scale, "a positive number")
        check(0 <= self.dropout < 1, "hira.dropout", self.dropout, "0 <= rate < 1")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the linear sites named by `sites`."""
        return match_linears(sites, self.sites, "hira.sites")

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build A and B for every site.

        Raises:
            UnsupportedError: W is offloaded or no matrix.
        """
        deltas: dict[str, Delta] = {}
        for site in sites:
            check_matrix(site, self.name)
            a = down_map(self.rank, site.d_in, init.generator)
            deltas[site.name] = HiRADelta(site, a, self.scale, self.dropout)
        return AdapterModule(deltas)
