"""Adapters: what is there, and for keys that may administer, what is loaded, promoted and withdrawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from onebase.errors import OnebaseError, StoreError, UnknownNameError
from onebase.serve import bodies as b
from onebase.serve.keys import Key
from onebase.serve.routes.state import stored_bytes
from onebase.serve.server import Server
from onebase.store.names import NAME, PLAIN, VERSION


def add_adapters(app: FastAPI, server: Server, use: Any, admin: Any) -> None:
    """Add the routes about adapters."""
    catalog, tiers = server.catalog, server.engine.tiers

    def entries(name: str) -> list[dict[str, Any]]:
        _, shelf = catalog.shelf(name)
        waiting, _tokens = server.engine.rows.sizes()
        found = []
        for number in sorted({*shelf.versions, *shelf.broken}):
            ref = f"{name}@{number}"
            stored = shelf.versions.get(number)
            entry = None if stored is None else tiers.state_of(stored.digest)
            state = "failed" if stored is None else "disk" if entry is None else entry.state
            if ref in catalog.withdrawn or name in catalog.withdrawn:
                state = "withdrawn"
            error = shelf.broken.get(number) or (str(entry.error) if entry and entry.error else None)
            found.append({
                "object": "adapter", "name": name, "version": number, "ref": ref,
                "digest": None if stored is None else stored.digest,
                "aliases": sorted(a for a, v in shelf.aliases.items() if v == number), "newest": number == shelf.newest,
                "state": state, "pinned": bool(entry and entry.pinned), "running": entry.leases if entry else 0,
                "queued": waiting.get(ref, 0), "bytes": stored_bytes(stored) if stored else 0,
                "requests": server.by_ref[ref],
                "method": stored.config.method.name if stored else None,
                "task": stored.config.task["kind"] if stored else None,
                "labels": list(stored.config.task.get("labels") or []) if stored else [],
                "error": error, "loaded_ms": entry.loaded_ms if entry else None,
            })  # fmt: skip
        return found

    @app.get("/v1/adapters")
    def every(key: Key = Depends(use)) -> dict[str, Any]:
        data = [
            one for name in catalog.visible(key) if name != PLAIN and name not in catalog.extra for one in entries(name)
        ]
        return {"object": "list", "data": data, "tiers": server.metrics.tiers(key, len(data))}

    @app.get("/v1/adapters/{name}")
    def history(name: str, key: Key = Depends(use)) -> dict[str, Any]:
        store, _ = catalog.of(name, key)
        aliases = {a: {"version": h[-1], "history": list(h)} for a, h in store._histories(name).items()}
        return {"object": "adapter.history", "name": name, "versions": entries(name), "aliases": aliases}

    @app.post("/v1/adapters")
    async def load(body: b.Load, key: Key = Depends(admin)) -> JSONResponse:
        name = body.ref.partition("@")[0]
        if name in catalog.base_ids:
            raise HTTPException(400, "ref: the base is always loaded")
        if key.allows(name):
            catalog.withdrawn -= {name, body.ref}
        stored = catalog.resolve(body.ref, key)
        assert stored is not None
        lease = tiers.lease(stored)
        if body.pin:
            tiers.pin(stored.digest, True)
        if not body.wait:
            tiers.abandon(lease)
        else:
            tiers.release(await server.loaded(lease))
        shown = next(one for one in entries(stored.name) if one["ref"] == stored.ref)
        return JSONResponse(shown, 200 if body.wait else 202)

    @app.delete("/v1/adapters/{ref}")
    def withdraw(ref: str, remove: bool = False, key: Key = Depends(admin)) -> dict[str, Any]:
        name, _, version = ref.partition("@")
        store, shelf = catalog.of(name, key)
        numbers = {*shelf.versions, *shelf.broken}
        if (version or ref != name) and (not VERSION.fullmatch(version) or int(version) not in numbers):
            raise UnknownNameError(f"adapter {name!r} has no version {version!r}")
        gone = [v for v in shelf.versions.values() if not version or v.ref == ref]
        if remove:
            try:
                store.remove(ref)
            except StoreError as error:
                raise HTTPException(409, str(error)) from None
            catalog.forget(name)
        else:
            catalog.withdrawn.add(ref)
        freed = [stored.ref for stored in gone if tiers.withdraw(stored.digest)]
        return {"ref": ref, "withdrawn": [stored.ref for stored in gone], "freed": freed, "removed": remove}

    def moved(action: Callable[[], Any], name: str, alias: str) -> dict[str, Any]:
        try:
            action()
        except UnknownNameError:
            raise
        except OnebaseError as error:
            raise HTTPException(409, str(error)) from None
        catalog.forget(name)
        stored = catalog.resolve(f"{name}@{alias}")
        assert stored is not None
        return {
            "name": name,
            "alias": alias,
            "version": stored.config.version,
            "ref": stored.ref,
            "digest": stored.digest,
        }

    @app.post("/v1/adapters/{name}/promote")
    def promote(name: str, body: b.Promote, key: Key = Depends(admin)) -> dict[str, Any]:
        store, _ = catalog.of(name, key)
        return moved(lambda: store.promote(f"{name}@{body.version}", body.alias), name, body.alias)

    @app.post("/v1/adapters/{name}/rollback")
    def rollback(name: str, body: b.Rollback, key: Key = Depends(admin)) -> dict[str, Any]:
        store, _ = catalog.of(name, key)
        return moved(lambda: store.rollback(name, body.alias), name, body.alias)

    @app.post("/v1/load_lora_adapter")
    async def load_lora(body: b.LoraLoad, key: Key = Depends(admin)) -> PlainTextResponse:
        stored = catalog.resolve(body.lora_path, key)
        if stored is None:
            raise HTTPException(400, "lora_path: expected a stored adapter, such as reviews@3")
        if not NAME.fullmatch(body.lora_name) or not key.allows(body.lora_name):
            raise HTTPException(400, f"lora_name {body.lora_name!r} cannot be used by this key, or as a name at all")
        if body.lora_name in catalog.base_ids:
            raise HTTPException(400, f"lora_name {body.lora_name!r} means the plain base: choose another")
        if body.lora_name in catalog.names() and catalog.extra.get(body.lora_name) != stored.ref:
            raise HTTPException(400, f"lora_name {body.lora_name!r} is taken")
        tiers.release(await server.loaded(tiers.lease(stored)))
        catalog.extra[body.lora_name] = stored.ref
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    def unload_lora(body: b.LoraUnload, key: Key = Depends(admin)) -> PlainTextResponse:
        if not key.allows(body.lora_name) or catalog.extra.pop(body.lora_name, None) is None:
            raise UnknownNameError(f"no adapter was loaded as {body.lora_name!r}")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
