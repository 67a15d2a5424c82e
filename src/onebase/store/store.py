"""The versioned folder of adapters: save, resolve, list and remove, each whole or not at all."""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.errors import ConfigError, CorruptError, StoreError, UnknownNameError, unknown
from onebase.store import disk
from onebase.store.aliases import ALIAS, Histories, check_alias, locked, read_aliases, write_aliases
from onebase.store.card import render_card
from onebase.store.difference import Difference, compare
from onebase.store.garbage import LEFT_SECONDS, Garbage, leftovers, unnamed
from onebase.store.names import NAME, VERSION, check_name, check_new_name, is_path, split_ref
from onebase.store.parts import Needs
from onebase.store.schema import (
    CARD_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    TENSORS_FILE,
    AdapterConfig,
    json_problems,
    library_version,
    parse_config,
    seal,
)
from onebase.store.stored import Stored, Version
from onebase.store.tensors import encode
from onebase.store.verify import CONFIG_BYTES

if TYPE_CHECKING:
    import torch

FILLED = ("name", "version", "created", "tensors", "files", "digest")
Card = str | Callable[[AdapterConfig], str]


def default_root() -> Path:
    """Return ``$ONEBASE_HOME``, else ``$XDG_DATA_HOME/onebase``, else ``~/.local/share/onebase``."""
    if home := os.environ.get("ONEBASE_HOME"):
        return cache_of(home) if "://" in home else Path(home).expanduser()
    return _own_root()


def _own_root() -> Path:
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data).expanduser() if data else Path.home() / ".local" / "share") / "onebase"


def cache_of(url: str) -> Path:
    """Return the local folder of a remote store: what was fetched, unfinished work, checkpoints."""
    return _own_root() / "remote" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


