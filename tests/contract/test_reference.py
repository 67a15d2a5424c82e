"""What adapters compute, against the base itself: merged weights, real tokens as prompts, a cache as prefix."""

from __future__ import annotations

import checks
import pytest
import torch
from families import ATTENTION, FAMILIES, NAMES, make, pairs
from methods import every
from transformers import DynamicCache

from onebase.base import Base
from onebase.core.site import standardize
from onebase.core.tap import first_tensor

NEAR = 2e-5  # sums in another order than the base's, over two layers


def traffic(base: Base, row: torch.Tensor) -> dict[str, tuple]:
    """Run the plain base on one row; return path -> (args, kwargs, output) of every module of its stacks."""
    seen, handles = {}, []

    def listen(path):
        def hook(module, args, kwargs, output):
            output = output[0] if isinstance(output, tuple) else output
            # compared later, and the layer may go on to change it in place
            args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
            seen[path] = (args, kwargs, output.clone() if isinstance(output, torch.Tensor) else output)

        return hook

    for path, module in base.model.named_modules():
        handles.append(module.register_forward_hook(listen(path), with_kwargs=True))
    with torch.no_grad():
        base.model(**checks.inputs(base, row[None]))
    for handle in handles:
        handle.remove()
    return seen


def tensors(seen: dict[str, tuple], root: str) -> list[torch.Tensor]:
    """Return every tensor that went in or out of a module below `root`."""
    found = []
    for path, (args, kwargs, output) in seen.items():
        if path == root or path.startswith(root + "."):
            found += [t for t in (*args, *kwargs.values(), output) if isinstance(t, torch.Tensor)]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_where_they_say(family):
    """Residual plus exit is a tensor of the layer; linears, norms and values are what the site describes."""
    with Base(make(family)) as base, torch.no_grad():
        row = checks.draw([None]).tokens[0]
        seen = traffic(base, row)
        with base._installed.recording() as recorded:
            base.model(**checks.inputs(base, row[None]))
        for site in base.anatomy.sites.values():
            if site.kind in ("linear", "norm", "exit"):
                args, kwargs, out = seen[site.path]
                x = first_tensor(args, kwargs, 0)
            if site.kind == "linear":
                part = out if site.span is None else out[..., site.span[0] : site.span[1]]
                assert site.weight().shape == (site.d_out, site.d_in)
                assert checks.gap(torch.nn.functional.linear(x, site.weight(), site.bias()), part) <= NEAR, site
            elif site.kind == "norm":
                n = standardize(x, site.norm).reshape(-1, site.d_in)
                bias = site.module.bias if site.norm.has_bias else 0.0
                gain = ((out.reshape(n.shape) - bias) * n).sum(0) / (n * n).sum(0)  # the one that fits best
                assert checks.gap(gain * n + bias, out.reshape(n.shape)) <= NEAR, site
            elif site.kind == "exit":
                args, kwargs, caught = seen[site.residual.path]
                if site.residual.index is not None:
                    caught = first_tensor(args, kwargs, site.residual.index)
                total = (caught.reshape(out.shape) + out).flatten()
                layer = base.anatomy.stack(site.stack).layers[site.layer]
                root = next(path for path, module in base.model.named_modules() if module is layer)
                like = [t.flatten() for t in tensors(seen, root) if t.numel() == total.numel()]
                assert min(checks.gap(total, t) for t in like) <= NEAR, f"{site.name}: no residual sum"
            elif site.kind == "kv":
                values = recorded[site.name][1][0]  # (Hkv, T, hd); no family rotates or norms its values
                v = base.anatomy.sites[f"{site.stack}/{site.layer}/{site.sublayer}/v"]
                out = seen[v.path][2]
                out = out if v.span is None else out[..., v.span[0] : v.span[1]]
                assert values.shape[0] == site.heads and values.shape[2] == site.head_dim
                assert checks.gap(out.reshape(-1, site.heads, site.head_dim).transpose(0, 1), values) <= NEAR, site


@pytest.mark.parametrize("name", ["lora-0", "lora-1", "lora-2", "lora-3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_a_change_of_weights(family, name, tokenizer):
    """The adapter answers as a copy of the base with s B A added to its weights."""
    row = checks.draw([None, None]).tokens[1]
    with Base(make(family), tokenizer) as base, Base(make(family), tokenizer) as merged, torch.no_grad():
        checks.attach(base, {name: every()[name]})
        for site_name, delta in base.adapters[name].module.items():
            site = merged.anatomy.sites[site_name]
            site.weight().add_(delta.scale * delta.B @ delta.A)  # a view of the copy's own weight
        found, expected = checks.call_alone(base, row, name), checks.call_alone(merged, row, None)
        assert checks.gap(found, expected) <= NEAR * max(1.0, float(expected.abs().max()))
        assert checks.gap(found, checks.call_alone(base, row, None)) > checks.VISIBLE


@pytest.mark.parametrize(("family", "attention"), pairs(NAMES))
def test_a_prompt_of_real_tokens_is_those_tokens(family, attention, tokenizer):
    """Virtual tokens that are embeddings of words answer as the base does with these words before the text."""
    words = torch.tensor([7, 12, 9])
    with Base(make(family, attention), tokenizer) as base, torch.no_grad():
        adapter = base.add("a", "prompt(length=3, init='uniform')")
        stack = base.anatomy.stacks[0]
        next(adapter.module.parameters()).copy_(stack.embed(words))
        rows = checks.draw(["a"] * 3)
        for side in ("right", "left"):
            for row, out in zip(rows.tokens, checks.call_rows(base, rows, side)):
                longer = checks.inputs(base, torch.cat([words, row])[None], first=row[None, : checks.DECODED])
                with base.use(None):
                    expected = checks.values(base.model(**longer))[0]
                expected = expected if base.is_encoder_decoder else expected[len(words) :]
                assert checks.gap(out, expected) <= NEAR


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", ["gpt2", "opt", "opt-post", "llama", "qwen3"])
def test_a_prefix_is_a_filled_cache(family, attention, tokenizer):
    """Keys and values of a prefix answer as the base does when its cache holds them, positions unmoved."""
    with Base(make(family, attention), tokenizer) as base, torch.no_grad():
        checks.attach(base, {"a": every()["prefix-1"]})
        row = checks.draw([None, None]).tokens[1]
        cache = DynamicCache()
        for layer, (_, delta) in enumerate(base.adapters["a"].module.items()):
            keys, values = delta.kv()
            cache.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], layer)
        length = len(keys)
        with base.use(None):
            expected = base.model(
                input_ids=row[None],
                past_key_values=cache,
                position_ids=torch.arange(len(row))[None],
                attention_mask=torch.ones(1, length + len(row), dtype=torch.long),
            ).logits[0]
        assert checks.gap(checks.call_alone(base, row, "a"), expected) <= NEAR
