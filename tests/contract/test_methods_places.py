"""Methods that depend on places: positions (LoReFT), words (trained tokens), several deltas at a site (unions)."""

from __future__ import annotations

import checks
import pytest
import torch
from families import FAMILIES, WRITERS, make
from methods import every

import onebase as ob
from onebase.base import Base
from onebase.core.anchor import output_cache
from onebase.core.plan import At
from onebase.errors import ConfigError, RouteError, UnknownNameError, UnsupportedError
from onebase.methods import parse_method
from onebase.methods.loreft import orthonormal
from onebase.methods.registry import split_methods
from onebase.store import Store

NEW = "<clause>"
TWO_STACKS = ("t5", "t5-gated", "mt5", "bart")


# -- LoReFT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f.values[0] not in (*TWO_STACKS, "albert")]
)  # one layer twice
@pytest.mark.parametrize("prompt", ["", "prompt(length=2) + "])
def test_exactly_the_first_and_last_text_positions_change(family, side, prompt, tokenizer):
    """Of the last layer's output, n first and m last real positions of each row, and by the paper's formula."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        adapter = base.add("a", f"{prompt}loreft(rank=2, first=2, last=1, layers=(-1,))")
        block = next(site for site in adapter.routed.deltas if site.endswith("block"))
        delta = adapter.routed.deltas[block]
        site, seen = base.anatomy.sites[block], []
        keep = site.module.register_forward_hook(
            lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        rows = checks.draw(["a", "a", None, "a"])
        ids, mask = rows.padded(side)
        with base.use(rows.names):
            base.model(**checks.inputs(base, ids, mask))  # untrained: the layer's own output
            checks.disturb(delta, 3)
            base.model(**checks.inputs(base, ids, mask))
        keep.remove()
        h, found = seen
        rotation = delta.rotation()
        assert checks.gap(rotation @ rotation.T, torch.eye(2)) <= 1e-5
        full = h + (h @ delta.W.T + delta.b - h @ rotation.T) @ rotation
        virtual = 2 if prompt else 0
        for i, (row, name) in enumerate(zip(rows.tokens, rows.names)):
            changed = (found[i] != h[i]).any(-1).nonzero().flatten().tolist()
            if name is None:
                assert changed == []
                continue
            dead = 0 if side == "right" else h.shape[1] - virtual - len(row)
            places = sorted({0, 1, len(row) - 1})
            assert changed == [dead + virtual + place for place in places]
            assert checks.gap(found[i, changed], full[i, changed]) <= 1e-5


def test_the_basis_gives_one_smooth_rotation():
    """Rows are orthonormal, span the columns' space, and do not jump when a column's first value changes sign."""
    basis = torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    found = orthonormal(basis)
    assert checks.gap(found @ found.T, torch.eye(3)) <= 1e-6
    assert checks.gap(found.T @ (found @ basis), basis) <= 1e-5
    near = []
    for value in (-1e-5, 1e-5):
        moved = basis.clone()
        moved[0, 0] = value
        near.append(orthonormal(moved))
    assert checks.gap(*near) <= 1e-3
    assert checks.gap(orthonormal(found.T), found) <= 1e-6


@pytest.mark.parametrize("family", [f for f in WRITERS if f.values[0] not in TWO_STACKS])
def test_last_positions_are_the_prompts(family, tokenizer):
    """Step by step over a cache, by one stated forward, and by generate without a cache: the same."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        base.add("a", "loreft(rank=2, first=1, last=2)")
        checks.disturb(base.adapters["a"].module, 1)
        prompt, rest = torch.tensor([[5, 9, 7, 30]]), torch.tensor([[11, 12, 13]])
        both = torch.cat([prompt, rest], 1)
        with base.use("a"):
            out = base.model(input_ids=prompt, use_cache=True)
            steps = [out.logits[:, -1]]
            for i in range(3):
                out = base.model(
                    input_ids=rest[:, i : i + 1], **checks.with_cache(base.model, output_cache(out)), use_cache=True
                )
                steps.append(out.logits[:, -1])
        with base.use("a", prompts=[4]):
            full = base.model(input_ids=both, use_cache=False).logits[:, 3:]
        assert checks.gap(torch.stack(steps, 1), full) <= checks.LOGITS * checks.size(full)
        with base.use("a"):  # nothing stated: the whole row is the prompt
            other = base.model(input_ids=both, use_cache=False).logits[:, 3:]
        assert checks.gap(other, full) > checks.VISIBLE
        call = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "do_sample": False}
        one, two = (base.bind("a").generate(**call, use_cache=cache) for cache in (True, False))
        assert torch.equal(one, two)


