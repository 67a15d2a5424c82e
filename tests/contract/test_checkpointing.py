"""Gradient checkpointing changes neither outputs nor gradients, dropout of the adapters included."""

from __future__ import annotations

import checks
import pytest
import torch
from families import CASES, WRITERS, listed, make
from methods import every

from onebase.base import Base
from onebase.core.draw import Draw
from onebase.errors import UnsupportedError
from onebase.extend import Method
from onebase.methods import parse_method

CHECKPOINTED = listed(name for name, case in CASES.items() if case.checkpoints)


def with_dropout() -> dict[str, Method]:
    """Every method, and those with a dropout of their own a second time with it on."""
    return every() | {
        "dropped-lora": parse_method("lora(rank=4, dropout=0.4)"),
        "dropped-houlsby": parse_method("bottleneck(dropout=0.4)"),
        "dropped-parallel": parse_method("bottleneck(preset='parallel', dropout=0.4)"),
    }


def one_step(base: Base, rows: checks.Rows, side: str, own: bool) -> tuple[list, dict, int]:
    """Run forward and backward of a mixed batch; return outputs, gradients and how often a layer's linear ran."""
    names = [name for name in dict.fromkeys(rows.names) if name is not None]
    torch.manual_seed(11)
    for number, name in enumerate(names):
        routed = base.adapters[name].routed
        routed.draw = Draw(number, 0) if own else None
        base.adapters[name].train(True)
    runs = []
    site = next(s for s in base.anatomy.sites.values() if s.kind == "linear")
    handle = site.module.register_forward_hook(lambda *_: runs.append(1))
    out = checks.call_rows(base, rows, side)
    loss = sum((o * checks.weights_like(o, i)).sum() for i, o in enumerate(out))
    found = checks.gradients(base, loss, names)  # the route is over: the recomputation must still know it
    handle.remove()
    return out, found, len(runs)


def compare(plain: tuple, again: tuple) -> None:
    """Outputs and gradients of two steps are the same; the second one computed its layers twice."""
    for one, other in zip(plain[0], again[0], strict=True):
        assert checks.gap(one, other) <= checks.LOGITS
    for name, expected in plain[1].items():
        checks.close_gradients(again[1][name], expected, checks.LOGITS, name)
    assert plain[2] >= 1 and again[2] == 2 * plain[2]


@pytest.mark.parametrize("own", [True, False], ids=["own-generator", "default-generator"])
@pytest.mark.parametrize("family", CHECKPOINTED)
def test_checkpointing_changes_nothing(family, own, tokenizer):
    """Outputs and gradients of a mixed batch with every method, with and without checkpointing."""
    with Base(make(family), tokenizer) as base:
        names = checks.attach(base, with_dropout())
        rows = checks.draw([*names, None])
        plain = one_step(base, rows, "left", own)
        base.gradient_checkpointing(True)
        compare(plain, one_step(base, rows, "left", own))
        base.gradient_checkpointing(False)
        again = one_step(base, rows, "left", own)
        assert again[2] == plain[2]
        base.adapters["dropped-houlsby"].train(False)
        quiet = checks.call_rows(base, rows, "left")
        place = rows.names.index("dropped-houlsby")
        assert checks.gap(quiet[place], plain[0][place]) > checks.VISIBLE, "dropout was off"


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_transformers_own_checkpointing(family, tokenizer):
    """`model.activation_checkpointing_enable()` with the layer objects in train mode gives the same gradients."""
    with Base(make(family), tokenizer) as base:
        names = checks.attach(base, every())
        rows = checks.draw([*names, None])
        plain = one_step(base, rows, "right", True)
        base.model.activation_checkpointing_enable()
        for stack in base.anatomy.stacks:
            for layer in stack.layers:
                layer.training = True
                if isinstance(getattr(layer, "dropout", None), float):
                    layer.dropout = 0.0  # OPT applies a rate of its own
        compare(plain, one_step(base, rows, "right", True))
    assert not any("Planned" in type(v).__name__ for m in base.model.modules() for v in m.__dict__.values())


@pytest.mark.parametrize("family", WRITERS)
def test_generation_while_checkpointing_is_on(family, tokenizer):
    """Text written during training is what the adapter writes: a checkpointed layer would lose the cache."""
    with Base(make(family), tokenizer) as base:
        names = [*checks.attach(base, every()), None]
        prompts = [row.tolist() for row in checks.draw(names).tokens]
        expected = base.generate(prompts, names, max_new_tokens=4, return_ids=True)
        base.gradient_checkpointing(True)
        assert base.generate(prompts, names, max_new_tokens=4, return_ids=True) == expected
        call = {"input_ids": torch.tensor(prompts[:1]), "max_new_tokens": 4, "do_sample": False}
        out = base.bind(names[0]).generate(**call)[0]
        start = 1 if base.is_encoder_decoder else len(prompts[0])
        assert out[start : start + len(expected[0])].tolist() == expected[0]
        with base.use(names[0]), pytest.raises(UnsupportedError, match="checkpoint"):
            base.model.generate(**call)
