"""Proofs by numbers: sums hold under changed exits, branches are told apart by what reaches them, rows stay apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from onebase.anatomy.discovery_parts import Part
from onebase.anatomy.discovery_probe import ROWS, Edit, Probe, first
from onebase.anatomy.discovery_residual import Layer, Norm, Scale
from onebase.anatomy.discovery_trace import Trace
from onebase.core.site import Ref


def entry(layer: Layer) -> Ref:
    """Return where the stream enters a layer."""
    return Ref(layer.path, 0)


def exits(layer: Layer) -> list[Ref]:
    """Return where each branch leaves."""
    return [Ref(branch.exit, None) for branch in layer.branches]


def constant(value: Tensor) -> Edit:
    """Return an edit that puts `value` whatever comes; a copy, because a layer may go on to write into it."""
    return lambda _: value.clone()


def added(value: Tensor) -> Edit:
    """Return an edit that adds `value`."""
    return lambda old: old + value.to(old)


def holding(probe: Probe, layers: Iterable[Layer]) -> dict[Ref, Edit]:
    """Return edits that keep every layer's input and every exit as in a plain pass."""
    places = [place for layer in layers for place in (entry(layer), *exits(layer))]
    return {place: constant(value) for place, value in probe.run(places).items()}


def prove_sums(probe: Probe, layers: Mapping[int, Layer]) -> dict[int, str]:
    """Check, plainly and with every exit changed, that residual plus exits gives the next residual or the output.

    Returns:
        layer -> what does not hold, for the layers that fail.
    """
    watch = [place for layer in layers.values() for place in (*_residuals(layer), *exits(layer), Ref(layer.path, None))]
    failed: dict[int, str] = {}
    plain = probe.run(watch)
    generator = torch.Generator().manual_seed(3)
    edits: dict[Ref, Edit] = {}
    for layer in layers.values():
        for place in exits(layer):
            old = plain[place]
            noise = torch.randn(old.shape, generator=generator).to(old)
            edits[place] = added(noise * float(old.float().std().clamp(min=1e-3)))
    for what, seen in (("as it is", plain), ("with its branches changed", probe.run(watch, edits))):
        for index, layer in layers.items():
            gap = _follow(probe, layer, seen)
            if gap > probe.tolerance:
                failed.setdefault(index, f"residual plus branches misses the next residual by {gap:.1g} {what}")
    return failed


def _residuals(layer: Layer) -> list[Ref]:
    return [total.residual for total in layer.sums if total.residual is not None] + [entry(layer)]


def _follow(probe: Probe, layer: Layer, seen: Mapping[Ref, Tensor]) -> float:
    """Compute the stream through a layer from what was seen; return the largest miss."""
    stream = _apply(probe, layer.start, seen[entry(layer)])
    worst = 0.0
    for total in layer.sums:
        if total.residual is not None:
            worst = max(worst, probe.gap(stream.reshape(-1), seen[total.residual].reshape(-1)))
        for branch in total.branches:
            stream = stream + branch.factor * seen[Ref(branch.exit, None)].reshape(stream.shape)
        stream = _apply(probe, total.after, stream)
    return max(worst, probe.gap(stream, seen[Ref(layer.path, None)]))


def _apply(probe: Probe, steps: Iterable[Norm | Scale], stream: Tensor) -> Tensor:
    for step in steps:
        if isinstance(step, Scale):
            stream = stream * step.number
        else:
            with torch.no_grad():  # some norms hand on more than the states
                stream = first(probe.model.get_submodule(step.path).forward(stream))
    return stream


