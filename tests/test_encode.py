"""Templates, truncation and padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.encode import IGNORED, Encoded, collate, render
from onebase.errors import ConfigError


def test_a_template_fills_its_places_once() -> None:
    assert render("Review: {text}", {"text": "fine"}) == "Review: fine"
    assert render("{text} / {text_pair}", {"text": "{text_pair}", "text_pair": "b"}) == "{text_pair} / b"
    assert render("", {"text": "as it is {x}"}) == "as it is {x}"
    assert render("{json: 1} {text}", {"text": "t"}) == "{json: 1} t"


def test_a_template_without_its_place_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no place for \{text_pair\}"):
        render("{text}", {"text": "a", "text_pair": "b"})


@given(st.text(), st.text())
@settings(max_examples=100, derandomize=True)
def test_texts_are_never_changed_by_a_template(text: str, pair: str) -> None:
    assert render("<{text}|{text_pair}>", {"text": text, "text_pair": pair}) == f"<{text}|{pair}>"


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_is_masked_and_carries_no_loss(side: str) -> None:
    rows = [Encoded((5, 6, 7), labels=(IGNORED, 6, 7)), Encoded((8,), labels=(8,))]
    batch = collate(rows, 0, side)
    real = batch["attention_mask"].bool()
    assert batch["input_ids"].shape == (2, 3)
    assert batch["input_ids"][real].tolist() == [5, 6, 7, 8]
    assert batch["labels"][real].tolist() == [IGNORED, 6, 7, 8]
    assert (batch["labels"][~real] == IGNORED).all()
    assert real[1].tolist() == ([True, False, False] if side == "right" else [False, False, True])
    assert "token_type_ids" not in batch and batch["input_ids"].dtype == torch.long
