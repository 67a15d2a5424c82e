"""The trunk: the layers below the first delta. Entries that share a text go through it as one row.

Hooks cannot call a part of a stack, but they can change how many rows a stack computes while it runs. A call whose
texts repeat starts with distinct texts, and each entry becomes a row of its own in front of the first layer that its
adapter touches: states, masks and positions are expanded there, and another plan goes on.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn

from onebase.core.packing import make_packing
from onebase.core.plan import Plan, Routed
from onebase.core.route import Runtime
from onebase.errors import UnsupportedError

HIDDEN = "hidden_states"
# Arguments of layers that hold rows in their first dimension, or one row for all.
ROWS = frozenset(
    {HIDDEN, "attention_mask", "position_ids", "position_embeddings", "position_bias", "encoder_hidden_states"}
    | {"encoder_attention_mask", "encoder_decoder_position_bias"}
)
# Arguments that hold none; KV caches are never there when a plan has a trunk.
NO_ROWS = frozenset({"use_cache", "output_attentions", "cache", "past_key_values", "layer_past"})
# Inputs of a stack that hold rows.
INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")


@cache
def parameters_of(kind: type[nn.Module]) -> tuple[str, ...] | None:
    """Return the names of a layer's arguments, in order; None where one of them is not known to hold rows or not."""
    found = [p for p in inspect.signature(kind.forward).parameters.values() if p.kind != p.VAR_KEYWORD]
    names = tuple(p.name for p in found[1:])
    return names if HIDDEN in names[:1] and set(names) <= ROWS | NO_ROWS else None


def has_trunk(layers: Sequence[nn.Module]) -> bool:
    """Whether the layers of a stack are separate modules that take nothing but arguments known by name."""
    return len(layers) > 1 and len(set(layers)) == len(layers) and all(parameters_of(type(m)) for m in layers)


def first_layer(adapter: Routed | None, stack: str, layers: int) -> int:
    """Return the lowest layer of a stack that an adapter touches; `layers` where it touches none."""
    if adapter is None:
        return layers
    if stack not in adapter.first:
        if stack in adapter.prompts or stack in adapter.words or stack in adapter.shift:
            adapter.first[stack] = 0
        else:  # sites are named stack/layer/..., or stack/embeddings
            places = [name.split("/") for name in adapter.deltas if name.startswith(f"{stack}/")]
            numbers = [int(place[1]) if place[1].isdigit() else 0 for place in places]
            adapter.first[stack] = min(numbers, default=layers)
    return adapter.first[stack]