def roles_of(probe: Probe, trace: Trace, layers: Mapping[int, Layer], states: Tensor | None) -> dict[int, str]:
    """Give every branch its role: attention mixes tokens, cross reads encoder states, an MLP does neither.

    Returns:
        layer -> why its branches have no clear roles.
    """
    states_key = None if states is None else trace.key(states)
    hold = holding(probe, layers.values())
    widest = max((len(layer.branches) for layer in layers.values()), default=0)
    for number in range(widest):
        tested = [layer for layer in layers.values() if number < len(layer.branches)]
        edits = dict(hold)
        for layer in tested:
            edits[entry(layer)] = constant(_first_changed(probe, hold, entry(layer)))
            del edits[exits(layer)[number]]
        seen = probe.run([exits(layer)[number] for layer in tested], edits)
        plain = {place: edit(torch.empty(0)) for place, edit in hold.items()}
        for layer in tested:
            branch, place = layer.branches[number], exits(layer)[number]
            inside = trace.ancestors(branch.key, {branch.residual_key})
            one, other = (t[place].reshape(ROWS, -1, t[place].shape[-1])[:, 1:] for t in (seen, plain))
            cross = states_key is not None and any(trace.origin(key) == trace.origin(states_key) for key in inside)
            branch.role = "cross" if cross else "mlp" if probe.equal(one, other) else "attention"
    failed = {}
    for index, layer in layers.items():
        roles = [branch.role for branch in layer.branches]
        if len(set(roles)) != len(roles):
            failed[index] = f"its branches are {', '.join(roles)}: expected at most one of each"
    return failed


def _first_changed(probe: Probe, hold: Mapping[Ref, Edit], place: Ref) -> Tensor:
    """Return a layer's input with the first token of every row changed."""
    value = hold[place](torch.empty(0)).clone()
    noise = torch.randn(value.shape[-1:], generator=torch.Generator().manual_seed(5)).to(value)
    value[:, 0] += noise * float(value.float().std())
    return value


def cancelled_keys(probe: Probe, hold: Mapping[Ref, Edit], keys: Mapping[str, Part]) -> set[str]:
    """Find the attentions whose softmax cancels a constant that is added to their keys.

    Args:
        probe: runs the model.
        hold: see `holding`, of all layers.
        keys: exit of an attention -> the part that projects its keys.

    Returns:
        Those exits that stay the same when a random vector is added to every key.
    """
    places = {path: Ref(path, None) for path in keys}
    edits = {place: edit for place, edit in hold.items() if place not in places.values()}
    edits |= {Ref(part.path, None): _shifted(part) for part in keys.values()}
    seen = probe.run(places.values(), edits)
    return {path for path, place in places.items() if probe.equal(seen[place], hold[place](torch.empty(0)))}


def _shifted(part: Part) -> Edit:
    """Return an edit that adds one random vector to a part of every token."""

    def edit(old: Tensor) -> Tensor:
        noise = torch.randn(old.shape[-1], generator=torch.Generator().manual_seed(7))
        own = slice(None) if part.features is None else list(part.features)
        vector = torch.zeros_like(noise)
        vector[own] = noise[own]
        return old + vector.to(old)

    return edit


def prove_rows(probe: Probe, paths: Iterable[str]) -> dict[str, str]:
    """Check that a module's output holds the rows of the batch in its outermost dimension.

    The last row's tokens are exchanged: the last part of the output must change, and nothing else.

    Returns:
        path -> what goes wrong, for the modules that fail.
    """
    places = {path: Ref(path, None) for path in paths}
    plain = probe.run(places.values())
    call = probe.inputs()
    for name in ("input_ids", "decoder_input_ids"):
        if name in call:
            call[name] = call[name].clone()
            call[name][-1] = call[name][0].flip(0)
    other = probe.run(places.values(), call=call)
    failed: dict[str, str] = {}
    for path, place in places.items():
        one, two = plain[place], other[place]
        if one.shape != two.shape or one.numel() % (ROWS * one.shape[-1]):
            failed[path] = f"its output {tuple(one.shape)} does not hold the batch's rows"
            continue
        a, b = (t.reshape(ROWS, -1, t.shape[-1]) for t in (one, two))
        if not probe.equal(a[:-1], b[:-1]) or probe.equal(a[-1], b[-1]):
            failed[path] = "the outermost dimension of its output is not the batch's rows"
    return failed
