"""How the forward and backward pass of training is computed: attention kernel and dtype, chosen by measuring.

Fused attention can be the slower one in the backward pass on a CPU, and bfloat16 pays only where the processor has
instructions for it; both depend on the length of the texts. So the first rows are timed, and the choice is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from onebase.examples import forward
from onebase.tasks import Examples
from onebase.training.settings import Settings

if TYPE_CHECKING:
    from onebase.adapter import Adapter
    from onebase.base import Base

# Rows per forward on the CPU: rows are sorted by length within an effective batch, so smaller pieces mean less
# padding, and below this the fixed cost of a call shows.
MICRO = 16
TRIALS = 3  # the first warms caches up and is not counted


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
    # Without its cache: autocast keeps casts of trained weights until the block ends, across optimizer steps.
    with torch.autocast(base.device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
        if attention is None:
            yield
            return
        with base._installed.attention_as(attention):
            yield


def choose_kernels(base: Base, adapter: Adapter, train: Examples, settings: Settings) -> Kernels:
    """Choose attention and dtype for a training run.

    Args:
        base: the base.
        adapter: the attached adapter; its gradients are cleared afterwards.
        train: rows to time with.
        settings: `attention` and `dtype`; 'auto' is measured, on a CPU, once per base and text length.
    """
    own = base._installed.original_attention()
    attentions: list[str | None] = [None if settings.attention == "keep" else settings.attention]
    if settings.attention == "auto":
        switchable = base.device.type == "cpu" and own in ("eager", "sdpa") and _can_switch(base)
        attentions = ["eager", "sdpa"] if switchable else [None]
    dtypes = {"float32": [None], "bfloat16": [torch.bfloat16], "auto": [None]}[settings.dtype]
    if settings.dtype == "auto" and next(base.model.parameters()).dtype == torch.float32:
        dtypes = [None, torch.bfloat16] if _has_bf16(base.device) else [None]
    if len(attentions) * len(dtypes) == 1:
        return Kernels(base, attentions[0], dtypes[0])
    rows = sorted(range(len(train)), key=lambda i: len(train.rows[i].ids))
    middle = rows[max(0, len(rows) // 2 - MICRO // 2) :][:MICRO]
    key = (adapter.method.name, settings.attention, settings.dtype, len(train.rows[middle[0]].ids) // 16)
    if key not in base._kernels:
        seconds = {(a, d): _time(base, adapter, train, middle, a, d) for a in attentions for d in dtypes}
        for parameter in adapter.parameters():
            parameter.grad = None
        best = min(seconds, key=seconds.__getitem__)
        named = {
            f"{a or 'base'}/{str(d or 'base').removeprefix('torch.')}": round(s, 4) for (a, d), s in seconds.items()
        }
        base._kernels[key] = (*best, named)
    return Kernels(base, *base._kernels[key])


def _time(
    base: Base, adapter: Adapter, train: Examples, rows: list[int], attention: str | None, dtype: torch.dtype | None
) -> float:
    taken = []
    with _computing(base, attention, dtype):
        for _ in range(TRIALS):
            began = time.perf_counter()
            forward(base, adapter.name, train, rows).sums.sum().backward()
            taken.append(time.perf_counter() - began)
    return min(taken[1:])


def _label(attention: str | None, dtype: torch.dtype | None) -> str:
    return f"{attention or 'base'}/{str(dtype or 'base').removeprefix('torch.')}"


def _can_switch(base: Base) -> bool:
    """Whether both implementations compute the same: some families have features that only one of them knows."""
    config = base.model.config
    return bool(base.model._supports_sdpa) and not getattr(config, "attn_logit_softcapping", None)


def _has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 can pay: a GPU, or a processor with instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
