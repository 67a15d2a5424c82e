"""Compositions on a base: which adapters their names mean, what attaches them, and what keeps them up to date."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.adapter import Adapter
from onebase.build import build_adapter, default_task
from onebase.compose.recipes import Average, Combine, Composition
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.core.contracts import AdapterModule

_LOCK = threading.RLock()  # threads of one program may ask for the same composition at once


@dataclass(eq=False)
class Composed(Adapter):
    """An adapter that is made of others.

    Attributes:
        borrowed: the head is a part's own, and so is not stored again.
        unnamed: a call made it; it goes when a part goes.
        seen: modules of the parts, and copies of their tensors where it was computed from them.
    """

    borrowed: bool = True
    unnamed: bool = False
    seen: list[tuple[nn.Module, dict[str, Tensor]]] = field(default_factory=list, repr=False)

    def _tensors(self, module: AdapterModule) -> dict[str, Tensor]:
        found = super()._tensors(module)
        borrowed = ("head.", "base_head.") if self.borrowed else ()
        return {key: value for key, value in found.items() if not key.startswith(borrowed)} if borrowed else found

    def put(self, tensors: Any) -> None:
        """Copy tensors into what is its own; a borrowed head has none."""
        if self.borrowed:
            self.module.put(dict(tensors))
        else:
            super().put(tensors)

    def count(self, head: bool = True) -> int:
        """Number of trainable values that are its own."""
        return super().count(head and not self.borrowed)


def bind(base: Base, composition: Composition) -> Composition:
    """Return the composition with the attached adapters that its names mean.

    Raises:
        UnknownNameError: a name is attached to nothing.
        ConfigError: a composition within it still has something to train.
    """
    held: list[Adapter] = []
    for part in composition.parts:
        if isinstance(part, str):
            held.append(base.adapters[part])
        elif isinstance(part, Composition):
            if part.trained is not None:
                raise ConfigError(
                    f"{composition.shorthand()}: {part.shorthand()} is trained: train it under a name, and use the name"
                )
            held.append(make(base, part.shorthand(), bind(base, part)))
    return composition.bound_to(held)


def make(
    base: Base, name: str, bound: Composition, task: dict[str, Any] | None = None, seed: int = 0, empty: bool = False
) -> Composed:
    """Build the adapter of a bound composition; it is not attached yet.

    Args:
        base: the base.
        name: of the adapter.
        bound: names resolved.
        task: None takes task and head of the part that leads.
        seed: of what is still to be trained.
        empty: tensors will be put in.
    """
    lead = bound.lead()
    if task is not None or lead is None or (bound.own and lead.head is None):
        built = build_adapter(base, name, bound, task or default_task(base), seed, empty=empty)
        head, own_head, borrowed = built.head, None, False
    else:
        built = build_adapter(base, name, bound, dict(lead.task) | {"kind": _headless(base)}, seed, empty=empty)
        borrowed = bound.trained is None  # what is trained has a head of its own, which starts from the part's
        head, own_head = (lead.head, lead.base_head) if borrowed else (copy.deepcopy(lead.head), lead.base_head)
        task = dict(lead.task)
    composed = Composed(
        name, bound, built.module, dict(task or built.task), head, base_head=own_head, tokenizer=built.tokenizer,
        borrowed=borrowed,
    )  # fmt: skip
    composed.seen = _look(bound)
    composed.train(False)
    return composed


def _headless(base: Base) -> str:
    return str(default_task(base)["kind"])


def _look(bound: Composition) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Return what the adapter depends on: modules of parts, with their values where these were computed with."""
    found = []
    for adapter in bound.held:
        computed = isinstance(bound, Combine) or (isinstance(bound, Average) and bound.of == "values")
        values = {key: t.detach().clone() for key, t in adapter.module.tensors().items()} if computed else {}
        found.append((adapter.module, values))
        if isinstance(adapter.method, Composition):
            found += _look(adapter.method)
            if computed:  # values of parts of parts count as well
                found += [(a.module, {k: t.detach().clone() for k, t in a.module.tensors().items()})
                          for a in adapter.method.adapters()]  # fmt: skip
    return found


def _fresh(base: Base, adapter: Composed) -> bool:
    """Whether an unnamed composition still says what its names mean."""
    if not _same_names(base, adapter.method):  # type: ignore[arg-type]
        return False
    modules = {id(a.module) for a in adapter.method.adapters()}  # type: ignore[attr-defined]
    for module, values in adapter.seen:
        if id(module) not in modules:
            return False
        now = module.tensors() if values else {}  # type: ignore[operator]
        if any(key not in now or not torch.equal(now[key], value) for key, value in values.items()):
            return False
    return True


def _same_names(base: Base, bound: Composition) -> bool:
    held = iter(bound.held)
    for part in bound.parts:
        if isinstance(part, str):
            if base._adapters.get(part) is not next(held):
                return False
        elif isinstance(part, Composition) and not _same_names(base, next(held).method):  # type: ignore[arg-type]
            return False
    return True


def add(base: Base, name: str, composition: Composition, task: dict[str, Any] | None, seed: int) -> Adapter:
    """Attach a composition under a name of its own; see `Base.add`."""
    return base._attach(make(base, name, bind(base, composition), task, seed))


def attached(base: Base, composition: Composition) -> str:
    """Return the name under which a call's composition is attached, which is done if need be.

    Values of parts may have changed since (training): then it is built anew.

    Raises:
        UnknownNameError: a part is not attached.
        ConfigError: it has something to train first.
    """
    if composition.trained is not None:
        raise ConfigError(
            f"{composition.shorthand()} has to be trained: ob.train(base, data, method=...), then use its name"
        )
    name = composition.shorthand()
    with _LOCK:
        there = base._adapters.get(name)
        if there is not None and (not isinstance(there, Composed) or not there.unnamed):
            raise ConfigError(f"adapter name {name!r} is taken: remove it first")
        if isinstance(there, Composed):
            if _fresh(base, there):
                return name
            base.remove(name)
        adapter = make(base, name, bind(base, composition))
        adapter.unnamed = True
        base._attach(adapter)
    return name


def named(base: Base, adapter: Any) -> Any:
    """Return what a call routes by, with a name in the place of every composition."""
    if isinstance(adapter, Composition):
        return attached(base, adapter)
    if isinstance(adapter, str) or not isinstance(adapter, Sequence):
        return adapter
    if not any(isinstance(entry, Composition) for entry in adapter):
        return adapter
    return [attached(base, entry) if isinstance(entry, Composition) else entry for entry in adapter]


def drop_unnamed(base: Base, part: Adapter) -> list[str]:
    """Return the unnamed compositions that a part belongs to."""
    return [
        name for name, adapter in base._adapters.items()
        if isinstance(adapter, Composed) and adapter.unnamed
        and any(own is part for own in adapter.method.adapters())  # type: ignore[attr-defined]
    ]  # fmt: skip
