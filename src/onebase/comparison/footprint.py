"""What a base is made of and what a training step allocates, from its config alone: no weights are needed.

The whole base is built on the meta device, which holds shapes only. What a step allocates is measured on copies of the
base that are one and two layers deep, with random weights: the layers of a base are alike, so each further layer costs
what the second one costs.
"""

from __future__ import annotations

import contextlib
import copy
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onebase.adapter import Adapter
from onebase.base import Base
from onebase.build import default_task, make_init
from onebase.core.contracts import AdapterModule
from onebase.core.draw import Draw
from onebase.devices import CPU_ROWS, PACKED_TOKENS, has_bf16, measures_attention
from onebase.errors import OnebaseError
from onebase.heads import LinearHead, pool
from onebase.loading import _loader, _locate, _not_found
from onebase.methods.method import Method

# Settings that say how many layers a stack has, beside `num_hidden_layers`, which every config answers to.
DEPTHS = ("num_hidden_layers", "num_decoder_layers", "decoder_layers", "encoder_layers")
ALLOWED = 3 * 10**9  # bytes of a two-layer copy; beyond it nothing is measured, so that planning never fills a laptop
CLASSES = 2  # outputs of the head that is counted: a head has outputs * (D + 1) values
WORDS = 4096  # ids that stand for "frequent tokens" where no data is there; prompts draw on at most 5,000


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one training step allocates.

    Attributes:
        peak: bytes allocated at the highest point of forward and backward, beyond what was there.
        seconds: of one micro-batch, forward and backward.
    """

    peak: float
    seconds: float


def read_config(name: str) -> tuple[Any, str]:
    """Return the config of a base, and the name to show.

    Raises:
        UnsupportedError: a model whose weights nobody can have.
        ConfigError: nothing is found.
    """
    from transformers import AutoConfig

    from onebase.errors import ConfigError

    source, shown = _locate(name)
    try:
        return AutoConfig.from_pretrained(source), shown
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(name, error)) from error


def skeleton(config: Any) -> Base:
    """Build a base on the meta device: every shape, no value."""
    with torch.device("meta"):
        return Base(_loader(config).from_config(config, dtype=torch.float32))


def shallow(config: Any, layers: int) -> Base:
    """Build a base of a few layers with random weights."""
    cut = copy.deepcopy(config)
    for name in DEPTHS:
        if getattr(cut, name, None) is not None:
            setattr(cut, name, layers)
    if getattr(cut, "layer_types", None):
        cut.layer_types = list(cut.layer_types)[:layers]
    model = _loader(cut).from_config(cut, dtype=torch.float32)
    return Base(model.eval())


def make(base: Base, method: Method) -> AdapterModule:
    """Build a method's module for a base that has no tokenizer and no data.

    Raises:
        OnebaseError: the base cannot carry the method, or the method reads weights that are not there.
    """
    sites = method.select(list(base.anatomy.sites.values()))
    refused = next((site for site in sites if site.unsupported), None)
    if refused is not None:
        raise OnebaseError(f"{method.name} at {refused.name}: {refused.unsupported}")
    stack = base.anatomy.stacks[0]
    init = make_init(base, default_task(base), 0, [5] * WORDS, True, None)
    rows = lambda ids: torch.zeros(len(ids), stack.width)  # noqa: E731
    init = type(init)(init.generator, init.embed, init.kv, rows, init.labels, init.frequent, init.word_ids)
    return method.build(sites, init)


def count(module: AdapterModule) -> tuple[int, int]:
    """Return (trainable values, bytes of what is stored) of a module without its head."""
    trainable = sum(p.numel() for p in module.parameters())
    stored = sum(t.numel() * t.element_size() for t in module.fold().tensors().values())
    return trainable, stored


def micro_rows(batch: int, length: int, device: torch.device) -> int:
    """Return how many rows of `length` tokens go through the base at once in training."""
    if device.type != "cpu":
        return batch
    return max(1, min(batch, CPU_ROWS, PACKED_TOKENS // length))


def measure(base: Base, method: Method | None, batch: int, length: int, outputs: int = CLASSES) -> Step:
    """Run training steps on random tokens and watch what is allocated.

    Args:
        base: with real weights.
        method: what is trained; None trains the base itself.
        batch: rows of an optimizer step.
        length: tokens of a row.
        outputs: of the head.
    """
    with _trainable(base, method, outputs) as (name, parameters, head):
        rows = micro_rows(batch, length, base.device)
        ids = torch.randint(5, _vocabulary(base), (rows, length))
        peak = 0
        for width, half in _passes(base, batch, length):
            with Watch() as watch:
                _step(base, name, head, torch.randint(5, _vocabulary(base), (width, length)), half)
            peak = max(peak, watch.peak)
            for parameter in parameters:
                parameter.grad = None
        began = time.perf_counter()
        _step(base, name, head, ids, has_bf16(base.device))
        seconds = time.perf_counter() - began
        for parameter in parameters:
            parameter.grad = None
    return Step(peak=float(peak), seconds=seconds)


class Watch(TorchDispatchMode):
    """Follows what tensors hold: bytes of every storage that an operation makes, until nobody refers to it.

    What an operation needs for itself while it runs is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.live: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the storages that are new."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.live:
            self.live.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


@contextlib.contextmanager
def _trainable(base: Base, method: Method | None, outputs: int) -> Iterator[tuple[str | None, list[Any], Any]]:
    texts = base.has_lm_head
    head = None if texts else LinearHead(base.anatomy.hidden_size, outputs)
    more = [] if head is None else list(head.parameters())
    if method is None:
        base.model.requires_grad_(True)
        try:
            yield None, [*base.model.parameters(), *more], head
        finally:
            base.model.requires_grad_(False)
        return
    adapter = base._attach(Adapter("measured", method, make(base, method), default_task(base)))
    adapter.train()
    adapter.routed.draw = Draw(0, 0)
    try:
        yield adapter.name, [*adapter.module.parameters(), *more], head
    finally:
        base.remove(adapter.name)


def _passes(base: Base, batch: int, length: int) -> list[tuple[int, bool]]:
    """Return the passes that training makes: (rows, in bfloat16).

    Before the first step the kernels are timed on CPU_ROWS rows, in float32 too: on a CPU with bfloat16 that is the
    highest point of a whole run.
    """
    own = (micro_rows(batch, length, base.device), has_bf16(base.device))
    return [own, (CPU_ROWS, False)] if measures_attention(base.device) else [own]


def _step(base: Base, name: str | None, head: Any, ids: torch.Tensor, half: bool) -> None:
    mask = torch.ones_like(ids)
    with torch.autocast(base.device.type, torch.bfloat16, enabled=half, cache_enabled=False):
        if head is None:
            more = {"decoder_input_ids": ids} if base.is_encoder_decoder else {}
            with base.packed(name):
                logits = base.model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        else:
            states = base.states({"input_ids": ids, "attention_mask": mask}, name)
            loss = head(pool(states, mask, base.anatomy.pooling)).logsumexp(1).sum()
        loss.backward()


def _vocabulary(base: Base) -> int:
    embed = base.anatomy.stacks[0].embed
    return int(embed.weight.shape[0])  # type: ignore[union-attr,index]
