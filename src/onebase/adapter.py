"""Adapters: a named trained module with its head, label names and provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onebase.core.contracts import AdapterModule, Delta, KVDelta, PromptDelta, TokenDelta
from onebase.core.plan import Routed
from onebase.errors import ConfigError
from onebase.methods.method import Method


@dataclass(eq=False)
class Adapter:
    """One adapter that is attached to a base.

    Attributes:
        name: what calls use; unique on its base.
        method: how it adapts.
        module: shared part and deltas, float32.
        head: task head, or None where the base's LM head serves.
        task: spec of what it is for: kind, labels, pooling, max_length, template and what else its task has.
        ref: name@version in a store, or ''.
        digest: content identity, or '' for one that was not stored.
        config: what the store holds beside the tensors (provenance, metrics, probes).
        base_head: the base's own head on frozen vectors, for scores side by side, or None.
        tokenizer: its own view of the base's tokenizer where it knows words of its own, else None.
    """

    name: str
    method: Method
    module: AdapterModule
    task: dict[str, Any]
    head: nn.Module | None = None
    ref: str = ""
    digest: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    base_head: nn.Module | None = None  # the base's own head: frozen states, for scores side by side
    tokenizer: Any = field(default=None, repr=False)
    routed: Routed = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.routed = Routed(self.name, -1, self.module)
        self.bind()

    def bind(self) -> None:
        """Make the core see the module's deltas (again after folding)."""
        deltas = dict(self.module.items())
        self.routed.module, self.routed.deltas, self.routed.added = self.module, deltas, None
        self.routed.has_kv = any(isinstance(d, KVDelta) for d in deltas.values())
        self.routed.shift = {
            name.split("/")[0]: d.shift for name, d in deltas.items() if isinstance(d, KVDelta) and d.shift
        }
        self.routed.positional = any(isinstance(d, Delta) and d.positional for d in deltas.values())
        prompts = [name for name, d in deltas.items() if isinstance(d, PromptDelta)]
        self.routed.prompts = {name.split("/")[0]: name for name in prompts}
        if len(self.routed.prompts) < len(prompts):
            raise ConfigError(f"virtual tokens at {' and '.join(prompts)}: an adapter has them in one place of a stack")
        self.routed.words = {name.split("/")[0]: name for name, d in deltas.items() if isinstance(d, TokenDelta)}

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names, () where the task has none."""
        return tuple(self.task.get("labels") or ())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trainable parameters: the module's and the head's."""
        yield from self.module.parameters()
        if self.head is not None:
            yield from self.head.parameters()

    def count(self, head: bool = True) -> int:
        """Number of trainable values."""
        own = sum(p.numel() for p in self.module.parameters())
        return own + (sum(p.numel() for p in self.head.parameters()) if head and self.head is not None else 0)

    def train(self, mode: bool = True) -> None:
        """Switch dropout of the deltas."""
        self.module.train(mode)
        if self.head is not None:
            self.head.train(mode)

    def tensors(self) -> dict[str, Tensor]:
        """Return every saved tensor, detached: ``deltas...``, ``shared...``, ``head...``, ``base_head...``."""
        return self._tensors(self.module)

    def folded_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store: without what only training needs. The attached module stays as it is."""
        return self._tensors(self.module.fold())

    def _tensors(self, module: AdapterModule) -> dict[str, Tensor]:
        found = {name: t.detach() for name, t in module.tensors().items()}
        if self.head is not None:
            found |= {f"head.{name}": t.detach() for name, t in self.head.state_dict().items()}
        if self.base_head is not None:
            found |= {f"base_head.{name}": t.detach() for name, t in self.base_head.state_dict().items()}
        return found

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors named as `tensors()` names them into module and head."""
        self.module.put({n: t for n, t in tensors.items() if not n.startswith(("head.", "base_head."))})
        for prefix, head in (("head.", self.head), ("base_head.", self.base_head)):
            if head is not None:
                head.load_state_dict({n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)})

    def fold(self) -> None:
        """Drop what only training needs; the outputs stay the same."""
        self.module = self.module.fold()
        self.bind()

    def snapshot(self) -> dict[str, Tensor]:
        """Return a copy of every tensor, to restore the best epoch."""
        return {name: t.clone() for name, t in self.tensors().items()}


def problems(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """List everything that keeps `given` from fitting `own`: missing, unexpected, shapes, kinds, not finite."""
    found = [f"missing tensor {name} {tuple(own[name].shape)}" for name in own if name not in given]
    found += [f"unexpected tensor {name} {tuple(given[name].shape)}" for name in given if name not in own]
    for name in own.keys() & given.keys():
        if own[name].shape != given[name].shape:
            found.append(f"{name}: shape {tuple(given[name].shape)}, expected {tuple(own[name].shape)}")
        elif given[name].is_floating_point() != own[name].is_floating_point():
            found.append(f"{name}: values are {given[name].dtype}, expected {own[name].dtype}")
        elif given[name].is_floating_point() and not bool(torch.isfinite(given[name]).all()):
            found.append(f"{name}: {int((~torch.isfinite(given[name])).sum())} values are NaN or infinite")
    return sorted(found)
