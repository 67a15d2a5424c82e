"""Products by oneDNN: the values and gradients of torch's own, only while a call is routed, only where they fit."""

from __future__ import annotations

import checks
import pytest
import torch
from families import make
from torch import nn
from torch.nn import functional as F

from onebase import Base
from onebase.core import products
from onebase.core.products import FrozenLinear, FrozenProduct, Products
from onebase.training.narrow import NarrowLinear, narrow

measured = products.pays.__wrapped__  # not what an earlier test measured


@pytest.fixture(autouse=True)
def _chosen(monkeypatch) -> None:
    """Take them on any machine, whatever is faster there."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "pays", lambda: True)


def frozen(d_in: int, d_out: int, bias: bool = True) -> nn.Linear:
    """Return a frozen map."""
    return nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 1, 24)])
def test_values_and_gradients_are_those_of_the_linear_map(bias, shape) -> None:
    module = frozen(24, 40, bias)
    x = torch.randn(shape, requires_grad=True)
    weights = torch.randn(*shape[:-1], 40)
    found = FrozenProduct.apply(x, module.weight, module.bias)
    expected = F.linear(x.double(), module.weight.double(), None if module.bias is None else module.bias.double())
    assert torch.allclose(found.double(), expected, atol=1e-5)
    one, other = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected))
    assert torch.allclose(one, other, atol=1e-5)


def test_a_second_gradient_is_right() -> None:
    module, x = frozen(6, 3), torch.randn(8, 6, requires_grad=True)

    def second(y):
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    assert torch.allclose(
        second(FrozenProduct.apply(x, module.weight, module.bias)), second(module(x)), rtol=1e-4, atol=1e-4
    )


def test_routed_calls_use_them_and_direct_ones_do_not() -> None:
    """The states are the model's, and the model is as before."""
    model = make("bert").eval()
    before = checks.snapshot(model)
    batch = {"input_ids": torch.arange(40).reshape(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        with Base(model, None) as base:
            with base._installed.packing():
                assert isinstance(model.encoder.layer[0].output.dense.forward, FrozenLinear)
            assert torch.equal(model(**batch).last_hidden_state, expected)
            assert torch.allclose(base.states(batch, None), expected, atol=1e-5)
    assert not checks.differences(before, checks.snapshot(model))


def test_what_does_not_fit_is_computed_as_ever() -> None:
    """A trained map has its gradient, float64 and short inputs are F.linear's, autocast gives its own dtype."""
    trained, few, wide = nn.Linear(6, 4), frozen(6, 4), frozen(6, 4).double()
    x = torch.randn(8, 6)
    FrozenLinear(trained)(x).sum().backward()
    assert trained.weight.grad is not None and trained.bias.grad is not None
    assert torch.equal(FrozenLinear(few)(x[:2]), few(x[:2]))
    assert torch.equal(FrozenLinear(wide)(x.double()), wide(x.double()))
    with torch.autocast("cpu", torch.bfloat16):
        found = FrozenLinear(few)(x)
        assert found.dtype == torch.bfloat16 and torch.equal(found, few(x))


def test_forwards_of_others_stay() -> None:
    """Replaced before, or meanwhile; a narrow copy goes in front, and what it found comes back behind it."""
    model = nn.ModuleList([frozen(3, 3) for _ in range(3)])
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    given = model[0].forward
    switch = Products(model)
    with switch.used():
        assert model[0].forward is given
        with switch.used(), narrow(model, torch.bfloat16):
            assert [isinstance(m.forward, NarrowLinear) for m in model] == [False, True, True]
        assert [isinstance(m.forward, FrozenLinear) for m in model] == [False, True, True]
        model[2].forward = given  # type: ignore[method-assign]
    assert model[0].forward is given and "forward" not in model[1].__dict__ and model[2].forward is given


def test_they_are_taken_where_they_are_right_and_faster(monkeypatch) -> None:
    """Measured once in a process; fewer bits, no such function, or no gain: not taken."""
    times = {F.linear: 2.0, products._product: 1.0}
    monkeypatch.setattr(products, "_seconds", lambda function, given: times[function])
    assert measured()
    times[F.linear] = 1.1
    assert not measured()
    times[F.linear] = 2.0
    rough = products._product
    monkeypatch.setattr(products, "_product", lambda *given: rough(*given).bfloat16().float())
    times[products._product] = 1.0
    assert not measured()
