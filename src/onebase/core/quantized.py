"""Quantized weights: what they are, the numbers they stand for, and the bytes that identify them.

torchao replaces the weight of a linear map by a tensor subclass that claims the shape and dtype of what it stands for;
bitsandbytes replaces the module and packs the weight into bytes. Neither library is imported here: whoever holds such
a weight has imported it already.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from onebase.errors import UnsupportedError

TORCHAO = {"Int8Tensor": "int8", "IntxUnpackedToInt8Tensor": "int4"}
BITSANDBYTES = ("Int8Params", "Params4bit")


def kind_of(weight: Any) -> str:
    """Return how a weight is quantized, '' where it is not: a setting of `load_base`, or the name of its class."""
    name = type(weight).__name__
    if name == "DTensor":  # split over processes: what its own part is
        return kind_of(weight._local_tensor)
    if name in BITSANDBYTES:
        return "LLM.int8" if name == "Int8Params" else str(weight.quant_type)
    if not hasattr(type(weight), "__tensor_flatten__"):
        return "" if not isinstance(weight, Tensor) or not weight.is_quantized else str(weight.dtype)
    if name == "IntxUnpackedToInt8Tensor" and getattr(weight, "target_dtype", None) != getattr(torch, "int4", None):
        return name
    return TORCHAO.get(name, name)


def quantization_of(model: nn.Module) -> str:
    """Return how a model is quantized, '' where it is not; several kinds are joined by commas."""
    return ", ".join(sorted({kind for p in model.parameters() if (kind := kind_of(p))}))


def problem_of(model: nn.Module) -> str:
    """Say why adapters cannot stand on the quantized maps of a model, '' where they can.

    One map of each kind is tried: it must compute the product with the numbers that its weight stands for, the same for
    a row alone as for a row among others, and hand a gradient on; else a row of a batch would not equal the row alone,
    or training would go wrong without a word.
    """
    seen: set[str] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        kind = kind_of(weight)
        if kind and kind not in seen and hasattr(module, "in_features"):
            seen.add(kind)
            try:
                wrong = _tried(module)
            except (RuntimeError, NotImplementedError, AttributeError) as error:
                wrong = f"it fails: {str(error).splitlines()[0][:120]}"
            if wrong:
                return f"the base is quantized ({kind}), and adapters cannot stand on {name}: {wrong}"
    return ""


def _tried(module: Any) -> str:
    """Return what a quantized map does wrong, '' if nothing."""
    weight = module.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    bias = None if module.bias is None else module.bias.to(dtype)
    forward, limit = type(module).forward, 0.02 if dtype != torch.float32 else 1e-4
    with torch.no_grad():
        plain = dequantized(module, weight).to(dtype)
        expected = nn.functional.linear(x, plain, bias)
        size = float(expected.abs().max())
        for rows in (x, x[:1]):
            if not _near(forward(module, rows), expected[: len(rows)], limit * size):
                return "its products are rounded, so that a row in a batch would not equal the row alone"
    for rows in (x, x[:1]):
        leaf = rows.clone().requires_grad_()
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a missing derivative: looked for below
            out = forward(module, leaf)
            if not _near(out.detach(), expected[: len(rows)], limit * size):
                return "its products are rounded, so that a row in a batch would not equal the row alone"
            (grad,) = torch.autograd.grad(out.sum(), leaf, allow_unused=True)
        right = plain.sum(0).expand_as(leaf)
        if grad is None or not _near(grad, right, limit * float(right.abs().max())):
            return "it hands on no right gradient"
    return ""


def _near(one: Tensor, other: Tensor, allowed: float) -> bool:
    return bool((one.float() - other.float()).abs().max() <= allowed)


def dequantized(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the numbers that a quantized weight of a module stands for, (d_out, d_in).

    Raises:
        UnsupportedError: its form cannot be read back.
    """
    kind = kind_of(weight)
    with torch.no_grad():
        if type(weight).__name__ in BITSANDBYTES:
            functional: Any = sys.modules["bitsandbytes"].functional
            if kind != "LLM.int8":
                return functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
            # the module takes the codes over at its first call
            state: Any = module.state
            codes = weight.data if state.CB is None else state.CB
            scales = weight.SCB if state.SCB is None else state.SCB  # type: ignore[attr-defined]
            return functional.int8_vectorwise_dequant(codes, scales)
        try:
            return weight.dequantize()
        except (NotImplementedError, RuntimeError) as error:
            raise UnsupportedError(
                f"weights of the form {type(weight).__name__} cannot be read back ({str(error)[:80]}): quantize the "
                "base in another form, e.g. load_base(..., quantize='int8'), or take a method that does not read them"
            ) from error


def parts_of(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors that a weight is made of, with names; the weight itself where it is not quantized."""
    flatten = getattr(weight, "__tensor_flatten__", None)
    if flatten is not None and type(weight) is not nn.Parameter:
        for inner in flatten()[0]:
            value = getattr(weight, inner)
            if isinstance(value, Tensor):
                yield from parts_of(f"{name}.{inner}", value)
        return
    yield name, weight
    if type(weight).__name__ in BITSANDBYTES:  # codes of one matrix can mean two matrices
        state = getattr(weight, "quant_state", None)
        scale = getattr(weight, "SCB", None) if state is None else state.absmax
        if scale is not None:
            yield f"{name}.scale", scale
