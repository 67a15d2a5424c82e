"""How a stack treats positions, padded rows and training mode: found by calling it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from onebase.anatomy.discovery_probe import Probe
from onebase.anatomy.discovery_stack import FoundStack, ids_of, is_matrix, states_of
from onebase.anatomy.discovery_trace import Call, Trace
from onebase.errors import UnsupportedError


def find_positions(stack: FoundStack, probe: Probe, trace: Trace) -> None:
    """Find the first position id, and how many positions a table holds."""
    if "position_ids" not in stack.names:
        _find_module(stack, probe, trace)
        return
    ids, plain = ids_of(probe, stack), states_of(probe, stack, ids_of(probe, stack))
    count = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    pad = getattr(probe.model.config, "pad_token_id", None)
    starts: list[int] = [0, *([pad + 1] if isinstance(pad, int) else []), 1, 2]
    start = next((s for s in starts if _same_at(stack, probe, ids, count + s, plain)), None)
    if start is None:
        stack.padding["left"] = "its position ids do not count tokens from a fixed start"
        return
    moved = count.clone()
    moved[:, -1] += 3
    if _same_at(stack, probe, ids, moved + start, plain):
        return  # taken, and not used
    stack.position_start = start
    table = _table(stack, trace, count[0] + start)
    if table is not None:
        stack.position_limit = _longest(table) - start
    elif ids.device.type == "cpu":  # asking a GPU for a row that a table lacks would end the process
        stated = getattr(probe.model.config, "max_position_embeddings", None)
        last = count.clone()
        if isinstance(stated, int):
            last[:, -1] = stated + start
            inside = last.clone()
            inside[:, -1] -= 1
            if _runs(stack, probe, ids, inside) and not _runs(stack, probe, ids, last):
                stack.position_limit = stated


def _runs(stack: FoundStack, probe: Probe, ids: Tensor, positions: Tensor) -> bool:
    try:
        states_of(probe, stack, ids, position_ids=positions)
    except UnsupportedError:
        return False
    return True


def _find_module(stack: FoundStack, probe: Probe, trace: Trace) -> None:
    """Find a learned table that counts columns by itself, where padding on the left would move positions."""
    if not _unequal(stack, probe, "left"):
        return
    for call in trace.below(stack.path):
        weight = getattr(call.module, "weight", None)
        if not isinstance(call.module, nn.Embedding) or call.start > stack.calls[0].start or call.output is None:
            continue
        out, columns = trace.tensors[call.output], stack.calls[0].shape[1]
        if out.shape[-2:] != (columns, weight.shape[1]):  # type: ignore[union-attr]
            continue
        first = (weight[: len(weight) - columns + 1] == out.reshape(-1, columns, out.shape[-1])[0, 0]).all(-1)  # type: ignore[index,union-attr,arg-type]
        for offset in first.nonzero().flatten().tolist():
            if torch.equal(weight[offset : offset + columns].expand(out.shape), out):  # type: ignore[index]
                stack.position_module = call.path[len(stack.path) :].lstrip(".")
                stack.position_offset, stack.position_start = offset, 0
                stack.position_limit = len(weight) - offset  # type: ignore[arg-type]
                return


def _same_at(stack: FoundStack, probe: Probe, ids: Tensor, positions: Tensor, plain: Tensor) -> bool:
    try:
        return probe.equal(states_of(probe, stack, ids, position_ids=positions), plain)
    except UnsupportedError:
        return False


def _table(stack: FoundStack, trace: Trace, expected: Tensor) -> Call | None:
    """Return the call of the embedding that was given the position ids."""
    for call in trace.calls:
        if not (call.path.startswith(f"{stack.path}.") or not stack.path) or not isinstance(call.module, nn.Embedding):
            continue
        for key in [*(key for _, key in call.inputs), *call.kwargs.values()]:
            ids = trace.tensors[key]
            if ids.dtype == torch.long and ids.shape[-1:] == expected.shape and bool((ids == expected).all()):
                return call
    return None


def _longest(table: Call) -> int:
    """Return the number of position ids (from 0) that a table answers, tried on a copy in main memory."""
    module = copy.deepcopy(table.module).cpu()
    own = "position_ids" in table.kwargs  # OPT's takes the mask first
    for last in range(int(module.weight.shape[0]) - 1, -1, -1):  # type: ignore[union-attr,arg-type]
        position = torch.tensor([[last]])
        try:
            with torch.no_grad():
                module(torch.ones_like(position), 0, position_ids=position) if own else module(position)
        except IndexError:
            continue
        return last + 1
    return 0


def find_padding(stack: FoundStack, probe: Probe) -> dict[str, str]:
    """Return per side why rows cannot be padded there; nothing where padded rows give what they give alone.

    Tried plainly, and with a constant added to what every linear of the layers gives: some models keep padding out by
    setting its states to zero, and an adapter with a bias makes them something again.
    """
    reasons = {side: stack.padding.get(side) or _unequal(stack, probe, side) for side in ("right", "left")}
    generator = torch.Generator().manual_seed(7)
    handles = []
    for module in (inner for call in stack.calls for inner in call.module.modules()):
        if is_matrix(module):
            handles.append(module.register_forward_hook(_shift(generator)))
    try:
        for side in ("right", "left"):
            reasons[side] = reasons[side] or _unequal(stack, probe, side).replace(
                "a padded row", "a shifted padded row"
            )
    finally:
        for handle in handles:
            handle.remove()
    return {side: reason for side, reason in reasons.items() if reason}


def _shift(generator: torch.Generator) -> Any:
    """Return a hook that adds a fixed vector to a linear's output."""
    vectors: list[Tensor] = []

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return None
        if not vectors:
            vectors.append(0.1 * torch.randn(output.shape[-1], generator=generator).to(output))
        return output + vectors[0]

    return hook


