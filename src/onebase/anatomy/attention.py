"""The attention function `onebase:<original>`: puts prefixes before the keys, then calls the original.

Prefix columns are visible to every token, sliding windows included, and stay outside the KV cache. Rows without a
prefix, or with a shorter one, have those columns masked. Registered once per original implementation; which prefix
belongs to which rows is read from the plan of the calling thread.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from onebase.core.attending import attend, attend_packed, faster
from onebase.core.packing import Packing, gather, spread
from onebase.core.plan import Plan
from onebase.core.route import Runtime
from onebase.errors import UnsupportedError

PREFIX = "onebase:"
SUPPORTED = ("eager", "sdpa")

# attention module -> (runtime of its base, name of its kv site); weak, so that a dropped base is forgotten
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Runtime], str]] = weakref.WeakKeyDictionary()
_RUNTIMES: weakref.WeakSet[Runtime] = weakref.WeakSet()
# attention module -> whether its eager attention is softmax(scale Q K^T) V and nothing else, by scale and keywords
_PLAIN: weakref.WeakKeyDictionary[nn.Module, dict[tuple, bool]] = weakref.WeakKeyDictionary()


def attach(module: nn.Module, runtime: Runtime, site: str) -> None:
    """Tell the attention function which base and site `module` belongs to."""
    _KNOWN[module] = (weakref.ref(runtime), site)
    _RUNTIMES.add(runtime)


def detach(module: nn.Module) -> None:
    """Forget `module`."""
    _KNOWN.pop(module, None)


def register(original: str) -> str:
    """Register ``onebase:<original>`` and its mask function with transformers; return its name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if original not in SUPPORTED:
        raise UnsupportedError(
            f"prefixes need attention 'eager' or 'sdpa', this base runs {original!r}: load it with "
            "attn_implementation='sdpa'"
        )
    name = PREFIX + original
    if name not in ALL_ATTENTION_FUNCTIONS:

        @torch.compiler.disable
        def function(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kw: Any
        ):
            mask = kw.pop("attention_mask", mask)  # some families pass it by its name
            return _attend(original, module, query, key, value, mask, **kw)

        @torch.compiler.disable
        def mask_function(**kw: Any) -> Any:
            return _mask(ALL_MASK_ATTENTION_FUNCTIONS[original], **kw)

        ALL_ATTENTION_FUNCTIONS.register(name, function)
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, mask_function)
    return name


def _mask(original: Any, **kw: Any) -> Any:
    """Build the mask; never skip it while a prefix may be live (a skipped mask cannot be extended)."""
    plans = [runtime.plan for runtime in list(_RUNTIMES) if runtime.inside]
    if any(plan is not None and plan.packing is not None for plan in plans):
        return None  # packed rows have masks of their own, see `_packed`
    known = bool(plans) and not any(plan is not None and plan.has_kv for plan in plans)
    if not known:
        kw["allow_is_causal_skip"] = False
        kw["allow_is_bidirectional_skip"] = False
    return original(**kw)


def _original(name: str, module: nn.Module) -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return own_function(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]


def own_function(module: nn.Module) -> Any:
    """Return the eager attention of the modelling file: softcap, sinks and T5's bias live there."""
    return sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]


def _attend(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
) -> tuple[Tensor, Tensor | None]:
    original = _original(name, module)
    entry = _KNOWN.get(module)
    runtime = entry[0]() if entry else None
    if entry is None or runtime is None:
        return original(module, query, key, value, mask, **kw)
    if runtime.recorder is not None:
        runtime.recorder[entry[1]] = (key.detach(), value.detach())
    plan = runtime.plan
    prefix = _gather(plan, entry[1], key) if plan is not None and plan.has_kv else None
    if plan is not None and plan.packing is not None:
        shown = None if prefix is None else (*prefix[:2], plan.of_rows(prefix[2]))
        return _packed(name, plan.packing, shown, module, query, key, value, **kw), None
    if prefix is None:
        if plan is None:  # a direct call to the model is computed as transformers alone would
            return original(module, query, key, value, mask, **kw)
        return _whole(name, module, query, key, value, mask, **kw)
    keys, values, lengths = prefix  # (B, Hkv, P, hd) twice, prefix columns of each group and of plain rows
    assert plan is not None
    window = kw.get("sliding_window") or getattr(module, "sliding_window", None)
    if window is not None and any(getattr(g.adapter.deltas.get(entry[1]), "slides", False) for g in plan.groups):
        visible = _slide(plan, entry[1], _visible(plan, lengths, key), int(window), query.shape[2])
        mask = _extend(mask, visible, query, key, _causal(module, kw), name)
    else:
        mask = _mask_of(plan, mask, lengths, query, key, _causal(module, kw), name)
    bias = kw.get("position_bias")
    if bias is not None:  # T5: a prefix has no position, so no bias
        kw["position_bias"] = torch.cat([bias.new_zeros(*bias.shape[:3], keys.shape[2]), bias], -1)
    key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    output, weights = _whole(name, module, query, key, value, mask, is_causal=False, **kw)
    return output, None if weights is None else weights[..., keys.shape[2] :]


