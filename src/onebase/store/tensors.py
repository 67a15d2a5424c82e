"""The tensors of an adapter as safetensors bytes, checked on the way in and out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from onebase.errors import ConfigError, StoreError, nearest
from onebase.store.schema import TensorInfo

if TYPE_CHECKING:
    import torch

HINTED = 8
# bytes of one value; any other dtype is taken as the widest there is
WIDTHS = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "bool": 1}


def encode(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, Any]]:
    """Write tensors as one safetensors file.

    Args:
        tensors: by name; any shape, any dtype safetensors has, any device but meta.

    Returns:
        The bytes of the file, and ``{name: {"shape": ..., "dtype": ...}}``.

    Raises:
        ConfigError: names or values that are not dense tensors with data.
        StoreError: tensors hold NaN or inf.
    """
    import safetensors.torch
    import torch

    wrong = [
        f"{name!r}: {_describe(value)}"
        for name, value in tensors.items()
        if not isinstance(name, str)
        or name == "__metadata__"  # what the file's own header uses
        or not isinstance(value, torch.Tensor)
        or value.layout != torch.strided
        or value.is_meta
        or value.is_quantized
    ]
    if wrong:
        raise ConfigError(f"only named dense tensors can be stored; got {'; '.join(wrong)}")
    # clone: adapters live as views of one slab, and safetensors refuses shared memory
    # contiguous: a clone keeps the strides of a transposed view, which safetensors refuses too
    plain = {n: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    bad = [problem for name, tensor in plain.items() for problem in _not_finite(name, tensor)]
    if bad:
        raise StoreError(f"refusing to store values that are not finite: {'; '.join(bad)}. Did training diverge?")
    try:
        data = safetensors.torch.save(plain, {"format": "pt"})
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        kinds = sorted({_dtype(t) for t in plain.values()})
        raise ConfigError(f"safetensors cannot store these tensors (dtypes {kinds}): {error}") from error
    return data, {n: {"shape": list(t.shape), "dtype": _dtype(t)} for n, t in plain.items()}


def decode(data: bytes) -> dict[str, torch.Tensor]:
    """Read a safetensors file, on the CPU; nothing is unpickled.

    Args:
        data: the bytes of the file.

    Returns:
        The tensors by name.

    Raises:
        ValueError: the bytes are no safetensors file.
    """
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        return safetensors.torch.load(data)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"not a readable safetensors file ({error})") from error


def most_bytes(expected: Mapping[str, TensorInfo]) -> int:
    """Return what a file of these tensors can have at most, so that a longer one is not read.

    16 bytes is the widest dtype (complex128); a header entry is its name, at most six bytes a character in JSON,
    and less than 256 bytes of shape and offsets; 64 KiB are left for padding and notes.
    """
    values = sum(math.prod(info.shape) * WIDTHS.get(info.dtype, 16) for info in expected.values())
    return values + sum(256 + 6 * len(name) + 20 * len(info.shape) for name, info in expected.items()) + 2**16


def differences(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Compare tensors with what the config says of them.

    Args:
        tensors: as read.
        expected: the config's field ``tensors``.

    Yields:
        One message per difference, and per tensor with NaN or inf.
    """
    for name in sorted(expected.keys() - tensors.keys()):
        yield f"missing tensor {name!r}"
    extra = sorted(tensors.keys() - expected.keys())
    for name in extra:
        # a few are perhaps misspelt; comparing the names of two whole adapters takes minutes and says nothing
        yield f"unexpected tensor {name!r}" + (f". {nearest(name, expected)}" if len(extra) <= HINTED else "")
    for name in sorted(tensors.keys() & expected.keys()):
        tensor, want = tensors[name], expected[name]
        if list(tensor.shape) != want.shape:
            yield f"tensor {name!r} has shape {list(tensor.shape)}, the config says {want.shape}"
        if _dtype(tensor) != want.dtype:
            yield f"tensor {name!r} has dtype {_dtype(tensor)}, the config says {want.dtype}"
    for name in sorted(tensors):
        yield from _not_finite(name, tensors[name])


def _not_finite(name: str, tensor: torch.Tensor) -> Iterator[str]:
    import torch

    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    # the 1-byte floats have no isfinite of their own; float32 holds each of their values
    values = tensor.float() if tensor.element_size() == 1 else tensor
    count = int((~torch.isfinite(values)).sum())
    if count:
        yield f"tensor {name!r} has {count} of {tensor.numel()} values NaN or inf"


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe(value: object) -> str:
    import torch

    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{value.layout} on {value.device}, {_dtype(value)}"
