"""IA3: trained scales of keys, values and the hidden vector of the MLP.

Paper: Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning,
    arXiv 2205.05638, section 3.3.
Formula: h' = h * (1 + l); h is what k and v give, and what enters the MLP's last projection, after the
    non-linearity (for gated MLPs after the product with the gate).
Parameters: sum over sites of d.
Start: l = 0, so the start is exactly the base.
Differs: the paper trains the factor itself, from ones; 1 + l is the same factor, keeps small changes exact in narrow
    dtypes, and weight decay would draw it to the base. Keys are scaled where k gives them, before rotary positions and
    before norms of keys (PEFT's convention).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from onebase.core.bank import Bank
from onebase.core.contracts import AdapterModule, Delta
from onebase.core.plan import At
from onebase.core.site import Site
from onebase.errors import unknown
from onebase.methods.method import Init, Method, check, match_linears
from onebase.methods.registry import register

HIDDEN = "hidden"  # the part name of the input of `down`


class ScaleDelta(Delta):
    """``h * (1 + l)`` at the output of a linear map, or at its input."""

    def __init__(self, d: int, at_input: bool):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(d))
        self.at_input = at_input

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Scale h."""
        return h + h * self.scale.to(h.dtype)

    def signature(self) -> Hashable | None:
        """Return the shape."""
        return self.scale.shape

    def bank(self, bank: Bank, x: Tensor, h: Tensor) -> Tensor:
        """Scale h by each one's vector."""
        return torch.addcmul(h, h, bank.vector("scale", h))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale the columns of the weight at an input, its rows and the bias at an output."""
        factor = 1 + self.scale
        if self.at_input:
            return weight * factor, bias
        return weight * factor[:, None], None if bias is None else bias * factor


@register
@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Trained scales of keys, values and the MLP's hidden vector (arXiv 2205.05638).

    Attributes:
        sites: 'hidden' (what enters the MLP's last projection), part names (q k v o gate up down) and 're:PATTERN' on
            the names of linear sites. The paper: k, v and hidden.
    """

    name: ClassVar[str] = "ia3"
    summary: ClassVar[str] = "trained scales of keys, values and the MLP's hidden vector; merges into the base"
    mergeable: ClassVar[bool] = True

    sites: tuple[str, ...] = ("k", "v", HIDDEN)

    def __post_init__(self) -> None:
        check(bool(self.sites), "ia3.sites", self.sites, "at least one part or pattern")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the linear sites named by `sites`, and the inputs of `down` where 'hidden' is among them."""
        linears = tuple(part for part in self.sites if part != HIDDEN)
        chosen = {site.name for site in match_linears(sites, linears, "ia3.sites")} if linears else set()
        inputs = {site.name for site in sites if site.kind == "input"} if HIDDEN in self.sites else set()
        if HIDDEN in self.sites and not inputs:
            raise unknown("part in ia3.sites", HIDDEN, {site.part for site in sites if site.kind == "linear"})
        return [site for site in sites if site.name in chosen | inputs]

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build l for every site."""
        return AdapterModule({site.name: ScaleDelta(site.d_out, site.kind == "input") for site in sites})
