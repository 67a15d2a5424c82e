"""Plans: a route lowered once per call to row indices and masks. Taps read only this."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onebase.core.bank import COPIES, PADDED, Bank, partition
from onebase.core.contracts import AdapterModule, KVDelta, PromptDelta, SiteDelta
from onebase.core.draw import Draw, Draws, Joined, drop
from onebase.core.layout import Layout
from onebase.core.packing import Packing
from onebase.core.places import Places
from onebase.errors import ConfigError


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
    draw: Draw | None = None  # dropout of this job; None draws from torch's default generator
    first: dict[str, int] = field(default_factory=dict)  # stack name -> lowest layer touched, once asked
    added: tuple[int, int] | None = None  # what `adds` returns, once asked

    def adds(self) -> tuple[int, int]:
        """Return how many virtual tokens and how many columns of keys this adapter adds to a row."""
        if self.added is None:
            with torch.no_grad():
                tokens = [len(d.tokens()) for d in self.deltas.values() if isinstance(d, PromptDelta)]
                columns = [len(d.kv()[0]) for d in self.deltas.values() if isinstance(d, KVDelta)]
            self.added = max(tokens, default=0), max(columns, default=0)
        return self.added


@dataclass(eq=False)
class At:
    """Where the tokens of one group are, and this job's dropout.

    Attributes:
        draws: of this job's dropout; None draws from torch's default generator.
        prompt_length: virtual tokens of this group's adapter in this stack.
        prompt_behind: text tokens in front of them.
        places: of the whole call, or None where the call's mask does not tell.
        rows: (b,) the rows of this group; None: all.
    """

    draws: Draws | Joined | None = None
    prompt_length: int = 0
    prompt_behind: int = 0
    places: Places | None = None
    rows: Tensor | None = None
    site: str = ""  # being computed
    drawn: int = 0  # draws made there

    def enter(self, site: str) -> At:
        """Begin to compute a site: dropout there is drawn for it. Returns itself."""
        self.site, self.drawn = site, 0
        return self

    def _own(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values[self.rows]

    @cached_property
    def mask(self) -> Tensor | None:
        """(b, T) true for real and virtual tokens, or None where the call's mask does not tell."""
        return None if self.places is None else self._own(self.places.real)

    @cached_property
    def positions(self) -> Tensor | None:
        """(b, T) index of each token among its row's real and virtual tokens, those in the cache included, or None."""
        return None if self.places is None else self._own(self.places.positions)

    @cached_property
    def text(self) -> Tensor | None:
        """(b, T) index of each token among its row's text tokens, -1 for virtual ones, or None."""
        if self.positions is None or not self.prompt_length:
            return self.positions
        end = self.prompt_behind + self.prompt_length
        text = torch.where(self.positions < end, -1, self.positions - self.prompt_length)
        return torch.where(self.positions < self.prompt_behind, self.positions, text)

    @cached_property
    def lengths(self) -> Tensor | None:
        """(b,) text tokens of each row's prompt, virtual ones not counted: as stated, or all of a call without a cache.

        None where several tokens follow a cache. A single one is never part of the prompt.
        """
        if self.places is None or self.places.counts is None:
            return None
        counts = self._own(self.places.counts)
        return counts if self.places.stated is not None else counts - self.prompt_length

    def dropout(self, x: Tensor, rate: float, training: bool) -> Tensor:
        """Zero each element of x with probability `rate` and rescale the others by 1 / (1 - rate).

        Args:
            x: any shape.
            rate: 0 to below 1.
            training: of the delta; False returns x as it is.

        Returns:
            As x. What a job of `train` or `train_many` drops is a function of its seed, step, row, token, site and
            feature (`core.draw`); otherwise torch's generator decides.
        """
        if not training or rate == 0.0:
            return x
        if self.draws is None:
            return F.dropout(x, rate)
        self.drawn += 1
        return drop(x, rate, self.draws, self.site, self.drawn)


