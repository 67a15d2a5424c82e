"""The same methods on images: a ViT under mixed batches, against the plain computation, and as a classifier."""

from __future__ import annotations

import checks
import pytest
import test_reference as reference
import torch
import transformers as tf
from families import ATTENTION
from methods import every

from onebase.base import Base
from onebase.errors import ConfigError, RouteError

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIG = {**SIZE, "image_size": 8, "patch_size": 4, "num_channels": 3, "num_labels": 3}
TOKENS = 5  # CLS and four patches
TASK = {"kind": "classification", "labels": ["cat", "dog"], "pooling": "first", "max_length": 5, "template": ""}


def make(attention: str = "sdpa", head: bool = False):
    """Build a tiny ViT with every parameter away from its start."""
    torch.manual_seed(0)
    config = tf.ViTConfig(**CONFIG)
    model = tf.ViTForImageClassification(config) if head else tf.ViTModel(config)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def worded() -> dict:
    """Return the methods under test that start from no words."""
    return {name: method for name, method in every().items() if not getattr(method, "text", "")}


def draw(count: int) -> torch.Tensor:
    """Draw images (count, 3, 8, 8)."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def call(base: Base, images: torch.Tensor, names, **more):
    """Run the model under a route."""
    with base.use(names):
        return base.model(pixel_values=images, **more)


@pytest.mark.parametrize("attention", ATTENTION)
def test_mixed_images_equal_images_alone(attention):
    """Outputs, pooled outputs and gradients of one batch with every method equal each image by itself."""
    with Base(make(attention)) as base:
        names = checks.attach(base, worded())
        assert {name.split("-")[0] for name in names} >= {"lora", "bottleneck", "prefix", "prompt"}
        rows = [name for name in (*names, None) for _ in range(2)]
        images = draw(len(rows))
        alone = [call(base, image[None], name) for image, name in zip(images, rows)]
        for i in range(len(names)):
            assert checks.gap(alone[2 * i].last_hidden_state, call(base, images[[2 * i]], None)[0]) > checks.VISIBLE
        single = sum((a[0][0] * checks.weights_like(a[0][0], i)).sum() for i, a in enumerate(alone))
        expected = checks.gradients(base, single, names)
        for places in checks.orders(len(rows)).values():
            mixed = call(base, images[places], [rows[i] for i in places])
            assert mixed.last_hidden_state.shape == (len(rows), TOKENS, 32)
            for place, states, pooled in zip(places, mixed.last_hidden_state, mixed.pooler_output):
                assert checks.gap(states, alone[place].last_hidden_state[0]) <= checks.LOGITS, rows[place]
                assert checks.gap(pooled, alone[place].pooler_output[0]) <= checks.LOGITS, rows[place]
            loss = sum((s * checks.weights_like(s, i)).sum() for i, s in zip(places, mixed.last_hidden_state))
            for name, found in checks.gradients(base, loss, names).items():
                checks.close_gradients(found, expected[name], checks.GRADIENTS, name)


def test_sites_are_where_they_say():
    """Linears, norms, exits and values are what the sites describe."""
    with Base(make()) as base, torch.no_grad():
        inputs = {"pixel_values": draw(1)}
        seen = reference.traffic(base, inputs)
        with base._installed.recording() as recorded:
            base.model(**inputs)
        for site in base.anatomy.sites.values():
            if site.kind == "linear":
                reference.check_linear(site, seen)
            elif site.kind == "norm":
                reference.check_norm(site, seen)
            elif site.kind == "exit":
                reference.check_exits(base, [site], seen)
            elif site.kind == "kv":
                reference.check_kv(base, site, seen, recorded)


def by_hand(model, tokens: torch.Tensor, prefixes: dict | None = None) -> torch.Tensor:
    """Compute a ViT from embedded tokens (B, T, D), with keys and values (P, heads, dim) before each layer's own."""
    for number, layer in enumerate(model.layers):
        attention = layer.attention
        x = layer.layernorm_before(tokens)
        q, k, v = (
            getattr(attention, f"{part}_proj")(x).unflatten(-1, (4, 8)).transpose(1, 2) for part in "qkv"
        )  # (B, heads, T, 8)
        if prefixes:
            keys, values = prefixes[number]
            k = torch.cat([keys.transpose(0, 1).expand(len(x), -1, -1, -1), k], 2)
            v = torch.cat([values.transpose(0, 1).expand(len(x), -1, -1, -1), v], 2)
        weights = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, -1)
        tokens = tokens + attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
        tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
    return model.layernorm(tokens)


