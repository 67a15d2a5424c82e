"""LoReFT: low-rank change of a layer's output at a few positions.

Paper: Wu et al. 2024, ReFT: Representation Finetuning for Language Models, arXiv 2404.03592, equation 2.
Formula: h' = h + R^T (W h + b - R h) at the first n and the last m positions of a text, R (r, d) with orthonormal
    rows, W (r, d), b (r,); computed as h + R^T ((W - R) h + b), which is the same and exactly h where W = R, b = 0.
Rows of R: the parameter is an unconstrained basis M (d, r); R is the transpose of the Q of M = Q T with a positive
    diagonal of T, that is Gram and Schmidt's of M's columns: smooth in M, and orthonormal at every step. After
    training only R is kept.
Parameters: per layer 2 r d + r.
Start: W = R, b = 0, so the start is the base. The authors draw W at random and start elsewhere.
Positions: among the real tokens of the text; virtual tokens of a prompt do not count. The first n are those of the
    row. The last m are those of the prompt: while text is written, tokens after it are never the last, with a cache
    or without. A call that states no prompt lengths (`base.use(names, prompts=...)`) and has no cache holds the
    prompt alone, as in classification. Completions are trained with their prompts stated.
Stack: the one that reads the text; the encoder of an encoder-decoder.
Differs: one R, W, b per layer for all positions (the paper's tied form).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.contracts import AdapterModule, Delta
from onebase.core.plan import At
from onebase.core.site import Site
from onebase.errors import RouteError, UnsupportedError
from onebase.methods.method import Init, Method, check
from onebase.methods.registry import register


def orthonormal(basis: Tensor) -> Tensor:
    """Return R, (r, d), whose rows are the Gram-Schmidt basis of the columns of `basis`, (d, r)."""
    with torch.autocast(basis.device.type, enabled=False):
        q, t = torch.linalg.qr(basis.float())
    # a QR leaves signs open, and those that LAPACK takes jump: a positive diagonal is unique
    return (q * torch.where(t.diagonal() < 0, -1.0, 1.0)).T


def chosen(at: At, first: int, last: int) -> Tensor:
    """Return (b, T), true at the first `first` and the last `last` text positions of each row.

    Raises:
        UnsupportedError: the call has no mask that tells where its tokens are.
        RouteError: several tokens follow a cache, and nothing says where the prompt ends.
    """
    if at.text is None or at.mask is None:
        raise UnsupportedError(
            "loreft needs to know where the tokens of a row are: pass the 2-dimensional attention mask of the batch, "
            "not a prepared one (static caches and packed masks prepare theirs)"
        )
    place = at.text
    hit = (place >= 0) & (place < first)
    if last:
        if at.lengths is None:
            raise RouteError(
                "loreft: several tokens follow a filled cache, so the last positions of the prompt are not known: "
                "state them with base.use(names, prompts=[tokens of each prompt])"
            )
        end = at.lengths[:, None]
        hit = hit | ((place >= (end - last).clamp(min=0)) & (place < end))
    return hit & at.mask


class ReFTDelta(Delta):
    """``h + R^T ((W - R) h + b)`` at chosen positions, R from `rotation()`."""

    positional: ClassVar[bool] = True

    def __init__(self, weight: Tensor, bias: Tensor, first: int, last: int):
        super().__init__()
        self.W = nn.Parameter(weight)  # (r, d)
        self.b = nn.Parameter(bias)  # (r,)
        self.first, self.last = first, last

    def rotation(self) -> Tensor:
        """Return R, (r, d)."""
        raise NotImplementedError

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Change h, (b, T, d), at the chosen positions."""
        hit = chosen(at, self.first, self.last)
        rotation = self.rotation()
        inner = F.linear(h, (self.W - rotation).to(h.dtype), self.b.to(h.dtype))
        return torch.where(hit[..., None], h + F.linear(inner, rotation.T.to(h.dtype)), h)


class RotatingDelta(ReFTDelta):
    """In training: R from an unconstrained basis."""

    def __init__(self, basis: Tensor, first: int, last: int):
        super().__init__(orthonormal(basis).clone(), torch.zeros(basis.shape[1]), first, last)
        self.basis = nn.Parameter(basis)  # (d, r)

    def rotation(self) -> Tensor:
        """Return R, (r, d)."""
        return orthonormal(self.basis)


class RotatedDelta(ReFTDelta):
    """After training: R itself."""

    def __init__(self, trained: ReFTDelta):
        super().__init__(trained.W.detach().clone(), trained.b.detach().clone(), trained.first, trained.last)
        self.R = nn.Parameter(trained.rotation().detach().clone())  # (r, d)

    def rotation(self) -> Tensor:
        """Return R, (r, d)."""
        return self.R


class ReFTModule(AdapterModule):
    """Changes of layers that are trained over a basis and stored with R."""

    def fold(self) -> AdapterModule:
        """Compute R once and drop the basis."""
        return AdapterModule({name: RotatedDelta(delta) for name, delta in self.items()})  # type: ignore[arg-type]


@register
@dataclass(frozen=True, kw_only=True)
class LoReFT(Method):
    """Low-rank change of layers' outputs at the first and last positions (arXiv 2404.03592).

    Attributes:
        rank: r, 1 to 256; the paper uses 1 to 8.
        first: n, the first positions of a text that are changed.
        last: m, the last positions of a prompt that are changed. The paper: 1 to 11 first and last ones.
        layers: layers that are changed, counted from 0, negative from the top; () is all of them.
    """

    name: ClassVar[str] = "loreft"
    summary: ClassVar[str] = "low-rank change of layers' outputs at the first and last positions"
    epsilon: ClassVar[float | None] = 1e-5  # W equals R up to the rounding of another device's QR; 0 on the CPU

    rank: int = 4
    first: int = 4
    last: int = 4
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(
            isinstance(self.rank, int) and 1 <= self.rank <= 256, "loreft.rank", self.rank, "an integer from 1 to 256"
        )
        for name in ("first", "last"):
            value = getattr(self, name)
            check(isinstance(value, int) and value >= 0, f"loreft.{name}", value, "a number of positions, at least 0")
        check(self.first + self.last > 0, "loreft.last", self.last, "at least one position in first or last")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the layers' outputs of the stack that reads the text."""
        blocks = [site for site in sites if site.kind == "block"]
        blocks = [site for site in blocks if site.stack == blocks[0].stack]
        for layer in self.layers:
            wanted = f"{-len(blocks)} to {len(blocks) - 1} on this base"
            check(-len(blocks) <= layer < len(blocks), "loreft.layers", layer, wanted)
        keep = {layer % len(blocks) for layer in self.layers} or set(range(len(blocks)))
        return [site for site in blocks if site.layer in keep]

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build basis, W and b for every layer."""
        deltas: dict[str, Delta] = {}
        for site in sites:
            check(self.rank <= site.d_out, "loreft.rank", self.rank, f"at most the width {site.d_out} of this base")
            basis = torch.randn(site.d_out, self.rank, generator=init.generator)
            deltas[site.name] = RotatingDelta(basis, self.first, self.last)
        return ReFTModule(deltas)
