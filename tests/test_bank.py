"""Banks equal the loop: values, gradients, isolation of NaN, and which deltas are computed together."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from onebase.core.bank import Bank, key_of, partition
from onebase.core.contracts import AdapterModule, Delta
from onebase.core.draw import Draw
from onebase.core.packing import make_packing
from onebase.core.plan import At, Routed, lower
from onebase.core.site import NormInfo
from onebase.methods.adalora import TripletDelta
from onebase.methods.bitfit import BiasDelta
from onebase.methods.bottleneck import BottleneckDelta
from onebase.methods.ia3 import ScaleDelta
from onebase.methods.lora import LoRADelta
from onebase.methods.normdelta import NormDelta
from onebase.methods.union import ChainedDelta

D, TOKENS, SITE = 6, 5, "encoder/0/attention/q"

MAKERS = {
    "lora": lambda: LoRADelta(torch.randn(2, D), D, 0.7, 0.0),
    "adalora": lambda: TripletDelta(torch.randn(D, 2), torch.randn(2), torch.randn(2, D), 0.7, 0.0),
    "serial": lambda: BottleneckDelta(torch.randn(3, D), D, "gelu", 1.0, False, 0.0),
    "parallel": lambda: BottleneckDelta(torch.randn(3, D), D, "tanh", 4.0, True, 0.0),
    "ia3": lambda: ScaleDelta(D, False),
    "bitfit": lambda: BiasDelta(D),
    "norm": lambda: NormDelta(D, NormInfo("layer", 1e-5, True)),
    "rms": lambda: NormDelta(D, NormInfo("rms", 1e-5, False)),
    "chain": lambda: ChainedDelta([MAKERS["lora"](), MAKERS["bitfit"]()]),
}

ROUTES = {
    "one row each": ["a", "b", "c", "d"],
    "runs": ["a", "a", "b", "b", "c", "c", "d", "d"],
    "shuffled": ["b", "a", "d", "c", "a", "b", "d", "c"],
    "uneven": ["a", "b", "a", "c", "a", "d", "d"],
    "plain rows": [None, "b", "a", None, "c", "d", "b", None],
    "equal, plain rows": ["a", None, "c", "b", "d"],
    "many rows": ["a"] * 9 + ["b"] + ["a"] * 3 + ["c", None, "d"],
}


def build(maker, seed: int = 0) -> Delta:
    """Return a delta whose every parameter is away from its start."""
    torch.manual_seed(seed)
    delta = maker()
    parts = delta.chain if isinstance(delta, ChainedDelta) else [delta]
    with torch.no_grad():
        for part in parts:
            for parameter in part.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return delta


def parameters(deltas: dict[str, Delta]) -> list[nn.Parameter]:
    """Return all parameters."""
    found = []
    for delta in deltas.values():
        for part in delta.chain if isinstance(delta, ChainedDelta) else [delta]:
            found += list(part.parameters())
    return found


def plan_for(names, deltas: dict[str, Delta]):
    """Lower a route over adapters with one delta each."""
    adapters = {n: Routed(n, i, AdapterModule({}), {SITE: d}) for i, (n, d) in enumerate(deltas.items())}
    return lower(list(names), adapters.__getitem__, torch.device("cpu"))


def by_loop(names, deltas: dict[str, Delta], x: Tensor, h: Tensor) -> Tensor:
    """Return each row by itself."""
    rows = [h[i] if n is None else deltas[n](x[i], h[i], At()) for i, n in enumerate(names)]
    return torch.stack(rows)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_bank_equals_each_row_alone(kind, route):
    names = ROUTES[route]
    deltas = {name: build(MAKERS[kind], seed) for seed, name in enumerate("abcd")}
    assert len({key_of(delta) for delta in deltas.values()}) == 1 and key_of(deltas["a"]) is not None
    x, h = torch.randn(len(names), TOKENS, D), torch.randn(len(names), TOKENS, D)
    x.requires_grad_(), h.requires_grad_()
    new, expected = plan_for(names, deltas).apply(x, h, SITE), by_loop(names, deltas, x, h)
    assert torch.allclose(new, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(new)
    wanted = [x, h, *parameters(deltas)]
    found = torch.autograd.grad((new * weights).sum(), wanted, allow_unused=True)
    alone = torch.autograd.grad((expected * weights).sum(), wanted, allow_unused=True)
    for one, other in zip(found, alone):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-4, rtol=1e-4)


def test_signatures_are_grouped_within_a_site():
    deltas = {
        "a": build(MAKERS["lora"], 0), "b": build(MAKERS["serial"], 1), "c": build(MAKERS["lora"], 2),
        "d": build(lambda: LoRADelta(torch.randn(4, D), D, 0.7, 0.0), 3), "e": build(MAKERS["serial"], 4),
    }  # fmt: skip
    assert partition(list(deltas.values())) == ([[0, 2], [1, 4]], [3])
    names = ["e", None, "a", "b", "d", "c", "a", "d"]
    x, h = torch.randn(len(names), TOKENS, D), torch.randn(len(names), TOKENS, D)
    new = plan_for(names, deltas).apply(x, h, SITE)
    assert torch.allclose(new, by_loop(names, deltas, x, h), atol=1e-5)
    assert torch.equal(new[1], h[1])
    before = h.clone()
    plan_for(names, deltas).apply(x, h, SITE)
    assert torch.equal(before, h)  # h belongs to the caller


@pytest.mark.parametrize("where", ["weights", "row", "infinite weights"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", MAKERS)
def test_nan_stays_in_the_rows_of_its_adapter(kind, route, where):
    """Forward and backward: other rows and other adapters' gradients are those of a batch without it."""
    names = ROUTES[route]
    deltas = {name: build(MAKERS[kind], seed) for seed, name in enumerate("abcd")}
    x, h = torch.randn(len(names), TOKENS, D), torch.randn(len(names), TOKENS, D)
    healthy = [i for i, name in enumerate(names) if name != "b"]
    kept = {name: delta for name, delta in deltas.items() if name != "b"}

    def run() -> tuple[Tensor, tuple]:
        out = plan_for(names, deltas).apply(x, h, SITE)
        return out.detach(), torch.autograd.grad(out.square().sum(), parameters(kept))

    clean, clean_gradients = run()
    if where == "row":
        sick = names.index("b")
        x[sick], h[sick] = float("nan"), float("inf")
    else:
        with torch.no_grad():
            for parameter in parameters({"b": deltas["b"]}):
                parameter.fill_(float("nan") if where == "weights" else float("inf"))
    out, found = run()
    assert torch.equal(out[healthy], clean[healthy])
    assert all(torch.equal(one, other) for one, other in zip(found, clean_gradients))
    assert not bool(torch.isfinite(out[names.index("b")]).all())


