"""`onebase check`: what a data set holds, what is doubtful in it, and whether training would take it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options as o
from onebase.cli.failures import UsageError
from onebase.cli.output import Output, aligned, count, percent, plain, shorten

if TYPE_CHECKING:
    from onebase.data import Data
    from onebase.data.findings import Findings, Spread

LABELS_SHOWN, PROBLEMS_SHOWN = 20, 50


def check(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="A file, a folder of splits, or a data set of the hub: owner/name.")
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", "-b", metavar="NAME", help="Also count tokens of this base, and what would be cut."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="KIND", rich_help_panel=o.DATA, help="Kind of data. Default: by columns.")
    ] = None,
    text: o.TextColumn = None,
    text_pair: o.TextPairColumn = None,
    label: o.LabelColumns = None,
    prompt: o.PromptColumn = None,
    completion: o.CompletionColumn = None,
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", rich_help_panel=o.DATA, help="Column of any role. Repeatable."),
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", rich_help_panel=o.DATA, help="Equal values stay on one side of splits."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", rich_help_panel=o.DATA, help="Most rows of each split.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", rich_help_panel=o.DATA, help="Of the splits.")] = 0,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", rich_help_panel=o.DATA, help="Tokens per row, at most.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(metavar="TEXT", rich_help_panel=o.DATA, help="Such as 'Review: {text}'.")
    ] = None,
    encoding: o.Encoding = None,
    delimiter: o.Delimiter = None,
    quote: o.Quote = None,
    sheet: o.Sheet = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Show rows, labels, lengths, repeats and leaks of data; exit with 1 where training would refuse it."""
    from onebase.data import load
    from onebase.data.findings import find
    from onebase.errors import ConfigError, DataError, OnebaseError

    if base is None and (max_length is not None or template is not None):
        raise UsageError("--max-length and --template need a tokenizer: pass --base")
    out = Output(as_json)
    try:
        found = load(
            data, task=task, text=text, text_pair=text_pair, label=label or None, prompt=prompt, completion=completion,
            columns=_columns(column), group=group, seed=seed, limit=limit, encoding=encoding, delimiter=delimiter,
            quote=quote, sheet=sheet,
        )  # fmt: skip
    except DataError as error:
        _show_refused(data, error, out)
        raise typer.Exit(1) from None
    findings = find(found)
    tokens: dict[str, Any] | None = None
    refusal = None
    if base is not None:
        from onebase.cli.check_tokens import look

        try:
            tokens = look(base, found, max_length, template)
        except ConfigError:
            raise
        except OnebaseError as error:
            refusal = str(error)
    document = _document(found, findings, tokens, refusal)
    if as_json:
        out.document(document)
    else:
        _show(document, found, findings, out)
    if refusal is not None:
        raise typer.Exit(1)


def _columns(given: list[str] | None) -> dict[str, str | list[str]] | None:
    """Return role -> columns of repeated ROLE=NAME; a role named again has several columns."""
    found: dict[str, list[str]] = {}
    for text in given or ():
        role, equals, name = text.partition("=")
        if not equals or not role.strip() or not name:
            raise UsageError(f"--column {text!r}: expected ROLE=NAME, such as question=frage")
        found.setdefault(role.strip().replace("-", "_"), []).append(name)
    return {role: names[0] if len(names) == 1 else names for role, names in found.items()} or None


def _show_refused(source: str, error: Any, out: Output) -> None:
    if out.as_json:
        problems = [{"what": what, "where": where} for what, where in error.problems]
        out.document({"source": source, "ready": False, "refused": str(error), "problems": problems})
        return
    shown = [where for _, where in error.problems[:PROBLEMS_SHOWN]]
    lines = str(error).splitlines()
    out.line(lines[0] if shown else str(error))
    for where in shown:
        out.line(f"  {where}")
    if len(error.problems) > len(shown):
        out.line("  and more: --json lists them")
    out.line()
    out.line("verdict: training would refuse this data")


