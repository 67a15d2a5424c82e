"""What a page of a method says that the code knows: formula, counts, settings, defaults of training, results."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator

from onebase.errors import ConfigError
from onebase.methods.method import Method
from onebase.methods.registry import BUILT_IN, get_method
from onebase_docs import results
from onebase_docs.text import cell, code, table

NAMED = ("tokens", "union")  # methods that have no defaults: somebody must name words or parts
# Headings of a method's file that the page shows as a table, in this order. The formula has a block of its own, and
# every other heading of a file follows after these.
FACTS = ("Paper", "Papers", "After", "Parameters", "Start", "Cost", "Differs")
HEADING = re.compile(r"([A-Z][A-Za-z ]{2,30}): (.*)")


def opening(name: str) -> dict[str, list[str]]:
    """Read the opening docstring of a method's file: heading -> its lines, indentation taken off.

    Lines that begin a sentence without a heading are under ''.
    """
    module = importlib.import_module(BUILT_IN[name])
    found: dict[str, list[str]] = {}
    lines: list[str] = found.setdefault("", [])
    for line in (module.__doc__ or "").splitlines()[1:]:
        start = HEADING.match(line)
        if start:
            lines = found.setdefault(start[1], [])
            lines.append(start[2])
        elif line.startswith(" "):
            lines.append(line.strip())
        elif line.strip():
            lines = found[""]
            lines.append(line.strip())
    return {heading: lines for heading, lines in found.items() if lines}


def page(name: str) -> str:
    """Return the generated part of a method's page as Markdown."""
    return "\n".join(_page(name))


def _page(name: str) -> Iterator[str]:
    cls, facts = get_method(name), opening(name)
    yield "## Formula\n"
    yield "```text\n" + "\n".join(facts.pop("Formula")) + "\n```\n"
    rows = [(heading, " ".join(facts.pop(heading))) for heading in FACTS if heading in facts]
    rows += [(heading, " ".join(lines)) for heading, lines in facts.items() if heading]
    rows += [("", " ".join(facts[""]))] if "" in facts else []
    rows += [("Merges into the base", merges(cls))]
    if name in sizes():
        rows.append(("On the embedded base", size(name)))
    yield table(("", ""), [(cell(heading), cell(text)) for heading, text in rows])
    yield "## Settings\n"
    yield settings(name)
    yield "## Measured\n"
    yield results.of_method(name)


def merges(cls: type[Method]) -> str:
    """Say whether a method's effect can be written into the weights."""
    if cls.__name__ == "Union":
        return "yes, if every part does"
    return "yes" if cls.mergeable else "no: its effect is no change of weights"


def settings(name: str) -> str:
    """Return the table of a method's settings, and the sentence on its training."""
    from onebase.cli.methods import describe

    found = describe(name)
    rows = [(code(s["name"]), code(repr(s["default"])), cell(s["doc"])) for s in found["settings"]]
    return table(("setting", "default", ""), rows) + "\n" + training(name) + "\n"


def training(name: str) -> str:
    """Say which settings of training a method brings along; those of methods made of others follow from the parts."""
    from onebase.methods.union import Composite
    from onebase.training.settings import SCALED, WIDTH, recipe

    cls = get_method(name)
    if issubclass(cls, Composite):
        try:
            rate = recipe(cls())["lr"]
        except ConfigError:  # a union has no parts until somebody names them
            return "It trains at the learning rate of its slowest part; the others keep their proportion to it."
        return f"It trains at the learning rate of its slowest part, {code(f'{rate:g}')} by default."
    found = recipe(name)
    if not found:
        return "It trains with the general defaults."
    shown = ", ".join(f"{key} = {value:g}" for key, value in found.items())
    wide = f" Where the base is wider than {WIDTH}, the rate falls in proportion." if name in SCALED else ""
    return f"It trains with {code(shown)} unless told otherwise.{wide}"


@functools.cache
def sizes() -> dict[str, tuple[int, float]]:
    """Return name -> values that a method trains on the embedded base with its defaults, and their share of the base's.

    Counted without weights, as `onebase train --dry-run` does; methods that have no defaults are left out.
    """
    from onebase.build import build_adapter, default_task
    from onebase.cli.dry_run import outline

    base, total = outline(None)
    task = {**default_task(base), "kind": "classification", "labels": ["no", "yes"]}
    found = {}
    for name in (name for name in BUILT_IN if name not in NAMED):
        count = build_adapter(base, name, get_method(name)(), task, 0, empty=True).count()
        found[name] = (count, count / total)
    return found


def size(name: str) -> str:
    """Say how many values a method trains, head of two classes included."""
    count, share = sizes()[name]
    return f"{count:,} values with the defaults and a head of two classes, {100 * share:.2f} % of the base's"


def overview() -> str:
    """Return the table of all methods."""
    rows = []
    for name in BUILT_IN:  # methods of other packages have their pages elsewhere
        cls = get_method(name)
        count, share = sizes().get(name, (0, 0.0))
        values = f"{count:,} ({100 * share:.2f} %)" if count else "depends on what is named"
        merge = "if every part does" if name == "union" else "yes" if cls.mergeable else "no"
        rows.append((f"[{name}](methods/{name}.md)", cell(cls.summary), values, merge))
    return table(("method", "what it trains", "values on the embedded base", "merges"), rows)
