"""Discovery alone: the same sites as the rows, the contract without any row, and refusals where proof fails."""

from __future__ import annotations

from typing import Any

import checks
import pytest
import torch
from families import CASES, WRITING, listed, make
from methods import every, variants

from onebase.anatomy.anatomy import Anatomy, dissect
from onebase.anatomy.discovery_probe import Probe
from onebase.base import Base
from onebase.core.site import Site
from onebase.errors import UnsupportedError
from onebase.methods import method_names
from onebase.methods.method import Method


@pytest.fixture
def no_rows(monkeypatch):
    """Every family is unknown."""
    monkeypatch.setattr("onebase.anatomy.anatomy.FAMILIES", {})


# Where discovery refuses what a row knows: layers that share weights, and projections that run twice in one pass.
UNFOUND = {"albert": "no list of layers"}
TWICE = {"deberta-v2": ("q", "k", "v")}
FOUND = tuple(name for name in CASES if name not in UNFOUND)


def both(family: str, monkeypatch) -> tuple[Anatomy, Anatomy, Probe]:
    """Dissect one model by its row and by discovery."""
    model = make(family, "eager")
    row = dissect(model)
    monkeypatch.setattr("onebase.anatomy.anatomy.FAMILIES", {})
    found = dissect(model)
    assert (row.source, found.source) == ("row", "discovery")
    return row, found, Probe(model)


def facts(site: Site) -> dict[str, Any]:
    """Return what two descriptions of a site must share."""
    names = ("kind", "path", "span", "d_in", "d_out", "norm", "heads", "head_dim", "cancels")
    index = None if site.index is None else site.index.tolist()
    return {**{name: getattr(site, name) for name in names}, "index": index}


@pytest.mark.parametrize("family", FOUND)
def test_discovery_finds_what_the_row_says(family, monkeypatch):
    """Names, modules, features, shapes, norms and heads are the row's; residuals are the same tensors."""
    row, found, probe = both(family, monkeypatch)
    twice = {name for name, site in row.sites.items() if site.part in TWICE.get(family, ())}
    for name, site in row.sites.items():
        if name in twice or site.unsupported:  # a fused gate may go by another name where nothing can be had
            assert name not in found.sites or found.sites[name].unsupported, name
        else:
            assert name in found.sites and not found.sites[name].unsupported, (name, found.refused.get(name))
            assert facts(found.sites[name]) == facts(site), name
    pairs = [(s.residual, found.sites[n].residual) for n, s in row.sites.items() if s.residual is not None]
    seen = probe.run({ref for pair in pairs for ref in pair if ref is not None})
    for one, other in pairs:
        assert other is not None and torch.equal(seen[one].flatten(), seen[other].flatten()), (one, other)
    for name in found.sites.keys() - row.sites.keys():  # whatever else is there is refused, or a linear of its own
        assert found.sites[name].unsupported or family in TWICE, name


@pytest.mark.parametrize("family", FOUND)
def test_discovery_finds_the_rows_stacks(family, monkeypatch):
    """Stacks, embeddings, positions, poolers and pass-through dropout are the row's."""
    row, found, _ = both(family, monkeypatch)
    same = (
        "name", "path", "module", "causal", "embed", "width", "hidden", "position_start", "position_limit", "positions",
        "position_offset", "feeds", "pooler", "pooled", "layers", "padding",
    )  # fmt: skip
    assert len(row.stacks) == len(found.stacks)
    for one, other in zip(row.stacks, found.stacks):
        assert {f: getattr(other, f) for f in same} == {f: getattr(one, f) for f in same}
        assert set(other.layer_dropout) <= set(one.layer_dropout)
        for rate in set(one.layer_dropout) - set(other.layer_dropout):  # a rate of 0 shows nowhere
            owner = one.layers[0].config if rate.startswith("config.") else one.layers[0]
            assert getattr(owner, rate.removeprefix("config.")) == 0.0
    assert found.hidden_size == row.hidden_size
    refused = {site.name for _, site in row.kv_modules if site.unsupported}
    assert [s.name for _, s in found.kv_modules] == [s.name for _, s in row.kv_modules if s.name not in refused]


@pytest.mark.parametrize("family", UNFOUND)
def test_what_cannot_be_found_is_refused(family, no_rows):
    """A model whose layers are no list is refused with the reason."""
    with pytest.raises(UnsupportedError, match=UNFOUND[family]):
        dissect(make(family, "eager"))


def asked(family: str) -> dict[str, Method]:
    """Return the methods under test, less those whose settings name a part that discovery does not find."""
    absent = TWICE.get(family, ())
    named = {label: str(method.settings()) for label, method in every().items()}
    return {n: m for n, m in every().items() if not any(f"'{part}'" in named[n] for part in absent)}


@pytest.mark.parametrize("family", listed(FOUND))
def test_the_contract_holds_without_rows(family, no_rows, tokenizer):
    """Mixed batches equal rows alone, outputs and gradients; fresh adapters are the base; only adapters train."""
    with Base(make(family, CASES[family].attention[-1]), tokenizer) as base:
        assert base.anatomy.source == "discovery"
        for label, method in checks.carried(base, asked(family)).items():
            checks.starts_at_the_base(base, label, method)
        names = checks.attach(base, asked(family))
        checks.adapters_are_visible(base, names)
        checks.mixed_equals_alone(base, names)
        for name in names[::4]:
            checks.trains_only_the_adapter(base, name)


@pytest.mark.parametrize("family", listed(name for name in WRITING if name in FOUND))
def test_generation_without_rows(family, no_rows, tokenizer):
    """A row of a mixed batch gets the tokens that it gets alone."""
    with Base(make(family, CASES[family].attention[-1]), tokenizer) as base:
        chosen = {n: m for name in method_names() for n, m in list(variants(name).items())[:2]}
        names = [*checks.attach(base, chosen), None]
        prompts = [row.tolist() for row in checks.draw([None] * len(names), 7).tokens]
        mixed = base.generate(prompts, names, max_new_tokens=4, return_ids=True)
        for prompt, name, found in zip(prompts, names, mixed, strict=True):
            assert base.generate([prompt], name, max_new_tokens=4, return_ids=True) == [found], name


@pytest.mark.parametrize("family", FOUND)
def test_discovery_leaves_no_trace(family, no_rows):
    """Tensors, hooks, flags, modes, attention settings and gradients are as before."""
    model = make(family, CASES[family].attention[-1]).train()
    before = checks.snapshot(model)
    dissect(model)
    assert checks.differences(before, checks.snapshot(model)) == []


def test_half_precision_is_discovered_alike(no_rows):
    """The same sites in bfloat16 as in float32."""
    one, other = (dissect(make("gemma3").to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert one.sites.keys() == other.sites.keys()
    assert other.refused == {}
