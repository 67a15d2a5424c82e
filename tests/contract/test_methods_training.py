"""What methods do in training: hooks of the loop, AdaLoRA's schedule, rates of a union's parts, new words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import torch
from families import make

import onebase as ob
from onebase.base import Base
from onebase.errors import DataError
from onebase.extend import AdapterModule, Delta, Method
from onebase.methods import AdaLoRA, parse_method
from onebase.store import Store
from onebase.training.job import make_optimizer
from onebase.training.settings import WIDTH, recipe, settings_for

FAST = {"attention": "eager", "dtype": "float32", "batch_size": 8}


def reviews(rows: int = 48, extra: str = "") -> list[dict[str, str]]:
    """Return short labelled texts of words that the tokenizer under test knows."""
    things = ("river", "bridge", "bird", "tree", "road", "rain")
    words = (("good", "fine", "great"), ("bad", "awful", "poor"))
    return [
        {
            "text": f"the {things[i // 2 % 6]} {extra} was {words[i % 2][i // 12 % 3]}" + " and" * (i // 36),
            "label": ("yes", "no")[i % 2],
        }
        for i in range(rows)
    ]


class Watched(Delta):
    """A shift that notes when it is told of a step."""

    def __init__(self, d):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(d))

    def forward(self, x, h, at):
        """Add the shift."""
        return h + self.shift.to(h.dtype)


class Watching(AdapterModule):
    """Notes penalties and steps, and that gradients are still there."""

    def __init__(self, deltas):
        super().__init__(deltas)
        self.asked, self.told = 0, []

    def penalty(self):
        """Pull the shifts towards 1, strongly."""
        self.asked += 1
        return sum((1e3 * (delta.shift - 1).square()).sum() for _, delta in self.items())

    def stepped(self, step, steps):
        """Note the step."""
        assert all(p.grad is not None for p in self.parameters())
        self.told.append((step, steps))


@dataclass(frozen=True, kw_only=True)
class Shifts(Method):
    """Shift what leaves each MLP."""

    name: ClassVar[str] = "shifts"

    def select(self, sites):
        """Return the MLPs' exits."""
        return [s for s in sites if s.kind == "exit" and s.sublayer == "mlp"]

    def build(self, sites, init):
        """Build the shifts."""
        return Watching({s.name: Watched(s.d_out) for s in sites})


@pytest.mark.parametrize("union", [False, True])
def test_the_loop_adds_the_penalty_once_and_tells_of_each_step(union, tokenizer):
    """Once per optimizer step, whatever is accumulated; the penalty's gradient is part of the step."""
    method = Shifts() + parse_method("layernorm") if union else Shifts()
    with Base(make("bert"), tokenizer) as base:
        run = ob.train(base, reviews(), method, epochs=2, accumulate=2, lr=0.05, patience=0, **FAST)
        module = base.adapters[run.name].module
        module = module.members()[0] if union else module
        assert module.asked == run.history.steps > 2
        assert module.told == [(i + 1, run.history.steps) for i in range(run.history.steps)]
        if run.history.best:
            assert all(float(delta.shift.detach().min()) > 0.01 for _, delta in module.items())


# -- AdaLoRA -------------------------------------------------------------------------------------------------------


def steps_of(base: Base, name: str, first: int, last: int, steps: int, seed: int = 0) -> None:
    """Train by plain gradient descent on drawn rows; step i is the same whoever makes it."""
    adapter = base.adapters[name]
    for step in range(first, last + 1):
        row = checks.draw([None, None], seed=100 + step).tokens[1]
        out = checks.call_alone(base, row, name)
        loss = (out * checks.weights_like(out, step)).sum() + adapter.module.penalty()
        for p in adapter.module.parameters():
            p.grad = None
        loss.backward()
        with torch.no_grad():
            for p in adapter.module.parameters():
                p -= 0.05 * p.grad
        adapter.module.stepped(step, steps)


