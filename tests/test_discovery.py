"""Discovery alone: the same sites as the rows, the contract without any row, and refusals where proof fails."""

from __future__ import annotations

import checks
import pytest
import torch
from families import FAMILIES, WRITERS, make
from methods import every, variants

from onebase.anatomy.anatomy import Anatomy, dissect
from onebase.anatomy.discovery_probe import Probe
from onebase.base import Base
from onebase.methods import method_names


@pytest.fixture
def no_rows(monkeypatch):
    """Every family is unknown."""
    monkeypatch.setattr("onebase.anatomy.anatomy.FAMILIES", {})


def both(family: str, monkeypatch) -> tuple[Anatomy, Anatomy, Probe]:
    """Dissect one model by its row and by discovery."""
    model = make(family, "eager")
    row = dissect(model)
    monkeypatch.setattr("onebase.anatomy.anatomy.FAMILIES", {})
    found = dissect(model)
    assert (row.source, found.source) == ("row", "discovery")
    return row, found, Probe(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_discovery_finds_what_the_row_says(family, monkeypatch):
    """Names, modules, features, shapes, norms and heads are the row's; residuals are the same tensors."""
    row, found, probe = both(family, monkeypatch)
    assert found.refused == row.refused
    assert found.sites.keys() == row.sites.keys()
    facts = ("path", "span", "d_in", "d_out", "norm", "heads", "head_dim", "unsupported")
    for name, site in row.sites.items():
        assert {f: getattr(found.sites[name], f) for f in facts} == {f: getattr(site, f) for f in facts}, name
    pairs = [(s.residual, found.sites[n].residual) for n, s in row.sites.items() if s.residual is not None]
    seen = probe.run({ref for pair in pairs for ref in pair if ref is not None})
    for one, other in pairs:
        assert other is not None and torch.equal(seen[one].flatten(), seen[other].flatten()), (one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_discovery_finds_the_rows_stacks(family, monkeypatch):
    """Stacks, embeddings, positions, poolers and pass-through dropout are the row's."""
    row, found, _ = both(family, monkeypatch)
    facts = (
        "name", "path", "module", "causal", "embed", "position_start", "position_limit", "feeds", "pooler", "layers",
        "layer_dropout", "padding",
    )  # fmt: skip
    assert len(row.stacks) == len(found.stacks)
    for one, other in zip(row.stacks, found.stacks):
        assert {f: getattr(other, f) for f in facts} == {f: getattr(one, f) for f in facts}
    assert found.hidden_size == row.hidden_size
    assert [site.name for _, site in found.kv_modules] == [site.name for _, site in row.kv_modules]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract_holds_without_rows(family, no_rows, tokenizer):
    """Mixed batches equal rows alone, outputs and gradients; fresh adapters are the base; only adapters train."""
    with Base(make(family), tokenizer) as base:
        assert base.anatomy.source == "discovery"
        for label, method in every().items():
            checks.starts_at_the_base(base, label, method)
        names = checks.attach(base, every())
        checks.adapters_are_visible(base, names)
        checks.mixed_equals_alone(base, names)
        for name in names[::4]:
            checks.trains_only_the_adapter(base, name)


@pytest.mark.parametrize("family", WRITERS)
def test_generation_without_rows(family, no_rows, tokenizer):
    """A row of a mixed batch gets the tokens that it gets alone."""
    with Base(make(family), tokenizer) as base:
        chosen = {n: m for name in method_names() for n, m in list(variants(name).items())[:2]}
        names = [*checks.attach(base, chosen), None]
        prompts = [row.tolist() for row in checks.draw([None] * len(names), 7).tokens]
        mixed = base.generate(prompts, names, max_new_tokens=4, return_ids=True)
        for prompt, name, found in zip(prompts, names, mixed, strict=True):
            assert base.generate([prompt], name, max_new_tokens=4, return_ids=True) == [found], name


@pytest.mark.parametrize("family", FAMILIES)
def test_discovery_leaves_no_trace(family, no_rows):
    """Tensors, hooks, flags, modes, attention settings and gradients are as before."""
    model = make(family).train()
    before = checks.snapshot(model)
    dissect(model)
    assert checks.differences(before, checks.snapshot(model)) == []


def test_half_precision_is_discovered_alike(no_rows):
    """The same sites in bfloat16 as in float32."""
    one, other = (dissect(make("gemma3").to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert one.sites.keys() == other.sites.keys()
    assert other.refused == {}
