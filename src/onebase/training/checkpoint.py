"""Checkpoints: the state of a training run in one file, whole or absent, and how an interrupted run is found again.

A run that will be stored as NAME writes ``<store>/runs/NAME.safetensors`` every `Settings.save_steps` optimizer steps
and after every epoch. The file goes when the adapter is stored. It holds no texts of the data, only their digest.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from onebase.errors import ConfigError, CorruptError
from onebase.processes import active

if TYPE_CHECKING:
    from onebase.training.job import JobState

SUFFIX = ".safetensors"
# What must be the same for a run to go on, with the words for it.
SAME = {
    "base": "base (fingerprint)",
    "data": "data (digest of all rows)",
    "method": "method",
    "settings": "training settings",
    "task": "task",
    "init_from": "init_from",
}


@dataclass
class Checkpoint:
    """The file of one run.

    Attributes:
        path: the file.
        identity: what the run is: base, data, method, settings, task; see `SAME`.
        facts: what else is kept and found again: measured kernels, the command line.
    """

    path: Path
    identity: dict[str, Any]
    remember: InitVar[dict[str, Any] | None] = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self, remember: dict[str, Any] | None) -> None:
        self.facts |= remember or {}

    def found(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what `read` gives, None where there is no checkpoint.

        Raises:
            CorruptError: the file is damaged.
            ConfigError: it is of another run.
        """
        if not self.path.exists():
            return None
        tensors, about = read(self.path)
        check_same(self.path, about["identity"], self.identity)
        return tensors, about

    def write(self, job: JobState) -> None:
        """Write the state between two steps; the file before it stays until this one is whole.

        Of several processes the first one writes: the state is the same in all.
        """
        if not active().first:
            return
        tensors, state = job.state()
        publish(self.path, tensors, {"identity": self.identity, "facts": self.facts, "state": state})

    def remove(self) -> None:
        """Forget the run."""
        if active().first:
            unpublish(self.path)


def publish(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a checkpoint as a whole: the file before it stays until one rename replaces it."""
    from safetensors.torch import save

    from onebase.store import disk

    data = save({name: t.cpu().contiguous() for name, t in tensors.items()}, {"onebase": json.dumps(about)})
    disk.make_folder(path.parent)
    work = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        work.unlink()  # of a killed process that had this number
    disk.write_file(work, data)
    os.replace(work, path)
    disk.sync_folder(path.parent)


def unpublish(path: Path) -> None:
    """Remove a checkpoint, and what killed processes left of it."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    for left in path.parent.glob(f".{path.name}.*"):
        with contextlib.suppress(FileNotFoundError):
            left.unlink()


def place(root: Path, name: str) -> Path:
    """Return the file of the run that will be stored as `name`."""
    return root / "runs" / f"{name}{SUFFIX}"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint.

    Returns:
        tensors, and {"identity", "facts", "state"}.

    Raises:
        CorruptError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["onebase"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            assert {"identity", "facts", "state"} <= about.keys()
    except (SafetensorError, OSError, ValueError, KeyError, AssertionError) as error:
        raise CorruptError(f"{path}: not a whole checkpoint ({error}); delete it and train again") from error
    return tensors, about


def check_same(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigError with everything in which a run differs from the one that was interrupted."""
    plain = json.loads(json.dumps(now))
    wrong = []
    for key, words in SAME.items():
        if then.get(key) != plain.get(key):
            wrong.append(f"{words}: {_difference(then.get(key), plain.get(key))}")
    if wrong:
        raise ConfigError(
            f"the interrupted run {path.stem} was another one:\n  - "
            + "\n  - ".join(wrong)
            + "\nResume with the same data and settings, or train without resume to start over."
        )


def _difference(then: Any, now: Any) -> str:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = [key for key in {*then, *now} if then.get(key) != now.get(key)]
        return ", ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in sorted(keys))
    return f"was {then!r}, is {now!r}"


def interrupted(root: Path) -> list[Path]:
    """Return the checkpoints of interrupted runs, the latest first."""
    folder = root / "runs"
    found = [p for p in folder.glob(f"*{SUFFIX}") if not p.name.startswith(".")] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
