"""`onebase compare`: which method for this data, measured under one budget, with a recommendation."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from onebase.cli import options as o
from onebase.cli.failures import UsageError
from onebase.cli.output import Output, metric_range, percent, size


def compare(
    data: Annotated[str, typer.Option("--data", "-d", metavar="PATH", help="A file, or a folder of splits.")],
    base: o.BaseName = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods", "-m", metavar="NAME", help="Repeatable, or with commas. Default: full and every method."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="KIND", rich_help_panel=o.DATA, help="Default: by columns.")
    ] = None,
    text: o.TextColumn = None,
    text_pair: o.TextPairColumn = None,
    label: o.LabelColumn = None,
    prompt: o.PromptColumn = None,
    completion: o.CompletionColumn = None,
    column: o.Columns = None,
    encoding: o.Encoding = None,
    delimiter: o.Delimiter = None,
    quote: o.Quote = None,
    sheet: o.Sheet = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each method.")] = 3,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The first of these seeds.")] = 0,
    budget: Annotated[str, typer.Option(metavar="TIME", help="Such as 90s, 15m, 2h.")] = "15m",
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Most rows of each split.")] = None,
    epochs: Annotated[int, typer.Option(min=1, metavar="N", help="Passes over the rows, at most.")] = 5,
    max_params: Annotated[str | None, typer.Option(metavar="SHARE", help="Such as 0.5%.")] = None,
    max_latency: Annotated[str | None, typer.Option(metavar="TIMES", help="Such as 1.1x.")] = None,
    tasks: Annotated[int, typer.Option(min=1, metavar="N", help="Tasks that share the base.")] = 1,
    must_merge: Annotated[bool, typer.Option("--must-merge", help="Only what can become weights.")] = False,
    folder: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where records go.")] = Path("comparison"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the records in the folder.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Train each candidate as a task on Ray's workers.")] = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Compare methods on data: equal tries, equal rows, seeds, the test rows once, and a recommendation."""
    from onebase.cli.bases import open_base
    from onebase.comparison.advice import Limits
    from onebase.comparison.running import compare as run
    from onebase.comparison.running import document
    from onebase.methods.registry import split_methods

    out = Output(as_json)
    limits = Limits(max_share=share(max_params), max_slowdown=times(max_latency), must_merge=must_merge, tasks=tasks)
    seconds = duration(budget)
    with open_base(base or o.default_base(), device, dtype, out) as opened:
        found = run(opened, data, folder=folder, methods=split_methods(methods or []), seeds=seeds, seed=seed,
                    budget=seconds, limits=limits, resume=resume, say=out.note, epochs=epochs, limit=limit,
                    command=shlex.join(["onebase", *sys.argv[1:]]), ray=ray, task=task, text=text,
                    text_pair=text_pair, label=label, prompt=prompt, completion=completion,
                    columns=o.roles_of(column) or None, encoding=encoding, delimiter=delimiter, quote=quote,
                    sheet=sheet)  # fmt: skip
    (folder / "comparison.json").write_text(json.dumps(document(found), indent=1), encoding="utf-8")
    if as_json:
        out.document(document(found))
        return
    total = f"{tasks} task{'s' if tasks > 1 else ''}"
    columns = ["method", found.metric, "trained", "file", total, "train", "latency", "merges"]
    rows = [
        [r.method, metric_range(found.metric, r.value, (r.low, r.high)), percent(r.share, 2), size(r.bytes),
         size(tasks * r.bytes), f"{r.seconds:.0f} s", f"{r.slowdown:.2f}x", "yes" if r.mergeable else "no"]
        for r in found.results
    ]  # fmt: skip
    out.table(columns, rows, columns[2:7])
    out.line()
    out.line(f"Recommended: {found.advice.method or 'nothing'}"
             + (f"; runner-up: {found.advice.runner_up}" if found.advice.runner_up else ""))  # fmt: skip
    for sentence in (*found.advice.reasons, *found.cut):
        out.line(f"  {sentence}")


def duration(text: str) -> float:
    """Read ``90s``, ``15m`` or ``2h`` as seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h)", text.strip())
    if not found or float(found[1]) == 0:
        raise UsageError(f"--budget {text!r}: expected a time such as 90s, 15m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[found[2]]


def share(text: str | None) -> float | None:
    """Read ``0.5%`` or ``0.005`` as 0.005."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d*\.?\d+)(%?)", text.strip())
    value = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < value <= 1:
        raise UsageError(f"--max-params {text!r}: expected a share of the base's values such as 0.5% or 0.005")
    return value


def times(text: str | None) -> float | None:
    """Read ``1.1x`` or ``1.1`` as 1.1."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d*\.?\d+)x?", text.strip())
    if not found or float(found[1]) == 0:
        raise UsageError(f"--max-latency {text!r}: expected how many times the base's time, such as 1.1x")
    return float(found[1])
