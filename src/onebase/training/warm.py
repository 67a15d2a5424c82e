"""Warm start: an adapter that begins where a stored one ended, on new data, also with more labels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from onebase.adapter import Adapter, problems
from onebase.data import Data
from onebase.errors import ConfigError, CorruptError
from onebase.heads import LinearHead
from onebase.methods.method import Method
from onebase.methods.registry import parse_method
from onebase.tasks import get_task
from onebase.tasks.pooled import PAIRS

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store import Store

# Parts of a task that a new adapter takes over, unless they are given; and options that the data decides instead.
KEPT = ("template", "pooling", "max_length")
DECIDED = ("class_weights", "scheme")


@dataclass(frozen=True, eq=False)
class Parent:
    """A stored adapter to start from.

    Attributes:
        ref, digest: which one.
        method: its method.
        spec: its task.
        tensors: what is stored.
    """

    ref: str
    digest: str
    method: Method
    spec: dict[str, Any]
    tensors: dict[str, Tensor]

    def widened(self, data: Data, options: dict[str, Any]) -> tuple[Data, dict[str, Any]]:
        """Put the parent's labels before those that the data adds, and take over how it reads rows.

        Labels that have nothing in common with the parent's make a new head.

        Raises:
            ConfigError: the data is of another kind, or pairs are to be read in another way.
        """
        if data.kind != self.spec["kind"]:
            raise ConfigError(f"{self.ref} is for {self.spec['kind']}, {data.source} is {data.kind} data")
        options = dict(options)
        for key in KEPT:
            if options.get(key) is None and self.spec.get(key):
                options[key] = self.spec[key]
        asked, own = options.get("pairs"), self.spec.get("pairs")
        if own in PAIRS and asked in PAIRS and asked != own:
            raise ConfigError(
                f"pairs = {asked!r}, but {self.ref} reads pairs {own}, as its head needs: leave pairs out"
            )
        for key in get_task(data.kind).options:
            if options.get(key) in (None, "auto") and key in self.spec and key not in DECIDED:
                options[key] = self.spec[key]
        if options.get("pooling") and not self.spec.get("labels") and data.kind in ("causal-lm", "completion"):
            options.pop("pooling")
        old = tuple(self.spec.get("labels") or ())
        if set(old) & set(data.labels):
            data = dataclasses.replace(data, labels=(*old, *(label for label in data.labels if label not in old)))
        return data, options

    def start(self, adapter: Adapter) -> str:
        """Copy the parent's values into a new adapter; return what was done, in words.

        Rows of the head that belong to a label are copied by the label's name; new labels keep their start.

        Raises:
            CorruptError: the stored tensors do not fit.
        """
        module = {name: t for name, t in self.tensors.items() if not name.startswith(("head.", "base_head."))}
        wrong = problems(adapter.module.tensors(), module)
        if wrong:
            raise CorruptError(f"{self.ref} does not fit this base:\n  - " + "\n  - ".join(wrong))
        adapter.module.put(module)
        said = f"starting from {self.ref}"
        if adapter.head is None:
            return said
        own = adapter.head.state_dict()
        stored = {name[5:]: t for name, t in self.tensors.items() if name.startswith("head.")}
        old, new = tuple(self.spec.get("labels") or ()), adapter.labels
        shared = [label for label in old if label in new]
        if old and not shared:
            return said + " with a new head: none of its labels is among the data's"
        if old == new or not old:
            adapter.head.load_state_dict(stored)
        elif isinstance(adapter.head, LinearHead):
            adapter.head.take(stored, [(new.index(label), old.index(label)) for label in shared])
            for name in stored.keys() - {
                "weight",
                "bias",
                "center",
                "scale",
                "inner_weight",
                "inner_bias",
            }:  # further values per label
                for label in shared:
                    own[name][new.index(label)] = stored[name][old.index(label)]
        else:
            return said + " with a new head: its kind cannot take more labels"
        added = [label for label in new if label not in old]
        return said + (f"; new labels: {', '.join(added)}" if old and added else "")

    def facts(self) -> dict[str, Any]:
        """Return what is kept as provenance."""
        return {"parent": {"ref": self.ref, "digest": self.digest}}


def read_parent(base: Base, ref: str, store: Store) -> Parent:
    """Read a stored adapter that was made for this base.

    Raises:
        UnknownNameError, CorruptError, MismatchError: it is not there, damaged, or made for another base.
    """
    from onebase.storing import check_base

    stored = store.resolve(ref)
    tensors = stored.tensors()
    check_base(base, stored, True)
    config = stored.config.model_dump(mode="json")
    return Parent(stored.ref, stored.digest, parse_method(config["method"]), config["task"], tensors)


def parent_method(parent: Parent, asked: str | Method | None) -> Method:
    """Return the parent's method; another one cannot start from it.

    Raises:
        ConfigError: another method, or other settings, are asked for.
    """
    if asked is not None and parse_method(asked) != parent.method:
        raise ConfigError(
            f"{parent.ref} is {parent.method.shorthand()}, asked for is {parse_method(asked).shorthand()}: leave the "
            "method out to go on with the parent's"
        )
    return parent.method
