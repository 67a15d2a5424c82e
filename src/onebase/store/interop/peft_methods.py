"""The tensors of each PEFT method as the tensors of a method here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.core.site import Site
from onebase.methods.dora import DoRA
from onebase.methods.ia3 import HIDDEN, IA3
from onebase.methods.layernorm import LayerNorm
from onebase.methods.lora import LoRA
from onebase.methods.method import Method
from onebase.methods.prefix import Prefix
from onebase.methods.prompt import Prompt
from onebase.methods.vera import VeRA
from onebase.store.interop.modules import by_pattern, in_features, out_features, patterns
from onebase.store.interop.peft_config import pattern_value

if TYPE_CHECKING:
    from onebase.store.interop.peft_read import PeftFile

Read = tuple[Method, dict[str, Tensor]]


def _expect(file: PeftFile, path: str, what: str, shape: tuple[int, ...]) -> bool:
    own = tuple(file.parts[path][what].shape)
    if own != shape:
        file.wrong.append(f"{file.names[path]} {what}: shape {own}, this base needs {shape}")
    return own == shape


def _whole_linears(file: PeftFile) -> list[tuple[str, list[Site]]]:
    """Return (module, its sites) of every adapted linear map; those that have no sites go on the list of problems."""
    found = []
    for path in file.parts:
        reason = file.modules.covered(path)
        if reason:
            file.wrong.append(f"{file.names[path]}: {reason}")
        else:
            found.append((path, file.modules.sites(path, "linear")))
    return found


def lora(file: PeftFile) -> Read:
    """LoRA and DoRA. A fused map becomes its parts, which share A and have their rows of B."""
    config, dora = file.config, bool(file.config.get("use_dora"))
    _take_pooler(file, dora)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    for path, sites in _whole_linears(file):
        found, module, name = file.parts[path], file.modules.get(path), file.names[path]
        rank = int(pattern_value(config.get("rank_pattern") or {}, name, config.get("r", 8)))
        alpha = float(pattern_value(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8)))
        fits = _expect(file, path, "A", (rank, in_features(module)))
        fits &= _expect(file, path, "B", (out_features(module), rank))
        fits &= not dora or _expect(file, path, "magnitude", (out_features(module),))
        for site in sites if fits else ():
            ranks[site.name], alphas[site.name] = rank, alpha
            tensors[f"deltas.{site.name}.A"] = found["A"]
            tensors[f"deltas.{site.name}.B"] = site.take(found["B"], 0)
            if dora:
                tensors[f"deltas.{site.name}.magnitude"] = site.take(found["magnitude"], 0)
    if not ranks:
        return LoRA(), {}
    anatomy = file.modules.anatomy
    (rank, other_ranks), (alpha, other_alphas) = by_pattern(anatomy, ranks), by_pattern(anatomy, alphas)
    settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "ranks": other_ranks, "alphas": other_alphas}
    method = (DoRA if dora else LoRA)(sites=patterns(anatomy, ranks), rslora=bool(config.get("use_rslora")), **settings)
    return method, tensors


def _take_pooler(file: PeftFile, dora: bool) -> None:
    """Keep the change of a pooler for the head: the pooler is its hidden layer here, so it is folded in."""
    stack = file.modules.anatomy.stacks[0]
    dense = getattr(stack.pooler, "dense", None)
    path = next((path for path in file.parts if dense is not None and file.modules.get(path) is dense), None)
    if path is None or dense is None or dora or file.config.get("task_type") != "SEQ_CLS":
        return
    found = file.parts.pop(path)
    name = file.names.pop(path)
    rank = int(pattern_value(file.config.get("rank_pattern") or {}, name, file.config.get("r", 8)))
    alpha = float(pattern_value(file.config.get("alpha_pattern") or {}, name, file.config.get("lora_alpha", 8)))
    if found["A"].shape != (rank, in_features(dense)) or found["B"].shape != (out_features(dense), rank):
        file.wrong.append(f"{name}: A {tuple(found['A'].shape)} and B {tuple(found['B'].shape)} do not fit rank {rank}")
        return
    scale = alpha / (math.sqrt(rank) if file.config.get("use_rslora") else rank)
    file.pooler = scale * found["B"] @ found["A"]
    file.notes.append(f"the change of {name} is folded into the head's hidden layer: exact")


def ia3(file: PeftFile) -> Read:
    """IA3: scales of outputs, and of the inputs of the maps that `feedforward_modules` names.

    The input of an attention's output map is what its values give, weighted. Where every head has values of its own, a
    scale there is a scale of the values, and is carried over as one.
    """
    forward = file.config.get("feedforward_modules") or []
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for path, sites in _whole_linears(file):
        module, scale = file.modules.get(path), file.parts[path]["ia3"]
        at_input = _ends(forward, file.names[path])
        shape = (1, in_features(module)) if at_input else (out_features(module), 1)
        if not _expect(file, path, "ia3", shape):
            continue
        if not at_input:
            for site in sites:
                outputs[site.name] = outputs.get(site.name, torch.ones(site.d_out)) * site.take(scale.flatten(), 0)
        elif file.modules.sites(path, "input"):
            inputs[file.modules.sites(path, "input")[0].name] = scale.flatten()
        else:
            _scale_values(file, path, sites, scale.flatten(), outputs)
    anatomy = file.modules.anatomy
    chosen = patterns(anatomy, outputs)
    if inputs:  # all or none have one here: a factor of 1 changes nothing
        chosen = (*chosen, HIDDEN)
        for site in anatomy.sites.values():
            if site.kind == "input":
                inputs.setdefault(site.name, torch.ones(site.d_out))
    tensors = {f"deltas.{name}.scale": scale - 1 for name, scale in {**outputs, **inputs}.items()}
    return IA3(sites=chosen or (HIDDEN,)), tensors


def _scale_values(file: PeftFile, path: str, sites: list[Site], scale: Tensor, outputs: dict[str, Tensor]) -> None:
    """Move a scale of the input of `o` to the values."""
    site = sites[0]
    value = file.modules.anatomy.sites.get(f"{site.stack}/{site.layer}/{site.sublayer}/v")
    if site.part != "o" or value is None or value.unsupported or value.d_out != len(scale):
        file.wrong.append(
            f"{file.names[path]}: a scale of this map's input, which is neither the hidden vector of an MLP nor what "
            "values of single heads give"
        )
        return
    outputs[value.name] = outputs.get(value.name, torch.ones(len(scale))) * scale
    file.notes.append(f"the scale of the input of {file.names[path]} is carried over as a scale of the values: exact")


def _ends(wanted: Any, path: str) -> bool:
    from onebase.store.interop.peft_config import targeted

    return targeted(wanted, path)


def vera(file: PeftFile) -> Read:
    """VeRA. Where a map is fused its parts take other rows of B than VeRA's here, so all becomes a LoRA: exact."""
    found = _whole_linears(file)
    rank = int(file.config.get("r", 256))
    wide = max((in_features(file.modules.get(path)) for path, _ in found), default=0)
    tall = max((out_features(file.modules.get(path)) for path, _ in found), default=0)
    for path, _ in found:  # before anything of the stated rank is drawn
        _expect(file, path, "d", (rank,))
        _expect(file, path, "b", (out_features(file.modules.get(path)),))
    if file.wrong:
        return VeRA(), {}
    a, b = _projections(file, rank, wide, tall)
    if file.wrong:
        return VeRA(), {}
    anatomy = file.modules.anatomy
    names = [site.name for _, sites in found for site in sites]
    if any(len(sites) > 1 for _, sites in found):
        return _vera_as_lora(file, found, a, b, rank)
    tensors = {"shared.A": a, "shared.B": b}
    for path, (site,) in found:
        tensors |= {f"deltas.{site.name}.{what}": file.parts[path][what] for what in "db"}
    return VeRA(rank=rank, sites=patterns(anatomy, names), stored=True), tensors


