"""How a base is loaded with its linear maps in fewer bits: settings for transformers, which quantizes as it loads."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from onebase.errors import ConfigError

if TYPE_CHECKING:
    import torch

LIBRARIES = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
GROUP = 32  # weights that share a scale in 4 bits


def quantized_options(quantize: str, device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return what `from_pretrained` is given to quantize a model.

    Args:
        quantize: 'int8', 'int4' or 'nf4'.
        dtype: that products are computed in; None: the input's.
        device: where the model goes; quantized models are loaded to their place and not moved.

    Raises:
        ConfigError: an unknown setting, or its library is not installed.
    """
    library = LIBRARIES.get(quantize)
    if library is None:
        raise ConfigError(f"quantize = {quantize!r}: expected {', '.join(LIBRARIES)}")
    if find_spec(library) is None:
        raise ConfigError(f"quantize = {quantize!r} needs {library}: pip install 'onebase[quantize]'")
    config = _torchao(quantize) if library == "torchao" else _bitsandbytes(dtype)
    return {"quantization_config": config, "device_map": {"": str(device)}}


def _torchao(quantize: str) -> Any:
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if quantize == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    # The packed kernel for CPUs has no derivative and cannot be read back, so 4 bits are kept in bytes here.
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=getattr(torch, "int4", None), granularity=PerGroup(GROUP)))


def _bitsandbytes(dtype: torch.dtype | None) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
