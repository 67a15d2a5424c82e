"""Composition: every kind equals its plain computation, alone and in a mixed batch, and is stored by digest."""

from __future__ import annotations

import json
import random

import checks
import pytest
import torch
from families import FIRST, VOCABULARY, make
from methods import WORDS

from onebase import Base, LoRA, Store
from onebase.compose import average, combine, fuse, parse, stack
from onebase.errors import ConfigError, OnebaseError, StoreError, UnknownNameError, UnsupportedError

EQUAL = 1e-5
PARTS = {
    "a": "lora(rank=2)",
    "b": "lora(rank=3, sites='paper', rslora=True)",
    "s": "bottleneck(preset='pfeiffer', size=3)",
    "t": "bottleneck(preset='pfeiffer', size=3)",
    "p": "prefix(length=2, init='random')",
    "d": "dora(rank=2)",
}
KINDS = {
    "stack": stack("a", "s", "p"),
    "nested": stack(combine("a", "b"), average("s", "t")),
    "linear": combine("a", "b", weights=[0.7, -0.3]),
    "svd": combine("a", "b", weights=[0.7, 0.3], rank=3),
    "ties": combine("a", "b", "d", how="ties", density=0.4),
    "dare": combine("a", "b", how="dare", density=0.6, seed=3),
    "dare_ties": combine("a", "b", how="dare_ties", rank=4),
    "prune": combine("a", "d", how="prune"),
    "outputs": average("s", "t", "a", weights=[0.2, 0.3, 0.5]),
    "values": average("s", "t", of="values"),
}


def fill(base: Base) -> Base:
    for number, (name, method) in enumerate(PARTS.items()):
        checks.disturb(base.add(name, method).module, number)
    return base


@pytest.fixture(scope="module", params=["bert", "gpt2", "t5"])
def base(request, tokenizer):
    with fill(Base(make(request.param), tokenizer)) as base:
        checks.disturb(base.add("f", fuse("s", "t"), seed=1).module, 9, size=0.3)
        yield base


def rows(count: int) -> torch.Tensor:
    return torch.randint(FIRST, VOCABULARY, (count, 7), generator=torch.Generator().manual_seed(4))


def call(base: Base, route, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), base.use(route):
        return checks.values(base.model(**checks.inputs(base, ids)))


def test_a_composition_in_a_mixed_batch_equals_it_alone(base):
    route = [*KINDS.values(), "f", "a", None, KINDS["stack"]]
    skipped = base.anatomy.model_type == "t5"
    route = [r for r in route if not (skipped and r is None)]
    ids = rows(len(route))
    mixed, plain = call(base, route, ids), call(base, None, ids)
    for i, one in enumerate(route):
        alone = call(base, one, ids[i : i + 1])[0]
        assert checks.gap(mixed[i], alone) <= EQUAL * checks.size(alone)
        if one is not None:
            assert checks.gap(alone, plain[i]) > checks.VISIBLE


def test_a_stack_equals_the_union_of_its_parts(base):
    base.add("u", "lora(rank=2) + bottleneck(preset='pfeiffer', size=3)")
    parts = [base.adapters[name].module for name in ("a", "s")]
    for own, part in zip(base.adapters["u"].module.parts, parts):
        own.put(part.tensors())
    ids = rows(2)
    assert torch.equal(call(base, "u", ids), call(base, stack("a", "s"), ids))
    base.remove("u")


def test_linear_combinations_equal_the_sum_written_into_the_weights(tokenizer):
    with fill(Base(make("bert"), tokenizer)) as base:
        ids = rows(2)
        together = call(base, combine("a", "b", "d", weights=[0.7, -0.3, 0.4]), ids)
        base.add("dense", "dense")
        with torch.no_grad():
            for name, weight in (("a", 0.7), ("b", -0.3), ("d", 0.4)):
                for site, delta in base.adapters[name].module.items():
                    own = base.anatomy.sites[site].weight()
                    change = delta.merged(own, base.anatomy.sites[site].bias())[0] - own
                    base.adapters["dense"].module.deltas[site].weight += weight * change
        assert checks.gap(together, call(base, "dense", ids)) <= EQUAL * checks.size(together)


