"""Versions that stored compositions are made of: they name their parts by digest, and need them to be loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from onebase.store.schema import read_json
from onebase.store.stored import Version

MARK = b'"parts"'  # in every composition's config, and in few others: most configs need not be parsed
DEEPEST = 64  # compositions in compositions; what is deeper was not written here


def digests_of(settings: Any, depth: int = 0) -> Iterator[str]:
    """Yield the digest of every stored part that a method's settings name, those of inner compositions too."""
    parts = settings.get("parts") if isinstance(settings, Mapping) else None
    for part in parts if isinstance(parts, list) and depth < DEEPEST else ():
        if isinstance(part, Mapping):
            if isinstance(part.get("digest"), str):
                yield part["digest"]
            yield from digests_of(part.get("composition"), depth + 1)


class Needs:
    """Which versions of a store are parts of which.

    Args:
        places: every version.
        read: gives the bytes of a version's config; OSError or ValueError where they cannot be had.
    """

    def __init__(self, places: Iterable[Version], read: Callable[[Version], bytes]):
        self.digests: dict[Version, str] = {}  # of parts, as far as anything names them
        self.parts: dict[Version, set[str]] = {}  # of compositions
        raw: dict[Version, bytes] = {}
        for place in places:
            try:
                raw[place] = read(place)
            except (OSError, ValueError):
                continue  # damaged or just removed: it can neither need a version nor be loaded as one
            if MARK in raw[place] and (config := _parsed(raw[place])):
                method = config.get("method")
                named = set(digests_of(method.get("settings") if isinstance(method, Mapping) else None))
                if named:
                    self.parts[place] = named
        named = {digest for digests in self.parts.values() for digest in digests}
        for place, data in raw.items() if named else ():
            digest = _parsed(data).get("digest")
            if digest in named:
                self.digests[place] = digest

    def of(self, going: Sequence[Version]) -> dict[Version, tuple[Version, ...]]:
        """Return those of `going` that compositions which stay need, with the compositions.

        A version of the same content that stays serves as well, so it takes the need away.
        """
        gone = set(going)
        left = {digest for place, digest in self.digests.items() if place not in gone}
        found: dict[Version, tuple[Version, ...]] = {}
        for place in going:
            digest = self.digests.get(place)
            if digest is not None and digest not in left:
                users = tuple(user for user, named in self.parts.items() if digest in named and user not in gone)
                if users:
                    found[place] = users
        return found


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        raw = read_json(data)
    except ValueError:
        return {}
    return raw if isinstance(raw, dict) else {}
