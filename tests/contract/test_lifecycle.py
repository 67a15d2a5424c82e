"""From add to close: identity at the start, what trains, folding, storing, removing, and a base left as it was."""

from __future__ import annotations

import checks
import pytest
import torch
from families import CASES, FAMILIES, make
from methods import every, variants

from onebase.base import Base
from onebase.core.contracts import KVDelta
from onebase.errors import ConfigError, OnebaseError, UnknownNameError, UnsupportedError
from onebase.methods import method_names
from onebase.store import Store


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("family", FAMILIES)
def test_life_of_an_adapter(family, method, tokenizer, tmp_path):
    """Start at the base, train alone, fold, save and load: every setting of a method on every family."""
    with Base(make(family), tokenizer) as base:
        found = checks.carried(base, variants(method))
        for name, setting in found.items():
            checks.starts_at_the_base(base, name, setting)
        checks.attach(base, found)
        for name in found:
            checks.trains_only_the_adapter(base, name)
            checks.folds_and_reloads(base, name, Store(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_close_leaves_the_base_as_it_was(family, tokenizer):
    """Tensors, keys, hooks, flags, modes, attention, attributes and outputs are bitwise those before `Base`."""
    model = make(family)
    model.train()  # as a caller may hand it over: training, some parameters frozen, a hook of their own
    next(model.parameters()).requires_grad_(False)
    handle = model.base_model.register_forward_hook(lambda module, args, output: None)
    row = checks.draw([None]).tokens[0][None]
    call = {"input_ids": row} | ({"decoder_input_ids": row[:, :3]} if model.config.is_encoder_decoder else {})

    def answer():
        torch.manual_seed(0)  # dropout is on
        return checks.values(model(**call)).detach()

    before, said = checks.snapshot(model), answer()
    base = Base(model, tokenizer)
    names = checks.attach(base, every())
    checks.call_rows(base, checks.draw([*names, None]), "left")[0].sum().backward()
    if CASES[family].checkpoints:
        base.gradient_checkpointing(True)
    out = checks.call_rows(base, checks.draw([*names, None]), "right")
    sum(o.sum() for o in out).backward()
    if CASES[family].writes:
        base.generate([[5, 6, 7], [8, 9]], adapter=[names[0], names[-1]], max_new_tokens=2, return_ids=True)
    with base.use(names[0]):
        base.model(**call)
    base.close()
    assert checks.differences(before, checks.snapshot(model)) == []
    assert torch.equal(said, answer())
    handle.remove()
    base.close()  # closing twice is fine
    with pytest.raises(OnebaseError, match="closed"):
        base.add("late", "lora")


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_switched_off_leaves_no_trace(family):
    """`gradient_checkpointing(True)` then `(False)` restores modes and attributes while the base stays open.

    Families whose layers transformers cannot checkpoint say so, and nothing has changed.
    """
    with Base(make(family)) as base:
        before = checks.snapshot(base.model)
        if not CASES[family].checkpoints:
            with pytest.raises(UnsupportedError, match="cannot checkpoint"):
                base.gradient_checkpointing(True)
            assert checks.differences(before, checks.snapshot(base.model)) == []
            return
        base.gradient_checkpointing(True)
        assert checks.differences(before, checks.snapshot(base.model)) != []
        base.gradient_checkpointing(False)
        assert checks.differences(before, checks.snapshot(base.model)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_remove_takes_taps_and_attention_with_the_last_that_needs_them(family, tokenizer):
    """After `remove` nothing is left of an adapter; what others still need stays."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        bare, hooks = checks.snapshot(base.model), checks.hook_count(base.model)
        row = checks.draw([None]).tokens[0]
        plain = checks.call_alone(base, row, None)
        names = checks.attach(base, every())
        alone = {name: checks.call_alone(base, row, name) for name in names}
        assert checks.hook_count(base.model) > hooks
        while names:
            base.remove(names.pop(0))
            kv = any(isinstance(d, KVDelta) for n in names for _, d in base.adapters[n].module.items())
            own = CASES[family].attention[-1]
            assert base.model.config._attn_implementation == (f"onebase:{own}" if kv else own)
            for name in names:
                assert torch.equal(checks.call_alone(base, row, name), alone[name])
        assert checks.differences(bare, checks.snapshot(base.model)) == []
        assert checks.hook_count(base.model) == hooks
        assert torch.equal(checks.call_alone(base, row, None), plain)


def test_a_removed_name_is_unknown_and_free_again(tokenizer):
    """A removed adapter answers nobody, by name or by number; its name can be used again."""
    with Base(make("bert"), tokenizer) as base:
        base.add("first", "lora")
        ids = base.ids(["first"])
        with pytest.raises(ConfigError, match="taken"):
            base.add("first", "lora")
        base.remove("first")
        base.add("first", "bottleneck")
        with pytest.raises(OnebaseError, match="no adapter has number"):
            base.model(input_ids=torch.tensor([[5, 6]]), adapter_ids=ids)
        with pytest.raises(UnknownNameError, match="'first'"):
            base.remove("frist")


def test_a_removed_adapter_inside_its_own_route_is_an_error(tokenizer):
    """A route to an adapter that was removed meanwhile raises; the base does not answer in its place."""
    with Base(make("bert"), tokenizer) as base:
        base.add("first", "lora")
        with base.use("first"):
            base.remove("first")
            with pytest.raises(UnknownNameError, match="first"):
                base.model(input_ids=torch.tensor([[5, 6]]))