def _causal(module: nn.Module, kw: dict[str, Any]) -> bool:
    """Take the caller's word out of `kw`, else the module's."""
    causal = kw.pop("is_causal", None)
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _packed(
    name: str,
    packing: Packing,
    prefix: tuple[Tensor, Tensor, list[int]] | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **kw: Any,
) -> Tensor:
    """Return the attention of packed tokens (1, heads, n, head dim), a few rows at a time: (1, n, heads, head dim).

    prefix: keys and values (B, heads, P, head dim) of all rows, and how many columns each row has.
    """
    causal = _causal(module, kw)
    if prefix is None and name == "eager" and _learns(query, key, value) and is_plain(module, query, key, kw):
        if torch.is_autocast_enabled(query.device.type):  # as it would cast the products
            narrow = torch.get_autocast_dtype(query.device.type)
            query, key, value = (part.to(narrow) for part in (query, key, value))
        return attend_packed(query, key, value, packing, causal, _scale(query, kw))
    memo = name, causal, query.dtype
    if memo not in packing.masks:
        packing.masks[memo] = [_chunk_mask(chunk.mask, causal, name, query.dtype) for chunk in packing.chunks]
    found = []
    for chunk, mask in zip(packing.chunks, packing.masks[memo]):
        q, k, v = (spread(values, chunk) for values in (query, key, value))
        own = [] if prefix is None else prefix[2][slice(*chunk.rows)]
        width = max(own, default=0)
        if prefix is not None and width:
            keys, values = (part[slice(*chunk.rows), :, :width] for part in prefix[:2])
            if mask is not None or causal or min(own) < width:
                visible = torch.arange(width, device=k.device) < torch.tensor(own, device=k.device)[:, None]
                mask = _extend(mask, visible, q, k, causal, name)
            k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        found.append(gather(_whole(name, module, q, k, v, mask, is_causal=False, **kw)[0], chunk))
    if packing.extra:
        found.append(found[0].new_zeros(packing.extra, *found[0].shape[1:]))
    return torch.cat(found)[None]


def _whole(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kw: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the attention of whole rows, (b, t, heads, head dim), and the weights where the original gives them.

    What the fused function of torch would do is done by products where that is faster: the values are the same.
    """
    if name == "sdpa" and not _learns(query, key, value) and faster(query, key) and _is_plain_call(module, mask, kw):
        return attend(query, key, value, mask, _scale(query, kw)), None
    return _original(name, module)(module, query, key, value, mask, **kw)


def _is_plain_call(module: nn.Module, mask: Tensor | None, kw: dict[str, Any]) -> bool:
    """Whether a call of fused attention is softmax(scale Q K^T) V over what a mask shows, at least a column a row."""
    causal = kw.get("is_causal")
    if mask is None and (getattr(module, "is_causal", True) if causal is None else causal):
        return False
    if kw.get("dropout") or kw.get("position_bias") is not None or kw.get("softcap") is not None:
        return False
    return mask is None or (mask.dtype == torch.bool and bool(mask.any(-1).all()))


def _learns(*parts: Tensor) -> bool:
    return torch.is_grad_enabled() and any(part.requires_grad for part in parts)


def _scale(query: Tensor, kw: dict[str, Any]) -> float:
    given = kw.get("scaling")
    return query.shape[-1] ** -0.5 if given is None else float(given)


def is_plain(module: nn.Module, query: Tensor, key: Tensor, kw: dict[str, Any]) -> bool:
    """Whether a module's eager attention is softmax(scale Q K^T) V: asked of the function once, not of its name.

    Soft caps, sinks, biases and repeated heads are computed by the modelling file's own function.

    Args:
        module: the attention module.
        query, key: of a call, (b, heads, t, head dim).
        kw: of the call.
    """
    extra = {name: value for name, value in kw.items() if name != "position_ids" and value is not None}
    if query.shape[1] != key.shape[1] or any(isinstance(value, Tensor) for value in extra.values()):
        return False
    if module.training and extra.get("dropout"):  # the base's own
        return False
    known = _PLAIN.setdefault(module, {})
    ask = (query.shape[1], query.shape[3], *sorted((name, repr(value)) for name, value in extra.items()))
    if ask not in known:
        known[ask] = _computes_plainly(module, query, extra)
    return known[ask]


def _computes_plainly(module: nn.Module, query: Tensor, kw: dict[str, Any]) -> bool:
    """Compare a module's eager attention with the formula, on values that a soft cap would change."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, query.shape[1], 5, query.shape[3])
    q, k, v = (4 * torch.randn(shape, generator=generator, dtype=torch.float64).to(query.device) for _ in range(3))
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.float64, device=query.device)
    mask[1, ..., 3:] = torch.finfo(torch.float32).min
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        found = own_function(module)(module, q, k, v, mask, is_causal=False, **kw)[0]  # (2, 5, heads, head dim)
        expected = ((_scale(q, kw) * q @ k.mT + mask).softmax(-1) @ v).transpose(1, 2)
    return found.shape == expected.shape and torch.allclose(found.double(), expected, atol=1e-4, rtol=1e-4)


