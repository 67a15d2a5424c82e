"""What a server serves, as plain values: built in this process, or in each of several replicas."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from onebase.serve.catalog import Catalog
from onebase.serve.engine import Engine
from onebase.serve.keys import Keys
from onebase.serve.server import Server
from onebase.serve.settings import ServeSettings
from onebase.serve.training import Trainings
from onebase.store import Store

if TYPE_CHECKING:
    from onebase.base import Base


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

    def build(self, loaded: Base, training: bool = True) -> Server:
        """Return a server of a loaded base.

        Args:
            loaded: the base, as `base`, `device` and `dtype` say.
            training: whether adapters can be trained beside it.
        """
        store = Store(self.store)
        catalog = Catalog([store], [loaded.id, self.base])
        trainings = None
        if training:
            trainings = Trainings(self.base, store.root, done=lambda ref: catalog.forget(ref.partition("@")[0]))
        return Server(Engine(loaded, self.settings), catalog, self.keys, trainings, self.loopback)


def settle() -> None:
    """Let Python's collector pass over what a server starts with: 400,000 objects, and none of them garbage.

    A full collection stops every thread, for 200 ms with them.
    """
    gc.collect()
    gc.freeze()
