"""Telling `up` from `gate`: the input of `down` is linear in up, and is not in gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from onebase.anatomy.discovery_parts import Branches, Part
from onebase.anatomy.discovery_probe import Probe
from onebase.core.site import Ref


def settle_gates(probe: Probe, found: Sequence[Branches], hold: dict) -> None:
    """Tell `up` from `gate` in every gated MLP: the input of down is linear in up, and is not in gate.

    Args:
        probe: the model.
        found: the MLPs of all layers.
        hold: edits that keep layer inputs and exits as they were, so that layers do not disturb each other.
    """
    gated = [b for b in found if "down" in b.parts and "up" in b.parts]
    inputs = {id(b): Ref(b.parts["down"].path, 0) for b in gated}
    plain = probe.run([*inputs.values()], hold)
    for b in gated:
        if "gate" not in b.parts:
            width, source = _width(probe, b.parts["down"].path, 0), _width(probe, b.parts["up"].path, 1)
            if source == 2 * width:  # one fused linear
                path = b.parts.pop("up").path
                b.parts["gate"], b.parts["up"] = (
                    Part(path, tuple(range(width))),
                    Part(path, tuple(range(width, 2 * width))),
                )
                b.refused["fused"] = ""
            elif source != width:
                b.refused["up"] = f"{source} features of up become {width} of down's input"
                del b.parts["up"]
    linear: dict[tuple[int, str], bool] = {}
    pairs = [b for b in gated if "gate" in b.parts]
    orders: dict[int, list[tuple[Part, Part]]] = {id(b): _splits(b) for b in pairs}
    for number in range(max((len(o) for o in orders.values()), default=0)):
        for side in (0, 1):
            edits, tested = dict(hold), []
            for b in pairs:
                if number < len(orders[id(b)]):
                    part = orders[id(b)][number][side]
                    edits[Ref(part.path, None)] = _scaled(part)
                    tested.append(b)
            out = probe.run([*inputs.values()], edits)
            for b in tested:
                ref = inputs[id(b)]
                linear[id(b), f"{number}{side}"] = probe.equal(out[ref], -2.0 * plain[ref])
    for b in pairs:
        _choose(b, orders[id(b)], linear)


def _splits(b: Branches) -> list[tuple[Part, Part]]:
    """Return the ways in which gate and up can be told apart: two modules, or halves, or every other feature."""
    one, other = b.parts["gate"], b.parts["up"]
    if b.refused.pop("fused", None) is None:
        return [(one, other)]
    assert one.features is not None and other.features is not None
    width = len(one.features)
    even = Part(one.path, tuple(range(0, 2 * width, 2))), Part(one.path, tuple(range(1, 2 * width, 2)))
    return [(one, other), even]


def _scaled(part: Part) -> Any:
    """Return an edit that multiplies a part by -2: linear for no activation in use, ReLU and tanh included."""

    def edit(value: Tensor) -> Tensor:
        new = value.clone()
        index = slice(None) if part.features is None else list(part.features)
        new[..., index] = new[..., index] * -2.0
        return new

    return edit


def _choose(b: Branches, orders: list[tuple[Part, Part]], linear: dict[tuple[int, str], bool]) -> None:
    for number, (one, other) in enumerate(orders):
        first_linear, second_linear = linear[id(b), f"{number}0"], linear[id(b), f"{number}1"]
        if first_linear != second_linear:
            b.parts["up"], b.parts["gate"] = (one, other) if first_linear else (other, one)
            return
    paths = {part.path for pair in orders for part in pair}
    del b.parts["up"], b.parts["gate"]
    b.refused["up"] = f"gate and up cannot be told apart in {' and '.join(sorted(paths))}: no one of them acts linearly"


def _width(probe: Probe, path: str, side: int) -> int:
    module: Any = probe.model.get_submodule(path)
    sizes = (module.in_features, module.out_features) if hasattr(module, "in_features") else (module.nx, module.nf)
    return int(sizes[side])
