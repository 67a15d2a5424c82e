"""Read an adapter folder of the AdapterHub library `adapters`: bottlenecks, LoRA, IA3 and flat prefixes, with heads.

Formulas there, h the branch's output, x the residual's input, LN the base's norm behind the branch (absent where norms
come first): double_seq_bn h + U f(D h); seq_bn h + U f(D LN(h + x)); par_bn h + s U f(D x). Neither prompts nor
prefixes move the positions of texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.core.site import Site
from onebase.errors import UnsupportedError
from onebase.methods.bottleneck import Bottleneck
from onebase.methods.ia3 import IA3
from onebase.methods.lora import LoRA
from onebase.methods.method import Method
from onebase.methods.prefix import Prefix
from onebase.methods.prompt import Prompt
from onebase.store.interop.foreign import CONFIG, Foreign, most_bytes, read_settings, read_tensors, refuse
from onebase.store.interop.modules import Modules, patterns

if TYPE_CHECKING:
    from onebase.base import Base

TENSORS, PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
HEAD_CONFIG, HEAD, HEAD_PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu", "tanh": "tanh", "linear": "identity"}
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "deberta-v2")
BRANCH = {
    "attention.output": "attention",
    "output": "mlp",
    "attention_adapters": "attention",
    "output_adapters": "mlp",
}
PLACE = re.compile(
    r"^(?:.*\.)?(?:layer|layers|h)\.(\d+)\.(attention\.output|output|attention_adapters|output_adapters)\."
    r"(?:adapters|layer_text_task_adapters|attention_text_task_adapters)\.([^.]+)\.adapter_(down\.0|up)\.(weight|bias)$"
)
PROMPTED = re.compile(r"^(?:.*\.)?prompt_tuning\.prompt_tunings\.([^.]+)\.prompt_embedding\.weight$")
# Settings of bottlenecks: value -> what makes it another function
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "adapter_residual_before_ln": (False,),
    "residual_before_ln": (True,),
    "ln_before": (False,),
    "ln_after": (False,),
    "original_ln_after": (True,),
    "use_gating": (False,),
    "cross_adapter": (False,),
    "factorized_phm_W": (True, False),
    "phm_layer": (False,),
    "stochastic_depth": (0.0, 0),
    "is_parallel": (True, False),
}
HISTORY = {"architecture", "init_weights", "init_weights_seed", "leave_out", "reduction_factor", "output_adapter",
           "mh_adapter", "non_linearity", "original_ln_before", "scaling", "dropout", "inv_adapter",
           "invertible_adapter",
           "inv_adapter_reduction_factor", "hypercomplex_nonlinearity", "learn_phm", "phm_bias", "phm_c_init",
           "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule",
           "factorized_phm_rule"}  # fmt: skip
LORA = {"architecture", "alpha", "attn_matrices", "composition_mode", "dropout", "init_weights", "init_weights_seed",
        "intermediate_lora", "leave_out", "output_lora", "r", "selfattn_lora", "use_gating", "dtype"}  # fmt: skip
PREFIX = {"architecture", "flat", "prefix_length", "bottleneck_size", "non_linearity", "dropout", "cross_prefix",
          "encoder_prefix", "leave_out", "init_weights_seed", "shared_gating", "use_gating"}  # fmt: skip

PROMPT = {"architecture", "combine", "init_weights_seed", "prompt_init", "prompt_init_text", "prompt_length",
          "random_uniform_scale"}  # fmt: skip
BEHIND = {"prefix": 0, "prefix_after_bos": 1}  # what `combine` says: real tokens in front of virtual ones


@dataclass(eq=False)
class HubFile:
    """A file of the AdapterHub library: its method's settings, its tensors, and what does not fit."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    modules: Modules
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


Read = tuple[Method, dict[str, Tensor]]


