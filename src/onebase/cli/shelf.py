"""`onebase ls`, `show` and `rm`: the stored adapters. Listing imports no torch."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options as o
from onebase.cli.failures import FAILED, UsageError
from onebase.cli.output import Output, aligned, count, listing, metric_range, metric_value, percent, size

if TYPE_CHECKING:
    from onebase.store import AdapterConfig, Store, Stored

DIGITS = 8  # of a digest: enough to tell a person's adapters apart
REFS = "name (all versions), name@N or name@alias."
Refs = Annotated[list[str], typer.Argument(metavar="REF...", autocompletion=o.stored_names, help=REFS)]


def ls(as_json: o.AsJson = False, debug: o.Debug = False) -> None:
    """List the stored adapters, with the base's score beside each adapter's."""
    from onebase.store import Store
    from onebase.store.remote import RemoteStore

    out, store = Output(as_json), Store()
    stored, damaged = readable(store)
    rows = [{**summary(adapter), "aliases": _aliases(store, adapter)} for adapter in stored]
    for text in damaged:
        out.note(f"warning: {text}")
    if isinstance(store, RemoteStore):
        out.note(f"store {store.url}: {store.writers}")
    if as_json:
        out.document({"store": store.root, "adapters": rows, "damaged": damaged})
        return
    if not rows:
        out.note(f"no adapters in {store.root} yet; the next step: onebase train -d FILE")
        return
    columns = ["adapter", "method", "task", "metric", "base", "with adapter", "parameters", "size", "base model"]
    columns += ["created", "digest"]
    cells = [
        [
            " ".join([row["ref"], *row["aliases"]]),
            row["method"],
            row["task"],
            row["metric"],
            metric_value(row["metric"] or "", row["base_score"]),
            metric_value(row["metric"] or "", row["score"]),
            f"{row['parameters']:,}",
            size(row["bytes"]),
            row["base"].rsplit("/", 1)[-1],
            row["created"][:10],
            row["digest"].removeprefix("sha256:")[:DIGITS] if row["verified"] else "unverified",
        ]
        for row in rows
    ]
    optional = ("digest", "size", "created", "task", "base model", "parameters")
    out.table(columns, cells, right=("base", "with adapter", "parameters", "size"), optional=optional)


def readable(store: Store) -> tuple[list[Stored], list[str]]:
    """Return the adapters that can be read, and a sentence for each that cannot."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stored = store.list()
    return stored, [str(w.message) for w in caught]


def _aliases(store: Store, stored: Stored) -> list[str]:
    from onebase.errors import CorruptError

    try:
        return [alias for alias, version in store.aliases(stored.name).items() if version == stored.version]
    except CorruptError:
        return []  # a list shows what can be read; whatever resolves an alias says what is wrong


def summary(stored: Stored) -> dict[str, Any]:
    """Return the facts of one adapter that a list shows."""
    config = stored.config
    metric, score, own = main_metric(config)
    return {
        "ref": stored.ref,
        "name": stored.name,
        "version": stored.version,
        "method": config.method.name,
        "settings": config.method.settings,
        "task": config.task.get("kind"),
        "metric": metric,
        "score": score,
        "base_score": own,
        "parameters": config.parameters,
        "bytes": tensor_bytes(stored),
        "base": config.base.id,
        "created": config.created,
        "digest": stored.digest,
        "path": stored.path,
        "verified": not unverified(config),
    }


def unverified(config: AdapterConfig) -> str:
    """Return the format that an adapter was imported from, which had no digest, or ''."""
    imported = config.provenance.get("imported")
    return str(imported.get("format")) if isinstance(imported, dict) and imported.get("unverified") else ""


def main_metric(config: AdapterConfig) -> tuple[str | None, float | None, float | None]:
    """Return the metric that counts, the adapter's value and the base's."""
    mine, own = (config.metrics.get(who) for who in ("adapter", "base"))
    for metric in ("accuracy", "perplexity"):
        if isinstance(mine, dict) and isinstance(mine.get(metric), int | float):  # metrics are free, also in type
            base = own.get(metric) if isinstance(own, dict) else None
            return metric, mine[metric], base if isinstance(base, int | float) else None
    return None, None, None


def tensor_bytes(stored: Stored) -> int:
    """Return the size of the tensors' file, 0 where it is missing."""
    from onebase.store.schema import TENSORS_FILE

    file = stored.path / TENSORS_FILE
    return file.stat().st_size if file.is_file() else 0


