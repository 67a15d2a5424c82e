"""Texts that are written together, token by token: rows come in and leave between two steps.

transformers' `generate` keeps its batch until the longest row is done. Here the KV caches of rows are one padded cache:
who comes in is read in a forward of its own and its columns are put beside the others, right-aligned; who leaves takes
its row along, and columns that nobody uses any more go. Virtual tokens lie in the cache like any others, so each row's
number of them is kept beside its mask, and the anchor is told before every step.

Only caches that are plain keys and values can be joined. Whether a base's are is never assumed: see `problem_of`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onebase.build import vocabulary
from onebase.core.anchor import CACHES, MEMO, output_cache
from onebase.core.layout import Layout
from onebase.encode import Encoded, collate, pad_id
from onebase.errors import OnebaseError, UnsupportedError
from onebase.generation import Shape, generate_ids
from onebase.storing import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onebase.base import Base

# Fields of a model's own generation config that change nothing here: what is drawn is decided by row, lengths too.
HARMLESS = frozenset(
    {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "do_sample"}
    | {"temperature", "top_k", "top_p", "min_p", "typical_p", "max_length", "max_new_tokens", "use_cache"}
    | {"cache_implementation", "output_attentions", "output_hidden_states", "return_dict_in_generate"}
    | {"_from_model_config", "num_return_sequences"}
)
PROOF_METHODS = ("prompt(length=2)", "prefix(length=3)", "lora(rank=2)")
PROOF_TOKENS = 5


class Decoding:
    """Rows that write. Not safe to use from several threads.

    Args:
        base: writes; `problem_of` says whether it can here.
    """

    def __init__(self, base: Base):
        self.base = base
        known = inspect.signature(base.model.forward).parameters
        self._named = CACHES[0] if CACHES[0] in known else CACHES[1]
        self._takes_positions = "position_ids" in known
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in known:
            self._options["logits_to_keep"] = 1
        self.clear()

    def clear(self) -> None:
        """Forget every row."""
        self.names: list[str | None] = []
        self._prompts: list[int] = []  # tokens of each row's prompt
        self._cache: Any = None
        self._mask = torch.zeros(0, 0, dtype=torch.long)  # (B, T) real tokens, virtual ones not counted
        self._virtual = torch.zeros(0, dtype=torch.long)  # (B,) virtual tokens of each row

    def join(self, rows: Sequence[Sequence[int]], names: Sequence[str | None]) -> Tensor:
        """Read prompts and let them write along.

        Args:
            rows: token ids of n prompts, at least one each.
            names: the adapter of each, None for the plain base.

        Returns:
            (n, V) logits of each one's first token, float32. The new rows are the last ones.

        Raises:
            UnsupportedError: this base's cache cannot be joined. Whatever is raised, the other rows are as before.
        """
        batch = collate([Encoded(tuple(row)) for row in rows], pad_id(self.base.tokenizer), "left", self.base.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        lengths = [len(row) for row in rows]
        logits, cache = self._forward(ids, mask, names, lengths, None)
        _check(cache, len(rows))
        memo = getattr(cache, MEMO, None)
        virtual = torch.zeros(len(rows), dtype=torch.long, device=mask.device) if memo is None else memo.lengths
        self._merge(cache, mask, virtual)
        self.names += names
        self._prompts += lengths
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to every row.

        Args:
            tokens: B token ids, in the order of the rows.

        Returns:
            (B, V) logits of the next ones, float32.
        """
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        mask = torch.cat([self._mask, torch.ones_like(ids)], 1)
        logits, self._cache = self._forward(ids, mask, self.names, self._prompts, self._cache)
        self._mask = mask
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; the others leave."""
        if not rows:
            self.clear()
            return
        index = torch.tensor(rows, device=self._mask.device)
        mask, virtual = self._mask.index_select(0, index), self._virtual.index_select(0, index)
        first = int(mask.argmax(1).min())  # the first column that a row uses
        gone = first + int(self._virtual.max()) - int(virtual.max())
        for layer in self._cache.layers:
            layer.keys, layer.values = (t.index_select(0, index)[:, :, gone:] for t in (layer.keys, layer.values))
        self._mask, self._virtual = mask[:, first:], virtual
        self.names = [self.names[row] for row in rows]
        self._prompts = [self._prompts[row] for row in rows]
        self._mark()

    def _forward(
        self, ids: Tensor, mask: Tensor, names: Sequence[str | None], prompts: Sequence[int], cache: Any
    ) -> tuple[Tensor, Any]:
        call: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **self._options}
        if self._takes_positions:  # as `generate` counts them
            call["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if cache is not None:
            call[self._named] = cache
        installed, route = self.base._installed, self.base.use(names, prompts=prompts)
        with torch.no_grad(), installed.without_checkpointing(), installed.fast_products(), route:
            output = self.base.model(**call)
        return output.logits[:, -1].float(), output_cache(output)

    def _merge(self, cache: Any, mask: Tensor, virtual: Tensor) -> None:
        """Put the rows of another cache behind these: columns end together, missing ones are masked."""
        if self._cache is None:
            self._cache, self._mask, self._virtual = cache, mask, virtual
            self._mark()
            return
        columns = max(self._mask.shape[1], mask.shape[1])
        together = torch.cat([self._virtual, virtual])
        width = columns + int(together.max())
        pairs = [
            [torch.cat([_left(a, width), _left(b, width)]) for a, b in ((old.keys, new.keys), (old.values, new.values))]
            for old, new in zip(self._cache.layers, cache.layers)
        ]
        for layer, (keys, values) in zip(self._cache.layers, pairs):
            layer.keys, layer.values = keys, values
        self._mask = torch.cat([F.pad(m, (columns - m.shape[1], 0)) for m in (self._mask, mask)])
        self._virtual = together
        self._mark()

    def _mark(self) -> None:
        """Tell the anchor where virtual tokens are in the cache."""
        if hasattr(self._cache, MEMO):
            delattr(self._cache, MEMO)
        width = int(self._virtual.max())
        if width:
            start = self._mask.argmax(1)
            layout = Layout(self._virtual, width, start, width - self._virtual, self._mask.shape[1])
            setattr(self._cache, MEMO, layout)


def _left(states: Tensor, width: int) -> Tensor:
    """Pad keys or values (B, H, T, D) on the left to `width` columns."""
    return F.pad(states, (0, 0, width - states.shape[2], 0))


def _check(cache: Any, rows: int) -> None:
    from transformers.cache_utils import DynamicLayer

    layers = list(getattr(cache, "layers", ()))
    strange = next((type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer), None)
    if not layers or strange:
        raise UnsupportedError(
            f"the cache of this base ({strange or type(cache).__name__}) is not only keys and values"
        )
    if any(layer.keys is None or layer.keys.dim() != 4 or len(layer.keys) != rows for layer in layers):
        raise UnsupportedError("the cache of this base does not hold one row of keys for each text")


# -- whether a base can ------------------------------------------------------------------------------------------------


def problem_of(base: Base) -> str | None:
    """Return why texts of a base cannot come and go, None where they can.

    What is known is asked first; then two adapters on one prompt and the plain base come in at different steps and
    leave. Every token that `base.generate` writes for each alone must be the most probable one here, up to rounding.

    Args:
        base: nothing else may use it meanwhile. It is left as it was.
    """
    stack = base.anatomy.stacks[-1]
    if not base.has_lm_head or base.is_encoder_decoder:
        return "an encoder feeds its decoder" if base.is_encoder_decoder else "it has no LM head"
    if stack.padding.get("left") or stack.before:
        return f"it takes no rows padded on the left: {stack.padding.get('left') or 'tokens stay in front'}"
    strange = sorted(set(base.model.generation_config.to_diff_dict()) - HARMLESS)
    if strange:
        return f"its own generation config sets {', '.join(strange)}, which `generate` applies to whole texts"
    try:
        with _two_adapters(base) as names:
            return _proof(base, names)
    except (OnebaseError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _two_adapters(base: Base) -> Iterator[list[str]]:
    """Attach two adapters of methods that leave most to be got wrong: virtual tokens, keys, weights."""
    names: list[str] = []
    try:
        for number, method in enumerate(PROOF_METHODS):
            try:
                adapter = base.add(f"joined#{number}", method, seed=number)
            except OnebaseError:
                continue
            names.append(adapter.name)
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for tensor in adapter.module.parameters():
                    tensor += (0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor)
            if len(names) == 2:
                break
        if len(names) < 2:
            raise UnsupportedError("no two adapters to try it with")
        yield names
    finally:
        for name in names:
            base.remove(name)


def _proof(base: Base, names: Sequence[str]) -> str | None:
    words = vocabulary(base)
    prompt = [words[(7 * i) % len(words)] for i in range(4)]
    long = prompt + [words[(11 * i + 3) % len(words)] for i in range(5)]
    asked = [(prompt, names[0]), (prompt, names[1]), (long, None), (prompt, names[0])]
    wanted = [
        generate_ids(
            base, [ids], [name], max_new_tokens=PROOF_TOKENS, do_sample=False, seeds=None, shape=Shape(), num_beams=1,
            num_return_sequences=1, settings={},
        )[0][0]
        for ids, name in asked
    ]  # fmt: skip
    together, running = Decoding(base), []  # running: [number in `asked`, tokens written]
    waiting = [[0], [1, 2], [3]]  # who comes in at each step
    while waiting or running:
        for new in waiting[:1]:
            scores = together.join([asked[i][0] for i in new], [asked[i][1] for i in new])
            running += [[i, 0] for i in new]
            if wrong := _differs(scores, running[-len(new) :], wanted, base):
                return wrong
        waiting = waiting[1:]
        rows = [row for row, (i, written) in enumerate(running) if written + 1 < len(wanted[i])]
        if rows != list(range(len(running))):
            together.keep(rows)
            running = [running[row] for row in rows]
        if running:
            scores = together.step([wanted[i][written] for i, written in running])
            running = [[i, written + 1] for i, written in running]
            if wrong := _differs(scores, running, wanted, base):
                return wrong
    return None


def _differs(
    scores: Tensor, running: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], base: Base
) -> str | None:
    """Say where the wanted token is not the most probable one."""
    dtype = next(base.model.parameters()).dtype
    for row, (i, written) in zip(scores, running):
        if written < len(wanted[i]):
            gap = float(row.max() - row[wanted[i][written]])
            allowed = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) * max(1.0, float(row.abs().max()))
            if not gap <= allowed:
                return f"a text that comes in later is written otherwise: logits differ by {gap:.3g} of {allowed:.3g}"
    return None
