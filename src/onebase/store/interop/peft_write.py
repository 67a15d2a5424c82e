"""Write an adapter as a folder that PEFT loads, where PEFT has a form that computes the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.adapter import Adapter
from onebase.core.contracts import AdapterModule
from onebase.core.site import Site
from onebase.errors import UnsupportedError
from onebase.methods.adalora import TripletDelta
from onebase.methods.dora import DoRADelta, row_norms
from onebase.methods.ia3 import ScaleDelta
from onebase.methods.lora import LoRADelta
from onebase.methods.normdelta import NormDelta
from onebase.methods.prefix import PrefixDelta
from onebase.methods.prompt import VirtualTokens
from onebase.methods.union import ChainedDelta
from onebase.methods.vera import VeRADelta
from onebase.store.disk import write_file
from onebase.store.interop.foreign import CONFIG
from onebase.store.interop.modules import Modules, endings, gather, out_features
from onebase.store.interop.peft_head import write_head
from onebase.store.interop.peft_read import ROOT, TENSORS
from onebase.store.tensors import encode

if TYPE_CHECKING:
    from onebase.base import Base


# Families whose positions are one rotation of all features of queries and keys, the same in every layer.
ROTARY = ("gemma", "gemma2", "llama", "mistral", "qwen2", "qwen3")


@dataclass(eq=False)
class Written:
    """What goes into a folder.

    Attributes:
        config: of the method, for adapter_config.json.
        tensors: path in the file -> tensor, without the root of the keys.
        whole: tensors with their final key.
        notes: what was converted.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_peft(base: Base, adapter: Adapter, folder: Path, head: bool = True) -> list[str]:
    """Write an adapter for ``PeftModel.from_pretrained``.

    Args:
        base: what the adapter is attached to.
        adapter: the adapter.
        folder: an empty folder.
        head: write the task head too.

    Returns:
        What a person should know.

    Raises:
        UnsupportedError: PEFT has no form that computes the same, and why.
    """
    module = adapter.module.fold()
    with torch.no_grad():
        written = _form(base, module)(base, adapter, module)
        heads = write_head(base, adapter.head, adapter.task) if head and adapter.head is not None else {}
    virtual = "num_virtual_tokens" in written.config
    if heads and virtual and written.config["peft_type"] == "PROMPT_TUNING" and adapter.task["pooling"] == "first":
        raise UnsupportedError("PEFT's head would read the first column, which is a virtual token: export without head")
    task_type = _task_type(base, bool(heads))
    modules, root = Modules(base), "base_model." if virtual else ROOT
    tensors = {ROOT + modules.spoken(path, bool(heads) or _headed(base)): t for path, t in written.tensors.items()}
    tensors |= {root + (f"{modules.named}.{key}" if key.startswith("pooler") else key): t for key, t in heads.items()}
    config = {
        "auto_mapping": None if task_type else {"base_model_class": type(base.model).__name__,
                                                "parent_library": type(base.model).__module__},
        "base_model_name_or_path": base.id,
        "inference_mode": True,
        "modules_to_save": sorted({key.split(".")[0] for key in heads}) or None,
        "revision": None,
        "task_type": task_type,
        **written.config,
    }  # fmt: skip
    data, _ = encode({key: t.detach().float() for key, t in (tensors | written.whole).items()})
    write_file(folder / TENSORS, data)
    write_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    write_file(folder / "README.md", _card(base, adapter, config).encode())
    if heads:
        labels = ", ".join(adapter.labels)
        written.notes.append(f"the file holds no names of labels; their order is: {labels}")
    return written.notes


def _headed(base: Base) -> bool:
    return base.model.base_model is not base.model


def _task_type(base: Base, head: bool) -> str | None:
    if head:
        return "SEQ_CLS"
    if base.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if base.has_lm_head else "FEATURE_EXTRACTION"


def _card(base: Base, adapter: Adapter, config: Mapping[str, Any]) -> str:
    labels = f"\nLabels, in order: {', '.join(adapter.labels)}\n" if adapter.labels else ""
    return (
        f"---\nlibrary_name: peft\nbase_model: {base.id}\n---\n\n# {adapter.name}\n\n"
        f"{adapter.method.shorthand()}, exported from onebase as {config['peft_type']}.\n{labels}"
    )


