"""`onebase generate`: text that continues prompts, by several adapters side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from onebase.cli import options as o
from onebase.cli.failures import UsageError
from onebase.cli.output import Output


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Prompts, or - for stdin.")] = None,
    adapter: o.Adapters = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help=".csv, .tsv, .jsonl, .txt (a prompt per line), or -."),
    ] = None,
    prompt: o.PromptColumn = None,
    messages: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A .jsonl of conversations to continue, such as {'messages': [...]}."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Most new tokens.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens; otherwise the most probable ones.")] = False,
    temperature: Annotated[float | None, typer.Option(help="With --sample: below 1 is more cautious.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="With --sample: smallest set of this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, metavar="K", help="With --sample: the K most probable.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="With --sample: the same seed, the same text.")] = None,
    beams: Annotated[int, typer.Option(min=1, metavar="N", help="Beam search with N beams.")] = 1,
    number: Annotated[int, typer.Option("-n", min=1, metavar="N", help="Results per prompt.")] = 1,
    base: o.AdapterBase = None,
    batch_size: o.BatchSize = 16,
    device: o.Device = None,
    dtype: o.Dtype = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Continue prompts with stored adapters. The name "base" (the default) is the base without adapter.

    For an adapter that was trained on conversations a prompt is one turn of the user; --messages takes whole
    conversations.
    """
    from onebase.cli.bases import PLAIN, check_kinds, open_adapters
    from onebase.cli.texts import read_conversations, read_texts

    out = Output(as_json)
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    drawing = {key: value for key, value in drawing.items() if value is not None}
    if drawing and not sample:
        raise UsageError(f"--{next(iter(drawing)).replace('_', '-')} has no effect without --sample")
    if number > 1 and not sample and beams < number:
        raise UsageError(f"-n {number} needs --sample, or --beams {number} or more")
    if sample and beams > 1:
        raise UsageError("--sample and --beams exclude each other")
    refs = o.listed(adapter) or [PLAIN]
    check_kinds(refs, writes=True)
    trained_on = _columns(refs)
    given: list[Any]
    if messages is not None:
        if prompts or file is not None or prompt is not None:
            raise UsageError("--messages holds the prompts: leave out texts, --file and --prompt")
        given = read_conversations(messages)
    else:
        given = read_texts(prompts or [], file, text=prompt, trained_on=trained_on, role="prompt").texts
    loaded, routes = open_adapters(refs, base, device, dtype, out)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": sample, "num_beams": beams, **drawing}
    answers = _ask(loaded, routes, given, batch_size, settings, number)
    _show(loaded.id, given, answers, settings, out)


def _columns(refs: list[str]) -> dict[str, str]:
    from onebase.cli.bases import PLAIN
    from onebase.store import Store

    for ref in refs:
        if ref != PLAIN:
            return Store().resolve(ref).config.provenance.get("data", {}).get("columns", {})
    return {}


def _ask(
    base: Any,
    routes: dict[str, str | None],
    prompts: list[Any],
    batch_size: int,
    settings: dict[str, Any],
    number: int,
) -> dict[str, list[list[str]]]:
    """Return reference -> per prompt the generated texts; rows of all adapters share the batches."""
    names = [name for name in routes.values() for _ in prompts]
    many = prompts * len(routes)
    found: list[list[str]] = []
    for start in range(0, len(many), batch_size):
        part = slice(start, start + batch_size)
        texts = base.generate(many[part], adapter=names[part], num_return_sequences=number, **settings)
        found += texts if number > 1 else [[text] for text in texts]
    return {ref: found[i * len(prompts) : (i + 1) * len(prompts)] for i, ref in enumerate(routes)}


def _show(
    base: str, prompts: list[Any], answers: dict[str, list[list[str]]], settings: dict[str, Any], out: Output
) -> None:
    if out.as_json:
        rows = [
            {"prompt": prompt, "texts": {ref: found[i] for ref, found in answers.items()}}
            for i, prompt in enumerate(prompts)
        ]
        out.document({"base": base, "adapters": list(answers), "settings": settings, "rows": rows})
        return
    if len(prompts) == 1 and len(answers) == 1:
        for text in next(iter(answers.values()))[0]:
            out.line(text)
        return
    rows = []
    for i, prompt in enumerate(prompts):
        copies = len(next(iter(answers.values()))[i])
        prompt = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        rows += [[prompt if k == 0 else "", *(found[i][k] for found in answers.values())] for k in range(copies)]
    out.table(["prompt", *answers], rows)
