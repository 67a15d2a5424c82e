"""What is installed on a base, and how all of it is taken away again.

Anchors sit on every stack from the start. A tap or a catch is installed at the first use of its module; the
attention function at the first prefix. `close` leaves hooks, flags, attention setting and tensors as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from onebase.anatomy import attention
from onebase.anatomy.anatomy import Anatomy
from onebase.core.anchor import Anchor
from onebase.core.checkpoint import ATTRIBUTE, CHECKPOINTED, unwrap_checkpoints
from onebase.core.groupwise import PerGroup
from onebase.core.plan import Routed
from onebase.core.products import Products
from onebase.core.route import Route, RouteContext, Runtime
from onebase.core.site import TOKENS, Groupwise, Site
from onebase.core.tap import Catch, InputTap, Tap
from onebase.errors import UnsupportedError

_ABSENT = object()  # an attribute that a layer object did not have of its own


class Installation:
    """Hooks and settings of one base.

    Args:
        model: the base model.
        anatomy: its stacks and sites.
        find: adapter by name.
        by_number: names for an `adapter_ids` tensor.
    """

    def __init__(
        self,
        model: Any,
        anatomy: Anatomy,
        find: Callable[[str], Routed],
        by_number: Callable[[Tensor], tuple[str | None, ...]],
    ):
        self.model, self.anatomy = model, anatomy
        self.runtime, self.context = Runtime(), RouteContext()
        self.taps: dict[str, Tap] = {}
        self.inputs: dict[str, InputTap] = {}
        self.catches: dict[str, Catch] = {}
        self.per_group: dict[Groupwise, PerGroup] = {}
        self.by_number = by_number
        feeding = {stack.feeds: stack for stack in anatomy.stacks if stack.feeds}
        self.anchors = [
            Anchor(s, self.runtime, self.context, find, by_number, feeding.get(s.name)) for s in anatomy.stacks
        ]
        self.top: list[Any] = []
        if all(stack.module is not model for stack in anatomy.stacks):
            self.top = [
                model.register_forward_pre_hook(self._take_ids, with_kwargs=True, prepend=True),
                model.register_forward_hook(self._drop_ids, with_kwargs=True, always_call=True),
            ]
        self.attention: list[tuple[Any, str]] = []  # (config, original setting)
        self._prefixes = False  # some adapter needs the attention function
        self._packed, self._lock = 0, threading.Lock()  # calls that need it now
        self._products = Products(model)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        modes = [(m, m.training) for m in model.modules()]
        self._flags, self._modes = flags, modes
        model.eval()  # base dropout is off while adapters train, or joint training could not equal training alone
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._checkpoint_flags: list[tuple[Any, str, Any]] = []  # (layer or config, attribute, value)

    # -- adapter_ids among the inputs of the whole model ---------------------------------------------------------

    def _take_ids(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        while self.runtime.frames:
            self.runtime.pop()  # left over from a call that was interrupted
        self.runtime.override = None
        ids = kwargs.pop("adapter_ids", None)
        if ids is None:
            return None
        self.runtime.override = Route(self.by_number(ids)), self.context.variable.get()
        return args, kwargs

    def _drop_ids(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.runtime.override = None

    # -- sites ---------------------------------------------------------------------------------------------------

    def add(self, routed: Routed) -> None:
        """Install what the sites of an adapter need."""
        for name in routed.deltas:
            site = self.anatomy.sites[name]
            if site.kind == "kv":
                with self._lock:
                    self._prefixes = True
                    self._switch_attention()
            elif site.kind == "input":
                if site.path not in self.inputs:
                    self.inputs[site.path] = InputTap(site.module, self.runtime, site)
            elif site.kind not in TOKENS:  # the anchor embeds
                self._tap(site)

    def _tap(self, site: Site) -> None:
        if site.path not in self.taps:
            self.taps[site.path] = Tap(site.module, self.runtime)
        self.taps[site.path].add(site)
        if site.residual is not None and str(site.residual) not in self.catches:
            module = self.model.get_submodule(site.residual.path)
            self.catches[str(site.residual)] = Catch(module, site.residual, self.runtime)
        shared = site.groupwise
        if shared is not None and shared not in self.per_group:
            module = self.model.get_submodule(shared.path)
            self.per_group[shared] = PerGroup(module, shared.method, shared.rows, self.runtime)

    def release(self, still: set[str]) -> None:
        """Take away taps that serve none of the sites in `still`, and the attention function when unused."""
        sites = [self.anatomy.sites[name] for name in still]
        for path in set(self.taps) - {site.path for site in sites if site.kind != "input"}:
            self.taps.pop(path).handle.remove()
        for path in set(self.inputs) - {site.path for site in sites if site.kind == "input"}:
            self.inputs.pop(path).handle.remove()
        for tap in self.taps.values():
            tap.sites = [site for site in tap.sites if site.name in still]
        for key in set(self.catches) - {str(site.residual) for site in sites if site.residual}:
            self.catches.pop(key).handle.remove()
        for shared in set(self.per_group) - {site.groupwise for site in sites}:
            self.per_group.pop(shared).remove()
        with self._lock:
            self._prefixes = any(site.kind == "kv" for site in sites)
            if not self._prefixes and not self._packed:
                self._restore_attention()

    # -- attention -----------------------------------------------------------------------------------------------

    def _switch_attention(self) -> None:
        if self.attention:
            return
        configs = self._configs
        names = {id(c): attention.register(c._attn_implementation) for c in configs}
        for config in configs:
            self.attention.append((config, config._attn_implementation))
            config._attn_implementation_internal = names[id(config)]
        for module, site in self.anatomy.kv_modules:
            attention.attach(module, self.runtime, site.name)

    def _restore_attention(self) -> None:
        for config, original in self.attention:
            config._attn_implementation_internal = original
        for module, _ in self.anatomy.kv_modules:
            attention.detach(module)
        self.attention = []

    @property
    def packs(self) -> bool:
        """Whether rows can be computed without their padding."""
        return self.anatomy.stacks[0].packs and self.original_attention() in attention.SUPPORTED

    @contextmanager
    def packing(self) -> Iterator[bool]:
        """Let the calls of this block be packed, with products as fast as may be; says whether they can be packed.

        Only meanwhile the base computes attention through the attention function: a direct call to the model at
        another time is computed as transformers alone would.
        """
        with self.fast_products():
            if not self.packs:
                yield False
                return
            with self._lock:
                self._packed += 1
                self._switch_attention()
            try:
                yield True
            finally:
                with self._lock:
                    self._packed -= 1
                    if not self._packed and not self._prefixes:
                        self._restore_attention()

    def fast_products(self) -> AbstractContextManager[None]:
        """Let the calls of this block take the faster products; not where layers are computed again after it."""
        again = any(anchor.checkpointed() for anchor in self.anchors)
        return nullcontext() if again else self._products.used()

    def original_attention(self) -> str:
        """Return the base's own attention implementation."""
        current = str(self.model.config._attn_implementation)  # type: ignore[union-attr]
        return current.removeprefix(attention.PREFIX)

    @contextmanager
    def attention_as(self, name: str) -> Iterator[None]:
        """Compute attention with another implementation ('eager' or 'sdpa') for a while."""
        before = [(config, config._attn_implementation) for config in self._configs]
        try:
            for config, current in before:
                wrapped = str(current).startswith(attention.PREFIX)
                config._attn_implementation_internal = attention.register(name) if wrapped else name
            yield
        finally:
            for config, current in before:
                config._attn_implementation_internal = current

    @cached_property
    def _configs(self) -> list[Any]:
        """Every distinct config in the model that says how attention is computed; packed calls ask each time."""
        found: dict[int, Any] = {}
        for module in self.model.modules():
            config = getattr(module, "config", None)
            if getattr(config, "_attn_implementation", None) is not None:
                found[id(config)] = config
        return list(found.values())

    @contextmanager
    def recording(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Collect keys and values (B, Hkv, T, hd) of every attention module while the block runs the base."""
        fresh = not self.attention
        self._switch_attention()
        self.runtime.recorder = {}
        try:
            yield self.runtime.recorder
        finally:
            self.runtime.recorder = None
            if fresh:
                self._restore_attention()

    # -- gradient checkpointing ----------------------------------------------------------------------------------

    def checkpointing(self, enable: bool) -> None:
        """Recompute layers in the backward pass instead of keeping their activations.

        transformers checkpoints only layers that are in training mode; only the layer objects are put there, so
        dropout inside them stays off, and a rate that the layer's own forward applies is set to 0 meanwhile.

        Raises:
            UnsupportedError: transformers cannot checkpoint the layers of this family.
        """
        unwrap_checkpoints(layer for stack in self.anatomy.stacks for layer in stack.layers)
        for module, name, value in reversed(self._checkpoint_flags):
            if value is _ABSENT:
                delattr(module, name)
            else:
                setattr(module, name, value)
        self._checkpoint_flags = []
        if not enable:
            return
        from torch.utils.checkpoint import checkpoint
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [layer for stack in self.anatomy.stacks for layer in stack.layers]
        if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
            raise UnsupportedError(
                f"transformers cannot checkpoint the layers of {self.anatomy.model_type} "
                f"({type(layers[0]).__name__}): leave gradient checkpointing off, or take smaller batches"
            )

        def function(*args: Any) -> Any:
            return checkpoint(*args, use_reentrant=False)

        for stack in self.anatomy.stacks:
            for layer in stack.layers:
                settings = [(layer, CHECKPOINTED, True), (layer, "training", True), (layer, ATTRIBUTE, function)]
                for rate in stack.layer_dropout:
                    owner = layer.config if rate.startswith("config.") else layer
                    settings.append((owner, rate.removeprefix("config."), 0.0))  # type: ignore[arg-type]
                for owner, name, value in settings:
                    self._checkpoint_flags.append((owner, name, owner.__dict__.get(name, _ABSENT)))
                    setattr(owner, name, value)

    @property
    def checkpointed(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return bool(self._checkpoint_flags)

    @contextmanager
    def without_checkpointing(self) -> Iterator[None]:
        """Switch checkpointing off for a while: transformers gives a checkpointed layer no KV cache."""
        on = self.checkpointed
        if on:
            self.checkpointing(False)
        try:
            yield
        finally:
            if on:
                self.checkpointing(True)

    def close(self) -> None:
        """Restore everything that was changed on the model."""
        self.checkpointing(False)
        self.release(set())
        for anchor in self.anchors:
            anchor.remove()
        for handle in self.top:
            handle.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, mode in self._modes:
            module.training = mode
