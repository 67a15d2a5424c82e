"""Products of float32 with frozen weights on a CPU, by oneDNN where that is faster than what torch takes by itself.

torch computes float32 products with MKL, which does not use all of some processors: on an EPYC (Zen 4, one thread) 512
tokens by 384 x 1536 take MKL 5.8 ms and oneDNN 2.6, and the gradient 5.9 and 2.5. Both are sums of float32 products in
another order. Which is faster is measured once in a process, and oneDNN has to be clearly faster.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.quantized import kind_of

CLEARLY = 1.25  # times as fast, from which oneDNN is taken: which it is must not change from one process to the next
SHORTEST = 4  # tokens from which it was measured to be faster
SHAPE = 128, 384, 384  # tokens, d_in, d_out of the products that are measured
CALLS = 7


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class FrozenProduct(torch.autograd.Function):
    """x W^T + b, with a gradient of x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (..., d_out) of (..., d_in)."""
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x."""
        (weight,) = ctx.saved_tensors
        return FrozenProduct.apply(grads[0], weight.t(), None), None, None  # type: ignore[return-value]


@cache
def pays() -> bool:
    """Whether float32 products of oneDNN are right, and clearly faster than torch's own, on this machine."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    tokens, wide, out = SHAPE
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((1, tokens, wide), (out, wide), (out,)))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            found = _product(x, weight, bias)
        except RuntimeError:  # a build of torch without it
            return False
        expected = F.linear(x.double(), weight.double(), bias.double())
        if not torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-3 * wide**-0.5):
            return False  # float32 products are computed in fewer bits here
        own, ours = (_seconds(function, (x, weight, bias)) for function in (F.linear, _product))
    return own > CLEARLY * ours


def _seconds(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> float:
    best = float("inf")
    for _ in range(CALLS):
        began = time.perf_counter()
        function(*given)
        best = min(best, time.perf_counter() - began)
    return best


class FrozenLinear:
    """The forward of a linear map while a call is routed.

    Args:
        module: the map; nothing of it changes, and its weights are read in each call.
    """

    def __init__(self, module: nn.Linear):
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        """Return (..., d_out) of (..., d_in)."""
        weight, bias = self.module.weight, self.module.bias
        if not self._fits(input, weight, bias):
            return F.linear(input, weight, bias)
        if torch.is_grad_enabled() and input.requires_grad:
            return FrozenProduct.apply(input, weight, bias)  # type: ignore[return-value]
        return _product(input, weight, bias)

    @staticmethod
    def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        if not (x.dtype == weight.dtype == torch.float32 and x.device == weight.device and x.device.type == "cpu"):
            return False
        if x.numel() < SHORTEST * weight.shape[1] or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        return not (trained and torch.is_grad_enabled())


def linear_maps(model: nn.Module) -> Iterator[nn.Linear]:
    """Yield a model's linear maps with plain float32 weights: not quantized, nor split over processes."""
    for module in model.modules():
        if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or kind_of(module.weight):
            continue
        if module.weight.dtype == torch.float32:
            yield module


class Products:
    """Lets the linear maps of a model compute by `FrozenLinear` for as long as anybody asks for it.

    Args:
        model: the base model.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._users, self._lock = 0, threading.Lock()

    @cached_property
    def _chosen(self) -> list[tuple[dict[str, Any], FrozenLinear]]:
        """The maps on the CPU, as their attributes, and what stands in for them."""
        maps = (module for module in linear_maps(self._model) if module.weight.device.type == "cpu")
        return [(module.__dict__, FrozenLinear(module)) for module in maps]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Compute so within this block. A map whose forward somebody else replaced is left alone."""
        if not self._chosen or not pays():
            yield
            return
        with self._lock:
            self._users += 1
            if self._users == 1:
                for own, forward in self._chosen:
                    own.setdefault("forward", forward)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    for own, forward in self._chosen:
                        if own.get("forward") is forward:
                            del own["forward"]
