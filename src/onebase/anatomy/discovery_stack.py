"""Stacks of an unknown model: who reads the tokens, which list holds the layers, how positions and padding behave."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from onebase.anatomy.discovery_probe import DECODED, ROWS, TOKENS, Probe, first
from onebase.anatomy.discovery_trace import Call, Trace
from onebase.errors import UnsupportedError


@dataclass
class FoundStack:
    """One stack as it was found.

    Attributes:
        path: of the module that reads the tokens, from the model's root.
        layers: path of the layer list, from the stack.
        calls: one call of each layer, in order.
        embed: path of the token embedding, from the stack.
        states: encoder states that the stack reads, or None.
        refused: site part -> why it cannot serve.
        padding: 'left' or 'right' -> why rows cannot be padded there.
    """

    path: str
    module: nn.Module
    call: Call
    layers: str
    calls: list[Call]
    name: str = ""
    embed: str = ""
    states: Tensor | None = None
    causal: bool = False
    position_start: int | None = None
    position_limit: int | None = None
    position_module: str = ""
    position_offset: int = 0
    hidden: int = 0
    pooler: str = ""
    pooler_reads: str = ""
    feeds: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    padding: dict[str, str] = field(default_factory=dict)

    @property
    def states_given(self) -> bool:
        """Whether the stack reads another one's states; such a stack is often called without a mask."""
        return self.states is not None

    @property
    def names(self) -> set[str]:
        """Names of the arguments of the stack's forward."""
        return set(inspect.signature(self.module.forward).parameters)

    def at(self, index: int) -> str:
        """Path of a layer."""
        return self.calls[index].path


def find_stacks(probe: Probe, trace: Trace) -> list[FoundStack]:
    """Find the stacks in the order they run.

    Raises:
        UnsupportedError: there is no list of layers, or more than an encoder and a decoder.
    """
    found: dict[str, FoundStack] = {}
    for path, calls in _layer_lists(probe, trace):
        owner = _reader(trace, path)
        if owner is None:
            raise UnsupportedError(f"no module around {path} takes input_ids")
        if owner.path in found:
            raise UnsupportedError(f"{owner.path or 'the model'} has several lists of layers: {path} too")
        inside = path[len(owner.path) :].lstrip(".")
        found[owner.path] = FoundStack(owner.path, owner.module, owner, inside, calls)
    stacks = sorted(found.values(), key=lambda stack: stack.call.start)
    if not stacks:
        raise UnsupportedError(
            "no list of layers: a list whose members each run once and hand on states of (rows, tokens, width)"
        )
    if len(stacks) > 2:
        raise UnsupportedError(
            f"{len(stacks)} stacks ({', '.join(s.path for s in stacks)}): at most two are understood"
        )
    for stack in stacks:
        stack.embed = _embedding(stack, trace)
    if len(stacks) == 2:
        _join(stacks[0], stacks[1], trace)
    for stack in stacks:
        _examine(stack, probe, trace)
    if len(stacks) == 2:
        stacks[0].name, stacks[1].name = "encoder", "decoder"
    else:
        stacks[0].name = "decoder" if stacks[0].causal else "encoder"
    for stack in stacks:
        _wrapped(stack, trace)
        _told(stack, probe)
    return stacks


def _told(stack: FoundStack, probe: Probe) -> None:
    """Check that the mask of the whole model's call is the one that the stack gets."""
    if stack.states_given or "block" in stack.refused or "attention_mask" not in stack.names:
        return
    call = probe.inputs()
    if "attention_mask" not in call:
        return
    mask = call["attention_mask"] = call["attention_mask"].clone()
    mask[0, -2:] = 0
    seen: list[Any] = []
    handle = stack.module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    try:
        with torch.no_grad():
            probe.call(call, probe.model)
    finally:
        handle.remove()
    if not (seen and isinstance(seen[0], Tensor) and torch.equal(seen[0], mask)):
        reason = f"{type(probe.model).__name__} does not hand the mask of padding to its stack"
        for name in ("block", "embeddings", "kv"):
            stack.refused.setdefault(name, reason)


