"""Discovery: the row of a family that nobody wrote, found from modules and numbers, each finding proven or refused.

A recorded pass proposes (which values are added to the residual, which linear feeds which), passes with hooks prove:
residual plus exits is the next residual, also after the exits were changed; a part's features are the ones that
reach the attention function; rows are the outermost dimension everywhere. What fails is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from onebase.anatomy.discovery_gates import settle_gates
from onebase.anatomy.discovery_parts import Branches, Part, PartFinder, cut_pass, owns_matrix
from onebase.anatomy.discovery_positions import find_padding, find_positions, find_rates
from onebase.anatomy.discovery_probe import Probe
from onebase.anatomy.discovery_proof import cancelled_keys, holding, prove_rows, prove_sums, roles_of
from onebase.anatomy.discovery_residual import Branch, Layer, LayerReader
from onebase.anatomy.discovery_stack import FoundStack, find_stacks, is_matrix
from onebase.anatomy.discovery_trace import Call, Trace
from onebase.anatomy.rows import Family, Projection, StackRow, SubLayer, Untapped
from onebase.anatomy.rows import Part as Features
from onebase.core.site import Ref
from onebase.errors import UnsupportedError


def discover(model: Any) -> Family:
    """Find where everything is in a model of an unknown family.

    Runs about fifteen small passes of random tokens. Settings, modes and tensors of the model are as before.

    Args:
        model: any transformers model that reads token ids, with or without a head.

    Returns:
        A family as a row would give it; what could not be proven is refused in it, with the reason.

    Raises:
        UnsupportedError: the model cannot be run on token ids, or has no stack of layers.
    """
    probe = Probe(model)
    with probe.examined():
        trace = Trace().record(probe)
        stacks = find_stacks(probe, trace)
        rows = tuple(_stack_row(probe, trace, stack) for stack in stacks)
    heads = next((s.heads for row in rows for subs in _all(row) for s in subs if s.heads), (0, 0))
    return Family(
        model_types=(str(model.config.model_type),),
        stacks=lambda config: rows,
        heads=lambda config: heads,
        pooling="last" if rows[0].causal else "mean",
    )


def _all(row: StackRow) -> list[tuple[SubLayer, ...]]:
    return [row.sublayers, *row.by_layer.values()]


def _stack_row(probe: Probe, trace: Trace, stack: FoundStack) -> StackRow:
    """Return the row of one stack."""
    find_positions(stack, probe, trace)
    stack.padding = find_padding(stack, probe)
    for side, reason in stack.padding.items():  # other rows are padded where one row gets virtual tokens
        stack.refused.setdefault("embeddings", f"rows cannot be padded on the {side}: {reason}")
    layers: dict[int, Layer] = {}
    failed: dict[int, str] = {}
    for index, call in enumerate(stack.calls):
        try:
            layers[index] = LayerReader(trace, call, probe.equal).read()
            _check_layer(layers[index])
        except UnsupportedError as error:
            layers.pop(index, None)
            failed[index] = str(error)
    for index, reason in prove_sums(probe, layers).items():
        failed[index] = reason
        del layers[index]
    for index, reason in roles_of(probe, trace, layers, stack.states).items():
        failed[index] = reason
        del layers[index]
    found = _sublayers(probe, trace, stack, layers)
    for index, reason in failed.items():
        found[index] = _refused_layer(probe, stack.calls[index], reason)
    common = max(found.values(), key=lambda subs: sum(same(subs, other) for other in found.values()))
    prefix = probe.prefix
    return StackRow(
        name=stack.name,  # type: ignore[arg-type]
        path=_inside(stack.path, prefix),
        layers=stack.layers,
        embed=stack.embed,
        sublayers=common,
        by_layer={index: subs for index, subs in sorted(found.items()) if not same(subs, common)},
        causal=stack.causal,
        position_start=stack.position_start,
        position_limit=stack.position_limit,
        feeds=stack.feeds,
        pooler=stack.pooler,
        layer_dropout=find_rates(stack, probe),
        hidden=stack.hidden,
        position_module=stack.position_module,
        position_offset=stack.position_offset,
        pooler_reads=stack.pooler_reads,
        embeddings_refusal=stack.refused.get("embeddings", ""),
        block_refusal=stack.refused.get("block", ""),
        padding=stack.padding,
    )


def same(one: tuple[SubLayer, ...], other: tuple[SubLayer, ...]) -> bool:
    """Whether two layers have the same branches; tensors of feature numbers are compared by value."""
    return str(one) == str(other)


def _inside(path: str, root: str) -> str:
    """Return `path` relative to `root`."""
    return path[len(root) :].lstrip(".") if path == root or path.startswith(f"{root}.") or not root else path


def _check_layer(layer: Layer) -> None:
    """Refuse a layer in which something is added that no hook reaches."""
    for branch in layer.branches:
        if not branch.exit:
            raise UnsupportedError(f"{layer.path}: {branch.refused}")
        if not branch.exit.startswith(f"{layer.path}."):
            raise UnsupportedError(f"{layer.path}: {branch.exit}, which it adds, lies outside of it")
    exits = [branch.exit for branch in layer.branches]
    if len(set(exits)) != len(exits):
        raise UnsupportedError(f"{layer.path}: one module's output is added twice")


def _sublayers(
    probe: Probe, trace: Trace, stack: FoundStack, layers: Mapping[int, Layer]
) -> dict[int, tuple[SubLayer, ...]]:
    """Name the parts of every layer and prove that their rows are the batch's."""
    leaves = cut_pass(probe, trace, list(layers.values()))
    parts: dict[tuple[int, int], Branches] = {}
    for index, layer in layers.items():
        finder = PartFinder(probe, trace, leaves, layer)
        for number, branch in enumerate(layer.branches):
            parts[index, number] = finder.mlp(branch) if branch.role == "mlp" else finder.attention(branch)
    mlps = [parts[i, n] for i, layer in layers.items() for n, b in enumerate(layer.branches) if b.role == "mlp"]
    hold = holding(probe, layers.values())
    settle_gates(probe, mlps, hold)
    for (index, _), branch in parts.items():
        PartFinder(probe, trace, leaves, layers[index]).complete(branch)
    mixed = prove_rows(probe, _modules(layers, parts))
    keys = {layers[i].branches[n].exit: branch.parts["k"] for (i, n), branch in parts.items() if "k" in branch.parts}
    cancelled = cancelled_keys(probe, hold, keys)
    found: dict[int, tuple[SubLayer, ...]] = {}
    for index, layer in layers.items():
        subs, norms = [], set()
        for number, branch in enumerate(layer.branches):
            own = parts[index, number]
            if own.core and "kv" in stack.refused:
                own.refused["kv"] = stack.refused["kv"]
            sub = _sublayer(probe, layer, branch, own, mixed, norms)
            subs.append(replace(sub, cancels=branch.exit in cancelled) if "k" in own.parts else sub)
        found[index] = tuple(subs)
    return found


