"""Methods from one file of somebody else pass the same contract as the built-in ones."""

from __future__ import annotations

import importlib.util
import sys

import checks
import pytest
import torch
from families import FAMILIES, WRITERS, make
from methods import every, variants

from onebase.base import Base
from onebase.errors import ConfigError, UnknownNameError, UnsupportedError
from onebase.methods import all_methods, method_names, parse_method
from onebase.store import Store

SOURCE = '''
"""Three methods written by somebody else, with nothing but onebase.extend."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from onebase.extend import AdapterModule, Delta, KVDelta, Method, check, match_linears, register


class HiRADelta(Delta):
    """h + s (W * BA) x, W of the site."""

    def __init__(self, site, rank, scale, generator):
        super().__init__()
        self.site, self.scale = site, scale
        self.A = nn.Parameter(torch.randn(rank, site.d_in, generator=generator) / site.d_in**0.5)
        self.B = nn.Parameter(torch.zeros(site.d_out, rank))

    def forward(self, x, h, at):
        change = self.site.weight() * (self.B @ self.A).to(h.dtype)
        return h + self.scale * nn.functional.linear(x, change)


@register
@dataclass(frozen=True, kw_only=True)
class HiRA(Method):
    """Hadamard high-rank adaptation (arXiv 2501.02137)."""

    name: ClassVar[str] = "their_hira"
    rank: int = 2
    scale: float = 8.0

    def __post_init__(self):
        check(self.rank >= 1, "their_hira.rank", self.rank, "at least 1")

    def select(self, sites):
        return match_linears(sites, ("q", "v", "down"), "their_hira.sites")

    def build(self, sites, init):
        return AdapterModule({s.name: HiRADelta(s, self.rank, self.scale, init.generator) for s in sites})


class Shared(nn.Module):
    """VeRA's frozen random A and B, as large as the largest site."""

    def __init__(self, rank, d_in, d_out, generator):
        super().__init__()
        self.A = nn.Buffer(torch.randn(rank, d_in, generator=generator))
        self.B = nn.Buffer(torch.randn(d_out, rank, generator=generator))


class VeRADelta(Delta):
    """h + b * B (d * A x), A and B shared."""

    def __init__(self, shared, site, rank):
        super().__init__()
        self.shared, self.d_in, self.d_out = shared, site.d_in, site.d_out
        self.d = nn.Parameter(torch.full((rank,), 0.1))
        self.b = nn.Parameter(torch.zeros(site.d_out))

    def forward(self, x, h, at):
        a, b = self.shared.A[:, : self.d_in].to(h.dtype), self.shared.B[: self.d_out].to(h.dtype)
        inner = nn.functional.linear(x, a) * self.d.to(h.dtype)
        return h + nn.functional.linear(inner, b) * self.b.to(h.dtype)


@register
@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Vectors over shared random matrices (arXiv 2310.11454)."""

    name: ClassVar[str] = "their_vera"
    rank: int = 4

    def select(self, sites):
        return match_linears(sites, "all", "their_vera.sites")

    def build(self, sites, init):
        shared = Shared(self.rank, max(s.d_in for s in sites), max(s.d_out for s in sites), init.generator)
        return AdapterModule({s.name: VeRADelta(shared, s, self.rank) for s in sites}, shared=shared)


class LowRankKV(KVDelta):
    """Keys and values of a site as tokens (P, r), shared by all sites, times a matrix of its own."""

    def __init__(self, shared, site, rank, generator):
        super().__init__()
        self.shared, self.heads, self.dim = shared, site.heads, site.head_dim
        self.key = nn.Parameter(torch.randn(rank, site.heads * site.head_dim, generator=generator))
        self.value = nn.Parameter(torch.randn(rank, site.heads * site.head_dim, generator=generator))

    def kv(self):
        tokens = self.shared.weight
        shape = (len(tokens), self.heads, self.dim)
        return (tokens @ self.key).reshape(shape), (tokens @ self.value).reshape(shape)


@register
@dataclass(frozen=True, kw_only=True)
class LowRankPrefix(Method):
    """A prefix of low rank."""

    name: ClassVar[str] = "lowrank_prefix"
    epsilon: ClassVar[float | None] = None
    length: int = 5
    rank: int = 2

    def select(self, sites):
        return [site for site in sites if site.kind == "kv"]

    def build(self, sites, init):
        shared = nn.Embedding(self.length, self.rank)
        with torch.no_grad():
            shared.weight.copy_(torch.randn(self.length, self.rank, generator=init.generator))
        return AdapterModule({s.name: LowRankKV(shared, s, self.rank, init.generator) for s in sites}, shared=shared)
'''
NEW = ("their_hira", "their_vera", "lowrank_prefix")