def _form(base: Base, module: AdapterModule) -> Callable[[Base, Adapter, AdapterModule], Written]:
    """Return the writer for the deltas of a module."""
    deltas = [delta for _, delta in module.items()]
    parts = [part for delta in deltas for part in _chain(delta)]
    kinds = {TripletDelta if isinstance(part, TripletDelta) else type(part) for part in parts}
    fused = any(base.anatomy.sites[name].is_part for name, _ in module.items())
    if kinds == {VeRADelta} and not fused and not any(isinstance(d, ChainedDelta) for d in deltas):
        return _vera
    if kinds <= {LoRADelta, TripletDelta, VeRADelta}:
        return _lora
    single = {DoRADelta: _lora, ScaleDelta: _ia3, NormDelta: _norms, VirtualTokens: _prompt, PrefixDelta: _prefix}
    for kind, writer in single.items():
        if kinds == {kind} and not any(isinstance(delta, ChainedDelta) for delta in deltas):
            return writer
    names = ", ".join(sorted(kind.__name__.removesuffix("Delta") for kind in kinds))
    raise UnsupportedError(
        f"PEFT has no form that computes {names}: it reads LoRA, DoRA, IA3, VeRA, LN tuning, prompts and prefixes, one "
        "of them per file. Changes of weights can be merged instead: onebase export --to merged"
    )


def _chain(delta: nn.Module) -> tuple[nn.Module, ...]:
    return delta.chain if isinstance(delta, ChainedDelta) else (delta,)


def _by_module(base: Base, module: AdapterModule) -> dict[str, dict[str, Any]]:
    """Return module path -> {site name: delta}."""
    found: dict[str, dict[str, Any]] = {}
    for name, delta in module.items():
        if not (isinstance(delta, TripletDelta) and not len(delta.lam)):  # AdaLoRA may leave a map nothing
            found.setdefault(base.anatomy.sites[name].path, {})[name] = delta
    return found


