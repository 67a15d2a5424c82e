"""Stores at a URL (s3://, gs://, memory://, file:// ...): blobs named by their content, and small files that name them.

    blobs/<sha256>                       every file of every version, once
    adapters/<name>/<version>.json       digest and files of a version; its creation is what publishes it
    adapters/<name>/removed/<version>    a number that is not given again
    adapters/<name>/aliases/<n>.json     aliases after their n-th change; the highest n counts

Where the file system creates a file only if there is none (`conditional`), any number of writers on any machines
may save and promote: one wins a number, the others take the next. Elsewhere there must be one writer at a time; readers
may always be many. Versions are fetched into a local folder once, and verified like any other.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from onebase.errors import ConfigError, CorruptError, StoreError
from onebase.store import disk
from onebase.store.aliases import ALIAS, KEPT, Histories
from onebase.store.garbage import LEFT_SECONDS, Garbage
from onebase.store.names import NAME, VERSION
from onebase.store.schema import CONFIG_FILE, LISTED_FILE, parse_config, read_json
from onebase.store.store import Card, Store, cache_of
from onebase.store.stored import Stored, Version

# Protocols whose file systems create a file only if there is none: s3fs with If-None-Match, gcsfs with a generation of
# 0, local disks with an exclusive link, memory within its process.
CONDITIONAL = ("s3", "s3a", "gs", "gcs", "file", "local", "memory")
LOCAL = ("file", "local")
HEX = re.compile(r"[0-9a-f]{64}")


class RemoteStore(Store):
    """A store at a URL; see the module for its layout.

    Args:
        root: the URL; credentials are those that its file system finds by itself.

    Attributes:
        url: where it is.
        root: the local folder of what was fetched.
        conditional: whether several writers may write at once.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        self.url = str(os.environ["ONEBASE_HOME"] if root is None else root).rstrip("/")
        protocol = self.url.partition("://")[0]
        try:
            import fsspec

            self.fs, self.base = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"a store at {self.url} needs the file system of {protocol}://: {error}. pip install 'onebase[remote]' "
                "has those of s3:// and gs://"
            ) from error
        self.protocol, self.conditional = protocol, protocol in CONDITIONAL
        self.fs.use_listings_cache = False  # what others wrote meanwhile counts
        self._seen: dict[str, int] = {}  # name -> number of the aliases file that was read last
        super().__init__(cache_of(self.url))

    @property
    def writers(self) -> str:
        """Who may write, for people."""
        if self.conditional:
            return f"{self.protocol}:// creates files only if there are none: several writers may write at once"
        return f"{self.protocol}:// is not known to create files only if there are none: one writer at a time"

    # -- files ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reaching(self, doing: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except FileExistsError:
            raise
        except Exception as error:  # file systems raise errors of their own libraries
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise StoreError(f"cannot {doing} in {self.url}: {first}") from error

    def _at(self, *parts: str) -> str:
        return "/".join([self.base.rstrip("/"), *parts])

    def _entries(self, *parts: str) -> builtins.list[str]:
        self.fs.invalidate_cache()
        with self._reaching("list what is"):
            try:
                found = self.fs.ls(self._at(*parts), detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found})

    def _read(self, *parts: str) -> bytes:
        return self.fs.cat_file(self._at(*parts))

    def _create(self, data: bytes, *parts: str) -> None:
        """Create a file, whole or not at all.

        Raises:
            FileExistsError: there is one.
        """
        path = self._at(*parts)
        with self._reaching("write"):
            if self.protocol in LOCAL:
                folder = Path(path).parent
                disk.make_folder(folder)
                work = folder / f".{uuid.uuid4().hex}.tmp"
                try:
                    disk.write_file(work, data)
                    os.link(work, path)
                    disk.sync_folder(folder)
                finally:
                    work.unlink(missing_ok=True)
                return
            if not self.conditional:
                self.fs.invalidate_cache()
                if self.fs.exists(path):
                    raise FileExistsError(path)
                self.fs.pipe_file(path, data)
                return
            if self.protocol == "memory":
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, data, mode="create")

    def _put_blob(self, data: bytes) -> str:
        digest = sha256(data).hexdigest()
        with contextlib.suppress(FileExistsError):  # the same content is there already
            self._create(data, "blobs", digest)
        return digest

    # -- versions ---------------------------------------------------------------------------------------------------

    def _names(self) -> builtins.list[str]:
        return [name for name in self._entries("adapters") if NAME.fullmatch(name)]

    def _places(self, name: str | None = None) -> builtins.list[Version]:
        names = self._names() if name is None else [name]
        found = [
            Version(n, int(file.removesuffix(".json")), self._adapters / n / file.removesuffix(".json"))
            for n in names
            for file in self._entries("adapters", n)
            if file.endswith(".json") and VERSION.fullmatch(file.removesuffix(".json"))
        ]
        return sorted(found, key=lambda place: (place.name, place.version))

    def _there(self, place: Version) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self._at("adapters", place.name, f"{place.version}.json")))

    def _publish(self, work: Path, name: str, body: dict[str, Any], files: dict[str, str], card: Card) -> Stored:
        for file, digest in files.items():
            assert self._put_blob((work / file).read_bytes()) == digest
        while True:
            gone = [int(n) for n in self._entries("adapters", name, "removed") if VERSION.fullmatch(n)]
            version = max([place.version for place in self._places(name)] + gone, default=0) + 1
            sealed = self._finish(work, name, version, body, files, card)
            named = {file.name: self._put_blob(file.read_bytes()) for file in sorted(work.iterdir())}
            pointer = json.dumps({"digest": sealed["digest"], "files": named}, indent=2).encode()
            try:
                self._create(pointer, "adapters", name, f"{version}.json")
            except FileExistsError:
                if not self.conditional:
                    raise StoreError(
                        f"somebody else saved {name}@{version} in {self.url} meanwhile: {self.writers}"
                    ) from None
                continue  # another writer took the number
            place = self._adapters / name / str(version)
            disk.make_folder(place.parent)
            if place.exists():  # of another store that was at this URL before
                disk.discard(place)
            disk.move_folder(work, place)
            config = parse_config(sealed, name)
            return Stored(name, version, place, config.digest, config)

    def _open(self, place: Version) -> Stored:
        pointer = self._pointer(place)
        if place.path.is_dir():
            with contextlib.suppress(StoreError):
                stored = super()._open(place)
                if stored.digest == pointer["digest"]:
                    return stored
            disk.discard(place.path)
        work = disk.new_work(self._work, "fetch")
        work.mkdir()
        try:
            for file, digest in pointer["files"].items():
                with self._reaching(f"fetch {file} of {place.ref}"):
                    data = self._read("blobs", digest)
                if sha256(data).hexdigest() != digest:
                    raise CorruptError(f"{place.ref} in {self.url}: blob {digest} of {file} holds something else")
                disk.write_file(work / file, data)
            disk.make_folder(place.path.parent)
            disk.move_folder(work, place.path)  # False where another process fetched it first: the same bytes
        finally:
            disk.discard(work)
        stored = super()._open(place)
        if stored.digest != pointer["digest"]:
            raise CorruptError(f"{place.ref} in {self.url} names {pointer['digest']}, its config says {stored.digest}")
        return stored

    def _pointer(self, place: Version) -> dict[str, Any]:
        where = f"{self.url}/adapters/{place.name}/{place.version}.json"
        with self._reaching(f"read {place.ref}"):
            data = self._read("adapters", place.name, f"{place.version}.json")
        try:
            raw = read_json(data)
        except ValueError as error:
            raise CorruptError(f"{where} is not valid JSON: {error}") from None
        files = raw.get("files") if isinstance(raw, dict) else None
        whole = (
            isinstance(files, dict)
            and CONFIG_FILE in files
            and isinstance(raw.get("digest"), str)
            and all(LISTED_FILE.fullmatch(f) and isinstance(d, str) and HEX.fullmatch(d) for f, d in files.items())
        )
        if not whole:
            raise CorruptError(f"{where} does not name the files of a version")
        return raw

    def _read_config(self, place: Version) -> bytes:
        try:
            return self._read("blobs", self._pointer(place)["files"][CONFIG_FILE])
        except StoreError as error:
            raise ValueError(str(error)) from error

    def _remove(self, place: Version) -> bool:
        with contextlib.suppress(FileExistsError):
            self._create(b"", "adapters", place.name, "removed", str(place.version))
        with self._reaching(f"remove {place.ref}"):
            try:
                self.fs.rm_file(self._at("adapters", place.name, f"{place.version}.json"))
            except FileNotFoundError:
                return False  # another process removed it first
        disk.discard(place.path)
        return True

    # -- aliases ----------------------------------------------------------------------------------------------------

    def _changes(self, name: str) -> builtins.list[int]:
        files = self._entries("adapters", name, "aliases")
        return sorted(int(f[:-5]) for f in files if f.endswith(".json") and VERSION.fullmatch(f[:-5]))

    def _histories(self, name: str) -> Histories:
        changes = self._changes(name)
        self._seen[name] = changes[-1] if changes else 0
        if not changes:
            return {}
        where = f"{self.url}/adapters/{name}/aliases/{changes[-1]}.json"
        with self._reaching(f"read aliases of {name!r}"):
            data = self._read("adapters", name, "aliases", f"{changes[-1]}.json")
        try:
            raw = read_json(data)
        except ValueError as error:
            raise CorruptError(f"{where} is not valid JSON: {error}. Remove it.") from None
        if not isinstance(raw, dict) or not all(
            ALIAS.fullmatch(a) and isinstance(h, list) and h and all(type(v) is int and v > 0 for v in h)
            for a, h in raw.items()
        ):
            raise CorruptError(f"{where} does not list versions by alias. Remove it.")
        return raw

    def _put_histories(self, name: str, histories: Mapping[str, builtins.list[int]]) -> None:
        number = self._seen.get(name, 0) + 1
        data = json.dumps({a: h[-KEPT:] for a, h in sorted(histories.items())}, indent=2).encode()
        try:
            self._create(data, "adapters", name, "aliases", f"{number}.json")
        except FileExistsError:
            raise StoreError(f"somebody else changed aliases of {name!r} in {self.url} just now: try again") from None
        for old in self._changes(name)[:-KEPT]:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._at("adapters", name, "aliases", f"{old}.json"))

    # -- what can go ------------------------------------------------------------------------------------------------

    def gc(self, *, keep: int | None = None, older_than: float = LEFT_SECONDS, apply: bool = False) -> Garbage:
        """Find, and remove when told to, also blobs that no version names; see `Store.gc`."""
        found = super().gc(keep=keep, older_than=older_than, apply=apply)
        used = {digest for place in self._places() for digest in self._pointer(place)["files"].values()}
        now, blobs = datetime.now(UTC), []
        for name in self._entries("blobs"):
            path = self._at("blobs", name)
            if name in used or not HEX.fullmatch(name):
                continue
            changed = self.fs.modified(path)
            changed = changed if changed.tzinfo else changed.replace(tzinfo=UTC)
            if (now - changed).total_seconds() >= older_than:  # a younger one may belong to a running save
                blobs.append(PurePosixPath("blobs", name))
                if apply:
                    self.fs.rm_file(path)
        return Garbage(leftovers=(*found.leftovers, *blobs), versions=found.versions, kept=found.kept)  # type: ignore[arg-type]
