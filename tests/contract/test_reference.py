"""What adapters compute, against the base itself: merged weights, real tokens as prompts, a cache as prefix."""

from __future__ import annotations

import checks
import pytest
import torch
from families import ATTENTION, CASES, FAMILIES, NAMES, listed, make, pairs
from methods import every
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from onebase.base import Base
from onebase.core.site import standardize
from onebase.core.tap import first_tensor
from onebase.errors import UnsupportedError
from onebase.methods.prompt import Prompt

NEAR = 2e-5  # sums in another order than the base's, over two layers


def traffic(base: Base, call: dict) -> dict[str, tuple]:
    """Run the plain base on a call's inputs; return path -> (args, kwargs, output) of every module of its stacks."""
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
        base.model(**call)
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


def check_linear(site, seen: dict[str, tuple]) -> None:
    """What leaves the projection at the site's features is what its weight and bias give."""
    args, kwargs, out = seen[site.path]
    assert site.weight().shape == (site.d_out, site.d_in)
    found = torch.nn.functional.linear(first_tensor(args, kwargs, 0), site.weight(), site.bias())
    assert checks.gap(found, site.take(out)) <= NEAR, site.name


def check_norm(site, seen: dict[str, tuple]) -> None:
    """The norm is a gain on n(x), plus a bias where there is one."""
    args, kwargs, out = seen[site.path]
    n = standardize(first_tensor(args, kwargs, 0), site.norm).reshape(-1, site.d_in)
    bias = site.module.bias if site.norm.has_bias else 0.0
    gain = ((out.reshape(n.shape) - bias) * n).sum(0) / (n * n).sum(0)  # the one that fits best
    assert checks.gap(gain * n + bias, out.reshape(n.shape)) <= NEAR, site.name


def check_exits(base: Base, sites: list, seen: dict[str, tuple]) -> None:
    """The residual plus all that is added to it is a tensor of the layer; parallel branches share one residual."""
    site = sites[0]
    args, kwargs, caught = seen[site.residual.path]
    if site.residual.index is not None:
        caught = first_tensor(args, kwargs, site.residual.index)
    total = caught.flatten() + sum(seen[s.path][2].flatten() for s in sites)
    layer = base.anatomy.stack(site.stack).layers[site.layer]
    root = next(path for path, module in base.model.named_modules() if module is layer)
    like = [t.flatten() for t in tensors(seen, root) if t.numel() == total.numel()]
    assert min(checks.gap(total, t) for t in like) <= NEAR, f"{site.name}: no residual sum"


