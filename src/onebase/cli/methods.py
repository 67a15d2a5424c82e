"""`onebase methods`: how a base can be adapted, with every setting. The list of names imports no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options as o
from onebase.cli.failures import UsageError
from onebase.cli.output import Output, aligned
from onebase.errors import UnknownNameError

if TYPE_CHECKING:
    from onebase.methods.method import Method


def methods(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", autocompletion=o.known_methods, help="Show these with their settings."),
    ] = None,
    settings: Annotated[bool, typer.Option("--settings", "-s", help="Show every method with its settings.")] = False,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """List the methods; with names or --settings also what each can be told."""
    from onebase.methods.registry import method_names

    out = Output(as_json)
    if not names and not settings:
        known = {name: written_summary(name) for name in method_names()}
        if as_json:
            out.document({"methods": [{"name": name, "summary": text} for name, text in known.items()]})
            return
        for line in aligned(known.items()):
            out.line(line.rstrip())
        out.note("Settings of one: onebase methods NAME; of all: onebase methods --settings")
        return
    found = [describe(name) for name in names or method_names()]
    if as_json:
        out.document({"methods": found})
        return
    for i, method in enumerate(found):
        if i:
            out.line()
        _show(method, out)


def written_summary(name: str) -> str:
    """Read a built-in method's one-line summary from its source, because importing it would import torch."""
    from onebase.methods.registry import BUILT_IN

    spec = importlib.util.find_spec(BUILT_IN[name]) if name in BUILT_IN else None
    if spec is None or spec.origin is None:
        return ""
    found = re.search(r'^    summary: ClassVar\[str\] = "(.*)"$', Path(spec.origin).read_text("utf-8"), re.MULTILINE)
    return found[1] if found else ""


def describe(name: str) -> dict[str, Any]:
    """Return a method's summary, settings with defaults and docs, and the training defaults that go with it.

    Raises:
        UsageError: there is no such method.
    """
    from onebase.methods.registry import _form, get_method
    from onebase.training.settings import RECIPES

    name, _ = _form(name, {})
    try:
        cls = get_method(name)
    except UnknownNameError as error:
        raise UsageError(str(error)) from error
    docs = documented(cls)
    return {
        "name": name,
        "summary": cls.summary,
        "description": (cls.__doc__ or "").strip().splitlines()[0],
        "mergeable": cls.mergeable,
        "settings": [
            {"name": f.name, "type": str(f.type), "default": _default(f), "doc": docs.get(f.name, "")}
            for f in dataclasses.fields(cls)
        ],
        "training": RECIPES.get(name, {}),
    }


def documented(cls: type[Method]) -> dict[str, str]:
    """Read the section ``Attributes:`` of a method's docstring: setting -> its sentences."""
    _, _, section = (cls.__doc__ or "").partition("Attributes:")
    docs: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        start = re.match(r" {8}(\w+): (.*)", line)
        if start:
            name = start[1]
            docs[name] = start[2].strip()
        elif name and line.strip():
            docs[name] += " " + line.strip()
    return docs


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _show(method: dict[str, Any], out: Output) -> None:
    out.line(f"{method['name']}: {method['summary'] or method['description']}")
    pairs = [(f"  {s['name']} = {s['default']!r}", s["doc"] or s["type"]) for s in method["settings"]]
    for line in aligned(pairs):
        out.line(line)
    if method["training"]:
        out.line("  trained with " + ", ".join(f"{key} = {value!r}" for key, value in method["training"].items()))
