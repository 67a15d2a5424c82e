"""Rows computed without their padding equal the padded batch: every method, family and attention that packs."""

from __future__ import annotations

from typing import Any

import checks
import pytest
import torch
from families import NAMES, make, pairs
from methods import every

from onebase.base import Base
from onebase.core.packing import CHUNK_ROWS, make_packing
from onebase.core.plan import Plan
from onebase.errors import RouteError
from onebase.methods.registry import parse_method

# What must pack: attention on transformers' interface, positions that can be given, no window that counts columns.
PACKS = {"bert", "bert-decoder", "roberta", "distilbert", "electra", "albert", "gpt2", "llama", "qwen3"}


@pytest.fixture
def packed(monkeypatch) -> list[int]:
    """Collect the tokens of every packed call."""
    seen: list[int] = []
    original = Plan.pack

    def pack(plan: Plan, packing: Any) -> None:
        seen.append(packing.tokens)
        original(plan, packing)

    monkeypatch.setattr(Plan, "pack", pack)
    return seen


def padded_states(base: Base, call: dict[str, Any], names: checks.Names) -> torch.Tensor:
    """Compute the states as transformers pads them."""
    with base.use(names):
        more = {"use_cache": False} if base.anatomy.stacks[0].causal else {}
        return base.anatomy.stacks[0].module(**call, **more).last_hidden_state


def compare(base: Base, names: checks.Names, side: str, seed: int = 0) -> None:
    """Outputs and gradients, packed against padded."""
    ids, mask = checks.draw(names, seed).padded(side)
    call, real = {"input_ids": ids, "attention_mask": mask}, mask.bool()
    expected, found = padded_states(base, call, names), base.states(call, names)
    size = checks.size(expected[real])
    assert checks.gap(found[real], expected[real]) <= checks.LOGITS * size, side
    weights = checks.weights_like(expected, 1) * real[..., None]
    own = {name for name in names if name is not None}
    one, other = (checks.gradients(base, (out * weights).sum(), own) for out in (found, expected))
    for name in own:
        checks.close_gradients(one[name], other[name], checks.GRADIENTS, f"{name}, {side}")


@pytest.mark.parametrize(("family", "attention"), pairs(NAMES, always=True))
def test_packed_equals_padded(family, attention, tokenizer, packed):
    """Every method in one batch, contiguous and shuffled, padded right and left, on every family that packs."""
    with Base(make(family, attention), tokenizer) as base:
        if not base._installed.packs:
            assert family not in PACKS
            pytest.skip(f"{family} computes padded rows")
        methods = {label: m for label, m in every().items() if not label.startswith(("loreft", "union"))}
        names = [name for name in (*checks.attach(base, methods), None) for _ in range(2)]
        for order in checks.orders(len(names)).values():
            for side in ("right", "left"):
                before = len(packed)
                compare(base, [names[i] for i in order], side)
                assert len(packed) == before + 1
        compare(base, [names[0]] * 3, "right", seed=2)


def test_positional_methods_are_computed_padded(tokenizer, packed):
    """Changes at positions read (b, T); dropout does not hinder packing."""
    with Base(make("bert"), tokenizer) as base:
        base.add("p", "loreft(rank=1)")
        base.add("d", "lora(dropout=0.5)")
        compare(base, ["p", "p", None], "right")
        assert not packed
        base.adapters["d"].train(False)
        compare(base, ["d", None], "right")
        base.adapters["d"].train()
        ids, mask = checks.draw(["d", None]).padded("right")
        base.states({"input_ids": ids, "attention_mask": mask}, ["d", None])
        assert len(packed) == 2


def test_direct_calls_are_what_transformers_computes(tokenizer, packed):
    """Packing is asked for by `states` alone; hidden states are handed out padded; the setting is given back."""
    with Base(make("bert", "eager"), tokenizer) as base, torch.no_grad():
        ids, mask = checks.draw([None] * 3).padded("right")
        call = {"input_ids": ids, "attention_mask": mask}
        padded_states(base, call, None)
        assert not packed
        base.states(call, None)
        assert packed
        assert base.model.config._attn_implementation == "eager"
        base.model.config.output_hidden_states = True
        base.states(call, None)
        assert len(packed) == 1
        with pytest.raises(RouteError, match="2 rows"):
            base.states({name: value[:2] for name, value in call.items()}, ["a", "b", "c"])
        assert base.model.config._attn_implementation == "eager"


def test_a_nan_stays_in_its_rows(tokenizer, packed):
    """Neighbours in a chunk, and in the packed row, never meet."""
    with Base(make("bert"), tokenizer) as base, torch.no_grad():
        checks.attach(base, {"a": every()["lora-0"], "b": every()["prefix-0"], "c": every()["prompt-0"]})
        names = ["a", "b", None, "c", "a", "b", None, "c", None]
        ids, mask = checks.draw(names).padded("right")
        call = {"input_ids": ids, "attention_mask": mask}
        expected = base.states(call, names)
        for parameter in base.adapters["a"].module.parameters():
            parameter.fill_(float("nan"))
        found = base.states(call, names)
        own = torch.tensor([name == "a" for name in names])
        assert torch.equal(found[~own], expected[~own])
        assert found[own][mask[own].bool()].isnan().all()
        assert len(packed) == 2


def test_where_tokens_go():
    """Packing and unpacking are inverse; unpadded batches are left alone; long batches make several chunks."""
    lengths = torch.tensor([3, 1, 5, 2, 5, 4, 1, 1, 2, 3])
    mask = torch.arange(5) < lengths[:, None]
    packing = make_packing(mask)
    assert packing is not None
    values = torch.randn(*mask.shape, 2)
    row = packing.pack(values)
    assert torch.equal(row[0], values[mask])
    assert torch.equal(packing.unpack(row), values * mask[..., None])
    assert packing.of_rows(torch.tensor([2, 0])).tolist() == [4, 5, 6, 7, 8, 0, 1, 2]
    assert [chunk.rows for chunk in packing.chunks] == [(0, CHUNK_ROWS), (CHUNK_ROWS, 10)]
    assert make_packing(torch.ones(3, 4)) is None
    assert make_packing(torch.tensor([[1, 1], [0, 0]])) is None  # a row without tokens has no attention


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_checkpointed_layers_are_not_packed(family, tokenizer, packed):
    """They are computed again after the call has ended: gradients are those without checkpointing."""
    with Base(make(family), tokenizer) as base:
        names = checks.attach(base, {"a": parse_method("lora(rank=2)"), "b": parse_method("bottleneck(size=4)")})
        ids, mask = checks.draw([*names, None]).padded("right")
        found = []
        for on in (False, True):
            base.gradient_checkpointing(on)
            states = base.states({"input_ids": ids, "attention_mask": mask}, [*names, None])
            found.append(checks.gradients(base, (states * mask[..., None]).square().sum(), names))
            assert len(packed) == 1
        base.gradient_checkpointing(False)
    for name in names:
        checks.close_gradients(found[1][name], found[0][name], checks.GRADIENTS, name)
