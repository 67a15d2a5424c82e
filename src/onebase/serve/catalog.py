"""Which stored version a model name means now. Aliases that are promoted or rolled back elsewhere are seen at once."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onebase.errors import ConfigError, OnebaseError, UnknownNameError, nearest, unknown
from onebase.store import Store
from onebase.store.names import NAME, PLAIN, VERSION, is_path

if TYPE_CHECKING:
    from onebase.store import Stored

SETTLED_NS = 2 * 10**9  # a folder that changed this recently may change again within one tick of the disk's clock


@dataclass(frozen=True)
class Shelf:
    """The versions of one adapter as they were read.

    Attributes:
        versions: number -> version, for those that can be read.
        broken: number -> why it cannot be read.
        aliases: alias -> number.
    """

    versions: Mapping[int, Stored]
    broken: Mapping[int, str]
    aliases: Mapping[str, int]

    @property
    def newest(self) -> int:
        """The highest version, whether it can be read or not: an older one is never given in its place."""
        return max([*self.versions, *self.broken])


class Catalog:
    """The adapters of some stores.

    Args:
        stores: the first one that has a name answers for it.
        base_ids: what the base may be called beside 'base'.
    """

    def __init__(self, stores: Iterable[Store], base_ids: Iterable[str] = ()):
        self.stores = tuple(stores)
        self.base_ids = (PLAIN, *(name for name in base_ids if name and name != PLAIN))
        self.withdrawn: set[str] = set()  # names and refs that are not served
        self.extra: dict[str, str] = {}  # further name -> ref
        self._shelves: dict[tuple[Path, str], tuple[int, Shelf]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Return the names that are served, sorted, without the base."""
        found = {name for store in self.stores for name in _folders(store.root / "adapters")} | set(self.extra)
        return sorted(name for name in found if name not in self.withdrawn)

    def shelf(self, name: str) -> tuple[Store, Shelf]:
        """Return the versions of one adapter and the store they are in.

        Raises:
            UnknownNameError: no store has it.
        """
        for store in self.stores if NAME.fullmatch(name) else ():
            folder = store.root / "adapters" / name
            try:
                changed = folder.stat().st_mtime_ns
            except (OSError, ValueError):
                continue
            key = (store.root, name)
            with self._lock:
                known = self._shelves.get(key)
            if known is None or known[0] != changed:
                shelf = self._read(store, name)
                if not shelf.versions and not shelf.broken:
                    continue
                settled = time.time_ns() - changed > SETTLED_NS
                with self._lock:
                    self._shelves[key] = (changed if settled else -1, shelf)
                return store, shelf
            return store, known[1]
        raise unknown("adapter", name, self.names())

    @staticmethod
    def _read(store: Store, name: str) -> Shelf:
        versions, broken = {}, {}
        for entry in _folders(store.root / "adapters" / name):
            if VERSION.fullmatch(entry):
                try:
                    versions[int(entry)] = store.resolve(f"{name}@{entry}")
                except UnknownNameError:
                    continue  # removed meanwhile
                except OnebaseError as error:
                    broken[int(entry)] = str(error)
        try:
            aliases = store.aliases(name)
        except OnebaseError:
            aliases = {}
        return Shelf(versions, broken, aliases)

    def resolve(self, model: str, allowed: object = None) -> Stored | None:
        """Return the version that a model name means now, None for the plain base.

        Args:
            model: 'base', 'name', 'name@version', 'name@alias', each also behind 'base:'.
            allowed: has `allows(name)`, of the key that asks; None allows all.

        Raises:
            UnknownNameError: there is no such model, or the key may not use it.
            OnebaseError: the version cannot be read.
        """
        if model in self.base_ids:
            if _may(allowed, PLAIN):
                return None
            raise self._unknown(model, allowed)
        ref = model
        for own in self.base_ids:
            if model.startswith(own + ":"):
                ref = model[len(own) + 1 :]
        name, at, version = ref.partition("@")
        name, _, pinned = self.extra.get(name, name).partition("@") if not at else (name, "", "")
        version = version or pinned
        visible = ref.partition("@")[0]
        if is_path(ref) or not name or (at and not version) or not _may(allowed, visible) or visible in self.withdrawn:
            raise self._unknown(model, allowed)
        try:
            store, shelf = self.shelf(name)
        except (UnknownNameError, ConfigError):
            raise self._unknown(model, allowed) from None
        number = shelf.newest if not version else shelf.aliases.get(version)
        if number is None and VERSION.fullmatch(version) and int(version) in {*shelf.versions, *shelf.broken}:
            number = int(version)
        gone = {v for v in (*shelf.versions, *shelf.broken) if f"{name}@{v}" in self.withdrawn}
        if number is None or number in gone:
            known = [str(v) for v in shelf.versions if v not in gone]
            known += [alias for alias, v in shelf.aliases.items() if v not in gone]
            if number is not None:
                others = f"Others: {', '.join(known)}." if known else "It has no other."
                raise UnknownNameError(
                    f"adapter {name!r}: version {number} was withdrawn; an admin serves it again with "
                    f'POST /v1/adapters {{"ref": "{name}@{number}"}}. {others}'
                )
            raise UnknownNameError(f"adapter {name!r} has no version or alias {version!r}. {nearest(version, known)}")
        if number in shelf.broken:
            return store.resolve(f"{name}@{number}")  # raises what is wrong, or it was repaired
        return shelf.versions[number]

    def _unknown(self, model: str, allowed: object) -> UnknownNameError:
        return unknown("model", model, self.visible(allowed))

    def of(self, name: str, allowed: object = None) -> tuple[Store, Shelf]:
        """Return the versions of an adapter that a key may use, and the store they are in.

        Raises:
            UnknownNameError: there is none of this name, or the key may not use it: nobody can tell which.
        """
        try:
            if _may(allowed, name):
                return self.shelf(name)
        except UnknownNameError:
            pass
        raise self._unknown(name, allowed)

    def visible(self, allowed: object = None) -> list[str]:
        """Return the names that a key may use, the base first."""
        return [name for name in (PLAIN, *self.names()) if _may(allowed, name)]

    def forget(self, name: str) -> None:
        """Read an adapter's versions again at the next request."""
        with self._lock:
            for key in [key for key in self._shelves if key[1] == name]:
                del self._shelves[key]


def _may(allowed: object, name: str) -> bool:
    return allowed is None or allowed.allows(name)  # type: ignore[attr-defined]


def _folders(path: Path) -> list[str]:
    with warnings.catch_warnings():
        try:
            return sorted(e.name for e in path.iterdir() if e.is_dir() and not e.name.startswith("."))
        except OSError:
            return []