class Store:
    """Adapters in ``<root>/adapters/<name>/<version>/``.

    A version is prepared in ``<root>/.tmp/`` and appears by one rename; it leaves the same way.
    Its number comes from a file in ``<name>/.claimed/``, which stays when the version goes:
    the highest of them is the high-water mark. A save that is cut off may so leave a gap.

    Args:
        root: the store's folder; created by the first save. None takes `default_root`. A URL such as
            ``s3://bucket/adapters`` gives a `RemoteStore`, as it does in ``$ONEBASE_HOME``.
    """

    def __new__(cls, root: Path | str | None = None) -> Store:
        """Choose the kind of store that `root` names, as `pathlib.Path` does."""
        place = os.environ.get("ONEBASE_HOME", "") if root is None else root
        if cls is Store and isinstance(place, str) and "://" in place:
            from onebase.store.remote import RemoteStore

            return object.__new__(RemoteStore)
        return super().__new__(cls)

    def __init__(self, root: Path | str | None = None) -> None:
        self.root = Path(root).expanduser().absolute() if root is not None else default_root().absolute()

    @property
    def _adapters(self) -> Path:
        return self.root / "adapters"

    @property
    def _work(self) -> Path:
        return self.root / ".tmp"

    def save(
        self,
        name: str,
        *,
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        card: Card = render_card,
    ) -> Stored:
        """Store a new version of the adapter `name`.

        Args:
            name: see `check_new_name`.
            config: the fields of `AdapterConfig` except name, version, created, tensors, files and
                digest, which the store fills; format_version, library and library_version may be left out.
            tensors: by name; finite.
            card: the text of README.md, or a function that makes it from the config. The function sees
                the final name and version, but no ``files`` and a provisional ``digest``.

        Returns:
            The version stored.

        Raises:
            ConfigError: the name, a field or a tensor cannot be used.
            StoreError: the tensors are not finite, or the disk refuses.
        """
        self.check(name)
        data, shapes = encode(tensors)
        body = _body(name, config, shapes)
        try:
            disk.sweep(self._work)
            work = disk.new_work(self._work, "save")
            work.mkdir()
            try:
                digest = disk.write_file(work / TENSORS_FILE, data)
                return self._publish(work, name, body, {TENSORS_FILE: digest}, card)
            finally:
                disk.discard(work)
        except OSError as error:
            raise StoreError(
                f"cannot save {name!r} in {self.root}: {error}. No version was added. "
                f"Make room there, or set ONEBASE_HOME to another folder."
            ) from error

    def check(self, name: str) -> None:
        """Raise ConfigError unless an adapter can be saved under `name`; cheap, so it can be asked before training."""
        check_new_name(name)
        self._refuse_other_case(name)

    def resolve(self, ref: str | os.PathLike[str]) -> Stored:
        """Find one version by reference or by path.

        Args:
            ref: ``"reviews"`` for the newest version, ``"reviews@3"``, ``"reviews@prod"`` for what an alias
                names, or the path of an adapter's folder: a path object, an absolute path, or text
                with a separator (``"./reviews"``).

        Returns:
            The version. Its config is checked; its files are when `Stored.tensors` loads them.

        Raises:
            UnknownNameError: there is no such adapter, version or folder.
            ConfigError: the reference is malformed.
            CorruptError: the config is damaged. An older version is never given in its place.
            StoreError: a newer onebase wrote it.
        """
        if is_path(ref):
            path = Path(ref).expanduser().absolute()
            if not path.is_dir():
                raise UnknownNameError(f"there is no adapter folder {path}. Check the path, or run: onebase ls")
            return Stored.open(path)
        return self._open(self._find(str(ref))[-1])

    def list(self) -> builtins.list[Stored]:
        """Return every version in the store, by name and then version number.

        A version whose config cannot be read is left out with a warning that says why.
        """
        found = []
        for place in self._places():
            try:
                found.append(self._open(place))
            except StoreError as problem:
                if self._there(place):  # else another process removed it meanwhile
                    fix = f"onebase rm {place.ref}"
                    warnings.warn(f"{place.ref} is left out: {problem} To remove it: {fix}", stacklevel=2)
        return found

    def remove(self, ref: str, *, force: bool = False) -> builtins.list[Version]:
        """Remove one version (``"reviews@2"``) or all of them (``"reviews"``), damaged ones too.

        Args:
            ref: a reference; never a path, as folders outside the store are not its own.
            force: also versions that an alias names, which goes with them, and parts of stored compositions, which
                cannot be loaded any more then.

        Returns:
            The places removed, oldest first. Their numbers are not given again.

        Raises:
            UnknownNameError: there is no such adapter or version.
            ConfigError: the reference is malformed or a path.
            StoreError: an alias names one of them or a composition is made of it, and none is removed; or the disk
                refuses, and versions before the one named are removed.
        """
        if is_path(ref):
            raise ConfigError(f"{ref!r} is a path; remove takes 'name' or 'name@version'. Delete a folder yourself.")
        name = self._find(ref)[0].name  # before the lock: an unknown name makes no files
        with self._locked(name):
            places = self._find(ref)
            going = {place.version for place in places}
            histories = self._histories(name)
            held = {alias: h[-1] for alias, h in histories.items() if h[-1] in going}
            if held and not force:
                shown = ", ".join(f"{name}@{version} is {alias!r}" for alias, version in held.items())
                raise StoreError(f"{ref} is not removed: {shown}. Promote another version first, or pass --force.")
            if not force and (needed := self._needs().of(places)):
                shown = ", ".join(f"{p.ref} is a part of {', '.join(u.ref for u in us)}" for p, us in needed.items())
                raise StoreError(
                    f"{ref} is not removed: {shown}, which cannot be loaded without it. Remove the composition first, "
                    "or pass --force."
                )
            if held:
                self._put_histories(name, {a: h for a, h in histories.items() if a not in held})
            return [place for place in places if self._remove(place)]

    def aliases(self, name: str) -> dict[str, int]:
        """Return alias -> version it names, of the adapter `name`."""
        return {alias: history[-1] for alias, history in self._histories(check_name(name)).items()}

    def promote(self, ref: str, alias: str) -> Version:
        """Make an alias name a version, after verifying it.

        Args:
            ref: a reference in this store.
            alias: letters, digits, '_' and '-', beginning with a letter.

        Returns:
            The version named now.

        Raises:
            UnknownNameError: there is no such version.
            ConfigError: the alias cannot be one, or the reference is a path.
            CorruptError: the version is damaged; the alias stays as it was.
        """
        check_alias(alias)
        if is_path(ref):
            raise ConfigError(f"{ref!r} is a path; an alias names a version of this store: 'name@version'.")
        name = self._find(ref)[0].name
        with self._locked(name):
            place = self._find(ref)[-1]
            self._open(place).verify()
            histories = self._histories(name)
            history = histories.get(alias, [])
            if history[-1:] != [place.version]:
                self._put_histories(name, {**histories, alias: [*history, place.version]})
        return place

    def rollback(self, name: str, alias: str) -> Version:
        """Make an alias name what it named before; versions removed meanwhile are passed over.

        Args:
            name: of the adapter.
            alias: such as ``prod``.

        Returns:
            The version named now.

        Raises:
            UnknownNameError: there is no such adapter or alias.
            StoreError: the alias named nothing before that is still there.
        """
        self._find(name)
        with self._locked(name):
            histories = self._histories(name)
            if alias not in histories:
                raise unknown(f"alias of {name!r}", alias, histories)
            places = {place.version: place for place in self._places(name)}
            now, *before = reversed(histories[alias])
            left = [v for v in reversed(before) if v in places]
            while left and left[-1] == now:
                left.pop()
            if not left:
                raise StoreError(f"{name}@{alias} named nothing before {name}@{now} that is still there.")
            self._open(places[left[-1]]).verify()
            self._put_histories(name, {**histories, alias: left})
            return places[left[-1]]

    def diff(self, a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Difference:
        """Compare two stored adapters.

        Args:
            a, b: references or folders, as for `resolve`.

        Returns:
            What differs in settings and metrics, and the distance of each tensor.

        Raises:
            UnknownNameError, ConfigError, CorruptError, StoreError: as `resolve` and `Stored.tensors`.
        """
        return compare(self.resolve(a), self.resolve(b))

    def gc(self, *, keep: int | None = None, older_than: float = LEFT_SECONDS, apply: bool = False) -> Garbage:
        """Find what can go, and remove it when told to.

        Args:
            keep: also versions that no alias names, except the newest `keep` of each adapter; None: no versions.
            older_than: age of leftovers in seconds; one that is younger may belong to a running save.
            apply: remove. A version that was promoted meanwhile stays.

        Returns:
            What can go, or what went.

        Raises:
            ConfigError: `keep` is below 1.
            StoreError: the disk refuses, or aliases cannot be read.
        """
        if keep is not None and keep < 1:
            raise ConfigError(f"keep = {keep}: expected at least 1, as gc never removes the newest version")
        old = leftovers(self._work, self._adapters, older_than)
        versions = () if keep is None else unnamed(self._places(), keep)
        versions, kept = self._without_needed(versions)
        if not apply:
            return Garbage(leftovers=old, versions=versions, kept=kept)
        for path in old:
            disk.drop(path)
        gone: builtins.list[Version] = []
        for place in versions:
            with self._locked(place.name):
                if place.version not in self.aliases(place.name).values() and self._remove(place):
                    gone.append(place)
        return Garbage(leftovers=old, versions=tuple(gone), kept=kept)

    def _without_needed(
        self, going: tuple[Version, ...]
    ) -> tuple[tuple[Version, ...], dict[Version, tuple[Version, ...]]]:
        """Return what can go although compositions that stay need their parts, and what they keep."""
        kept: dict[Version, tuple[Version, ...]] = {}
        needs = self._needs() if going else None
        while needs is not None and (more := needs.of(going)):  # a composition that stays may itself be a part
            kept |= more
            going = tuple(place for place in going if place not in more)
        return going, kept

    def _needs(self) -> Needs:
        return Needs(self._places(), self._read_config)

    def _read_config(self, place: Version) -> bytes:
        return disk.read_regular(place.path / CONFIG_FILE, CONFIG_BYTES)

    def _there(self, place: Version) -> bool:
        return place.path.exists()

    def _locked(self, name: str) -> contextlib.AbstractContextManager[None]:
        return locked(self.root, name)

    def _histories(self, name: str) -> Histories:
        return read_aliases(self._adapters / name)

    def _put_histories(self, name: str, histories: Mapping[str, builtins.list[int]]) -> None:
        write_aliases(self._adapters / name, histories)

    def _publish(self, work: Path, name: str, body: dict[str, Any], files: dict[str, str], card: Card) -> Stored:
        home = self._adapters / name
        while True:
            taken = [place.version for place in self._places(name)]
            version = disk.claim_number(home / ".claimed", above=max(taken, default=0))
            sealed = self._finish(work, name, version, body, files, card)
            # a number can be taken without a claim by a folder that someone copied in: try the next one
            if disk.move_folder(work, home / str(version)):
                config = parse_config(sealed, name)
                return Stored(name, version, home / str(version), config.digest, config)

    @staticmethod
    def _finish(
        work: Path, name: str, version: int, body: dict[str, Any], files: dict[str, str], card: Card
    ) -> dict[str, Any]:
        """Write card and config of a version that has its number; return the config."""
        final = {**body, "version": version, "created": datetime.now(UTC).isoformat(timespec="seconds")}
        text = card(parse_config(seal(final), name, ConfigError)) if callable(card) else card
        for stale in (CARD_FILE, CONFIG_FILE):
            (work / stale).unlink(missing_ok=True)
        digest = disk.write_file(work / CARD_FILE, text.encode())
        sealed = seal({**final, "files": {**files, CARD_FILE: digest}})
        disk.write_file(work / CONFIG_FILE, (json.dumps(sealed, indent=2, ensure_ascii=False) + "\n").encode())
        disk.sync_folder(work)
        return sealed

    def _remove(self, place: Version) -> bool:
        try:
            # a folder copied in has no claim yet, without which its number would be given again
            claimed = place.path.parent / ".claimed"
            disk.make_folder(claimed)
            (claimed / str(place.version)).touch()
            disk.sync_folder(claimed)
            work = disk.new_work(self._work, "removed")
            os.rename(place.path, work)
            disk.sync_folder(place.path.parent)
        except FileNotFoundError:
            if place.path.exists():
                raise
            return False  # another process removed it first
        except OSError as error:
            raise StoreError(f"cannot remove {place.ref} ({error}). Close what uses {place.path}.") from error
        disk.discard(work)
        return True

    def _find(self, ref: str) -> builtins.list[Version]:
        name, version = split_ref(ref)
        places = self._places(name)
        if not places:
            raise unknown("adapter", name, {place.name for place in self._places()})
        if version is None:
            return places
        named = self.aliases(name) if ALIAS.fullmatch(version) else {}
        chosen = [place for place in places if str(place.version) == str(named.get(version, version))]
        if not chosen:
            known = ", ".join([*(str(place.version) for place in places), *named])
            kind = "alias" if ALIAS.fullmatch(version) else "version"
            raise UnknownNameError(f"adapter {name!r} has no {kind} {version!r}. It has: {known}.")
        return chosen

    def _names(self) -> builtins.list[str]:
        return _entries(self._adapters)

    def _places(self, name: str | None = None) -> builtins.list[Version]:
        names = self._names() if name is None else [name]
        places = [
            Version(n, int(v), self._adapters / n / v)
            for n in names
            if NAME.fullmatch(n)
            for v in _entries(self._adapters / n)
            if VERSION.fullmatch(v)
        ]
        return sorted(places, key=lambda place: (place.name, place.version))

    def _open(self, place: Version) -> Stored:
        stored = Stored.open(place.path)
        if stored.ref != place.ref:
            raise CorruptError(f"{place.path} holds {stored.ref}, not {place.ref}: the folder was copied or renamed.")
        return stored

    def _refuse_other_case(self, name: str) -> None:
        for other in self._names():
            if other != name and other.lower() == name.lower():
                raise ConfigError(
                    f"adapter name {name!r} differs from {other!r} only in case, "
                    f"which many disks cannot tell apart; use {other!r}."
                )


def _entries(folder: Path) -> builtins.list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _body(name: str, config: Mapping[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    filled = [key for key in FILLED if key in config]
    if filled:
        raise ConfigError(f"config of {name!r} has {filled}, which the store fills itself; leave them out.")
    if problems := [*json_problems(config, "")]:
        raise ConfigError(f"config of {name!r} cannot be stored as JSON:" + "".join(f"\n  - {p}" for p in problems))
    head = {"format_version": FORMAT_VERSION, "library": "onebase", "library_version": library_version()}
    # through JSON, so that tuples are lists here already and the digest is that of the file read back
    body = json.loads(json.dumps({**head, **config, "name": name, "tensors": shapes, "files": {}}))
    parse_config(
        seal({**body, "version": 1, "created": "2000-01-01T00:00:00+00:00"}),
        f"config of {name!r}",
        ConfigError,
    )
    return body
