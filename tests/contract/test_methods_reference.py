"""What methods compute, against the base itself with changed weights, gains, biases or positions."""

from __future__ import annotations

from typing import Any

import checks
import pytest
import torch
from families import CASES, FAMILIES, make
from methods import every
from torch import nn

from onebase.base import Base
from onebase.core.contracts import Delta
from onebase.core.site import Site, standardize
from onebase.errors import ConfigError, UnsupportedError
from onebase.methods import all_methods, parse_method

NEAR = 2e-5  # sums in another order than the base's, over two layers
MERGEABLE = [label for label, method in every().items() if method.mergeable]


def put(site: Site, name: str, tensor: torch.Tensor) -> None:
    """Write a site's weight or bias into a copy of the base, which gets a bias where it has none."""
    module: Any = site.module
    own = getattr(module, name, None)
    if own is None:
        full = torch.zeros(module.out_features)
        module.register_parameter(name, nn.Parameter(full, requires_grad=False))
        own = getattr(module, name)
    if own.dim() == 2 and type(module).__name__ == "Conv1D":
        own = own.t()
    if site.index is not None:
        own[site.index] = tensor
    else:
        part = own if site.span is None else own[site.span[0] : site.span[1]]
        part.copy_(tensor)


def merge(base: Base, copied: Base, name: str) -> None:
    """Write what an adapter makes of the base's weights into a copy of the base, by the deltas' own `merged`."""
    order = {"linear": 0, "input": 1, "norm": 2}  # what scales a map's inputs scales the map that others changed
    found = sorted(base.adapters[name].module.items(), key=lambda item: order[base.anatomy.sites[item[0]].kind])
    for site_name, delta in found:
        assert isinstance(delta, Delta)
        site = copied.anatomy.sites[site_name]
        weight, bias = delta.merged(site.weight(), site.bias())
        put(site, "weight", weight)
        if bias is not None:
            put(site, "bias", bias)


