"""Anchors: hooks at each stack that lower the route to a plan and let prompts rewrite the call.

An anchor runs before and after its stack. Before: it finds the route, checks it against the rows, lowers it, and
inserts virtual tokens. After: callers get their T positions back, and the plan is gone, also when the call raised.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onebase.core.checkpoint import CHECKPOINTED, wrap_checkpoints
from onebase.core.contracts import PromptDelta
from onebase.core.direct import DirectCalls
from onebase.core.layout import Layout, make_layout
from onebase.core.offload import weight_of
from onebase.core.packing import make_packing
from onebase.core.places import Places
from onebase.core.plan import Group, Plan, Routed, lower
from onebase.core.route import Frame, Route, RouteContext, Runtime
from onebase.core.site import Stack
from onebase.core.trunk import INPUTS, LayerHook, Shared, Stage, Step, finish_stages, first_layer, steps_of
from onebase.devices import packed_multiple
from onebase.errors import RouteError, UnsupportedError

CACHES = ("cache", "past_key_values")  # names of the KV cache: transformers 5.24 on, and before
MEMO = "_onebase_layout"  # attribute of a KV cache: where virtual tokens sit in it
POOLED = "pooled"  # among the caught tensors of a plan: the states whose first token the pooler gets


class Anchor:
    """The hooks of one stack.

    Args:
        stack: what is anchored.
        runtime: receives the plan.
        context: holds the route chosen by `use`.
        find: adapter by name.
        by_number: names for an `adapter_ids` tensor.
        encoder: the stack that this one reads through cross-attention, or None.
    """

    def __init__(
        self,
        stack: Stack,
        runtime: Runtime,
        context: RouteContext,
        find: Callable[[str], Routed],
        by_number: Callable[[Tensor], tuple[str | None, ...]],
        encoder: Stack | None = None,
    ):
        self.stack, self.runtime, self.context, self.find = stack, runtime, context, find
        self.by_number, self.encoder = by_number, encoder
        self.names = [
            n for n, p in inspect.signature(stack.module.forward).parameters.items() if p.kind != p.VAR_KEYWORD
        ]
        self.cache = CACHES[0] if CACHES[0] in self.names else CACHES[1]  # what this stack calls its KV cache
        self.types = any(name.endswith("token_type_ids") for name, _ in stack.module.named_buffers())
        self.watched: list[LayerHook] = []
        self.lock = threading.Lock()
        # A compiler must not bake a route into a graph: anchors run outside of it, taps inside read the plan.
        enter, leave = torch.compiler.disable(self.enter), torch.compiler.disable(self.leave)
        self.direct = DirectCalls(stack.module)
        self.handles: list[Any] = [
            stack.module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            stack.module.register_forward_hook(leave, with_kwargs=True, always_call=True),
        ]
        self.handles.append(self.direct)
        if stack.pooler is not None:
            self.handles.append(stack.pooler.register_forward_pre_hook(self.pool))
        if stack.pooled is not None:
            self.handles.append(stack.pooled.register_forward_hook(self.keep_pooled))
        if stack.positions is not None:
            place: Any = torch.compiler.disable(self.place)
            self.handles.append(stack.positions.register_forward_hook(place))
        if stack.patches is not None:
            patch: Any = torch.compiler.disable(self.patch)
            self.handles.append(stack.patches.register_forward_hook(patch))
        if stack.embedded is not None:
            stand: Any = torch.compiler.disable(self.stand)
            self.handles.append(stack.embedded.register_forward_hook(stand))

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Lower the route of this call and rewrite its arguments where an adapter has virtual tokens."""
        runtime = self.runtime
        while runtime.frames and not self._within(runtime.frames[-1].module):
            runtime.pop()  # left over from a call that was interrupted (KeyboardInterrupt skips hooks)
            runtime.override = None
        call = dict(zip(self.names, args)) | kwargs
        if CACHES[1] in call and self.cache not in call:  # transformers takes the old name too
            call[self.cache] = call.pop(CACHES[1])
        self._refuse_dropped_cache(call)
        route = self._route(call)
        if runtime.frames or route is None:
            plan = runtime.frames[-1].plan if runtime.frames else None
        else:
            plan = self._lower(route, call)
        runtime.push(Frame(module, plan))
        if plan is not None:
            wrap_checkpoints(self.stack.layers, runtime)
        return (), {**call, self.direct.mark: True}

    def _within(self, outer: nn.Module) -> bool:
        return outer is not self.stack.module and any(m is self.stack.module for m in outer.modules())

    def _route(self, call: dict[str, Any]) -> Route | None:
        ids = call.pop("adapter_ids", None)
        if ids is not None:
            return Route(self.by_number(ids))
        given = self.runtime.override
        if given is not None and given[1] is self.context.variable.get():
            return given[0]
        return self.context.current()

    def _refuse_dropped_cache(self, call: dict[str, Any]) -> None:
        """transformers drops the KV cache of checkpointed layers, so a second step would see no earlier token."""
        if call.get(self.cache) is None:
            return
        if self.checkpointed():
            raise UnsupportedError(
                "gradient checkpointing is on, and checkpointed layers fill no KV cache: use base.generate or "
                "base.bind(name).generate, or base.gradient_checkpointing(False) first"
            )

    def checkpointed(self) -> bool:
        """Whether layers keep nothing for the backward pass and are computed again in it."""
        return any(layer.training and getattr(layer, CHECKPOINTED, False) for layer in self.stack.layers)

    def _source(self, call: dict[str, Any]) -> tuple[Tensor, int]:
        """Return the tensor whose first dimension is the rows, and the number of tokens that it makes."""
        if self.stack.count is not None:
            pixels = call.get("pixel_values")
            if pixels is None:
                raise RouteError(f"{self.stack.name}: the call has no pixel_values")
            return pixels, self.stack.count(pixels)
        source = call.get("inputs_embeds") if call.get("input_ids") is None else call.get("input_ids")
        if source is None:
            raise RouteError(f"{self.stack.name}: the call has neither input_ids nor inputs_embeds")
        return source, source.shape[1]

    def _lower(self, route: Route, call: dict[str, Any]) -> Plan:
        source, columns = self._source(call)
        if route.rows is None:
            steps, names = [], route.per_row(source.shape[0])
        else:
            steps = self._steps(route, call, source.shape[0])
            names = [name for _, name in steps[0].rows]
            source = self._source(call)[0]
        plan = lower(names, self.find, source.device)
        self._refuse_packing(plan, call)
        mask = call.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._refuse_padding(mask)
            self._repair_positions(call, mask, columns)
        self._embed_words(plan, call)
        self._insert_prompts(plan, route, call, source, columns)
        self._shift_positions(plan, call, columns)
        self._follow_encoder(plan, call)
        self._locate(plan, route.prompt_lengths(plan.batch), call, columns)
        if self.stack.positions is not None:  # the stack takes none: they reach its embedding through the plan
            plan.positions = call.pop("position_ids", None)
        if route.memory is not None and not steps and self._reads_last_states(call):
            plan.trunk = route.memory.trunk(self.stack, call, plan)
        mask = call.get("attention_mask")
        stages = self._stages(plan, steps, call, columns)
        if route.pack and self._may_pack(stages[-1].plan, call):
            self._pack(plan, call, len(stages) == 1 and plan.trunk is None)
        if len(stages) > 1:
            finish_stages(stages, mask)
        if plan.trunk is not None:
            self._watch_layers()
        return plan

    def _refuse_padding(self, mask: Tensor) -> None:
        """Some models answer differently to padded rows, so that no row of a batch would equal itself alone."""
        for side, column in (("left", 0), ("right", -1)):
            reason = self.stack.padding.get(side)
            if reason and not bool(mask[:, column].all()):
                raise UnsupportedError(f"this base cannot take rows padded on the {side}: {reason}")

    def _refuse_packing(self, plan: Plan, call: dict[str, Any]) -> None:
        """Packed rows hold several sequences: a route per row cannot be right for prompts and prefixes."""
        bound = any(g.adapter.prompts or g.adapter.positional for g in plan.groups)
        risky = plan.has_kv or bound or len(plan.groups) > 1
        if not risky:
            return
        packed = call.get("cu_seq_lens_q") is not None
        position = call.get("position_ids")
        if not packed and position is not None and call.get("attention_mask") is None and cache_length(call) == 0:
            packed = position.shape[-1] > 1 and bool((position.diff(dim=-1) != 1).any())
        if packed:
            raise RouteError(
                "packed sequences cannot be combined with prefixes, prompts, changes at positions or several adapters "
                "in one call: pad the batch instead"
            )

    def _repair_positions(self, call: dict[str, Any], mask: Tensor, columns: int) -> None:
        """Left padding must not move positions: count real tokens, as `generate` does."""
        start = self.stack.position_start
        if start is None or call.get("position_ids") is not None or bool(mask[:, 0].all()):
            return
        call["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -columns:] + start

    # -- trunk -------------------------------------------------------------------------------------------------------

    def _steps(self, route: Route, call: dict[str, Any], rows: int) -> list[Step]:
        """Decide where entries that read the same row become rows of their own, and give the call its first rows."""
        if not isinstance(route.names, tuple) or route.rows is None or len(route.names) != len(route.rows):
            raise RouteError(f"rows = {route.rows!r}: state one row of the call per adapter name")
        if route.prompts is not None or max(route.rows) >= rows:
            raise RouteError(f"rows = {route.rows!r}: the call has {rows} rows, and prompts cannot be stated with them")
        adapters = [None if name is None else self.find(name) for name in route.names]
        count = len(self.stack.layers)
        first = [first_layer(adapter, self.stack.name, count) for adapter in adapters]
        if not self._may_share(call):
            first = [0] * len(first)
        steps = steps_of(route.names, route.rows, first, count)
        index = torch.tensor([text for text, _ in steps[0].rows], device=self._source(call)[0].device)
        for name in INPUTS:
            value = call.get(name)
            if isinstance(value, Tensor) and value.shape[0] == rows:
                call[name] = value.index_select(0, index)
        return steps

    def _may_share(self, call: dict[str, Any]) -> bool:
        """Whether rows of this call can become more between two layers."""
        strange = {name for name, value in call.items() if isinstance(value, Tensor)} - set(INPUTS)
        if strange:
            raise RouteError(f"rows cannot be stated for a call with {', '.join(sorted(strange))}")
        mask = call.get("attention_mask")
        plain = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        return self.stack.trunk and plain and self._reads_last_states(call)

    def _stages(self, plan: Plan, steps: list[Step], call: dict[str, Any], columns: int) -> list[Stage]:
        """Lower every step of a call whose first one is lowered already."""
        stages = [Stage(0, plan, [])]
        prompts = {g.adapter.name: (g.at.prompt_length, g.at.prompt_behind) for g in plan.groups}
        assert plan.row_group is not None
        for step in steps[1:]:
            before = torch.tensor(step.before, device=plan.row_group.device)
            rows = [*(many.index_select(0, before) for many in stages[-1].rows), before]
            new = lower([name for _, name in step.rows], self.find, before.device)
            new.strip = plan.strip
            new.layout = None if plan.layout is None else plan.layout.take(rows[0])
            for g in new.groups:
                g.at.prompt_length, g.at.prompt_behind = prompts.get(g.adapter.name, (0, 0))
            mask = call.get("attention_mask")
            self._locate(new, None, {"attention_mask": None if mask is None else mask[rows[0]]}, columns)
            stages.append(Stage(step.layer, new, rows))
        for stage in stages:  # masks are made before the first layer, for all of them
            stage.plan.has_kv = stages[-1].plan.has_kv
        return stages

    def _watch_layers(self) -> None:
        """Put a hook in front of every layer, when the first call asks for one."""
        with self.lock:
            if not self.watched:
                self.watched = [LayerHook(m, i, self.runtime) for i, m in enumerate(self.stack.layers)]

    # -- packing -----------------------------------------------------------------------------------------------------

    def _may_pack(self, plan: Plan, call: dict[str, Any]) -> bool:
        """Whether the rows of this call can be computed without their padding."""
        mask = call.get("attention_mask")
        if not self.stack.packs or not isinstance(mask, Tensor) or mask.dim() != 2 or "position_ids" not in self.names:
            return False
        if not self._reads_last_states(call):
            return False
        if self.checkpointed():  # layers are computed again after the call, when attention no longer packs
            return False
        return not any(g.adapter.positional for g in plan.groups)

    def _reads_last_states(self, call: dict[str, Any]) -> bool:
        """Whether a call has no KV cache and asks for nothing of the layers between."""
        if call.get(self.cache) is not None or (self.stack.causal and call.get("use_cache") is not False):
            return False
        config = self.stack.module.config
        for name in ("output_hidden_states", "output_attentions"):
            if call.get(name) or getattr(config, name, False):
                return False
        return True

    def _pack(self, plan: Plan, call: dict[str, Any], alone: bool) -> None:
        """Put the real tokens of all rows into one row; attention puts them apart again.

        alone: nobody but this plan counts the tokens.
        """
        mask = call["attention_mask"]
        multiple = packed_multiple(mask.device) if alone else 1
        # packed rows with prefixes need no masks: each prefix stands before its own rows only
        always = plan.has_kv and mask.device.type == "cpu" and not torch.is_grad_enabled()
        packing = make_packing(mask, always, multiple, plan.prefixed() if plan.has_kv else None)
        if packing is None:
            return
        position = call.get("position_ids")
        if position is None:
            position = (mask.long().cumsum(1) - 1).clamp(min=0) + (self.stack.position_start or 0)
        call["position_ids"] = packing.pack(position.expand(packing.rows, packing.columns))
        for name in ("input_ids", "inputs_embeds", "token_type_ids"):
            if call.get(name) is not None:
                call[name] = packing.pack(call[name])
        if self.types and call.get("token_type_ids") is None:
            # the stack's own zeros are cut from a buffer that is as long as its positions
            call["token_type_ids"] = torch.zeros_like(call["position_ids"])
        call["attention_mask"] = None
        plan.pack(packing)

    # -- words -------------------------------------------------------------------------------------------------------

    def _embed_words(self, plan: Plan, call: dict[str, Any]) -> None:
        """Embed the ids of a call where an adapter has trained tokens; ids beyond the vocabulary are its words."""
        groups = [g for g in plan.groups if self.stack.name in g.adapter.words]
        if not groups:
            return
        ids = call.get("input_ids")
        if ids is None:
            names = ", ".join(g.adapter.name for g in groups)
            raise RouteError(f"adapters {names} have trained tokens, which inputs_embeds cannot show: pass input_ids")
        known = self.stack.embed.weight.shape[0]
        beyond = ids >= known
        embeds = self.stack.embed(ids.masked_fill(beyond, 0))
        for g in groups:
            delta = g.adapter.deltas[g.adapter.words[self.stack.name]]
            own = slice(None) if g.rows is None else g.rows
            match = ids[own][..., None] == delta.ids()  # type: ignore[union-attr]  # (b, T, k)
            hit = match.any(-1)
            rows = delta.rows()[match.long().argmax(-1)].to(embeds.dtype)  # type: ignore[union-attr]
            new = torch.where(hit[..., None], rows, embeds[own])
            embeds = new if g.rows is None else embeds.index_put((g.rows,), new)
            beyond = beyond & ~hit if g.rows is None else beyond.index_put((g.rows,), beyond[g.rows] & ~hit)
        if bool(beyond.any()):
            row, column = beyond.nonzero()[0].tolist()
            raise RouteError(
                f"row {row} has token id {int(ids[row, column])}, which is beyond the {known} of this base and no word "
                "of the row's adapter: encode each text with the tokenizer of its own adapter, base.tokenizer_of(name)"
            )
        call["inputs_embeds"], call["input_ids"] = embeds, None

    # -- prompts -------------------------------------------------------------------------------------------------

    def _insert_prompts(self, plan: Plan, route: Route, call: dict[str, Any], source: Tensor, columns: int) -> None:
        groups = [g for g in plan.groups if self.stack.name in g.adapter.prompts]
        cache, past = call.get(self.cache), cache_length(call)
        memo = getattr(cache, MEMO, None)
        if not groups:
            if memo is not None:
                raise RouteError("this cache holds virtual tokens of an adapter that the call no longer routes to")
            return
        deltas = [self._prompt(g, self.stack.name) for g in plan.groups]
        plan.virtual = [None if delta is None else delta.tokens() for delta in deltas]
        behind = [self.stack.before + (0 if delta is None else delta.behind) for delta in deltas]
        for g, tokens, before in zip(plan.groups, plan.virtual, behind):
            g.at.prompt_length, g.at.prompt_behind = (0, 0) if tokens is None else (len(tokens), before)
        plan.standing = [number for number, delta in enumerate(deltas) if delta is not None and delta.embedded]
        lengths = self._virtual_lengths(plan, plan.virtual)
        mask = self._plain_mask(call, past, source)
        if past:
            self._continue(plan, memo, lengths, call, mask, columns)
            return
        layout = plan.layout = make_layout(lengths, mask, columns, self.stack.causal, self._of_rows(plan, behind))
        leads = [delta is not None and delta.leads for delta in deltas]
        layout.leads = self._of_rows(plan, [int(own) for own in leads]).bool() if any(leads) else None
        plan.strip = not self.stack.feeds or route.strip
        real = lengths.new_ones(plan.batch, columns) if mask is None else mask
        call["attention_mask"] = layout.spread_mask(real)
        if self.stack.patches is not None:  # images become tokens later: `patch` inserts there
            return
        embeds = call.get("inputs_embeds")
        embeds = self.stack.embed(source) if embeds is None else embeds  # words were embedded before
        call["inputs_embeds"], call["input_ids"] = self._with_virtual(plan, embeds), None
        still = [len(t) if number in plan.standing else 0 for number, t in enumerate(plan.virtual)]  # type: ignore[arg-type]
        self._move_positions(layout, call, self._of_rows(plan, still) if plan.standing and self.stack.placed else None)
        if call.get("token_type_ids") is not None:
            call["token_type_ids"] = layout.spread(call["token_type_ids"])
        if cache is not None:
            setattr(cache, MEMO, layout)

    @staticmethod
    def _prompt(group: Group, stack: str) -> PromptDelta | None:
        """Return what makes the virtual tokens of a group in a stack, or None."""
        site = group.adapter.prompts.get(stack)
        return None if site is None else group.adapter.deltas[site]  # type: ignore[return-value]

    @staticmethod
    def _of_rows(plan: Plan, of_groups: list[int]) -> Tensor:
        """Return a number per row, (B,), from one per group; rows of no group have 0."""
        assert plan.row_group is not None
        return torch.tensor(plan.of_rows(of_groups), device=plan.row_group.device)

    def _virtual_lengths(self, plan: Plan, virtual: list[Tensor | None]) -> Tensor:
        """Return how many virtual tokens each row has, (B,)."""
        return self._of_rows(plan, [0 if tokens is None else len(tokens) for tokens in virtual])

    def _with_virtual(self, plan: Plan, embeds: Tensor) -> Tensor:
        """Return (B, T + Pmax, D): embedded tokens (B, T, D) with every row's virtual tokens among them."""
        layout = plan.layout
        assert layout is not None and plan.row_group is not None
        rows, columns, width = embeds.shape
        own = [
            tokens.new_zeros(len(tokens), width) if number in plan.standing else tokens  # `stand` takes their places
            for number, tokens in enumerate(plan.virtual)
            if tokens is not None
        ]
        pool = torch.cat([embeds.flatten(0, 1), torch.cat(own).to(embeds.dtype), embeds.new_zeros(1, width)])
        counts = [0 if tokens is None else len(tokens) for tokens in plan.virtual]
        starts = [rows * columns + sum(counts[:i]) for i in range(len(counts))]
        first = torch.tensor([*starts, 0], device=embeds.device)[plan.row_group]  # (B,) in the pool
        places = layout.source(first, len(pool) - 1)
        return pool.index_select(0, places.flatten()).reshape(rows, -1, width)

    def _plain_mask(self, call: dict[str, Any], past: int, source: Tensor) -> Tensor | None:
        mask = call.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UnsupportedError(
                "virtual tokens need the 2-dimensional attention mask of the batch, not a prepared one (static "
                "caches and packed masks prepare theirs): use the default dynamic cache"
            )
        return mask

    def _continue(
        self,
        plan: Plan,
        memo: Layout | None,
        lengths: Tensor,
        call: dict[str, Any],
        mask: Tensor | None,
        new: int,
    ) -> None:
        """A later step of generation: the virtual tokens are in the cache, masks and positions follow them."""
        if memo is None:
            raise RouteError("this cache was filled without the virtual tokens of the adapter that the call routes to")
        if memo.rows != plan.batch or not torch.equal(memo.lengths, lengths):
            raise RouteError("this cache was filled for other adapters or another number of rows")
        past = cache_length(call)
        if mask is None:
            mask = torch.ones(plan.batch, past - memo.width + new, dtype=torch.long, device=lengths.device)
        if mask.shape[1] != past - memo.width + new:
            raise RouteError(
                f"the attention mask has {mask.shape[1]} columns, but the cache holds {past - memo.width} tokens of "
                f"the caller and the call adds {new}"
            )
        call["attention_mask"] = memo.spread_mask(mask)
        if self.stack.position_start is None:
            return
        given = call.get("position_ids")
        if given is not None:
            call["position_ids"] = given + lengths[:, None]
        else:
            counted = call["attention_mask"].long().cumsum(1) - 1
            call["position_ids"] = counted[:, -new:] + self.stack.position_start
        self._check_positions(call["position_ids"], memo.width)

    def _move_positions(self, layout: Layout, call: dict[str, Any], still: Tensor | None) -> None:
        """Count virtual tokens as the text's, but for those that take no position: `still` of each row, (B,)."""
        start = self.stack.position_start
        if start is None:
            return
        counted = (call["attention_mask"].long().cumsum(1) - 1).clamp(min=0) + start
        given = call.get("position_ids")
        column = torch.arange(counted.shape[1], device=counted.device)
        edge, length = (layout.start + layout.offset)[:, None], layout.lengths[:, None]
        inside = (column >= edge) & (column < edge + length)  # virtual tokens
        taken = length if still is None else length - still[:, None]
        if given is not None:
            given = given.expand(layout.rows, -1)
            first = given.gather(1, layout.start.clamp(max=layout.columns - 1)[:, None])
            behind = torch.arange(layout.columns, device=counted.device) >= layout.start[:, None]
            given = layout.spread(given + torch.where(behind, taken, 0))
            counted = torch.where(inside, first + column - edge, given)
        elif still is not None:
            counted = counted - torch.where(column >= edge + length, still[:, None], 0)
        if still is not None:
            counted = torch.where(inside & (still > 0)[:, None], start, counted)
        self._check_positions(counted, layout.width)
        call["position_ids"] = counted

    def _shift_positions(self, plan: Plan, call: dict[str, Any], columns: int) -> None:
        """Start the positions of texts behind prefixes that take positions."""
        groups = [g for g in plan.groups if self.stack.name in g.adapter.shift]
        start = self.stack.position_start
        if not groups or start is None:
            return
        assert plan.row_group is not None
        shift = torch.zeros(plan.batch, dtype=torch.long, device=plan.row_group.device)
        for g in groups:
            shift[slice(None) if g.rows is None else g.rows] = g.adapter.shift[self.stack.name]
        positions, mask = call.get("position_ids"), call.get("attention_mask")
        width = columns + (plan.layout.width if plan.layout else 0)
        if positions is None and isinstance(mask, Tensor) and mask.dim() == 2:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -width:] + start
        elif positions is None:
            positions = torch.arange(width, device=shift.device)[None] + cache_length(call) + start
        call["position_ids"] = positions + shift[:, None]
        self._check_positions(call["position_ids"], int(shift.max()))

    def _check_positions(self, positions: Tensor, width: int) -> None:
        limit = self.stack.position_limit
        if limit is None:
            return
        tokens = int(positions.max()) - (self.stack.position_start or 0) + 1
        if tokens > limit:
            raise UnsupportedError(
                f"{tokens} tokens (virtual ones included) exceed the {limit} positions of this base: shorten the "
                f"texts or the prompt ({width} virtual tokens)"
            )

    def _follow_encoder(self, plan: Plan, call: dict[str, Any]) -> None:
        """Extend the cross-attention mask over the virtual tokens that the encoder kept."""
        states = call.get("encoder_hidden_states")
        if self.encoder is None or states is None:
            return
        deltas = [self._prompt(g, self.encoder.name) for g in plan.groups]
        if all(delta is None for delta in deltas):
            return
        virtual = [None if delta is None else delta.tokens() for delta in deltas]
        lengths = self._virtual_lengths(plan, virtual)
        width = int(lengths.max())
        mask = call.get("encoder_attention_mask")
        if mask is None:
            mask = states.new_ones((plan.batch, states.shape[1] - width), dtype=torch.long)
        if mask.shape[1] + width != states.shape[1]:
            raise RouteError(
                f"the encoder's states have {states.shape[1]} columns, but the mask has {mask.shape[1]} and the "
                f"adapters add {width} virtual tokens: run the encoder under the same route"
            )
        layout = make_layout(lengths, mask, mask.shape[1], self.encoder.causal)
        call["encoder_attention_mask"] = layout.spread_mask(mask)

    def _locate(self, plan: Plan, stated: list[int] | None, call: dict[str, Any], columns: int) -> None:
        """Tell each group where its tokens are, and where each row's prompt ends."""
        mask, past = call.get("attention_mask"), cache_length(call)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return
        assert plan.row_group is not None
        width = columns + (plan.layout.width if plan.layout else 0)
        places = Places(plan.batch, width, past, columns, mask, stated, plan.row_group.device)
        for g in plan.groups:
            g.at.places, g.at.rows = places, g.rows

    # -- after the call ------------------------------------------------------------------------------------------

    def pool(self, module: nn.Module, args: tuple) -> tuple | None:
        """Let a pooler inside the stack see the callers' tokens only."""
        plan = self.runtime.plan
        if plan is None or (plan.layout is None and plan.packing is None):
            return None
        states = args[0] if self.stack.pooled is None else plan.caught[POOLED]
        states = states if plan.packing is None else plan.packing.unpack(states)
        states = states if plan.layout is None else plan.layout.gather(states)
        return (states if self.stack.pooled is None else states[:, 0], *args[1:])

    def keep_pooled(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Keep the states for a pooler that is called with their first token only."""
        plan = self.runtime.plan
        if plan is not None and (plan.layout is not None or plan.packing is not None):
            plan.caught[POOLED] = output[0]

    # -- inside the call -----------------------------------------------------------------------------------------

    def place(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Embed the positions of real tokens in place of the numbers of columns."""
        plan = self.runtime.plan
        if plan is None or plan.positions is None:
            return None
        rows = plan.positions + self.stack.position_offset
        return nn.functional.embedding(rows, weight_of(module))

    def patch(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Insert virtual tokens among those that images were made into."""
        plan = self.runtime.plan
        return None if plan is None or plan.layout is None else self._with_virtual(plan, output)

    def stand(self, module: nn.Module, args: tuple, output: Any) -> Tensor | None:
        """Put virtual tokens that are embedded already where places were kept for them."""
        plan = self.runtime.plan
        if plan is None or not plan.standing or plan.layout is None:
            return None
        layout, packing = plan.layout, plan.packing
        assert plan.row_group is not None
        width = layout.columns + layout.width
        states, places, own = output.flatten(0, 1), [], []
        for number in plan.standing:
            tokens: Any = plan.virtual[number]
            rows = (plan.row_group == number).nonzero()[:, 0]
            places.append((rows[:, None] * width + layout.virtual(rows, len(tokens))).flatten())
            own.append(tokens.to(output.dtype).expand(len(rows), -1, -1).flatten(0, 1))
        place, new = torch.cat(places), torch.cat(own)
        if packing is not None:
            place = torch.searchsorted(packing.real, place)
        return states.index_copy(0, place, new).unflatten(0, output.shape[:2])

    def leave(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Give callers their T positions back and forget the plan; runs also when the call raised."""
        runtime = self.runtime
        if not runtime.frames or runtime.frames[-1].module is not module:
            return None  # `enter` itself raised
        plan = runtime.frames[-1].plan
        runtime.pop()
        nested = bool(runtime.frames)
        if output is None or nested or plan is None:
            return None
        if isinstance(plan.trunk, Shared) and not plan.trunk.ended:
            raise RouteError(f"{self.stack.name}: layers ran without their hooks, so rows that share a text stayed one")
        if plan.packing is not None:
            output.last_hidden_state = plan.packing.unpack(output.last_hidden_state)
        if plan.layout is None:
            return output
        cache = output_cache(output)
        if cache is not None and getattr(cache, MEMO, None) is None:
            setattr(cache, MEMO, plan.layout)
        return strip(output, plan.layout) if plan.strip else None

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in [*self.handles, *(hook.handle for hook in self.watched)]:
            handle.remove()


def cache_length(call: dict[str, Any]) -> int:
    """Tokens that the KV cache of a call already holds."""
    cache = next((call[name] for name in CACHES if call.get(name) is not None), None)
    return 0 if cache is None else int(cache.get_seq_length())


def output_cache(output: Any) -> Any:
    """Return the KV cache that a stack hands back in a ModelOutput, or None."""
    if isinstance(output, tuple):
        return None
    return next((output[name] for name in CACHES if name in output.keys()), None)  # noqa: SIM118


def strip(output: Any, layout: Layout) -> Any:
    """Return a stack's output with the callers' T positions only: states, hidden states, attention weights.

    Args:
        output: a transformers ModelOutput, or the tuple that `return_dict=False` gives.
        layout: where the original tokens are.
    """
    width = layout.columns + layout.width

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dim() == 3 and value.shape[1] == width:
                return layout.gather(value)
            if value.dim() == 4 and value.shape[2] == width:  # attention weights (B, H, T', T')
                rows = layout.gather(value, 2)
                return layout.gather(rows, 3) if rows.shape[3] == width else rows
            return value
        return tuple(cut(v) for v in value) if isinstance(value, tuple) else value

    if isinstance(output, tuple):
        return tuple(cut(v) for v in output)
    for key in list(output.keys()):
        output[key] = cut(output[key])
    return output
