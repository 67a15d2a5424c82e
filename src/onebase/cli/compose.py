"""`onebase compose`: several stored adapters as one, stored as a small file that names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from onebase.cli import options as o
from onebase.cli.output import Output, aligned

if TYPE_CHECKING:
    from onebase.compose import Composition


def compose(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the composition, in the store.")],
    composition: Annotated[
        str,
        typer.Argument(
            metavar="COMPOSITION",
            help='Such as "stack(fr, sentiment)", "combine(a@2, b, weights=[.7, .3], how=\'ties\', density=.5)" or '
            '"average(a, b)".',
        ),
    ],
    base: o.AdapterBase = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Store a composition of stored adapters, which is loaded and used like any adapter."""
    from onebase.cli.bases import open_adapters
    from onebase.compose import parse
    from onebase.errors import ConfigError
    from onebase.store import Store

    out = Output(as_json)
    wanted = parse(composition)
    if wanted.trained is not None:
        raise ConfigError(
            f"{wanted.shorthand()} has to be trained, which is done in Python: onebase.train(base, data, method=...)"
        )
    Store().check(name)
    refs = names(wanted)
    loaded, _ = open_adapters(refs, base, device, dtype, out)
    inside = name if name not in refs else f"{name} (composed)"
    adapter = loaded.add(inside, wanted)
    stored = loaded.save(inside, as_name=name)
    error, lead = getattr(adapter.module, "facts", {}).get("error"), adapter.method.lead()  # type: ignore[attr-defined]
    if as_json:
        facts = {"ref": stored.ref, "path": stored.path, "composition": wanted.shorthand(), "error": error}
        out.document({**facts, "answers_as": lead.name, "labels": list(adapter.labels)})
        return
    pairs = [("composed", stored.ref), ("of", wanted.shorthand()), ("base", loaded.id)]
    kind = f"{lead.name} does, {adapter.task['kind']}"
    pairs.append(("answers", f"as {kind}" + (f" with labels {', '.join(adapter.labels)}" if adapter.labels else "")))
    if error is not None:
        pairs.append(("error", f"at most {error:.3g} of the norm of a change was given up for its rank"))
    for line in aligned(pairs):
        out.line(line)


def names(composition: Composition) -> list[str]:
    """Return the references in a composition, each once."""
    found: list[str] = []
    for part in composition.parts:
        found += [part] if isinstance(part, str) else names(part)  # type: ignore[arg-type]
    return list(dict.fromkeys(found))
