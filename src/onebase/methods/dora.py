"""DoRA: weight-decomposed low-rank adaptation, a trained magnitude over a LoRA direction.

Paper: Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353, equations 5 and 11.
Formula: h' = m * (W x + s B A x) / |W + s B A| + bias; |.| is the norm of each row (output unit), m (d_out,) is
    trained, and the norm is a constant of the gradient (the paper's section 4.3). W x is h - bias, not computed again.
Parameters: sum over sites of r * (d_in + d_out) + d_out.
Start: A as LoRA, B zero, m = |W|, so the start is exactly the base.
Differs: the bias stays outside of the magnitude, and the norm holds the scale s, so that merging is exact. With dropout
    only the low-rank branch sees the dropped input; PEFT drops it for W x as well.
Cost: the norm reads all of W at every call, about one more token's work per site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.contracts import AdapterModule, Delta
from onebase.core.plan import At
from onebase.core.site import Site
from onebase.errors import UnsupportedError
from onebase.methods.lora import LoRA
from onebase.methods.method import Init
from onebase.methods.registry import register

TINY = 1e-12  # a row of W that is zero keeps a zero direction instead of 0 / 0


class DoRADelta(Delta):
    """``h + (m / n - 1) * (h - bias) + m / n * s * B A dropout(x)`` with n = |W + s B A|, no gradient."""

    def __init__(self, site: Site, a: Tensor, scale: float, dropout: float):
        super().__init__()
        self.site, self.scale, self.dropout = site, scale, dropout
        self.A = nn.Parameter(a)  # (r, d_in)
        self.B = nn.Parameter(torch.zeros(site.d_out, len(a)))  # (d_out, r)
        self.magnitude = nn.Parameter(row_norms(site.weight()).cpu())  # (d_out,)

    def ratio(self) -> Tensor:
        """Return m / |W + s B A|, (d_out,) in float32; exactly 1 at the start."""
        weight = self.site.weight()
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            norms = row_norms(weight.float() + self.scale * self.B @ self.A)
        return self.magnitude / norms

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Rescale the map of x, the low-rank part included, and leave the bias alone."""
        ratio, bias = self.ratio(), self.site.bias()
        x = at.dropout(x, self.dropout, self.training)
        low = F.linear(F.linear(x, self.A.to(h.dtype)), self.B.to(h.dtype))
        mapped = h if bias is None else h - bias.to(h.dtype)
        # ratio - 1 is taken in float32: near 1 a narrow dtype has few values
        return h + (ratio - 1).to(h.dtype) * mapped + (self.scale * ratio).to(h.dtype) * low

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rescale the rows of W + s B A; a bias that is not the base's own is part of what is rescaled."""
        ratio, own = self.ratio(), self.site.bias()
        if bias is not None:
            still = torch.zeros_like(bias) if own is None else own
            bias = still + ratio * (bias - still)
        return ratio[:, None] * (weight + self.scale * self.B @ self.A), bias


def row_norms(weight: Tensor) -> Tensor:
    """Return the norm of each row of (d_out, d_in), float32, at least `TINY`."""
    return torch.linalg.vector_norm(weight.float(), dim=1).clamp_min(TINY)


def check_matrix(site: Site, method: str) -> None:
    """Raise UnsupportedError unless W of a site can be read and is a matrix."""
    weight = site.weight()  # raises where it is offloaded
    if weight.shape != (site.d_out, site.d_in):
        raise UnsupportedError(
            f"{method}: the weight of site {site.name} is {tuple(weight.shape)}, expected a matrix "
            f"({site.d_out}, {site.d_in}): leave the site out, or use lora, which does not read W"
        )


@register
@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """A trained magnitude over a low-rank change of direction (arXiv 2402.09353).

    Attributes:
        rank: r, 1 to 512; the paper halves LoRA's rank and keeps its accuracy.
        alpha: scale numerator; s = alpha / rank.
        rslora: s = alpha / sqrt(rank) instead, stable at high ranks.
        sites: 'all', 'paper' (q, v), part names (q k v o gate up down) or 're:PATTERN' on site names.
        ranks: part or 're:PATTERN' -> rank there.
        alphas: part or 're:PATTERN' -> alpha there.
        dropout: rate on x in the low-rank branch while training, 0 to below 1.
    """

    name: ClassVar[str] = "dora"
    summary: ClassVar[str] = "low-rank change of direction with a trained magnitude; reads W, merges into the base"

    rank: int = 4
    alpha: float = 8.0
    rslora: bool = False
    sites: str | tuple[str, ...] = "all"
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build A, B and m for every site.

        Raises:
            UnsupportedError: W is offloaded or no matrix.
        """
        deltas: dict[str, Delta] = {}
        for site in sites:
            check_matrix(site, self.name)
            a, scale = self.start(site, init.generator)
            deltas[site.name] = DoRADelta(site, a, scale, self.dropout)
        return AdapterModule(deltas)
