"""Methods: one file each. A file registers its class; names are listed without importing torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onebase.methods.registry import all_methods, method_names, parse_method, register

if TYPE_CHECKING:
    from onebase.methods.adalora import AdaLoRA
    from onebase.methods.bitfit import BitFit
    from onebase.methods.bottleneck import Bottleneck
    from onebase.methods.dora import DoRA
    from onebase.methods.hira import HiRA
    from onebase.methods.ia3 import IA3
    from onebase.methods.layernorm import LayerNorm
    from onebase.methods.lora import LoRA
    from onebase.methods.loreft import LoReFT
    from onebase.methods.mam import MAM
    from onebase.methods.prefix import Prefix
    from onebase.methods.prompt import Prompt
    from onebase.methods.tokens import Tokens
    from onebase.methods.union import Union
    from onebase.methods.vera import VeRA

__all__ = [
    "IA3",
    "MAM",
    "AdaLoRA",
    "BitFit",
    "Bottleneck",
    "DoRA",
    "HiRA",
    "LayerNorm",
    "LoRA",
    "LoReFT",
    "Prefix",
    "Prompt",
    "Tokens",
    "Union",
    "VeRA",
    "all_methods",
    "method_names",
    "parse_method",
    "register",
]


def __getattr__(name: str) -> Any:
    """Import a method's class at its first use."""
    if name not in __all__:
        raise AttributeError(f"module 'onebase.methods' has no attribute {name!r}")
    return getattr(importlib.import_module(f"onebase.methods.{name.lower()}"), name)