def _projections(file: PeftFile, rank: int, wide: int, tall: int) -> tuple[Tensor, Tensor]:
    """Return A (r, d_in) and B (d_out, r) of the largest map, as stored or drawn again as PEFT draws them."""
    a, b = file.whole.get("vera_A"), file.whole.get("vera_B")
    if a is None and b is None and not file.config.get("save_projection", True):
        generator = torch.Generator().manual_seed(int(file.config["projection_prng_key"]))

        def draw(rows: int, columns: int) -> Tensor:
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))  # kaiming uniform, the gain of a ReLU
            return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

        file.notes.append("the file leaves VeRA's random matrices out; they were drawn again from its seed")
        return draw(rank, wide), draw(tall, rank)
    for name, tensor, shape in (("vera_A", a, (rank, wide)), ("vera_B", b, (tall, rank))):
        if tensor is None:
            file.wrong.append(f"missing tensor base_model.{name} {shape}")
        elif tuple(tensor.shape) != shape:
            file.wrong.append(f"base_model.{name}: shape {tuple(tensor.shape)}, this base needs {shape}")
    empty = torch.zeros(0)
    return (empty if a is None else a), (empty if b is None else b)


def _vera_as_lora(file: PeftFile, found: list[tuple[str, list[Site]]], a: Tensor, b: Tensor, rank: int) -> Read:
    tensors: dict[str, Tensor] = {}
    for path, sites in found:
        own, module = file.parts[path], file.modules.get(path)
        down = own["d"][:, None] * a[:, : in_features(module)]
        up = own["b"][:, None] * b[: out_features(module)]
        for site in sites:
            tensors[f"deltas.{site.name}.A"], tensors[f"deltas.{site.name}.B"] = down, site.take(up, 0)
    names = [site.name for _, sites in found for site in sites]
    file.notes.append(f"VeRA over a fused map is carried over as LoRA of rank {rank}: the same function, more values")
    return LoRA(rank=rank, alpha=float(rank), sites=patterns(file.modules.anatomy, names)), tensors