def _chunk_mask(real: Tensor, causal: bool, name: str, dtype: torch.dtype) -> Tensor | None:
    """Return what the original expects, (b, 1, 1 or t, t), for real tokens (b, t); None where all see all."""
    if not causal and bool(real.all()):
        return None
    seen = real[:, None, None, :]
    if causal:
        seen = seen & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=real.device).tril()
    if name != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=real.device).masked_fill(~seen, torch.finfo(dtype).min)


def _gather(plan: Plan, site: str, key: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]] | None:
    """Return each row's prefix at `site`, padded to the longest, and how many columns each group has, plain rows last.

    One stack and one index operation for all rows, so that many prefixes cost what one costs.
    """
    pairs = [g.adapter.deltas[site].kv() if site in g.adapter.deltas else None for g in plan.groups]  # type: ignore[union-attr]
    lengths = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
    width = max(lengths, default=0)
    if width == 0:
        return None
    if plan.has_plain:
        pairs, lengths = [*pairs, None], (*lengths, 0)
    keys, values = (_stack([None if pair is None else pair[i] for pair in pairs], width, key) for i in (0, 1))
    if plan.row_group is not None and len(pairs) > 1:
        keys, values = keys.index_select(0, plan.row_group), values.index_select(0, plan.row_group)
    rows = (key.shape[0] if plan.packing is None else plan.packing.rows, -1, -1, -1)
    return keys.transpose(1, 2).expand(rows), values.transpose(1, 2).expand(rows), lengths


def _slide(plan: Plan, site: str, visible: Tensor, window: int, queries: int) -> Tensor:
    """Hide prefixes that take positions from tokens whose sliding window has passed them: (B, T, P)."""
    out = visible
    for g in plan.groups:
        delta = g.adapter.deltas.get(site)
        if delta is None or not delta.slides:
            continue
        if g.at.positions is None or g.at.positions.shape[1] != queries:
            raise UnsupportedError(
                f"adapter {g.adapter.name!r}: a prefix that slides out of the window needs the 2-dimensional attention "
                "mask of the batch, which tells where tokens are"
            )
        if out.dim() == 2:
            out = out[:, None].expand(-1, queries, -1).clone()
        own = slice(None) if g.rows is None else g.rows
        column = torch.arange(visible.shape[1], device=visible.device)
        out[own] &= (g.at.positions[..., None] + delta.shift - column) < window  # type: ignore[operator]
    return out


def _stack(parts: list[Tensor | None], width: int, like: Tensor) -> Tensor:
    """Stack (P, Hkv, hd), each padded to `width` columns, in the dtype of `like`; None gives columns of zeros."""
    known = next(part for part in parts if part is not None)
    empty = known.new_zeros(width, *known.shape[1:])
    full = [
        empty if p is None else p if len(p) == width else torch.cat([p, p.new_zeros(width - len(p), *p.shape[1:])])
        for p in parts
    ]
    return torch.stack(full).to(like.dtype)


def _mask_of(
    plan: Plan, mask: Tensor | None, lengths: tuple[int, ...], query: Tensor, key: Tensor, causal: bool, name: str
) -> Tensor:
    """Return a mask over prefix and keys; layers that are given the same mask share it."""
    ask = (id(mask), lengths, query.shape[2], key.shape[2], query.dtype, causal, name)
    found = plan.masks.get(ask)
    if found is None:
        visible = _visible(plan, lengths, key)
        found = plan.masks[ask] = (mask, _extend(mask, visible, query, key, causal, name))  # keeps `id(mask)` taken
    return found[1]


def _visible(plan: Plan, lengths: tuple[int, ...], key: Tensor) -> Tensor:
    """Return which prefix columns each row has, (B, P)."""
    column = torch.arange(max(lengths), device=key.device)
    return column < torch.tensor(lengths, device=key.device)[plan.row_group][:, None]


def _extend(mask: Tensor | None, visible: Tensor, query: Tensor, key: Tensor, causal: bool, name: str) -> Tensor:
    """Return a mask over prefix and keys, of the kind the original expects (bool for sdpa, additive for eager)."""
    rows, width = visible.shape[0], visible.shape[-1]
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        shape = (rows, 1, queries, keys)
        mask = torch.ones(shape, dtype=torch.bool, device=key.device)
        if causal and queries > 1:  # the last query sees the last key
            mask = mask.tril(keys - queries)
        if name == "eager":
            mask = torch.zeros(shape, dtype=query.dtype, device=key.device).masked_fill(
                ~mask, torch.finfo(query.dtype).min
            )
    mask = mask[..., :keys].expand(rows, -1, queries, -1)
    front = visible[:, None, None] if visible.dim() == 2 else visible[:, None]
    front = front.expand(rows, mask.shape[1], queries, width)
    if mask.dtype != torch.bool:
        low = torch.finfo(mask.dtype).min
        front = torch.zeros((), dtype=mask.dtype, device=mask.device).where(front, low)
    return torch.cat([front, mask], -1)
