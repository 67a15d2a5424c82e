"""How the forward and backward pass of training is computed: attention kernel and dtype, chosen by measuring.

Fused attention can be the slower one in the backward pass on a CPU, and bfloat16 pays only where the processor has
instructions for it; both depend on the length of the texts. So the first rows are timed, and the choice is recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onebase.devices import CPU_ROWS, has_bf16, measures_attention, wait_for
from onebase.examples import forward
from onebase.tasks import Examples
from onebase.training.narrow import narrow
from onebase.training.settings import Settings

if TYPE_CHECKING:
    from onebase.adapter import Adapter
    from onebase.base import Base

ROUNDS = 4  # of every candidate in turn; the first warms caches up and is not counted
CLEARLY = 1.15  # how much faster a later candidate must be: below this, noise would decide
REMEMBERED = 7 * 24 * 3600  # seconds after which a machine is measured again


@dataclass(frozen=True, eq=False)
class Kernels:
    """A choice.

    Attributes:
        base: the base that computes.
        attention: implementation while training, None for the base's own.
        dtype: autocast dtype while training, None for none.
        seconds: what was measured, by choice.
    """

    base: Base
    attention: str | None
    dtype: torch.dtype | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute with this choice inside the block."""
        with _computing(self.base, self.attention, self.dtype):
            yield

    def facts(self) -> dict[str, Any]:
        """Return the choice as JSON values."""
        name = "base" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return {"attention": self.attention or "base", "dtype": name, "seconds": self.seconds}

    def sentence(self) -> str:
        """Say what was chosen and what was measured."""
        facts = self.facts()
        timed = ", ".join(f"{name} {value * 1000:.0f} ms" for name, value in self.seconds.items())
        return f"computing with attention={facts['attention']}, dtype={facts['dtype']}" + (
            f" ({timed})" if timed else ""
        )


@contextmanager
def _computing(base: Base, attention: str | None, dtype: torch.dtype | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if dtype is not None:
            # Without its cache: autocast keeps casts of trained weights until the block ends, across optimizer steps.
            stack.enter_context(torch.autocast(base.device.type, dtype, cache_enabled=False))
            stack.enter_context(narrow(base.model, dtype))
        if attention is not None:
            stack.enter_context(base._installed.attention_as(attention))
        yield


def choose_kernels(
    base: Base, adapter: Adapter, train: Examples, settings: Settings, memory: Path | None = None
) -> Kernels:
    """Choose attention and dtype for a training run.

    Args:
        base: the base.
        adapter: the attached adapter; its gradients are cleared afterwards.
        train: rows to time with.
        settings: `attention` and `dtype`; 'auto' is measured, on a CPU, once per base, method and text length.
        memory: file that remembers measurements of this machine for a week, so that two runs compute alike.
    """
    own = base._installed.original_attention()
    attentions: list[str | None] = [None if settings.attention == "keep" else settings.attention]
    if settings.attention == "auto":
        switchable = measures_attention(base.device) and own in ("eager", "sdpa") and _can_switch(base)
        attentions = ["eager", "sdpa"] if switchable else [None]
    dtypes = {"float32": [None], "bfloat16": [torch.bfloat16], "auto": [None]}[settings.dtype]
    if settings.dtype == "auto" and next(base.model.parameters()).dtype == torch.float32:
        dtypes = [None, torch.bfloat16] if has_bf16(base.device) else [None]
    if len(attentions) * len(dtypes) == 1:
        return Kernels(base, attentions[0], dtypes[0])
    rows = sorted(range(len(train)), key=lambda i: len(train.rows[i].ids))
    middle = rows[max(0, len(rows) // 2 - CPU_ROWS // 2) :][:CPU_ROWS]
    # the order of preference: what is usually fastest comes first
    candidates = [(a, d) for d in reversed(dtypes) for a in attentions]
    key = _key(base, adapter, settings, len(train.rows[middle[0]].ids) // 16)
    seconds = base._kernels.get(key) or _remembered(memory, key)
    if seconds is None or set(seconds) != {_label(*c) for c in candidates}:
        seconds = _measure(base, adapter, train, middle, candidates)
        _remember(memory, key, seconds)
    base._kernels[key] = seconds
    limit = CLEARLY * min(seconds.values())
    best = next(c for c in candidates if seconds[_label(*c)] <= limit)
    return Kernels(base, *best, seconds)


def kernels_of(base: Base, facts: dict[str, Any]) -> Kernels:
    """Return a choice again from its `facts`, for a run that goes on."""
    attention = None if facts["attention"] == "base" else facts["attention"]
    dtype = None if facts["dtype"] == "base" else getattr(torch, facts["dtype"])
    return Kernels(base, attention, dtype, facts["seconds"])


def _measure(
    base: Base, adapter: Adapter, train: Examples, rows: list[int], candidates: list[tuple[str | None, Any]]
) -> dict[str, float]:
    """Return seconds of a forward and backward pass by candidate, the best of several interleaved rounds."""
    taken: dict[str, list[float]] = {_label(*c): [] for c in candidates}
    for number in range(ROUNDS):
        for candidate in candidates:
            with _computing(base, *candidate):
                wait_for(base.device)
                began = time.perf_counter()
                forward(base, adapter.name, train, rows).sums.sum().backward()
                wait_for(base.device)
                if number:
                    taken[_label(*candidate)].append(time.perf_counter() - began)
    for parameter in adapter.parameters():
        parameter.grad = None
    return {label: round(min(many), 4) for label, many in taken.items()}


def _key(base: Base, adapter: Adapter, settings: Settings, length: int) -> str:
    """Name everything that a measurement depends on."""
    facts = (
        platform.machine(), platform.processor(), torch.__version__, torch.get_num_threads(), str(base.device),
        base.anatomy.model_type, base.anatomy.hidden_size, base.anatomy.layers, adapter.method.name,
        adapter.task["kind"], settings.attention, settings.dtype, length,
    )  # fmt: skip
    return "/".join(str(fact) for fact in facts)


def _remembered(memory: Path | None, key: str) -> dict[str, float] | None:
    found = _read(memory).get(key)
    return found["seconds"] if found and time.time() - found["when"] < REMEMBERED else None


def _read(memory: Path | None) -> dict[str, Any]:
    try:
        found = json.loads(memory.read_text(encoding="utf-8")) if memory is not None else {}
        return {key: value for key, value in found.items() if {"when", "seconds"} <= value.keys()}
    except (OSError, ValueError, AttributeError):
        return {}  # nothing is lost: it is measured again


def _remember(memory: Path | None, key: str, seconds: dict[str, float]) -> None:
    if memory is None:
        return
    known = {**_read(memory), key: {"when": time.time(), "seconds": seconds}}
    work = memory.with_name(f".{memory.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a read-only home: measured every time
        memory.parent.mkdir(parents=True, exist_ok=True)
        work.write_text(json.dumps(known, indent=1), encoding="utf-8")
        os.replace(work, memory)


def _label(attention: str | None, dtype: torch.dtype | None) -> str:
    return f"{attention or 'base'}/{str(dtype or 'base').removeprefix('torch.')}"


def _can_switch(base: Base) -> bool:
    """Whether both implementations compute the same: some families have features that only one of them knows."""
    config = base.model.config
    return bool(base.model._supports_sdpa) and not getattr(config, "attn_logit_softcapping", None)
