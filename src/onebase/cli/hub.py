"""`onebase push` and `pull`: stored adapters to and from a hub of models."""

from __future__ import annotations

from typing import Annotated

import typer

from onebase.cli import options as o
from onebase.cli.output import Output, aligned


def push(
    name: Annotated[str, typer.Argument(metavar="NAME", autocompletion=o.stored_names, help="name or name@version.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Such as me/reviews; made where it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Upload a stored adapter with its card, as one commit; call it again to go on after a failure."""
    from onebase.store import Store
    from onebase.store.hub import push as push_stored

    out = Output(as_json)
    stored = Store().resolve(name)
    done = push_stored(stored, repo, private=private)
    if as_json:
        out.document({"ref": stored.ref, "repo": done.repo, "revision": done.revision, "digest": done.digest})
        return
    pull_it = f"onebase pull {done.repo}@{done.revision}"
    for line in aligned([("pushed", stored.ref), ("to", done.repo), ("revision", done.revision), ("pull it", pull_it)]):
        out.line(line)


def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO[@REVISION]", help="Revision: a commit, branch or tag.")],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Store as the next version of this name.")
    ] = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Download an adapter of onebase, verify it and store it; call it again to go on after a failure."""
    from onebase.store import Store
    from onebase.store.hub import pull as pull_stored

    out = Output(as_json)
    done = pull_stored(repo, Store(), name=name)
    if as_json:
        out.document({"ref": done.stored.ref, "repo": done.repo, "revision": done.revision,
                      "digest": done.stored.digest, "same": done.same})  # fmt: skip
        return
    said = "every file is as it was pushed" if done.same else "stored as a new version; its own digest is in provenance"
    for line in aligned([("pulled", done.stored.ref), ("from", f"{done.repo}@{done.revision}"), ("verified", said)]):
        out.line(line)
