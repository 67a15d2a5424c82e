"""A bfloat16 base with float32 adapters, and autocast."""

from __future__ import annotations

import checks
import pytest
import torch
from families import NAMES, make, pairs
from methods import every

from onebase.base import Base

COARSE = 2.0**-8  # spacing of bfloat16 just below 1


def allowed(expected: torch.Tensor) -> float:
    """Rounding of bfloat16 through two layers, relative to the largest value."""
    return 16 * COARSE * max(1.0, float(expected.detach().abs().max()))


def all_dtypes(base: Base) -> set[torch.dtype]:
    """Dtypes of all adapters' tensors."""
    return {t.dtype for a in base.adapters.values() for t in a.tensors().values()}


@pytest.mark.parametrize(("family", "attention"), pairs(NAMES))
def test_a_bfloat16_base(family, attention, tokenizer):
    """Mixed equals alone within bfloat16, outputs keep the base's dtype, adapters and their gradients are float32."""
    with Base(make(family, attention).to(torch.bfloat16), tokenizer) as base:
        names = [*checks.attach(base, every()), None]
        assert all_dtypes(base) == {torch.float32}
        rows = checks.draw(names)
        mixed = checks.call_rows(base, rows, "left")
        for out, row, name in zip(mixed, rows.tokens, names):
            alone = checks.call_alone(base, row, name)
            assert out.dtype == alone.dtype == torch.bfloat16
            assert checks.gap(out, alone) <= allowed(alone), name
        loss = sum((out.float() * checks.weights_like(out, i)).sum() for i, out in enumerate(mixed))
        for found in checks.gradients(base, loss, names[:-1]).values():
            assert {g.dtype for g in found} == {torch.float32}
            assert all(bool(torch.isfinite(g).all()) for g in found) and max(float(g.abs().max()) for g in found) > 0
        assert all_dtypes(base) == {torch.float32}


@pytest.mark.parametrize(("family", "attention"), pairs(NAMES))
def test_autocast(family, attention, tokenizer):
    """Under autocast a mixed batch equals each row alone, both near the float32 answer; gradients are float32."""
    with Base(make(family, attention), tokenizer) as base:
        names = [*checks.attach(base, every()), None]
        rows = checks.draw(names)
        exact = [checks.call_alone(base, row, name).detach() for row, name in zip(rows.tokens, names)]
        with torch.autocast("cpu", torch.bfloat16):
            mixed = checks.call_rows(base, rows, "right")
            alone = [checks.call_alone(base, row, name) for row, name in zip(rows.tokens, names)]
        for name, out, one, wanted in zip(names, mixed, alone, exact):
            assert checks.gap(out, one) <= allowed(wanted), name
            assert checks.gap(out, wanted) <= 4 * allowed(wanted), name
        loss = sum((out.float() * checks.weights_like(out, i)).sum() for i, out in enumerate(mixed))
        for found in checks.gradients(base, loss, names[:-1]).values():
            assert {g.dtype for g in found} == {torch.float32}
            assert all(bool(torch.isfinite(g).all()) for g in found)
