"""The reference of the command line, from the declarations of the typer app. No command is run."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from typer.models import ArgumentInfo, OptionInfo

from onebase_docs.text import code, escaped

MAIN = "Options"
EVERYWHERE = ("--json", "--debug")  # said once for all commands


@dataclass(frozen=True)
class Parameter:
    """One option or argument of a command.

    Attributes:
        names: as they are typed: ``("--method", "-m")``; of an argument its metavar.
        argument: whether it is given by position.
        metavar: what stands for the value, '' for switches.
        default: '' where there is none worth saying.
        help: its sentence.
        panel: the heading it is under.
        required: whether the command needs it.
    """

    names: tuple[str, ...]
    argument: bool
    metavar: str
    default: str
    help: str
    panel: str
    required: bool


def commands() -> dict[str, Callable[..., None]]:
    """Return name -> function of every command of the program, in the order of its help."""
    from onebase.cli.main import app

    return {str(c.name): c.callback for c in app.registered_commands if c.callback is not None}


def parameters(function: Callable[..., None]) -> list[Parameter]:
    """Return what a command takes, in declared order."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *extras = typing.get_args(hints[name])
        info = next(extra for extra in extras if isinstance(extra, (OptionInfo, ArgumentInfo)))
        found.append(_parameter(name, kind, info, parameter.default))
    return found


def option_names(function: Callable[..., None]) -> set[str]:
    """Return every spelling of every option of a command, with the help that all have."""
    return {n for p in parameters(function) if not p.argument for n in p.names} | {"--help", "-h"}


def _parameter(name: str, kind: Any, info: OptionInfo | ArgumentInfo, default: Any) -> Parameter:
    argument = isinstance(info, ArgumentInfo)
    required = default is inspect.Parameter.empty
    shown = "" if required or default is None or isinstance(default, bool) else str(default)
    if argument:
        metavar = info.metavar or name.upper()
        return Parameter((metavar,), True, metavar, shown, info.help or "", MAIN, required)
    declared = (info.default, *(info.param_decls or ()))  # typer keeps the first spelling as a default until it runs
    spelled = [text for text in declared if isinstance(text, str) and text.startswith("-")]
    names = tuple(part for text in spelled for part in text.split("/"))
    switch = kind is bool
    if not names:
        names = (f"--{name.replace('_', '-')}",) + ((f"--no-{name.replace('_', '-')}",) if switch else ())
    metavar = "" if switch else info.metavar or _kind(kind)
    return Parameter(names, False, metavar, shown, info.help or "", info.rich_help_panel or MAIN, required)


def _kind(kind: Any) -> str:
    """Return what stands for a value of this type."""
    options = [o for o in typing.get_args(kind) if o is not type(None)] if _is_union(kind) else [kind]
    return {int: "N", float: "NUMBER"}.get(options[0], "TEXT")


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def reference() -> str:
    """Return the reference of every command as Markdown."""
    return "\n".join(line for name, function in commands().items() for line in _command(name, function))


def _command(name: str, function: Callable[..., None]) -> Iterator[str]:
    found = parameters(function)
    usage = " ".join(["onebase", name, "[OPTIONS]", *(p.metavar for p in found if p.argument)])
    yield f"## onebase {name}\n"
    yield f"```text\n{usage}\n```\n"
    yield escaped(inspect.cleandoc(function.__doc__ or "")) + "\n"
    panels = dict.fromkeys(p.panel for p in found if not p.argument)
    groups = [("Arguments", [p for p in found if p.argument])]
    groups += [(panel, [p for p in found if p.panel == panel and not p.argument]) for panel in panels]
    for title, group in groups:
        rows = [p for p in group if not set(p.names) & set(EVERYWHERE)]
        if rows:
            yield f"| {title} | |\n|---|---|"
            yield from (f"| {_spelled(p)} | {_said(p)} |" for p in rows)
            yield ""


def _spelled(parameter: Parameter) -> str:
    if parameter.argument:
        return code(parameter.metavar)
    names = ", ".join(code(name) for name in parameter.names)
    return f"{names} {code(parameter.metavar)}" if parameter.metavar else names


def _said(parameter: Parameter) -> str:
    parts = [escaped(parameter.help)]
    parts += ["Required."] if parameter.required else []
    parts += [f"Default: `{parameter.default}`."] if parameter.default else []
    return " ".join(part for part in parts if part) or "\u00a0"
