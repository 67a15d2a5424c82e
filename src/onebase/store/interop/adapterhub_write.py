"""Write an adapter as a folder of the AdapterHub library `adapters`, where it has a form that computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.adapter import Adapter
from onebase.errors import UnsupportedError
from onebase.heads import DenseHead, LinearHead
from onebase.methods.bottleneck import BottleneckDelta
from onebase.methods.ia3 import ScaleDelta
from onebase.methods.lora import LoRADelta
from onebase.methods.prefix import PrefixDelta
from onebase.methods.prompt import VirtualTokens
from onebase.store.disk import write_file
from onebase.store.interop.adapterhub_read import ACTIVATIONS, BEHIND, ENCODERS, HEAD, HEAD_CONFIG, TENSORS
from onebase.store.interop.foreign import CONFIG
from onebase.store.interop.modules import Modules
from onebase.store.interop.peft_head import plain_linear
from onebase.store.tensors import encode

if TYPE_CHECKING:
    from onebase.base import Base

# Families whose bottlenecks hang in the output modules of BERT; others have modules of their own in the layer.
BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2")
PROMPTS = ("distilbert", "albert")  # families with prompts beside those
LAYERS = {"gpt2": "h", "llama": "layers", "mistral": "layers", "distilbert": "transformer.layer"}


def write_adapterhub(base: Base, adapter: Adapter, folder: Path, head: bool = True) -> list[str]:
    """Write an adapter for ``model.load_adapter`` of the library `adapters`.

    Args:
        base: what the adapter is attached to.
        adapter: the adapter.
        folder: an empty folder.
        head: write the task head too.

    Returns:
        What a person should know.

    Raises:
        UnsupportedError: the library has no form that computes the same, and why.
    """
    if base.is_encoder_decoder:
        raise UnsupportedError("files of encoder-decoders are not written")
    name = adapter.name
    deltas = dict(adapter.module.fold().items())
    kinds = {type(delta) for delta in deltas.values()}
    writers = {
        BottleneckDelta: _bottleneck, LoRADelta: _lora, ScaleDelta: _ia3, PrefixDelta: _prefix, VirtualTokens: _prompt,
    }  # fmt: skip
    if len(kinds) != 1 or next(iter(kinds)) not in writers:
        shown = ", ".join(sorted(kind.__name__.removesuffix("Delta") for kind in kinds))
        raise UnsupportedError(
            f"the AdapterHub library has no form here that computes {shown}: it is written bottlenecks without trained "
            "norms, LoRA, IA3 of q, k, v and up, prefixes, and prompts behind the embeddings"
        )
    headed = head and adapter.head is not None
    if not headed and any(isinstance(delta, VirtualTokens) and delta.leads for delta in deltas.values()):
        raise UnsupportedError(
            "a prompt with leads=True is read by a head, and only a head says so in files of the AdapterHub library: "
            "export it with a head, or make it without leads"
        )
    with torch.no_grad():
        config, tensors = writers[next(iter(kinds))](base, name, deltas)
        heads = _head(base, adapter) if headed else None
    about = {"hidden_size": base.anatomy.hidden_size, "model_class": type(base.model).__name__, "model_name": base.id,
             "model_type": base.anatomy.model_type, "name": name, "version": "adapters.1.3.0"}  # fmt: skip
    _write(folder, TENSORS, CONFIG, tensors, {"config": config, **about})
    if heads is not None:
        _write(folder, HEAD, HEAD_CONFIG, heads[1], {"config": heads[0], **about})
    return []


def _write(folder: Path, file: str, settings: str, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    data, _ = encode({key: t.detach().float() for key, t in tensors.items()})
    write_file(folder / file, data)
    write_file(folder / settings, (json.dumps(config, indent=2) + "\n").encode())


def _spoken(base: Base, path: str) -> str:
    return Modules(base).spoken(path, base.model.base_model is not base.model)


def _bottleneck(base: Base, name: str, deltas: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kind = base.anatomy.model_type
    if kind not in (*BERT_LIKE, *LAYERS):
        raise UnsupportedError(f"where the AdapterHub library keeps bottlenecks of {kind} is not known here")
    tensors: dict[str, Tensor] = {}
    sublayers, layers = set(), set()
    for site_name, delta in deltas.items():
        site = base.anatomy.sites[site_name]
        sublayers.add(site.sublayer)
        layers.add(site.layer)
        if site.sublayer not in ("attention", "mlp"):
            raise UnsupportedError(f"{site_name}: adapters behind cross-attention are not written")
        if kind in BERT_LIKE:
            place = f"encoder.layer.{site.layer}." + ("attention.output" if site.sublayer == "attention" else "output")
        else:
            own = "attention_adapters" if site.sublayer == "attention" else "output_adapters"
            place = f"{LAYERS[kind]}.{site.layer}.{own}"
        root = _spoken(base, place) + f".adapters.{name}.adapter_"
        for what, key in {
            "down": "down.0.weight",
            "down_bias": "down.0.bias",
            "up": "up.weight",
            "up_bias": "up.bias",
        }.items():
            tensors[root + key] = getattr(delta, what)
    first = next(iter(deltas.values()))
    back = {ours: theirs for theirs, ours in ACTIVATIONS.items() if theirs != "silu"}
    parallel = first.reads == "residual"
    sizes = {str(base.anatomy.sites[n].layer): base.anatomy.sites[n].d_out / len(d.down) for n, d in deltas.items()}
    count = len(base.anatomy.stacks[0].layers)
    return {
        "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "inv_adapter": None,
        "inv_adapter_reduction_factor": None, "is_parallel": parallel,
        "leave_out": [i for i in range(count) if i not in layers], "ln_after": False, "ln_before": False,
        "mh_adapter": "attention" in sublayers, "non_linearity": back[first.activation],
        "original_ln_after": True, "original_ln_before": first.reads in ("sum", "normed"),
        "output_adapter": "mlp" in sublayers, "phm_layer": False,
        "reduction_factor": next(iter(sizes.values())) if len(set(sizes.values())) == 1 else sizes,
        "residual_before_ln": True, "scaling": first.scale, "use_gating": False,
    }, tensors  # fmt: skip


def _plain_sites(base: Base, deltas: dict[str, Any], parts: tuple[str, ...]) -> None:
    for name in deltas:
        site = base.anatomy.sites[name]
        if site.is_part or site.kind != "linear" or site.part not in parts or site.sublayer == "cross":
            raise UnsupportedError(
                f"{name}: the AdapterHub library has this at unfused {', '.join(parts)} of a layer only"
            )


def _where(base: Base, deltas: dict[str, Any]) -> dict[str, Any]:
    parts = {base.anatomy.sites[name].part for name in deltas}
    attention = [part for part in "qkv" if part in parts]
    expected = {
        site.name
        for site in base.anatomy.sites.values()
        if site.kind == "linear" and site.part in parts and site.sublayer != "cross"
    }
    if expected != set(deltas):
        raise UnsupportedError("the AdapterHub library adapts the same maps in every layer; this adapter does not")
    return {"selfattn_lora": bool(attention), "attn_matrices": attention, "intermediate_lora": "up" in parts,
            "output_lora": "down" in parts, "leave_out": [], "use_gating": False, "dropout": 0.0}  # fmt: skip


def _lora(base: Base, name: str, deltas: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _plain_sites(base, deltas, ("q", "k", "v", "up", "down"))
    ranks = {len(delta.A) for delta in deltas.values()}
    scales = {delta.scale for delta in deltas.values()}
    if len(ranks) > 1 or len(scales) > 1:
        raise UnsupportedError(
            f"ranks {sorted(ranks)} and scales {sorted(scales)}: the AdapterHub library has one of each"
        )
    rank, scale = ranks.pop(), scales.pop()
    tensors: dict[str, Tensor] = {}
    for site, delta in deltas.items():
        root = _spoken(base, base.anatomy.sites[site].path) + f".loras.{name}."
        tensors[root + "lora_A"], tensors[root + "lora_B"] = delta.A, delta.B
    alpha = scale * rank
    settings = {"architecture": "lora", "r": rank, "alpha": alpha, "composition_mode": "add", "init_weights": "lora"}
    return settings | _where(base, deltas), tensors


def _ia3(base: Base, name: str, deltas: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    _plain_sites(base, deltas, ("q", "k", "v", "up"))
    tensors = {
        _spoken(base, base.anatomy.sites[site].path) + f".loras.{name}.lora_B": (1 + delta.scale)[:, None]
        for site, delta in deltas.items()
    }
    settings = {"architecture": "lora", "r": 1, "alpha": 1, "composition_mode": "scale", "init_weights": "ia3"}
    return settings | _where(base, deltas), tensors


def _prefix(base: Base, name: str, deltas: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sites = [site for _, site in base.anatomy.kv_modules]
    if [site.name for site in sites] != list(deltas):
        raise UnsupportedError("the AdapterHub library needs a prefix in every attention module")
    if any(delta.shift for delta in deltas.values()):
        raise UnsupportedError("the AdapterHub library leaves text positions as they are; this prefix moves them")
    flat = torch.stack([t for site in sites for t in deltas[site.name].kv()], 1)
    root = _spoken(base, "prefix_tuning") + f".prefix_tunings.{name}.self_prefix."
    settings = {"architecture": "prefix_tuning", "flat": True, "prefix_length": len(flat), "cross_prefix": True,
                "encoder_prefix": True, "leave_out": [], "dropout": 0.0, "non_linearity": "tanh",
                "bottleneck_size": 512, "shared_gating": True, "use_gating": False}  # fmt: skip
    return settings, {root + "control_trans": flat.reshape(-1)}


def _prompt(base: Base, name: str, deltas: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    (delta,), kind = deltas.values(), base.anatomy.model_type
    combine = {behind: combine for combine, behind in BEHIND.items()}
    if not delta.embedded or delta.behind not in combine:
        raise UnsupportedError(
            "prompts of the AdapterHub library stand behind the embeddings' norm, and behind no token or one of the "
            f"text; this one is place={'embedded' if delta.embedded else 'input'!r}, behind={delta.behind}: train "
            "prompt(place='embedded')"
        )
    if kind not in (*BERT_LIKE, *PROMPTS):
        raise UnsupportedError(f"where the AdapterHub library keeps prompts of {kind} is not known here")
    tokens = delta.tokens()
    settings = {"architecture": "prompt_tuning", "combine": combine[delta.behind], "prompt_length": len(tokens),
                "prompt_init": "random_uniform", "prompt_init_text": None, "init_weights_seed": None}  # fmt: skip
    return settings, {_spoken(base, "prompt_tuning") + f".prompt_tunings.{name}.prompt_embedding.weight": tokens}


def _head(base: Base, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return settings and tensors of a classification head, its standardisation folded in."""
    prompts = [delta for _, delta in adapter.module.items() if isinstance(delta, VirtualTokens)]
    if any(not delta.behind and not delta.leads for delta in prompts):
        raise UnsupportedError(
            "heads of the AdapterHub library read the first token, which there is a virtual one: train prompt("
            "place='embedded', leads=True) or behind=1, or export with head=False (--no-head)"
        )
    head: nn.Module | None = adapter.head
    if adapter.task["kind"] != "classification" or base.anatomy.model_type not in ENCODERS:
        raise UnsupportedError(
            f"a head of {adapter.task['kind']} on {base.anatomy.model_type}: only classification heads of encoders are "
            "written; export with head=False (--no-head)"
        )
    if adapter.task["pooling"] != "first" or type(head) not in (LinearHead, DenseHead):
        raise UnsupportedError(
            f"the head reads pooling={adapter.task['pooling']!r}, heads of the AdapterHub library the first token: "
            "train with pooling='first', or export with head=False (--no-head)"
        )
    assert isinstance(head, LinearHead)
    weight, bias = plain_linear(head)
    root, dense = f"heads.{adapter.name}.", isinstance(head, DenseHead)
    tensors = {f"{root}{4 if dense else 1}.weight": weight, f"{root}{4 if dense else 1}.bias": bias}
    if isinstance(head, DenseHead):
        tensors |= {f"{root}1.weight": head.inner_weight, f"{root}1.bias": head.inner_bias}
    return {
        "head_type": "classification", "num_labels": len(weight), "layers": 2 if dense else 1, "use_pooler": False,
        "activation_function": head.activation if isinstance(head, DenseHead) else "tanh", "bias": True,
        "dropout_prob": None, "label2id": {label: i for i, label in enumerate(adapter.labels)},
    }, tensors  # fmt: skip
