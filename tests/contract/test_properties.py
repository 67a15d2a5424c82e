"""Properties of routing and layout, over drawn examples."""

from __future__ import annotations

import checks
import pytest
import torch
from families import make, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import every

from onebase.base import Base
from onebase.core.contracts import Delta
from onebase.core.layout import make_layout
from onebase.core.plan import lower

FEW = settings(derandomize=True, max_examples=25, deadline=None, database=None)
MANY = settings(derandomize=True, max_examples=150, deadline=None, database=None)


@pytest.fixture(scope="module", params=["roberta", "gpt2", "gemma3", "t5"])
def prepared(request):
    """A base with every method, rows, and every row's answer under every adapter."""
    base = Base(make(request.param), tiny_tokenizer())
    names = [*checks.attach(base, every()), None]
    tokens = checks.draw([None] * 4, seed=9).tokens
    with torch.no_grad():
        alone = {(i, n): checks.call_alone(base, row, n) for i, row in enumerate(tokens) for n in names}
    yield base, names, tokens, alone
    base.close()


@FEW
@given(data=st.data())
def test_any_assignment_of_adapters_to_rows(prepared, data):
    """Whatever the rows, their order, duplicates and padding side: each row answers as itself alone."""
    base, names, tokens, alone = prepared
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(names)), min_size=1, max_size=9))
    rows = checks.Rows(tuple(tokens[i] for i, _ in pairs), tuple(n for _, n in pairs))
    side, by_ids = data.draw(st.sampled_from(["left", "right"])), data.draw(st.booleans())
    with torch.no_grad():
        for pair, out in zip(pairs, checks.call_rows(base, rows, side, by_ids), strict=True):
            assert checks.gap(out, alone[pair]) <= checks.LOGITS


masks = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=5)


def as_mask(spec) -> tuple[torch.Tensor, torch.Tensor]:
    """Build a (B, T) mask of (dead left, real, _) rows, dead on the right up to T, and prompt lengths (B,)."""
    width = max(dead + real for dead, real, _ in spec)
    mask = torch.zeros(len(spec), width, dtype=torch.long)
    for i, (dead, real, _) in enumerate(spec):
        mask[i, dead : dead + real] = 1
    return mask, torch.tensor([length for _, _, length in spec])


@MANY
@given(spec=masks, causal=st.booleans(), later=st.integers(0, 3))
def test_layout_round_trip(spec, causal, later):
    """Spread then gather is the identity; nothing overlaps; virtual tokens sit directly before the first real one."""
    mask, lengths = as_mask(spec)
    layout = make_layout(lengths, mask, mask.shape[1], causal)
    rows, columns = mask.shape
    values = torch.arange(1, rows * columns * 2 + 1).reshape(rows, columns, 2).float()
    spread = layout.spread(values)
    assert spread.shape == (rows, columns + int(lengths.max()), 2)
    assert torch.equal(layout.gather(spread), values)
    assert int((spread == 0).sum()) == rows * layout.width * 2  # every other place holds one original value
    for i in range(rows):
        place = layout.virtual(torch.tensor([i]), int(lengths[i]))[0].tolist()
        moved = layout.where()[i].tolist()
        assert not set(place) & set(moved)
        start = int(mask[i].argmax())
        assert place == list(range(moved[start] - int(lengths[i]), moved[start]))
    wide = torch.cat([mask, torch.ones(rows, later, dtype=torch.long)], 1)
    found = layout.spread_mask(wide)
    assert torch.equal(found.sum(1), wide.sum(1) + lengths)
    assert bool(found[:, found.shape[1] - later :].all())
    # real and virtual tokens of a row keep their order, without a gap where the row had none
    for i in range(rows):
        inside = found[i, : found.shape[1] - later].nonzero().flatten().tolist()
        assert inside == list(range(inside[0], inside[0] + len(inside)))


@MANY
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5), columns=st.integers(1, 6), causal=st.booleans())
def test_layout_without_a_mask(lengths, columns, causal):
    """Without padding a causal batch stays flush right, so that the last column is every row's last token."""
    layout = make_layout(torch.tensor(lengths), None, columns, causal)
    mask = layout.spread_mask(torch.ones(len(lengths), columns, dtype=torch.long))
    assert mask.shape[1] == columns + max(lengths)
    assert mask.sum(1).tolist() == [columns + length for length in lengths]
    assert bool((mask[:, -1] if causal else mask[:, 0]).all())


@MANY
@given(names=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=12))
def test_a_lowered_plan_applies_each_delta_to_its_rows(names):
    """Every row is changed by its own adapter, once, in any order; plain rows are passed through untouched."""

    class Mark(Delta):
        def __init__(self, mark: float):
            super().__init__()
            self.mark = mark

        def forward(self, x, h, at):
            return h * self.mark + x

    class Marker:
        def __init__(self, mark: float):
            self.name, self.draw, self.has_kv, self.mark = "", None, False, mark
            self.deltas = {"site": Mark(mark)}

    adapters = {"a": Marker(2.0), "b": Marker(3.0), "c": Marker(5.0)}
    plan = lower(names, adapters.__getitem__, torch.device("cpu"))
    h = torch.randn(len(names), 3, 4, generator=torch.Generator().manual_seed(len(names)))
    x = torch.ones_like(h)
    expected = torch.stack([row if n is None else row * adapters[n].mark + 1 for row, n in zip(h, names)])
    assert torch.equal(plan.apply(x, h, "site"), expected)
    flat = plan.apply(x, h.reshape(-1, 4), "site")  # OPT flattens tokens
    assert torch.equal(flat, expected.reshape(-1, 4))
    assert plan.apply(x, h, "elsewhere") is h