def _wrapped(stack: FoundStack, trace: Trace) -> None:
    """Note what a module around the stack prepares for it, because the stack's anchor comes too late for that."""
    mask = stack.call.kwargs.get("attention_mask")
    if mask is None or trace.tensors[mask].dim() != 2:
        reason = "the attention mask is prepared outside of the stack, where nothing can be put into it"
        if "attention_mask" in stack.names and not stack.states_given:
            stack.refused["embeddings"] = stack.refused["kv"] = reason
        if not stack.states_given:
            stack.refused["block"] = "the stack is not told which tokens are padding, so positions are unknown"
    if "position_ids" in stack.call.kwargs and stack.path:
        stack.refused["kv"] = "positions are given from outside of the stack, where padding on the left moves them"


def hidden(call: Call) -> tuple[int, int, int] | None:
    """Return the shape of the states that a layer takes and gives, or None where it does neither."""
    if not call.inputs or call.output is None or len(call.shape) != 3 or call.shape[0] != ROWS:
        return None
    return call.shape if call.shapes.get(call.inputs[0][1]) == call.shape else None  # type: ignore[return-value]


def _layer_lists(probe: Probe, trace: Trace) -> list[tuple[str, list[Call]]]:
    """Return (path, calls) of the outermost lists whose members are layers."""
    found: list[tuple[str, list[Call]]] = []
    for path, module in probe.model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if any(path.startswith(f"{outer}.") for outer, _ in found):
            continue
        calls = [trace.by_path[f"{path}.{name}"] for name, _ in module.named_children()]
        if any(len(c) != 1 for c in calls) or not any(is_matrix(m) for m in module.modules()):
            continue
        single = [c[0] for c in calls]
        ordered = all(a.end <= b.start for a, b in pairwise(single))
        if ordered and all(hidden(call) is not None for call in single):
            found.append((path, single))
    return found


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is one linear map: torch's Linear, a quantized linear, or transformers' Conv1D."""
    sized = hasattr(module, "in_features") and hasattr(module, "out_features")
    return (sized or (hasattr(module, "nx") and hasattr(module, "nf"))) and not any(True for _ in module.children())


def _reader(trace: Trace, path: str) -> Call | None:
    """Return the call of the innermost module around `path` that takes token ids."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        calls = trace.by_path.get(".".join(parts[:depth]), [])
        if len(calls) == 1 and "input_ids" in inspect.signature(calls[0].module.forward).parameters:
            return calls[0]
    return None


def _embedding(stack: FoundStack, trace: Trace) -> str:
    """Return the path of the module that turns exactly the token ids into vectors."""
    for call in trace.calls:
        inside = call.path.startswith(f"{stack.path}.") or not stack.path
        weight = getattr(call.module, "weight", None)
        if not inside or call.start > stack.calls[0].start or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        if call.inputs and not any(True for _ in call.module.children()) and not is_matrix(call.module):
            ids = trace.tensors[call.inputs[0][1]]
            if (
                ids.dtype == torch.long
                and ids.shape == (ROWS, _columns(stack))
                and len(call.shape) == 3
                and _varied(ids)
            ):
                return call.path[len(stack.path) :].lstrip(".")
    raise UnsupportedError(f"{stack.path or 'the model'} has no module that embeds the token ids")


def _columns(stack: FoundStack) -> int:
    return stack.calls[0].shape[1]


def _varied(ids: Tensor) -> bool:
    """Token ids differ from row to row; positions and token types do not."""
    return not torch.equal(ids[0], ids[1])


def _join(encoder: FoundStack, decoder: FoundStack, trace: Trace) -> None:
    """Check that the second stack reads the first one's states."""
    key = decoder.call.kwargs.get("encoder_hidden_states")
    if key is None or encoder.call.output is None or trace.origin(key) != trace.origin(encoder.call.output):
        raise UnsupportedError(f"{decoder.path} does not read the states of {encoder.path} as encoder_hidden_states")
    encoder.feeds, decoder.states = "decoder", trace.tensors[key]


