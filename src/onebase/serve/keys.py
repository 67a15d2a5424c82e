"""Who may ask for what: API keys with scopes and lists of adapters. Only hashes are kept."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onebase.errors import ConfigError, nearest

VARIABLE = "ONEBASE_API_KEY"
SCOPES = ("use", "admin")
FIELDS = ("hash", "scopes", "adapters", "note")


def hashed(key: str) -> str:
    """Return what is stored of a key. Keys are long and random, so one round of SHA-256 is enough."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True)
class Key:
    """What one key allows.

    Attributes:
        hash: of the key, see `hashed`.
        scopes: use, admin. Admin includes use.
        adapters: names that it may use, the plain base is 'base'; None: all.
    """

    hash: str
    scopes: frozenset[str]
    adapters: frozenset[str] | None = None

    def allows(self, name: str) -> bool:
        """Whether it may use this adapter."""
        return self.adapters is None or name in self.adapters

    def may(self, scope: str) -> bool:
        """Whether it has a scope."""
        return scope in self.scopes or "admin" in self.scopes


ANYONE = Key("", frozenset({"use"}))


class Keys:
    """The keys of a server; none at all means that everybody may use it, and nobody administer it."""

    def __init__(self, keys: Sequence[Key] = ()):
        self._keys = tuple(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def admin(self) -> bool:
        """Whether any key may administer."""
        return any("admin" in key.scopes for key in self._keys)

    def find(self, authorization: str | None) -> Key | None:
        """Return the key of an `Authorization` header, or None. Every key is compared, in constant time each."""
        if not self._keys:
            return ANYONE
        scheme, _, given = (authorization or "").partition(" ")
        wanted = hashed(given.strip() if scheme.lower() == "bearer" else "")
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.hash, wanted):
                found = key
        return found


def read_keys(path: Path | None, plain: str | None = None) -> Keys:
    """Read a file of keys, and one key in plain text that may do everything.

    Args:
        path: a JSON list of {"hash": "sha256:...", "scopes": ["use"], "adapters": ["reviews"]}.
        plain: the value of ``$ONEBASE_API_KEY``.

    Raises:
        ConfigError: names the file, the entry and the field.
    """
    keys = [Key(hashed(plain), frozenset(SCOPES))] if plain else []
    if path is None:
        return Keys(keys)
    try:
        listed = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(listed, list):
        raise ConfigError(f"{path}: expected a list of keys, such as [{{'hash': 'sha256:...', 'scopes': ['use']}}]")
    for number, entry in enumerate(listed, 1):
        where = f"{path}, key {number}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where}: expected an object, got {entry!r}")
        for field in entry.keys() - set(FIELDS):
            raise ConfigError(f"{where}: unknown field {field!r}. {nearest(field, FIELDS)}")
        digest, scopes, adapters = entry.get("hash"), entry.get("scopes", ["use"]), entry.get("adapters")
        if not isinstance(digest, str) or not digest.startswith("sha256:") or len(digest) != 71:
            raise ConfigError(f"{where}: hash = {digest!r}: expected 64 hex digits (onebase serve --new-key)")
        if not isinstance(scopes, list) or not scopes or not set(scopes) <= set(SCOPES):
            raise ConfigError(f"{where}: scopes = {scopes!r}: expected a list of {', '.join(SCOPES)}")
        if adapters is not None and not (isinstance(adapters, list) and all(isinstance(a, str) for a in adapters)):
            raise ConfigError(f"{where}: adapters = {adapters!r}: expected a list of names")
        keys.append(Key(digest, frozenset(scopes), None if adapters is None else frozenset(adapters)))
    return Keys(keys)
