"""Joint training equals training alone in float64: what is left in float32 is rounding, not a different computation."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import make

import onebase as ob
from onebase.training.job import Checked
from onebase.training.joint import Member, fit_many
from onebase.training.kernels import Kernels
from onebase.training.loop import Reporter, fit
from onebase.training.prepare import Prepared, discard, prepare

WORDS = ["cold", "river", "old", "bridge", "road", "small", "bird", "tall", "tree", "rain"]
TEXTS = [" ".join(WORDS[(i * k) % 10] for k in range(1, 4 + i % 5)) for i in range(60)]
NAMED = [{"text": text, "label": "xy"[i % 2]} for i, text in enumerate(TEXTS)]
SCORED = [{"text": text, "score": float((i * 7) % 60) + 0.5} for i, text in enumerate(TEXTS)]
WRITTEN = [{"prompt": WORDS[i % 10], "completion": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 3])} for i in range(60)]
JOBS = [
    (NAMED, "lora(rank=2, dropout=0.2)"), (NAMED, "lora(rank=2, dropout=0.2)"), (NAMED, "prompt(length=2)"),
    (SCORED, "bottleneck(size=3, dropout=0.1)"), (SCORED, "prefix(length=2)"), (NAMED, "ia3"),
    (WRITTEN, "lora(rank=3, dropout=0.1)"),
]  # fmt: skip


def prepared(base: ob.Base, data: list, method: str, seed: int, epochs: int) -> Prepared:
    """Return a job whose adapter and head are float64, and whose last epoch is the best."""
    settings = {"lr": 1e-3, "epochs": epochs, "batch_size": 6, "patience": 0, "restore": "best", "clip": 0.5}
    one = prepare(base, Reporter(), data=data, method=method, attach=f"job{seed}", seed=seed, **settings)
    one.adapter.module.double()
    if one.adapter.head is not None:
        one.adapter.head.double()
    one.state.kept = one.adapter.snapshot()
    steps = itertools.count()
    one.state.score = lambda: Checked(float(next(steps)), 0.0, {"order": 0.0})
    return one


def tensors(one: Prepared) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in one.adapter.tensors().items()}


@pytest.mark.parametrize(
    ("family", "steps"),
    [("bert", 24), ("llama", 24)]
    + [pytest.param(family, 200, marks=pytest.mark.slow) for family in ("bert", "llama", "t5")],
)
def test_weights_are_equal_to_1e_8(family, steps, tokenizer, monkeypatch) -> None:
    """Mixed methods and tasks, dropout, clipping, different lengths; rows of all jobs share micro-batches."""
    with ob.Base(make(family).double(), tokenizer) as base:
        chosen = JOBS if family != "bert" else JOBS[:-1]
        epochs = -(-steps // 5)  # at least 5 steps an epoch, as validation and test rows are held out

        def some(numbers) -> list[Prepared]:
            return [prepared(base, *chosen[n], seed=n, epochs=epochs) for n in numbers]

        kernels = Kernels(base, None, None)
        together = some(range(len(chosen)))
        with monkeypatch.context() as patch:  # heads and losses ask for float32 at least
            patch.setattr(torch.Tensor, "float", lambda self: self.double())
            fit_many(base, [Member(one.attached, one.state) for one in together], kernels, Reporter())
        joint = [tensors(one) for one in together]
        for one in together:
            discard(base, one)
        for number, expected in enumerate(joint):
            (one,) = some([number])
            start = tensors(one)
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "float", lambda self: self.double())
                fit(base, one.state, kernels, Reporter())
            found = tensors(one)
            assert one.state.history.steps >= steps and found.keys() == expected.keys()
            moved = max(float((found[key] - start[key]).abs().max()) for key in found)
            gap = max(float((found[key] - expected[key]).abs().max()) for key in found)
            assert gap <= 1e-8 < 1e-4 < moved, (chosen[number][1], gap, moved)
            discard(base, one)