class Counting(LoRADelta):
    """A LoRA that counts how it is computed."""

    calls: ClassVar[list[str]] = []

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        self.calls.append("alone")
        return super().forward(x, h, at)

    def signature(self):
        return super().signature()

    def bank(self, bank: Bank, x: Tensor, h: Tensor) -> Tensor:
        self.calls.append("together")
        return super().bank(bank, x, h)


class Louder(LoRADelta):
    """Another formula that inherits the bank of the old one."""

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        return super().forward(x, h, at) + 1


def make(cls, dropout: float = 0.0) -> dict[str, Delta]:
    return {n: build(lambda: cls(torch.randn(2, D), D, 0.5, dropout), i) for i, n in enumerate("ab")}


def test_adapters_of_one_signature_are_computed_once():
    Counting.calls.clear()
    x = h = torch.randn(4, TOKENS, D)
    plan_for("abab", make(Counting)).apply(x, h, SITE)
    assert Counting.calls == ["together"]


def test_a_subclass_with_another_formula_is_computed_by_it():
    deltas = make(Louder)
    assert key_of(deltas["a"]) is None
    x = h = torch.randn(4, TOKENS, D)
    new = plan_for("abab", deltas).apply(x, h, SITE)
    assert torch.allclose(new, by_loop("abab", deltas, x, h), atol=1e-6)