def test_the_budget_falls_from_all_to_the_target():
    """It is rank per site up to the first share, target per site from the last one on, and never grows."""
    method = AdaLoRA(rank=6, target=2, warm=0.2, final=0.3)
    found = [method.budget(step, 100, 5) for step in range(1, 101)]
    assert found[:20] == [30] * 20 and found[69:] == [10] * 31
    assert found == sorted(found, reverse=True)
    half = 10 + round(20 * (1 - (45 - 20) / (70 - 20)) ** 3)  # eq. 12
    assert method.budget(45, 100, 5) == half


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_pruned_triplets_are_dropped_and_nothing_else_changes(family, tokenizer, tmp_path):
    """After its schedule exactly target triplets per site are left; folding and storing keep every output."""
    with Base(make(family), tokenizer) as base:
        base.add("a", "adalora(rank=4, target=2, every=2)")
        steps_of(base, "a", 1, 20, 20)
        adapter = base.adapters["a"]
        sites = len(adapter.routed.deltas)
        row = checks.draw([None]).tokens[0]
        with torch.no_grad():
            before = checks.call_alone(base, row, "a")
            adapter.fold()
            ranks = [len(delta.lam) for _, delta in adapter.module.items()]
            assert sum(ranks) == 2 * sites and len(set(ranks)) > 1
            assert checks.gap(before, checks.call_alone(base, row, "a")) <= 1e-6
            assert checks.gap(before, checks.call_alone(base, row, None)) > 1e-5
            folded = checks.call_alone(base, row, "a")
            ref = base.save("a", store=Store(tmp_path)).ref
            base.remove("a")
            base.load(ref, store=Store(tmp_path))
            assert torch.equal(folded, checks.call_alone(base, row, "a"))


def test_a_site_that_lost_every_triplet(tokenizer, tmp_path):
    """A site may be left without any: it changes nothing, and is stored and loaded."""
    with Base(make("bert"), tokenizer) as base, torch.no_grad():
        adapter = base.add("a", "adalora(rank=2, target=1)")
        checks.disturb(adapter.module, 1)
        first = next(delta for _, delta in adapter.module.items())
        first.kept.zero_()
        first.lam.zero_()
        row = checks.draw([None]).tokens[0]
        expected = checks.call_alone(base, row, "a")
        adapter.fold()
        assert len(next(delta for _, delta in adapter.module.items()).lam) == 0
        assert checks.gap(expected, checks.call_alone(base, row, "a")) <= 1e-6
        ref = base.save("a", store=Store(tmp_path)).ref
        base.remove("a")
        base.load(ref, store=Store(tmp_path))
        assert checks.gap(expected, checks.call_alone(base, row, "a")) <= 1e-6


def test_a_resumed_schedule_goes_on_exactly(tokenizer):
    """A snapshot in the middle holds all there is to know: another adapter goes on to the same bits."""
    with Base(make("bert"), tokenizer) as base:
        base.add("a", "adalora(rank=4, target=2, every=3)")
        steps_of(base, "a", 1, 9, 24)
        half = base.adapters["a"].snapshot()
        steps_of(base, "a", 10, 24, 24)
        base.add("b", "adalora(rank=4, target=2, every=3)", seed=5)
        base.adapters["b"].put(half)
        steps_of(base, "b", 10, 24, 24)
        one, other = base.adapters["a"].tensors(), base.adapters["b"].tensors()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_importance_and_penalty_are_the_papers(tokenizer):
    """Two steps of the smoothing, and the penalty, written out."""
    with Base(make("bert"), tokenizer) as base:
        adapter = base.add("a", "adalora(rank=3, target=2, orthogonal=0.5, beta1=0.8, beta2=0.6)")
        checks.disturb(adapter.module, 1)
        deltas = [delta for _, delta in adapter.module.items()]
        expected = sum(
            (d.P.T @ d.P - torch.eye(3)).norm() ** 2 + (d.Q @ d.Q.T - torch.eye(3)).norm() ** 2 for d in deltas
        )
        assert checks.gap(adapter.module.penalty(), 0.5 * expected) <= 1e-3 * float(expected.detach())
        delta = deltas[0]
        names = ("P", "lam", "Q")
        mean, spread = dict.fromkeys(names, torch.zeros(())), dict.fromkeys(names, torch.zeros(()))
        for step in (1, 2):
            for d in deltas:
                for p in d.parameters():
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            for n in mean:
                w = getattr(delta, n)
                now = (w * w.grad).abs().detach()
                mean[n] = 0.8 * mean[n] + 0.2 * now
                spread[n] = 0.6 * spread[n] + 0.4 * (now - mean[n]).abs()
            adapter.module.stepped(step, 100)
        s = {n: mean[n] * spread[n] for n in mean}
        assert checks.gap(delta.importance(), s["lam"] + s["P"].mean(0) + s["Q"].mean(1)) <= 1e-6


