"""LoRA: low-rank change of linear maps.

Paper: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685.
Formula: h' = h + s * B A x,  A (r, d_in), B (d_out, r),  s = alpha / r, or alpha / sqrt(r) with `rslora`
    (Kalajdzievski 2023, arXiv 2312.03732).
Parameters: sum over sites of r * (d_in + d_out).
Start: A kaiming uniform with a = sqrt(5), as in the authors' code and PEFT; B zero, so the start is the base.
Differs: sites default to every linear of every layer (the paper: q and v; use sites='paper'), which was
    more accurate at the same rank in later work (QLoRA, arXiv 2305.14314). PEFT has the same maths and alpha / r.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.bank import Bank, add_product
from onebase.core.contracts import AdapterModule, Delta
from onebase.core.plan import At
from onebase.core.site import Site
from onebase.methods.method import Init, Method, check, match_linears, matches
from onebase.methods.registry import register


class LoRADelta(Delta):
    """``h + s * B A dropout(x)``."""

    def __init__(self, a: Tensor, d_out: int, scale: float, dropout: float):
        super().__init__()
        self.A = nn.Parameter(a)  # (r, d_in)
        self.B = nn.Parameter(torch.zeros(d_out, len(a)))  # (d_out, r)
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Add the low-rank map of x."""
        x = at.dropout(x, self.dropout, self.training)
        low = F.linear(x, self.A.to(h.dtype))  # (..., r)
        if low.dtype != h.dtype:  # autocast computes in a narrower type than that of h
            return torch.add(h, F.linear(low, self.B), alpha=self.scale)
        flat = torch.addmm(h.reshape(-1, h.shape[-1]), low.flatten(0, -2), self.B.to(h.dtype).t(), alpha=self.scale)
        return flat.view(h.shape)  # one pass over h for product, scale and sum

    def signature(self) -> Hashable | None:
        """Return shapes, scale and rate of dropout."""
        return (self.A.shape, self.B.shape, self.scale, self.dropping())

    def bank(self, bank: Bank, x: Tensor, h: Tensor) -> Tensor:
        """Add each one's low-rank map of x."""
        inner = torch.bmm(bank.dropout(x), bank.stacked("A", h).mT)
        return add_product(h, inner, bank.stacked("B", h), self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add s B A to the weight."""
        return weight + self.scale * self.B @ self.A, bias


@register
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank change of linear maps (arXiv 2106.09685).

    Attributes:
        rank: r, 1 to 512; the paper finds r = 1 to 8 enough on q and v.
        alpha: scale numerator; s = alpha / rank. The paper uses 8 or 16.
        rslora: s = alpha / sqrt(rank) instead, stable at high ranks.
        sites: 'all', 'paper' (q, v), part names (q k v o gate up down) or 're:PATTERN' on site names.
        ranks: part or 're:PATTERN' -> rank there.
        alphas: part or 're:PATTERN' -> alpha there.
        dropout: rate on x while training, 0 to below 1.
    """

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "low-rank change of linear maps; merges into the base"
    mergeable: ClassVar[bool] = True

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    sites: str | tuple[str, ...] = "all"
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for key, rank in {"rank": self.rank, **{f"ranks[{k!r}]": v for k, v in self.ranks.items()}}.items():
            check(isinstance(rank, int) and 1 <= rank <= 512, f"{self.name}.{key}", rank, "an integer from 1 to 512")
        for key, alpha in {
            "alpha": self.alpha,
            **{f"alphas[{k!r}]": v for k, v in self.alphas.items()},
        }.items():
            check(alpha > 0 and math.isfinite(alpha), f"{self.name}.{key}", alpha, "a positive number")
        check(0 <= self.dropout < 1, f"{self.name}.dropout", self.dropout, "0 <= rate < 1")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the linear sites named by `sites`; every key of `ranks` and `alphas` must match one of them."""
        chosen = match_linears(sites, self.sites, f"{self.name}.sites")
        for setting, values in (("ranks", self.ranks), ("alphas", self.alphas)):
            for key in values:
                match_linears(chosen, key, f"{self.name}.{setting}")
        return chosen

    def _at(self, site: Site, default: float, values: Mapping[str, float]) -> float:
        hits = [value for key, value in values.items() if matches(site, key, self.name)]
        return hits[-1] if hits else default  # a later key wins

    def start(self, site: Site, generator: torch.Generator) -> tuple[Tensor, float]:
        """Draw A for a site.

        Args:
            site: a linear site; its features, `ranks` and `alphas` give r and s.
            generator: the only source of randomness.

        Returns:
            A, (r, d_in), and the scale s.
        """
        rank = int(self._at(site, self.rank, self.ranks))
        alpha = self._at(site, self.alpha, self.alphas)
        a = down_map(rank, site.d_in, generator)
        return a, alpha / (math.sqrt(rank) if self.rslora else rank)

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build A and B for every site."""
        deltas = {}
        for site in sites:
            a, scale = self.start(site, init.generator)
            deltas[site.name] = LoRADelta(a, site.d_out, scale, self.dropout)
        return AdapterModule(deltas)


def down_map(rank: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Draw A, (r, d_in): kaiming uniform with a = sqrt(5), the bound is 1 / sqrt(d_in)."""
    return (torch.rand(rank, d_in, generator=generator) * 2 - 1) / math.sqrt(d_in)


def low_rank(change: Tensor, rank: int) -> tuple[LoRADelta, float]:
    """Return the LoRA of a rank that is nearest to a change, and its relative error in the Frobenius norm.

    The singular values are split evenly over A and B; the scale is 1.
    """
    u, s, vh = torch.linalg.svd(change.float(), full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    delta = LoRADelta((root[:, None] * vh[:rank]).contiguous(), change.shape[0], 1.0, 0.0)
    delta.B = nn.Parameter((u[:, :rank] * root).contiguous())
    total = float(s.square().sum())
    return delta, (float(s[rank:].square().sum()) / total) ** 0.5 if total else 0.0
