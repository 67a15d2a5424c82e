"""`onebase predict`: labels for texts, by several adapters side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options as o
from onebase.cli.failures import UsageError
from onebase.cli.output import Output, count, percent, plain, shorten

if TYPE_CHECKING:
    from onebase.base import Base, Prediction
    from onebase.cli.texts import Texts

WIDTH = 60  # characters of a text in a table


def predict(
    texts: Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts, or - for stdin.")] = None,
    adapter: o.Adapters = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help=".csv, .tsv, .jsonl, .txt (a text per line), -.")
    ] = None,
    text: o.TextColumn = None,
    text_pair: o.TextPairColumn = None,
    pair: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Second text of a pair; one for each TEXT.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="sentences or paragraphs: cut one document, list the flagged passages."),
    ] = None,
    flag: Annotated[
        list[str] | None,
        typer.Option(metavar="LABEL", help="With --split: a label that counts as flagged. Repeatable."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="With --split: least probability of a flag. Default: 0.5.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write a .csv or .jsonl instead of a table.")
    ] = None,
    base: o.AdapterBase = None,
    batch_size: o.BatchSize = 32,
    device: o.Device = None,
    dtype: o.Dtype = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Label texts with stored adapters, in one mixed batch; answer questions (TEXT) from contexts (--pair).

    Texts come from the command line, from --file, or from standard input (one per line). The name "base" stands for
    the base without adapter; it gives embeddings, as adapters for embeddings do, with --json or --out FILE.jsonl.
    """
    out = Output(as_json)
    refs = o.listed(adapter)
    _check_usage(refs, split, flag, threshold, write, as_json)
    _check_out(write, file)
    if split is not None:
        from onebase.cli.passages import predict_passages

        _check_document(texts, text, text_pair, pair)
        found = predict_passages(texts, file, refs, split, flag or [], threshold, base, device, dtype, batch_size, out)
        found.show(out, write)
        return
    from onebase.cli.bases import open_adapters

    given = _read(refs, texts or [], file, text, text_pair, pair or [])
    loaded, routes = open_adapters(refs, base, device, dtype, out)
    answers = ask(loaded, routes, given.texts, given.pairs, batch_size)
    _say_cut(answers, out)
    _show(loaded, given, answers, write, out)


def ask(
    base: Base, routes: dict[str, str | None], texts: Sequence[str], pairs: Sequence[str] | None, batch_size: int
) -> dict[str, list[Prediction]]:
    """Ask every adapter about every text, in mixed batches.

    Returns:
        reference -> n predictions.
    """
    names = [name for name in routes.values() for _ in texts]
    many, second = list(texts) * len(routes), None if pairs is None else list(pairs) * len(routes)
    found = base.predict(many, adapter=names, pairs=second, batch_size=batch_size)
    return {ref: found[i * len(texts) : (i + 1) * len(texts)] for i, ref in enumerate(routes)}


def _check_usage(
    refs: list[str],
    split: str | None,
    flag: list[str] | None,
    threshold: float | None,
    write: Path | None,
    as_json: bool,
) -> None:
    from onebase.cli.bases import PLAIN, check_kinds
    from onebase.store import Store
    from onebase.tasks import get_task

    if not refs:
        raise UsageError("predict needs an adapter: pass -a NAME (see: onebase ls)")
    for option, value in (("--flag", flag), ("--threshold", threshold)):
        if value is not None and split is None:
            raise UsageError(f"{option} has no meaning without --split")
    if write is not None and write.suffix.lower() not in (".csv", ".jsonl"):
        raise UsageError(f"--out {write}: expected a name that ends in .csv or .jsonl")
    embeds = as_json if write is None else write.suffix.lower() == ".jsonl"
    if PLAIN in refs and (split is not None or not embeds):
        raise UsageError("the base alone gives embeddings, no labels: ask for them with --json or --out FILE.jsonl")
    check_kinds(refs, writes=False)
    for ref in refs:
        kind = "features" if ref == PLAIN else Store().resolve(ref).config.task["kind"]
        if get_task(kind).embeds and (split is not None or not embeds):
            raise UsageError(f"adapter {ref!r} gives embeddings, no labels: ask with --json or --out FILE.jsonl")


def _check_out(write: Path | None, file: Path | None) -> None:
    """Refuse a file that cannot be written, or that is the input, before anything is loaded."""
    if write is None:
        return
    if write.is_dir():
        raise UsageError(f"--out {write}: a folder of this name is there; expected a file")
    if not write.parent.is_dir():
        raise UsageError(f"--out {write}: no folder {str(write.parent)!r}; make it first, or pass another place")
    if file is not None and file.resolve() == write.resolve():
        raise UsageError(f"--out {write} is the input, which would be overwritten: pass another name")


def _check_document(texts: list[str] | None, text: str | None, text_pair: str | None, pair: list[str] | None) -> None:
    if text or text_pair or pair:
        raise UsageError("--split takes one document: --text, --text-pair and --pair have no meaning with it")
    if texts and len(texts) > 1:
        raise UsageError(f"--split takes one document, but {len(texts)} texts are given")


def _read(
    refs: list[str], texts: list[str], file: Path | None, text: str | None, text_pair: str | None, pair: list[str]
) -> Texts:
    from onebase.cli.bases import PLAIN
    from onebase.cli.texts import read_texts
    from onebase.store import Store

    store = Store()
    configs = [store.resolve(ref).config for ref in refs if ref != PLAIN]
    trained_on = dict(configs[0].provenance.get("data", {}).get("columns", {}) if configs else {})
    for role, others in (("text", ("query", "question")), ("text_pair", ("document", "context"))):
        for other in others:
            if other in trained_on:
                trained_on[role] = trained_on[other]
    wants_pair = any(config.task.get("pair") for config in configs)
    return read_texts(
        texts, file, text=text, text_pair=text_pair, pair=pair, trained_on=trained_on, wants_pair=wants_pair
    )


