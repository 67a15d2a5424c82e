"""Digests that tell whether an adapter meets the base, tokenizer and config it was trained with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from onebase.errors import UnsupportedError
from onebase.store import fingerprint_cache

if TYPE_CHECKING:
    import torch

# which library wrote the config, where it lay, and how it is run: none changes what the base computes
VOLATILE = {
    "transformers_version",
    "_name_or_path",
    "_commit_hash",
    "torch_dtype",
    "dtype",
    "use_cache",
    "architectures",
    "quantization_config",
}
VOLATILE_PREFIX = "_attn_implementation"

# What tokenizers wrote of themselves, hashed -> their digest. Every adapter that is loaded asks for it, and to sort
# 30,000 words takes much longer than to write them: small adapters took 130 ms to load, and 13 without (one thread).
_digests: dict[bytes, str] = {}
KEPT = 64  # a few for each tokenizer, as truncation and padding are among what it writes

_known: WeakKeyDictionary[torch.nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def fingerprint_model(
    model: torch.nn.Module, *, just_loaded: bool = False, recompute: bool = False, cache: Path | None = None
) -> str:
    """Digest all parameters and persistent buffers of a model, rounded to bfloat16.

    So a bfloat16 copy of a checkpoint has the fingerprint of the float32 one. A float16 copy is rounded
    twice and may differ. Equal models share a fingerprint only within one class, as names are digested too.

    The result is kept per model object and computed again when a tensor was replaced or changed in place.
    Writes through ``parameter.data`` escape torch's version counter: pass `recompute` after those.

    Args:
        model: the base; its tensors may be on any device but meta.
        just_loaded: the caller has loaded `model` this moment, every tensor of it came from the folder
            ``model.config._name_or_path``, and none was changed since. Allows the cache on disk.
        recompute: ignore what is remembered, in memory and on disk.
        cache: folder of the cache on disk. None takes `fingerprint_cache.default_folder`.

    Returns:
        ``"sha256:"`` and 64 hex digits.

    Raises:
        UnsupportedError: a tensor has no data here (offloaded, or on meta).
    """
    tensors = _tensors(model)
    state = _state(tensors)
    if not recompute and state is not None and (seen := _known.get(model)) and seen[0] == state:
        return seen[1]
    store = fingerprint_cache.open_for(model, tensors, cache) if just_loaded else None
    found = store.read() if store and not recompute else None
    if found is None:
        found = _digest_tensors(tensors)
        if store:
            store.write(found)
    if state is not None:
        _known[model] = (state, found)
    return found


def digest_tokenizer(tokenizer: Any) -> str:
    """Digest what a tokenizer does: vocabulary, rules, special tokens and chat template.

    Truncation and padding are left out: transformers sets them anew at every call.

    Args:
        tokenizer: a transformers tokenizer, fast or slow.

    Returns:
        ``"sha256:"`` and 64 hex digits.
    """
    special = {key: _text(value) for key, value in tokenizer.special_tokens_map.items()}
    template = getattr(tokenizer, "chat_template", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)  # slow tokenizers have none
    if backend is not None:
        written = backend.to_str()
        known = hashlib.sha256(_json([special, template]) + written.encode()).digest()
        found = _digests.get(known)
        if found is None:
            rules: Any = json.loads(written)
            rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
            found = _digest_json({"rules": rules, "special": special, "chat_template": template})
            if len(_digests) >= KEPT:
                _digests.clear()
            _digests[known] = found
        return found
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    rules = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab(), "added": added}
    return _digest_json({"rules": rules, "special": special, "chat_template": template})


def digest_config(config: Any) -> str:
    """Digest a transformers config without what says nothing of the computation (`VOLATILE`).

    Args:
        config: a `PretrainedConfig`; nested ones are treated alike.

    Returns:
        ``"sha256:"`` and 64 hex digits.
    """
    return _digest_json(_stable(config.to_dict()))


def _tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return names and tensors, sorted by name; of tied ones the first."""
    persistent = model.state_dict(keep_vars=True).keys()  # the public way to tell which buffers are
    both = [
        *model.named_parameters(remove_duplicate=False),
        *((n, b) for n, b in model.named_buffers(remove_duplicate=False) if n in persistent),
    ]
    both = [(name, _resident(model, name) if tensor.is_meta else tensor) for name, tensor in both]
    absent = sorted(name for name, tensor in both if tensor.is_meta)
    if absent:
        raise UnsupportedError(
            f"{len(absent)} tensors of the base have no data here (e.g. {absent[0]!r} is on meta), "
            f"so it has no fingerprint. Take it before offloading, or load the model without offloading."
        )
    from onebase.core.quantized import parts_of

    both = [part for name, tensor in both for part in parts_of(name, tensor)]  # quantized ones: what they are made of
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    where = dict(model.named_parameters(remove_duplicate=False))
    first: dict[tuple[Any, ...], tuple[str, torch.Tensor]] = {}
    for name, tensor in sorted(both, key=lambda pair: pair[0]):
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if name in where and where[name].is_meta:  # each was read by itself, so the places of tied ones differ
            place = (tied.get(name, name),)
        first.setdefault(place if tensor.numel() else (name,), (name, tensor))
    return list(first.values())


def _resident(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Return an offloaded tensor from where it is kept, or what stands in its place."""
    from onebase.core.offload import resident

    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    kept = resident(module, leaf)
    return getattr(module, leaf) if kept is None else kept


def _state(tensors: list[tuple[str, torch.Tensor]]) -> tuple[Any, ...] | None:
    """Return what changes when a tensor is replaced or changed in place; None where torch does not count."""
    if any(tensor.is_inference() for _, tensor in tensors):
        return None
    return tuple((name, id(t), t.data_ptr(), t.dtype, t._version) for name, t in tensors)


def _digest_tensors(tensors: list[tuple[str, torch.Tensor]]) -> str:
    """Digest each tensor, then the list of digests, so that hashing could be spread over threads."""
    outer = hashlib.sha256()
    for name, tensor in tensors:
        kind, data = _rounded(tensor)
        inner = hashlib.sha256(data).hexdigest()
        outer.update(json.dumps([name, kind, list(tensor.shape), inner]).encode() + b"\n")
    return "sha256:" + outer.hexdigest()


def _rounded(tensor: torch.Tensor) -> tuple[str, memoryview]:
    import torch

    flat = tensor.detach().reshape(-1)
    if flat.is_floating_point():
        array = flat.to(torch.bfloat16).view(torch.int16).cpu().numpy().astype("<i2", copy=False)
        return "bfloat16", array.data
    array = flat.contiguous().view(torch.uint8).cpu().numpy()  # counters, masks, packed weights: as they are
    return str(tensor.dtype), array.data


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            str(key): _stable(item)
            for key, item in value.items()
            if key not in VOLATILE and not str(key).startswith(VOLATILE_PREFIX)
        }
    if isinstance(value, list | tuple | set | frozenset):
        items = [_stable(item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    return value if isinstance(value, str | int | float | None) else str(value)


def _text(value: Any) -> Any:
    return [str(item) for item in value] if isinstance(value, list | tuple) else str(value)


def _digest_json(value: Any) -> str:
    return "sha256:" + hashlib.sha256(_json(value)).hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
