"""Options that several commands share, each declared once."""

from __future__ import annotations

import os
import warnings
from typing import Annotated

import typer

BASE_VARIABLE = "ONEBASE_BASE"
DEFAULT_BASE = "minilm"


def stored_names(incomplete: str) -> list[str]:
    """Complete the name of a stored adapter."""
    from onebase.store import Store

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {stored.name for stored in Store().list()}
    return sorted(name for name in names if name.startswith(incomplete))


def known_methods(incomplete: str) -> list[str]:
    """Complete the name of a method."""
    from onebase.methods.registry import method_names

    return [name for name in method_names() if name.startswith(incomplete)]


def default_base() -> str:
    """Return the base that is used when none is named."""
    return os.environ.get(BASE_VARIABLE) or DEFAULT_BASE


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

BaseName = Annotated[
    str | None,
    typer.Option(
        "--base",
        "-b",
        metavar="NAME",
        help=f"Folder or hub id of the base model. Default: ${BASE_VARIABLE}, else the embedded {DEFAULT_BASE}.",
    ),
]
AdapterBase = Annotated[
    str | None,
    typer.Option(
        "--base", "-b", metavar="NAME", help="Folder or hub id of the base. Default: the one the adapter names."
    ),
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps. Default: a GPU if any.")]
Dtype = Annotated[str | None, typer.Option(metavar="NAME", help="Of the base: float32, bfloat16 or float16.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        "-a",
        metavar="NAME",
        autocompletion=stored_names,
        help="Stored adapter: name, name@version or folder. Repeat it, or list several with commas.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="Rows per forward.")]

Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME",
        help="Also report to tensorboard, wandb or mlflow. Repeatable.",
        rich_help_panel="Training",
    ),
]

DATA, TRAINING, RESULT = "Data", "Training", "Result"
TextColumn = Annotated[
    str | None, typer.Option("--text", metavar="COLUMN", rich_help_panel=DATA, help="Column of the text.")
]
TextPairColumn = Annotated[
    str | None, typer.Option("--text-pair", metavar="COLUMN", rich_help_panel=DATA, help="Column of the second text.")
]
LabelColumn = Annotated[
    str | None, typer.Option("--label", metavar="COLUMN", rich_help_panel=DATA, help="Column of the label.")
]
LabelColumns = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="COLUMN", rich_help_panel=DATA, help="Of the label; repeat for 0/1 columns."),
]
PromptColumn = Annotated[
    str | None, typer.Option("--prompt", metavar="COLUMN", rich_help_panel=DATA, help="Column of the prompt.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="ROLE=NAME", rich_help_panel=DATA, help="Column of any role: score=rating. Repeatable."
    ),
]
FILES = "Files"
Encoding = Annotated[
    str | None,
    typer.Option("--encoding", metavar="NAME", rich_help_panel=FILES, help="Such as cp1252. Default: UTF-8."),
]
Delimiter = Annotated[
    str | None,
    typer.Option("--delimiter", metavar="CHAR", rich_help_panel=FILES, help="Of CSV: comma, tab, semicolon, ..."),
]
Quote = Annotated[
    str | None, typer.Option("--quote", metavar="CHAR", rich_help_panel=FILES, help="Of CSV: double, single or none.")
]
Sheet = Annotated[str | None, typer.Option("--sheet", metavar="NAME", rich_help_panel=FILES, help="Of a workbook.")]
CompletionColumn = Annotated[
    str | None, typer.Option("--completion", metavar="COLUMN", rich_help_panel=DATA, help="Column of the completion.")
]


def listed(names: list[str] | None) -> list[str]:
    """Return names from repeated or comma-separated options, each once, in order."""
    parts = [part.strip() for name in names or () for part in name.split(",")]
    return list(dict.fromkeys(part for part in parts if part))


def roles_of(columns: list[str] | None) -> dict[str, str | list[str]]:
    """Read ``role=name`` texts; labels named again have several columns, of 0 and 1.

    Raises:
        UsageError: not of this form, an unknown role, or two columns for a role that has one.
    """
    from onebase.cli.failures import UsageError, misspelt
    from onebase.data.kinds import ROLES

    found: dict[str, list[str]] = {}
    for text in columns or []:
        role, equals, name = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--column {text!r}: expected ROLE=NAME, such as score=rating")
        if role not in ROLES:
            raise misspelt("role in --column", role, ROLES)
        if role in found and role != "labels":
            raise UsageError(f"--column {role} is given twice: {found[role][0]!r} and {name!r}; expected one column")
        found.setdefault(role, []).append(name)
    return {role: names[0] if len(names) == 1 else names for role, names in found.items()}
