"""The server in several replicas on Ray Serve: each has the base and the store, and whichever is free answers.

A replica reads names, aliases and adapters from the store, so all give the same answers, also after a promotion. What
is in memory is each one's own: an adapter that one replica was told to load or to pin is loaded by the others when they
are asked for it, and statistics and metrics are of the replica that answers. Training beside the server is off.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from onebase.clusters import connected, share
from onebase.errors import ConfigError, OnebaseError
from onebase.serve.served import Served, settle

NAME = "onebase"
# Where Ray is started here: seconds that it waits for its proxy, which gets little of few cores while replicas load,
# and how much its workers give way to other processes: those of a server should not.
STARTED = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0",
}  # fmt: skip
ONGOING = 10_000  # requests that Ray hands to one replica at once; the engine has its own limits and refuses with 429


@contextmanager
def on_ray(served: Served, replicas: int, host: str, port: int) -> Iterator[None]:
    """Serve until the block ends, on the Ray cluster at $RAY_ADDRESS or one that is started on this machine.

    Raises:
        ConfigError: Ray Serve is not installed.
        OnebaseError: the replicas did not start, and why.
    """
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ConfigError(
            f"--ray needs a package that is not installed ({error.name}): pip install 'onebase[ray]'"
        ) from None
    with connected(ray, started=STARTED):
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            serve.start(
                proxy_location="EveryNode", http_options={"host": host, "port": port, "request_timeout_s": None},
                logging_config={"enable_access_log": False},
            )  # fmt: skip
            _deploy(served, replicas, ray.cluster_resources())
            yield
        finally:
            serve.shutdown()


def _deploy(served: Served, replicas: int, have: Mapping[str, float]) -> None:
    """Start the replicas, each with its share of the cluster's cores and GPUs; returns when all answer."""
    from ray import serve

    own: dict[str, float] = {"num_cpus": share(have.get("CPU", 1.0), replicas)}
    if have.get("GPU"):
        own["num_gpus"] = share(have["GPU"], replicas)
    deployment = serve.deployment(
        _replica(served), name=NAME, num_replicas=replicas, ray_actor_options=own, max_ongoing_requests=ONGOING,
        graceful_shutdown_timeout_s=served.settings.drain, max_constructor_retry_count=1,
    )  # fmt: skip
    try:
        serve.run(deployment.bind(), name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise OnebaseError(f"the replicas did not start: {_reason(serve, error)}") from error


def _replica(served: Served) -> Any:
    """Return the class that Ray makes replicas of."""
    from ray import serve

    def build() -> Any:
        from onebase.loading import load_base
        from onebase.serve.http import create_app

        threads = os.environ.get("OMP_NUM_THREADS", "")  # Ray sets it to the cores that a replica has
        if threads.isdecimal():
            import torch

            torch.set_num_threads(max(1, int(threads)))
        loaded = load_base(served.base, device=served.device, dtype=served.dtype)
        app = create_app(served.build(loaded, training=False))
        settle()
        return app

    return serve.ingress(build)()


def _reason(serve: Any, error: Exception) -> str:
    """Return what a replica said when it failed, the last line of it."""
    found = serve.status().applications.get(NAME)
    said = [d.message for d in found.deployments.values() if d.message] if found else []
    lines = (said[0] if said else str(error)).strip().splitlines()
    return next((line.strip() for line in reversed(lines) if "Error" in line), lines[-1] if lines else str(error))