# -- rows that become their own in the middle of a call --------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What the layers from one on compute.

    Attributes:
        layer: the first of them; 0 is the beginning of the call.
        rows: (text, adapter) of each row; no adapter where the row stands for several entries.
        before: row of the step before that each row comes from; () in the first step.
    """

    layer: int
    rows: tuple[tuple[int, str | None], ...]
    before: tuple[int, ...] = ()


def steps_of(names: Sequence[str | None], texts: Sequence[int], first: Sequence[int], layers: int) -> list[Step]:
    """Decide where entries that share a text become rows of their own.

    Args:
        names: adapter of each entry.
        texts: number of each entry's text.
        first: the lowest layer that each entry's adapter touches; `layers` where it touches none.
        layers: of the stack.

    Returns:
        The steps, with more rows in each; the last has one row per entry, in their order. A single one: nothing is
        shared.
    """
    own = [min(layer, layers - 1) for layer in first]  # all rows are apart when the last layer is computed
    found: list[Step] = []
    place: dict[int, int] = {}  # entry -> its row in the step before
    for layer in sorted({0, *own}):
        members: list[list[int]] = []  # the entries that each row stands for
        waiting: dict[int, int] = {}  # text -> the row of all entries that no layer has touched yet
        for entry, (text, begins) in enumerate(zip(texts, own)):
            if begins > layer and text in waiting:
                members[waiting[text]].append(entry)
                continue
            if begins > layer:
                waiting[text] = len(members)
            members.append([entry])
        if found and len(members) == len(found[-1].rows):
            continue
        rows = tuple((texts[many[0]], names[many[0]] if len(many) == 1 else None) for many in members)
        found.append(Step(layer, rows, tuple(place[many[0]] for many in members) if found else ()))
        place = {entry: row for row, many in enumerate(members) for entry in many}
    return found


class Trunk:
    """What a plan does in front of the layers. A call changes nothing in it, so that layers can be computed again."""

    def enter(self, layer: int, arguments: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
        """Return the arguments of a layer."""
        raise NotImplementedError

    def passes(self, layer: int) -> bool:
        """Whether a layer hands on what it is given."""
        return False


@dataclass(eq=False)
class Stage:
    """A step, lowered.

    Attributes:
        layer: the first layer.
        plan: of its rows.
        rows: for each earlier stage, its row for each row of this one.
        sources: the same in what is computed: rows, or packed tokens.
        width: how many of them.
        memo: arguments that were expanded, with what they were made of, by the identity of that.
    """

    layer: int
    plan: Plan
    rows: list[Tensor]
    sources: list[Tensor] = field(default_factory=list)
    width: int = 0
    memo: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(eq=False)
class Shared(Trunk):
    """Entries share the rows of their texts until a layer of their adapter comes.

    Attributes:
        stages: of the whole call.
        number: the stage whose plan holds this.
    """

    stages: list[Stage]
    number: int = 0

    @property
    def ended(self) -> bool:
        """Whether all rows are apart."""
        return self.number == len(self.stages) - 1

    def enter(self, layer: int, arguments: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
        """Give each row of this layer its states, and every other argument as many rows."""
        number = self.number
        while number + 1 < len(self.stages) and self.stages[number + 1].layer <= layer:
            number += 1
        if number != self.number:
            runtime.switch(self.stages[number].plan)
        return {name: self._expand(name, value, number) for name, value in arguments.items()}

    def _expand(self, name: str, value: Any, number: int) -> Any:
        if isinstance(value, tuple):
            return tuple(self._expand(name, each, number) for each in value)
        if not isinstance(value, Tensor):
            return value
        stage, dim = self.stages[number], 0 if self.stages[0].plan.packing is None else 1
        if id(value) in stage.memo:
            return stage.memo[id(value)][1]
        if name not in ROWS:
            raise UnsupportedError(f"a layer is given {name!r}, and nobody knows whether it holds rows")
        width = value.shape[dim]
        if width == stage.width:
            return value
        source = next((i for i in range(number) if self.stages[i].width == width), None)
        if source is None:
            if width == 1:
                return value  # one for all rows
            raise UnsupportedError(f"a layer is given {name!r} of {width} rows, which no part of this call has")
        new = value.index_select(dim, stage.sources[source])
        if name != HIDDEN:  # the others are given to every layer
            stage.memo[id(value)] = value, new
        return new


def finish_stages(stages: list[Stage], mask: Tensor | None) -> None:
    """Fill in what stages compute: rows, or packed tokens where the first is packed.

    Args:
        stages: with plans and rows; the plan of the first may be packed.
        mask: (B, T) real tokens of the first stage's rows, before it was packed.
    """
    packed = stages[0].plan.packing is not None
    for number, stage in enumerate(stages):
        if packed and number:
            assert mask is not None
            packing = make_packing(mask.index_select(0, stage.rows[0]), always=True)
            assert packing is not None
            stage.plan.pack(packing)
        stage.width = stage.plan.batch
        for rows, earlier in zip(stage.rows, stages):
            stage.sources.append(rows if earlier.plan.packing is None else earlier.plan.packing.of_rows(rows))
        stage.plan.trunk = Shared(stages, number)


class LayerHook:
    """The hook in front of a layer; does nothing unless the plan has a trunk.

    Args:
        module: the layer.
        number: its place in the stack.
        runtime: holds the plan of the call in progress.
    """

    def __init__(self, module: nn.Module, number: int, runtime: Runtime):
        self.number, self.runtime = number, runtime
        self.names = parameters_of(type(module)) or ()
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Return the arguments that the plan's trunk gives the layer."""
        plan = self.runtime.plan
        if plan is None or plan.trunk is None:
            return None
        new = plan.trunk.enter(self.number, dict(zip(self.names, args)) | kwargs, self.runtime)
        first = self.names[: len(args)]  # positional ones stay positional
        return tuple(new.pop(name) for name in first), new