def _say_cut(answers: dict[str, list[Prediction]], out: Output) -> None:
    for ref, predictions in answers.items():
        cut = sum(p.cut > 0 for p in predictions)
        if cut:
            out.note(f"{ref}: {count(cut, 'text')} longer than the adapter reads, and cut; see --split")


def _show(base: Base, given: Texts, answers: dict[str, list[Prediction]], write: Path | None, out: Output) -> None:
    if write is not None:
        _write(write, given, answers)
        out.note(f"wrote {count(len(given.texts), 'row')} to {write}")
    if out.as_json:
        out.document({"base": base.id, "adapters": list(answers), **_summary(write, given, answers)})
        return
    if write is not None:
        for ref, predictions in answers.items():
            counts = _counts(predictions)
            out.line(f"{ref}: " + ", ".join(f"{label} {number}" for label, number in counts.items()))
        return
    columns = ["text", *(["second text"] if given.pairs else [])]
    sure = {ref: any(_said(p)[1] for p in predictions) for ref, predictions in answers.items()}
    for ref in answers:
        columns += [ref, f"p({ref})"] if sure[ref] else [ref]
    rows = []
    for i, text in enumerate(given.texts):
        row: list[Any] = [shorten(text, WIDTH), *([shorten(given.pairs[i], WIDTH)] if given.pairs else [])]
        for ref, predictions in answers.items():
            row += _said(predictions[i])[: 1 + sure[ref]]
        rows.append(row)
    out.table(columns, rows, right=[f"p({ref})" for ref in answers])


def _summary(write: Path | None, given: Texts, answers: dict[str, list[Prediction]]) -> dict[str, Any]:
    """Return every row, or only counts where the rows went to a file."""
    if write is None:
        return {"rows": [_row(given, answers, i) for i in range(len(given.texts))]}
    return {"out": write, "rows": len(given.texts), "counts": {ref: _counts(found) for ref, found in answers.items()}}


def _row(given: Texts, answers: dict[str, list[Prediction]], i: int) -> dict[str, Any]:
    row: dict[str, Any] = {"text": given.texts[i]} | ({"pair": given.pairs[i]} if given.pairs else {})
    return row | {"predictions": {ref: _answer(found[i]) for ref, found in answers.items()}}


def _said(best: Prediction) -> list[str]:
    """Return an answer and its probability as people read them."""
    if best.spans is not None:
        entities = any(span.label and span.text for span in best.spans)
        shown = best.spans if entities else best.spans[:1]
        words = [f"{s.text} ({s.label})" if s.label and s.text else s.text or f"({s.label})" for s in shown]
        return [", ".join(words) or "(nothing)", ", ".join(percent(span.probability) for span in shown)]
    if best.label is not None:
        return [best.label, percent(best.probabilities[best.label])]
    if best.labels is not None:
        return [", ".join(best.labels) or "(none)", ", ".join(percent(best.probabilities[x]) for x in best.labels)]
    if best.value is not None:
        return [f"{best.value:.4g}", ""]
    return ["(embedding)", ""]


def _answer(prediction: Prediction) -> dict[str, Any]:
    return prediction.facts()


def _counts(predictions: list[Prediction]) -> dict[str, int]:
    from collections import Counter

    found: Counter[str] = Counter()
    for p in predictions:
        if p.spans is not None and any(span.label and span.text for span in p.spans):  # entities, by what they are
            found.update(span.label for span in p.spans)
        elif p.spans is not None:  # answers: only the best one counts
            found[(p.spans[0].label or "answer") if p.spans else "nothing"] += 1
        elif p.labels is not None:
            found.update(p.labels or ["(none)"])
        else:
            found[p.label or ("value" if p.value is not None else "embedding")] += 1
    return dict(found.most_common())


def _cells(best: Prediction) -> dict[str, Any]:
    """Return an answer as cells of a table: label and probability, every label, the number, or the spans as JSON."""
    import json

    if best.spans is not None:
        return {"spans": json.dumps(plain(best.spans), ensure_ascii=False)}
    if best.labels is not None:
        chances = {f"p({label})": f"{chance:.6f}" for label, chance in best.probabilities.items()}
        return {"labels": "|".join(best.labels), **chances}
    if best.value is not None:
        return {"value": f"{best.value:.6g}"}
    return {
        "label": best.label,
        "probability": "" if best.label is None else f"{best.probabilities[best.label]:.6f}",
    }


def _write(path: Path, given: Texts, answers: dict[str, list[Prediction]]) -> None:
    """Write one line per text: the columns of the input file, then label and probability by adapter."""
    import csv
    import json

    own = given.columns or {"text": given.texts, **({"pair": given.pairs} if given.pairs else {})}
    rows = [{name: values[i] for name, values in own.items()} for i in range(len(given.texts))]
    with path.open("w", encoding="utf-8", newline="", errors="backslashreplace") as stream:
        if path.suffix.lower() == ".jsonl":
            for i, row in enumerate(rows):
                answer = {ref: _answer(found[i]) for ref, found in answers.items()}
                stream.write(json.dumps(plain({**row, "predictions": answer}), ensure_ascii=False) + "\n")
            return
        for ref, found in answers.items():
            for row, best in zip(rows, found):
                row |= {f"{ref}.{name}": value for name, value in _cells(best).items()}
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
