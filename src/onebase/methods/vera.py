"""VeRA: vectors over random matrices that all sites share.

Paper: Kopiczko et al. 2023, VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454, equation 2.
Formula: h' = h + b * B (d * A x), A (r, d_in) and B (d_out, r) frozen, random and shared: each site takes the first
    columns of A and the first rows of B that it needs; d (r,) and b (d_out,) are trained per site.
Parameters: sum over sites of r + d_out.
Start: A, B kaiming uniform; d = 0.1, b = 0 (the paper's section 3.3), so the start is exactly the base.
Frozen matrices: drawn on the CPU by torch.Generator().manual_seed(projection), A first, then B. They are drawn again
    when the adapter is loaded, and their SHA-256 is stored and compared, so that a torch which draws otherwise is an
    error and no silent change; `stored=True` keeps the matrices in the file instead.
Differs: nothing in the maths. PEFT stores the matrices by default.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.contracts import AdapterModule, Delta
from onebase.core.plan import At
from onebase.core.site import Site
from onebase.errors import MismatchError
from onebase.methods.lora import down_map
from onebase.methods.method import Init, Method, check, match_linears
from onebase.methods.registry import register


class Projections(nn.Module):
    """The frozen matrices, as wide and as tall as the largest site, and their digest."""

    def __init__(self, rank: int, d_in: int, d_out: int, seed: int, stored: bool):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Buffer(down_map(rank, d_in, generator), persistent=stored)  # (r, d_in)
        self.B = nn.Buffer(down_map(d_out, rank, generator), persistent=stored)  # (d_out, r)
        if not stored:
            digest = hashlib.sha256(self.A.numpy().tobytes() + self.B.numpy().tobytes()).digest()
            # 32 bytes as float32, the one dtype of an adapter's tensors
            self.digest = nn.Buffer(torch.tensor(list(digest), dtype=torch.float32))


class VeRADelta(Delta):
    """``h + b * B (d * A dropout(x))``."""

    def __init__(self, shared: Projections, site: Site, start: float, dropout: float):
        super().__init__()
        self.shared, self.d_in, self.d_out, self.dropout = shared, site.d_in, site.d_out, dropout
        self.d = nn.Parameter(torch.full((len(shared.A),), start))  # (r,)
        self.b = nn.Parameter(torch.zeros(site.d_out))

    def _own(self) -> tuple[Tensor, Tensor]:
        return self.shared.A[:, : self.d_in], self.shared.B[: self.d_out]

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Add the scaled random map of x."""
        a, b = (matrix.to(h.dtype) for matrix in self._own())
        inner = F.linear(at.dropout(x, self.dropout, self.training), a) * self.d.to(h.dtype)
        return h + F.linear(inner, b) * self.b.to(h.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add diag(b) B diag(d) A to the weight."""
        a, b = self._own()
        return weight + (self.b[:, None] * b) @ (self.d[:, None] * a), bias


class VeRAModule(AdapterModule):
    """Deltas over frozen matrices that were drawn again."""

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` into this module.

        Raises:
            MismatchError: the matrices drawn here are not those that the adapter was trained with.
        """
        given, own = tensors.get("shared.digest"), self.tensors().get("shared.digest")
        if given is not None and own is not None and not torch.equal(given.to(own), own):
            raise MismatchError(
                f"vera: the random matrices drawn here have SHA-256 {_hex(own)}..., the adapter was trained over "
                f"{_hex(given)}...: this version of torch draws other numbers from the same seed. Load it with the "
                "version it was trained with; adapters trained with vera(stored=True) carry their matrices."
            )
        super().put(tensors)


def _hex(digest: Tensor) -> str:
    return bytes(int(value) % 256 for value in digest[:6].tolist()).hex()


@register
@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Vectors over random matrices that all sites share (arXiv 2310.11454).

    Attributes:
        rank: r, 1 to 8192; the paper uses 256 for Llama and 1024 for RoBERTa.
        d_init: start of d; the paper uses 0.1.
        sites: 'all', 'paper' (q, v), part names (q k v o gate up down) or 're:PATTERN' on site names.
        projection: seed of the frozen matrices; adapters with the same seed, rank and sites have the same ones.
        stored: keep the frozen matrices in the file, r * (d_in + d_out) values, instead of drawing them again.
        dropout: rate on x while training, 0 to below 1.
    """

    name: ClassVar[str] = "vera"
    summary: ClassVar[str] = "trained vectors over shared random matrices, very few values; merges into the base"
    mergeable: ClassVar[bool] = True

    rank: int = 256
    d_init: float = 0.1
    sites: str | tuple[str, ...] = "all"
    projection: int = 0
    stored: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        rank = isinstance(self.rank, int) and 1 <= self.rank <= 8192
        check(rank, "vera.rank", self.rank, "an integer from 1 to 8192")
        check(self.d_init != 0 and math.isfinite(self.d_init), "vera.d_init", self.d_init, "a finite number, not 0")
        check(0 <= self.projection < 2**63, "vera.projection", self.projection, "0 to 2**63 - 1")
        check(0 <= self.dropout < 1, "vera.dropout", self.dropout, "0 <= rate < 1")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the linear sites named by `sites`."""
        return match_linears(sites, self.sites, "vera.sites")

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Draw the frozen matrices and build d and b for every site."""
        wide, tall = max(site.d_in for site in sites), max(site.d_out for site in sites)
        shared = Projections(self.rank, wide, tall, self.projection, self.stored)
        deltas = {site.name: VeRADelta(shared, site, self.d_init, self.dropout) for site in sites}
        return VeRAModule(deltas, shared=shared)
