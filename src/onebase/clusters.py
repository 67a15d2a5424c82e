"""A Ray cluster: the one that runs already, or one that is started on this machine for a while."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def connected(ray: Any, level: int = logging.ERROR, started: Mapping[str, str] | None = None) -> Iterator[None]:
    """Use the Ray that is running, or start one on this machine until the block ends.

    Args:
        ray: the module.
        level: of Ray's own log, where it is started here.
        started: variables of its environment, where it is started here and they are not set.
    """
    if ray.is_initialized():
        yield
        return
    for name, value in (started or {}).items():
        os.environ.setdefault(name, value)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=level)
    try:
        yield
    finally:
        ray.shutdown()


def share(have: float, count: int) -> float:
    """Return each one's share of cores or devices among `count`: whole ones, as far as there is one for each."""
    return float(have // count) if have >= count else have / count