def layernorm(file: PeftFile) -> Read:
    """LN tuning: gains and biases in place of the base's own; here they are changes of them."""
    anatomy = file.modules.anatomy
    tensors: dict[str, Tensor] = {}
    biased = False
    for path, found in file.parts.items():
        module, name = file.modules.get(path), file.names[path]
        own = {"gamma": getattr(module, "weight", None), "beta": getattr(module, "bias", None)}
        change = {}
        for what, value in found.items():
            before = own[what]
            if before is None or value.shape != before.shape:
                shape = None if before is None else tuple(before.shape)
                file.wrong.append(f"{name} {what}: shape {tuple(value.shape)}, this base has {shape}")
            else:
                change[what] = value - before.detach().float().cpu()
        sites = file.modules.sites(path, "norm")
        if not sites or sites[0].sublayer not in ("attention", "cross", "mlp") or sites[0].part in ("q_norm", "k_norm"):
            if all(not bool(value.any()) for value in change.values()):
                file.notes.append(f"{name} is as in the base: left out")
            else:
                file.wrong.append(f"{name}: onebase adapts the norms of layers, and this is none of them")
            continue
        biased |= "beta" in change
        tensors |= {f"deltas.{sites[0].name}.{what}": value for what, value in change.items()}
    method = LayerNorm(bias=biased)
    for site in method.select(list(anatomy.sites.values())):
        tensors.setdefault(f"deltas.{site.name}.gamma", torch.zeros(site.d_out))
        if biased and site.norm is not None and site.norm.has_bias:
            tensors.setdefault(f"deltas.{site.name}.beta", torch.zeros(site.d_out))
    return method, tensors


def _virtual(file: PeftFile, width: int, rows: int) -> Tensor | None:
    """Return `prompt_embeddings` where its shape is what the settings say."""
    tensor = file.whole.get("prompt_embeddings")
    if tensor is None or tuple(tensor.shape) != (rows, width):
        shown = "missing tensor prompt_embeddings" if tensor is None else f"prompt_embeddings: {tuple(tensor.shape)}"
        file.wrong.append(f"{shown}, this base needs {(rows, width)}")
        return None
    return tensor


def prompt(file: PeftFile) -> Read:
    """Prompt tuning and P-tuning, whose encoder is folded away in the file."""
    length, parts = int(file.config["num_virtual_tokens"]), int(file.config.get("num_transformer_submodules") or 1)
    stack = file.modules.anatomy.stacks[0]
    tokens = _virtual(file, stack.width, length * parts)
    method = Prompt(length=length, init="uniform")
    if tokens is None:
        return method, {}
    if parts > 1:
        file.notes.append(f"rows {length} to {length * parts - 1} of prompt_embeddings are never used: left out")
    return method, {f"deltas.{stack.name}/embeddings.embedding": tokens[:length]}


def prefix(file: PeftFile) -> Read:
    """Prefix tuning: raw keys and values per layer; text positions start behind them."""
    config, anatomy = file.config, file.modules.anatomy
    length, layers = int(config["num_virtual_tokens"]), int(config["num_layers"])
    heads = int(config["num_attention_heads"])
    dim = int(config["token_dim"]) // heads
    sites = [site for _, site in anatomy.kv_modules]
    method = Prefix(length=length, init="random", positions="follow", slides=True)
    if any(site.stack != sites[0].stack for site in sites):
        file.wrong.append(
            "prefix tuning of an encoder-decoder: PEFT gives its columns relative positions in the decoder alone, "
            "and onebase gives prefixes none"
        )
        return method, {}
    shape = (len(sites), sites[0].heads, sites[0].head_dim)
    if (layers, heads, dim) != shape:
        file.wrong.append(f"layers, heads and head width are {(layers, heads, dim)}, this base has {shape}")
        return method, {}
    flat = _virtual(file, layers * 2 * heads * dim, length)
    if flat is None:
        return method, {}
    both = flat.view(length, layers * 2, heads, dim)
    tensors = {}
    for i, site in enumerate(sites):
        tensors[f"deltas.{site.name}.keys"] = both[:, 2 * i].clone()
        tensors[f"deltas.{site.name}.values"] = both[:, 2 * i + 1].clone()
    return method, tensors


READERS: dict[str, Callable[[PeftFile], Read]] = {
    "LORA": lora,
    "IA3": ia3,
    "VERA": vera,
    "LN_TUNING": layernorm,
    "PROMPT_TUNING": prompt,
    "P_TUNING": prompt,
    "PREFIX_TUNING": prefix,
}