@pytest.fixture
def others(tmp_path):
    """Import the file from a temporary folder, which registers its methods; forget them afterwards."""
    from onebase.extend import unregister

    path = tmp_path / "methods_of_somebody.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("methods_of_somebody", path)
    module = sys.modules["methods_of_somebody"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        for name in NEW:
            unregister(name)
        del sys.modules["methods_of_somebody"]
    assert not set(NEW) & set(method_names())


@pytest.mark.parametrize("family", FAMILIES)
def test_foreign_methods_mix_with_all_others(family, others, tokenizer):
    """Outputs and gradients in one batch with a setting of every built-in method."""
    chosen = {label: m for name in method_names() for label, m in list(variants(name).items())[:1]}
    assert {m.name for m in chosen.values()} >= {*NEW, "lora", "prefix", "prompt"}
    with Base(make(family), tokenizer) as base:
        names = checks.attach(base, chosen)
        checks.adapters_are_visible(base, names)
        checks.mixed_equals_alone(base, names)


@pytest.mark.parametrize("family", FAMILIES)
def test_foreign_methods_live_like_built_in_ones(family, others, tokenizer, tmp_path):
    """Identity at the start, gradients of the adapter only, store and load, a base left as it was."""
    model = make(family)
    before = checks.snapshot(model)
    with Base(model, tokenizer) as base:
        for method in NEW:
            for name, setting in checks.carried(base, variants(method)).items():
                checks.starts_at_the_base(base, name, setting)
                checks.attach(base, {name: setting})
                checks.trains_only_the_adapter(base, name)
                checks.folds_and_reloads(base, name, Store(tmp_path / "store"))
    assert checks.differences(before, checks.snapshot(model)) == []


@pytest.mark.parametrize("family", WRITERS)
def test_foreign_methods_generate(family, others, tokenizer):
    """A mixed batch writes what each row writes alone."""
    with Base(make(family), tokenizer) as base:
        names = [*checks.attach(base, every())[::2], None]
        prompts = [row.tolist() for row in checks.draw(names).tokens]
        mixed = base.generate(prompts, names, max_new_tokens=4, return_ids=True)
        for prompt, name, found in zip(prompts, names, mixed):
            assert base.generate([prompt], name, max_new_tokens=4, return_ids=True) == [found], name


def test_a_shared_part_is_saved_once(others, tokenizer):
    """VeRA's matrices appear once among the tensors, and are no parameters."""
    with Base(make("bert"), tokenizer) as base:
        adapter = base.add("a", "their_vera(rank=3)")
        assert [name for name in adapter.tensors() if name.endswith((".A", ".B"))] == ["shared.A", "shared.B"]
        assert {tuple(p.shape) for p in adapter.parameters()} <= {(3,), (32,), (48,)}


def test_names_and_mistakes_of_foreign_methods(others, tokenizer):
    """Shorthand, unknown settings and taken names work as for built-in methods."""
    from onebase.extend import AdapterModule, Delta, Method, register

    assert parse_method("their_hira(rank=3)") == others.HiRA(rank=3)
    assert set(all_methods()) >= {*NEW, "lora"}
    with pytest.raises(UnknownNameError, match="rank"):
        parse_method("their_hira(rnak=3)")
    with pytest.raises(ConfigError, match=r"their_hira\.rank = 0"):
        parse_method("their_hira(rank=0)")

    class Thief(Method):
        name = "lora"

    with pytest.raises(ConfigError, match="taken"):
        register(Thief)

    class Takes(Delta):
        def __init__(self, site):
            super().__init__()
            self.weight = torch.nn.Parameter(site.weight())

    class TakesWeights(Method):
        name = "takes_weights"

        def select(self, sites):
            return [site for site in sites if site.kind == "linear"][:1]

        def build(self, sites, init):
            return AdapterModule({site.name: Takes(site) for site in sites})

    with Base(make("bert"), tokenizer) as base, pytest.raises(UnsupportedError, match="tensor of the base"):
        base.add("a", TakesWeights())


@pytest.mark.parametrize(("given", "said"), [(lambda h: h[:, :1], r"\(\d+, 1, "), (lambda h: None, "NoneType")])
def test_a_delta_of_another_shape_is_refused(given, said):
    """Broadcast over rows or tokens it would give each row what depends on the others."""
    with Base(make("llama")) as base:
        adapter = base.add("a", "lora(rank=2)")
        for delta in adapter.routed.deltas.values():
            delta.forward = lambda x, h, at: given(h)
        for names in (["a"], ["a", None]):
            with pytest.raises(ConfigError, match=f"'a' at .* returned .*{said}"), torch.no_grad():
                checks.call_rows(base, checks.draw(names), "right")