def read_adapterhub(folder: Path, base: Base, labels: Sequence[str] = ()) -> Foreign:
    """Read an adapter of the AdapterHub library for a base.

    Raises:
        UnsupportedError: settings that cannot be carried over, each named; or a pickle, with the command to convert it.
        CorruptError: a missing, damaged or not finite file.
        MismatchError: tensors that do not fit this base, each named.
    """
    raw = read_settings(folder / CONFIG)
    config = dict(raw.get("config") or {})
    kind = (
        "prefix" if config.get("architecture") == "prefix_tuning" else str(config.get("architecture") or "bottleneck")
    )
    refuse(f"{folder} cannot be carried over", _settings(raw, config, kind, base), UnsupportedError)
    file = HubFile(config, read_tensors(folder, TENSORS, PICKLE, most_bytes(base)), Modules(base))
    method, tensors = READERS[kind](file)
    task, head = _head(folder, base, tuple(labels), file)
    if head and isinstance(method, Prompt):  # the library's head reads the first token of the longer row
        method = replace(method, leads=not method.behind)
    refuse(f"{folder} does not fit this base ({base.id})", file.wrong)
    return Foreign(
        format="adapterhub", method=method, task=task, tensors={k: t.float() for k, t in (tensors | head).items()},
        notes=tuple(file.notes), made_for=str(raw.get("model_name") or ""), facts={"version": raw.get("version")},
    )  # fmt: skip


def _settings(raw: Mapping[str, Any], config: Mapping[str, Any], kind: str, base: Base) -> Iterator[str]:
    """Yield every setting that cannot be carried over."""
    if kind not in READERS:
        yield f"architecture {kind!r}; onebase reads {', '.join(READERS)}"
        return
    width = raw.get("hidden_size")
    if width is not None and width != base.anatomy.hidden_size:
        yield f"hidden_size {width}, this base has {base.anatomy.hidden_size}"
    if raw.get("model_type") not in (None, base.anatomy.model_type):
        yield f"model_type {raw.get('model_type')!r}, this base is {base.anatomy.model_type!r}"
    if base.is_encoder_decoder:
        yield "an encoder-decoder: onebase reads files of encoders and decoders"
    known = {"bottleneck": HISTORY | NEUTRAL.keys(), "lora": LORA, "prefix": PREFIX, "prompt_tuning": PROMPT}[kind]
    for key, value in config.items():
        if key in NEUTRAL and kind == "bottleneck" and value not in NEUTRAL[key]:
            yield f"{key} = {value!r}: only {NEUTRAL[key][0]!r} can be read"
        elif key not in known and value not in (None, False, {}, [], ""):
            yield f"{key} = {value!r}: onebase has nothing that does this"
    if config.get("use_gating"):
        yield "use_gating: gates are computed from each input; onebase has none"


def _bottleneck(file: HubFile) -> Read:
    """Bottlenecks: the tensors tell where they are and how large."""
    config, wrong = file.config, file.wrong
    found: dict[str, Tensor] = {}
    sizes: dict[str, set[int]] = {}
    layers: dict[int, int] = {}
    stack = file.modules.anatomy.stacks[0].name
    names = {"down.0.weight": "down", "down.0.bias": "down_bias", "up.weight": "up", "up.bias": "up_bias"}
    for key, tensor in file.tensors.items():
        match = PLACE.match(key)
        site = match and file.modules.anatomy.sites.get(f"{stack}/{match[1]}/{BRANCH[match[2]]}")
        if not match or site is None or site.unsupported:
            wrong.append(f"unexpected tensor {key} {tuple(tensor.shape)}: {_why(key, site)}")
            continue
        what = names[f"{match[4]}.{match[5]}"]
        found[f"deltas.{site.name}.{what}"] = tensor
        if what == "down":
            sizes.setdefault(BRANCH[match[2]], set()).add(len(tensor))
            if layers.setdefault(int(match[1]), len(tensor)) != len(tensor):
                wrong.append(f"{key}: {len(tensor)} units, the layer's other adapter has {layers[int(match[1])]}")
    parallel = bool(config.get("is_parallel"))
    both = set(sizes) == {"attention", "mlp"}
    if not both and set(sizes) != {"mlp"}:
        wrong.append(
            f"adapters behind {', '.join(sizes) or 'nothing'}: onebase has them behind mlp, or attention and mlp"
        )
    if parallel and both:
        wrong.append("parallel adapters beside attention and mlp: onebase has them beside mlp")
    activation = ACTIVATIONS.get(str(config.get("non_linearity", "relu")).lower())
    if activation is None:
        wrong.append(f"non_linearity = {config.get('non_linearity')!r}: onebase has {', '.join(ACTIVATIONS)}")
    scale = config.get("scaling", 1.0)
    if not isinstance(scale, (int, float)):
        wrong.append(f"scaling = {scale!r}: expected a number")
    if config.get("inv_adapter") or config.get("invertible_adapter"):
        file.notes.append("the settings name an invertible adapter, of which the file has no tensors: left out")
    if wrong:
        return Bottleneck(), found
    every = len(layers) == len(file.modules.anatomy.stacks[0].layers)
    size = next(iter(layers.values())) if every and len(set(layers.values())) == 1 else dict(sorted(layers.items()))
    reads = "branch"
    if not parallel and config.get("original_ln_before"):
        reads = "normed" if _post_norm(file.modules) else "sum"
    return Bottleneck(
        preset="parallel" if parallel else "houlsby" if both else "pfeiffer", size=size, activation=activation,  # type: ignore[arg-type]
        scale=float(scale), norms=False, reads=reads,  # type: ignore[arg-type]
    ), found  # fmt: skip