def test_hooks_on_a_delta_run():
    deltas = make(LoRADelta)
    seen: list[str] = []
    deltas["a"].register_forward_hook(lambda *_: seen.append("a"))
    assert key_of(deltas["a"]) is None and key_of(deltas["b"]) is not None
    x = h = torch.randn(4, TOKENS, D)
    plan_for("abab", deltas).apply(x, h, SITE)
    assert seen == ["a"]


def test_what_torch_draws_is_computed_by_itself():
    """Without a job's draw the order of computing would decide what is dropped."""
    Counting.calls.clear()
    deltas = make(Counting, dropout=0.5)
    x = h = torch.randn(4, TOKENS, D)
    plan_for("abab", deltas).apply(x, h, SITE)
    assert Counting.calls == ["alone", "alone"]
    for delta in deltas.values():
        delta.eval()
    plan_for("abab", deltas).apply(x, h, SITE)
    assert Counting.calls == ["alone", "alone", "together"]


DROPPING = {
    "lora": lambda: LoRADelta(torch.randn(2, D), D, 0.7, 0.3),
    "adalora": lambda: TripletDelta(torch.randn(D, 2), torch.randn(2), torch.randn(2, D), 0.7, 0.3),
    "bottleneck": lambda: BottleneckDelta(torch.randn(3, D), D, "gelu", 1.0, "branch", 0.3),
    "chain": lambda: ChainedDelta([DROPPING["lora"](), MAKERS["bitfit"](), DROPPING["bottleneck"]()]),
}


@pytest.mark.parametrize("lengths", [(5,) * 8, (5, 3, 4, 5, 2, 1, 5, 3)])
@pytest.mark.parametrize("route", ["one row each", "runs", "shuffled", "plain rows", "equal, plain rows"])
@pytest.mark.parametrize("kind", DROPPING)
def test_a_bank_drops_what_each_row_drops_alone(kind, route, lengths):
    """By job, row and token: padded and packed; jobs that are loose at other rates keep their own."""
    names = ROUTES[route]
    mask = torch.arange(TOKENS) < torch.tensor(lengths[: len(names)])[:, None]
    deltas = {name: build(DROPPING[kind], seed) for seed, name in enumerate("abcd")}
    own = {n: [i for i, name in enumerate(names) if name == n] for n in deltas}
    adapters = {
        n: Routed(n, i, AdapterModule({}), {SITE: d}, draw=Draw(i, 7, own[n]))
        for i, (n, d) in enumerate(deltas.items())
    }
    x, h = torch.randn(len(names), TOKENS, D), torch.randn(len(names), TOKENS, D)

    def alone(name: str | None, i: int) -> Tensor:
        if name is None:
            return h[i : i + 1]
        adapters[name].draw = Draw(adapters[name].number, 7, [i])
        return lower([name], adapters.__getitem__, torch.device("cpu")).apply(x[i : i + 1], h[i : i + 1], SITE)

    plan = lower(list(names), adapters.__getitem__, torch.device("cpu"))
    packing = make_packing(mask)
    if packing is None:
        found = plan.apply(x, h, SITE)
    else:
        plan.pack(packing)
        found = packing.unpack(plan.apply(packing.pack(x), packing.pack(h), SITE))
    banked = [number for numbers in plan.picked for number in numbers]
    assert banked, "no bank was used"
    expected = torch.cat([alone(name, i) for i, name in enumerate(names)])
    assert torch.allclose(found[mask], expected[mask], atol=1e-5)
    wanted = parameters(deltas)
    one = torch.autograd.grad(found[mask].square().sum(), wanted, allow_unused=True)
    other = torch.autograd.grad(expected[mask].square().sum(), wanted, allow_unused=True)
    assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in zip(one, other) if a is not None)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", DROPPING)
