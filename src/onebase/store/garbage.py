"""What can be removed from a store: leftovers of killed processes, and old versions that no alias names."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onebase.store.aliases import FILE, read_aliases
from onebase.store.stored import Version

LEFT_SECONDS = 3600  # a save takes seconds; what did not change for an hour belongs to no running one


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """What can go.

    Attributes:
        leftovers: work files and folders of saves and removals that were cut off.
        versions: old versions that no alias names.
        kept: old versions that stay because stored compositions are made of them, with the compositions.
    """

    leftovers: tuple[Path, ...]
    versions: tuple[Version, ...]
    kept: Mapping[Version, tuple[Version, ...]] = field(default_factory=dict)


def leftovers(work: Path, adapters: Path, older_than: float = LEFT_SECONDS) -> tuple[Path, ...]:
    """Return work that nobody has touched for `older_than` seconds: of saves in `work`, of aliases in `adapters`."""
    before = time.time() - older_than
    found = [*(work.iterdir() if work.is_dir() else ()), *adapters.glob(f"*/{FILE}.*.tmp")]
    old = []
    for path in found:
        try:
            if os.lstat(path).st_mtime < before:
                old.append(path)
        except FileNotFoundError:  # its owner finished
            continue
    return tuple(sorted(old))


def unnamed(places: Sequence[Version], keep: int) -> tuple[Version, ...]:
    """Return the versions that no alias names, without the newest `keep` of each adapter."""
    by_name: dict[str, list[Version]] = defaultdict(list)
    for place in places:
        by_name[place.name].append(place)
    return tuple(
        place
        for group in by_name.values()
        for named in [{history[-1] for history in read_aliases(group[0].path.parent).values()}]
        for place in sorted(group, key=lambda p: p.version)[: max(0, len(group) - keep)]
        if place.version not in named
    )
