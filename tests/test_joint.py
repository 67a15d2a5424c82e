"""Joint training: every job ends as if it had been trained alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import onebase as ob
from onebase.encode import Encoded
from onebase.errors import ConfigError
from onebase.store import Store
from onebase.tasks import Examples
from onebase.training import Failed
from onebase.training.joint import micro_batches
from onebase.training.loop import Reporter

sys.path.insert(0, str(Path(__file__).parent / "contract"))
from families import make

GOOD, BAD = ["lovely", "great", "superb", "fine", "pleasant"], ["awful", "poor", "dreadful", "bad", "nasty"]
THINGS = ["room", "meal", "film", "book", "phone", "long train ride to the sea"]
REVIEWS = [{"text": f"The {t} was {w}.", "label": "good" if w in GOOD else "bad"} for t in THINGS for w in GOOD + BAD]
TOPICS = [{"text": f"{w} {t} {t} today", "label": t[:4]} for t in THINGS[:3] for w in GOOD + BAD]
EXACT = {"attention": "keep", "dtype": "float32", "patience": 0, "restore": "best"}
METHODS = ["lora(rank=2, dropout=0.2)", "bottleneck(size=4, dropout=0.1)", "prefix(length=3)", "prompt(length=3)"]


def jobs(**more) -> list[ob.Job]:
    """Return jobs of four methods on two data sets, each with its own settings."""
    return [
        ob.Job(REVIEWS, METHODS[0], "a", lr=1e-3, epochs=3, batch_size=8, seed=1, **more),
        ob.Job(TOPICS, METHODS[1], "b", lr=2e-3, epochs=2, batch_size=4, accumulate=2, seed=2, **more),
        ob.Job(REVIEWS, METHODS[2], "c", lr=1e-3, epochs=2, batch_size=16, seed=3, **more),
        ob.Job(TOPICS, METHODS[3], "d", lr=1e-3, epochs=4, batch_size=8, clip=0.1, seed=4, **more),
    ]


@pytest.fixture
def base() -> ob.Base:
    return ob.load_base("minilm", dtype="float32")


def test_joint_equals_alone(base, tmp_path) -> None:
    together = ob.train_many(base, jobs(**EXACT), store=Store(tmp_path / "together"))
    assert [run.ref for run in together] == ["a@1", "b@1", "c@1", "d@1"]
    texts = [row["text"] for row in REVIEWS[:8]]
    joint = {name: base.adapters[name].snapshot() for name in "abcd"}
    answers = {name: base.predict(texts, name) for name in "abcd"}
    for name in "abcd":
        base.remove(name)
    for job, run in zip(jobs(**EXACT), together):
        alone = ob.train(base, job.data, job.method, name=job.name, store=Store(tmp_path / "alone"), **job.more)
        assert alone.history.steps == run.history.steps and alone.history.best == run.history.best
        assert alone.value == run.value and alone.base_value == run.base_value
        for key, value in base.adapters[job.name].tensors().items():
            assert torch.allclose(value, joint[job.name][key], atol=2e-4), (job.name, key)
        for one, other in zip(base.predict(texts, job.name), answers[job.name]):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-4)
        base.remove(job.name)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_joint_equals_alone_on_float64_bases(family, tokenizer) -> None:
    """Classification and, where the base writes, completion; the adapters themselves are float32."""
    words = ["cold", "river", "old", "bridge", "road", "small", "bird", "tall", "tree", "rain"]
    rows = [
        {"text": " ".join(words[(i * k) % 10] for k in range(1, 4 + i % 5)), "label": "xy"[i % 2]} for i in range(30)
    ]
    pairs = [{"prompt": words[i % 10], "completion": " ".join(words[i % 7 : i % 7 + 1 + i % 3])} for i in range(30)]
    writes = family != "bert"

    def some() -> list[ob.Job]:
        shared = {"lr": 1e-3, "epochs": 50, "batch_size": 6, **EXACT}
        found = [
            ob.Job(rows, "lora(rank=2, dropout=0.2)", seed=1, **shared),
            ob.Job(rows, "bottleneck(size=3)", seed=2, **shared),
            ob.Job(rows, "prompt(length=2)", seed=3, **shared),
        ]
        return found + ([ob.Job(pairs, "lora(rank=3)", seed=4, **shared)] if writes else [])

    model = make(family).double()
    with ob.Base(model, tokenizer) as base:
        joint = ob.train_many(base, some())
        tensors = [base.adapters[run.name].snapshot() for run in joint]
        for run in joint:
            base.remove(run.name)
        for job, expected, run in zip(some(), tensors, joint):
            alone = ob.train(base, job.data, job.method, **job.more)
            assert alone.history.steps == run.history.steps >= 150
            for key, value in base.adapters[alone.name].tensors().items():
                assert torch.allclose(value.double(), expected[key].double(), atol=1e-4), (job, key)
            base.remove(alone.name)


def test_a_job_that_diverges_never_touches_the_others(base, tmp_path, monkeypatch) -> None:
    """Job b gets an infinite parameter after its third step: the other jobs end with the same bits."""
    from onebase.training.job import JobState

    def run(poison: bool) -> tuple[list, dict[str, dict[str, torch.Tensor]]]:
        original = JobState.step

        def step(self, *given):
            original(self, *given)
            if poison and self.adapter.name.startswith("b") and self.history.steps == 3:
                with torch.no_grad():
                    next(self.adapter.module.parameters()).fill_(float("inf"))

        monkeypatch.setattr(JobState, "step", step)
        found = ob.train_many(base, jobs(**EXACT), store=Store(tmp_path / str(poison)))
        monkeypatch.setattr(JobState, "step", original)
        kept = {name: base.adapters[name].snapshot() for name in base.adapters}
        for name in list(base.adapters):
            base.remove(name)
        return found, kept

    healthy, expected = run(False)
    found, kept = run(True)
    assert isinstance(found[1], Failed) and "became" in str(found[1].error)
    assert set(kept) == {"a", "c", "d"} and all(not isinstance(r, Failed) for r in healthy)
    for name in kept:
        for key, value in kept[name].items():
            assert torch.equal(value, expected[name][key]), (name, key)


def test_an_interrupted_pass_goes_on_to_the_same_bits(base, tmp_path) -> None:
    class Stop(Reporter):
        steps = 0

        def step(self, *_: float) -> None:
            self.steps += 1
            if self.steps == 9:
                raise KeyboardInterrupt

    whole = ob.train_many(base, jobs(**EXACT, save_steps=4), store=Store(tmp_path / "whole"))
    expected = {run.name: base.adapters[run.name].snapshot() for run in whole}
    for run in whole:
        base.remove(run.name)
    store = Store(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        ob.train_many(base, jobs(**EXACT, save_steps=4), store=store, report=Stop())
    assert not base.adapters
    again = ob.train_many(base, jobs(**EXACT, save_steps=4), store=store, resume=True)
    for run in again:
        for key, value in base.adapters[run.name].tensors().items():
            assert torch.equal(value, expected[run.name][key]), (run.name, key)
    assert [run.ref for run in again] == ["a@1", "b@1", "c@1", "d@1"] and len(store.list()) == 4
    assert [run.value for run in again] == [run.value for run in whole]
    assert not list((tmp_path / "cut" / "runs").rglob("*.safetensors"))


def test_micro_batches_hold_every_row_once(base) -> None:
    class Stand:  # what micro_batches reads of a job
        def __init__(self, lengths: list[int], kind: str = "classification"):
            from types import SimpleNamespace

            self.train = Examples(tuple(Encoded(tuple(range(n))) for n in lengths))
            self.adapter = SimpleNamespace(task={"kind": kind})

    lengths = [[3, 50, 7, 7], [8, 2, 90], [5]]
    found = micro_batches([Stand(many) for many in lengths], [[0, 1, 2, 3], [2, 0, 1], [0]], tokens=40)  # type: ignore[misc]
    rows = [(p.job, row) for pieces in found for p in pieces for row in p.rows]
    assert sorted(rows) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0)]
    for pieces in found:
        sizes = [lengths[p.job][row] for p in pieces for row in p.rows]
        assert max(sizes) * len(sizes) <= 40 or len(sizes) == 1
        assert [p.job for p in pieces] == sorted({p.job for p in pieces})
    stands = [Stand(many) for many in lengths]
    packed = micro_batches(stands, [[0, 1, 2, 3], [2, 0, 1], [0]], tokens=40, packed=True)  # type: ignore[misc]
    found = [[(p.job, p.rows) for p in pieces] for pieces in packed]  # jobs stay together as far as they can
    assert found == [[(1, [2])], [(0, [1])], [(0, [0, 2, 3]), (1, [1, 0]), (2, [0])]]


def test_mistakes_are_found_before_training(base) -> None:
    with pytest.raises(ConfigError, match="several jobs are called 'a'"):
        ob.train_many(base, [ob.Job(REVIEWS, "lora", "a"), ob.Job(REVIEWS, "prompt", "a")])
    with pytest.raises(ConfigError, match="attention must be the same"):
        ob.train_many(base, [ob.Job(REVIEWS, "lora", attention="eager"), ob.Job(REVIEWS, "prompt")])
    with pytest.raises(ConfigError, match="at least one job"):
        ob.train_many(base, [])
    assert not base.adapters
