"""Merge an adapter into the base's weights, and take it out again bit by bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onebase.core.contracts import Delta, KVDelta
from onebase.core.quantized import kind_of
from onebase.core.site import TOKENS, Site
from onebase.errors import OnebaseError, UnsupportedError

if TYPE_CHECKING:
    from onebase.adapter import Adapter
    from onebase.base import Base

# What scales a map's inputs scales the map that others changed, so it comes after them.
ORDER = {"linear": 0, "input": 1, "norm": 2}


@dataclass(frozen=True, eq=False)
class Merged:
    """A base that holds an adapter in its weights.

    Attributes:
        name: the adapter.
        originals: (parameter, copy of its original values) of everything that was changed.
    """

    name: str
    originals: tuple[tuple[nn.Parameter, Tensor], ...]


def merge(base: Base, name: str) -> Merged:
    """Write what an adapter makes of the base's weights into the base; see `Base.merge`.

    Raises:
        UnsupportedError: the adapter is no change of weights, or a weight cannot be changed. Nothing is changed then.
    """
    adapter = base.adapters[name]
    originals: dict[int, tuple[nn.Parameter, Tensor]] = {}
    try:
        with torch.no_grad():
            for site, delta in _ordered(base, adapter):
                _write(site, delta, originals)
    except BaseException:
        restore(Merged(name, tuple(originals.values())))
        raise
    return Merged(name, tuple(originals.values()))


def restore(merged: Merged) -> None:
    """Give every changed parameter its original bits back."""
    with torch.no_grad():
        for parameter, original in merged.originals:
            parameter.copy_(original)


def _ordered(base: Base, adapter: Adapter) -> list[tuple[Site, Delta]]:
    """Return sites and deltas in the order in which they are merged.

    Raises:
        UnsupportedError: something in the adapter is no change of weights.
    """
    found: list[tuple[Site, Delta]] = []
    for name, delta in adapter.module.fold().items():
        site = base.anatomy.sites[name]
        if not isinstance(delta, Delta) or site.kind not in ORDER:
            what = "keys and values of attention" if isinstance(delta, KVDelta) else f"a change at {name}"
            if site.kind in TOKENS:
                what = "tokens of the input"
            raise UnsupportedError(
                f"{adapter.method.shorthand()} adds {what}, which no weight of the base holds: it cannot be merged"
            )
        found.append((site, delta))
    return sorted(found, key=lambda pair: ORDER[pair[0].kind])


def _write(site: Site, delta: Delta, originals: dict[int, tuple[nn.Parameter, Tensor]]) -> None:
    """Merge one delta into the module of its site."""
    weight = site.module.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or kind_of(weight):
        raise UnsupportedError(
            f"site {site.name}: its weight is quantized ({kind_of(weight) or type(site.module).__name__}), which "
            "cannot hold the merged values: train on the base without quantization to merge"
        )
    if weight.is_meta:
        raise UnsupportedError(f"site {site.name}: its weight is offloaded: load the base without offload to merge")
    own, bias = site.weight(), site.bias()
    new, new_bias = delta.merged(own.float(), None if bias is None else bias.float())
    if bias is None and new_bias is not None:
        raise UnsupportedError(
            f"site {site.name}: the adapter adds a bias and {type(site.module).__name__} at {site.path} has none: it "
            "cannot be merged into a model of this class"
        )
    _put(site, site.module.weight, new, originals)
    if new_bias is not None:
        _put(site, site.module.bias, new_bias, originals)


def _put(site: Site, parameter: nn.Parameter, value: Tensor, originals: dict[int, tuple[nn.Parameter, Tensor]]) -> None:
    """Write a site's rows of a parameter, whose original is kept at the first change."""
    if not bool(torch.isfinite(value).all()):
        raise UnsupportedError(f"site {site.name}: merged values are not finite")
    originals.setdefault(id(parameter), (parameter, parameter.detach().clone()))
    whole = parameter.t() if parameter.dim() == 2 and type(site.module).__name__ == "Conv1D" else parameter
    value = value.to(parameter.dtype)
    if site.span is not None:
        whole[site.span[0] : site.span[1]] = value
    elif site.index is not None:
        whole.index_copy_(0, site.index.to(whole.device), value)
    else:
        whole.copy_(value)


def refuse_merged(merged: Merged | None) -> None:
    """Raise OnebaseError while an adapter is merged: routes and stored identities mean the plain base."""
    if merged is not None:
        raise OnebaseError(
            f"adapter {merged.name!r} is merged into this base: base.model answers as the adapter does, and nothing "
            "else can be done until base.unmerge()"
        )