def test_adalora_from_end_to_end(tokenizer, tmp_path):
    """Trained by the loop, stored by name, loaded: the same answers, and fewer values than it started with."""
    with Base(make("bert"), tokenizer) as base:
        method = "adalora(rank=4, target=1, every=1, final=0.5)"
        run = ob.train(base, reviews(), method, name="a", store=Store(tmp_path), epochs=4, lr=0.02, patience=0, **FAST)
        texts = [row["text"] for row in reviews(6)]
        expected = [p.probabilities for p in base.predict(texts, "a")]
        base.remove("a")
        base.load(run.ref, store=Store(tmp_path))
        assert [p.probabilities for p in base.predict(texts, "a")] == expected


# -- unions --------------------------------------------------------------------------------------------------------


def test_each_part_of_a_union_has_its_own_rate(tokenizer):
    """The set rate is the slowest part's; the others keep their proportion; a flat part does not decay."""
    with Base(make("bert"), tokenizer) as base:
        adapter = base.add("a", "prefix(length=2) + lora(rank=2) + bottleneck")
        settings = settings_for(adapter.method, {})
        assert settings.lr == recipe("bottleneck")["lr"]
        optimizer, _ = make_optimizer(adapter, settings, 10, WIDTH)
        found = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                found[id(p)] = (group["initial_lr"], group["weight_decay"] > 0)
        for part, text in zip(adapter.module.members(), ("prefix", "lora", "bottleneck")):
            for p in part.parameters():
                rate, decays = found[id(p)]
                assert rate == pytest.approx(recipe(text)["lr"])
                assert decays == (p.dim() == 2 and text != "prefix")
        doubled, _ = make_optimizer(adapter, settings_for(adapter.method, {"lr": 2e-3}), 10, WIDTH)
        assert max(g["initial_lr"] for g in doubled.param_groups) == pytest.approx(2e-2)


def test_mam_is_the_union_that_it_stands_for(tokenizer, tmp_path):
    """Same parts, same start, trained and stored like any method."""
    with Base(make("bert"), tokenizer) as base:
        base.add("m", "mam(length=4)")
        base.add("u", "prefix(length=4) + bottleneck(preset='parallel')")
        one, other = base.adapters["m"].tensors(), base.adapters["u"].tensors()
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
        run = ob.train(base, reviews(), "mam(length=4)", name="a", store=Store(tmp_path), epochs=1, **FAST)
        assert run.method == "mam(length=4)" and run.settings.lr == recipe("bottleneck")["lr"]
        texts = [row["text"] for row in reviews(6)]
        expected = [p.probabilities for p in base.predict(texts, "a")]
        base.remove("a")
        base.load(run.ref, store=Store(tmp_path))
        assert [p.probabilities for p in base.predict(texts, "a")] == expected


# -- words ---------------------------------------------------------------------------------------------------------


def test_training_with_new_words(tokenizer, tmp_path):
    """Texts are cut with the adapter's own words, the base is scored on its own cut, the stored one answers alike."""
    vocabulary = dict(tokenizer.get_vocab())
    with Base(make("bert"), tokenizer) as base:
        data = reviews(extra="<clause>")
        method = "tokens(words=('<clause>', 'good', 'bad'))"
        run = ob.train(base, data, method, name="a", store=Store(tmp_path), epochs=2, **FAST)
        plain = ob.train(base, data, "layernorm", epochs=1, **FAST)
        assert run.base_metrics["accuracy"] == plain.base_metrics["accuracy"]
        assert run.parameters - plain.parameters == 3 * 32 - sum(
            p.numel() for p in base.adapters[plain.name].module.parameters()
        )
        texts = [row["text"] for row in data[:6]]
        expected = [p.probabilities for p in base.predict(texts, "a")]
        scores = ob.evaluate(base, data, "a")
        assert scores.base is not None
        base.remove("a")
        base.load(run.ref, store=Store(tmp_path))
        assert [p.probabilities for p in base.predict(texts, "a")] == expected
    assert tokenizer.get_vocab() == vocabulary


def test_a_new_word_cannot_be_a_target(tokenizer):
    """The LM head has no row for it: refused with the word, before any training."""
    words = ("river", "bridge", "bird", "tree", "road", "rain", "day", "work", "end", "we", "walk", "old", "small")
    rows = [{"prompt": f"the {word} comes", "completion": f"runs <clause> down the {word}"} for word in words]
    with Base(make("gpt2"), tokenizer) as base:
        with pytest.raises(DataError, match="'<clause>' is to be predicted"):
            ob.train(base, rows, "tokens(words=('<clause>',))", **FAST)
        swapped = [{"prompt": row["completion"], "completion": row["prompt"]} for row in rows]
        run = ob.train(base, swapped, "tokens(words=('<clause>',))", epochs=1, **FAST)
        assert run.metric == "perplexity" and run.base_value > 0
