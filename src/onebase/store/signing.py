"""Signatures of stored versions: ed25519 over the digest, which covers every file.

A signature is one small file beside the others, which the digest leaves out. A person who trusts some keys
(`$ONEBASE_TRUSTED_KEYS`: a folder of ``*.pub`` files, or one such file) loads only what one of them signed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.errors import ConfigError, CorruptError, StoreError
from onebase.store import disk
from onebase.store.schema import read_json

if TYPE_CHECKING:
    from onebase.store.stored import Version

SIGNATURE_FILE = "signature.json"
VARIABLE = "ONEBASE_TRUSTED_KEYS"
MOST_BYTES = 2**16
MEANING = b"onebase adapter v1\n"  # signed in front of the digest: a signature is good for nothing else


@dataclass(frozen=True)
class Signature:
    """Who signed a version: the public key, as 64 hex digits."""

    key: str


def _library() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise ConfigError("signatures need the package cryptography: pip install 'onebase[sign]'") from None
    return serialization, ed25519


def make_key(path: Path) -> Path:
    """Write a new private key (PEM, readable by its owner alone) and its public key beside it, ``<path>.pub``.

    Raises:
        StoreError: one of the files exists.
    """
    serialization, ed25519 = _library()
    key = ed25519.Ed25519PrivateKey.generate()
    public = path.with_name(path.name + ".pub")
    for file in (path, public):
        if file.exists():
            raise StoreError(f"{file} exists: choose another name, a key is never replaced")
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(secret)
    shown = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    disk.write_file(public, shown)
    return public


def sign(stored: Version, key_file: Path) -> Signature:
    """Verify a version, and sign its digest with a private key; an earlier signature is replaced.

    Raises:
        ConfigError: the file holds no ed25519 private key in PEM without a password.
        CorruptError: the version is damaged.
    """
    from onebase.store.stored import Stored
    from onebase.store.verify import inspect

    serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_private_key(disk.read_regular(key_file, MOST_BYTES), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{key_file} holds no private key: {_first(error)}. Make one: onebase keygen FILE") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{key_file} is no ed25519 key. Make one: onebase keygen FILE")
    whole = Stored.open(stored.path)
    problems, _ = inspect(whole.path, whole.config)
    if problems:
        raise CorruptError(f"{whole.ref} is damaged and was not signed:" + "".join(f"\n  - {p}" for p in problems))
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    public = key.public_key().public_bytes(*raw).hex()
    body = {
        "algorithm": "ed25519",
        "digest": whole.digest,
        "key": public,
        "signature": base64.b64encode(key.sign(MEANING + whole.digest.encode())).decode(),
    }
    work = disk.new_work(stored.path.parent / ".signing", "signature")
    try:
        disk.write_file(work, (json.dumps(body, indent=2) + "\n").encode())
        os.replace(work, stored.path / SIGNATURE_FILE)
        disk.sync_folder(stored.path)
    finally:
        work.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process signs a version of the same name
            work.parent.rmdir()
    return Signature(public)


def read_signature(folder: Path, digest: str) -> Signature | None:
    """Return who signed the adapter in a folder, or None where it has no signature.

    Raises:
        CorruptError: the signature is damaged, of another adapter, or does not fit its own key.
    """
    path = folder / SIGNATURE_FILE
    try:
        raw = read_json(disk.read_regular(path, MOST_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CorruptError(f"{path} is not valid JSON: {error}") from None
    fields = ("algorithm", "digest", "key", "signature")
    if not isinstance(raw, dict) or set(raw) != set(fields) or not all(isinstance(raw[f], str) for f in fields):
        raise CorruptError(f"{path} is no signature: expected {', '.join(fields)}")
    if raw["algorithm"] != "ed25519":
        raise CorruptError(f"{path} has algorithm {raw['algorithm']!r}: expected 'ed25519'")
    if raw["digest"] != digest:
        raise CorruptError(f"{path} signs {raw['digest']}, this adapter is {digest}: it belongs to another adapter")
    _, ed25519 = _library()
    from cryptography.exceptions import InvalidSignature

    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(raw["key"]))
        key.verify(base64.b64decode(raw["signature"], validate=True), MEANING + digest.encode())
    except InvalidSignature:
        raise CorruptError(f"{path}: the signature is not that of key {raw['key'][:16]}...: it was forged") from None
    except ValueError as error:
        raise CorruptError(f"{path}: {_first(error)}") from None
    return Signature(raw["key"])


def trusted_keys(place: str | None = None) -> dict[str, str] | None:
    """Return public key (hex) -> file of the keys that a person trusts; None where nothing was said.

    Args:
        place: folder or file; None takes ``$ONEBASE_TRUSTED_KEYS``.

    Raises:
        ConfigError: the place is missing, or a file in it is no public key.
    """
    place = os.environ.get(VARIABLE) if place is None else place
    if not place:
        return None
    root = Path(place).expanduser()
    files = sorted(root.glob("*.pub")) if root.is_dir() else [root]
    serialization, ed25519 = _library()
    found = {}
    for file in files:
        try:
            key = serialization.load_pem_public_key(disk.read_regular(file, MOST_BYTES))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{VARIABLE}: {file} holds no public key: {_first(error)}") from error
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise ConfigError(f"{VARIABLE}: {file} is no ed25519 key")
        raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        found[raw.hex()] = str(file)
    if not found:
        raise ConfigError(f"{VARIABLE} = {place!r} has no *.pub files: nothing could be loaded")
    return found


def check_trust(stored: Version, digest: str) -> None:
    """Raise StoreError unless a trusted key signed this version, where a person says which keys are trusted.

    A signature that is there is checked in any case, where the package cryptography is.
    """
    trusted = trusted_keys()
    if trusted is None:
        if (stored.path / SIGNATURE_FILE).exists():
            with contextlib.suppress(ConfigError):  # without the package its structure and digest were checked
                read_signature(stored.path, digest)
        return
    signature = read_signature(stored.path, digest)
    fix = f"Ask its author to sign it (onebase sign), or unset {VARIABLE} to load it all the same."
    if signature is None:
        raise StoreError(f"{stored.ref} is not signed, and only signed adapters are trusted here. {fix}")
    if signature.key not in trusted:
        raise StoreError(
            f"{stored.ref} is signed by key {signature.key[:16]}..., which is none of the {len(trusted)} trusted. {fix}"
        )


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
