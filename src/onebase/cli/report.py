"""`onebase report`: a comparison as one HTML file, with JSON and CSV beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from onebase.cli import options as o
from onebase.cli.failures import UsageError
from onebase.cli.output import Output


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that onebase compare wrote.")],
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Write report.html, report.json and report.csv into each folder of a comparison."""
    from onebase.comparison.report import write_report

    out = Output(as_json)
    missing = [str(run) for run in runs if not (run / "comparison.json").is_file()]
    if missing:
        raise UsageError(f"no comparison.json in {', '.join(missing)}: pass folders that onebase compare wrote")
    written = [
        str(write_report(json.loads((run / "comparison.json").read_text(encoding="utf-8")), run)) for run in runs
    ]
    if as_json:
        out.document({"reports": written})
        return
    for path in written:
        out.line(path)
