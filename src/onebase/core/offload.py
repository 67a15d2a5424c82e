"""Offloaded weights: accelerate keeps them in memory or on disk, and brings them while their module computes.

Meanwhile the module's own tensors are on the meta device and hold nothing. accelerate is not imported here: its hook
hangs on the module, under a name that its documentation gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HOOK = "_hf_hook"


def _hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of accelerate on a module that know where its tensors are, the last put one first."""
    hook = getattr(module, HOOK, None)
    found = getattr(hook, "hooks", None) or ([] if hook is None else [hook])
    return [each for each in reversed(found) if hasattr(each, "weights_map")]


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes: the device of its weight, or the one that an offloaded weight is brought to."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        for hook in _hooks(module):
            if hook.execution_device is not None:
                device = hook.execution_device
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return weight.device


def resident(module: nn.Module, name: str) -> Tensor | None:
    """Return an offloaded tensor of a module from where it is kept, or None where nothing keeps it."""
    for hook in _hooks(module):
        if hook.offload and hook.weights_map is not None:
            try:
                return hook.weights_map[name]
            except KeyError:
                continue
    return None


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a module, brought to where it computes if it is offloaded."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.is_meta:
        return weight
    kept = resident(module, "weight")
    return weight if kept is None else kept.to(device_of(module))


def devices_of(model: nn.Module) -> set[str]:
    """Return every device that a model computes on: more than one where a device map spreads its layers."""
    found = {str(p.device) for p in model.parameters() if not p.is_meta}
    found |= {str(device_of(m)) for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)}
    return found - {"meta"}


def is_offloaded(model: nn.Module) -> bool:
    """Whether a weight of a model holds nothing between calls."""
    return any(p.is_meta for p in model.parameters())
