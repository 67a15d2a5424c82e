"""What a server tells about itself: Prometheus text, and numbers for live charts."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from onebase import __version__

if TYPE_CHECKING:
    from onebase.serve.keys import Key
    from onebase.serve.server import Server

SHOWN = 60  # batches in /v1/stats
WHOLE = ("/v1/chat/completions",)  # paths with more parts than two, and no name in them
WINDOW = 60.0  # seconds of latencies


class Metrics:
    """The numbers of one server."""

    def __init__(self, server: Server):
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.server = server
        self.registry = CollectorRegistry()
        own = self.registry
        self._requests = Counter("onebase_requests", "Requests by path and status.", ["path", "status"], registry=own)
        self._seconds = Histogram("onebase_request_seconds", "From arrival to answer.", ["path"], registry=own)
        self._asked = Gauge("onebase_adapter_requests", "Requests by adapter version.", ["ref"], registry=own)
        self._waiting = Gauge("onebase_waiting", "Rows or prompts in the server.", ["kind"], registry=own)
        self._bytes = Gauge("onebase_adapter_bytes", "Bytes of adapters by tier.", ["tier"], registry=own)
        self._held = Gauge("onebase_adapters", "Adapters by tier.", ["tier"], registry=own)
        self._loads = Gauge(
            "onebase_adapter_loads", "Loads, failures, evictions, hits and misses.", ["what"], registry=own
        )
        self._rates = Gauge("onebase_rate", "What was done per second, lately.", ["what"], registry=own)
        self._lora = Gauge(
            "vllm:lora_requests_info", "Adapters that run and wait, in vLLM's form.",
            ["running_lora_adapters", "waiting_lora_adapters", "max_lora"], registry=own,
        )  # fmt: skip

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request; paths with names in them are counted as one."""
        parts = path.split("/")
        known = "/".join(parts[:3]) if path.startswith("/v1/") else path if path.count("/") == 1 else "/page"
        if path in WHOLE:
            known = path
        if status == 404:
            known = "other"
        self._requests.labels(known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def text(self) -> str:
        """Return Prometheus text."""
        from prometheus_client import generate_latest

        engine = self.server.engine
        for ref, count in list(self.server.by_ref.items()):
            self._asked.labels(ref).set(count)
        self._waiting.labels("rows").set(engine.admitted.total)
        self._waiting.labels("prompts").set(engine.writing.total)
        for tier, facts in engine.tiers.usage().items():
            self._bytes.labels(tier).set(facts["bytes"])
            self._held.labels(tier).set(facts["adapters"])
        for what in ("loads", "load_failures", "evictions", "hits", "misses"):
            self._loads.labels(what).set(engine.tiers.counts[what])
        for what, value in engine.rates().items():
            if what != "window_s":
                self._rates.labels(what).set(value)
        running = sorted({e.stored.name for e in list(engine.tiers.entries.values()) if e.leases})
        waiting = sorted({name.partition("@")[0] for name in engine.rows.sizes()[0]})
        self._lora.clear()
        self._lora.labels(",".join(running), ",".join(waiting), str(len(engine.tiers.entries))).set(time.time())
        return generate_latest(self.registry).decode()

    def tiers(self, key: Key, disk: int) -> dict[str, Any]:
        """Return adapters and bytes by tier, of those that the key may use."""
        return {**self.server.engine.tiers.usage(key.allows), "disk": {"adapters": disk}}

    def stats(self, key: Key) -> dict[str, Any]:
        """Return numbers for live charts; names that the key may not use are added up."""
        server, engine, base = self.server, self.server.engine, self.server.base
        waiting, tokens = engine.rows.sizes()
        since = time.time() - WINDOW
        took = sorted(ms for at, ms in list(server.latencies) if at >= since)
        parameters = list(base.model.parameters())

        def seen(counts: dict[str, int]) -> dict[str, int]:
            found: dict[str, int] = {}
            for ref, count in counts.items():
                name = ref if key.allows(ref.partition("@")[0]) else "others"
                found[name] = found.get(name, 0) + count
            return found

        batches = [{**one, "adapters": seen(one["adapters"])} for one in list(engine.batches)[-SHOWN:]]
        return {
            "time": time.time(), "uptime_s": round(time.time() - server.started, 1), "version": __version__,
            "base": {
                "id": base.id, "digest": server.digest, "model_type": base.model.config.model_type,
                "device": str(base.device), "dtype": str(parameters[0].dtype).removeprefix("torch."),
                "generates": base.has_lm_head, "parameters": sum(p.numel() for p in parameters),
                "bytes": sum(p.numel() * p.element_size() for p in parameters),
            },
            "keys": bool(server.keys), "admin": server.keys.admin,
            "requests": {name: server.counts[name] for name in ("total", "errors", "rejected", "cancelled", "running")},
            "queue": {
                "rows": engine.admitted.total, "tokens": tokens, "prompts": engine.writing.total,
                "limit": server.settings.waiting_rows, "by_adapter": seen(waiting),
            },
            "rates": engine.rates(),
            "latency_ms": {"window_s": WINDOW, "count": len(took)}
            | {f"p{p}": _at(took, p) for p in (50, 90, 99)},
            "batches": batches,
            "tiers": {**self.tiers(key, sum(map(key.allows, server.catalog.names()))), **{
                what: engine.tiers.counts[what] for what in ("loads", "load_failures", "evictions", "hits", "misses")
            }},
            "process": {"id": os.getpid(), "rss_bytes": _resident()},
        }  # fmt: skip


def _at(took: list[float], percent: int) -> float | None:
    """Return a percentile of sorted values."""
    return round(took[min(len(took) - 1, len(took) * percent // 100)], 2) if took else None


def _resident() -> int | None:
    """Bytes of this process in memory, where the system says."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, ValueError):
        return None