def _modules(layers: Mapping[int, Layer], parts: Mapping[tuple[int, int], Branches]) -> set[str]:
    """Return the paths of every module that a site would hook."""
    found = {part.path for many in parts.values() for part in many.parts.values()}
    found |= {path for many in parts.values() for path in many.norms.values()}
    for layer in layers.values():
        for branch in layer.branches:
            found |= {path for path in (branch.exit, branch.norm, branch.post) if path}
    return found


def _sublayer(
    probe: Probe, layer: Layer, branch: Branch, found: Branches, mixed: Mapping[str, str], norms: set[str]
) -> SubLayer:
    """Return one branch as a row names it; paths become relative to the layer."""
    refused = dict(found.refused)
    parts: dict[str, Projection] = {}
    for name, part in found.parts.items():
        reason = mixed.get(part.path) or ("" if part.path.startswith(f"{layer.path}.") else "it lies outside the layer")
        if reason:
            parts[name] = Untapped(_inside(part.path, layer.path), f"{part.path}: {reason}")
        else:
            parts[name] = _projection(probe, layer, part)
    for name, (path, reason) in found.untapped.items():
        parts[name] = Untapped(_inside(path, layer.path), reason)
    if branch.norm:
        wanted = {"norm": branch.norm, "post_norm": branch.post, **found.norms}
    else:
        wanted = {"norm": branch.post, **found.norms}
    kept = {name: path for name, path in wanted.items() if path and path not in norms and path not in mixed}
    norms |= set(kept.values())
    total = next(s for s in layer.sums if branch in s.branches)
    reason = branch.refused or mixed.get(branch.exit, "")
    if not reason and total.residual is None:
        reason = "the residual that it is added to passes through no module"
    if reason:
        refused["exit"] = f"{branch.exit}: {reason}"
    residual = total.residual or Ref(layer.path, 0)
    return SubLayer(
        name=branch.role,  # type: ignore[arg-type]
        exit=_inside(branch.exit, layer.path),
        residual=replace(residual, path=_inside(residual.path, layer.path)),
        parts=_ordered(parts),
        norms={name: _inside(path, layer.path) for name, path in kept.items()},
        core=_inside(found.core, layer.path) if found.core else "",
        heads=found.heads if found.core else None,
        refused=refused,
        width=layer.call.shape[-1],
    )


def _ordered(parts: Mapping[str, Projection]) -> dict[str, Projection]:
    known = ("q", "k", "v", "o", "gate", "up", "down")
    return {name: parts[name] for name in (*known, *parts) if name in parts}


def _projection(probe: Probe, layer: Layer, part: Part) -> Projection:
    """Return a part in the vocabulary of rows."""
    path = _inside(part.path, layer.path)
    if part.features is None:
        return path
    start, stop = part.features[0], part.features[-1] + 1
    if part.features != tuple(range(start, stop)):
        return Features(path, torch.tensor(part.features))
    module: Any = probe.model.get_submodule(part.path)
    width, size = int(getattr(module, "out_features", 0) or module.nf), stop - start
    if width % size == 0 and start % size == 0:
        return (path, start // size, width // size)
    return Features(path, (start, stop))


def _refused_layer(probe: Probe, call: Call, reason: str) -> tuple[SubLayer, ...]:
    """Return branches of which nothing can be adapted, so that whoever needs them is told why."""
    path = call.path
    names: dict[str, Sequence[str]] = {"attention": ("exit", "kv", "q", "k", "v", "o"), "mlp": ("exit", "up", "down")}
    shared = reason.removeprefix(f"{path}: ")
    matrices: dict[str, Projection] = {
        name.replace(".", "_"): Untapped(name, shared)
        for name, module in probe.model.get_submodule(path).named_modules()
        if name and (is_matrix(module) or owns_matrix(module))
    }
    return tuple(
        SubLayer(
            name=name,  # type: ignore[arg-type]
            exit="",
            residual=Ref("", 0),
            parts=matrices if name == "attention" else {},
            norms={},
            refused=dict.fromkeys(roles, shared),
            width=call.shape[-1],
        )
        for name, roles in names.items()
    )
