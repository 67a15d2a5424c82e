"""Plans: a route lowered once per call to row indices and masks. Taps read only this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from onebase.core.contracts import AdapterModule, SiteDelta
from onebase.core.layout import Layout
from onebase.core.packing import Packing


@dataclass(eq=False)
class Routed:
    """An adapter as the core sees it: a name, a number for `adapter_ids`, and its deltas by site."""

    name: str
    number: int
    module: AdapterModule
    deltas: dict[str, SiteDelta] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)  # stack name -> site of its virtual tokens
    words: dict[str, str] = field(default_factory=dict)  # stack name -> site of its trained tokens
    shift: dict[str, int] = field(default_factory=dict)  # stack name -> positions that its prefix takes
    has_kv: bool = False
    positional: bool = False  # a delta reads where tokens are
    generator: torch.Generator | None = None  # dropout of this job; None draws from torch's default

    _drops: bool | None = None

    def drops(self) -> bool:
        """Whether a delta draws dropout now."""
        if self._drops is None:
            self._drops = any(getattr(module, "dropout", 0.0) for module in self.module.modules())
        return self._drops and self.module.training


@dataclass(eq=False)
class At:
    """Where the tokens of one group are, and this job's dropout.

    Attributes:
        mask: (b, T) true for real and virtual tokens, or None where the call's mask does not tell.
        positions: (b, T) index of each token among its row's real and virtual tokens, those in the cache included, or
            None.
        prompt_length: virtual tokens of this group's adapter in this stack.
        lengths: (b,) text tokens of each row's prompt, virtual ones not counted: as stated, or all tokens of a call
            without a cache; None where several tokens follow a cache. A single one is never part of the prompt.
    """

    mask: Tensor | None = None
    positions: Tensor | None = None
    prompt_length: int = 0
    lengths: Tensor | None = None
    generator: torch.Generator | None = None

    def dropout(self, x: Tensor, rate: float, training: bool) -> Tensor:
        """Zero each element with probability `rate` and rescale, from the generator of this job."""
        if not training or rate == 0.0:
            return x
        keep = torch.rand(x.shape, generator=self.generator, device=x.device) >= rate
        return x * keep.to(x.dtype) / (1.0 - rate)


@dataclass(eq=False)
class Group:
    """The rows of one adapter in this call. `rows` is None when the group is the whole batch."""

    adapter: Routed
    rows: Tensor | None
    at: At


@dataclass(eq=False)
class Plan:
    """A lowered route.

    Attributes:
        batch: B, rows of the stack call.
        groups: one per distinct routed adapter.
        pieces: (start, stop, group or None) when every group is one contiguous run, else None.
        order: inverse permutation of [group rows ..., plain rows], when they are not contiguous.
        plain: rows without an adapter (index tensor), when not contiguous.
        layout: where virtual tokens went, or None.
        positions: (B, T) position of each token, for stacks whose position embedding counts columns, or None.
        caught: residual tensors of the layer being computed, by where they were caught.
        packing: how the rows were packed into one, or None. Then `batch` is the number of packed tokens, and rows,
            pieces and orders are those of tokens; `row_group` is that of the rows still.
    """

    batch: int
    groups: list[Group]
    pieces: list[tuple[int, int, Group | None]] | None
    order: Tensor | None = None
    plain: Tensor | None = None
    layout: Layout | None = None
    positions: Tensor | None = None
    row_group: Tensor | None = None  # (B,) index into groups, len(groups) for plain rows
    has_kv: bool = False
    caught: dict[str, Tensor] = field(default_factory=dict)
    strip: bool = True  # hand back only the callers' tokens
    packing: Packing | None = None

    def pack(self, packing: Packing) -> None:
        """Compute on packed tokens from now on: what was said of rows is said of their tokens."""
        self.packing, self.batch = packing, packing.tokens
        ends = [0]
        for length in packing.lengths:
            ends.append(ends[-1] + length)
        if self.pieces is not None:
            self.pieces = [(ends[a], ends[b], group) for a, b, group in self.pieces]
        for group in self.groups:
            group.at.mask = group.at.positions = None
            if group.rows is not None:
                group.rows = packing.of_rows(group.rows)
        if self.order is not None and self.plain is not None:
            self.plain = packing.of_rows(self.plain)
            place = torch.cat([*(g.rows for g in self.groups if g.rows is not None), self.plain])
            self.order = torch.empty_like(place)
            self.order[place] = torch.arange(len(place), device=place.device)

    def apply(self, x: Tensor | None, h: Tensor, site: str) -> Tensor:
        """Apply every routed delta at `site` to its own rows.

        Args:
            x: the deltas' input, (B, ..., d_in) or flattened rows; None where h is all they use.
            h: the value at the site, (B, ..., d_out) or flattened (B*T, d_out).
            site: the site's name.

        Returns:
            The new value, same shape and dtype as `h`; rows of other adapters are passed through untouched.
        """
        live = [group for group in self.groups if site in group.adapter.deltas]
        if not live:
            return h
        if len(self.groups) == 1 and live[0].rows is None:
            group = live[0]
            x = h if x is None else x
            if x.shape[:-1] != h.shape[:-1]:  # OPT flattens tokens between where x and h are caught
                x = x.reshape(*h.shape[:-1], x.shape[-1])
            return group.adapter.deltas[site](x, h, group.at)  # type: ignore[operator]
        hb = h.reshape(self.batch, -1, h.shape[-1])  # rows are outermost even where a family flattens tokens
        xb = hb if x is None else x.reshape(self.batch, -1, x.shape[-1])
        if self.pieces is not None:
            parts = [self._piece(site, group, xb[a:b], hb[a:b]) for a, b, group in self.pieces]
            return torch.cat(parts, 0).reshape(h.shape)
        parts = [self._piece(site, g, xb.index_select(0, g.rows), hb.index_select(0, g.rows)) for g in self.groups]  # type: ignore[arg-type]
        if self.plain is not None and len(self.plain):
            parts.append(hb.index_select(0, self.plain))
        return torch.cat(parts, 0).index_select(0, self.order).reshape(h.shape)  # type: ignore[arg-type]

    @staticmethod
    def _piece(site: str, group: Group | None, x: Tensor, h: Tensor) -> Tensor:
        delta = None if group is None else group.adapter.deltas.get(site)
        return h if delta is None else delta(x, h, group.at)  # type: ignore[operator,union-attr]


def lower(
    names: list[str | None],
    find: Callable[[str], Routed],
    device: torch.device,
) -> Plan:
    """Lower one name per row to a plan.

    Args:
        names: adapter name or None for each of the B rows.
        find: looks an adapter up by name; raises for unknown names.
        device: where index tensors live.

    Returns:
        A plan without layout and masks; the anchor fills those in.
    """
    members: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        if name is not None:
            members.setdefault(name, []).append(row)
    groups = []
    for name, rows in members.items():
        adapter = find(name)
        index = None if len(rows) == len(names) else torch.tensor(rows, device=device)
        groups.append(Group(adapter, index, At(generator=adapter.generator)))
    plan = Plan(len(names), groups, None, has_kv=any(g.adapter.has_kv for g in groups))
    numbers = {name: i for i, name in enumerate(members)}
    by_row = [len(groups) if name is None else numbers[name] for name in names]
    if len(groups) == 1 and groups[0].rows is None:
        plan.pieces = [(0, len(names), groups[0])]
    else:
        plan.pieces = _pieces(by_row, groups)
    if plan.pieces is None:
        plain = [row for row, g in enumerate(by_row) if g == len(groups)]
        flat = [row for rows in members.values() for row in rows] + plain
        order = [0] * len(flat)
        for place, row in enumerate(flat):
            order[row] = place
        plan.plain = torch.tensor(plain, dtype=torch.long, device=device)
        plan.order = torch.tensor(order, device=device)
    plan.row_group = torch.tensor(by_row, device=device)
    return plan


def _pieces(by_row: list[int], groups: list[Group]) -> list[tuple[int, int, Group | None]] | None:
    """Cut rows into runs of one group each; None where a group would appear in two runs."""
    pieces: list[tuple[int, int, Group | None]] = []
    seen: set[int] = set()
    start = 0
    for row in range(1, len(by_row) + 1):
        if row < len(by_row) and by_row[row] == by_row[start]:
            continue
        number = by_row[start]
        if number < len(groups) and number in seen:
            return None
        seen.add(number)
        pieces.append((start, row, groups[number] if number < len(groups) else None))
        start = row
    return pieces
