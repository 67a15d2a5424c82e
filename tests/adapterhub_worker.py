"""What the AdapterHub library does with files, in an environment of its own: it needs transformers 4.

python adapterhub_worker.py write BASE OUT      writes adapters to OUT/NAME, and what they compute to OUT/states
python adapterhub_worker.py read BASE OUT       reads the adapters in OUT/NAME, and writes what they compute
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapters
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {
        "seq_bn": adapters.SeqBnConfig(reduction_factor=4),
        "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
        "par_bn": adapters.ParBnConfig(reduction_factor=4),
        "seq_swish": adapters.SeqBnConfig(reduction_factor=8, non_linearity="swish"),
        "by_layer": adapters.SeqBnConfig(reduction_factor={"0": 4, "default": 8}),
        "lora": adapters.LoRAConfig(r=4, alpha=8),
        "lora_all": adapters.LoRAConfig(
            r=2, alpha=6, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
        ),
        "ia3": adapters.IA3Config(),
        "prefix": adapters.PrefixTuningConfig(flat=True, prefix_length=5),
        "prompt": adapters.PromptTuningConfig(prompt_length=4),
        "prompt_after": adapters.PromptTuningConfig(prompt_length=3, combine="prefix_after_bos"),
        "headed_first": adapters.PromptTuningConfig(prompt_length=3),
        "headed_prompt": adapters.PromptTuningConfig(prompt_length=3, combine="prefix_after_bos"),
        "headed": adapters.SeqBnConfig(reduction_factor=4),
    },
    "gpt2": {
        "seq_bn": adapters.SeqBnConfig(reduction_factor=4),
        "par_bn": adapters.ParBnConfig(reduction_factor=4),
        "prefix": adapters.PrefixTuningConfig(flat=True, prefix_length=3),
    },
}


def computed(model: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    """Return the states of the text, or the logits of a head."""
    model.set_active_adapters(name)
    model.eval()
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    if getattr(out, "logits", None) is not None:
        return out.logits.contiguous().clone()
    states, extra = out.last_hidden_state, out.last_hidden_state.shape[1] - ids.shape[1]
    behind = int(model.adapters_config.get(name).get("combine") == "prefix_after_bos")
    return torch.cat([states[:, :behind], states[:, behind + extra :]], 1).contiguous()


def headed(base: str) -> Any:
    """Return the model with places for heads."""
    return adapters.AutoAdapterModel.from_pretrained(base, attn_implementation="eager")


def bare(base: str) -> Any:
    """Return the model without a head."""
    model = AutoModel.from_pretrained(base, attn_implementation="eager")
    adapters.init(model)
    return model


def write(base: str, out: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Make adapters with random values, save them, and compute with them."""
    kind, found = bare(base).config.model_type, {}
    for number, (name, config) in enumerate(CONFIGS[kind].items()):
        has_head = name.startswith("headed")
        model = headed(base) if has_head else bare(base)
        model.add_adapter(name, config=config)
        if has_head:
            model.add_classification_head(name, num_labels=2, id2label={0: "no", 1: "yes"})
        generator = torch.Generator().manual_seed(number)
        for key, value in model.named_parameters():
            if name in key or f"heads.{name}" in key or "prompt_tunings" in key or "prefix_tunings" in key:
                value.data = value.data + 0.1 * torch.randn(value.shape, generator=generator)
        # the library cannot write prefixes as safetensors: their tensors are shared among layers
        safe = name != "prefix"
        model.save_adapter(str(out / name), name, with_head=has_head, use_safetensors=safe)
        found[name] = computed(model, name, ids)
    return found


def read(base: str, out: Path, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Load every adapter there, and compute with it."""
    found = {}
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        with_head = (folder / "head_config.json").exists()
        model = headed(base) if with_head else bare(base)
        name = model.load_adapter(str(folder), with_head=with_head, use_safetensors=True)
        found[folder.name] = computed(model, name, ids)
    return found


if __name__ == "__main__":
    does, base, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    ids = load_file(str(out / "ids.safetensors"))["ids"]
    found = (write if does == "write" else read)(base, out, ids)
    save_file(found, str(out / "states.safetensors"))
