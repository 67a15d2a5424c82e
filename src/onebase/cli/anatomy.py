"""`onebase anatomy`: where adapters can act in a base, what is refused and why, and which methods it carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options as o
from onebase.cli.bases import open_base
from onebase.cli.output import Output, aligned, count
from onebase.errors import OnebaseError

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.core.site import Site, Stack

SOURCES = {
    "row": "a row that was written for this family",
    "discovery": "discovery: found in this model and proven by numbers",
}


def anatomy(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[BASE]", help=f"Folder or hub id. Default: ${o.BASE_VARIABLE}, else {o.DEFAULT_BASE}."),
    ] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Show the stacks, layers and sites of a base, what is refused and why, and the methods that can be added."""
    out = Output(as_json)
    with open_base(name or o.default_base(), device, dtype, out) as base:
        document = describe(base)
    if as_json:
        out.document(document)
        return
    _show(document, out)


def describe(base: Base) -> dict[str, Any]:
    """Return the anatomy of a base as JSON values."""
    found = base.anatomy
    return {
        "base": base.id,
        "model_type": found.model_type,
        "class": type(base.model).__name__,
        "source": found.source,
        "hidden_size": found.hidden_size,
        "pooling": found.pooling,
        "stacks": [_stack(stack) for stack in found.stacks],
        "sites": [_site(site) for site in found.sites.values()],
        "refused": found.refused,
        "methods": carried(base),
    }


def carried(base: Base) -> dict[str, str | None]:
    """Return method -> None where it can be added with its defaults, else the reason. Nothing stays attached."""
    from onebase.methods import all_methods

    reasons: dict[str, str | None] = {}
    for name, cls in all_methods().items():
        taken = f"anatomy-{name}"
        try:
            base.add(taken, cls())
        except OnebaseError as error:
            reasons[name] = str(error)
            continue
        base.remove(taken)
        reasons[name] = None
    return reasons


def _stack(stack: Stack) -> dict[str, Any]:
    return {
        "name": stack.name,
        "path": stack.path,
        "module": type(stack.module).__name__,
        "layers": len(stack.layers),
        "causal": stack.causal,
        "position_start": stack.position_start,
        "position_limit": stack.position_limit,
        "feeds": stack.feeds or None,
        "padding_refused": dict(stack.padding),
    }


def _site(site: Site) -> dict[str, Any]:
    known: dict[str, Any] = {"name": site.name, "kind": site.kind, "part": site.part, "path": site.path or None}
    if site.unsupported:
        return {**known, "refused": site.unsupported}
    if site.kind == "kv":
        return {**known, "heads": site.heads, "head_dim": site.head_dim}
    known |= {"d_in": site.d_in, "d_out": site.d_out}
    if site.span is not None:
        known["features"] = list(site.span)
    elif site.index is not None:
        known["features"] = "interleaved"
    if site.norm is not None:
        known["norm"] = site.norm
    if site.residual is not None:
        known["residual"] = str(site.residual)
    return known


def _show(document: dict[str, Any], out: Output) -> None:
    pairs = [
        ("base", f"{document['base']} ({document['class']}, {document['model_type']})"),
        ("found by", SOURCES[document["source"]]),
        ("width", f"{document['hidden_size']}, pooled by {document['pooling']}"),
    ]
    pairs += [(stack["name"], _stack_line(stack)) for stack in document["stacks"]]
    for line in aligned(pairs):
        out.line(line)
    out.line()
    out.table(["site", "kind", "module", "shape", "layers"], grouped(document["sites"]), right=("layers",))
    for title, lines in (("Refused", _refusals(document)), ("Methods", _methods(document))):
        if lines:
            out.line()
            out.line(f"{title}:")
        for line in lines:
            out.line(f"  {line}")


def _stack_line(stack: dict[str, Any]) -> str:
    said = [count(stack["layers"], "layer"), f"{stack['module']} at {stack['path'] or 'the root'}"]
    said.append("sees earlier tokens" if stack["causal"] else "sees all tokens")
    if stack["position_limit"] is not None:
        said.append(f"{stack['position_limit']} positions")
    said += [f"no padding on the {side}: {reason}" for side, reason in stack["padding_refused"].items()]
    return ", ".join(said)


def grouped(sites: list[dict[str, Any]]) -> list[list[str]]:
    """Return one row per site of a layer, over all layers that have it alike: layer numbers become '*'."""
    rows: dict[tuple[str, ...], int] = {}
    for site in sites:
        if "refused" in site:
            continue
        stack, _, rest = site["name"].partition("/")
        number, _, inner = rest.partition("/")
        layered = number.isdigit()
        name = f"{stack}/*/{inner}" if layered else site["name"]
        path = ".".join("*" if layered and part == number else part for part in site["path"].split("."))
        features = site.get("features")
        part = f"[{features[0]}:{features[1]}]" if isinstance(features, list) else f" ({features})" if features else ""
        key = (name, site["kind"], path + part, _shape(site))
        rows[key] = rows.get(key, 0) + 1
    return [[*key, str(number)] for key, number in rows.items()]


def _shape(site: dict[str, Any]) -> str:
    if site["kind"] == "kv":
        return f"{site['heads']} heads of {site['head_dim']}"
    return f"{site['d_in']} to {site['d_out']}" if site["kind"] == "linear" else str(site["d_out"])


def _refusals(document: dict[str, Any]) -> list[str]:
    """Return one line per reason, with the places that it holds for."""
    places: dict[str, list[str]] = {}
    for name, reason in document["refused"].items():
        stack, *rest = name.split("/")
        place = "/".join([stack, *("*" if part.isdigit() else part for part in rest)])
        key = ".".join("*" if part.isdigit() else part for part in reason.split("."))
        known = places.setdefault(key, [])
        if place not in known:
            known.append(place)
    return [f"{', '.join(names)}: {reason}" for reason, names in places.items()]


def _methods(document: dict[str, Any]) -> list[str]:
    return aligned((name, "can be added" if why is None else f"no: {why}") for name, why in document["methods"].items())
