"""States below the first delta are kept across epochs: training ends as without them."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import onebase as ob
from onebase.core.kept import Given, Memory
from onebase.errors import ConfigError
from onebase.store import Store
from onebase.training.full import trained_whole
from onebase.training.loop import Reporter

sys.path.insert(0, str(Path(__file__).parent / "contract"))
from families import make

GOOD = ["lovely", "great", "superb", "fine", "pleasant", "brilliant", "charming", "delightful"]
BAD = ["awful", "poor", "dreadful", "bad", "nasty", "dull", "broken", "horrid"]
THINGS = ["room", "meal", "film", "book", "long train ride to the sea"]
ROWS = [
    {"text": f"The {thing} was {word}.", "label": "good" if word in GOOD else "bad"}
    for thing in THINGS
    for word in GOOD + BAD
]
UPPER = r"lora(rank=2, dropout=0.2, sites='re:encoder/[45]/')"
STEADY = UPPER.replace("dropout=0.2, ", "")  # dropout is drawn by micro-batch
SETTINGS = {"epochs": 3, "batch_size": 8, "accumulate": 2, "attention": "keep", "dtype": "float32", "seed": 5}
EXACT = {**SETTINGS, "patience": 0, "restore": "best"}


@pytest.fixture
def given(monkeypatch) -> list[int]:
    """Collect the layer of every call that was given states."""
    seen: list[int] = []
    original = Memory.trunk

    def trunk(memory: Memory, *args: Any) -> Any:
        found = original(memory, *args)
        if isinstance(found, Given):
            seen.append(found.layer)
        return found

    monkeypatch.setattr(Memory, "trunk", trunk)
    return seen


@pytest.fixture(scope="module")
def base() -> ob.Base:
    return ob.load_base("minilm", dtype="float32")


def trained(base: ob.Base, method: str = UPPER, data: Any = ROWS, **more: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Train, and return the run and the tensors; the adapter is taken off again."""
    run = ob.train(base, data, method, **{**EXACT, **more})
    tensors = base.adapters[run.name].snapshot()
    base.remove(run.name)
    return run, tensors


def own_forwards(base: ob.Base) -> list[str]:
    """Return the modules whose `forward` was put in their place; a base puts one on the model that it carries."""
    return [name for name, module in base.model.named_modules() if "forward" in module.__dict__]


