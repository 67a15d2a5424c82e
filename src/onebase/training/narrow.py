"""Frozen linear maps keep their weights in a narrower dtype while an adapter trains.

Autocast casts the weights of a frozen map in every call: it remembers the casts of trained weights only. A copy that is
made once, for as long as training lasts, gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType

import torch
from torch import Tensor, nn

from onebase.core.products import FrozenLinear, linear_maps


class NarrowLinear:
    """The forward of a frozen linear map, with weights that were cast before.

    Args:
        module: the map; nothing of it changes.
        dtype: of the copy.
    """

    def __init__(self, module: nn.Linear, dtype: torch.dtype):
        self.weight = module.weight.detach().to(dtype)
        self.bias = None if module.bias is None else module.bias.detach().to(dtype)

    def __call__(self, input: Tensor) -> Tensor:
        """Return (..., d_out) of (..., d_in), under autocast."""
        return nn.functional.linear(input, self.weight, self.bias)


@contextmanager
def narrow(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the frozen float32 linear maps of a model compute with copies of their weights in `dtype`.

    Maps that are trained, quantized, or whose forward somebody else replaced are left alone.
    """
    chosen = [
        module
        for module in linear_maps(model)
        if not module.weight.requires_grad and isinstance(module.__dict__.get("forward"), NoneType | FrozenLinear)
    ]
    before = [module.__dict__.get("forward") for module in chosen]
    try:
        for module in chosen:
            module.__dict__["forward"] = NarrowLinear(module, dtype)
        yield
    finally:
        for module, forward in zip(chosen, before, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
