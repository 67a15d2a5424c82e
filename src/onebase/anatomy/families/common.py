"""What family rows of several groups share."""

from __future__ import annotations

import importlib
from typing import Any


def heads(config: Any) -> tuple[int, int]:
    """Return (key/value heads, head dim) from the names that most configs use."""
    queries = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    return getattr(config, "num_key_value_heads", None) or queries, dim


def off_interface(config: Any) -> str:
    """Say why prefixes cannot reach a family that computes attention by itself; '' where its modelling file does not.

    Families move to the interface from one version of transformers to the next (GPT-J with 5.24).
    """
    name = config.model_type.replace("-", "_")
    modelling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    if hasattr(modelling, "ALL_ATTENTION_FUNCTIONS"):
        return ""
    return (
        f"{config.model_type} computes attention inside its own module and not through transformers' attention "
        "interface, so no keys can be put before its own: use lora, bottleneck or prompt on this base"
    )