def alike(one: Any, other: Any, allowed: float = 2e-4) -> None:
    """Two runs took the same steps to the same weights."""
    assert one[0].history.steps == other[0].history.steps
    for a, b in zip(one[0].history.epochs, other[0].history.epochs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert one[1].keys() == other[1].keys()
    for key, value in one[1].items():
        assert torch.allclose(value, other[1][key], atol=allowed), key


@pytest.mark.parametrize("method", [UPPER, "bottleneck(size=4, leave_out=[0, 1, 2, 3])", "loreft(layers=[-1], rank=2)"])
def test_kept_equals_computed(base, method, given):
    """The same losses, scores and weights; and the layers below were computed once."""
    replaced = own_forwards(base)
    plain = trained(base, method, keep_mb=0)
    assert not given and "kept" not in plain[0].history.notes
    kept = trained(base, method)
    alike(kept, plain)
    layer = 5 if "loreft" in method else 4
    assert set(given) == {layer}
    facts = kept[0].history.notes["kept"]
    assert facts["layer"] == layer and facts["texts"] == facts["of"] > 50
    assert facts["bytes"] > facts["texts"] * 5 * 384 * 4
    assert replaced == own_forwards(base)


def test_a_small_budget_keeps_a_part(base, given):
    """What does not fit is computed in every epoch, in micro-batches of its own."""
    long = [{**row, "text": f"{row['text']} And then we walked home again along the river."} for row in ROWS]
    plain, kept = (trained(base, STEADY, long, keep_mb=size, epochs=2) for size in (0, 1))
    facts = kept[0].history.notes["kept"]
    assert 0 < facts["texts"] < facts["of"] and facts["bytes"] <= 2**20 and given
    alike(kept, plain)


def test_joint_jobs_keep_what_is_below_all_of_them(base, given):
    """The lowest layer of any job counts; each job ends as alone."""
    methods = {"a": "lora(rank=2, sites='re:encoder/[45]/')", "b": "bottleneck(size=4, leave_out=[0, 1, 2])"}
    settings = {"epochs": 2, "batch_size": 8, "attention": "keep", "dtype": "float32", "patience": 0, "restore": "best"}
    alone = [trained(base, method, keep_mb=0, accumulate=1, epochs=2) for method in methods.values()]
    assert not given
    runs = ob.train_many(base, [ob.Job(ROWS, method, seed=5, **settings) for method in methods.values()])
    assert set(given) == {3}
    for run, one in zip(runs, alone):
        assert run.history.notes["kept"]["layer"] == 3
        alike((run, base.adapters[run.name].snapshot()), one)
        base.remove(run.name)


def test_texts_that_are_written(tokenizer, given):
    """A decoder that learns to continue: logits are computed from given states too."""
    data = [{"prompt": row["text"], "completion": f" {row['label']} day"} for row in ROWS]
    with ob.Base(make("llama"), tokenizer) as base:
        method = "lora(rank=2, sites='re:decoder/1/')"
        plain = trained(base, method, data, keep_mb=0, epochs=2)
        assert not given
        alike(trained(base, method, data, epochs=2), plain)
        assert set(given) == {1}


def test_what_changes_or_begins_at_the_bottom_is_not_kept(base, given):
    """Deltas in the lowest layer, trained bases, single epochs and tasks that mask anew."""
    for method in ("lora(rank=2)", "prompt(length=2)", f"{UPPER} + prompt(length=1)"):
        run, _ = trained(base, method, epochs=2)
        assert "kept" not in run.history.notes
    run, _ = trained(base, epochs=1)
    assert "kept" not in run.history.notes
    with trained_whole(base, ROWS, lr=1e-4, **{**SETTINGS, "epochs": 2}) as run:
        assert "kept" not in run.history.notes
    assert not given
    with pytest.raises(ConfigError, match=r"train\.keep_mb = -1"):
        ob.train(base, ROWS, UPPER, keep_mb=-1)


class Stop(Reporter):
    """Interrupts training at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        if step == self.at:
            raise KeyboardInterrupt


def test_a_resumed_run_ends_with_the_same_bits(base, tmp_path):
    """States are computed in batches of the data's own, whenever a run starts."""
    store, settings = Store(tmp_path), {**SETTINGS, "save_steps": 2}
    replaced = own_forwards(base)
    _, whole = trained(base, save_steps=2, patience=3, restore="latest")
    with pytest.raises(KeyboardInterrupt):
        ob.train(base, ROWS, UPPER, name="r", store=store, report=Stop(7), **settings)
    assert replaced == own_forwards(base)
    assert base._memory.get() is None
    ob.train(base, ROWS, UPPER, name="r", store=store, resume=True, **settings)
    own = base.adapters["r"].tensors()
    base.remove("r")
    assert all(torch.equal(own[key], whole[key]) for key in whole)


def test_other_threads_compute_every_layer(base):
    """While states are given in one thread, another one asks the base."""
    texts = ["an unseen text", ROWS[0]["text"]]
    expected = [p.embedding for p in base.predict(texts)]
    found: list[Any] = []

    class Ask(Reporter):
        def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
            thread = threading.Thread(target=lambda: found.append([p.embedding for p in base.predict(texts)]))
            thread.start()
            thread.join()

    trained(base, epochs=2, report=Ask())
    assert len(found) > 4
    for answers in found:
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(answers, expected))


def test_coupled_losses_and_checkpointed_layers(base, given):
    """A loss over the whole batch, in one graph and in pieces; and layers that are computed again."""
    pairs = [{"anchor": row["text"], "positive": f"{row['label']}: {row['text']}"} for row in ROWS[:40]]
    for more in ({}, {"cache_tokens": 64}, {"checkpointing": True}):
        settings = {"epochs": 2, "batch_size": 8, "accumulate": 1, **more}
        plain = trained(base, UPPER, pairs, keep_mb=0, **settings)
        assert not given
        alike(trained(base, UPPER, pairs, **settings), plain)
        assert given
        given.clear()