def show(
    ref: Annotated[
        str, typer.Argument(metavar="REF", autocompletion=o.stored_names, help="name, name@version or folder.")
    ],
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Show everything stored about an adapter, and verify its files."""
    from onebase.errors import CorruptError
    from onebase.store import Store
    from onebase.store.signing import SIGNATURE_FILE, read_signature

    out = Output(as_json)
    stored = Store().resolve(ref)
    problem = ""
    try:
        stored.verify()
    except CorruptError as error:
        problem = str(error)
    if as_json:
        facts = {"ref": stored.ref, "path": stored.path, "bytes": tensor_bytes(stored)}
        out.document(
            {**facts, "verified": not problem, "problem": problem or None, **stored.config.model_dump(mode="json")}
        )
    else:
        for line in aligned(_facts(stored)):
            out.line(line)
        origin = unverified(stored.config)
        if origin:
            out.line(f"origin      unverified: imported from a {origin} file, which had no digest and no probes")
        if (stored.path / SIGNATURE_FILE).exists() and not problem:
            signature = read_signature(stored.path, stored.digest)
            out.line(f"signed by   {signature.key if signature else ''}")
        out.line("files       " + ("damaged" if problem else "verified: every file and tensor is as it was stored"))
    if problem:
        out.note(f"error: {problem}")
        raise typer.Exit(FAILED)


def _facts(stored: Stored) -> list[tuple[str, str]]:
    config = stored.config
    metric, score, own = main_metric(config)
    facts = [
        ("adapter", stored.ref),
        ("digest", stored.digest),
        ("folder", str(stored.path)),
        ("created", f"{config.created}, onebase {config.library_version}"),
        ("method", f"{config.method.name}({listing(config.method.settings)})"),
        ("task", listing(config.task)),
        ("parameters", f"{config.parameters:,}, {percent(config.parameters / max(1, config.base.parameters), 2)} of "
                       f"the base's; {size(tensor_bytes(stored))} in {count(len(config.tensors), 'tensor')}"),
        ("base", f"{config.base.id} ({config.base.model_type}, {config.base.layers} layers, width "
                 f"{config.base.hidden_size}, {config.base.parameters:,} parameters)"),
        ("fingerprint", config.base.fingerprint),
        ("tokenizer", config.tokenizer.digest),
    ]  # fmt: skip
    if metric is not None:
        mine, base = config.metrics["adapter"], config.metrics.get("base") or {}
        facts.append((metric, f"{metric_range(metric, score, mine.get('interval'))} on {config.metrics.get('split')}"))
        facts.append(("base's own", metric_range(metric, own, base.get("interval"))))
    facts += [(f"metrics {key}", str(value)) for key, value in config.metrics.items() if metric is None]
    test = config.metrics.get("test")
    if isinstance(test, dict):
        facts.append(("test", listing(test)))
    for key, value in config.provenance.items():
        if key == "epochs" and isinstance(value, list):
            facts += [(f"epoch {entry.get('epoch')}", listing(entry)) for entry in value if isinstance(entry, dict)]
        else:
            facts.append((key, listing(value) if isinstance(value, dict) else str(value)))
    return facts


def rm(
    refs: Refs,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also versions that an alias names, and parts of stored compositions.")
    ] = False,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Remove one version (name@N) or all versions (name) of stored adapters. It cannot be undone."""
    from onebase.errors import StoreError
    from onebase.store import Store

    out, store = Output(as_json), Store()
    # every reference is looked up before anything goes
    places = {place.ref: place for ref in dict.fromkeys(refs) for place in store._find(ref)}
    if not yes:
        if as_json or not sys.stdin.isatty():
            shown = ", ".join(places)
            raise UsageError(f"this would remove {shown}; nobody can be asked here, so pass --yes to do it")
        for place in places.values():
            out.note(f"{place.ref}  {place.path}")
        typer.confirm(f"Remove {count(len(places), 'version')}?", abort=True, err=True)
    removed, left = [], list(places)
    while left:  # a composition and its parts may go in one command, in any order
        later, problem = [], None
        for ref in left:
            try:
                removed += [gone.ref for gone in store.remove(ref, force=force)]
            except StoreError as error:
                later.append(ref)
                problem = error
        if problem is not None and later == left:
            raise problem
        left = later
    if as_json:
        out.document({"removed": removed})
        return
    for ref in removed:
        out.line(f"removed {ref}")