def _document(data: Data, findings: Findings, tokens: dict[str, Any] | None, refusal: str | None) -> dict[str, Any]:
    return {
        "source": data.source,
        "ready": refusal is None,
        "refused": refusal,
        "problems": [],
        "kind": data.kind,
        "columns": data.columns,
        "classes": data.labels,
        "digest": data.digest,
        "splits_made": data.splits_made,
        **plain(findings),
        "notes": data.notes,
        "tokens": tokens,
        "samples": tokens["samples"] if tokens is not None else _samples(data),
    }


def _samples(data: Data) -> list[dict[str, Any]]:
    """Return the first rows of train by role, where no base says how it reads them."""
    return [
        {"place": data.train.place(i), "roles": {role: plain(value) for role, value in data.train.row(i).items()}}
        for i in range(min(3, len(data.train)))
    ]


def _show(document: Mapping[str, Any], data: Data, findings: Findings, out: Output) -> None:
    columns = ", ".join(f"{role} = {column!r}" for role, column in data.columns.items()) or "plain text"
    for line in aligned([("data", f"{data.source}: {data.kind}"), ("columns", columns)]):
        out.line(line)
    out.line()
    _show_splits(document, findings, out)
    _show_labels(data, findings, out)
    for note in data.notes:
        out.line(f"note: {note}")
    for warning in findings.warnings:
        out.line(f"warning: {warning}")
    if document["tokens"] is not None:
        for line in document["tokens"]["said"]:
            out.line(line)
    for number, sample in enumerate(document["samples"], 1):
        out.line()
        out.line(f"sample {number}  {sample['place']}" + (f"  {sample['tokens']} tokens" if "tokens" in sample else ""))
        for role, value in sample.get("roles", {}).items():
            out.line(f"  {role}: {shorten(value if isinstance(value, str) else repr(value), 300)}")
        if "rendered" in sample:
            out.line(f"  {shorten(sample['rendered'], 400)}")
            if sample["target"]:
                out.line(f"  target: {shorten(sample['target'], 200)}")
    out.line()
    if document["refused"] is not None:
        out.line(f"verdict: training would refuse this data: {document['refused']}")
    else:
        warned = f", with {count(len(findings.warnings), 'warning')}" if findings.warnings else ""
        learn = f"training on {document['tokens']['base']} can start" if document["tokens"] else "it can be read"
        out.line(f"verdict: {data.kind} data, {learn}{warned}")
        if document["tokens"] is None:
            out.note("To count tokens and see whether a base can learn it: onebase check DATA --base NAME")


def _show_splits(document: Mapping[str, Any], findings: Findings, out: Output) -> None:
    tokens = document["tokens"]
    columns = ["split", "rows", "words (median, 95 %, most)", "repeated", "also in train"]
    columns += ["tokens (median, 95 %, most)", "cut"] if tokens else []
    rows = []
    for split, number in findings.rows.items():
        words, repeats, leaks = findings.words.get(split), findings.repeats.get(split), findings.leaks.get(split)
        row = [split, f"{number:,}", _lengths(words), repeats and f"{repeats.normalised:,}"]
        row.append(leaks and f"{leaks.normalised:,}")
        if tokens:
            found = tokens["splits"].get(split)
            row += [found and _lengths(found["lengths"]), found and f"{found['cut']:,}"]
        rows.append(row)
    out.table(columns, rows, right=columns[1:])


def _lengths(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:,}, {spread.p95:,}, {spread.longest:,}"


def _show_labels(data: Data, findings: Findings, out: Output) -> None:
    for split, (low, mean, high) in findings.scores.items():
        out.line(f"{split}: values {low:g} to {high:g}, mean {mean:.3g}")
    if not findings.labels:
        return
    splits = [split for split in findings.rows if split in findings.labels]
    names = list(findings.labels["train"])
    total = sum(findings.labels["train"].values())
    rows = [
        [
            name,
            *(f"{findings.labels[split].get(name, 0):,}" for split in splits),
            percent(findings.labels["train"][name] / total),
        ]
        for name in names[:LABELS_SHOWN]
    ]
    out.line()
    out.table(["label", *splits, "of train"], rows, right=[*splits, "of train"])
    if len(names) > LABELS_SHOWN:
        out.line(f"and {len(names) - LABELS_SHOWN} more labels, each with fewer rows (--json lists them)")
    out.line()
