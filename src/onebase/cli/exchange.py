"""`onebase import`, `export` and `merge`: adapters from and for other libraries, and full models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options as o
from onebase.cli.output import Output, aligned

if TYPE_CHECKING:
    from onebase.exchange import Exported

NAME = Annotated[
    str, typer.Argument(metavar="NAME", autocompletion=o.stored_names, help="name, name@version or folder.")
]
OUT = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="New or empty folder.")]


def import_(
    source: Annotated[
        str, typer.Argument(metavar="FOLDER|HUB_ID[@REVISION]", help="Adapter of PEFT or of the AdapterHub.")
    ],
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Default: the folder's name.")] = None,
    base: o.BaseName = None,
    label: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Labels in order, where the file has none. Repeatable.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="N", help="Of the LoRA to make of a method that has no form here.")
    ] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Store an adapter that PEFT or the AdapterHub library wrote, after every check that its file allows."""
    from onebase.cli.bases import open_base
    from onebase.store import Store

    out = Output(as_json)
    called = name or (Path(source).name if Path(source).is_dir() else Path(source.partition("@")[0]).name)
    Store().check(called)
    loaded = open_base(base or o.default_base(), device, dtype, out)
    adapter = loaded.import_adapter(source, name=called, labels=o.listed(label), rank=rank)
    stored = loaded.save(called)
    notes = adapter.config["provenance"].get("notes", [])
    if as_json:
        out.document({"ref": stored.ref, "path": stored.path, "method": adapter.method.shorthand(), "notes": notes})
        return
    pairs = [("imported", stored.ref), ("method", adapter.method.shorthand()), ("base", loaded.id)]
    pairs += [("note", note) for note in notes]
    pairs.append(("unverified", "the file holds no digest and no probes: nothing tells whether it is whole"))
    for line in aligned(pairs):
        out.line(line)


def export(
    name: NAME,
    out: OUT,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="peft, vllm, adapterhub, merged or onnx.")] = "peft",
    head: Annotated[bool, typer.Option("--head/--no-head", help="Write the task head too.")] = True,
    base: o.AdapterBase = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Write a stored adapter in the form of another library, and compare what was written with the adapter."""
    _export(name, out, to, head, base, device, dtype, as_json)


def merge(
    name: NAME,
    out: OUT,
    base: o.AdapterBase = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Write a full model whose weights hold what an adapter does; transformers loads it without onebase."""
    _export(name, out, "merged", False, base, device, dtype, as_json)


def _export(
    name: str, folder: Path, to: str, head: bool, base: str | None, device: str | None, dtype: str | None, as_json: bool
) -> None:
    from onebase.cli.bases import open_adapters
    from onebase.exchange import check_format

    out = Output(as_json)
    check_format(to)
    loaded, routes = open_adapters([name], base, device, dtype, out)
    attached = routes[name]
    assert attached is not None
    _show(loaded.export(attached, folder, to=to, head=head), out)


def _show(done: Exported, out: Output) -> None:
    facts: dict[str, Any] = {"folder": done.folder, "format": done.format, "probes": done.probes, "gap": done.gap,
                             "size": done.size, "notes": list(done.notes)}  # fmt: skip
    if out.as_json:
        out.document(facts)
        return
    pairs = [("written", f"{done.folder} ({done.format})")]
    pairs += [("note", note) for note in done.notes]
    pairs.append(
        ("agreement", f"{done.probes} probes, largest difference {done.gap:.2g} of answers up to {done.size:.3g}")
    )
    for line in aligned(pairs):
        out.line(line)
