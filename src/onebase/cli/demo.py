"""`onebase demo`: a tour on the embedded base with data that comes along."""

from __future__ import annotations

from typing import Annotated

import typer

from onebase.cli import options as o
from onebase.cli.output import Output


def demo(
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", metavar="NAME", autocompletion=o.known_methods, help="Only these. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of splits, start and order.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Passes over the rows, at most.")] = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Train a few small adapters on the embedded base and compare them with it."""
    from onebase.cli.bases import quiet
    from onebase.demo import run_demo
    from onebase.methods.registry import split_methods

    out = Output(as_json)
    quiet()
    summary = run_demo(
        out.note if as_json else out.line, methods=split_methods(method or []) or None, seed=seed, epochs=epochs
    )
    if as_json:
        out.document(summary)