@dataclass(eq=False)
class Group:
    """The rows of one adapter in this call.

    Attributes:
        adapter: whose they are.
        rows: (b,) their numbers; None when the group is the whole batch.
        at: where their tokens are.
        run: (first, last + 1) where they are one run; None where they are not.
    """

    adapter: Routed
    rows: Tensor | None
    at: At
    run: tuple[int, int] | None = None


@dataclass(eq=False)
class Plan:
    """A lowered route.

    Attributes:
        batch: B, rows of the stack call.
        groups: one per distinct routed adapter.
        order: inverse permutation of [group rows ..., plain rows]; None where every group is one run.
        plain: rows without an adapter (index tensor); None where every group is one run.
        layout: where virtual tokens went, or None.
        numbers: the same as `row_group`, as a list.
        positions: (B, T) position of each token, for stacks whose position embedding counts columns, or None.
        caught: residual tensors of the layer being computed, by where they were caught.
        has_plain: some rows have no adapter.
        virtual: virtual tokens (P, D) of each group in this stack, None where it has none.
        standing: numbers of the groups whose virtual tokens stand behind the embeddings.
        picked: rows of several groups together, by the numbers of the groups: many sites ask for the same.
        masks: attention masks extended over prefixes, with the masks that they extend, by what they depend on.
        packing: how the rows were packed into one, or None. Then `batch` is the number of packed tokens, and rows,
            runs and orders are those of tokens; `row_group` is that of the rows still.
        trunk: what happens in front of layers, a `core.trunk.Trunk`, or None.
    """

    batch: int
    groups: list[Group]
    order: Tensor | None = None
    plain: Tensor | None = None
    layout: Layout | None = None
    positions: Tensor | None = None
    row_group: Tensor | None = None  # (B,) index into groups, len(groups) for plain rows
    numbers: list[int] = field(default_factory=list)
    has_kv: bool = False
    caught: dict[str, Tensor] = field(default_factory=dict)
    has_plain: bool = False
    virtual: list[Tensor | None] = field(default_factory=list)
    standing: list[int] = field(default_factory=list)
    picked: dict[tuple[int, ...], Picked] = field(default_factory=dict)
    masks: dict[tuple, tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    strip: bool = True  # hand back only the callers' tokens
    packing: Packing | None = None
    trunk: Any = None

    def pack(self, packing: Packing) -> None:
        """Compute on packed tokens from now on: what was said of rows is said of their tokens."""
        self.packing, self.batch = packing, packing.tokens
        ends = [0]
        for length in packing.lengths:
            ends.append(ends[-1] + length)
        for group in self.groups:
            group.at.places = None
            group.run = None if group.run is None else (ends[group.run[0]], ends[group.run[1]])
            if isinstance(group.at.draws, Draws):
                lengths = torch.tensor(packing.lengths, device=packing.real.device)
                group.at.draws.pack(lengths if group.rows is None else lengths[group.rows])
            if group.rows is not None:
                group.rows = packing.of_rows(group.rows)
        if self.order is not None and self.plain is not None:
            self.plain = packing.of_rows(self.plain)
            place = torch.cat([*(g.rows for g in self.groups if g.rows is not None), self.plain])
            self.order = torch.empty_like(place)
            self.order[place] = torch.arange(len(place), device=place.device)

    @property
    def in_runs(self) -> bool:
        """Every group is one run of rows."""
        return all(group.run is not None for group in self.groups)

    def pieces(self) -> Iterator[tuple[int, int, Group | None]]:
        """Yield (start, stop, group) of each run and (start, stop, None) of plain rows between; see `in_runs`."""
        end = 0
        for group in self.groups:  # in the order of their first rows
            first, last = group.run  # type: ignore[misc]
            if first > end:
                yield end, first, None
            yield first, last, group
            end = last
        if end < self.batch:
            yield end, self.batch, None

    def prefixed(self) -> list[int]:
        """Return the columns of each row's longest prefix."""
        return self.of_rows([group.adapter.adds()[1] for group in self.groups])

    def of_rows(self, of_groups: Sequence[int]) -> list[int]:
        """Return a number per row, from one per group; rows of no group have 0."""
        own = [*of_groups, 0]
        return [own[number] for number in self.numbers]

    def apply(self, x: Tensor | None, h: Tensor, site: str, fresh: bool = False) -> Tensor:
        """Apply every routed delta at `site` to its own rows.

        Args:
            x: the deltas' input, (B, ..., d_in) or flattened rows; None where h is all they use.
            h: the value at the site, (B, ..., d_out) or flattened (B*T, d_out).
            site: the site's name.
            fresh: nobody else holds `h`, so it may be written to.

        Returns:
            The new value, same shape and dtype as `h`; rows of other adapters are passed through untouched.
        """
        live = [number for number, group in enumerate(self.groups) if site in group.adapter.deltas]
        if not live:
            return h
        if len(self.groups) == 1 and self.groups[0].rows is None:
            group = self.groups[0]
            x = h if x is None else x
            if x.shape[:-1] != h.shape[:-1]:  # OPT flattens tokens between where x and h are caught
                x = x.reshape(*h.shape[:-1], x.shape[-1])
            return self._piece(site, group, x, h)
        hb = h.reshape(self.batch, -1, h.shape[-1])  # rows are outermost even where a family flattens tokens
        xb = hb if x is None else x.reshape(self.batch, -1, x.shape[-1])
        banks, rest = self._banks(live, site) if len(live) > 1 else ([], live)
        if banks or not torch.is_grad_enabled():  # a copy of h for every write is what a gradient would cost
            return self._banked(xb, hb, site, banks, rest, fresh).reshape(h.shape)
        if self.in_runs:
            parts = [self._piece(site, group, xb[a:b], hb[a:b]) for a, b, group in self.pieces()]
            return torch.cat(parts, 0).reshape(h.shape)
        parts = [self._piece(site, g, xb.index_select(0, g.rows), hb.index_select(0, g.rows)) for g in self.groups]  # type: ignore[arg-type]
        if self.plain is not None and len(self.plain):
            parts.append(hb.index_select(0, self.plain))
        return torch.cat(parts, 0).index_select(0, self.order).reshape(h.shape)  # type: ignore[arg-type]

    def _banks(self, live: list[int], site: str) -> tuple[list[list[int]], list[int]]:
        """Return numbers of groups that are computed together at a site, and of those that are computed alone."""
        # what torch's generator draws depends on the order of computing
        drawn = [n for n in live if self.groups[n].at.draws or not self.groups[n].adapter.deltas[site].dropping()]  # type: ignore[union-attr]
        others = [number for number in live if number not in drawn]
        live = drawn
        banks, rest = partition([self.groups[number].adapter.deltas[site] for number in live])  # type: ignore[misc]
        chosen = []
        alone = [live[i] for i in rest]
        for bank in banks:
            for numbers in self._alike([live[i] for i in bank]):
                if len(numbers) < 2 or (self.pick(numbers).per_delta is None and self.pick(numbers).copies > COPIES):
                    alone += numbers
                else:
                    chosen.append(numbers)
        return chosen, sorted([*others, *alone])

    def _alike(self, numbers: list[int]) -> list[list[int]]:
        """Cut neighbouring groups of packed tokens into runs of equal length, where rows come sorted so.

        Such runs are read and written in place; groups of unequal length would be padded, or computed one by one.
        """
        if self.packing is None or any(self.groups[number].run is None for number in numbers):
            return [numbers]
        found = [[numbers[0]]]
        for number in numbers[1:]:
            (a, b), (c, d) = self.groups[found[-1][-1]].run, self.groups[number].run  # type: ignore[misc]
            if b == c and b - a == d - c:
                found[-1].append(number)
            else:
                found.append([number])
        few = 2 * len(found) <= len(numbers) + 1
        return found if few or self.pick(numbers).per_delta is None else [numbers]

    def _banked(self, x: Tensor, h: Tensor, site: str, banks: list[list[int]], rest: list[int], fresh: bool) -> Tensor:
        """Return the new value, (B, t, d_out), with some groups computed together; each reads its own rows only."""
        out = h if fresh else None
        for numbers in banks:
            picked = self.pick(numbers)
            deltas = [self.groups[number].adapter.deltas[site] for number in numbers]
            own = picked.take(x), picked.take(h)
            at = None if picked.draws is None else At(picked.draws).enter(site)
            if picked.per_delta is not None:  # the rows of each delta lie side by side: no copies of its weights
                x_own, h_own = (v.reshape(len(numbers), picked.per_delta * v.shape[1], v.shape[2]) for v in own)
                new = Bank(deltas, None, at).compute(x_own, h_own).reshape(own[1].shape)  # type: ignore[arg-type]
            else:
                new = Bank(deltas, picked.index, at).compute(*own)  # type: ignore[arg-type]
            if picked.rows is None:
                return new  # every row of the call
            new = new if picked.real is None else new.index_select(0, picked.real)
            out = _put(h.clone() if out is None else out, new, picked.rows, picked.run)
        for group in (self.groups[number] for number in rest):
            new = self._piece(site, group, _take(x, group.rows, group.run), _take(h, group.rows, group.run))  # type: ignore[arg-type]
            out = _put(h.clone() if out is None else out, new, group.rows, group.run)  # type: ignore[arg-type]
        assert out is not None
        return out

    def pick(self, numbers: Sequence[int]) -> Picked:
        """Return the rows of some groups, in the order that their bank computes them in."""
        key = tuple(numbers)
        found = self.picked.get(key)
        if found is None:
            found = self.picked[key] = self._pick(key)
        return found

    def _pick(self, numbers: tuple[int, ...]) -> Picked:
        found = self._place(numbers)
        draws = [self.groups[number].at.draws for number in numbers]
        if None not in draws:  # those that drop are among those that draw, see `_banks`
            found = replace(found, draws=Joined(draws, found.order))  # type: ignore[arg-type]
        return found

    def _place(self, numbers: tuple[int, ...]) -> Picked:
        counts = [len(self.groups[number].rows) for number in numbers]  # type: ignore[arg-type]
        equal = counts[0] if len(set(counts)) == 1 else None
        rows = torch.cat([self.groups[number].rows for number in numbers])  # type: ignore[misc]
        if sum(counts) == self.batch:  # all groups, hence in the order of `groups`, and no plain row
            sorted_rows = self.in_runs or self.batch == len(numbers)
            if self.packing is None or (sorted_rows and equal):
                order = None if sorted_rows else rows.argsort()
                each = equal if sorted_rows else None
                return Picked(None, self.row_group, each, self.batch / len(numbers), order=order)
        if self.packing is not None and equal is None:
            return _pad(rows, counts)
        index = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)], device=rows.device)
        return Picked(rows, index, equal, sum(counts) / len(numbers), run=self._run(numbers))

    def _run(self, numbers: Sequence[int]) -> tuple[int, int] | None:
        """Return (first, last + 1) of the rows of some groups where they are one run in this order, else None."""
        runs = [self.groups[number].run for number in numbers]
        if None in runs or any(a[1] != b[0] for a, b in pairwise(runs)):  # type: ignore[index]
            return None
        return runs[0][0], runs[-1][1]  # type: ignore[index]

    @staticmethod
    def _piece(site: str, group: Group | None, x: Tensor, h: Tensor) -> Tensor:
        delta = None if group is None else group.adapter.deltas.get(site)
        if delta is None:
            return h
        new = delta(x, h, group.at.enter(site))  # type: ignore[operator,union-attr]
        if getattr(new, "shape", None) != h.shape:  # a narrower one would be broadcast over rows or tokens
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            name = group.adapter.name  # type: ignore[union-attr]
            raise ConfigError(f"the delta of {name!r} at {site} returned {got}, expected a tensor of {tuple(h.shape)}")
        return new