# -- how a stack behaves, by numbers ---------------------------------------------------------------------------------


def states_of(probe: Probe, stack: FoundStack, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    """Run a stack by itself and return its last hidden states (B, T, D)."""
    call: dict[str, Any] = {"input_ids": ids, **more}
    if "attention_mask" in stack.names:
        call["attention_mask"] = (
            torch.ones(ids.shape[:2], dtype=torch.long, device=ids.device) if mask is None else mask
        )
    if stack.states is not None:
        call["encoder_hidden_states"] = stack.states[: len(ids)]
    if "use_cache" in stack.names:
        call["use_cache"] = False
    with torch.no_grad():
        output = probe.call({k: v for k, v in call.items() if v is not None}, stack.module)
    return first(output) if isinstance(output, tuple) else output.last_hidden_state


def ids_of(probe: Probe, stack: FoundStack) -> Tensor:
    return probe.ids if _columns(stack) == TOKENS else probe.decoder_ids[:, :DECODED]


def _examine(stack: FoundStack, probe: Probe, trace: Trace) -> None:
    ids = ids_of(probe, stack)
    plain = states_of(probe, stack, ids)
    if stack.call.output is None or not probe.equal(plain, trace.tensors[stack.call.output]):
        raise UnsupportedError(f"{stack.path or 'the model'} answers differently when it is called by itself")
    changed = ids.clone()
    changed[-1] = ids[0]
    if not probe.equal(states_of(probe, stack, changed)[:-1], plain[:-1]):
        raise UnsupportedError(f"{stack.path or 'the model'}: a row's states depend on the other rows of the batch")
    changed = ids.clone()
    changed[:, -1] = ids[:, 0]
    stack.causal = probe.equal(states_of(probe, stack, changed)[:, :-1], plain[:, :-1])
    stack.hidden = plain.shape[-1]
    _embeddings(stack, probe, plain)
    _pooler(stack, trace)


def _embeddings(stack: FoundStack, probe: Probe, plain: Tensor) -> None:
    """Check that virtual tokens can be given: the stack answers alike to ids and to their embeddings."""
    ids = ids_of(probe, stack)
    if "inputs_embeds" not in stack.names:
        stack.refused["embeddings"] = f"{type(stack.module).__name__} takes no inputs_embeds"
        return
    embed = stack.module.get_submodule(stack.embed)
    try:
        with torch.no_grad():
            vectors = embed(ids)
        found = states_of(probe, stack, ids, inputs_embeds=vectors, input_ids=None)
    except UnsupportedError as error:
        stack.refused["embeddings"] = str(error)
        return
    if not probe.equal(found, plain):
        stack.refused["embeddings"] = f"the output of {stack.embed} given as inputs_embeds is not read as the ids are"


def _pooler(stack: FoundStack, trace: Trace) -> None:
    """Find the child that makes one vector per row of the states, inside the stack, and what it reads."""
    for name, _ in stack.module.named_children():
        for call in trace.by_path.get(f"{stack.path}.{name}".lstrip("."), []):
            if call.start < stack.calls[-1].end or not call.inputs or len(call.shape) != 2:
                continue
            shape = call.shapes.get(call.inputs[0][1], ())
            if len(shape) == 3 and shape[:2] == (ROWS, _columns(stack)):
                stack.pooler = name
            elif len(shape) == 2 and (reads := _first_token_of(stack, trace, call.inputs[0][1])):
                stack.pooler, stack.pooler_reads = name, reads


def _first_token_of(stack: FoundStack, trace: Trace, key: tuple[int, int]) -> str:
    """Return the module inside the stack of whose output `key` holds the first token of every row."""
    made = trace.ancestors(key, {call.output for call in stack.calls if call.output is not None})
    for call in trace.below(stack.path):
        if call.output in made and call.path != stack.path and len(call.shape) == 3 and call.end >= stack.calls[-1].end:
            states = trace.tensors[call.output]  # type: ignore[index]
            if torch.equal(states[:, 0], trace.tensors[key]):
                return call.path[len(stack.path) :].lstrip(".")
    return ""
