"""Taps: hooks at a tapped module, on its output or its input, that apply the deltas of the routed adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from onebase.core.route import Runtime
from onebase.core.site import Ref, Site

# On a module that carries several sites, the projection comes first, then its norm, then what leaves the sub-layer.
ORDER = {"linear": 0, "norm": 1, "exit": 2, "block": 3}
FRESH = (nn.Linear, nn.LayerNorm)


class Tap:
    """The hook of one module; knows its sites, reads the plan, and nothing else.

    Args:
        module: the tapped module.
        runtime: holds the plan of the call in progress.
    """

    def __init__(self, module: nn.Module, runtime: Runtime):
        self.runtime = runtime
        self.sites: list[Site] = []
        self.handle: RemovableHandle = module.register_forward_hook(self, with_kwargs=True)

    def add(self, site: Site) -> None:
        """Serve another site of the same module."""
        if site not in self.sites:
            self.sites.append(site)
            self.sites.sort(key=lambda s: ORDER[s.kind])

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Return the changed output, or None to leave it as it is."""
        plan = self.runtime.plan
        if plan is None or not plan.groups:
            return None
        h = output[0] if isinstance(output, tuple) else output
        new = h
        # the output of a product or a norm is a tensor of its own; a hook beside this one may keep it
        fresh = type(module) in FRESH and len(module._forward_hooks) == 1 and not torch.is_grad_enabled()
        for site in self.sites:
            x = first_tensor(args, kwargs, 0) if site.residual is None else plan.caught.get(str(site.residual))
            if not site.is_part:
                new = plan.apply(x, new, site.name, fresh)
                continue
            part = site.take(h)  # of h: parts do not overlap, and a delta may keep what it read for its backward
            changed = plan.apply(x, part, site.name)
            if changed is not part:
                new = new.clone() if new is h else new
                site.put(new, changed)
        if new is h:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new


class InputTap:
    """The hook on the input of one module; serves its 'input' site.

    Args:
        module: the tapped module.
        runtime: holds the plan of the call in progress.
        site: where x and h are both the module's first input.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, site: Site):
        self.runtime, self.site = runtime, site
        self.handle: RemovableHandle = module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Return the changed inputs, or None to leave them as they are."""
        plan = self.runtime.plan
        if plan is None or not plan.groups:
            return None
        h = first_tensor(args, kwargs, 0)
        new = plan.apply(None, h, self.site.name)
        if new is h:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {key: new if value is h else value for key, value in kwargs.items()}


class Catch:
    """Keep a residual tensor for the exit sites of the same layer (parallel adapters read it)."""

    def __init__(self, module: nn.Module, ref: Ref, runtime: Runtime):
        self.runtime, self.ref = runtime, ref
        if ref.index is None:
            self.handle = module.register_forward_hook(self._output)
        else:
            self.handle = module.register_forward_pre_hook(self._input, with_kwargs=True)

    def _input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        plan = self.runtime.plan
        if plan is not None and plan.groups:
            plan.caught[str(self.ref)] = first_tensor(args, kwargs, self.ref.index or 0)

    def _output(self, module: nn.Module, args: tuple, output: Any) -> None:
        plan = self.runtime.plan
        if plan is not None and plan.groups:
            plan.caught[str(self.ref)] = output[0] if isinstance(output, tuple) else output


def first_tensor(args: tuple, kwargs: dict, index: int) -> Tensor:
    """Return positional input `index`, or the keyword that transformers uses in its place.

    Linears call theirs `input` or `x`: without a known name the first tensor is input 0.
    """
    if index < len(args):
        return args[index]
    if index:
        return kwargs["input_tensor"]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else _first(kwargs)


def _first(kwargs: dict) -> Tensor:
    return next(value for value in kwargs.values() if isinstance(value, Tensor))
