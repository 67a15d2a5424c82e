"""Adapters on one text share the layers below their first deltas, and answer as each alone would."""

from __future__ import annotations

import threading
from typing import Any

import checks
import pytest
import torch
import transformers as tf
from families import COMMON, NAMES, make, pairs

from onebase.base import Base
from onebase.core import anchor, trunk
from onebase.core.trunk import steps_of
from onebase.errors import RouteError
from onebase.methods.registry import parse_method
from onebase.tasks import get_task

# Families whose layers are given something that nobody can expand: relative positions, or ALiBi by head and row.
WHOLE = {"deberta-v2", "deberta-v2-absolute", "falcon", "falcon-new", "falcon-sequential", "bloom"}


@pytest.fixture
def shared(monkeypatch) -> list[list[tuple[int, int]]]:
    """Collect (first layer, rows or packed tokens) of the stages of every call that shared."""
    seen: list[list[tuple[int, int]]] = []
    original = trunk.finish_stages

    def finish(stages: Any, mask: Any) -> None:
        original(stages, mask)
        seen.append([(stage.layer, stage.width) for stage in stages])

    monkeypatch.setattr(anchor, "finish_stages", finish)
    return seen


def methods(base: Base) -> dict[str, Any]:
    """Return methods that begin at the last layer, at the first one, and before all layers."""
    stack = base.anatomy.stacks[0]
    last = len(stack.layers) - 1
    top = f"re:{stack.name}/{last}/attention"
    texts = {
        "top-0": f"lora(sites='{top}', rank=2)",
        "top-1": f"lora(sites='{top}', rank=2)",
        "mlp": f"bottleneck(leave_out={list(range(last))}, size=3)",
        "places": "loreft(layers=[-1], rank=2)",
        "all": "lora(rank=2)",
        "prompt": "prompt(length=2)",
        "prefix": "prefix(length=3)",
    }
    return checks.carried(base, {name: parse_method(text) for name, text in texts.items()})


def compare(base: Base, call: dict[str, Any], names: list, rows: list[int]) -> None:
    """States and gradients: texts once, against one row per adapter."""
    full = {name: value[rows] for name, value in call.items()}
    real = full["attention_mask"].bool()
    expected, found = base.states(full, names), base.states(call, names, rows)
    assert checks.gap(found[real], expected[real]) <= checks.LOGITS * checks.size(expected[real])
    weights = checks.weights_like(expected, 1) * real[..., None]
    own = {name for name in names if name is not None}
    one, other = (checks.gradients(base, (out * weights).sum(), own) for out in (found, expected))
    for name in own:
        checks.close_gradients(one[name], other[name], checks.GRADIENTS, name)


@pytest.mark.parametrize(("family", "attention"), pairs(NAMES, always=True))
def test_shared_equals_each_alone(family, attention, tokenizer, shared):
    """Every family: one text and three, padded right and left, entries grouped and shuffled."""
    with Base(make(family, attention), tokenizer) as base:
        names = [*checks.attach(base, methods(base)), None]
        checks.adapters_are_visible(base, names[:3])
        drawn = checks.draw([None] * 3)
        for side in ("right", "left"):
            ids, mask = drawn.padded(side)
            call = {"input_ids": ids, "attention_mask": mask}
            entries = [(name, row) for row in range(3) for name in names]
            for order in checks.orders(len(entries)).values():
                compare(base, call, [entries[i][0] for i in order], [entries[i][1] for i in order])
            one = {name: value[2:] for name, value in call.items()}
            compare(base, one, names, [0] * len(names))
            compare(base, one, names[:2], [0, 0])
        if family in WHOLE:
            assert not shared
        else:
            assert len(shared) == 8
            assert shared[-1] == [(0, 1), (1 if family != "albert" else 3, 2)]


def test_packed_rows_share(tokenizer, shared):
    """Tokens become more as rows do."""
    with Base(make("bert"), tokenizer) as base:
        checks.attach(base, {n: m for n, m in methods(base).items() if n != "places"})
        ids, mask = checks.draw([None] * 3).padded("right")
        names = ["top-0", "top-1", "prefix", None]
        compare(base, {"input_ids": ids, "attention_mask": mask}, names * 3, [0] * 4 + [1] * 4 + [2] * 4)
        tokens = int(mask.sum())
        assert shared == [[(0, 2 * tokens), (1, 4 * tokens)]]


def test_deep_adapters_share_longer(tokenizer, shared):
    """Each entry leaves the others where its own adapter begins."""
    torch.manual_seed(0)
    deep = tf.LlamaForCausalLM(tf.LlamaConfig(**{**COMMON, "num_hidden_layers": 5}))
    with Base(deep, tokenizer) as base:
        for layer in (1, 2, 3):
            for copy in "ab":
                base.add(f"{layer}{copy}", f"lora(sites='re:decoder/{layer}/', rank=2)", seed=layer)
                checks.disturb(base.adapters[f"{layer}{copy}"].module, layer + ord(copy))
        ids, mask = checks.draw([None] * 3).padded("right")
        call = {"input_ids": ids[2:], "attention_mask": mask[2:]}
        compare(base, call, ["1a", "3a", "2a", "3b", None, "1b", "2b"], [0] * 7)
        assert shared == [[(0, 1), (1, 3), (2, 5), (3, 7)]]


