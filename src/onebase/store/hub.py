"""Stored adapters to and from a hub of models: the folder as it is, at a pinned revision, verified by its digest.

The hub's own client does the transfer. Uploads ask the hub which files it has; downloads go on where they stopped. So a
push or pull that was cut off is resumed by calling it again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase.errors import ConfigError, StoreError
from onebase.store import disk
from onebase.store.schema import CARD_FILE, CONFIG_FILE, TENSORS_FILE
from onebase.store.signing import SIGNATURE_FILE
from onebase.store.store import Store
from onebase.store.stored import Stored

FILES = (CONFIG_FILE, TENSORS_FILE, CARD_FILE)


@dataclass(frozen=True)
class Pushed:
    """What is on the hub now: the repository, the commit that holds the adapter, and its digest."""

    repo: str
    revision: str
    digest: str


@dataclass(frozen=True)
class Pulled:
    """What was fetched.

    Attributes:
        stored: the version in the store.
        repo, revision: where it came from; the commit, also where a branch was asked for.
        same: it is the version that was pushed, bit by bit; else a new version under another name or number.
    """

    stored: Stored
    repo: str
    revision: str
    same: bool


def push(stored: Stored, repo: str, *, private: bool = False, message: str = "") -> Pushed:
    """Upload a version, after verifying it, as one commit.

    Args:
        stored: what to upload.
        repo: such as ``me/reviews``; made where it does not exist.
        private: of a new repository.
        message: of the commit.

    Raises:
        CorruptError: the version is damaged.
        StoreError: the hub refuses, or cannot be reached.
    """
    stored.verify()
    from huggingface_hub import CommitOperationAdd, HfApi

    files = [name for name in (*FILES, *stored.config.files, SIGNATURE_FILE) if (stored.path / name).is_file()]
    with _explained(f"cannot push {stored.ref} to {repo}"):
        api = HfApi(library_name="onebase")
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.create_commit(
            repo,
            [CommitOperationAdd(name, str(stored.path / name)) for name in dict.fromkeys(files)],
            commit_message=message or f"{stored.ref}, {stored.digest[:19]}",
        )
        return Pushed(repo, str(done.oid), stored.digest)


def pull(source: str, store: Store, *, name: str | None = None) -> Pulled:
    """Download an adapter of onebase, verify it, and put it into a store.

    Args:
        source: ``me/reviews``, or ``me/reviews@REVISION`` with a commit, branch or tag.
        store: where it goes. It keeps its name, number and digest where they are free.
        name: store it as the next version of this name instead.

    Raises:
        ConfigError: the source is no repository, or a number is taken and no `name` was given.
        CorruptError: what was fetched is damaged.
        StoreError: the hub refuses, or cannot be reached.
    """
    repo, at, revision = source.partition("@")
    if at and not revision:
        raise ConfigError(f"{source!r} ends in '@': write {repo!r} for the main branch, or {repo}@COMMIT")
    if name is not None:
        store.check(name)
    from huggingface_hub import HfApi, snapshot_download

    with _explained(f"cannot pull {source}"):
        commit = HfApi(library_name="onebase").model_info(repo, revision=revision or None).sha
        if not commit:
            raise StoreError(f"cannot pull {source}: the hub names no commit of it")
        folder = Path(
            snapshot_download(repo, revision=commit, allow_patterns=[*FILES, SIGNATURE_FILE], library_name="onebase")
        )
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{source} holds no adapter: {CONFIG_FILE} is missing")
    fetched = Stored.open(folder)
    tensors = fetched.tensors()
    if name is None:
        return Pulled(adopt(store, fetched), repo, commit, True)
    body = fetched.config.model_dump(mode="json")
    for key in ("name", "version", "created", "tensors", "files", "digest"):
        body.pop(key)
    origin = {"repo": repo, "revision": commit, "ref": fetched.ref, "digest": fetched.digest}
    body["provenance"] = {**body["provenance"], "pulled": origin}
    return Pulled(store.save(name, config=body, tensors=tensors), repo, commit, False)


def adopt(store: Store, fetched: Stored) -> Stored:
    """Put a verified folder into a store under its own name and number.

    Raises:
        ConfigError: another version has the number.
    """
    store.check(fetched.name)
    if type(store) is not Store:
        raise ConfigError(
            f"a version is kept under its own number in a local store only: pull {fetched.name} with --name, which "
            "saves it as a new version"
        )
    home = store.root / "adapters" / fetched.name
    place = home / str(fetched.version)
    taken = ConfigError(
        f"{fetched.ref} is taken in {store.root} by another version: pull with --name to store it as a new one"
    )
    if place.exists():
        there = store.resolve(fetched.ref)
        if there.digest != fetched.digest:
            raise taken
        there.verify()
        return there
    work = disk.new_work(store.root / ".tmp", "pull")
    work.mkdir()
    try:
        for file in fetched.path.iterdir():  # links into the hub's cache become files
            if file.is_file():
                disk.write_file(work / file.name, file.read_bytes())
        disk.sync_folder(work)
        Stored.open(work).verify()
        disk.make_folder(home / ".claimed")
        try:
            os.close(os.open(home / ".claimed" / str(fetched.version), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise taken from None
        if not disk.move_folder(work, place):
            raise taken
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return store.resolve(fetched.ref)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what the hub's client raises into one error that names the way out."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except HFValidationError as error:
        raise ConfigError(f"{what}: {_first(error)}") from error
    except RuntimeError as error:  # the client wraps what uploads of large files raise
        if not isinstance(error.__cause__, HfHubHTTPError | httpx.HTTPError | OSError):
            raise
        raise StoreError(f"{what}: {_first(error)} What was sent is kept: call it again.") from error
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hints: dict[Any, str] = {
            401: " Log in: hf auth login.", 403: " The token may not write there: hf auth login.",
            404: " Check the name of the repository and the revision; a private one needs hf auth login.",
        }  # fmt: skip
        raise StoreError(
            f"{what}: {_first(error)}{hints.get(status, ' What was sent is kept: call it again.')}"
        ) from error


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
