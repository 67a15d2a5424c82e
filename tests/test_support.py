"""The page of what works where: it is not stale, reads back as written, and a trial notices wrong answers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from onebase.anatomy import FAMILIES
from onebase.support.__main__ import PAGE
from onebase.support.page import read, render
from onebase.support.shrink import text_types
from onebase.support.trial import YES, Trial, attempt, general, tried

WITH_ROWS = sorted(set(FAMILIES) & set(text_types()))


@pytest.mark.parametrize("family", WITH_ROWS)
def test_the_page_is_not_stale(family):
    """What the page says about a family with a row is what a trial gives now."""
    trial = attempt(family)
    assert trial.wrong == []
    written = read(PAGE.read_text(encoding="utf-8"))
    said = dict(written[family])
    assert said.pop("anatomy") == "row"
    assert said.pop("unpadded") == ", ".join(trial.padding)
    assert said == trial.methods, "run: python -m onebase.support"


def test_the_page_has_every_method_and_family():
    """A new method or family asks for a new sweep."""
    text = PAGE.read_text(encoding="utf-8")
    table = read(text)
    assert set(next(iter(table.values()))) == {"anatomy", "unpadded", *tried()}
    absent = [name for name in text_types() if name not in table and f"- {name}: " not in text]
    assert absent == []


def test_a_page_reads_back():
    """Reasons come back in place of their numbers."""
    trials = [
        Trial("b", "row", methods={"lora": YES, "prefix": "its own attention"}, padding=("left",)),
        Trial("a", "discovery", methods={"lora": "fused experts", "prefix": YES}),
        Trial("c", reason="not built: too large"),
    ]
    table = read(render(trials, ["lora", "prefix"], "5"))
    assert table == {
        "a": {"anatomy": "discovery", "lora": "fused experts", "prefix": YES, "unpadded": ""},
        "b": {"anatomy": "row", "lora": YES, "prefix": "its own attention", "unpadded": "left"},
    }


def test_reasons_of_different_models_read_alike():
    """Names of methods, sites and layers are no part of a reason."""
    one = general("lora at decoder/0/mlp/up: layers.0.mlp.up: its output is no batch")
    assert one == general("lora at decoder/11/mlp/up: layers.11.mlp.up: its output is no batch")


def test_a_trial_notices_a_wrong_answer(monkeypatch):
    """A base whose rows depend on each other is reported."""
    from onebase.core.plan import Plan

    right = Plan.apply

    def leaky(self, x, h, site, fresh=False):
        out = right(self, x, h, site, fresh)
        return out + 0.1 * out.mean(0, keepdim=True) if len(self.groups) > 1 else out

    monkeypatch.setattr(Plan, "apply", leaky)
    with torch.no_grad():
        assert any("mixed batch" in wrong for wrong in attempt("llama").wrong)


@pytest.mark.sweep
@pytest.mark.parametrize("family", text_types())
def test_nothing_is_silently_wrong(family):
    """Every text class works or says why not; each in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "onebase.support", family], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
