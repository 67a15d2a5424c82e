"""Bottleneck adapters: a small two-layer network at the exit of sub-layers.

Papers: Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751 (preset houlsby);
    Pfeiffer et al. 2020, AdapterFusion, arXiv 2005.00247 (preset pfeiffer);
    He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366 (parallel).
Formula: serial h' = h + s * U f(D h);  parallel h' = h + s * U f(D x).
    h is the sub-layer's output before the residual is added, x the tensor that the residual carries.
    Trained norms (houlsby): h' = h + dgamma * n(x) + dbeta with n(x) recomputed, never a rescale of h.
Parameters: per exit 2 d m + m + d; per trained norm d or 2 d.
Start: D normal (std `init_std`), U zero, so the start is exactly the base. The paper draws both near zero, which is
    the base only up to an epsilon; parallel follows LoRA's start (kaiming D, zero U) as He et al. do.
Differs: nothing in the maths. The AdapterHub library's form of Pfeiffer's adapter reads LN(h + x) instead of h, where
    LN is the base's own norm behind the branch, or h + x where norms come first: reads='normed' and reads='sum'.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.bank import Bank, add_product
from onebase.core.contracts import AdapterModule, Delta
from onebase.core.plan import At
from onebase.core.site import Site, standardize
from onebase.errors import UnsupportedError, unknown
from onebase.methods.method import Init, Method, check
from onebase.methods.normdelta import NormDelta
from onebase.methods.registry import register

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x}
# preset -> (sub-layers, parallel, default reduction, scale, trained norms). Sources: the papers' settings above;
# Houlsby's 64 of 768 is a reduction of 12, Pfeiffer's is 16, He et al. use 16 of 768 on GLUE with s = 4 for XSum.
PRESETS: dict[str, tuple[tuple[str, ...], bool, float, float, bool]] = {
    "houlsby": (("attention", "cross", "mlp"), False, 12.0, 1.0, True),
    "pfeiffer": (("mlp",), False, 16.0, 1.0, False),
    "parallel": (("mlp",), True, 8.0, 4.0, False),
}


class BottleneckDelta(Delta):
    """``h + s * U f(D input)`` with input h, h + x or LN(h + x) (serial), or x (parallel)."""

    def __init__(
        self, down: Tensor, d: int, activation: str, scale: float, reads: str, dropout: float, norm: Site | None = None
    ):
        super().__init__()
        self.down = nn.Parameter(down)  # (m, d)
        self.down_bias = nn.Parameter(torch.zeros(len(down)))
        self.up = nn.Parameter(torch.zeros(d, len(down)))  # (d, m)
        self.up_bias = nn.Parameter(torch.zeros(d))
        self.activation, self.scale, self.reads, self.dropout, self.norm = activation, scale, reads, dropout, norm

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Add the bottleneck's output."""
        inner = at.dropout(self._input(x, h), self.dropout, self.training)
        inner = F.linear(inner, self.down.to(h.dtype), self.down_bias.to(h.dtype))
        inner = ACTIVATIONS[self.activation](inner)
        return torch.add(h, F.linear(inner, self.up.to(h.dtype), self.up_bias.to(h.dtype)), alpha=self.scale)

    def signature(self) -> Hashable | None:
        """Return shapes and settings."""
        if self.reads in ("sum", "normed"):
            return None
        return (self.down.shape, self.up.shape, self.activation, self.scale, self.reads, self.dropping())

    def bank(self, bank: Bank, x: Tensor, h: Tensor) -> Tensor:
        """Add each one's output."""
        inner = add_product(bank.vector("down_bias", h), bank.dropout(self._input(x, h)), bank.stacked("down", h))
        inner = ACTIVATIONS[self.activation](inner)
        shifted = torch.add(h, bank.vector("up_bias", h), alpha=self.scale)
        return add_product(shifted, inner, bank.stacked("up", h), self.scale)

    def _input(self, x: Tensor, h: Tensor) -> Tensor:
        if self.reads == "residual":
            return x
        if self.reads == "branch":
            return h
        inner = h + x
        if self.norm is None:
            return inner
        assert self.norm.norm is not None
        inner, bias = standardize(inner, self.norm.norm) * self.norm.weight().to(h.dtype), self.norm.bias()
        return inner if bias is None else inner + bias.to(h.dtype)