def test_runs_of_equal_length_are_banks_that_are_read_in_place(kind, grad, fresh):
    """Packed: two adapters of two rows, four of one, a longer plain row, one more adapter behind it."""
    names = ["a", "a", "b", "b", "c", "d", "e", "f", None, "g"]
    mask = torch.arange(9) < torch.tensor([5] * 8 + [9, 5])[:, None]
    deltas = {name: build(DROPPING[kind], seed) for seed, name in enumerate("abcdefg")}
    own = {n: [i for i, name in enumerate(names) if name == n] for n in deltas}
    adapters = {
        n: Routed(n, i, AdapterModule({}), {SITE: d}, draw=Draw(i, 7, own[n]))
        for i, (n, d) in enumerate(deltas.items())
    }
    x, h = torch.randn(len(names), 9, D), torch.randn(len(names), 9, D)
    packing = make_packing(mask)
    assert packing is not None
    plan = lower(names, adapters.__getitem__, torch.device("cpu"))
    plan.pack(packing)
    with torch.set_grad_enabled(grad):
        given = packing.pack(h)
        new = plan.apply(packing.pack(x), given, SITE, fresh and not grad)
        assert (new.data_ptr() == given.data_ptr()) == (fresh and not grad)
    found = packing.unpack(new)
    runs = {key: picked.run for key, picked in plan.picked.items() if picked.run is not None}
    assert runs[0, 1] == (0, 20) and runs[2, 3, 4, 5] == (20, 40), runs
    for i, name in enumerate(names):
        if name is None:
            expected = h[i : i + 1]
        else:
            adapters[name].draw = Draw(adapters[name].number, 7, [i])
            expected = lower([name], adapters.__getitem__, torch.device("cpu")).apply(x[i : i + 1], h[i : i + 1], SITE)
        assert torch.allclose(found[i : i + 1][:, mask[i]], expected[:, mask[i]], atol=1e-5), (i, name)


def test_scale_is_part_of_the_signature():
    deltas = make(LoRADelta)
    deltas["b"].scale = 2.0  # type: ignore[assignment]
    x = h = torch.randn(4, TOKENS, D)
    new = plan_for("abab", deltas).apply(x, h, SITE)
    assert torch.allclose(new, by_loop("abab", deltas, x, h), atol=1e-6)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_bank_keeps_the_dtype_of_the_value(kind):
    deltas = {name: build(MAKERS[kind], seed) for seed, name in enumerate("abcd")}
    x, h = torch.randn(4, TOKENS, D, dtype=torch.bfloat16), torch.randn(4, TOKENS, D, dtype=torch.bfloat16)
    with torch.no_grad():
        new = plan_for("abcd", deltas).apply(x, h, SITE)
        assert new.dtype == torch.bfloat16
        wide = by_loop("abcd", deltas, x.float(), h.float())
        assert (new.float() - wide).abs().max() <= 0.04 * wide.abs().max()
        with torch.autocast("cpu", torch.bfloat16):
            wide_h = plan_for("abcd", deltas).apply(x.float(), h.float(), SITE)
        assert wide_h.dtype == torch.float32
        assert (wide_h - wide).abs().max() <= 0.04 * wide.abs().max()


@pytest.mark.parametrize("lengths", [(5, 5, 5, 5), (5, 3, 4, 5), (5, 1, 1, 1)])
@pytest.mark.parametrize("names", ["abcd", "abca", "abba"])
@pytest.mark.parametrize("kind", ["lora", "serial", "norm"])
def test_packed_tokens_of_texts_of_different_lengths(kind, names, lengths):
    """Groups of unequal size are padded with their own tokens; NaN stays in its rows there too."""
    deltas = {name: build(MAKERS[kind], seed) for seed, name in enumerate("abcd")}
    names = [*names, None]
    mask = torch.arange(5) < torch.tensor([*lengths, 2])[:, None]
    packing = make_packing(mask)
    assert packing is not None
    x, h = torch.randn(5, 5, D), torch.randn(5, 5, D)
    for sick in (False, True):
        x[1] = float("nan") if sick else x[1]
        plan = plan_for(names, deltas)
        plan.pack(packing)
        new = packing.unpack(plan.apply(packing.pack(x), packing.pack(h), SITE))
        expected = torch.where(mask[..., None], by_loop(names, deltas, x, h), torch.zeros(()))
        assert torch.allclose(new, expected, atol=1e-5, equal_nan=True)
        kept = parameters({n: d for n, d in deltas.items() if n in names and n != names[1]})
        found = torch.autograd.grad(new.square().sum(), kept)
        alone = torch.autograd.grad(expected.square().sum(), kept)
        assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(found, alone))
