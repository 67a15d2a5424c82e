"""`onebase eval`: a stored adapter's score on data, with its base's beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options as o
from onebase.cli.failures import UsageError
from onebase.cli.output import Output, aligned, count, metric_range, metric_value, percent

if TYPE_CHECKING:
    from onebase.evaluation import Evaluation
    from onebase.tasks import Scores

SPLITS = ("train", "validation", "test")


def evaluate(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=o.stored_names, help="name or name@version.")],
    data: Annotated[
        str, typer.Option("--data", "-d", metavar="PATH", help="A file, scored whole, or a folder of splits.")
    ],
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a folder: train, validation or test (the default).")
    ] = None,
    text: o.TextColumn = None,
    text_pair: o.TextPairColumn = None,
    label: o.LabelColumns = None,
    prompt: o.PromptColumn = None,
    completion: o.CompletionColumn = None,
    column: o.Columns = None,
    encoding: o.Encoding = None,
    delimiter: o.Delimiter = None,
    quote: o.Quote = None,
    sheet: o.Sheet = None,
    base: o.AdapterBase = None,
    batch_size: o.BatchSize = 64,
    generate: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="seq2seq: also write N rows; exact match and chrF. Default: as trained."),
    ] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Score a stored adapter on data, beside its base, with 95 % intervals and a paired test."""
    from onebase.cli.bases import open_adapters
    from onebase.cli.failures import misspelt
    from onebase.data import load
    from onebase.store import Store

    out = Output(as_json)
    if split is not None and split not in SPLITS:
        raise misspelt("--split", split, SPLITS)
    task = Store().resolve(name).config.task
    if task.get("kind") == "features":
        raise UsageError(f"adapter {name!r} gives embeddings and has no head to score")
    found = load(
        data,
        task=task["kind"],
        text=text,
        text_pair=text_pair,
        label=label or None,
        prompt=prompt,
        completion=completion,
        columns=o.roles_of(column),
        encoding=encoding,
        delimiter=delimiter,
        quote=quote,
        sheet=sheet,
        whole=True,
    )
    if found.given == ("train",) and split is not None:
        raise UsageError(f"--split {split} has no meaning for {found.source}: one file is scored whole")
    loaded, routes = open_adapters([name], base, device, dtype, out)
    from onebase.evaluation import evaluate as evaluate_adapter

    adapter = routes[name]
    assert adapter is not None
    result = evaluate_adapter(loaded, found, adapter, split=split, batch_size=batch_size, generate=generate)
    _show(name, found.source, loaded.adapters[adapter].ref, result, out)


def _show(name: str, source: str, ref: str, result: Evaluation, out: Output) -> None:
    from onebase.cli.result import beside

    if out.as_json:
        out.document(as_document(ref or name, source, result))
        return
    metric = result.adapter.metric
    rows = count(result.rows, "row") + ("" if result.split == "all" else f" of {result.split}")
    pairs = [("adapter", ref or name), ("scored on", f"{rows}, {source}; {metric}")]
    if result.base is not None:
        pairs.append(("base", metric_range(metric, result.base.value, result.base.interval)))
    else:
        pairs.append(("base", "no score: this adapter was stored without the base's own head"))
    pairs.append(("with adapter", metric_range(metric, result.adapter.value, result.adapter.interval)))
    if result.test is not None:
        pairs.append(("difference", result.test.sentence()))
    pairs += beside(result.adapter.metrics, None if result.base is None else result.base.metrics)
    if "macro_f1" in result.adapter.metrics:
        pairs.append(("macro F1", metric_value("macro_f1", result.adapter.metrics["macro_f1"])))
    for line in aligned(pairs):
        out.line(line)
    per_label = result.adapter.metrics.get("per_label")
    if per_label:
        out.line()
        columns = ("label", "precision", "recall", "f1", "rows")
        cells = [
            [name, *(percent(m[k]) for k in ("precision", "recall", "f1")), m["support"]]
            for name, m in per_label.items()
        ]
        out.table(columns, cells, right=columns[1:])


def as_document(ref: str, source: str, result: Evaluation) -> dict[str, Any]:
    """Return an evaluation as JSON values."""
    from onebase.cli.result import test_document

    return {
        "adapter": ref,
        "data": source,
        "split": result.split,
        "rows": result.rows,
        "metric": result.adapter.metric,
        "adapter_score": _scores(result.adapter),
        "base_score": None if result.base is None else _scores(result.base),
        "test": None if result.test is None else test_document(result.test),
    }


def _scores(scores: Scores) -> dict[str, Any]:
    return {"value": scores.value, "interval": scores.interval, "metrics": scores.metrics}