@pytest.mark.filterwarnings("ignore")  # of peft's own code
@pytest.mark.parametrize("how, theirs", [("ties", "ties_svd"), ("prune", "magnitude_prune_svd"), ("linear", "svd")])
def test_combinations_equal_those_of_peft(tokenizer, how, theirs):
    peft = pytest.importorskip("peft")
    from onebase.methods.dense import DenseDelta

    model = make("bert")
    with Base(model, tokenizer) as base:
        for number, name in enumerate("ab"):
            checks.disturb(base.add(name, "lora(rank=2, sites='paper', alpha=2)").module, number)
        # a rank that holds every change exactly, so that both sides are the change itself
        full = combine("a", "b", weights=[0.6, 0.9], how=how, **({} if how == "linear" else {"density": 0.5}))
        changes = {}
        base.add("mix", full)
        for site, delta in base.adapters["mix"].module.items():
            changes[site] = delta.weight if isinstance(delta, DenseDelta) else delta.scale * delta.B @ delta.A
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["query", "value"])
        plain = make("bert")  # a copy of the base would carry its hooks
        plain.load_state_dict(base.model.state_dict())
        other = peft.get_peft_model(plain, config, adapter_name="one")
        other.add_adapter("two", config)
        paths = {site: base.anatomy.sites[site].path for site in changes}
        with torch.no_grad():
            for name, called in (("a", "one"), ("b", "two")):
                for site, delta in base.adapters[name].module.items():
                    layer = other.base_model.model.get_submodule(paths[site])
                    layer.lora_A[called].weight.copy_(delta.A)
                    layer.lora_B[called].weight.copy_(delta.B)
        rank = min(next(iter(changes.values())).shape)
        other.add_weighted_adapter(
            ["one", "two"], [0.6, 0.9], "mix", combination_type=theirs, svd_rank=rank,
            **({} if theirs == "svd" else {"density": 0.5}),
        )  # fmt: skip
        for site, change in changes.items():
            layer = other.base_model.model.get_submodule(paths[site])
            assert checks.gap(layer.get_delta_weight("mix"), change) <= EQUAL


def test_low_rank_is_the_nearest_and_says_its_error(tokenizer):
    with fill(Base(make("bert"), tokenizer)) as base:
        exact = base.add("exact", combine("a", "b"))
        assert base.add("same", combine("a", "b", rank=5)).module.facts["error"] < 1e-5
        worst = base.add("less", combine("a", "b", rank=1)).module.facts["error"]
        found = []
        for _site, delta in exact.module.items():
            s = torch.linalg.svdvals(delta.B @ delta.A)
            found.append(float(s[1:].square().sum() / s.square().sum()) ** 0.5)
        assert worst == pytest.approx(max(found), abs=1e-5) and worst > 0.01


def test_fusion_equals_the_papers_formula(tokenizer):
    from onebase.core.plan import At

    with fill(Base(make("bert"), tokenizer)) as base:
        fused = base.add("f", fuse("s", "t"))
        checks.disturb(fused.module, 5, size=0.5)
        site, delta = next(iter(fused.module.items()))
        x, h = torch.randn(2, 3, base.anatomy.hidden_size), torch.randn(2, 3, base.anatomy.hidden_size)
        got = delta(x, h, At())
        for b in range(2):
            for t in range(3):
                u = [base.adapters[n].routed.deltas[site](x[b, t], h[b, t], At()) - h[b, t] for n in "st"]
                scores = torch.stack([(delta.Q @ h[b, t] + delta.q) @ (delta.K @ one + delta.k) for one in u])
                p = scores.softmax(0)
                wanted = h[b, t] + sum(p[i] * (delta.V @ u[i]) for i in range(2))
                assert checks.gap(got[b, t], wanted) <= EQUAL * checks.size(wanted)
        assert all(name.rpartition(".")[2] in "QKVqk" for name in fused.tensors())  # parts are not its own
        assert fused.module.penalty().item() > 0


def test_calls_follow_parts_that_change_or_go(tokenizer):
    with fill(Base(make("bert"), tokenizer)) as base:
        ids, mix = rows(1), combine("a", "b", how="ties")
        first = call(base, mix, ids)
        checks.disturb(base.adapters["a"].module, 77)
        second = call(base, mix, ids)
        base.add("fresh", mix)
        assert checks.gap(first, second) > checks.VISIBLE and torch.equal(second, call(base, "fresh", ids))
        base.remove("a")
        assert mix.shorthand() not in base.adapters
        with pytest.raises(UnknownNameError):
            call(base, mix, ids)
        assert torch.equal(second, call(base, "fresh", ids))  # under its own name it keeps what it is made of