def test_an_unknown_end_of_the_prompt_raises(tokenizer):
    """Several tokens after a filled cache: nothing says whether they are written or read."""
    with Base(make("llama"), tokenizer) as base, torch.no_grad():
        base.add("a", "loreft(rank=1)")
        base.add("f", "loreft(rank=1, first=2, last=0)")
        for name in "af":
            with base.use(name):
                cache = output_cache(base.model(input_ids=torch.tensor([[5, 6]]), use_cache=True))
                step = {"input_ids": torch.tensor([[7, 8]]), **checks.with_cache(base.model, cache)}
                if name == "f":
                    base.model(**step)
                    continue
                with pytest.raises(RouteError, match="prompts="):
                    base.model(**step)
        with base.use("a", prompts=[1, 2]), pytest.raises(RouteError, match="1 rows but prompts states 2"):
            base.model(input_ids=torch.tensor([[5, 6]]))
        prepared = torch.zeros(1, 1, 2, 2)
        with base.use("a"), pytest.raises(UnsupportedError, match="2-dimensional"):
            base.model(input_ids=torch.tensor([[5, 6]]), attention_mask=prepared, use_cache=False)
        packed = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
        with base.use("a"), pytest.raises(RouteError, match="packed"):
            base.model(**packed, use_cache=False)


