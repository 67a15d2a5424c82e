"""Rows of any adapters share a batch, and each equals itself alone: every method, family and attention."""

from __future__ import annotations

import checks
import pytest
from families import NAMES, make, pairs
from methods import every

from onebase.base import Base


@pytest.mark.parametrize(("family", "attention"), pairs(NAMES, always=True))
def test_mixed_batch_equals_rows_alone(family, attention, tokenizer):
    """Outputs and gradients of one batch with every method equal each row by itself."""
    with Base(make(family, attention), tokenizer) as base:
        names = checks.attach(base, every())
        checks.adapters_are_visible(base, names)
        checks.mixed_equals_alone(base, names)