@dataclass(frozen=True, eq=False)
class Picked:
    """The rows of several groups.

    Attributes:
        rows: (b,) row numbers, group by group; None: all rows of the call, as they are.
        index: (b,) which of the groups each of these rows belongs to.
        per_delta: rows of each group, where they lie side by side and are as many in each; else None.
        copies: rows per group, on average.
        fill: (G * per_delta,) rows of each group, padded with its own last row, where groups are of unequal size.
        real: (b,) places of `rows` among `fill`.
        order: what the bank is given, as numbers of the groups' rows one after the other; None: in this order.
        draws: of dropout, in the bank's order; None where a group draws from torch's generator.
        run: (first, last + 1) of `rows` where they are one run, else None.
    """

    rows: Tensor | None
    index: Tensor | None
    per_delta: int | None
    copies: float
    fill: Tensor | None = None
    real: Tensor | None = None
    order: Tensor | None = None
    draws: Joined | None = None
    run: tuple[int, int] | None = None

    def take(self, values: Tensor) -> Tensor:
        """Return what the bank is given of values (B, ...)."""
        if self.fill is not None:
            return values.index_select(0, self.fill)
        return values if self.rows is None else _take(values, self.rows, self.run)


def _take(values: Tensor, rows: Tensor, run: tuple[int, int] | None) -> Tensor:
    """Return some rows of values (B, ...): a view where they are one run."""
    return values.index_select(0, rows) if run is None else values[run[0] : run[1]]


