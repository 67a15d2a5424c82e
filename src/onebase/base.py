"""The base: one frozen model, its adapters, and every way to call it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.adapter import Adapter
from onebase.anatomy.anatomy import Anatomy, dissect
from onebase.anatomy.installation import Installation
from onebase.build import build_adapter, complete_task, default_task
from onebase.compose import binding
from onebase.compose.recipes import Composition
from onebase.core.offload import device_of, is_offloaded
from onebase.core.plan import Routed
from onebase.core.quantized import quantization_of
from onebase.core.route import as_route
from onebase.encode import Encoded, collate, pad_id, real_tokens
from onebase.errors import ConfigError, OnebaseError, RouteError, UnsupportedError, unknown
from onebase.heads import pool
from onebase.methods.method import Method, plain_number, whole
from onebase.methods.registry import parse_method
from onebase.tasks import Prediction, get_task
from onebase.words import seen

if TYPE_CHECKING:
    from onebase.as_model import AdapterModel
    from onebase.bound import Bound
    from onebase.exchange import Exported
    from onebase.merging import Merged
    from onebase.store import Stored

Names = str | None | Sequence[str | None]
AdapterNames = Names | Composition | Sequence[str | Composition | None]
LIKE_LENGTHS = 8  # texts whose lengths differ by less stand together in a mixed batch
LEARNED = ("labels", "weights")  # of a task's spec: no text is encoded by them
SHARES = 0.8  # distinct texts over rows, up to which layers below the first deltas are worth being shared


class Base:
    """One frozen model that carries many adapters. Its tensors, keys, flags and outputs never change.

    Args:
        model: any transformers model of a known family, with or without an LM head.
        tokenizer: its tokenizer; None leaves only calls with tensors.
        processor: the image processor of a base that reads images; None leaves only calls with tensors.
        id: name for stored adapters; the model's own name by default.

    Raises:
        UnsupportedError: the family is unknown.

    Example:
        >>> base = Base(model, tokenizer)                           # doctest: +SKIP
        >>> base.add("draft", "lora(rank=4)")                       # doctest: +SKIP
        >>> base.predict(["fine", "awful"], adapter=["draft", None])  # doctest: +SKIP
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, processor: Any = None, id: str = ""):
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.id = id or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.anatomy: Anatomy = dissect(model)
        self.quantization = quantization_of(model)  # how weights are quantized, '' where they are not
        self._unfit: str | None = None  # why no adapter can stand on the weights, '' if they can; None: unknown
        self._adapters: dict[str, Adapter] = {}
        self._numbers: dict[int, str] = {}
        self._next = 0
        self._baselines: dict[Any, Any] = {}  # heads on the frozen base, by the data they were fitted on
        self._settled: dict[Any, dict[str, Any]] = {}  # final specs of tasks, by data and the spec asked for
        self._kernels: dict[Any, Any] = {}  # measured choices of training, by what they depend on
        self._memory: ContextVar[Any] = ContextVar("onebase_memory", default=None)  # a `core.kept.Memory` in training
        self.encoding = threading.RLock()  # tokenizers cannot be used by two threads at once
        self._closed = False
        self._merged: Merged | None = None
        self._whole: str | None = None  # fingerprint of layers that were split over processes or offloaded
        self._installed = Installation(model, self.anatomy, self._find, self._names_of)

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device that the base computes on: of its embeddings, or the one that offloaded weights are brought to."""
        return device_of(self.anatomy.stacks[0].embed)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder feeds a decoder."""
        return len(self.anatomy.stacks) > 1

    @property
    def reads_images(self) -> bool:
        """Whether the base reads pixels, no token ids."""
        return self.anatomy.stacks[0].patches is not None

    @property
    def has_lm_head(self) -> bool:
        """Whether the model predicts tokens from left to right."""
        return self.anatomy.stacks[-1].causal and self.model.get_output_embeddings() is not None

    @property
    def has_masked_head(self) -> bool:
        """Whether the model is an encoder that predicts masked tokens."""
        encoder = not self.is_encoder_decoder and not self.anatomy.stacks[-1].causal
        return encoder and type(self.model).__name__.endswith("ForMaskedLM")

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by name; looking up an unknown name raises with the nearest ones."""
        return _Named(self._adapters)

    def _find(self, name: str) -> Routed:
        return self.adapters[name].routed

    def _names_of(self, ids: Tensor) -> tuple[str | None, ...]:
        self._open()
        found: list[str | None] = []
        for number in ids.tolist():
            if number != -1 and number not in self._numbers:
                raise RouteError(
                    f"adapter_ids: no adapter has number {number}; use base.ids(names), -1 is the plain base"
                )
            found.append(self._numbers.get(number))
        return tuple(found)

    def ids(self, names: Sequence[str | None]) -> Tensor:
        """Return the `adapter_ids` tensor (B,) that routes row i to names[i]; -1 is the plain base.

        Raises:
            UnknownNameError, RouteError: no such adapter, or no list of names.
        """
        if names is None or isinstance(names, str):
            raise RouteError(f"names = {names!r}: expected a list with a name, or None, for each row")
        names = binding.named(self, names)
        self._check(tuple(names))
        return torch.tensor([-1 if n is None else self._adapters[n].routed.number for n in names], device=self.device)

    # -- adapters ------------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        method: str | Method | Mapping[str, Any],
        *,
        task: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> Adapter:
        """Attach a new, untrained adapter.

        Args:
            name: unique on this base.
            method: a method, a shorthand such as ``"lora(rank=4)"``, or a composition of attached adapters.
            task: kind, labels, pooling, max_length, template and options of the kind; what is missing has its default.
                None: no head, or the parts' own.
            seed: of the initialisation.

        Returns:
            The adapter.

        Raises:
            ConfigError: the name is taken, or a setting, the task or the seed is wrong.
            UnsupportedError: this base cannot carry the method, and why.
        """
        self._open()
        if not isinstance(name, str):
            raise ConfigError(f"adapter name {name!r}: expected a text")
        if not name or name in self._adapters:
            raise ConfigError(f"adapter name {name!r} is {'taken: remove it first' if name else 'empty'}")
        seed = plain_number(seed)
        if type(seed) is not int or not -(2**63) <= seed < 2**63:
            raise ConfigError(f"seed = {seed!r}: expected a whole number of at most 63 bits")
        task = None if task is None else complete_task(self, task)
        if isinstance(method, Composition):
            return binding.add(self, name, method, task, seed)
        method = parse_method(method)
        return self._attach(build_adapter(self, name, method, task or default_task(self), seed))

    def _attach(self, adapter: Adapter) -> Adapter:
        adapter.routed.number = self._next
        self._next += 1
        self._installed.add(adapter.routed)
        self._adapters[adapter.name] = adapter
        self._numbers[adapter.routed.number] = adapter.name
        return adapter

    def _rename(self, adapter: Adapter, name: str) -> None:
        """Give an attached adapter the name it is used by."""
        del self._adapters[adapter.name]
        adapter.name = adapter.routed.name = name
        self._adapters[name] = adapter
        self._numbers[adapter.routed.number] = name

    def load(self, ref: str, *, name: str | None = None, store: Any = None, verify: bool = True) -> Adapter:
        """Attach a stored adapter: ``"reviews"``, ``"reviews@3"`` or a folder.

        Args:
            ref: what to load.
            name: the name to use in calls; the stored name by default.
            store: a `Store`; the default store of this user otherwise.
            verify: run the probes and compare with those stored.

        Returns:
            The adapter, attached.

        Raises:
            UnknownNameError: nothing is stored under `ref`.
            CorruptError, MismatchError: one error that lists everything wrong with its files, or for this base.
            ConfigError: the name is taken on this base.
        """
        from onebase.storing import load_adapter

        self._open()
        return load_adapter(self, ref, name, store, verify)

    def save(
        self,
        name: str,
        *,
        store: Any = None,
        as_name: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> Stored:
        """Store an adapter as the next version of its name.

        Args:
            name: the attached adapter.
            store: a `Store`; the default store of this user otherwise.
            as_name: name in the store; the adapter's own by default.
            provenance: where it comes from, as JSON values to keep with it.
            metrics: its scores, to keep with it.

        Returns:
            The version stored: its reference, folder, digest and config.

        Raises:
            UnknownNameError: no adapter of this name is attached.
            ConfigError, StoreError: the name cannot be used, a value is not finite, or the disk refuses.
        """
        from onebase.storing import save_adapter

        self._open()
        for what, facts in (("provenance", provenance), ("metrics", metrics)):
            if not isinstance(facts, Mapping | None):
                raise ConfigError(f"{what} = {facts!r}: expected a mapping of JSON values")
        return save_adapter(self, self.adapters[name], store, as_name, provenance=provenance, metrics=metrics)

    def import_adapter(
        self, source: str | Path, *, name: str | None = None, labels: Sequence[str] = (), rank: int | None = None
    ) -> Adapter:
        """Attach an adapter that PEFT or the AdapterHub library wrote.

        Such files have no digest and no probes, so nothing tells whether they are whole; structure, names, shapes,
        finiteness and settings are checked, and what cannot be carried over exactly is an error that names it.

        Args:
            source: a folder, or the id of a hub repository, with ``@REVISION`` for a commit, branch or tag.
            name: the name to use in calls; the folder's own by default.
            labels: names of the classes, in order, where the file has a head but no names.
            rank: of the LoRA to make of a PEFT method that has no form here (LoHa, OFT ...); None keeps it exactly.

        Returns:
            The adapter, attached; `save` stores it.

        Raises:
            ConfigError, UnsupportedError, CorruptError, MismatchError: one error that lists everything wrong.
        """
        from onebase.exchange import import_adapter

        self._open()
        return import_adapter(self, source, name, labels, rank)

    def export(self, name: str, folder: str | Path, *, to: str = "peft", head: bool = True) -> Exported:
        """Write an adapter in the form of another library, read it back, and compare its answers.

        Args:
            name: the attached adapter.
            folder: new or empty.
            to: 'peft'; 'vllm' (PEFT LoRA within vLLM's limits); 'adapterhub'; 'merged' (a full model);
                'onnx' (a full encoder).
            head: write the task head too, where the format has heads.

        Returns:
            What was written, and how far its answers to the probes are from the adapter's.

        Raises:
            UnsupportedError: the format has nothing that computes the same, and why.
            StoreError: the folder is not empty.
        """
        from onebase.exchange import export_adapter

        self._open()
        return export_adapter(self, name, folder, to, head)

    def merge(self, name: str) -> None:
        """Write an adapter into the base's weights: `model` alone then answers as the adapter does, at no cost.

        Until `unmerge` the base takes no routes and no other adapters. A task head is no weight of the base.

        Args:
            name: the attached adapter; its method must be a change of weights.

        Raises:
            UnsupportedError: it is none, or a bias or weight that it needs does not exist; nothing is changed then.
            RouteError: a route holds, in this thread or another one.
        """
        from onebase.merging import merge

        self._open()
        if self._installed.context.holders:  # calls inside would apply the adapter, or another one, on top
            raise RouteError(
                f"cannot merge {name!r} while a route holds: leave base.use(...), and wait for calls of other threads"
            )
        self._merged = merge(self, name)

    def unmerge(self) -> None:
        """Take the merged adapter out: every weight has its original bits again.

        Raises:
            OnebaseError: nothing is merged.
        """
        from onebase.merging import restore

        if self._merged is None:
            raise OnebaseError("no adapter is merged into this base")
        restore(self._merged)
        self._merged = None

    def remove(self, name: str) -> None:
        """Detach an adapter; taps that nobody needs any more go with it.

        Raises:
            UnknownNameError: there is no such adapter.
        """
        self._open()
        adapter = self.adapters[name]
        for each in [adapter, *(self._adapters[n] for n in binding.drop_unnamed(self, adapter))]:
            del self._adapters[each.name], self._numbers[each.routed.number]
        self._installed.release({site for a in self._adapters.values() for site in a.routed.deltas})

    def close(self) -> None:
        """Detach everything: tensors, keys, hooks, flags, attention setting and outputs are as they were loaded."""
        if not self._closed:
            if self._merged is not None:
                self.unmerge()
            self._adapters.clear()
            self._installed.close()
            self._closed = True

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self) -> None:
        if self._closed:
            raise OnebaseError("this base is closed; load it again")
        if self._merged is not None:
            from onebase.merging import refuse_merged

            refuse_merged(self._merged)

    def tokenizer_of(self, name: str | None) -> Any:
        """Return the tokenizer that texts of an adapter are cut with: the base's, or its own view with words added."""
        own = None if name is None else self.adapters[name].tokenizer
        return self.tokenizer if own is None else own

    # -- routes --------------------------------------------------------------------------------------------------

    def _check(self, names: Names) -> None:
        self._open()
        iterable = isinstance(names, Iterable) and not isinstance(names, bytes | Mapping | set | frozenset)
        if names is not None and not iterable:  # a set has no order
            raise RouteError(f"adapter = {names!r}: expected one name, None for the plain base, or a list of them")
        for name in (names,) if isinstance(names, str) or names is None else names:
            if name is not None:
                self.adapters[name]

    @contextmanager
    def use(self, adapter: AdapterNames, *, repeat: int = 1, prompts: Sequence[int] | None = None) -> Iterator[Base]:
        """Route every call of this thread or task inside the block.

        Args:
            adapter: one name (None: the plain base) for all rows, or one entry per row.
            repeat: how often generation repeats each row (`num_beams`, or `num_return_sequences`).
            prompts: real tokens of each row's prompt, where the call holds more than it: methods that change the last
                positions of a prompt (loreft) need it when a text is written without a cache. None: the whole row.

        Yields:
            This base.

        Raises:
            UnknownNameError: before any computing.
            ConfigError: `repeat` is less than 1.
        """
        names = binding.named(self, adapter)
        self._check(names)
        if repeat < 1:
            raise ConfigError(f"repeat = {repeat!r}: expected at least 1")
        with self._installed.context.use(as_route(names, repeat, prompts=prompts)):
            yield self

    def bind(self, adapter: AdapterNames, function: Callable[..., Any] | None = None) -> Bound:
        """Return a callable that carries its route into any thread, executor or task.

        Args:
            adapter: as in `use`.
            function: what to call under the route; the model by default. The result also has `generate` and `predict`.
        """
        from onebase.bound import Bound

        names = binding.named(self, adapter)
        self._check(names)
        return Bound(self, names, function)

    def as_model(self, name: str | None) -> AdapterModel:
        """Return an adapter as a trainable module: its parameters and state are the adapter and head only.

        For Trainer, TRL, pipelines, DDP and FSDP; `forward` returns loss and logits, `save_pretrained` writes the
        adapter.

        Args:
            name: the attached adapter; None is the plain base without parameters, which preference trainers such as
                TRL's DPOTrainer take as `ref_model`, so that one model serves both.
        """
        from onebase.as_model import AdapterModel

        return AdapterModel(self, None if name is None else self.adapters[name])

    def gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute layers in the backward pass: less memory, more time, the same gradients."""
        self._installed.checkpointing(enable)

    # -- calls ---------------------------------------------------------------------------------------------------

    def states(self, batch: Mapping[str, Tensor], adapter: AdapterNames, rows: Sequence[int] | None = None) -> Tensor:
        """Return the last hidden states (B, T, D) of the stack that classification reads, at the callers' tokens.

        Args:
            batch: input_ids, attention_mask (B, T), token_type_ids where the tokenizer gives them; or pixel_values
                (B, C, H, W) for a base that reads images.
            adapter: as in `use`.
            rows: the row of the batch that each adapter of a list reads; there is one result per adapter then. Layers
                below the first delta are computed once for all adapters on a row, where the base allows that.
        """
        self._open()
        stack = self.anatomy.stacks[0]
        known = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
        inputs = {k: batch[k] for k in known if k in batch}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(stack.embed.weight.dtype)  # type: ignore[union-attr,arg-type]
        if stack.causal:
            inputs["use_cache"] = False  # type: ignore[assignment]
        with self.packed(adapter, strip=True, rows=rows):
            return stack.module(**inputs).last_hidden_state

    def packs(self, adapter: str) -> bool:
        """Return whether rows of an adapter are computed without their padding in `states` and in training."""
        routed = self._find(adapter)
        return self._installed.packs and not routed.positional

    @contextmanager
    def packed(
        self,
        adapter: AdapterNames,
        *,
        strip: bool = False,
        prompts: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Route like `use`, and compute rows without their padding where the base can.

        For callers that read nothing but the last states, or logits made of them; states are zero in padding.

        Args:
            adapter, prompts: as in `use`.
            strip: an encoder that feeds a decoder hands back the callers' tokens only.
            rows: as in `states`.

        Yields:
            Nothing; the route holds inside the block.
        """
        names = binding.named(self, adapter)
        with self._installed.packing() as pack:
            route = as_route(names, strip=strip, prompts=prompts, pack=pack, rows=rows, memory=self._memory.get())
            with self._installed.context.use(route):
                yield

    def vectors(self, batch: Mapping[str, Tensor], adapter: AdapterNames, pooling: str) -> Tensor:
        """Return pooled states (B, D), float32.

        Args:
            batch, adapter: as in `states`.
            pooling: 'mean' over real tokens, 'first' or 'last' real token.
        """
        states = self.states(batch, adapter)
        return pool(states, real_tokens(batch, states), pooling)

    def outputs(
        self, batch: Mapping[str, Tensor], names: Sequence[str | None], rows: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Return per row what its adapter's head gives, or the pooled vector where there is no head. One forward.

        Args:
            batch: B rows.
            names: B adapter names or None.
            rows: as in `states`; then any number of names.
        """
        names = binding.named(self, names)
        states = self.states(batch, names, rows)
        mask = real_tokens(batch, states) if rows is None else real_tokens(batch, states)[list(rows)]
        out: list[Tensor | None] = [None] * len(names)
        for name in dict.fromkeys(names):
            mine = [i for i, other in enumerate(names) if other == name]
            spec, head = self._spec(name), None if name is None else self._adapters[name].head
            values = get_task(spec["kind"]).read(head, states[mine], mask[mine], spec)
            for row, value in zip(mine, values):
                out[row] = value
        return out  # type: ignore[return-value]

    def _spec(self, name: str | None) -> dict[str, Any]:
        """Return the task of an adapter; the plain base gives embeddings."""
        return default_task(self) | {"kind": "features"} if name is None else self._adapters[name].task

    def predict(
        self,
        texts: str | Sequence[str],
        adapter: AdapterNames = None,
        *,
        pairs: str | Sequence[str | None] | None = None,
        batch_size: int = 32,
    ) -> list[Prediction]:
        """Answer texts, each with its own adapter, in mixed batches.

        Args:
            texts: one text or n; for a base that reads images, paths of pictures or PIL images.
            adapter: one name for all, or n entries; None is the plain base, which answers with its embedding.
            pairs: second texts, for tasks on pairs: the context of a question, the document of a query; None for rows
                of adapters that read single texts.
            batch_size: rows per forward; rows are sorted by length, results keep the order of `texts`. Rows with the
                same tokens and adapter are computed once, and adapters on the same tokens share the layers that none
                of them touches.

        Returns:
            n predictions.

        Raises:
            UnknownNameError, RouteError, ConfigError: before any computing.
        """
        batch_size = whole("batch_size", batch_size, 1)
        if self.reads_images:
            texts = [texts] if isinstance(texts, str) or not isinstance(texts, Sequence) else list(texts)
        else:
            texts = _listed("texts", texts)
        pairs = [None] * len(texts) if pairs is None else _listed("pairs", pairs, missing=True)
        names = self._spread(adapter, len(texts))
        self._check_predict(names, texts, pairs)
        if texts and all(self._spec(name)["kind"] == "masked-lm" for name in names):
            return self.fill(texts, names, batch_size=batch_size)
        rows = self._encode_each(names, texts, pairs)
        flat = [(i, row) for i, many in enumerate(rows) for row in many]
        first: dict[tuple, int] = {}  # the same tokens under the same adapter are computed once
        same = [first.setdefault(_content(names[i], row), place) for place, (i, row) in enumerate(flat)]
        shared: dict[tuple, int] = {}  # the same tokens under several adapters share what is below their first deltas
        texts_of = [shared.setdefault(_content(None, row), place) for place, (_, row) in enumerate(flat)]
        often = Counter(texts_of[i] for i in first.values())

        rows_each = Counter(names)
        methods = {name: "" if name is None else str(self.adapters[name].method) for name in rows_each}
        step = LIKE_LENGTHS if len(rows_each) > 1 else 1

        def place_of(i: int) -> tuple:
            """Sort by length; among equal texts by text, among others so that what a bank computes stands together."""
            name, length = names[flat[i][0]], len(flat[i][1].ids)
            if often[texts_of[i]] > 1:
                return length // step, 0, texts_of[i], name or ""
            tokens, columns = (0, 0) if name is None else self.adapters[name].routed.adds()
            length += tokens
            return length // step, columns, -1, methods[name], rows_each[name], name or "", length

        order = sorted(first.values(), key=place_of)
        values: list[Tensor | None] = [None] * len(flat)
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                part = order[start : start + batch_size]
                distinct = list(dict.fromkeys(texts_of[i] for i in part))
                shares = len(distinct) <= SHARES * len(part)
                rows_of = [distinct.index(texts_of[i]) for i in part] if shares else None
                own = [flat[i][1].bare for i in (distinct if shares else part)]
                batch = collate(own, pad_id(self.tokenizer), device=self.device)
                for i, value in zip(part, self.outputs(batch, [names[flat[i][0]] for i in part], rows_of)):
                    values[i] = value
        found: list[list[Tensor]] = [[] for _ in texts]
        for (text, _), place in zip(flat, same):
            found[text].append(values[place])  # type: ignore[arg-type]
        return [self._prediction(names[i], rows[i], found[i], texts[i], pairs[i]) for i in range(len(texts))]

    def rank(
        self, query: str, documents: Sequence[str], adapter: str, *, batch_size: int = 32
    ) -> list[tuple[int, float]]:
        """Sort documents by their relevance to a query.

        Args:
            query: what is looked for.
            documents: n texts.
            adapter: an adapter of the task rerank.
            batch_size: rows per forward.

        Returns:
            n pairs of position in `documents` and relevance in 0 to 1, the most relevant first; equal ones in order.

        Raises:
            UnsupportedError: the adapter is for another task.
        """
        kind = self.adapters[adapter].task["kind"]
        if kind != "rerank":
            raise UnsupportedError(f"adapter {adapter!r} is for {kind}: ranking needs one that was trained for rerank")
        documents = _listed("documents", documents)  # one text is one document
        found = self.predict([query] * len(documents), adapter, pairs=documents, batch_size=batch_size)
        return sorted(((i, float(p.value or 0.0)) for i, p in enumerate(found)), key=lambda pair: -pair[1])

    def _spread(self, adapter: AdapterNames, count: int) -> list[str | None]:
        given: Names = binding.named(self, adapter)
        self._check(given)
        names = [given] * count if given is None or isinstance(given, str) else list(given)
        if len(names) != count:
            raise RouteError(f"{count} texts but {len(names)} adapter names: pass one name, or one per text")
        return names

    def _check_predict(self, names: Sequence[str | None], texts: Sequence[str], pairs: Sequence[str | None]) -> None:
        if self.tokenizer is None and not self.reads_images:
            raise ConfigError("this base has no tokenizer: pass Base(model, tokenizer)")
        if len(pairs) != len(texts):
            raise RouteError(f"{len(texts)} texts but {len(pairs)} second texts")
        asked = {(name, pair is not None): i for i, (name, pair) in enumerate(zip(names, pairs)) if name is not None}
        for (name, paired), i in asked.items():
            spec = self._adapters[name].task
            if get_task(spec["kind"]).writes:
                raise UnsupportedError(f"adapter {name!r} writes text: use base.generate(prompts, adapter={name!r})")
            if spec.get("pair") and not paired:
                raise RouteError(f"adapter {name!r} was trained on pairs of texts: pass pairs=, with one for text {i}")
            if paired and spec["kind"] != "features" and not spec.get("pair"):
                raise RouteError(
                    f"adapter {name!r} was trained on single texts: leave pairs out, or pass None for text {i} there"
                )

    def _encode_each(
        self, names: Sequence[str | None], texts: Sequence[str], pairs: Sequence[str | None]
    ) -> list[list[Encoded]]:
        rows: list[list[Encoded]] = [[] for _ in texts]
        alike: list[tuple[tuple[Any, Any, bool], list[int]]] = []  # what encodes, and the texts that are encoded by it
        place: dict[tuple[str | None, bool], list[int]] = {}
        for i, name in enumerate(names):
            paired = pairs[i] is not None
            if (name, paired) not in place:
                asked = {key: value for key, value in self._spec(name).items() if key not in LEARNED}
                how = asked, self.tokenizer_of(name), paired
                mine = next((m for other, m in alike if other[1] is how[1] and other[::2] == how[::2]), None)
                if mine is None:
                    mine = []
                    alike.append((how, mine))
                place[name, paired] = mine
            place[name, paired].append(i)
        for (spec, tokenizer, paired), mine in alike:
            own = seen(self, tokenizer)
            second: Any = [pairs[i] for i in mine] if paired else None
            with self.encoding:
                encoded = get_task(spec["kind"]).encode_inputs(own, spec, [texts[i] for i in mine], second)
            for i, many in zip(mine, encoded):
                rows[i] = many
        return rows

    def _prediction(
        self, name: str | None, rows: Sequence[Encoded], values: Sequence[Tensor], text: str, pair: str | None
    ) -> Prediction:
        spec, head = self._spec(name), None if name is None else self._adapters[name].head
        return get_task(spec["kind"]).answer(spec, head, name, rows, values, text, pair)

    def fill(
        self, texts: str | Sequence[str], adapter: AdapterNames = None, *, top: int = 1, batch_size: int = 16
    ) -> list[Prediction]:
        """Fill the mask tokens of texts, each with its own adapter, in mixed batches.

        Args:
            texts: one text or n, with the tokenizer's mask token where words are missing.
            adapter: one name for all, or n entries; None is the plain base.
            top: words per mask, most probable first.
            batch_size: rows per forward.

        Returns:
            n predictions. Their spans are the words, `top` per mask, where the mask stands in the text.

        Raises:
            UnsupportedError: the base has no head for masked tokens, or an adapter is for another task.
            DataError: a text has no mask.
        """
        from onebase.filling import fill_masks

        if not isinstance(top, int) or top < 1:
            raise ConfigError(f"top = {top!r}: expected words per mask, at least 1")
        texts, batch_size = _listed("texts", texts), whole("batch_size", batch_size, 1)
        return fill_masks(self, texts, self._spread(adapter, len(texts)), top, batch_size)

    def generate(
        self,
        prompts: str | Sequence[Any],
        adapter: AdapterNames = None,
        *,
        max_new_tokens: int = 64,
        do_sample: bool | None = None,
        seed: int | Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        return_ids: bool = False,
        **settings: Any,
    ) -> list[Any]:
        """Continue prompts, each with its own adapter, in one batch; each row equals that row alone.

        Args:
            prompts: one prompt or n: a text, which goes through its adapter's template; a conversation as a list of
                {"role", "content"}, for chat adapters or a base whose tokenizer has a chat template; token ids, which
                are taken as they are.
            adapter: one name for all, or n entries; None is the plain base.
            max_new_tokens: at most this many new tokens.
            do_sample: draw tokens; greedy or beam search otherwise. None: draw exactly when a seed is given.
            seed: of sampling, one for all rows or n; the same seed gives a row the same tokens in any batch.
            temperature, top_k, top_p, min_p: reshape the distribution before drawing.
            num_beams: beams per prompt.
            num_return_sequences: results per prompt.
            return_ids: return lists of new token ids instead of texts.
            settings: further fields of transformers' GenerationConfig. Where one also looks at the prompt, such as
                no_repeat_ngram_size or min_length, prompts of different length are written one length after another.

        Returns:
            n texts, or n lists of texts when num_return_sequences > 1.

        Raises:
            UnsupportedError: the base has no LM head, an adapter does not write, or beams are to be sampled.
            RouteError: names or seeds are not as many as prompts.
            ConfigError: a setting that has no effect on the way of decoding, or is out of range.
            DataError: a prompt is neither a text nor a conversation nor token ids that the base knows.
        """
        from onebase.generation import Shape, generate_ids, prompts_of, seeds_of

        if not self.has_lm_head:
            raise UnsupportedError(f"{type(self.model).__name__} has no LM head: load a model that writes text")
        prompts = prompts_of(prompts)
        names = self._spread(adapter, len(prompts))
        if not prompts:
            return []
        self._check_writers(names)
        seeds = seeds_of(seed, len(prompts))
        do_sample = seeds is not None if do_sample is None else do_sample
        shaped = (temperature, top_k, top_p, min_p) != (1.0, None, None, None)
        if not do_sample and (seeds is not None or shaped):
            raise ConfigError(
                "seed, temperature, top_k, top_p and min_p have no effect without sampling: pass do_sample=True"
            )
        found = generate_ids(
            self, prompts, names, max_new_tokens=max_new_tokens, do_sample=do_sample, seeds=seeds,
            shape=Shape(temperature, top_k, top_p, min_p), num_beams=num_beams,
            num_return_sequences=num_return_sequences, settings=settings,
        )  # fmt: skip
        if not return_ids:
            found = [[self.tokenizer.decode(ids, skip_special_tokens=True) for ids in many] for many in found]  # type: ignore[misc]
        return found if num_return_sequences > 1 else [many[0] for many in found]

    def _check_writers(self, names: Sequence[str | None]) -> None:
        for name in set(names) - {None}:
            spec = self._adapters[name].task  # type: ignore[index]
            if not get_task(spec["kind"]).writes and spec["kind"] != "features":
                raise UnsupportedError(f"adapter {name!r} does not write: use base.predict(texts, adapter={name!r})")

    # -- identity ------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Return the hash of all base tensors rounded to bf16, so that copies of one checkpoint match."""
        if self._whole is not None:
            return self._whole
        from onebase.store import fingerprint_model

        found = fingerprint_model(self.model)  # remembered there until a tensor changes
        if is_offloaded(self.model):  # every forward puts other tensors into the modules, and nothing is merged
            self._whole = found
        return found

    def __repr__(self) -> str:
        return f"Base({self.id!r}, {self.anatomy.model_type}, adapters={list(self._adapters)})"


class _Named(Mapping[str, Adapter]):
    """A read-only view that explains unknown names."""

    def __init__(self, adapters: dict[str, Adapter]):
        self._view = MappingProxyType(adapters)

    def __getitem__(self, name: str) -> Adapter:
        try:
            return self._view[name]
        except (KeyError, TypeError):
            raise unknown("adapter", name, self._view) from None

    def get(self, name: str, default: Any = None) -> Any:
        return self._view.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._view

    def __iter__(self) -> Iterator[str]:
        return iter(self._view)

    def __len__(self) -> int:
        return len(self._view)


def _content(name: str | None, row: Encoded) -> tuple:
    """Return what an answer depends on: the adapter and the tokens or the picture."""
    return name, row.content


def _listed(where: str, value: Any, missing: bool = False) -> list[Any]:
    """Return one text or several as a list; the keys of a mapping and the letters of bytes are no texts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable) or isinstance(value, bytes | bytearray | Mapping | set | frozenset):
        raise ConfigError(f"{where} = {value!r}: expected a text, or a list of texts")
    found = list(value)
    for i, text in enumerate(found):
        if not isinstance(text, str) and not (missing and text is None):
            raise ConfigError(f"{where}[{i}] = {text!r}: expected a text" + (" or None" if missing else ""))
    return found