@register
@dataclass(frozen=True, kw_only=True)
class Bottleneck(Method):
    """A small two-layer network at the exit of sub-layers (arXiv 1902.00751, 2005.00247, 2110.04366).

    Attributes:
        preset: 'houlsby' (after attention and MLP, norms trained), 'pfeiffer' (after the MLP), 'parallel' (beside it).
        size: m, units of the bottleneck; or layer -> m with the other layers left out.
        reduction: d / m instead of `size`. Neither: the preset's reduction (12, 16, 8).
        activation: gelu, relu, silu, tanh or identity. Houlsby's code uses gelu.
        scale: s; None is that of the preset (1, 1, 4).
        leave_out: layers without an adapter (AdapterDrop, arXiv 2010.11918), counted from 0; negative from the top.
        norms: train the norms too. None: the preset's choice.
        dropout: rate on the bottleneck's input while training.
        init_std: standard deviation of D in serial adapters (1e-2: safe below that in Houlsby, figure 6).
        reads: what a serial adapter reads: 'branch' (h), 'sum' (h + x), or 'normed' (LN(h + x) with the base's own norm
            behind the branch), as AdapterHub's files of Pfeiffer's adapters do.
    """

    name: ClassVar[str] = "bottleneck"
    summary: ClassVar[str] = "small two-layer networks between the layers (adapter tuning)"

    preset: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    size: int | Mapping[int, int] | None = None
    reduction: float | None = None
    activation: str = "gelu"
    scale: float | None = None
    leave_out: tuple[int, ...] = ()
    norms: bool | None = None
    dropout: float = 0.0
    init_std: float = 1e-2
    reads: Literal["branch", "sum", "normed"] = "branch"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise unknown("bottleneck.preset", self.preset, PRESETS)
        if self.activation not in ACTIVATIONS:
            raise unknown("bottleneck.activation", self.activation, ACTIVATIONS)
        check(
            self.size is None or self.reduction is None,
            "bottleneck.reduction",
            self.reduction,
            "size or reduction, not both",
        )
        sizes = self.size.values() if isinstance(self.size, Mapping) else () if self.size is None else (self.size,)
        for size in sizes:
            check(isinstance(size, int) and size >= 1, "bottleneck.size", self.size, "integers of at least 1")
        check(
            self.reduction is None or self.reduction >= 1,
            "bottleneck.reduction",
            self.reduction,
            "at least 1",
        )
        check(0 <= self.dropout < 1, "bottleneck.dropout", self.dropout, "0 <= rate < 1")
        check(self.reads in ("branch", "sum", "normed"), "bottleneck.reads", self.reads, "branch, sum or normed")
        serial = self.reads == "branch" or self.preset != "parallel"
        check(serial, "bottleneck.reads", self.reads, "'branch' for a parallel adapter, which reads x")
        check(self.init_std > 0, "bottleneck.init_std", self.init_std, "a positive number")
        check(self.scale is None or math.isfinite(self.scale), "bottleneck.scale", self.scale, "a finite number")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the exits of the preset's sub-layers, and the norms of the same layers where they are trained.

        Raises:
            ConfigError, UnsupportedError: a layer that is named does not exist, or an exit that is needed is refused.
        """
        sublayers, _, _, _, norms = PRESETS[self.preset]
        norms = norms if self.norms is None else self.norms
        exits = [site for site in sites if site.kind == "exit" and site.sublayer in sublayers]
        layers = self._layers(exits)
        keep = [
            site
            for site in sites
            if (site.stack, site.layer) in layers
            and (
                (site.kind == "exit" and site.sublayer in sublayers)
                or (site.kind == "norm" and (norms or (self.reads == "normed" and site.part == "norm")))
            )
        ]
        if not keep:
            raise UnsupportedError("bottleneck: no layer is left to adapt; check leave_out and size")
        return keep

    def _layers(self, exits: Sequence[Site]) -> set[tuple[str, int]]:
        count = {site.stack: 0 for site in exits}
        for site in exits:
            count[site.stack] = max(count[site.stack], site.layer + 1)
        deepest = max(count.values(), default=0)
        wanted = set(self.size) if isinstance(self.size, Mapping) else None
        for layer in self.leave_out:
            check(
                -deepest <= layer < deepest,
                "bottleneck.leave_out",
                layer,
                f"{-deepest} to {deepest - 1} on this base",
            )
        for layer in wanted or ():
            check(0 <= layer < deepest, "bottleneck.size layer", layer, f"0 to {deepest - 1} on this base")
        chosen = set()
        for stack, layers in count.items():
            out = {layer % layers for layer in self.leave_out if -layers <= layer < layers}
            chosen |= {(stack, i) for i in range(layers) if i not in out and (wanted is None or i in wanted)}
        return chosen

    def _norm_behind(self, site: Site, norms: Mapping[str, Site]) -> Site | None:
        """Return the base's norm of a branch and the residual, which reads='normed' applies.

        Raises:
            UnsupportedError: the norm comes before the branch.
        """
        if self.reads != "normed":
            return None
        norm = norms.get(f"{site.name}/norm")
        if norm is None or (site.residual is not None and site.residual.path == norm.path):
            raise UnsupportedError(
                f"bottleneck: reads='normed' needs a norm behind {site.name}; this base has it before: use reads='sum'"
            )
        return norm

    def _units(self, site: Site) -> int:
        if isinstance(self.size, Mapping):
            return self.size[site.layer]
        if self.size is not None:
            return self.size
        return max(1, round(site.d_out / (self.reduction or PRESETS[self.preset][2])))

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build D and U at every exit, and the changes of norms."""
        _, parallel, _, scale, trained = PRESETS[self.preset]
        scale = scale if self.scale is None else self.scale
        trained, reads = trained if self.norms is None else self.norms, "residual" if parallel else self.reads
        norms = {site.name: site for site in sites if site.kind == "norm"}
        deltas: dict[str, Delta] = {}
        for site in sites:
            if site.kind == "norm":
                assert site.norm is not None
                if not trained:
                    continue  # only read
                deltas[site.name] = NormDelta(site.d_out, site.norm)
                continue
            shape = (self._units(site), site.d_out)
            if parallel:
                down = (torch.rand(shape, generator=init.generator) * 2 - 1) / math.sqrt(site.d_out)
            else:
                down = torch.randn(shape, generator=init.generator).clamp(-2, 2) * self.init_std
            deltas[site.name] = BottleneckDelta(
                down, site.d_out, self.activation, scale, reads, self.dropout, self._norm_behind(site, norms)
            )
        return AdapterModule(deltas)
