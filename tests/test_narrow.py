"""Frozen weights in bfloat16 while training: the same bits as autocast gives, and nothing stays."""

from __future__ import annotations

import checks
import pytest
import torch
from families import make
from torch import nn

from onebase.training.narrow import NarrowLinear, narrow


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_narrow_copies_give_the_bits_of_autocast(family):
    """Outputs and the gradient of the input; then the model is as before."""
    model = make(family)
    model.requires_grad_(False)
    before = checks.snapshot(model)
    embeds = torch.randn(2, 5, model.config.hidden_size)
    found = []
    for on in (False, True):
        given = embeds.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            if on:
                with narrow(model, torch.bfloat16):
                    out = model(inputs_embeds=given)[0]
            else:
                out = model(inputs_embeds=given)[0]
        out.float().pow(2).sum().backward()
        found.append((out.detach(), given.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not checks.differences(before, checks.snapshot(model))


def test_what_is_trained_or_replaced_is_left_alone():
    """Trained maps, other dtypes, subclasses and replaced forwards keep their own computation, also after an error."""

    class Own(nn.Linear):
        pass

    plain, trained, half, own, replaced = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), Own(2, 2), nn.Linear(2, 2)
    model = nn.ModuleList([plain, trained, half.half(), own, replaced])
    model.requires_grad_(False)
    trained.weight.requires_grad_(True)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(KeyError), narrow(model, torch.bfloat16):
        assert [isinstance(m.forward, NarrowLinear) for m in model] == [True, False, False, False, False]
        raise KeyError
    assert "forward" not in plain.__dict__
    assert "forward" in replaced.__dict__