def _unequal(stack: FoundStack, probe: Probe, side: str) -> str:
    """Return '' where a padded row gives what it gives alone, else what goes wrong."""
    if "attention_mask" not in stack.names:
        return f"{type(stack.module).__name__} takes no attention_mask"
    ids = ids_of(probe, stack)[:2]
    columns = ids.shape[1]
    short = columns - 3
    alone = states_of(probe, stack, ids[:1, :short])[0]
    mask = torch.ones_like(ids)
    padded = ids.clone()
    place = slice(0, short) if side == "right" else slice(columns - short, columns)
    mask[0], padded[0] = 0, ids[1, 0]
    mask[0, place], padded[0, place] = 1, ids[0, :short]
    counted = (mask.cumsum(1) - 1).clamp(min=0) + (stack.position_start or 0)
    own = side == "left" and stack.position_start is not None
    more: dict[str, Any] = {"position_ids": counted} if own and not stack.position_module else {}
    handle = None
    if own and stack.position_module:
        table = stack.module.get_submodule(stack.position_module)
        vectors = nn.functional.embedding(counted + stack.position_offset, table.weight.detach())  # type: ignore[arg-type,operator]
        handle = table.register_forward_hook(lambda *_: vectors)
    try:
        found = states_of(probe, stack, padded, mask, **more)[0, place]
    except UnsupportedError as error:
        return str(error)
    finally:
        if handle is not None:
            handle.remove()
    gap = probe.gap(found, alone)
    return "" if gap <= probe.tolerance else f"a padded row changes by {gap:.1g}, relative to its largest state"


def find_rates(stack: FoundStack, probe: Probe) -> tuple[str, ...]:
    """Return the attributes of layer objects (or their configs) with dropout rates that a layer's own forward applies.

    The layer objects alone are put into training mode; attributes are set to 0 until nothing is random.
    """
    layers = [call.module for call in stack.calls]
    ids = ids_of(probe, stack)
    plain = states_of(probe, stack, ids)
    owners: dict[str, list[tuple[Any, float]]] = {}
    for layer in layers:
        for prefix, owner in (("", layer), ("config.", getattr(layer, "config", None))):
            for name, value in vars(owner).items() if owner is not None else ():
                if isinstance(value, float) and 0 < value < 1:
                    owners.setdefault(prefix + name, []).append((owner, value))

    def random_without(names: Sequence[str]) -> bool:
        """Whether results still change in training mode when the rates in `names` are 0."""
        for name in names:
            for owner, _ in owners[name]:
                setattr(owner, name.removeprefix("config."), 0.0)
        try:
            for layer in layers:
                layer.training = True
            return not all(probe.equal(states_of(probe, stack, ids), plain) for _ in range(2))
        except UnsupportedError:
            return True
        finally:
            for layer in layers:
                layer.training = False
            for name in names:
                for owner, value in owners[name]:
                    setattr(owner, name.removeprefix("config."), value)

    with torch.random.fork_rng(devices=[]):
        if not random_without([]):
            return ()
        names = [name for name in owners if "drop" in name]
        for name in list(names):
            if not random_without([other for other in names if other != name]):
                names.remove(name)
    return tuple(names)
