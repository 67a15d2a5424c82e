"""BitFit: train the biases only.

Paper: Ben Zaken et al. 2021, BitFit: Simple Parameter-efficient Fine-tuning, arXiv 2106.10199.
Formula: h' = h + b at linear maps and norms that have a bias; b is the change of that bias.
Parameters: sum over sites of d_out.
Start: b = 0, so the start is exactly the base.
Differs: key biases are left out where they cannot matter. A constant on all keys adds q . b to every logit of a
    query, and softmax cancels it; its gradient is rounding noise. Where positions rotate keys, or a norm follows,
    it does not cancel and is trained. A prefix, whose keys get no b, does not make the bias matter: b is then the same
    as moving all prefix keys by -b, which a prefix can learn itself. Biases of embeddings' norms and of heads
    are not touched (a head of an adapter is its own).
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
from onebase.errors import UnsupportedError
from onebase.methods.method import Init, Method, match_linears
from onebase.methods.registry import register


class BiasDelta(Delta):
    """``h + b``."""

    def __init__(self, d: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Add the bias."""
        return h + self.bias.to(h.dtype)

    def signature(self) -> Hashable | None:
        """Return the shape."""
        return self.bias.shape

    def bank(self, bank: Bank, x: Tensor, h: Tensor) -> Tensor:
        """Add each one's bias."""
        return h + bank.vector("bias", h)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add to the bias."""
        return weight, self.bias.clone() if bias is None else bias + self.bias


@register
@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Train the biases only (arXiv 2106.10199).

    Attributes:
        sites: linear maps: 'all', 'paper' (q, v), part names (q k v o gate up down) or 're:PATTERN' on site names. The
            paper's smaller variant trains the biases of q and up.
        norms: the biases of norms too.
        create: give linear maps without a bias one (Llama and T5 have none).
    """

    name: ClassVar[str] = "bitfit"
    summary: ClassVar[str] = "train the biases only; merges into the base"
    mergeable: ClassVar[bool] = True

    sites: str | tuple[str, ...] = "all"
    norms: bool = True
    create: bool = False

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the linear maps and norms whose bias matters.

        Raises:
            UnsupportedError: there is no bias to train.
        """
        linears = match_linears(sites, self.sites, "bitfit.sites")
        chosen = {s.name for s in linears if (self.create or has_bias(s)) and not s.cancels}
        if self.norms:
            chosen |= {s.name for s in sites if s.kind == "norm" and s.norm is not None and s.norm.has_bias}
        if not chosen:
            keys = all(s.cancels for s in linears)
            why = "softmax cancels a bias of these keys" if keys else "there are no biases that matter"
            raise UnsupportedError(
                f"bitfit: {why} among {len(linears)} linear maps named by sites={self.sites!r}"
                + ("" if self.create or keys else "; create=True gives linear maps one")
            )
        return [site for site in sites if site.name in chosen]

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build b for every site."""
        return AdapterModule({site.name: BiasDelta(site.d_out) for site in sites})


def has_bias(site: Site) -> bool:
    """Whether the module of a site adds a bias (also where it is offloaded)."""
    return getattr(site.module, "bias", None) is not None