def check_kv(base: Base, site, seen: dict[str, tuple], recorded: dict[str, tuple]) -> None:
    """The attention function gets the values of the part v, by head; no family rotates or norms its values."""
    values = recorded[site.name][1][0]  # (Hkv, T, hd)
    v = base.anatomy.sites[f"{site.stack}/{site.layer}/{site.sublayer}/v"]
    out = v.take(seen[v.path][2])
    assert values.shape[0] == site.heads and values.shape[2] == site.head_dim
    assert checks.gap(out.reshape(-1, site.heads, site.head_dim).transpose(0, 1), values) <= NEAR, site.name


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_where_they_say(family):
    """Residual plus exit is a tensor of the layer; linears, norms and values are what the site describes."""
    with Base(make(family)) as base, torch.no_grad():
        row = checks.draw([None]).tokens[0]
        seen = traffic(base, checks.inputs(base, row[None]))
        recorded: dict[str, tuple] = {}
        if "kv" not in CASES[family].refuses:
            with base._installed.recording() as recorded:
                base.model(**checks.inputs(base, row[None]))
        exits: dict[tuple, list] = {}
        for site in base.anatomy.sites.values():
            if site.unsupported:
                continue
            if site.kind == "linear":
                check_linear(site, seen)
            elif site.kind == "norm":
                check_norm(site, seen)
            elif site.kind == "exit":
                exits.setdefault((site.stack, site.layer, str(site.residual)), []).append(site)
            elif site.kind == "kv":
                check_kv(base, site, seen, recorded)
        for sites in exits.values():
            check_exits(base, sites, seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_refuses_raises_with_the_reason(family, tokenizer):
    """Exactly the stated parts are refused, and every method that needs one says why when it is added."""
    refuses = CASES[family].refuses
    with Base(make(family), tokenizer) as base:
        assert {site.part for site in base.anatomy.sites.values() if site.unsupported} == set(refuses)
        hooks = checks.hook_count(base.model)
        for name, method in every().items():
            part = checks.refused_at(base, method)
            if part is None:
                base.add(name, method)
                base.remove(name)
            else:
                with pytest.raises(UnsupportedError, match=refuses.get(part, "this base has no")):
                    base.add(name, method)
        assert not base.adapters and checks.hook_count(base.model) == hooks


@pytest.mark.parametrize("name", ["lora-0", "lora-1", "lora-2", "lora-3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_a_change_of_weights(family, name, tokenizer):
    """The adapter answers as a copy of the base with s B A added to its weights."""
    row = checks.draw([None, None]).tokens[1]
    with Base(make(family), tokenizer) as base, Base(make(family), tokenizer) as merged, torch.no_grad():
        if not checks.attach(base, {name: every()[name]}):
            return  # a part that this family refuses
        for site_name, delta in base.adapters[name].module.items():
            site = merged.anatomy.sites[site_name]
            weight = site.module.weight.detach()
            columns = weight if isinstance(site.module, Conv1D) else weight.t()  # (d_in, features of the module)
            site.put(columns, (site.weight() + delta.scale * delta.B @ delta.A).t())
        found, expected = checks.call_alone(base, row, name), checks.call_alone(merged, row, None)
        assert checks.gap(found, expected) <= NEAR * max(1.0, float(expected.abs().max()))
        assert checks.gap(found, checks.call_alone(base, row, None)) > checks.VISIBLE


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize(("family", "attention"), pairs(NAMES))
def test_a_prompt_of_real_tokens_is_those_tokens(family, attention, behind, tokenizer):
    """Virtual tokens that are embeddings of words answer as the base does with these words in the text."""
    words = torch.tensor([7, 12, 9])
    with Base(make(family, attention), tokenizer) as base, torch.no_grad():
        adapter = base.add("a", Prompt(length=3, init="uniform", behind=behind))
        stack = base.anatomy.stacks[0]
        next(adapter.module.parameters()).copy_(stack.embed(words))
        rows = checks.draw(["a"] * 3)
        for side in ("right", "left"):
            for row, out in zip(rows.tokens, checks.call_rows(base, rows, side)):
                both = torch.cat([row[:behind], words, row[behind:]])
                longer = checks.inputs(base, both[None], first=row[None, : checks.DECODED])
                with base.use(None):
                    expected = checks.values(base.model(**longer))[0]
                if not base.is_encoder_decoder:
                    expected = torch.cat([expected[:behind], expected[behind + len(words) :]])
                assert checks.gap(out, expected) <= NEAR


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize(("family", "attention"), pairs(NAMES))
def test_a_prompt_behind_the_embeddings_moves_no_text(family, attention, behind, tokenizer):
    """Virtual tokens among what the embeddings made of a text, whose tokens are embedded where they are without."""
    with Base(make(family, attention), tokenizer) as base, torch.no_grad():
        method = Prompt(length=3, init="uniform", place="embedded", behind=behind)
        stack = base.anatomy.stacks[0]
        if stack.embedded is None:
            with pytest.raises(UnsupportedError, match="place='input'"):
                base.add("a", method)
            return
        tokens = next(base.add("a", method).module.parameters())
        rows = checks.draw(["a"] * 3)
        for side in ("right", "left"):
            for row, out in zip(rows.tokens, checks.call_rows(base, rows, side)):
                with base.use(None):
                    text = states_of(base, stack.embedded, row)
                    longer = torch.cat([text[:behind], tokens, text[behind:]])
                    dummy = torch.full((len(longer),), int(row[0]))
                    replaced = stack.embedded.register_forward_hook(lambda *_, states=longer: states[None])
                    expected = checks.call_alone(base, dummy, None)
                    replaced.remove()
                assert checks.gap(out, torch.cat([expected[:behind], expected[behind + 3 :]])) <= NEAR


def states_of(base: Base, module: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    """Return what a module returns for a row, without its first dimension."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    checks.call_alone(base, row, None)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "opt-post", "llama", "qwen3", *listed(["qwen2", "phi3", "gpt-neox", "olmo2"])]
)
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
                **checks.with_cache(base.model, cache),
                position_ids=torch.arange(len(row))[None],
                attention_mask=torch.ones(1, length + len(row), dtype=torch.long),
            ).logits[0]
        assert checks.gap(checks.call_alone(base, row, "a"), expected) <= NEAR
