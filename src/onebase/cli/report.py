"""`onebase report`: comparisons and training runs as one HTML file, with JSON and CSV beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onebase.cli import options as o
from onebase.cli.failures import UsageError
from onebase.cli.output import Output


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of onebase compare, or adapters that were trained here."),
    ],
    folder: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where. Default: the run's own; report for several.")
    ] = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Write report.html, report.json and report.csv: of one run into its folder, of several together."""
    from onebase.comparison.report import RECORDS, read_record, write_report

    out = Output(as_json)
    folders = [_folder(run) for run in runs]
    missing = [run for run, place in zip(runs, folders) if not any((place / name).is_file() for name in RECORDS)]
    if missing:
        raise UsageError(f"no comparison.json or run.json in {', '.join(missing)}: pass folders that onebase compare "
                         "wrote, or adapters that onebase train stored here")  # fmt: skip
    found = [read_record(place) for place in folders]
    where = folder or (folders[0] if len(folders) == 1 else Path("report"))
    written = str(write_report(found[0] if len(found) == 1 else found, where))
    if as_json:
        out.document({"reports": [written]})
        return
    out.line(written)


def _folder(run: str) -> Path:
    """Return the folder of a run: a path, or where `onebase train` keeps the report of a stored adapter."""
    if Path(run).is_dir():
        return Path(run)
    from onebase.errors import OnebaseError
    from onebase.store import Store

    try:
        return report_folder(Store().resolve(run).ref)
    except OnebaseError:
        return Path(run)


def report_folder(ref: str) -> Path:
    """Return where the report of a stored version goes: beside the store's adapters, whose digests cover every file."""
    from onebase.store import Store

    return Store().root / "reports" / ref
