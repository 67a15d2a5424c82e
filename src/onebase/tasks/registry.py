"""The registry of tasks, by kind. Listing the kinds imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, TypeVar

from onebase.errors import ConfigError, unknown

if TYPE_CHECKING:
    from onebase.tasks.task import Task

_T = TypeVar("_T", bound="type[Task]")

# kind -> module that registers it
BUILT_IN = {
    "causal-lm": "onebase.tasks.language",
    "chat": "onebase.tasks.chat",
    "classification": "onebase.tasks.classification",
    "completion": "onebase.tasks.language",
    "embeddings": "onebase.tasks.embeddings",
    "features": "onebase.tasks.features",
    "image-classification": "onebase.tasks.images",
    "multilabel": "onebase.tasks.multilabel",
    "regression": "onebase.tasks.regression",
    "rerank": "onebase.tasks.rerank",
    "masked-lm": "onebase.tasks.masked",
    "qa": "onebase.tasks.qa",
    "tokens": "onebase.tasks.tokens",
    "seq2seq": "onebase.tasks.seq2seq",
    "similarity": "onebase.tasks.embeddings",
}
ENTRY_POINTS = "onebase.tasks"

_REGISTERED: dict[str, Task] = {}


def register_task(cls: _T) -> _T:
    """Make a task known under its `kind`.

    Raises:
        ConfigError: the kind is taken by another class.
    """
    taken = _REGISTERED.get(cls.kind)
    if taken is not None and type(taken).__qualname__ != cls.__qualname__:
        raise ConfigError(f"task kind {cls.kind!r} is taken by {type(taken).__module__}.{type(taken).__qualname__}")
    if taken is None and cls.kind in BUILT_IN and cls.__module__ != BUILT_IN[cls.kind]:
        raise ConfigError(f"task kind {cls.kind!r} is taken by {BUILT_IN[cls.kind]}")
    _REGISTERED[cls.kind] = cls()  # type: ignore[assignment]
    return cls


def task_kinds() -> list[str]:
    """Return every known kind, sorted."""
    from importlib.metadata import entry_points

    return sorted({*BUILT_IN, *_REGISTERED, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def get_task(kind: str) -> Task:
    """Return the task of a kind.

    Raises:
        UnknownNameError: there is none.
    """
    if kind not in _REGISTERED:
        if kind in BUILT_IN:
            importlib.import_module(BUILT_IN[kind])
        else:
            from importlib.metadata import entry_points

            for point in entry_points(group=ENTRY_POINTS):
                if point.name == kind:
                    register_task(point.load())
    if kind not in _REGISTERED:
        raise unknown("task", kind, task_kinds())
    return _REGISTERED[kind]


def option_names() -> list[str]:
    """Return the names of all options of all tasks, sorted."""
    return sorted({name for kind in task_kinds() for name in get_task(kind).options})