def test_completions_are_trained_with_their_prompts_stated(tokenizer):
    """The loss of a completion is that of a forward whose prompt is stated."""
    from onebase.encode import IGNORED, Encoded
    from onebase.examples import forward
    from onebase.tasks import Examples

    with Base(make("gpt2"), tokenizer) as base, torch.no_grad():
        adapter = base.add("a", "loreft(rank=2, first=0, last=2)")
        adapter.task = {**adapter.task, "kind": "completion"}
        checks.disturb(adapter.module, 1)
        rows = (
            Encoded((5, 6, 7, 8, 9), labels=(IGNORED, IGNORED, IGNORED, 8, 9)),
            Encoded((10, 11, 12), labels=(IGNORED, 11, 12)),
        )
        found = forward(base, "a", Examples(rows), [0, 1])
        for row, loss, length in zip(rows, found.sums, (3, 1)):
            with base.use("a", prompts=[length]):
                logits = base.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0, length - 1 : -1]
            wanted = torch.tensor(row.ids[length:])
            assert checks.gap(loss, torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")) <= 1e-4
        assert found.counts.tolist() == [2, 2]


# -- trained tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_word_is_its_embedding(family, tokenizer):
    """Rows with an adapter's own words, beside rows of others, answer as the base does for the embeddings."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        checks.attach(base, {"a": parse_method(f"tokens(words=('{NEW}', 'river'))"), "lora": every()["lora-1"]})
        base.add("b", "tokens(words=('other',))")
        known, size = len(base.anatomy.stacks[0].embed.weight), len(tokenizer)
        own = base.tokenizer_of("a")
        assert own.convert_tokens_to_ids(NEW) == known > size == len(tokenizer)
        assert base.tokenizer_of("b").convert_tokens_to_ids("other") == known  # its own word, the same id
        assert base.tokenizer_of("lora") is tokenizer and base.tokenizer_of(None) is tokenizer
        ids = torch.tensor(own(f"the river runs {NEW} down", add_special_tokens=False)["input_ids"])
        assert known in ids.tolist()
        delta = base.adapters["a"].routed.deltas[f"{base.anatomy.stacks[0].name}/tokens"]
        table = dict(zip(delta.ids().tolist(), delta.rows()))
        embed = base.anatomy.stacks[0].embed
        rows = torch.stack([table[i] if i in table else embed(torch.tensor(i)) for i in ids.tolist()])
        call = checks.inputs(base, ids[None], first=torch.tensor([[5, 6, 7]]))
        with base.use("a"):
            found = checks.values(base.model(**call))[0]
        with base.use(None):
            expected = checks.values(base.model(**{**call, "input_ids": None, "inputs_embeds": rows[None]}))[0]
        assert checks.gap(found, expected) <= checks.LOGITS * checks.size(expected)
        assert torch.isfinite(found).all()
        plain = torch.tensor([5, 6, 7, 8, 9][: len(ids)])
        batch = checks.Rows((ids, plain, ids, plain), ("a", "lora", "b", None))
        for row, name, out in zip(batch.tokens, batch.names, checks.call_rows(base, batch, "left")):
            assert checks.gap(out, checks.call_alone(base, row, name)) <= checks.LOGITS * checks.size(out)
        for name in ("lora", None):  # such a route has no word for the id
            with base.use(["a", name]), pytest.raises(RouteError, match=f"row 1 has token id {known}"):
                base.model(**checks.inputs(base, torch.stack([ids, ids])))


@pytest.mark.parametrize("family", WRITERS)
def test_new_words_in_generation(family, tokenizer):
    """Prompts with an adapter's own words in a mixed batch: as alone, cache or not, in the base's vocabulary."""
    with Base(make(family), tokenizer) as base:
        checks.attach(
            base,
            {"a": parse_method(f"tokens(words=('{NEW}', 'river')) + lora(sites='paper')"), "b": every()["prompt-0"]},
        )
        prompts, names = [f"the river {NEW} runs", f"the {NEW} river", "a small bird"], ["a", "b", None]
        mixed = base.generate(prompts, names, max_new_tokens=5, return_ids=True)
        for prompt, name, found in zip(prompts, names, mixed):
            assert base.generate(prompt, name, max_new_tokens=5, return_ids=True) == [found]
        assert base.generate(prompts, names, max_new_tokens=5, return_ids=True, use_cache=False) == mixed
        assert max(max(ids, default=0) for ids in mixed) < base.tokenizer_of("a").convert_tokens_to_ids(NEW)
        beams = base.generate(prompts, names, max_new_tokens=4, num_beams=2, return_ids=True)
        assert beams[0] == base.generate(prompts[0], "a", max_new_tokens=4, num_beams=2, return_ids=True)[0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_lm_head_stays_the_bases(family, tokenizer):
    """Tied (GPT-2) or not (Llama): trained rows change no logit of another token's text, nor the head's width."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        tied = base.model.lm_head.weight is base.anatomy.stacks[0].embed.weight
        assert tied == (family == "gpt2")
        checks.attach(base, {"a": parse_method("tokens(words=('river',))")})
        row = torch.tensor(tokenizer("the cold bird", add_special_tokens=False)["input_ids"])
        assert torch.equal(checks.call_alone(base, row, "a"), checks.call_alone(base, row, None))


def test_words_are_stored_by_name_and_ids_follow(tokenizer, tmp_path):
    """Only embeddings are stored; a loaded adapter cuts texts as the trained one did."""
    with Base(make("bert"), tokenizer) as base:
        checks.attach(base, {"a": parse_method(f"tokens(words=('river', '{NEW}'))")})
        assert [tuple(t.shape) for t in base.adapters["a"].tensors().values()] == [(2, 32)]
        ref = base.save("a", store=Store(tmp_path)).ref
        before = base.predict(f"the river {NEW}", "a")[0].embedding
        base.remove("a")
        base.load(ref, store=Store(tmp_path))
        assert torch.equal(base.predict(f"the river {NEW}", "a")[0].embedding, before)
        assert not torch.equal(base.predict(f"the river {NEW}", None)[0].embedding, before)


def test_mistakes_with_words(tokenizer):
    """No tokenizer, no ids, the same token twice."""
    with Base(make("bert"), tokenizer) as base:
        base.add("a", "tokens(words=('river',))")
        with base.use("a"), pytest.raises(RouteError, match="inputs_embeds"):
            base.model(inputs_embeds=torch.zeros(1, 3, 32))
        with pytest.raises(ConfigError, match="no word twice"):
            base.add("b", "tokens(words=('river',)) + tokens(words=('cold', 'river'))")
    with Base(make("bert")) as base, pytest.raises(ConfigError, match="tokenizer"):
        base.add("a", "tokens(words=('river',))")


# -- unions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_of_one_site_apply_in_written_order(family, tokenizer):
    """At a site of three parts: what the parts do one after the other, and not in another order."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        adapter = base.add("u", "lora(rank=2, sites='paper') + ia3(sites=('v',)) + bitfit(sites='v', create=True)")
        checks.disturb(adapter.module, 1, 0.5)
        site = next(s for s in adapter.routed.deltas if s.endswith("/v"))
        place = base.anatomy.sites[site]
        x = torch.randn(2, 3, place.d_in, generator=torch.Generator().manual_seed(1))
        h = torch.randn(2, 3, place.d_out, generator=torch.Generator().manual_seed(2))
        lora, scale, shift = (dict(part.items())[site] for part in adapter.module.members())
        expected = (h + lora.scale * x @ lora.A.T @ lora.B.T) * (1 + scale.scale) + shift.bias
        assert checks.gap(adapter.routed.deltas[site](x, h, At()), expected) <= 1e-5 * checks.size(expected)
        assert checks.gap(lora(x, shift(x, scale(x, h, At()), At()), At()), expected) > checks.VISIBLE


def test_prefixes_and_prompts_stand_side_by_side(tokenizer):
    """Two of a kind are one of both lengths, in written order."""
    with Base(make("llama"), tokenizer) as base, torch.no_grad():
        for kind in ("prefix(length={}, init='random')", "prompt(length={}, init='uniform')"):
            two = base.add("two", " + ".join(kind.format(n) for n in (2, 3)))
            checks.disturb(two.module, 1)
            one = base.add("one", kind.format(5))
            parts = [part.tensors() for part in two.module.members()]
            one.put({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
            row = checks.draw([None]).tokens[0]
            assert torch.equal(checks.call_alone(base, row, "two"), checks.call_alone(base, row, "one"))
            base.remove("one")
            base.remove("two")


@pytest.mark.parametrize("label", every())
def test_shorthand_and_settings_read_back(label):
    """Every method is read back from its shorthand and from what is stored, alone and in a union."""
    method = every()[label]
    assert parse_method(method.shorthand()) == method
    assert parse_method({"name": method.name, "settings": method.settings()}) == method
    union = method + parse_method("lora(rank=2)")
    assert parse_method(union.shorthand()) == union
    assert parse_method({"name": union.name, "settings": union.settings()}) == union


def test_forms_are_written_as_papers_call_them():
    """houlsby, pfeiffer and parallel are bottlenecks; commas separate methods, but not within brackets."""
    for form in ("houlsby", "pfeiffer", "parallel"):
        assert parse_method(form) == ob.Bottleneck(preset=form)
        assert parse_method(f"{form}(size=8)") == ob.Bottleneck(preset=form, size=8)
    assert parse_method("prefix(length=30) + parallel") == ob.Prefix(length=30) + ob.Bottleneck(preset="parallel")
    with pytest.raises(ConfigError, match="leave preset out"):
        parse_method("houlsby(preset='pfeiffer')")
    found = split_methods(["lora(rank=4, alpha=8), prefix,full", "ia3"])
    assert found == ["lora(rank=4, alpha=8)", "prefix", "full", "ia3"]
    found = split_methods(["tokens(words=('a', 'b,c')), prefix + ia3"])
    assert found == ["tokens(words=('a', 'b,c'))", "prefix + ia3"]
    for wrong in ("lora(", "", "lora)(", "a b"):
        assert split_methods([wrong]) == [wrong]  # `parse_method` refuses it
    for name in ("full", "head"):
        with pytest.raises(UnknownNameError, match="onebase compare"):
            parse_method(name)


def test_unions_in_python():
    """Methods add up; unions of unions are flat; the start is the base where every part's is."""
    union = ob.Prefix(length=30) + ob.Bottleneck(preset="parallel")
    assert union == parse_method("prefix(length=30) + bottleneck(preset='parallel')")
    assert (union + ob.LoRA()).shorthand() == f"{union.shorthand()} + lora"
    assert (ob.LoRA() + union).members() == (ob.LoRA(), *union.members())
    assert union.epsilon is None and (ob.LoRA() + parse_method("ia3")).epsilon == 0.0
    assert (ob.LoRA() + parse_method("ia3")).mergeable and not (ob.LoRA() + ob.Prompt()).mergeable
    with pytest.raises(TypeError):
        _ = ob.LoRA() + "ia3"


def test_parts_choose_their_own_sites(tokenizer):
    """A part counts layers of the base, not of what the other parts chose."""
    with Base(make("bert"), tokenizer) as base:
        alone = base.add("a", "bottleneck(preset='pfeiffer', leave_out=(-1,))")
        both = base.add("b", "bottleneck(preset='pfeiffer', leave_out=(-1,)) + lora(sites='paper')")
        first, second = both.module.members()
        assert dict(first.items()).keys() == dict(alone.module.items()).keys()
        assert {name.rsplit("/", 1)[1] for name, _ in second.items()} == {"q", "v"}
