"""An adapter's parameters are one block of memory; what is done to one does not touch the others."""

from __future__ import annotations

import copy

import pytest
import torch
from families import make

from onebase import Base
from onebase.build import ALIGNED, build_adapter, move_together
from onebase.methods.registry import parse_method


@pytest.mark.parametrize("method", ["lora(rank=3)", "bottleneck(size=5)", "vera(rank=4)", "prefix(length=3, mlp=4)"])
def test_parameters_are_one_block_with_the_values_of_the_method(method, tokenizer) -> None:
    with Base(make("bert"), tokenizer) as base:
        adapter = base.add("a", parse_method(method), seed=3)
        parameters = list(adapter.module.parameters())
        blocks = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        assert len(blocks) == 1 and len(parameters) > 3
        assert parameters[0].untyped_storage().nbytes() <= 4 * sum(p.numel() + ALIGNED for p in parameters)
        before = {name: t.clone() for name, t in adapter.tensors().items()}
        move_together(adapter.module)
        assert all(torch.equal(t, before[name]) for name, t in adapter.tensors().items())
        with torch.no_grad():
            parameters[0].fill_(7.0)
        changed = [name for name, t in adapter.tensors().items() if not torch.equal(t, before[name])]
        assert len(changed) == 1
        twin = copy.deepcopy(adapter.module)
        with torch.no_grad():
            next(iter(twin.parameters())).fill_(1.0)
        assert parameters[0].detach().eq(7.0).all()


def test_an_optimizer_step_moves_each_by_its_own_gradient(tokenizer) -> None:
    with Base(make("bert"), tokenizer) as base:
        module = build_adapter(base, "a", parse_method("lora(rank=2)"), {"kind": "features", "labels": []}, 0).module
        alone = [p.detach().clone().requires_grad_() for p in module.parameters()]
        for number, (one, other) in enumerate(zip(module.parameters(), alone)):
            if number % 3:  # some have none
                one.grad = torch.full_like(one, float(number))
                other.grad = one.grad.clone()
        for parameters in (list(module.parameters()), alone):
            torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
        assert all(torch.equal(one, other) for one, other in zip(module.parameters(), alone))
