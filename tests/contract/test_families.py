"""What single families decide: layers that share weights, projections for all rows, positions, interleaved parts."""

from __future__ import annotations

import checks
import pytest
import torch
import transformers as tf
from families import BART, CASES, COMMON, FALCON, SPECIAL, make
from methods import every

from onebase.anatomy import FAMILIES
from onebase.anatomy.rows import fused
from onebase.base import Base
from onebase.errors import UnsupportedError


def test_every_family_is_under_test():
    """A row without a case in the suite is a claim without a proof."""
    tested = {case.build().config.model_type for case in CASES.values()} | {"vit"}
    assert tested == set(FAMILIES)


def test_fused_parts():
    """Parts lie in one run each, or alternate by group."""
    flat = fused("m", q=4, k=2, v=2)
    assert [flat[part].features for part in "qkv"] == [(0, 4), (4, 6), (6, 8)]
    mixed = {part: projection.features.tolist() for part, projection in fused("m", 2, q=2, k=1, v=1).items()}
    assert mixed == {"q": [0, 1, 4, 5], "k": [2, 6], "v": [3, 7]}


@pytest.mark.parametrize("family", ["gpt2", "modernbert", "phi3", "gpt-neox", "falcon", "falcon-new", "bloom"])
def test_parts_of_a_projection_cover_it_once(family):
    """q, k and v are every output feature of the fused module, each once; `take` and `put` are inverse."""
    with Base(make(family)) as base, torch.no_grad():
        sites = [s for s in base.anatomy.sites.values() if s.layer == 0 and s.part in ("q", "k", "v")]
        assert all(site.is_part for site in sites)
        whole = sum(site.d_out for site in sites)
        values = torch.randn(2, 3, whole)
        again = torch.full_like(values, torch.nan)
        for site in sites:
            site.put(again, site.take(values))
        assert torch.equal(again, values)


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "phi3"])
def test_a_delta_may_keep_what_it_reads(family, tokenizer):
    """A product with h at every part of a fused projection has the gradient of the plain computation."""
    from onebase.extend import AdapterModule, Delta, Method

    class Gain(Delta):
        def __init__(self, d):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.ones(d))

        def forward(self, x, h, at):
            return h * self.gain

    class Gains(Method):
        name = "gains"

        def select(self, sites):
            return [site for site in sites if site.part in ("q", "k", "v")]

        def build(self, sites, init):
            return AdapterModule({site.name: Gain(site.d_out) for site in sites})

    with Base(make(family), tokenizer) as base:
        module = base.add("a", Gains()).module
        checks.disturb(module, 3)
        checks.mixed_equals_alone(base, ["a"])
        checks.trains_only_the_adapter(base, "a")


def test_an_albert_site_acts_at_every_call_of_its_weights():
    """One layer of weights is one set of sites; adding a constant once per call is adding it to the shared bias."""
    config = tf.AlbertConfig(**{**COMMON, "num_hidden_layers": 3}, embedding_size=16)
    torch.manual_seed(0)
    model = tf.AlbertModel(config).eval()
    row = checks.draw([None]).tokens[0][None]
    with Base(model) as base, torch.no_grad():
        assert base.anatomy.layers == 1 and base.anatomy.hidden_size == 32
        adapter = base.add("a", "bottleneck(preset='pfeiffer', size=2)")
        next(p for n, p in adapter.module.named_parameters() if n.endswith("up_bias")).fill_(0.3)
        with base.use("a"):
            found = model(input_ids=row).last_hidden_state
    model.encoder.albert_layer_groups[0].albert_layers[0].ffn_output.bias.data += 0.3
    with torch.no_grad():
        assert checks.gap(found, model(input_ids=row).last_hidden_state) <= checks.LOGITS


def test_deberta_gives_its_method_back(tokenizer):
    """The computation shared by all rows is wrapped while an adapter needs it, and only then."""
    with Base(make("deberta-v2"), tokenizer) as base:
        core = base.anatomy.kv_modules[0][0]
        base.add("o", "lora(sites='o')")
        assert "disentangled_attention_bias" not in core.__dict__
        base.add("q", "lora(sites='q')")
        base.add("k", "lora(sites='k')")
        assert "disentangled_attention_bias" in core.__dict__
        base.remove("q")
        assert "disentangled_attention_bias" in core.__dict__
        base.remove("k")
        assert "disentangled_attention_bias" not in core.__dict__


def test_bart_counts_real_tokens_under_a_route(tokenizer):
    """Left padding moves BART's positions in transformers; under a route, also the plain one, it does not."""
    with Base(make("bart"), tokenizer) as base, torch.no_grad():
        row = checks.draw([None]).tokens[0]
        ids = torch.cat([torch.full((4,), 1), row])[None]
        mask = (torch.arange(ids.shape[1]) >= 4).long()[None]
        call = checks.inputs(base, ids, mask, row[None, :3])
        expected = checks.call_alone(base, row, None)
        assert checks.gap(base.model(**call).logits[0], expected) > checks.VISIBLE
        with base.use(None):
            assert checks.gap(base.model(**call).logits[0], expected) <= checks.LOGITS


def test_decoders_and_encoders_of_bart_have_their_own_heads():
    """Keys of a prefix have the head count of the stack that they are for."""
    with Base(tf.BartModel(tf.BartConfig(**BART))) as base:
        heads = {name: site.heads for name, site in base.anatomy.sites.items() if site.kind == "kv"}
        assert {heads[f"encoder/{i}/attention/kv"] for i in range(2)} == {4}
        assert {heads[f"decoder/{i}/{sub}/kv"] for i in range(2) for sub in ("attention", "cross")} == {2}


def test_settings_that_bypass_modules_are_refused():
    """Configurations whose projections no hook reaches, or that no forward can run, raise with the reason."""
    bloom = tf.BloomConfig(**SPECIAL, hidden_size=32, n_layer=1, n_head=4, pretraining_tp=2, slow_but_exact=True)
    with pytest.raises(UnsupportedError, match="slow_but_exact"):
        Base(tf.BloomModel(bloom))
    falcon = tf.FalconConfig(**FALCON, new_decoder_architecture=True, parallel_attn=False)
    with pytest.raises(UnsupportedError, match="parallel_attn"):
        Base(tf.FalconModel(falcon))


def test_checkpointing_silences_rates_of_layer_and_config(tokenizer):
    """Dropout that a layer's own forward applies stays off while it is checkpointed, and is given back."""
    torch.manual_seed(0)
    falcon = tf.FalconModel(tf.FalconConfig(**FALCON, hidden_dropout=0.5, attention_dropout=0.5, parallel_attn=False))
    bart = tf.BartModel(tf.BartConfig(**BART, dropout=0.5, activation_dropout=0.5))
    for model in (falcon, bart):
        with Base(model, tokenizer) as base:
            checks.attach(base, {"a": every()["bottleneck-0"]})
            row = checks.draw([None]).tokens[0]
            before, plain = checks.snapshot(model), checks.call_alone(base, row, "a")
            base.gradient_checkpointing(True)
            assert torch.equal(checks.call_alone(base, row, "a"), plain)
            base.gradient_checkpointing(False)
            assert checks.differences(before, checks.snapshot(model)) == []
