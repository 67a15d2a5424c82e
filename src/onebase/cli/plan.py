"""`onebase plan`: what each method would cost on a base, before anything is downloaded or trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options as o
from onebase.cli.output import Output, aligned, percent, size

if TYPE_CHECKING:
    from onebase.comparison.planning import Cost, Plan


def plan(
    base: o.BaseName = None,
    tasks: Annotated[int, typer.Option(min=1, metavar="N", help="Tasks that share the base.")] = 1,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="NAME",
            autocompletion=o.known_methods,
            help="Repeatable, or with commas. Default: all.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Rows of an optimizer step.")] = 32,
    length: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a row.")] = 128,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Say what each method costs on a base: parameters, files, memory, time. Reads the base's config, no weights."""
    from onebase.cli.bases import quiet
    from onebase.comparison.planning import plan as make_plan
    from onebase.methods.registry import split_methods

    out = Output(as_json)
    quiet()
    name = base or o.default_base()
    out.note(f"planning for {name}: every method is measured for a moment")
    found = make_plan(name, tasks=tasks, methods=split_methods(method or []), batch=batch_size, length=length)
    if as_json:
        out.document(found)
        return
    show(found, out)


def show(found: Plan, out: Output) -> None:
    """Print a plan as a table."""
    facts = [
        ("base", f"{found.base}: {found.values / 1e6:,.1f} M parameters, {found.layers} layers, width {found.width}"),
        ("training", f"{found.batch} rows of {found.length} tokens a step, on this machine"),
        ("disk", f"{found.tasks} task{'s' if found.tasks > 1 else ''}: one base and a file each, or a model each"),
        ("memory", "of a training process beyond its imports, scoring included"),
    ]
    for line in aligned(facts):
        out.line(line)
    out.line()
    columns = ["method", "trained", "share", "file", f"disk, {found.tasks} tasks", "memory to train",
               "memory to serve", "1,000 rows", "merges"]  # fmt: skip
    out.table(columns, [_row(c) for c in found.costs], columns[1:8], ("merges", "share", "file"))
    for cost in found.costs:
        if cost.refused:
            out.line(f"{cost.method}: not on this base: {cost.refused}")
    for note in found.notes:
        out.note(note)


def _row(cost: Cost) -> list[Any]:
    if cost.refused:
        return [cost.method, *[None] * 8]
    return [
        cost.method, f"{cost.parameters:,}", percent(cost.share, 2), size(cost.file), size(cost.total),
        "-" if cost.training is None else size(cost.training), size(cost.serving),
        "-" if cost.seconds_per_1000 is None else f"{cost.seconds_per_1000:.0f} s", "yes" if cost.mergeable else "no",
    ]  # fmt: skip
