"""Full fine-tuning in the same loop as adapters: the same rows, batches, start of the head and stopping.

It is what adapters are compared with. The base is trained in place and put back afterwards, so nothing of it changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from onebase.adapter import Adapter
from onebase.build import new_head
from onebase.core.contracts import AdapterModule
from onebase.core.quantized import quantization_of
from onebase.core.site import Site
from onebase.errors import ConfigError, UnsupportedError
from onebase.methods.method import Init, Method
from onebase.training.kernels import Kernels
from onebase.training.loop import Reporter, fit
from onebase.training.prepare import discard, prepare
from onebase.training.run import Run, conclude, kernels_for

if TYPE_CHECKING:
    from onebase.base import Base

NAME = "full"
RATES = (2e-5, 5e-5, 1e-4)  # Devlin et al. 2019 (arXiv 1810.04805) search 2e-5 to 5e-5; small bases take more


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """The whole base, in the guise of a method. It is not registered: no adapter can be stored with it."""

    name: ClassVar[str] = NAME
    summary: ClassVar[str] = "train every value of the base"
    mergeable: ClassVar[bool] = True

    def select(self, sites: Any) -> list[Site]:
        """Adapt no site: the base itself is trained."""
        return []

    def build(self, sites: Any, init: Init) -> AdapterModule:
        """Build nothing."""
        return AdapterModule({})


class FullAdapter(Adapter):
    """An adapter whose parameters are the base's own and the head's."""

    model: nn.Module

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield base and head."""
        yield from self.model.parameters()
        if self.head is not None:
            yield from self.head.parameters()

    def count(self, head: bool = True) -> int:
        """Number of trained values."""
        return super().count(head) + sum(p.numel() for p in self.model.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Return base and head."""
        return super().tensors() | {f"base.{n}": p.detach() for n, p in self.model.named_parameters()}

    def put(self, tensors: Any) -> None:
        """Restore base and head."""
        own = self.tensors()
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)


def check_trainable(base: Base) -> None:
    """Raise UnsupportedError where the base's own values cannot be trained."""
    if kind := quantization_of(base.model):
        raise UnsupportedError(f"the base is quantized ({kind}), and quantized weights cannot be trained")


@contextmanager
def opened(base: Base) -> Iterator[Callable[..., Adapter]]:
    """Let the base itself be trained, and put it back when the block ends.

    Args:
        base: the base; no adapter is on it, because every other one would change with it.

    Yields:
        What `prepare` takes as `build` beside the method `Full()`: its adapter's parameters are the base's own. They
        are frozen until somebody sets `base.model.requires_grad_(True)`, so that the base is scored as it was.

    Raises:
        ConfigError: the base carries adapters.
        UnsupportedError: the base is quantized.
    """
    if base.adapters:
        raise ConfigError(f"full fine-tuning changes what {', '.join(base.adapters)} stand on: remove them first")
    check_trainable(base)
    start = [p.detach().clone() for p in base.model.parameters()]

    def build(base: Base, name: str, method: Method, task: dict[str, Any], seed: int, **_: Any) -> Adapter:
        adapter = FullAdapter(name, method, AdapterModule({}), task)
        adapter.model = base.model
        adapter.head = new_head(base, task)
        return adapter

    try:
        yield build
    finally:
        base.model.requires_grad_(False)
        with torch.no_grad():
            for parameter, value in zip(base.model.parameters(), start):
                parameter.copy_(value)


@contextmanager
def trained_whole(
    base: Base, data: Any, *, report: Reporter | None = None, kernels: Kernels | None = None, **more: Any
) -> Iterator[Run]:
    """Train the whole base, and put it back when the block ends.

    Args:
        base: the base; no adapter but this one is on it.
        data: what `load_data` takes.
        report: receives progress.
        kernels: how the base computes meanwhile; measured by default.
        more: settings and options, as for `train`; `lr` is that of the base.

    Yields:
        The run, while the trained base is in place. Nothing is stored.

    Raises:
        ConfigError, UnsupportedError: as `opened`.
    """
    report = report or Reporter()
    with opened(base) as build:
        try:
            # the base's own score is taken in here, before the first step
            prepared = prepare(base, report, data=data, method=Full(), build=build, **more)
            try:
                base.model.requires_grad_(True)
                fit(base, prepared.state, kernels or kernels_for(base, [prepared]), report)
                base.model.requires_grad_(False)
                run = conclude(base, prepared)
            except BaseException:
                discard(base, prepared)
                raise
            yield run
        finally:
            if NAME in base.adapters:
                base.remove(NAME)
