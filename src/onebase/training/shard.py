"""A frozen base split over processes: each holds a part of every layer, and layers are put together while they compute.

FSDP2 (`fully_shard`) per layer over frozen weights; adapters, heads, embeddings and final norms are whole in every
process. No gradient of the base exists, so nothing of it is reduced. All processes must call such a base equally often;
training sees to it, other calls must be made in all processes at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from onebase.errors import ConfigError, UnsupportedError
from onebase.processes import is_sharded, join, launched

if TYPE_CHECKING:
    from onebase.base import Base


def shard(base: Base) -> str:
    """Split the layers of a base over the processes that were started together; say what was done.

    Call it in every process, before adapters are added.

    Raises:
        ConfigError: there is one process only, the base carries adapters, or it is split already.
        UnsupportedError: the base is quantized.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    join()
    size = launched()
    if size == 1:
        raise ConfigError("a base is split over several processes, but this one is alone: start it with torchrun")
    if base.adapters or is_sharded(base.model):
        raise ConfigError("split a base once, before adapters are added")
    layers = [layer for stack in base.anatomy.stacks for layer in stack.layers]
    if not layers:
        raise UnsupportedError(f"the layers of {base.anatomy.model_type} are not known: it cannot be split")
    if any(not p.is_floating_point() for p in base.model.parameters()):
        raise UnsupportedError("a quantized base cannot be split: load it without quantization, or do not split it")
    base._whole = base.fingerprint()
    mesh = init_device_mesh("cuda" if torch.device(base.device).type == "cuda" else "cpu", (size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    split = sum(p.numel() for layer in layers for p in layer.parameters())
    total = sum(p.numel() for p in base.model.parameters())
    return f"split {split:,} of {total:,} values of the base over {size} processes"