def _put(out: Tensor, new: Tensor, rows: Tensor, run: tuple[int, int] | None) -> Tensor:
    """Write new values (b, ...) to some rows of `out`; return it."""
    if run is None:
        return out.index_copy_(0, rows, new)
    out[run[0] : run[1]] = new
    return out


def _pad(rows: Tensor, counts: list[int]) -> Picked:
    """Pad groups of packed tokens to the largest; a copy of the weights per token would be far more."""
    width, total = max(counts), sum(counts)
    if width * len(counts) > PADDED * total:
        return Picked(rows, None, None, float("inf"))
    count = torch.tensor(counts, device=rows.device)[:, None]
    column = torch.arange(width, device=rows.device)
    first = count.cumsum(0) - count
    order = (first + torch.minimum(column, count - 1)).flatten()
    real = (column < count).flatten().nonzero()[:, 0]
    return Picked(rows, None, width, total / len(counts), rows[order], real, order)


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
    adapters = [find(name) for name in members]
    flat = [row for rows in members.values() for row in rows]
    whole = len(members) == 1 and len(flat) == len(names)
    indices = [None] if whole else torch.tensor(flat, device=device).split([len(rows) for rows in members.values()])
    counts = [len(names) if rows is None else len(rows) for rows in indices]
    draws = [None if a.draw is None else Draws(a.draw, n, device) for a, n in zip(adapters, counts)]
    groups = [Group(a, rows, At(drawn)) for a, rows, drawn in zip(adapters, indices, draws)]
    for group, own in zip(groups, members.values()):
        group.run = (own[0], own[-1] + 1) if own[-1] - own[0] == len(own) - 1 else None
    plan = Plan(len(names), groups, has_kv=any(g.adapter.has_kv for g in groups))
    numbers = {name: i for i, name in enumerate(members)}
    by_row = [len(groups) if name is None else numbers[name] for name in names]
    plan.has_plain = len(groups) in by_row
    if not plan.in_runs:
        plain = [row for row, g in enumerate(by_row) if g == len(groups)]
        flat += plain
        order = [0] * len(flat)
        for place, row in enumerate(flat):
            order[row] = place
        plan.plain = torch.tensor(plain, dtype=torch.long, device=device)
        plan.order = torch.tensor(order, device=device)
    plan.row_group, plan.numbers = torch.tensor(by_row, device=device), by_row
    return plan
