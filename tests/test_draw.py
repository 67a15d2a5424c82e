"""Dropout as a function: fair bits, and the same ones whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from families import make

from onebase import Base
from onebase.core.draw import BITS, Draw, Draws, drop
from onebase.errors import RouteError
from onebase.methods.registry import parse_method

CPU = torch.device("cpu")


def mask(
    rate: float, rows: int = 64, columns: int = 16, width: int = 384, seed: int = 0, step: int = 0, site: str = "s"
):
    """Return which elements are kept, (rows * columns, width)."""
    return drop(torch.ones(rows * columns, width), rate, Draws(Draw(seed, step), rows, CPU), site, 1) != 0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_bits_are_fair_and_independent(rate) -> None:
    """Means over all, each token and each feature; correlations of tokens, of features, steps, sites and seeds."""
    kept = mask(rate).double()
    spread = (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - (1 - rate)) < 5 * spread / kept.numel() ** 0.5
    for dim, n in ((0, kept.shape[0]), (1, kept.shape[1])):
        means = (kept.mean(dim) - (1 - rate)) / (spread / n**0.5)
        assert means.abs().max() < 5.5 and 0.85 < means.std() < 1.15  # as 384 and 1,024 standard normals
    centred = (kept - (1 - rate)) / spread
    for one in (centred, centred.T):
        pairs = (one @ one.T / one.shape[1]).tril(-1) * one.shape[1] ** 0.5
        assert pairs.abs().max() < 7.5  # binomial tails are heavier than a normal's
        assert 0.95 < pairs[pairs != 0].std() < 1.05
    singular = torch.linalg.svdvals(centred) / (1024**0.5 + 384**0.5)  # Marchenko and Pastur: the largest is near 1
    assert singular.max() < 1.05
    for other in (mask(rate, step=1), mask(rate, site="t"), mask(rate, seed=1)):
        same = ((other.double() - (1 - rate)) / spread * centred).mean() * centred.numel() ** 0.5
        assert abs(same) < 5


def test_values_are_rescaled_and_gradients_follow() -> None:
    x = torch.randn(40, 7, dtype=torch.float64, requires_grad=True)  # an odd width
    out = drop(x, 0.3, Draws(Draw(1, 2), 8, CPU), "s", 1)
    rate = round(0.3 * BITS) / BITS
    assert torch.allclose(out[out != 0], (x / (1 - rate))[out != 0])
    (found,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(found != 0, out != 0)
    with pytest.raises(RouteError, match="keys for 2 rows"):
        Draws(Draw(1, 2, [3, 4]), 3, CPU)


def test_an_element_is_dropped_whatever_is_beside_it() -> None:
    """Rows 5 and 9 of a job: alone, in another order, with more columns, and packed."""
    width = 12
    both = Draws(Draw(3, 4, [5, 9]), 2, CPU)
    x = torch.ones(2, 6, width)
    expected = drop(x, 0.4, both, "s", 1)
    turned = drop(x, 0.4, Draws(Draw(3, 4, [9, 5]), 2, CPU), "s", 1)
    assert torch.equal(turned.flip(0), expected) and not torch.equal(turned, expected)
    wider = drop(torch.ones(2, 9, width), 0.4, both, "s", 1)
    assert torch.equal(wider[:, :6], expected)
    packed = Draws(Draw(3, 4, [5, 9]), 2, CPU)
    packed.pack(torch.tensor([6, 4]))
    found = drop(torch.ones(1, 10, width), 0.4, packed, "s", 1)
    assert torch.equal(found[0], torch.cat([expected[0], expected[1, :4]]))


@pytest.mark.parametrize("method", ["lora(rank=2, dropout=0.4)", "bottleneck(size=4, dropout=0.4)"])
def test_packed_padded_and_mixed_calls_draw_alike(method, tokenizer) -> None:
    with Base(make("bert"), tokenizer) as base:
        for name in ("a", "b"):
            adapter = base.add(name, parse_method(method))
            with torch.no_grad():
                for number, parameter in enumerate(adapter.module.parameters()):
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
            adapter.train()
            adapter.routed.draw = Draw(1, 5, [3, 8])
        ids = torch.randint(4, 40, (4, 9), generator=torch.Generator().manual_seed(0))
        real = torch.arange(9) < torch.tensor([9, 4, 6, 3])[:, None]
        batch = {"input_ids": ids.masked_fill(~real, 1), "attention_mask": real.long()}
        names = ["a", "b", "b", "a"]  # keys 3 and 8 of each
        mixed = base.states(batch, names)
        with base.use(names):
            padded = base.model(**batch).last_hidden_state
        assert base.packs("a")
        assert torch.allclose(mixed[real], padded[real], atol=1e-5)
        own = {key: value[[0, 3]] for key, value in batch.items()}
        assert torch.allclose(base.states(own, "a")[real[[0, 3]]], mixed[[0, 3]][real[[0, 3]]], atol=1e-5)
        base.adapters["a"].routed.draw = Draw(1, 6, [3, 8])
        assert (base.states(own, "a") - mixed[[0, 3]])[real[[0, 3]]].abs().max() > 1e-3, "dropout was off"
