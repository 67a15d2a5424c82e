"""The checkpoint of a pass over many jobs: the state of all of them at one step, in one file.

Jobs share micro-batches, so a job's bits depend on which rows the others add to them. A pass that goes on must
therefore find all its jobs where they were at the same moment: one file, replaced by one rename, holds them all. The
state of a job that is over stays in it until the pass is over, so that its result can be shown again.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from onebase.errors import ConfigError, TrainingError
from onebase.processes import active
from onebase.training.checkpoint import SUFFIX, check_same, publish, read, unpublish

if TYPE_CHECKING:
    from onebase.training.joint import Member


@dataclass
class PassCheckpoint:
    """The file of one pass.

    Attributes:
        path: the file.
        identities: what each job is, in order; see `checkpoint.SAME`.
        facts: what else is kept and found again: measured kernels, the command line.
        mark: of this pass, stored with its adapters: tells which of them a killed pass had already stored.
    """

    path: Path
    identities: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: secrets.token_hex(8))

    def restore(self, members: Sequence[Member]) -> bool:
        """Put every job back where the interrupted pass had it; return False where there is no checkpoint.

        Raises:
            CorruptError: the file is damaged.
            ConfigError: it is of other jobs; names all differences of the first job that differs.
        """
        if not self.path.exists():
            return False
        tensors, about = read(self.path)
        then = about["identity"]["jobs"]
        if len(then) != len(self.identities):
            raise ConfigError(f"the interrupted pass had {len(then)} jobs, this one has {len(self.identities)}")
        for member, before, now in zip(members, then, self.identities):
            check_same(self.path.with_stem(member.name), before, now)
        self.facts = {**about["facts"], **self.facts}
        self.mark = about["identity"]["mark"]
        for number, (member, one) in enumerate(zip(members, about["state"]["jobs"])):
            prefix = f"{number}/"
            own = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
            member.state.restore(own, one["state"])
            member.over = (own, one["state"]) if one["over"] else None
            member.failed = None if one["failed"] is None else TrainingError(one["failed"])
        return True

    def write(self, members: Sequence[Member]) -> None:
        """Write the state of all jobs between two steps; the file before it stays until this one is whole."""
        if not active().first:
            return
        tensors: dict[str, Tensor] = {}
        jobs = []
        for number, member in enumerate(members):
            own, state = member.over or member.state.state()
            tensors |= {f"{number}/{name}": t for name, t in own.items()}
            failed = None if member.failed is None else str(member.failed)
            jobs.append({"state": state, "over": member.over is not None, "failed": failed})
        identity = {"jobs": self.identities, "mark": self.mark}
        publish(self.path, tensors, {"identity": identity, "facts": self.facts, "state": {"jobs": jobs}})

    def remove(self) -> None:
        """Forget the pass."""
        if active().first:
            unpublish(self.path)


def place_of_pass(root: Path, names: Sequence[str | None]) -> Path:
    """Return the file of the pass whose jobs have these names, in this order."""
    key = hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:16]
    return root / "runs" / "passes" / f"{key}{SUFFIX}"


def interrupted_passes(root: Path) -> list[Path]:
    """Return the checkpoints of interrupted passes, the latest first."""
    folder = root / "runs" / "passes"
    found = [p for p in folder.glob(f"*{SUFFIX}") if not p.name.startswith(".")] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
