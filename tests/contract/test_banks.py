"""Several adapters of one method in a batch are computed together, and equal each row alone on real architectures."""

from __future__ import annotations

import checks
import pytest
import torch
from families import make

from onebase.base import Base
from onebase.core.bank import partition
from onebase.methods.registry import parse_method

# Plain, fused q, k and v, encoder-decoder, one layer computed many times, tables projected without rows.
FAMILIES = ("bert", "gpt2", "t5", "llama", "albert")
GROUPS = {
    "linear": ("lora(rank=2)", "ia3", "lora(rank=2, sites='paper')"),
    "exits": ("bottleneck(size=3)", "bottleneck(preset='parallel', size=3)"),
    "virtual": (
        "prefix(length=3, init='random')",
        "prefix(length=3, init='random')",
        "prompt(length=2, init='uniform')",
    ),
}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_many_of_a_method_equal_rows_alone(family, group, tokenizer):
    methods = {f"{i}-{k}": parse_method(text) for i, text in enumerate(GROUPS[group]) for k in range(2)}
    with Base(make(family, "sdpa"), tokenizer) as base:
        names = checks.attach(base, methods)
        checks.mixed_equals_alone(base, names)


def test_what_a_step_changed_is_used_in_the_next_call(tokenizer):
    """An adapter in training beside others: values are read at the call, however they were written."""
    with Base(make("bert", "sdpa"), tokenizer) as base:
        names = checks.attach(base, {f"a{i}": parse_method("lora(rank=2)") for i in range(3)})
        sites = base.adapters["a0"].routed.deltas
        assert all(partition([base.adapters[n].routed.deltas[s] for n in names]) == ([[0, 1, 2]], []) for s in sites)
        rows = checks.draw(names)
        optimizer = torch.optim.SGD(base.adapters["a1"].parameters(), lr=1.0)
        before = checks.call_rows(base, rows, "right")
        identity = [id(p) for p in base.adapters["a1"].parameters()]
        sum(out.square().mean() for out in before).backward()
        assert all(p.grad is not None for name in names for p in base.adapters[name].module.parameters())
        optimizer.step()
        stepped = checks.call_rows(base, rows, "right")
        assert identity == [id(p) for p in base.adapters["a1"].parameters()]
        for parameter in base.adapters["a1"].module.parameters():
            parameter.data.add_(0.5)  # unseen by version counters
        written = checks.call_rows(base, rows, "right")
        for one, other in ((before, stepped), (stepped, written)):
            assert [checks.gap(a, b) > 1e-3 for a, b in zip(one, other)] == [False, True, False]
        alone = checks.call_alone(base, rows.tokens[1], "a1")
        assert checks.gap(written[1], alone) <= checks.LOGITS * checks.size(alone)
        base.remove("a0")
        with pytest.raises(Exception, match="a0"):
            checks.call_rows(base, rows, "right")