def test_checkpointed_layers_share_alike(tokenizer, shared):
    """The second computation of a layer expands the rows again."""
    with Base(make("bert"), tokenizer) as base:
        names = checks.attach(base, methods(base))
        ids, mask = checks.draw([None] * 2).padded("right")
        call = {"input_ids": ids, "attention_mask": mask}
        base.gradient_checkpointing(True)
        compare(base, call, names * 2, [0] * len(names) + [1] * len(names))
        assert shared


def test_a_nan_stays_in_its_rows(tokenizer, shared):
    """Rows that share a text meet nobody above the trunk."""
    with Base(make("bert"), tokenizer) as base, torch.no_grad():
        names = [*checks.attach(base, methods(base)), None]
        ids, mask = checks.draw([None] * 2).padded("right")
        call, rows = {"input_ids": ids, "attention_mask": mask}, [0] * len(names)
        expected = base.states(call, names, rows)
        for parameter in base.adapters["top-0"].module.parameters():
            parameter.fill_(float("nan"))
        found = base.states(call, names, rows)
        assert torch.equal(found[1:], expected[1:]) and bool(found[0].isnan().any())
        assert len(shared) == 2


def test_predict_shares_and_threads_do_not_mix(tokenizer, shared):
    """`predict` with many adapters on few texts, from several threads, with heads."""
    with Base(make("bert"), tokenizer) as base:
        names = checks.attach(base, {n: m for n, m in methods(base).items() if n != "prompt"})
        task = {"kind": "classification", "labels": ["a", "b"], "pooling": "mean", "max_length": 60, "template": ""}
        for name in names[::2]:
            own = base.adapters[name]
            own.task = {**task, "pair": False}
            own.head = get_task("classification").head(own.task, base.anatomy.hidden_size)
            checks.disturb(own.head, len(name))
        texts = ["the cold river", "the cold river runs under the old bridge and the road"]
        entries = [(text, name) for text in texts for name in (*names, None)]
        alone = [base.predict(text, name)[0] for text, name in entries]
        assert not shared
        answers: list[Any] = [None] * 8

        def ask(i: int) -> None:
            answers[i] = base.predict([text for text, _ in entries], [name for _, name in entries], batch_size=5 + i)

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert shared
        for found in answers:
            for one, other in zip(found, alone, strict=True):
                assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
                if one.embedding is not None:
                    assert checks.gap(one.embedding, other.embedding) <= checks.LOGITS


def test_where_nothing_is_shared(tokenizer, shared):
    """Hidden states of all layers, and lists that do not fit."""
    with Base(make("bert"), tokenizer) as base, torch.no_grad():
        names = checks.attach(base, methods(base))[:2]
        ids, mask = checks.draw([None] * 2).padded("right")
        call = {"input_ids": ids, "attention_mask": mask}
        base.model.config.output_hidden_states = True
        compare_only = base.states({name: value[[1, 1]] for name, value in call.items()}, names)
        assert checks.gap(base.states(call, names, [1, 1]), compare_only) <= checks.LOGITS
        base.model.config.output_hidden_states = False
        assert not shared
        for wrong in ([0], [0, 2]):
            with pytest.raises(RouteError, match="rows = "):
                base.states(call, names, wrong)
        with pytest.raises(RouteError, match="rows = "):
            base.states(call, names[0], [0, 0])


def test_layers_without_their_hooks_are_noticed(tokenizer):
    """A compiler that cached a layer skips hooks that came later: the answer would have too few rows."""
    with Base(make("bert"), tokenizer) as base, torch.no_grad():
        names = checks.attach(base, methods(base))[:2]
        ids, mask = checks.draw([None]).padded("right")
        call = {"input_ids": ids, "attention_mask": mask}
        base.states(call, names, [0, 0])
        for hook in base._installed.anchors[0].watched:
            hook.handle.remove()
        with pytest.raises(RouteError, match="without their hooks"):
            base.states(call, names, [0, 0])


def test_steps():
    """Entries leave their text where their adapter begins; the last step is in their order."""
    steps = steps_of(["a", "b", "c", None, "d"], [0, 0, 0, 0, 1], [2, 0, 1, 4, 3], 4)
    assert [step.layer for step in steps] == [0, 1, 2]
    assert steps[0].rows == ((0, None), (0, "b"), (1, "d"))
    assert steps[1].rows == ((0, None), (0, "b"), (0, "c"), (1, "d")) and steps[1].before == (0, 1, 0, 2)
    assert steps[2].rows == ((0, "a"), (0, "b"), (0, "c"), (0, None), (1, "d"))
    assert len(steps_of(["a", "b"], [0, 1], [3, 3], 4)) == 1
    assert len(steps_of(["a", "b"], [0, 0], [0, 0], 4)) == 1
    assert [s.layer for s in steps_of(["a", None], [0, 0], [4, 4], 4)] == [0, 3]
