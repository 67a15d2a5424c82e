"""Gradient checkpointing: the plan of the forward pass is there again when a layer is computed a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from onebase.core.route import Runtime

ATTRIBUTE = "_gradient_checkpointing_func"
CHECKPOINTED = "gradient_checkpointing"  # transformers' flag on a layer object


class PlannedCheckpoint:
    """A layer's checkpoint function that captures the plan; dropout of jobs is a function of it.

    Args:
        original: the function that transformers installed.
        layer: the layer it belongs to.
        runtime: where the plan lives. On CUDA the second computation runs in another thread.
    """

    def __init__(self, original: Callable, layer: nn.Module, runtime: Runtime):
        self.original, self.layer, self.runtime = original, layer, runtime

    def __call__(self, function: Callable, *args: Any) -> Any:
        """Checkpoint `function(*args)`."""
        plan = self.runtime.plan
        calls = 0

        def planned(*inputs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                return function(*inputs)
            with self.runtime.hold(plan, self.layer):
                return function(*inputs)

        return self.original(planned, *args)


def wrap_checkpoints(layers: Iterable[nn.Module], runtime: Runtime) -> None:
    """Wrap the checkpoint function of each layer that has one, once."""
    for layer in layers:
        if not getattr(layer, CHECKPOINTED, False):
            continue
        function = layer.__dict__.get(ATTRIBUTE)
        if function is not None and not isinstance(function, PlannedCheckpoint):
            layer.__dict__[ATTRIBUTE] = PlannedCheckpoint(function, layer, runtime)


def unwrap_checkpoints(layers: Iterable[nn.Module]) -> None:
    """Put the original checkpoint functions back."""
    for layer in layers:
        function = layer.__dict__.get(ATTRIBUTE)
        if isinstance(function, PlannedCheckpoint):
            layer.__dict__[ATTRIBUTE] = function.original