def test_what_cannot_be_composed_is_refused(base):
    for composition, words in (
        (combine("a", "s"), "no linear map"),
        (average("a", "p"), "stack takes both"),
        (fuse("s", "a"), "without trained norms"),
        (average("a", "b", of="values"), "one method"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            base.add("wrong", composition)
    with pytest.raises(UnknownNameError):
        call(base, stack("a", "missing"), rows(1))
    with pytest.raises(ConfigError, match="has to be trained"):
        call(base, fuse("s", "t"), rows(1))
    for wrong in (
        lambda: stack("a"),
        lambda: combine("a", "b", weights=[1]),
        lambda: combine("a", "b", weights=[1, float("nan")]),
        lambda: combine("a", "b", density=0),
        lambda: combine("a", 3),  # type: ignore[arg-type]
        lambda: combine("a", LoRA(rank=2)),
        lambda: parse("combine(a, b, wieghts=[1, 2])"),
        lambda: parse("a + b"),
        lambda: parse("stack(a, b, __import__('os'))"),
    ):
        with pytest.raises(OnebaseError):
            wrong()
    assert "wrong" not in base.adapters


def test_written_compositions_are_read_back():
    for composition in KINDS.values():
        assert parse(composition.shorthand()) == composition
    assert parse("stack(a@2, 'b-large@prod')").parts == ("a@2", "b-large@prod")


@pytest.mark.parametrize("kind", ["stack", "nested", "svd", "dare", "values"])
def test_stored_compositions_hold_digests_only_and_answer_alike(tokenizer, kind, tmp_path):
    store = Store(tmp_path / "s")
    with fill(Base(make("bert"), tokenizer)) as base:
        with pytest.raises(StoreError, match="not stored"):
            base.add("x", KINDS[kind])
            base.save("x", store=store)
        for name in PARTS:
            base.save(name, store=store)
        stored = base.save("x", store=store)
        assert stored.tensors() == {}
        said = json.dumps(stored.config.method.settings)
        assert all(base.adapters[n].digest in said for n in _names(KINDS[kind]))
        before = call(base, "x", rows(2))
        state = base.model.state_dict()
    with Base(make("bert"), tokenizer) as other:
        other.model.load_state_dict(state)
        other.load("x", store=store)
        assert list(other.adapters) == ["x"] and torch.equal(call(other, "x", rows(2)), before)
        store.remove(next(iter(_names(KINDS[kind]))), force=True)
    with Base(make("bert"), tokenizer) as third:
        third.model.load_state_dict(state)
        with pytest.raises(UnknownNameError, match="is made of"):
            third.load("x", store=store)


def _names(composition) -> list[str]:
    return [n for p in composition.parts for n in ([p] if isinstance(p, str) else _names(p))]


def test_a_part_that_changed_since_it_was_stored_is_refused(tokenizer, tmp_path):
    store = Store(tmp_path / "s")
    with fill(Base(make("bert"), tokenizer)) as base:
        for name in "as":
            base.save(name, store=store)
        base.add("x", stack("a", "s"))
        checks.disturb(base.adapters["s"].module, 8)
        with pytest.raises(StoreError, match="changed since"):
            base.save("x", store=store)


def _data(count: int) -> list[dict[str, str]]:
    rng = random.Random(0)
    rows = []
    for i in range(count):
        filler = " ".join(rng.choice(WORDS) for _ in range(5))
        rows.append({"text": f"{('cold', 'old')[i % 2]} {filler}", "label": ("a", "b")[i % 2]})
    return rows


@pytest.mark.parametrize("kind", ["stack", "fuse"])
def test_what_is_trained_on_top_leaves_the_parts_as_they_are(tokenizer, kind, tmp_path):
    import onebase as ob

    store = Store(tmp_path / "s")
    with fill(Base(make("bert"), tokenizer)) as base:
        method = stack("a", "lora(rank=2)") if kind == "stack" else fuse("s", "t")
        with pytest.raises(StoreError, match="not stored"):
            ob.train(base, _data(60), method, name="top", store=store, epochs=1)
        for name in "ast":
            base.save(name, store=store)
        before = {n: {k: v.clone() for k, v in base.adapters[n].tensors().items()} for n in "ast"}
        run = ob.train(base, _data(60), method, name="top", store=store, epochs=2, batch_size=8, lr=1e-2)
        for name, tensors in before.items():
            assert all(torch.equal(v, base.adapters[name].tensors()[k]) for k, v in tensors.items())
        top = base.adapters["top"]
        start = "deltas." if kind == "fuse" else "parts.1."
        assert {k.partition(".")[0] for k in top.tensors()} <= {start.partition(".")[0], "head", "base_head"}
        moved = [t for k, t in top.tensors().items() if k.endswith((".B", ".Q"))]
        assert moved and all(bool(t.any()) for t in moved) and run.history.steps > 0
        texts = ["the cold river", "the old bridge"]
        answers = [p.probabilities for p in base.predict(texts, adapter="top")]
        mixed = [p.probabilities for p in base.predict([*texts, *texts], adapter=["top", "a", "top", None])][::2]
        assert checks.gap(_scores(mixed[:1]), _scores(answers[:1])) <= EQUAL
        base.remove("top")
        base.load("top", store=store)
        again = [p.probabilities for p in base.predict(texts, adapter="top")]
        assert checks.gap(_scores(again), _scores(answers)) <= EQUAL


def _scores(found) -> torch.Tensor:
    return torch.tensor([list(scores.values()) for scores in found])


def test_the_command_stores_a_composition(tmp_path, tokenizer):
    import transformers as tf
    from families import COMMON
    from typer.testing import CliRunner

    import onebase as ob
    from onebase.cli.main import app

    folder = tmp_path / "tiny-bert"
    tf.BertModel(tf.BertConfig(**COMMON)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with ob.load_base(folder) as base:
        for number, name in enumerate("ab"):
            checks.disturb(base.add(name, "lora(rank=2)").module, number)
            base.save(name)

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, [*words, "-b", str(folder)])
        return done.exit_code, done.output + done.stderr

    code, said = run("compose", "mix", "combine(a@1, b, weights=[.7, .3], rank=2)")
    assert code == 0 and "mix@1" in said and "given up" in said and "as b does, features" in said
    assert run("compose", "mix", "fuse(a, b)")[0] == 2
    assert run("compose", "mix", "stack(a, missing)")[0] != 0
    with ob.load_base(folder) as base:
        base.load("a", name="a@1")
        base.load("b")
        base.load("mix")
        inputs = {"input_ids": rows(2), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
        with torch.no_grad(), base.use("mix"):
            one = base.model(**inputs)[0]
        with torch.no_grad(), base.use(parse("combine(a@1, b, weights=[.7, .3], rank=2)")):
            assert checks.gap(one, base.model(**inputs)[0]) <= EQUAL * checks.size(one)


def test_weights_are_numbers_of_any_kind_by_place_or_by_name():
    expected = combine("a", "b", weights=[0.25, 0.5])
    values = torch.tensor([0.25, 0.5])
    for weights in (values, values.numpy(), list(values.numpy()), {"b": 0.5, "a": 0.25}):
        assert combine("a", "b", weights=weights) == expected
    assert average("a", stack("b", "c"), weights={"a": 0.25, "stack(b, c)": 0.5}).weights == (0.25, 0.5)
    for wrong in (0.5, "ab", {"a": 0.7}, {"a": 0.7, "c": 0.3}, {0.5, 0.25}, values[None], [True, 1], [1, "x"]):
        with pytest.raises(ConfigError, match="combine: weights"):
            combine("a", "b", weights=wrong)


@pytest.mark.parametrize(
    ("how", "given", "used"),
    [("linear", {"density": 0.1}, "ties"), ("linear", {"seed": 7}, "dare"), ("ties", {"seed": 9}, "dare, dare_ties")],
)
def test_options_without_effect_are_refused(how, given, used):
    (name, value) = next(iter(given.items()))
    with pytest.raises(ConfigError, match=f"combine.{name} = {value} has no effect with how='{how}', only with {used}"):
        combine("a", "b", how=how, **given)
    with pytest.raises(ConfigError, match="has no effect"):
        parse(f"combine(a, b, how={how!r}, {name}={value})")
