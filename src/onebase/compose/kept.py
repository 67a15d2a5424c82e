"""Stored compositions: parts are named by digest, found in the store, and verified like any adapter."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from onebase.adapter import Adapter
from onebase.compose.recipes import KINDS, Composition
from onebase.errors import ConfigError, CorruptError, OnebaseError, StoreError, UnknownNameError, unknown
from onebase.methods.method import Method
from onebase.methods.registry import parse_method

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store import Store, Stored

# base -> digest -> part: several compositions of one language adapter hold it once
_PARTS: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[str, Adapter]] = weakref.WeakKeyDictionary()


def check_kept(composition: Composition, store: Store) -> None:
    """Raise StoreError unless every part is in the store as it is now, so that the composition can be stored."""
    for part in composition.held:
        if isinstance(part.method, Composition):
            check_kept(part.method, store)
            if part.ref or not part.method.trained:
                continue
        fix = f"store it first: base.save({part.name!r})"
        if not part.digest:
            raise StoreError(f"{composition.shorthand()}: its part {part.name!r} is not stored; {fix}")
        there = find(store, part.ref, part.digest)
        if there is None:
            raise StoreError(f"{composition.shorthand()}: its part {part.name!r} is not in {store.root}; {fix}")
        stored, now = there.tensors(), part.folded_tensors()
        if stored.keys() != now.keys() or any(not torch.equal(stored[k], t.cpu()) for k, t in now.items()):
            raise StoreError(
                f"{composition.shorthand()}: its part {part.name!r} has changed since it was stored as {part.ref}; "
                + fix
            )


def find(store: Store, ref: str, digest: str) -> Stored | None:
    """Return the stored adapter of a digest: where it was, or wherever it is now."""
    try:
        stored = store.resolve(ref)
        if stored.digest == digest:
            return stored
    except OnebaseError:
        pass  # it was removed, renamed, or damaged there
    return next((stored for stored in store.list() if stored.digest == digest), None)


def read(base: Base, stored: Stored, settings: Mapping[str, Any], store: Store) -> Composition:
    """Return the composition that stored settings describe, with its parts loaded for a base.

    Raises:
        CorruptError: settings that no onebase wrote.
        UnknownNameError: a part is not in the store.
        MismatchError: a part was made for another base.
    """
    left = dict(settings)
    kind, parts = left.pop("kind", None), left.pop("parts", None)
    if kind not in KINDS:
        raise unknown("composition", kind, KINDS)
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise CorruptError(f"{stored.ref}: parts = {parts!r}: expected a list of objects")
    names: list[str | Method] = []
    held: list[Adapter] = []
    for part in parts:
        if set(part) == {"method"}:
            names.append(parse_method(part["method"]))
        elif set(part) == {"composition"} and isinstance(part["composition"], dict):
            from onebase.compose.binding import make

            inner = read(base, stored, part["composition"], store)
            names.append(inner)
            held.append(make(base, inner.shorthand(), inner))
        elif set(part) == {"adapter", "ref", "digest"} and all(isinstance(value, str) for value in part.values()):
            names.append(part["adapter"])
            held.append(_part(base, stored, part, store))
        else:
            raise CorruptError(f"{stored.ref}: part {part!r}: expected an adapter with ref and digest")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in left.items()}
    fields = KINDS[kind].__dataclass_fields__.keys() - {"parts", "held"}
    for key in options:
        if key not in fields:
            raise unknown(f"option of {kind}", key, fields)
    return KINDS[kind](parts=tuple(names), held=tuple(held), **options)


def _part(base: Base, stored: Stored, part: Mapping[str, str], store: Store) -> Adapter:
    from onebase.rebuild import rebuild
    from onebase.storing import check_base

    known = _PARTS.setdefault(base, weakref.WeakValueDictionary())
    if (there := known.get(part["digest"])) is not None:
        return there
    if part["digest"] == stored.digest:
        raise CorruptError(f"{stored.ref} names itself as a part")
    found = find(store, part["ref"], part["digest"])
    if found is None:
        raise UnknownNameError(
            f"{stored.ref} is made of {part['adapter']!r} ({part['ref']}, {part['digest'][:19]}...), which is not in "
            f"{store.root}. Pull or copy that version there, or compose again."
        )
    tensors = found.tensors()
    check_base(base, found, True)
    adapter = rebuild(base, part["adapter"], found, tensors, store)
    adapter.ref, adapter.digest = found.ref, found.digest
    adapter.config = found.config.model_dump(mode="json")
    adapter.train(False)
    known[part["digest"]] = adapter
    return adapter


def rebuilt(base: Base, name: str, stored: Stored, store: Store, own_head: bool) -> Adapter:
    """Build the adapter of a stored composition, whose own tensors are put in afterwards.

    Args:
        base: the base.
        name: of the adapter here.
        stored: the composition.
        store: where its parts are.
        own_head: its head is its own, not a part's.

    Raises:
        ConfigError, CorruptError, UnknownNameError, MismatchError: as `read`.
    """
    from onebase.compose.binding import make

    composition = read(base, stored, stored.config.method.settings, store)
    task = dict(stored.config.task)
    if composition.trained is not None or own_head:
        return make(base, name, composition, task, empty=True)
    adapter = make(base, name, composition)
    if adapter.task != task:
        raise ConfigError(f"{stored.ref}: its task is not that of its part {composition.lead()!r}")
    return adapter
