"""Write LoRA for vLLM: a PEFT folder within what vLLM's loader reads.

vLLM takes one rank and one scale for all modules of an adapter, no DoRA, no biases and no saved heads. Ranks are filled
up with zeros and scales are moved into B, which changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onebase.adapter import Adapter
from onebase.errors import UnsupportedError
from onebase.store.interop.foreign import CONFIG
from onebase.store.interop.peft_config import pattern_value
from onebase.store.interop.peft_read import ROOT, TENSORS
from onebase.store.interop.peft_write import write_peft
from onebase.store.tensors import decode, encode

if TYPE_CHECKING:
    from onebase.base import Base

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM accepts as --max-lora-rank
# Decoders whose linear maps vLLM keeps under the names of transformers, packed or not, and serves with LoRA.
FAMILIES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")


def write_vllm(base: Base, adapter: Adapter, folder: Path, head: bool) -> list[str]:
    """Write an adapter that vLLM loads as a LoRA.

    Raises:
        UnsupportedError: vLLM could not serve it, and why.
    """
    if not base.has_lm_head or base.anatomy.model_type not in FAMILIES:
        raise UnsupportedError(
            f"vLLM: {type(base.model).__name__} is not among the decoders that are known here to serve LoRA "
            f"({', '.join(FAMILIES)}); --to merged gives a model that needs no adapter"
        )
    if head:
        raise UnsupportedError("vLLM takes no heads with an adapter: export with head=False (--no-head)")
    if adapter.method.name == "dora":
        raise UnsupportedError("vLLM reads no DoRA: merge the adapter (--to merged), or train lora")
    notes = write_peft(base, adapter, folder, False)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config["peft_type"] != "LORA":
        raise UnsupportedError(f"vLLM reads LoRA only, and {adapter.method.name} is {config['peft_type']} in PEFT")
    tensors = decode((folder / TENSORS).read_bytes())
    ranks = {key: len(t) for key, t in tensors.items() if key.endswith(".lora_A.weight")}
    rank = max(ranks.values())
    if rank > RANKS[-1]:
        raise UnsupportedError(f"vLLM reads ranks up to {RANKS[-1]}, this adapter has {rank}")
    if config["rank_pattern"] or config["alpha_pattern"]:
        tensors = _one_rank(tensors, config, rank)
        config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
        notes.append(f"all ranks were filled up with zeros to {rank} and scales moved into B: the same function")
    data, _ = encode(tensors)
    (folder / TENSORS).write_bytes(data)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    least = next(allowed for allowed in RANKS if allowed >= rank)
    return [*notes, f"start vLLM with --enable-lora --max-lora-rank {least}"]


def _one_rank(tensors: dict[str, Tensor], config: dict, rank: int) -> dict[str, Tensor]:
    """Return A and B of one rank whose scale is 1."""
    out: dict[str, Tensor] = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        path, other = key.removeprefix(ROOT).removesuffix(".lora_A.weight"), key.replace("lora_A", "lora_B")
        own = len(a)
        alpha = float(pattern_value(config["alpha_pattern"], path, config["lora_alpha"]))
        scale = alpha / (own**0.5 if config["use_rslora"] else own)
        out[key] = torch.nn.functional.pad(a, (0, 0, 0, rank - own))
        out[other] = torch.nn.functional.pad(scale * tensors[other], (0, rank - own))
    return out