@pytest.mark.parametrize("name", MERGEABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mergeable_method_is_a_change_of_weights(family, name, tokenizer):
    """The adapter answers as a copy of the base whose weights, gains and biases are what `merged` returns."""
    method = every()[name]
    row = checks.draw([None, None]).tokens[1]
    with Base(make(family), tokenizer) as base, Base(make(family), tokenizer) as copied, torch.no_grad():
        if not checks.attach(base, {name: method}):
            assert checks.refused_at(base, method) in (*CASES[family].refuses, checks.LACKS)
            pytest.skip("this family refuses what the method needs, as it should")
        merge(base, copied, name)
        found, expected = checks.call_alone(base, row, name), checks.call_alone(copied, row, None)
        assert checks.gap(found, expected) <= NEAR * checks.size(expected)
        assert checks.gap(found, checks.call_alone(base, row, None)) > checks.VISIBLE / 4


def linear(base: Base, site: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Return W, an input and the bias of a linear site."""
    place = base.anatomy.sites[site]
    x = torch.randn(3, 5, place.d_in, generator=torch.Generator().manual_seed(1))
    return place.weight(), x, 0.0 if place.bias() is None else place.bias()


def change(base: Base, name: str, site: str, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Apply one delta of an adapter by hand."""
    from onebase.core.plan import At

    return base.adapters[name].routed.deltas[site](x, h, At())


FORMULAS = {
    "dora": (
        "dora(rank=3, alpha=6.0)",
        lambda d, w, x, b: (
            x @ (d.magnitude[:, None] * (w + 2.0 * d.B @ d.A) / (w + 2.0 * d.B @ d.A).norm(dim=1, keepdim=True)).T + b
        ),
    ),
    "hira": ("hira(rank=3, scale=2.0)", lambda d, w, x, b: x @ (w + 2.0 * w * (d.B @ d.A)).T + b),
    "vera": (
        "vera(rank=3)",
        lambda d, w, x, b: x @ w.T + b + d.b * (d.d * (x @ d.shared.A[:, : x.shape[-1]].T) @ d.shared.B[: len(w)].T),
    ),
    "adalora": (
        "adalora(rank=3, target=1, alpha=6.0)",
        lambda d, w, x, b: x @ (w + 2.0 * d.P @ torch.diag(d.lam) @ d.Q).T + b,
    ),
    "ia3": ("ia3", lambda d, w, x, b: (x @ w.T + b) * (1 + d.scale)),
    "bitfit": ("bitfit(create=True)", lambda d, w, x, b: x @ w.T + b + d.bias),
}


@pytest.mark.parametrize("method", FORMULAS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_formulas_of_linear_maps(family, method, tokenizer):
    """Each delta on W x + bias gives the paper's formula, written out."""
    text, formula = FORMULAS[method]
    with Base(make(family), tokenizer) as base, torch.no_grad():
        checks.disturb(base.add("a", text).module, 1)
        for site, delta in base.adapters["a"].module.items():
            if base.anatomy.sites[site].kind != "linear":
                continue
            w, x, b = linear(base, site)
            assert checks.gap(change(base, "a", site, x, x @ w.T + b), formula(delta, w, x, b)) <= 1e-5, site


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_norms(family, tokenizer):
    """LayerNorm, RMS norm and Gemma's (1 + w): the delta is what another gain and bias would give."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        checks.disturb(base.add("a", "layernorm").module, 1)
        seen = 0
        for site, delta in base.adapters["a"].module.items():
            place = base.anatomy.sites[site]
            x = torch.randn(2, 3, place.d_out, generator=torch.Generator().manual_seed(2))
            before = {n: p.clone() for n, p in place.module.named_parameters()}
            found = change(base, "a", site, x, place.module(x))
            place.module.weight.add_(delta.gamma)
            if delta.beta is not None:
                place.module.bias.add_(delta.beta)
            assert checks.gap(found, place.module(x)) <= 1e-5
            assert (delta.beta is not None) == place.norm.has_bias
            for n, p in place.module.named_parameters():
                p.copy_(before[n])
            seen += 1
        assert seen >= 2


def test_a_norm_whose_gain_is_almost_zero(tokenizer):
    """Nothing is divided by the gain."""
    with Base(make("bert"), tokenizer) as base, torch.no_grad():
        site = base.anatomy.sites["encoder/0/mlp/norm"]
        site.module.weight[3] = 5e-33
        checks.disturb(base.add("a", "layernorm").module, 1)
        x = torch.randn(2, 32)
        delta = base.adapters["a"].routed.deltas[site.name]
        h = site.module(x)
        expected = h + delta.gamma * standardize(x, site.norm) + delta.beta
        assert checks.gap(change(base, "a", site.name, x, h), expected) <= 1e-6


# -- DoRA ----------------------------------------------------------------------------------------------------------


def test_dora_treats_the_norm_as_a_constant(tokenizer):
    """The gradient of A is that of m / n times the low-rank part, with n held fixed."""
    with Base(make("bert"), tokenizer) as base:
        adapter = base.add("a", "dora(rank=2)")
        checks.disturb(adapter.module, 1)
        site = "encoder/0/attention/q"
        delta = adapter.routed.deltas[site]
        w, x, b = linear(base, site)
        b = b.detach()
        (found,) = torch.autograd.grad(change(base, "a", site, x, x @ w.T + b).square().sum(), delta.A)
        moved = w + delta.scale * delta.B @ delta.A  # W + s B A
        out = x @ (delta.magnitude[:, None] * moved / moved.detach().norm(dim=1, keepdim=True)).T + b
        (expected,) = torch.autograd.grad(out.square().sum(), delta.A, retain_graph=True)
        assert checks.gap(found, expected) <= 1e-4 * float(expected.abs().max())
        through = x @ (delta.magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)).T + b
        (other,) = torch.autograd.grad(through.square().sum(), delta.A)
        assert checks.gap(expected, other) > 1e-2 * float(expected.abs().max())  # the difference can be seen


@pytest.mark.parametrize("method", ["dora", "hira"])
def test_methods_that_read_w_refuse_an_offloaded_base(method, tokenizer):
    """Weights on the meta device are refused when the adapter is added, with the site's name."""
    with Base(make("bert"), tokenizer) as base:
        module = base.anatomy.sites["encoder/1/mlp/up"].module
        module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
        with pytest.raises(UnsupportedError, match=r"encoder/1/mlp/up.*offloaded"):
            base.add("a", method)
        assert "a" not in base.adapters
        base.add("a", "lora")


@pytest.mark.parametrize("method", ["dora", "hira"])
def test_methods_that_read_w_need_a_matrix(method, tokenizer):
    """A packed weight without `dequantize` is no matrix of the site's shape."""
    with Base(make("bert"), tokenizer) as base:
        module = base.anatomy.sites["encoder/1/mlp/up"].module
        module.weight = nn.Parameter(module.weight.flatten()[:10], requires_grad=False)
        with pytest.raises(UnsupportedError, match=r"encoder/1/mlp/up is \(10,\)"):
            base.add("a", method)


# -- IA3 and BitFit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_scales_what_enters_the_last_map(family, tokenizer):
    """The hidden vector that the MLP's last map receives is the base's times 1 + l, in every family."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        if "hidden" in CASES[family].refuses:
            pytest.skip("its experts refuse what enters them")
        adapter = base.add("a", "ia3(sites=('hidden',))")
        checks.disturb(adapter.module, 1)
        name, delta = next(iter(adapter.module.items()))  # of the first layer: what comes before it is the base's
        seen: list[torch.Tensor] = []
        handle = base.anatomy.sites[name].module.register_forward_hook(lambda m, args, out: seen.append(args[0]))
        row = checks.draw([None]).tokens[0]
        for who in (None, "a"):
            checks.call_alone(base, row, who)
        handle.remove()
        plain, scaled = seen[0], seen[len(seen) // 2]  # of its first call: ALBERT has the same layer again and again
        assert checks.gap(scaled, plain * (1 + delta.scale)) <= 1e-6
        assert checks.gap(scaled, plain) > checks.VISIBLE


def test_an_input_given_by_keyword_is_tapped(tokenizer):
    """A module that is called with its input as a keyword is served too."""
    with Base(make("bert"), tokenizer) as base, torch.no_grad():
        adapter = base.add("a", "ia3(sites=('hidden',))")
        checks.disturb(adapter.module, 1)
        row = checks.draw([None]).tokens[0]
        expected = checks.call_alone(base, row, "a")
        module = base.anatomy.sites["encoder/0/mlp/hidden"].module
        outer = base.model.encoder.layer[0].output
        original = outer.forward

        def forward(hidden_states, input_tensor):
            return outer.LayerNorm(outer.dropout(module(input=hidden_states)) + input_tensor)

        outer.forward = forward
        assert torch.equal(checks.call_alone(base, row, "a"), expected)
        outer.forward = original


def test_bitfit_without_biases(tokenizer):
    """Llama and T5 have none: refused, with the way out; Gemma's and Llama's norms have none either."""
    for family in ("llama", "t5", "gemma3"):
        with Base(make(family), tokenizer) as base:
            with pytest.raises(UnsupportedError, match=r"there are no biases.*create=True"):
                base.add("a", "bitfit")
            base.add("a", "bitfit(create=True)")


@pytest.mark.parametrize("family", FAMILIES)
def test_key_biases_are_left_out_exactly_where_softmax_cancels_them(family, tokenizer):
    """A constant on the keys changes the base's answer in those families whose keys bitfit trains, and no other."""
    with Base(make(family, "eager"), tokenizer) as base, torch.no_grad():
        base.add("a", "bitfit(sites=('q', 'k', 'v', 'o'), create=True)")
        sites = [s for s in base.anatomy.sites.values() if s.part == "k" and s.kind == "linear"]
        trained = [s for s in sites if s.name in base.adapters["a"].routed.deltas]
        assert trained in ([], sites)
        base.add("all", parse_method("ia3(sites=('k',))"))  # taps on the keys; a bias in its place
        row = checks.draw([None, None]).tokens[1]
        plain = checks.call_alone(base, row, None)
        from onebase.methods.bitfit import BiasDelta

        for site in sites:
            delta = BiasDelta(site.d_out)
            delta.bias.copy_(torch.randn(site.d_out, generator=torch.Generator().manual_seed(1)))
            base.adapters["all"].routed.deltas[site.name] = delta
        moved = checks.gap(checks.call_alone(base, row, "all"), plain)
        assert (moved > checks.VISIBLE) if trained else (moved <= 1e-5 * checks.size(plain))


def test_only_key_biases_is_nothing_to_train(tokenizer):
    """Keys of BERT are refused with the reason."""
    with Base(make("bert"), tokenizer) as base, pytest.raises(UnsupportedError, match="softmax cancels"):
        base.add("a", "bitfit(sites=('k',), norms=False)")


# -- VeRA ----------------------------------------------------------------------------------------------------------


def test_vera_shares_one_frozen_pair(tokenizer, tmp_path):
    """The matrices are no parameters, one pair for all sites; drawn again they are not stored, only their digest."""
    with Base(make("bert"), tokenizer) as base:
        drawn, kept = base.add("a", "vera(rank=3)"), base.add("b", "vera(rank=3, stored=True)")
        assert [n for n in drawn.tensors() if n.startswith("shared")] == ["shared.digest"]
        assert [n for n in kept.tensors() if n.startswith("shared")] == ["shared.A", "shared.B"]
        assert len({id(delta.shared) for _, delta in drawn.module.items()}) == 1
        assert {tuple(p.shape) for p in drawn.parameters()} <= {(3,), (32,), (48,)}
        assert torch.equal(drawn.module.shared.A, kept.module.shared.A)
        other = base.add("c", "vera(rank=3, projection=1)")
        assert not torch.equal(drawn.module.shared.A, other.module.shared.A)


def test_vera_notices_other_random_numbers(tokenizer, tmp_path, monkeypatch):
    """An adapter whose matrices are drawn otherwise here is refused at load; one that stores them is not."""
    from onebase.errors import MismatchError
    from onebase.methods import vera
    from onebase.store import Store

    with Base(make("bert"), tokenizer) as base:
        checks.attach(base, {"a": parse_method("vera(rank=3)"), "b": parse_method("vera(rank=3, stored=True)")})
        refs = {name: base.save(name, store=Store(tmp_path)).ref for name in "ab"}
        row = checks.draw([None]).tokens[0]
        expected = checks.call_alone(base, row, "b")
        for name in "ab":
            base.remove(name)
        original = vera.down_map
        monkeypatch.setattr(vera, "down_map", lambda *args: original(*args) * 1.0001)
        with pytest.raises(MismatchError, match="SHA-256"):
            base.load(refs["a"], store=Store(tmp_path))
        base.load(refs["b"], store=Store(tmp_path))
        assert torch.equal(checks.call_alone(base, row, "b"), expected)


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dora(rank=0)", r"dora\.rank = 0"),
        ("dora(sites='qq')", "dora.sites"),
        ("hira(scale=0.0)", r"hira\.scale"),
        ("vera(d_init=0.0)", r"vera\.d_init"),
        ("adalora(target=13)", r"adalora\.target = 13"),
        ("adalora(warm=0.5, final=0.5)", r"adalora\.final"),
        ("ia3(sites=('hiden',))", "hiden"),
        ("layernorm(sublayers=('mpl',))", "Did you mean 'mlp'"),
        ("loreft(first=0, last=0)", r"loreft\.last"),
        ("loreft(layers=(7,))", r"loreft\.layers = 7"),
        ("loreft(rank=33)", "width 32"),
        ("tokens", r"tokens\.words"),
        ("tokens(words=('a', 'a'))", "no word twice"),
        ("union", r"union\.parts"),
        ("lora + nothing", "unknown method 'nothing'"),
        ("lora * 2", "write name"),
        ("mam(length=0)", r"mam\.length"),
    ],
)
def test_wrong_settings_are_named(text, message, tokenizer):
    """Each mistake is an error that names the setting, before anything is attached."""
    from onebase.errors import UnknownNameError

    with Base(make("bert"), tokenizer) as base:
        with pytest.raises((ConfigError, UnknownNameError, UnsupportedError), match=message):
            base.add("a", text)
        assert not base.adapters


def test_every_method_says_how_it_is_trained():
    """Each registered method has a recipe, a union that of its parts."""
    from onebase.training.settings import recipe

    for name in all_methods():
        for method in [m for label, m in every().items() if label.rsplit("-", 1)[0] == name]:
            assert recipe(method)["lr"] > 0, name
