"""What a server serves, as plain values: built in this process, or in each of several replicas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from onebase.serve.catalog import Catalog
from onebase.serve.engine import Engine
from onebase.serve.keys import Keys
from onebase.serve.server import Server
from onebase.serve.settings import ServeSettings
from onebase.serve.training import Trainings
from onebase.store import Store


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        base: id or folder.
        device, dtype: of the base; None: the default.
        store: root of the adapters' store.
        keys: who may ask.
        settings: limits.
        loopback: only this machine reaches the server.
    """

    base: str
    device: str | None
    dtype: str | None
    store: Path
    keys: Keys = field(default_factory=Keys)
    settings: ServeSettings = field(default_factory=ServeSettings)
    loopback: bool = True

    def build(self, training: bool = True) -> Server:
        """Load the base and return a server of it.

        Args:
            training: whether adapters can be trained beside it.
        """
        from onebase.loading import load_base

        loaded = load_base(self.base, device=self.device, dtype=self.dtype)
        store = Store(self.store)
        catalog = Catalog([store], [loaded.id, self.base])
        forget: Callable[[str], None] = lambda ref: catalog.forget(ref.partition("@")[0])  # noqa: E731
        trainings = Trainings(self.base, store.root, done=forget) if training else None
        return Server(Engine(loaded, self.settings), catalog, self.keys, trainings, self.loopback)
