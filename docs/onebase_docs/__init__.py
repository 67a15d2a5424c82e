"""The documentation's own parts: pages name what the code knows, and a build puts it there.

A line ``<!-- generate: cli -->`` in a page is replaced by the reference of the command line; GENERATED has the others.
"""

from __future__ import annotations

import re
from typing import Any

MARK = re.compile(r"^<!-- generate: (\S+)(?: (\S+))? -->$", re.MULTILINE)


def generated(what: str, name: str | None) -> str:
    """Return the Markdown that stands for a mark.

    Raises:
        KeyError: nothing is generated under this name.
    """
    from onebase_docs import cli, methods, python_api

    return {
        "cli": lambda _: cli.reference(),
        "methods": lambda _: methods.overview(),
        "method": lambda name: methods.page(str(name)),
        "python": lambda _: python_api.surface(),
        "extend": lambda _: python_api.extension(),
        "errors": lambda _: python_api.failures(),
    }[what](name)


def fill(app: Any, docname: str, source: list[str]) -> None:
    """Replace every mark of a page."""
    source[0] = MARK.sub(lambda mark: generated(mark[1], mark[2]), source[0])


def setup(app: Any) -> dict[str, bool]:
    """Let Sphinx call `fill` on every page it reads."""
    app.connect("source-read", fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