@pytest.mark.parametrize("attention", ATTENTION)
def test_prompts_and_prefixes_are_what_the_papers_say(attention):
    """Virtual tokens behind CLS, and keys and values before a layer's own, against a plain computation."""
    with Base(make(attention)) as base, torch.no_grad():
        checks.attach(base, {"prompt": every()["prompt-0"], "prefix": every()["prefix-0"]})
        images = draw(2)
        plain = base.model.embeddings(images)
        virtual = next(iter(base.adapters["prompt"].module.items()))[1].tokens()
        longer = torch.cat([plain[:, :1], virtual.expand(2, -1, -1), plain[:, 1:]], 1)
        expected = by_hand(base.model, longer)
        expected = torch.cat([expected[:, :1], expected[:, 1 + len(virtual) :]], 1)
        assert checks.gap(call(base, images, "prompt")[0], expected) <= reference.NEAR
        prefixes = {number: delta.kv() for number, (_, delta) in enumerate(base.adapters["prefix"].module.items())}
        assert checks.gap(call(base, images, "prefix")[0], by_hand(base.model, plain, prefixes)) <= reference.NEAR
        assert checks.gap(call(base, images, None)[0], by_hand(base.model, plain)) <= reference.NEAR


def test_every_layer_gives_the_callers_tokens():
    """Hidden states and attention weights have the T tokens of the images, whatever is routed."""
    with Base(make("eager")) as base, torch.no_grad():
        names = [*checks.attach(base, worded()), None]
        out = call(base, draw(len(names)), names, output_hidden_states=True, output_attentions=True)
        assert {s.shape for s in out.hidden_states} == {(len(names), TOKENS, 32)}
        assert {a.shape for a in out.attentions} == {(len(names), 4, TOKENS, TOKENS)}


def test_a_classifier_of_images_end_to_end():
    """Two adapters learn different labels on a model with a head of its own, which still answers as before."""
    model = make(head=True)
    before = checks.snapshot(model)
    images = draw(8)
    plain = model(pixel_values=images).logits.detach()
    with Base(model) as base:
        for name, method in {"a": "lora(rank=4)", "b": "prompt(length=3)", "c": "prefix(length=3)"}.items():
            adapter = base.add(name, method, task=TASK)
            labels = torch.randint(2, (8,), generator=torch.Generator().manual_seed(len(base.adapters)))
            optimizer = torch.optim.Adam(list(adapter.parameters()), lr=0.02)
            losses = []
            for _ in range(30):
                logits = torch.stack(base.outputs({"pixel_values": images}, [name] * 8))
                loss = torch.nn.functional.cross_entropy(logits, labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            assert losses[-1] < 0.5 * losses[0], name
        names = ["a", None, "b", "c", None, "b", "a", "c"]
        mixed = base.outputs({"pixel_values": images}, names)
        for i, name in enumerate(names):
            assert checks.gap(mixed[i], base.outputs({"pixel_values": images[i : i + 1]}, [name])[0]) <= checks.LOGITS
        assert checks.gap(call(base, images, None).logits, plain) == 0.0
        out = base.model(pixel_values=images, adapter_ids=base.ids(names)).logits
        assert checks.gap(out[1], plain[1]) <= checks.LOGITS and checks.gap(out[0], plain[0]) > checks.VISIBLE
        vectors = base.vectors({"pixel_values": images}, "a", "mean")
        assert checks.gap(vectors, base.states({"pixel_values": images}, "a").mean(1)) <= checks.LOGITS
    model.zero_grad()
    assert checks.differences(before, checks.snapshot(model)) == []


def test_what_images_cannot_do_says_why():
    """Words to start from, wrong numbers of rows and calls without images raise."""
    with Base(make()) as base:
        for method in ("prompt(init='text', text='a cat')", "prefix(text='a cat')"):
            with pytest.raises(ConfigError, match="reads images"):
                base.add("a", method)
        base.add("a", "prompt(length=2)", task=TASK)  # labels are words too: it starts from patches
        with base.use(["a", None]), pytest.raises(RouteError, match="3 rows but the route names 2"):
            base.model(pixel_values=draw(3))
        with base.use("a"), pytest.raises(RouteError, match="pixel_values"):
            base.model(attention_mask=torch.ones(1, TOKENS))
