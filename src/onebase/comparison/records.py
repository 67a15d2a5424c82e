"""The records of a comparison: a line each, written as they come, so that an interrupt leaves what was finished."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onebase.errors import ConfigError


class Book:
    """Records in a folder's `records.jsonl`.

    Args:
        folder: where; it is made if it is not there. None keeps them in memory: those of a worker.
        resume: whether records may be there.
        identity: what must be the same for them to count: data, base and settings. Methods, rates and seeds are in
            each record.

    Raises:
        ConfigError: records are there and `resume` is not given, or they were made with something else.
    """

    def __init__(self, folder: Path | None, resume: bool, identity: dict[str, Any]):
        self.folder, self.records = folder, list[dict[str, Any]]()
        if folder is None:
            return
        self.path = folder / "records.jsonl"
        if self.path.exists():
            if not resume:
                raise ConfigError(f"{self.path} is there already: pass --resume to go on, or another folder")
            self._read(identity)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.records:
            self.add({"stage": "start", "identity": identity})

    def _read(self, identity: dict[str, Any]) -> None:
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # the last one may be cut
        self.records = [json.loads(line) for line in whole]
        known = self.records[0].get("identity", {}) if self.records else identity
        differ = [key for key in {**known, **identity} if known.get(key) != identity.get(key)]
        if differ:
            said = "; ".join(f"{key} {known.get(key)!r}, now {identity.get(key)!r}" for key in differ)
            raise ConfigError(f"{self.path} was made with other settings: {said}. Use another folder")
        self.path.write_text("".join(whole), encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Write a record."""
        self.records.append(record)
        if self.folder is None:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def find(self, stage: str, **facts: Any) -> Iterator[dict[str, Any]]:
        """Yield the records of a stage with these facts."""
        for record in self.records:
            if record.get("stage") == stage and all(record.get(key) == value for key, value in facts.items()):
                yield record

    def has(self, stage: str, **facts: Any) -> bool:
        """Whether such a record is there."""
        return next(self.find(stage, **facts), None) is not None
