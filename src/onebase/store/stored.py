"""One version of one adapter in a folder: where it is, what it says, and its verified tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from onebase.errors import CorruptError
from onebase.store.schema import AdapterConfig
from onebase.store.signing import check_trust
from onebase.store.verify import inspect, read_config

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Version:
    """The place of one version; whether it can be read is not said."""

    name: str
    version: int
    path: Path

    @property
    def ref(self) -> str:
        """The reference that resolves to this version, e.g. ``reviews@3``."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Stored(Version):
    """One version whose config was read. Two are equal when place and digest are."""

    digest: str
    config: AdapterConfig = field(compare=False, repr=False)

    @classmethod
    def open(cls, path: Path) -> Stored:
        """Read the config of the adapter in the folder `path`.

        Raises:
            CorruptError: the config is missing or wrong.
            StoreError: a newer onebase wrote it.
        """
        config = read_config(path)
        return cls(config.name, config.version, path, config.digest, config)

    def verify(self) -> None:
        """Check every file and tensor against the config, and raise once with all that is wrong.

        Raises:
            CorruptError: lists missing, unexpected and changed files, and missing, unexpected,
                misshapen, mistyped and not finite tensors.
            StoreError: a newer onebase wrote the config.
        """
        self.tensors()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Load the tensors after verifying the whole folder.

        Returns:
            The tensors by name, on the CPU, bit-equal to those saved.

        Raises:
            CorruptError: as `verify`.
            StoreError: as `verify`; or keys are trusted here (`$ONEBASE_TRUSTED_KEYS`) and none of them signed it.
        """
        check_trust(self, self.digest)
        problems, tensors = inspect(self.path, self.config)
        if problems:
            lines = "".join(f"\n  - {problem}" for problem in problems)
            raise CorruptError(
                f"adapter {self.ref} in {self.path} has {len(problems)} problem(s):{lines}\n"
                f"Restore the folder from a copy, or save the adapter again."
            )
        return tensors