def _why(key: str, site: Site | None) -> str:
    if site is not None:
        return site.unsupported or ""
    if "invertible" in key:
        return "invertible adapters act on embeddings, and onebase has none"
    return "onebase knows no such place"


def _post_norm(modules: Modules) -> bool:
    """Whether the base's norms come behind its branches."""
    stack = modules.anatomy.stacks[0].name
    exit_, norm = (modules.anatomy.sites.get(f"{stack}/0/mlp{end}") for end in ("", "/norm"))
    return bool(exit_ and norm and exit_.residual and exit_.residual.path != norm.path)


def _lora(file: HubFile) -> Read:
    """LoRA, and IA3, which the library writes as a LoRA that scales."""
    scales = file.config.get("composition_mode", "add") == "scale"
    rank, alpha = int(file.config.get("r", 8)), float(file.config.get("alpha", 8))
    found: dict[str, Tensor] = {}
    chosen: list[str] = []
    for key, tensor in file.tensors.items():
        match = re.match(r"^(.+)\.loras\.([^.]+)\.lora_(A|B)$", key)
        own = match and file.modules.own(match[1])
        sites = file.modules.sites(own, "linear") if own else []
        if not match or len(sites) != 1 or sites[0].is_part or sites[0].unsupported:
            why = "this base has no such linear map" if not sites else "a fused map, whose parts are stored in groups"
            file.wrong.append(f"{key}: {why}")
            continue
        site, what = sites[0], match[3]
        shape = (rank, site.d_in) if what == "A" else (site.d_out, 1 if scales else rank)
        if tuple(tensor.shape) != shape:
            file.wrong.append(f"{key}: shape {tuple(tensor.shape)}, this base needs {shape}")
        chosen += [site.name] if what == "B" else []
        if scales and what == "B":
            found[f"deltas.{site.name}.scale"] = tensor.flatten().float() - 1
        elif not scales:
            found[f"deltas.{site.name}.{what}"] = tensor
    if scales and (rank, alpha) != (1, 1.0):
        file.wrong.append(f"r = {rank}, alpha = {alpha} of a LoRA that scales: only 1 and 1 (IA3) can be read")
    if not chosen:
        file.wrong.append("the file holds no tensor of LoRA")
        return LoRA(), found
    named = patterns(file.modules.anatomy, chosen)
    return (IA3(sites=named) if scales else LoRA(rank=rank, alpha=alpha, sites=named)), found


def _prefix(file: HubFile) -> Read:
    """Flat prefixes; the same tensors again under every layer are left out."""
    length, sites = int(file.config.get("prefix_length", 30)), [s for _, s in file.modules.anatomy.kv_modules]
    method = Prefix(length=length, init="random")
    flat = [(k, t) for k, t in file.tensors.items() if k.endswith(".self_prefix.control_trans")]
    rest = [key for key in file.tensors if not key.endswith(".self_prefix.control_trans")]
    if rest or not flat:
        file.wrong += [f"{key}: only flat prefixes can be read" for key in rest] or [
            "no tensor self_prefix.control_trans"
        ]
        return method, {}
    first = flat[0][1].flatten()
    file.wrong += [f"{key} differs from {flat[0][0]}" for key, t in flat[1:] if not torch.equal(t.flatten(), first)]
    heads, dim = sites[0].heads, sites[0].head_dim
    expected = length * 2 * len(sites) * heads * dim
    if len(first) != expected:
        file.wrong.append(f"{flat[0][0]}: {len(first)} values, this base needs {expected}")
        return method, {}
    both = first.view(length, 2 * len(sites), heads, dim)
    tensors = {}
    for i, site in enumerate(sites):
        tensors[f"deltas.{site.name}.keys"], tensors[f"deltas.{site.name}.values"] = both[:, 2 * i], both[:, 2 * i + 1]
    return method, tensors


