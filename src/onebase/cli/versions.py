"""`onebase promote`, `rollback`, `diff` and `gc`: aliases of stored adapters, how versions differ, what can go."""

from __future__ import annotations

from typing import Annotated

import typer

from onebase.cli import options as o
from onebase.cli.output import Output, count

Ref = Annotated[str, typer.Argument(metavar="REF", autocompletion=o.stored_names, help="name@version or name@alias.")]
Alias = Annotated[str, typer.Argument(metavar="ALIAS", help="Such as prod; begins with a letter.")]
TENSORS_SHOWN = 20  # the furthest ones; --json lists all


def promote(ref: Ref, alias: Alias, as_json: o.AsJson = False, debug: o.Debug = False) -> None:
    """Make an alias name a version, which is verified first: onebase promote reviews@3 prod."""
    from onebase.store import Store

    out = Output(as_json)
    place = Store().promote(ref, alias)
    _named(out, place.name, alias, place.version)


def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=o.stored_names, help="Of the adapter.")],
    alias: Alias,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Make an alias name what it named before."""
    from onebase.store import Store

    out = Output(as_json)
    place = Store().rollback(name, alias)
    _named(out, place.name, alias, place.version)


def _named(out: Output, name: str, alias: str, version: int) -> None:
    if out.as_json:
        out.document({"name": name, "alias": alias, "version": version, "ref": f"{name}@{version}"})
    else:
        out.line(f"{name}@{alias} is {name}@{version}")


def diff(a: Ref, b: Ref, as_json: o.AsJson = False, debug: o.Debug = False) -> None:
    """Compare two stored adapters: settings, metrics, and the distance of each tensor."""
    from onebase.store import Store

    out = Output(as_json)
    found = Store().diff(a, b)
    if as_json:
        out.document(found)
        return
    if found.same:
        out.line(f"{found.a} and {found.b} have the same settings and tensors")
    for title, changed in (("setting", found.settings), ("metric", found.metrics)):
        if changed:
            out.table([title, found.a, found.b], [[name, *map(str, values)] for name, values in changed.items()])
    if found.same:
        return
    far = sorted(found.tensors.items(), key=lambda item: float("-inf") if item[1] is None else -item[1])
    rows = [[name, "not comparable" if gap is None else f"{gap:.4g}"] for name, gap in far[:TENSORS_SHOWN]]
    out.table(["tensor", "relative distance"], rows, right=["relative distance"])
    if len(far) > len(rows):
        out.note(f"and {len(far) - len(rows)} more tensors, each closer (--json lists them)")
    relative = "" if found.relative is None else f", {found.relative:.4g} of the norm of {found.a}"
    out.line(f"all tensors: distance {found.distance:.4g}{relative}")


def gc(
    keep: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Also versions that no alias names, but the newest N of each adapter."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove; without it they are only listed.")] = False,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """List, and with --yes remove, leftovers of saves that were cut off and, with --keep, old versions."""
    from onebase.store import Store

    out = Output(as_json)
    found = Store().gc(keep=keep, apply=yes)
    if as_json:
        versions = [place.ref for place in found.versions]
        kept = {place.ref: [user.ref for user in users] for place, users in found.kept.items()}
        out.document({"removed": yes, "leftovers": found.leftovers, "versions": versions, "kept": kept})
        return
    for place, users in found.kept.items():
        out.note(f"{place.ref} stays: {', '.join(user.ref for user in users)} is made of it")
    for line in (*map(str, found.leftovers), *(place.ref for place in found.versions)):
        out.line(line)
    said = f"{count(len(found.leftovers), 'leftover')} and {count(len(found.versions), 'version')}"
    out.note(f"removed {said}" if yes else f"{said} can go; to remove them: add --yes")
