"""`onebase serve`: answer over HTTP for one base and all stored adapters."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import socket
import threading
from pathlib import Path
from typing import Annotated

import typer

from onebase.cli import options as o
from onebase.cli.failures import UsageError
from onebase.cli.output import Output
from onebase.errors import OnebaseError

BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    base: o.BaseName = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this machine need keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    keys: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON list of hashed API keys.")] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    timeout: Annotated[float, typer.Option(help="Seconds of one request, at most.")] = 120.0,
    device_mb: Annotated[int, typer.Option(help="MiB of adapters attached to the base at once.", min=1)] = 2048,
    memory_mb: Annotated[int, typer.Option(help="MiB of adapters kept in memory beside those.", min=1)] = 4096,
    ray: Annotated[bool, typer.Option("--ray", help="Serve in replicas on Ray Serve.")] = False,
    replicas: Annotated[int | None, typer.Option(min=1, metavar="N", help="Replicas of --ray.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Print a new key and its hash, and end.")] = False,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Serve a base and every stored adapter over HTTP, with a page at /.

    The key in $ONEBASE_API_KEY may do everything. Without any key everybody on this machine may ask, and nobody may
    load, promote or remove.
    """
    out = Output(as_json)
    if new_key:
        from onebase.serve.keys import hashed

        key = secrets.token_urlsafe(32)
        if as_json:
            out.document({"key": key, "hash": hashed(key)})
            return
        out.line(key)  # alone on stdout: KEY=$(onebase serve --new-key)
        out.note(f"its hash, for the file of --keys: {hashed(key)}")
        return
    if replicas and not ray:
        raise UsageError("--replicas are those of --ray: add it, or leave --replicas out")
    try:
        import uvicorn

        from onebase.serve.http import create_app
        from onebase.serve.served import Served, settle
    except ImportError as error:
        raise UsageError(
            f"serving needs the extra serve ({error.name} is missing): pip install 'onebase[serve]'"
        ) from None
    from onebase.cli.bases import open_base
    from onebase.serve.keys import VARIABLE, read_keys
    from onebase.serve.settings import MIB, ServeSettings
    from onebase.store import Store

    found = read_keys(keys, os.environ.get(VARIABLE))
    if host not in LOOPBACK and not found:
        raise UsageError(f"--host {host} opens the server to others: set a key with --keys FILE or ${VARIABLE} first")
    settings = ServeSettings(timeout=timeout, device_bytes=device_mb * MIB, memory_bytes=memory_mb * MIB)
    name = base or o.default_base()
    served = Served(name, device, dtype, Store().root, found, settings, host in LOOPBACK)
    where = f"http://{host}:{port} (page at /, API at /docs)"
    if ray:
        from onebase.serve.on_ray import on_ray

        out.note(f"starting {replicas or 1} replicas of {name}")
        with on_ray(served, replicas or 1, host, port):
            out.note(f"serving {name} and all stored adapters on {where}")
            _until_stopped()
        return
    sockets = _listen(host, port)
    server = served.build(open_base(name, device, dtype, out))
    app = create_app(server)
    settle()
    out.note(f"serving {name} and {len(server.catalog.names())} adapters on {where}")
    config = uvicorn.Config(
        app, host=host, port=port, log_level="debug" if debug else "warning", access_log=False,
        timeout_graceful_shutdown=int(settings.drain), timeout_keep_alive=5,
    )  # fmt: skip
    running = uvicorn.Server(config)
    with contextlib.suppress(KeyboardInterrupt):  # raised again once everything is closed
        running.run(sockets=sockets)
    if not running.started:
        raise OnebaseError("the server did not start: its log, above, says why")


def _listen(host: str, port: int) -> list[socket.socket]:
    """Take the port before a base is loaded; raise where somebody else has it."""
    found: list[socket.socket] = []
    reason: OSError | None = None
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(f"--host {host}: {error.strerror or error}; give an address of this machine") from None
    for family, _, _, _, address in dict.fromkeys(places):
        try:
            found.append(socket.create_server(address[:2], family=family, backlog=BACKLOG))
        except OSError as error:
            reason = error
            if error.errno == errno.EADDRINUSE:
                break
    if reason is not None and (reason.errno == errno.EADDRINUSE or not found):
        for one in found:
            one.close()
        if reason.errno == errno.EADDRINUSE:
            raise OnebaseError(f"port {port} of {host} is in use: end what listens there, or choose another --port")
        raise OnebaseError(f"cannot listen on {host}, port {port}: {os.strerror(reason.errno or 0)}; "
                           "choose another --port or --host")  # fmt: skip
    return found


def _until_stopped() -> None:
    """Wait for Ctrl-C, or for the signal that ends a service."""
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    with contextlib.suppress(KeyboardInterrupt):
        while not over.wait(1.0):
            pass
