"""Building adapters on a base: the default task, and what methods may draw on to initialise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.adapter import Adapter
from onebase.core.contracts import AdapterModule
from onebase.core.offload import devices_of
from onebase.core.quantized import problem_of
from onebase.core.route import as_route
from onebase.core.site import Site
from onebase.errors import ConfigError, UnsupportedError, nearest
from onebase.heads import TiedHead
from onebase.image_init import image_init
from onebase.methods.method import Init, Method, plain_number
from onebase.tasks import get_task
from onebase.tasks.spec import check_options, check_spec
from onebase.words import view, word_ids

if TYPE_CHECKING:
    from onebase.base import Base

ALIGNED = 16  # float32 values between places where a parameter may begin: 64 bytes, as torch aligns its own blocks
LONGEST = 512  # default maximum length where the base would take more: attention cost grows with its square


def default_task(base: Base) -> dict[str, Any]:
    """Return the task of an adapter that has none yet: no head, the base's own pooling and length."""
    return {
        "kind": "causal-lm" if base.has_lm_head else "features",
        "labels": [],
        "pooling": base.anatomy.pooling,
        "max_length": max_length(base),
        "template": "",
        "pair": False,
    }


def complete_task(base: Base, given: Any) -> dict[str, Any]:
    """Return the spec of a task that is given by hand, with the defaults of the base and of its kind for the rest.

    Args:
        base: the base.
        given: kind, labels, pooling, max_length, template and options of the task; a whole spec stays as it is.

    Raises:
        ConfigError: no mapping, a key that this task does not have, or a value that it cannot use.
        UnknownNameError: no such kind.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"task = {given!r}: expected a mapping, such as {{'kind': 'classification', 'labels': ['no', 'yes']}}"
        )
    plain = default_task(base)
    if given.get("labels") and "kind" not in given:
        raise ConfigError(f"task labels {given['labels']!r} without a kind: add one, such as 'kind': 'classification'")
    kind = given.get("kind", plain["kind"])
    if not isinstance(kind, str):
        raise ConfigError(f"task kind = {kind!r}: expected a name, such as 'classification'")
    task = get_task(kind)
    known = {*plain, *task.options, *task.learned}
    for key in given:
        if key not in known:
            raise ConfigError(f"task {key} = {given[key]!r}: {task.kind} has no such key. {nearest(str(key), known)}")
    own = {key: list(value) if isinstance(value, tuple) else plain_number(value) for key, value in given.items()}
    spec, limit = {**plain, "kind": task.kind, **task.options, **own}, base.anatomy.stacks[0].position_limit
    check_options(task, spec, limit)
    spec = task.without_data(spec, base)
    check_spec(spec, limit)
    return spec


def max_length(base: Base) -> int:
    """Return the longest input in tokens: what base and tokenizer allow, at most 512."""
    limits = [LONGEST]
    stack = base.anatomy.stacks[0]
    if stack.position_limit is not None:
        limits.append(stack.position_limit)
    elif getattr(base.model.config, "max_position_embeddings", None):
        limits.append(int(base.model.config.max_position_embeddings))
    stated = getattr(base.tokenizer, "model_max_length", None)
    if stated and stated < 10**6:  # tokenizers state a huge number when they do not know
        limits.append(int(stated))
    return min(limits)


def build_adapter(
    base: Base,
    name: str,
    method: Method,
    task: dict[str, Any],
    seed: int,
    *,
    frequent: Sequence[int] | None = None,
    empty: bool = False,
) -> Adapter:
    """Build an adapter for a base, with fresh parameters on the base's device.

    Args:
        base: the base.
        name: its name.
        method: how to adapt.
        task: what for.
        seed: of the initialisation.
        frequent: token ids of the training data by falling frequency, for prompts and prefixes.
        empty: the tensors will be overwritten (loading): skip forwards of the base.

    Raises:
        ConfigError: the method chose no site, or did not build what a method builds.
        UnsupportedError: the base cannot carry the method, or the method took a tensor of the base.
    """
    if base._unfit is None:
        base._unfit = _unfit(base)
    if base._unfit:
        raise UnsupportedError(base._unfit)
    every = list(base.anatomy.sites.values())
    refused = next((site for site in method.needs(every) if site.unsupported), None)
    if refused is not None:
        raise UnsupportedError(f"{method.name} at {refused.name}: {refused.unsupported}")
    sites = method.select(every)
    if not sites:
        raise ConfigError(
            f"{method.name}.select chose no site of {base.id}, so the adapter would change nothing: return at least "
            "one of the sites it is given, or raise an error that says what is missing"
        )
    own = view(base, method.vocabulary())
    init = make_init(base, task, seed, frequent, empty, own)
    module = method.build(sites, init)
    if not isinstance(module, AdapterModule):
        raise ConfigError(f"{method.name}.build returned {type(module).__name__}: expected an AdapterModule")
    strange = [name for name, _ in module.items() if name not in base.anatomy.sites]
    if strange:
        raise ConfigError(f"{method.name}.build made deltas for unknown sites: {', '.join(strange[:5])}")
    if empty:
        module = module.fold()
    taken = {p.data_ptr() for p in base.model.parameters()} - {0}  # quantized tensors have no place of their own
    if any(p.data_ptr() in taken for p in module.parameters()):
        raise UnsupportedError(
            f"{method.name} took a tensor of the base as a parameter: clone what site.weight() gives"
        )
    module.to(base.device, torch.float32)
    move_together(module)
    adapter = Adapter(
        name, method, module, task, new_head(base, task), tokenizer=None if own is base.tokenizer else own
    )
    _check_conventions(base, adapter)
    return adapter


def new_head(base: Base, task: Mapping[str, Any]) -> nn.Module | None:
    """Build the head of a task for a base, on its device; None where the task has none."""
    return placed(base, get_task(task["kind"]).head(task, base.anatomy.hidden_size))


def placed(base: Base, head: nn.Module | None) -> nn.Module | None:
    """Bring a head to a base, with what it reads there."""
    if isinstance(head, TiedHead):
        head.tie(base)
    return head if head is None else head.to(base.device)


def _unfit(base: Base) -> str:
    """Say why no adapter can stand on the weights of a base, '' where they can."""
    devices = sorted(devices_of(base.model))
    if len(devices) > 1:
        return (
            f"the base is spread over {', '.join(devices)}, and an adapter is on one device: load it on one, offload "
            "what does not fit (device_map with one device and 'cpu' or 'disk'), or split it over processes (--shard)"
        )
    problem = problem_of(base.model) if base.quantization else ""
    return f"{problem}. docs/quantized.md lists what works" if problem else ""


def move_together(module: AdapterModule) -> None:
    """Move the parameters of an adapter into one block of memory; values and identities stay.

    Allocated one by one, among what an initialisation needs for a while, they leave holes that nothing fits into: 1,000
    bottlenecks of 64 units took 1.43 times their bytes on a CPU (benchmarks/forward.py, case memory).
    """
    parameters = list(module.parameters())
    starts, size = [], 0
    for parameter in parameters:
        starts.append(size)
        size += -(-parameter.numel() // ALIGNED) * ALIGNED
    if not parameters or len({(p.device, p.dtype) for p in parameters}) > 1:
        return
    block = parameters[0].new_empty(size, requires_grad=False)
    for start, parameter in zip(starts, parameters):
        own = block[start : start + parameter.numel()].view(parameter.shape)
        parameter.data = own.copy_(parameter.data)


def _check_conventions(base: Base, adapter: Adapter) -> None:
    """Refuse prefixes that take positions where a base has none, or a window that looks both ways."""
    for stack in base.anatomy.stacks:
        if stack.name in adapter.routed.shift and stack.position_start is None:
            raise UnsupportedError(
                f"{adapter.method.name}: positions='follow' starts the text's positions behind the prefix, and this "
                "base counts none: leave positions='stay'"
            )
    for core, site in base.anatomy.kv_modules:
        slides = getattr(adapter.routed.deltas.get(site.name), "slides", False)
        if slides and getattr(core, "sliding_window", None) and not base.anatomy.stack(site.stack).causal:
            raise UnsupportedError(
                f"{adapter.method.name}: slides=True is defined for windows that look back, and those of this base "
                "look both ways: leave slides=False"
            )


def make_init(
    base: Base, task: dict[str, Any], seed: int, frequent: Sequence[int] | None, empty: bool, own: Any
) -> Init:
    """Return what a method may draw on."""
    if base.anatomy.stacks[0].patches is not None:
        return image_init(base, seed, empty)

    def embed_ids(ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            return base.anatomy.stacks[0].embed(torch.tensor(list(ids), device=base.device)).float().cpu()

    def embed(text: str) -> Tensor:
        ids = [] if empty else text_ids(base, text)
        return embed_ids(ids) if ids else torch.zeros(0, base.anatomy.stacks[0].width)

    def ids_of(words: Sequence[str]) -> tuple[list[int], set[str]]:
        return word_ids(base.tokenizer, own, words)

    def common(count: int) -> list[int]:
        return list(frequent[:count]) if frequent else vocabulary(base)[:count]

    def kv(text: str, length: int) -> dict[str, tuple[Tensor, Tensor]]:
        sites = [site for _, site in base.anatomy.kv_modules]
        if empty:
            return {s.name: tuple(torch.zeros(length, s.heads, s.head_dim) for _ in "kv") for s in sites}  # type: ignore[misc]
        ids = text_ids(base, text) if text else []
        if len(ids) < length:
            pool = common(1000)
            picks = torch.randperm(len(pool), generator=generator)[: length - len(ids)].tolist()
            ids = ids + [pool[i] for i in picks]
        ids = [ids[i % len(ids)] for i in range(length)]
        return record_kv(base, ids, sites)

    generator = torch.Generator().manual_seed(seed)
    return Init(generator, embed, kv, embed_ids, tuple(task.get("labels") or ()), common, ids_of)


def text_ids(base: Base, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    if base.tokenizer is None:
        raise ConfigError("initialising from text needs the base's tokenizer: pass Base(model, tokenizer)")
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


def vocabulary(base: Base) -> list[int]:
    """Ordinary token ids, the most frequent first as far as the vocabulary's order tells (learned vocabularies
    list pieces by the order in which they were merged, which follows frequency)."""
    size = int(base.anatomy.stacks[0].embed.weight.shape[0])  # type: ignore[union-attr,index]
    special = set(getattr(base.tokenizer, "all_special_ids", []) or [])
    return [i for i in range(size) if i not in special]


def record_kv(base: Base, ids: Sequence[int], sites: Sequence[Site]) -> dict[str, tuple[Tensor, Tensor]]:
    """Run the plain base on one row and return keys and values of every attention module, (n, heads, head dim)."""
    tokens = torch.tensor([list(ids)], device=base.device)
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if base.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    if base.anatomy.stacks[-1].causal:
        inputs["use_cache"] = False
    installed = base._installed
    with torch.no_grad(), installed.context.use(as_route(None)), installed.recording() as found:
        base.model(**inputs)
    # a cross-attention has the encoder's tokens, of which there are as many
    return {s.name: tuple(t[0].transpose(0, 1).float().cpu().clone() for t in found[s.name]) for s in sites}  # type: ignore[misc]
