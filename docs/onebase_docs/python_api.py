"""The reference of the Python interface: one autodoc directive per public name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import onebase
from onebase import errors, extend

HIDDEN = ("errors", "extend")  # modules, listed by what they hold


def surface() -> str:
    """Return directives for `onebase.__all__`."""
    return _block(line for name in onebase.__all__ if name not in HIDDEN for line in _directive("onebase", name))


def extension() -> str:
    """Return directives for `onebase.extend.__all__`; what the other page documents is not documented twice."""
    names = [name for name in extend.__all__ if name not in onebase.__all__]
    return _block(line for name in names for line in _directive("onebase.extend", name))


def failures() -> str:
    """Return directives for every error, the root first."""
    found = [n for n, v in vars(errors).items() if inspect.isclass(v) and v.__module__ == errors.__name__]
    return _block(line for name in found for line in (f".. autoexception:: onebase.errors.{name}", ""))


def _directive(module: str, name: str) -> Iterator[str]:
    thing = getattr(__import__(module, fromlist=[name]), name)
    if not inspect.isclass(thing):
        yield from (f".. autofunction:: {module}.{name}", "")
        return
    yield from (f".. autoclass:: {module}.{name}", "   :members:", "   :member-order: bysource", "")


def _block(lines: Iterator[str]) -> str:
    return "\n".join(["```{eval-rst}", *lines, "```"])
