"""States below the first delta, kept: recorded where they enter a layer, and given to it again later.

The base is frozen, so what enters the lowest layer that an adapter touches is the same in every epoch. With the states
given, the layers below hand on what they get, whatever it is. Other threads compute every layer as ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onebase.core.plan import Plan
from onebase.core.route import Runtime
from onebase.core.site import Stack
from onebase.core.tap import first_tensor
from onebase.core.trunk import HIDDEN, Trunk, first_layer
from onebase.errors import UnsupportedError

Text = tuple[tuple[int, ...], tuple[int, ...] | None]  # token ids and types


@dataclass(eq=False)
class Recorded(Trunk):
    """Record the states that enter a layer; from there on layers pass.

    Attributes:
        layer: the layer.
        rows: afterwards, the states (t_i, D) of each row's real tokens.
        lengths: t_i.
    """

    layer: int
    lengths: Sequence[int]
    rows: list[Tensor] = field(default_factory=list)

    def enter(self, layer: int, arguments: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
        """Keep a copy of the states."""
        if layer == self.layer:
            states, plan = arguments[HIDDEN].detach(), runtime.plan
            if plan is not None and plan.packing is not None:
                self.rows = [part.clone() for part in states[0].split(list(self.lengths))]
            else:
                self.rows = [row[:length].clone() for row, length in zip(states, self.lengths)]
        return arguments

    def passes(self, layer: int) -> bool:
        """Whether the states were recorded already."""
        return layer >= self.layer


@dataclass(eq=False)
class Given(Trunk):
    """Layers below one pass, and that one is given states.

    Attributes:
        layer: the layer.
        rows: the states (t_i, D) of each row's real tokens; padding is on the right.
    """

    layer: int
    rows: Sequence[Tensor]

    def enter(self, layer: int, arguments: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
        """Put the states in the place of those that nobody computed."""
        if layer != self.layer:
            return arguments
        shape, plan = arguments[HIDDEN].shape, runtime.plan
        if plan is not None and plan.packing is not None:
            states = torch.cat(list(self.rows))[None]
        else:
            states = nn.utils.rnn.pad_sequence(list(self.rows), batch_first=True)
        if states.shape != shape:
            raise UnsupportedError(f"layer {layer} computes {tuple(shape)}, the states kept are {tuple(states.shape)}")
        return arguments | {HIDDEN: states}

    def passes(self, layer: int) -> bool:
        """Whether nobody needs what a layer would compute."""
        return layer < self.layer


@dataclass(eq=False)
class Memory:
    """The states that enter a layer, by text.

    Attributes:
        stack: whose layer.
        layer: its number; the layers below it pass where all texts of a call are known.
        known: the states (t, D) of each text, as computed.
        recording: states are recorded, not given.
        last: what the last call recorded.
    """

    stack: Stack
    layer: int
    known: dict[Text, Tensor] = field(default_factory=dict)
    recording: bool = False
    last: Recorded | None = None

    def trunk(self, stack: Stack, call: dict[str, Any], plan: Plan) -> Trunk | None:
        """Return what is done in front of the layers of a call; None where they are computed as ever.

        Args:
            stack: which is called.
            call: its arguments, before rows are packed.
            plan: without a trunk.
        """
        mask, ids = call.get("attention_mask"), call.get("input_ids")
        plain = all(call.get(name) is None for name in ("inputs_embeds", "position_ids"))
        if stack is not self.stack or ids is None or not plain or plan.layout is not None or mask is None:
            return None
        if mask.dim() != 2 or not bool((mask[:, :-1] >= mask[:, 1:]).all()):
            return None  # padded on the left
        lengths = mask.sum(1).tolist()
        if self.recording:
            self.last = Recorded(self.layer, lengths)
            return self.last
        count = len(stack.layers)
        if any(first_layer(g.adapter, stack.name, count) < self.layer for g in plan.groups):
            return None
        types = call.get("token_type_ids")
        second = [None] * len(lengths) if types is None else types.tolist()
        texts = [
            (tuple(own[:length]), None if kinds is None else tuple(kinds[:length]))
            for own, kinds, length in zip(ids.tolist(), second, lengths)
        ]
        rows = [self.known.get(text) for text in texts]
        found = [row for row in rows if row is not None]
        return Given(self.layer, found) if len(found) == len(rows) else None


class Passing:
    """The forward of a layer that can hand on what it is given, in the form that the layer returns.

    Args:
        module: the layer.
        number: its place in the stack.
        runtime: holds the plan of the call in progress.
    """

    def __init__(self, module: nn.Module, number: int, runtime: Runtime):
        self.original, self.number, self.runtime = module.forward, number, runtime
        self.more: int | None = None  # empty places behind the states where a tuple is returned; -1: no tuple
        self.calls = 0  # how often the layer was computed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer, or pass."""
        plan = self.runtime.plan
        if plan is None or plan.trunk is None or not plan.trunk.passes(self.number):
            out = self.original(*args, **kwargs)
            self.more, self.calls = _form(out), self.calls + 1
            return out
        if self.more is None:
            raise UnsupportedError(f"layer {self.number} returns more than its states")
        states = first_tensor(args, kwargs, 0)
        return states if self.more < 0 else (states, *[None] * self.more)


def _form(out: Any) -> int | None:
    if isinstance(out, Tensor):
        return -1
    empty = isinstance(out, tuple) and isinstance(out[0], Tensor) and all(value is None for value in out[1:])
    return len(out) - 1 if empty else None


@contextmanager
def passing(layers: Sequence[nn.Module], runtime: Runtime) -> Iterator[list[Passing]]:
    """Let layers pass where a plan says so, as long as the block runs; other threads compute them as ever."""
    found = [Passing(layer, number, runtime) for number, layer in enumerate(layers)]
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer, own in zip(layers, found):
            layer.__dict__["forward"] = own
        yield found
    finally:
        for layer, own in zip(layers, before):
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = own
