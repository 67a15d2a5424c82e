"""`onebase keygen` and `sign`: who stands for a stored adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onebase.cli import options as o
from onebase.cli.output import Output, aligned


def keygen(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Of the private key; the public one is FILE.pub.")],
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Make a key to sign adapters with. The private file stays with you; the .pub file goes to those who trust you."""
    from onebase.store.signing import VARIABLE, make_key

    out = Output(as_json)
    public = make_key(file)
    if as_json:
        out.document({"private": file, "public": public})
        return
    for line in aligned([("private", str(file)), ("public", str(public)), ("to trust", f"{VARIABLE}={public}")]):
        out.line(line)


def sign(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=o.stored_names, help="name or name@version.")],
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="Private ed25519 key, as keygen makes it.")],
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Sign a stored adapter: whoever trusts the key can tell that it is as you left it."""
    from onebase.errors import ConfigError
    from onebase.store import Store
    from onebase.store.remote import RemoteStore
    from onebase.store.signing import sign as sign_stored

    out, store = Output(as_json), Store()
    if isinstance(store, RemoteStore):
        raise ConfigError(f"{store.url} takes no signatures: sign in a local store, and push from there")
    stored = store.resolve(name)
    done = sign_stored(stored, key)
    if as_json:
        out.document({"ref": stored.ref, "digest": stored.digest, "key": done.key})
        return
    for line in aligned([("signed", stored.ref), ("digest", stored.digest), ("by key", done.key)]):
        out.line(line)