def _prompt(file: HubFile) -> Read:
    """Virtual tokens behind the embeddings."""
    combine, length = str(file.config.get("combine", "prefix")), int(file.config.get("prompt_length", 10))
    if combine not in BEHIND:
        file.wrong.append(f"combine = {combine!r}: onebase reads {', '.join(BEHIND)}")
    method = Prompt(length=length, init="uniform", place="embedded", behind=BEHIND.get(combine, 0))
    stack = file.modules.anatomy.stacks[0]
    site = file.modules.anatomy.sites.get(f"{stack.name}/embedded")
    if site is None:
        file.wrong.append("prompts stand behind the embeddings' norm, for which this base has no module")
        return method, {}
    tensors = {}
    for key, tensor in file.tensors.items():
        if not PROMPTED.match(key) or tensors:
            file.wrong.append(f"unexpected tensor {key} {tuple(tensor.shape)}: a prompt has one tensor")
        elif tuple(tensor.shape) != (length, site.d_out):
            file.wrong.append(f"{key}: shape {tuple(tensor.shape)}, this base needs {(length, site.d_out)}")
        else:
            tensors[f"deltas.{site.name}.embedding"] = tensor
    if not file.tensors:
        file.wrong.append("the file holds no tensor prompt_embedding.weight")
    return method, tensors


READERS: dict[str, Callable[[HubFile], Read]] = {
    "bottleneck": _bottleneck,
    "lora": _lora,
    "prefix": _prefix,
    "prompt_tuning": _prompt,
}


def _head(folder: Path, base: Base, labels: tuple[str, ...], file: HubFile) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the classification head that lies beside an adapter, if one does."""
    if not (folder / HEAD_CONFIG).is_file():
        return {}, {}
    raw = read_settings(folder / HEAD_CONFIG)
    config = dict(raw.get("config") or {})
    if config.get("head_type") != "classification" or base.anatomy.model_type not in ENCODERS:
        file.wrong.append(f"head_type {config.get('head_type')!r} on {base.anatomy.model_type}: only classification "
                          "heads of encoders can be read")  # fmt: skip
        return {}, {}
    layers, name = int(config.get("layers", 2)), str(raw.get("name"))
    activation = str(config.get("activation_function", "tanh"))
    if layers not in (1, 2) or config.get("use_pooler") or (layers == 2 and activation not in ("tanh", "relu", "gelu")):
        file.wrong.append(f"a head with layers = {layers}, activation_function = {activation!r}, use_pooler = "
                          f"{config.get('use_pooler')!r}: onebase reads 1 or 2, tanh, relu, gelu")  # fmt: skip
        return {}, {}
    given = read_tensors(folder, HEAD, HEAD_PICKLE, most_bytes(base))
    places = {"inner_": 1, "": 4} if layers == 2 else {"": 1}
    head: dict[str, Tensor] = {}
    for prefix, number in places.items():
        for what in ("weight", "bias"):
            key = f"heads.{name}.{number}.{what}"
            if key in given:
                head[f"head.{prefix}{what}"] = given.pop(key)
            else:
                file.wrong.append(f"missing tensor {key} of the head")
    file.wrong += [f"unexpected tensor {key} of the head" for key in given]
    ids = config.get("label2id") or {}
    if "head.weight" not in head:
        return {}, {}
    rows = len(head["head.weight"])
    if not labels and not ids and int(config.get("num_labels", 2)) != rows:  # before so many names are made
        file.wrong.append(f"num_labels = {config.get('num_labels')!r}, the head has {rows}")
        return {}, {}
    names = labels or tuple(sorted(ids, key=lambda label: ids[label])) or tuple(f"LABEL_{i}" for i in range(rows))
    if len(names) != rows:
        file.wrong.append(f"{len(names)} labels ({', '.join(names)}), the head has {len(head['head.weight'])}")
    width = head["head.weight"].shape[1]
    head |= {"head.center": torch.zeros(width), "head.scale": torch.ones(width)}
    task: dict[str, Any] = {"kind": "classification", "labels": list(names), "pooling": "first", "metric": "accuracy"}
    if layers == 2 and "head.inner_bias" in head:
        task["head"] = {"hidden": len(head["head.inner_bias"]), "activation": activation}
    return task, head
