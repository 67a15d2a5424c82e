"""Weighted combinations of changes of weights: linear, TIES, DARE, pruning; and their low-rank form.

Papers: Yadav et al. 2023, TIES-Merging, arXiv 2306.01708; Yu et al. 2023, DARE, arXiv 2311.03099; Ilharco et al. 2022,
task arithmetic, arXiv 2212.04089.
Differs: pruning keeps the largest values of each map, as PEFT does; the TIES paper ranks all maps together.
The maths is done on dW itself, which is PEFT's `*_svd` kinds; its others combine A and B apart, which is no combination
of the changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from onebase.core.contracts import Delta
from onebase.core.site import Site
from onebase.errors import UnsupportedError
from onebase.methods.dense import DenseDelta
from onebase.methods.lora import LoRADelta
from onebase.methods.union import ChainedDelta

HOW = ("linear", "ties", "dare", "dare_ties", "prune")


def change(site: Site, delta: Delta) -> tuple[Tensor, Tensor | None]:
    """Return what a delta adds to weight (d_out, d_in) and bias (d_out,) of its site, float32.

    Raises:
        UnsupportedError: it is no change of a linear map.
    """
    if site.kind != "linear":
        raise UnsupportedError(f"{site.name} is no linear map: combine takes changes of linear maps only")
    if isinstance(delta, LoRADelta):  # without the rounding of a sum with the base's weight
        return delta.scale * delta.B.float() @ delta.A.float(), None
    if isinstance(delta, DenseDelta):
        return delta.weight.float().clone(), None if delta.bias is None else delta.bias.float().clone()
    weight, bias = site.weight().float(), site.bias()
    bias = None if bias is None else bias.float()
    new, new_bias = delta.merged(weight, bias)
    if new_bias is None or new_bias is bias:
        return new - weight, None
    return new - weight, new_bias if bias is None else new_bias - bias


def pieces(delta: Delta) -> list[LoRADelta] | None:
    """Return the LoRAs that a delta is the sum of, or None."""
    if isinstance(delta, LoRADelta):
        return [delta]
    if isinstance(delta, ChainedDelta):
        found = [pieces(one) for one in delta.chain]
        return None if None in found else [one for many in found for one in many]  # type: ignore[union-attr]
    return None


def joined(deltas: Sequence[LoRADelta], weights: Sequence[float]) -> LoRADelta:
    """Return the exact weighted sum of LoRAs as one LoRA, whose rank is the sum of theirs and whose scale is 1."""
    sum_ = LoRADelta(torch.cat([d.A.detach() for d in deltas]), deltas[0].B.shape[0], 1.0, 0.0)
    sum_.B = torch.nn.Parameter(torch.cat([w * d.scale * d.B.detach() for d, w in zip(deltas, weights)], 1))
    return sum_


def combine(
    changes: Sequence[Tensor], weights: Sequence[float], how: str, density: float, generator: torch.Generator
) -> Tensor:
    """Combine changes of one map.

    Args:
        changes: of one shape.
        weights: one each.
        how: one of `HOW`.
        density: share of values that ties and prune keep, and that dare keeps at random.
        generator: of dare, on the CPU.
    """
    parts = list(changes)
    if how in ("ties", "prune"):
        parts = [_largest(part, density) for part in parts]
    elif how.startswith("dare"):
        parts = [
            part * (torch.rand(part.shape, generator=generator) < density).to(part.device) / density for part in parts
        ]
    stack = torch.stack(parts)
    weighted = stack * torch.tensor(weights, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.dim() - 1))
    if not how.endswith("ties"):
        return weighted.sum(0)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = (stack.sign() == sign).to(stack.dtype)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(change: Tensor, density: float) -> Tensor:
    """Keep the `density` share of values that are largest in magnitude; at least one."""
    flat = change.flatten()
    kept = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(change)