def low_rank(delta: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Return A (r, d_in), B (d_out, r) and s of a delta that adds s B A x."""
    if isinstance(delta, (LoRADelta, DoRADelta)):
        return delta.A, delta.B, delta.scale
    if isinstance(delta, TripletDelta):
        return delta.Q, delta.P * delta.lam, delta.scale
    if isinstance(delta, VeRADelta):
        a, b = delta._own()
        return delta.d[:, None] * a, delta.b[:, None] * b, 1.0
    assert isinstance(delta, ChainedDelta)
    parts = [low_rank(part) for part in delta.chain]
    return torch.cat([a for a, _, _ in parts]), torch.cat([b * s for _, b, s in parts], 1), 1.0


def _joined(sites: list[Site], deltas: Mapping[str, nn.Module], total: int) -> tuple[Tensor, Tensor, float]:
    """Return A, B and s of a whole module of which several sites are adapted: one block of ranks for each."""
    found = {name: low_rank(delta) for name, delta in deltas.items()}
    first, _, scale = next(iter(found.values()))
    if all(s == scale and a.shape == first.shape and torch.equal(a, first) for a, _, s in found.values()):
        values = [found[s.name][1].cpu() if s.name in found else torch.zeros(s.d_out, len(first)) for s in sites]
        return first, gather(sites, values, total), scale
    ranks = sum(len(a) for a, _, _ in found.values())
    start, blocks = 0, []
    for site in sites:
        block = torch.zeros(site.d_out, ranks)
        if site.name in found:
            a, b, s = found[site.name]
            block[:, start : start + len(a)] = (b * s).cpu()
            start += len(a)
        blocks.append(block)
    return torch.cat([found[s.name][0] for s in sites if s.name in found]), gather(sites, blocks, total), 1.0


def _lora(base: Base, adapter: Adapter, module: AdapterModule) -> Written:
    modules, rslora = Modules(base), bool(getattr(adapter.method, "rslora", False))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    out = Written({})
    dora = False
    for path, deltas in _by_module(base, module).items():
        sites, own = modules.sites(path, "linear"), modules.get(path)
        reason = modules.covered(path)
        if reason:
            raise UnsupportedError(f"{path}: {reason}, so its change cannot be written for the whole module")
        a, b, scale = _joined(sites, deltas, out_features(own))
        ranks[path] = len(a)
        alphas[path] = scale * (len(a) ** 0.5 if rslora else len(a))
        out.tensors[f"{path}.lora_A.weight"], out.tensors[f"{path}.lora_B.weight"] = a, b
        if isinstance(next(iter(deltas.values())), DoRADelta):
            dora = True
            norms = [deltas[s.name].magnitude.cpu() if s.name in deltas else row_norms(s.weight()).cpu() for s in sites]
            out.tensors[f"{path}.lora_magnitude_vector"] = gather(sites, norms, out_features(own))
        if len(deltas) > 1 and ranks[path] > len(low_rank(next(iter(deltas.values())))[0]):
            note = "parts of fused maps with different A are written as one LoRA whose rank is the sum of theirs: exact"
            out.notes += [] if note in out.notes else [note]
    if adapter.method.name not in ("lora", "dora"):
        out.notes.append(f"{adapter.method.name} is written as LoRA: the same function")
    rank, rank_pattern = _common(modules, ranks)
    alpha, alpha_pattern = _common(modules, alphas)
    out.config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": _plain(alpha), "lora_dropout": 0.0, "bias": "none",
        "rank_pattern": rank_pattern, "alpha_pattern": {k: _plain(v) for k, v in alpha_pattern.items()},
        "use_rslora": rslora, "use_dora": dora, "init_lora_weights": True,
        "fan_in_fan_out": _transposed(modules, ranks), "target_modules": endings(modules, ranks),
    }  # fmt: skip
    return out


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value


def _common(modules: Modules, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    counted = list(values.values())
    default = max(dict.fromkeys(counted), key=counted.count)
    return default, {modules.spoken(path, False): v for path, v in values.items() if v != default}


def _transposed(modules: Modules, paths: Mapping[str, Any]) -> bool:
    return all(type(modules.get(path)).__name__ == "Conv1D" for path in paths)


def _ia3(base: Base, adapter: Adapter, module: AdapterModule) -> Written:
    modules, forward = Modules(base), []
    out = Written({})
    paths: dict[str, bool] = {}
    for path, deltas in _by_module(base, module).items():
        at_input = [delta for delta in deltas.values() if delta.at_input]
        if at_input and len(deltas) > 1:
            raise UnsupportedError(f"{path} has a scale at its input and one at its output; PEFT has one per module")
        if at_input:
            forward.append(path)
            scale = (1 + at_input[0].scale)[None]
        else:
            sites = modules.sites(path, "linear")
            values = [1 + deltas[s.name].scale.cpu() if s.name in deltas else torch.ones(s.d_out) for s in sites]
            scale = gather(sites, values, out_features(modules.get(path)))[:, None]
        paths[path] = True
        out.tensors[f"{path}.ia3_l"] = scale
    outputs = [path for path in paths if path not in forward]
    names = endings(modules, forward, outputs)
    out.config = {
        "peft_type": "IA3", "target_modules": sorted({*names, *endings(modules, outputs, forward)}),
        "feedforward_modules": names,
        "fan_in_fan_out": _transposed(modules, paths), "init_ia3_weights": True,
    }  # fmt: skip
    return out


def _vera(base: Base, adapter: Adapter, module: AdapterModule) -> Written:
    modules, out = Modules(base), Written({})
    paths: dict[str, bool] = {}
    shared: Any = None
    for name, delta in module.items():
        path, shared = base.anatomy.sites[name].path, delta.shared  # type: ignore[union-attr]
        paths[path] = True
        out.tensors[f"{path}.vera_lambda_b"], out.tensors[f"{path}.vera_lambda_d"] = delta.b, delta.d  # type: ignore[union-attr]
    out.whole = {"base_model.vera_A": shared.A, "base_model.vera_B": shared.B}
    out.config = {
        "peft_type": "VERA", "r": len(shared.A), "target_modules": endings(modules, paths), "projection_prng_key": 0,
        "save_projection": True, "vera_dropout": 0.0, "d_initial": 0.1, "bias": "none", "init_weights": True,
        "fan_in_fan_out": _transposed(modules, paths),
    }  # fmt: skip
    return out


def _norms(base: Base, adapter: Adapter, module: AdapterModule) -> Written:
    modules, out = Modules(base), Written({})
    paths: dict[str, bool] = {}
    for name, delta in module.items():
        site = base.anatomy.sites[name]
        paths[site.path] = True
        weight, bias = delta.merged(site.weight(), site.bias())  # type: ignore[union-attr]
        out.tensors[f"{site.path}.ln_tuning_layers.weight"] = weight
        if bias is not None:
            out.tensors[f"{site.path}.ln_tuning_layers.bias"] = bias
    out.config = {"peft_type": "LN_TUNING", "target_modules": endings(modules, paths)}
    return out


def _prompt(base: Base, adapter: Adapter, module: AdapterModule) -> Written:
    ((_, delta),) = module.items()
    if delta.embedded or delta.behind or delta.leads:  # type: ignore[union-attr]
        raise UnsupportedError(
            "PEFT's prompts stand before the text, in front of the embeddings' positions and norm: it has no form of "
            "prompt(place='embedded'), behind=... or leads=True"
        )
    tokens = delta.tokens().cpu()  # type: ignore[union-attr]
    length, stacks = len(tokens), len(base.anatomy.stacks)
    if stacks > 1:  # PEFT keeps rows for the decoder, which it never reads
        tokens = torch.cat([tokens, torch.zeros_like(tokens)])
    out = Written({"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM", **_sizes(base, length)})
    out.whole = {"prompt_embeddings": tokens}
    return out


def _prefix(base: Base, adapter: Adapter, module: AdapterModule) -> Written:
    items = dict(module.items())
    sites = [site for _, site in base.anatomy.kv_modules]
    first: Any = next(iter(items.values()))
    if len(base.anatomy.stacks) > 1:
        raise UnsupportedError("PEFT's prefixes of encoder-decoders have relative positions; onebase's have none")
    if [site.name for site in sites] != list(items) or len({(s.heads, s.head_dim) for s in sites}) > 1:
        raise UnsupportedError("PEFT needs a prefix of the same shape in every attention module")
    turn = (lambda keys: keys) if first.shift else _turn(base, len(first.kv()[0]))
    windows = any(getattr(core, "sliding_window", None) for core, _ in base.anatomy.kv_modules)
    if windows and not first.slides:
        raise UnsupportedError("PEFT's prefixes slide out of this base's windows; train with prefix(slides=True)")
    pairs: list[tuple[Tensor, Tensor]] = [items[site.name].kv() for site in sites]  # type: ignore[union-attr]
    flat = torch.stack([t for keys, values in pairs for t in (turn(keys), values)], 1)
    out = Written({"peft_type": "PREFIX_TUNING", "prefix_projection": False, "encoder_hidden_size": None,
                   **_sizes(base, len(flat), sites)})  # fmt: skip
    out.whole = {"prompt_embeddings": flat.reshape(len(flat), -1)}
    return out


def _turn(base: Base, length: int) -> Callable[[Tensor], Tensor]:
    """Return what moves keys by `length` rotary positions: as far as PEFT moves the texts that read them.

    Raises:
        UnsupportedError: positions of this base are no rotation, so nothing makes up for moving the texts.
    """
    kind = base.anatomy.model_type
    if kind not in ROTARY:
        raise UnsupportedError(
            f"PEFT starts text positions behind the prefix, this adapter leaves them, and positions of {kind} are no "
            "plain rotation that could make up for it: train with prefix(positions='follow', slides=True) to export it"
        )
    rotary = next(module for name, module in base.model.named_modules() if name.endswith("rotary_emb"))
    stretch = float(getattr(rotary, "attention_scaling", 1.0))
    cos, sin = rotary(torch.zeros(1, device=base.device), torch.tensor([[length]], device=base.device))

    def turned(keys: Tensor) -> Tensor:
        half = keys.shape[-1] // 2
        swapped = torch.cat([-keys[..., half:], keys[..., :half]], -1)
        return (keys * cos[0] + swapped * sin[0]) / stretch

    return turned


def _sizes(base: Base, length: int, sites: list[Site] | None = None) -> dict[str, Any]:
    config, stack = base.model.config, base.anatomy.stacks[0]
    heads = sites[0].heads if sites else int(getattr(config, "num_attention_heads", 1))
    return {
        "num_virtual_tokens": length,
        "num_transformer_submodules": len(base.anatomy.stacks),
        "num_layers": len(sites) if sites else len(stack.layers),
        "num_attention_heads": heads,
        "token_dim": heads * sites[0].head_dim if sites else stack.width,
    }
