"""Pairs of texts, read jointly or apart: the same numbers as the plain computation, and the base's better own score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import TEXTS, make, tiny_tokenizer

import onebase as ob
from onebase.errors import ConfigError, RouteError, UnsupportedError
from onebase.examples import encode, forward
from onebase.heads import LinearHead
from onebase.tasks.frozen import pair_features, pair_width
from onebase.tasks.pooled import slow_down
from onebase.training.prepare import make_task

FAST = {"epochs": 1, "batch_size": 16, "seed": 0, "attention": "keep", "dtype": "float32"}
WORDS = list(dict.fromkeys(word for text in TEXTS for word in text.split()))
SHARED = Path(__file__).parents[2] / "shared"


def sentence(number: int, length: int = 6) -> str:
    return " ".join(WORDS[(number * 5 + i * (1 + number % 4)) % len(WORDS)] for i in range(length))


def scored(count: int = 40) -> list[dict[str, object]]:
    """Pairs that share as many words as their score says."""
    rows: list[dict[str, object]] = []
    for i in range(count):
        words, same = sentence(i).split(), i % 5
        rows.append({"text": sentence(i), "text_pair": " ".join(words[:same] + WORDS[-3:]), "score": 10 + same / 2})
    return rows


@pytest.fixture(scope="module")
def base() -> ob.Base:
    return ob.Base(make("bert"), tiny_tokenizer(), id="tiny")


def pooled(base: ob.Base, text: str, name: str | None) -> torch.Tensor:
    ids = torch.tensor([base.tokenizer(text)["input_ids"]])
    with base.use(name):
        states = base.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return states.mean(1)


def test_features_are_those_of_the_formula() -> None:
    one, two = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    found = pair_features(one, two)
    assert found.shape == (1, pair_width(2))
    assert torch.allclose(found, torch.tensor([[0.6, 0.8, 0.0, 1.0, 0.6, 0.2, 0.0, 0.8, 0.8]]))


def test_a_slower_head_gives_the_same_outputs() -> None:
    head, x = LinearHead(9, 2), torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    head.standardize(x)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(1))
        head.bias.fill_(0.5)
    before, weight = head(x), head.weight.clone()
    slow_down(head, 4.0)
    assert torch.allclose(head(x), before, atol=1e-5) and torch.equal(head.weight, 4 * weight)


def test_apart_losses_equal_the_plain_computation(base: ob.Base) -> None:
    data = ob.load_data(scored(), task="regression")
    spec = make_task(base, data, pairs="apart")
    adapter = base.add("apart", "lora(rank=2)", task=spec)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    assert isinstance(adapter.head, LinearHead)
    examples = encode(base, spec, data)["train"]
    index = [5, 0, 17]
    found = forward(base, "apart", examples, index)
    rows = data.train
    assert rows.text_pair is not None and rows.get("score") is not None
    for place, i in enumerate(index):
        u, v = pooled(base, rows.text[i], "apart"), pooled(base, rows.text_pair[i], "apart")
        value = adapter.head(pair_features(u, v)).item()
        assert value == pytest.approx(float(found.values[place].detach()), rel=1e-5)
        loss = ((value - float(rows["score"][i])) / spec["scale"]) ** 2
        assert loss == pytest.approx(float(found.sums[place].detach()), rel=1e-4)
    base.remove("apart")


def test_mixed_equals_alone_and_loads_with_the_bases_own_score(base: ob.Base) -> None:
    data = ob.load_data(scored(), task="regression")
    runs = {how: ob.train(base, data, "lora(rank=2)", name=how, pairs=how, **FAST) for how in ("joint", "apart")}
    assert runs["joint"].base_value == pytest.approx(runs["apart"].base_value, abs=1e-6)  # the better of both
    widths = {how: base.adapters[how].head.weight.shape[1] for how in runs}  # type: ignore[union-attr]
    assert widths == {"joint": 32, "apart": pair_width(32)}
    assert len({base.adapters[how].base_head.weight.shape for how in runs}) == 1  # type: ignore[union-attr]
    texts, pairs = [sentence(i) for i in range(5)], [sentence(i + 3, 9) for i in range(5)]
    names = ["joint", "apart", None, "apart", "joint"]
    mixed = base.predict(texts, names, pairs=pairs)
    alone = [base.predict(t, n, pairs=p)[0] for t, n, p in zip(texts, names, pairs)]
    for one, other in zip(mixed, alone):
        assert (one.value is None) == (other.value is None) == (one.adapter is None)
        assert one.value is None or one.value == pytest.approx(other.value, abs=1e-4)
        assert one.windows == 1
    before = {how: ob.evaluate(base, data, how) for how in runs}
    for how in runs:
        base.remove(how)
        base.load(how)
        after = ob.evaluate(base, data, how)
        assert after.adapter.value == pytest.approx(before[how].adapter.value, abs=1e-6)
        assert after.base is not None and after.base.value == pytest.approx(before[how].base.value, abs=1e-6)  # type: ignore[union-attr]
        assert after.test is not None and after.test.unit == "spearman"
    again = base.predict(texts, names, pairs=pairs)
    assert [p.value for p in again] == pytest.approx([p.value for p in mixed], abs=1e-5)
    with pytest.raises(UnsupportedError, match="rows of their own"):
        base.as_model("apart")
    for how in runs:
        base.remove(how)


def test_pairs_and_single_texts_share_a_batch(base: ob.Base) -> None:
    task = {"kind": "classification", "labels": ["no", "yes"]}
    for name, more in (("joint", {"pair": True}), ("apart", {"pair": True, "pairs": "apart"}), ("single", {})):
        adapter = base.add(name, "lora(rank=2)", task=task | more, seed=len(name))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    texts = [sentence(i) for i in range(6)]
    names, seconds = ["single", "joint", None, "apart", "single", None], [None, "a b", None, sentence(9), None, "c d"]
    mixed = base.predict(texts, names, pairs=seconds)
    for text, name, second, one in zip(texts, names, seconds, mixed):
        alone = base.predict(text, name, pairs=second)[0]
        if name is None:
            assert torch.allclose(one.embedding, alone.embedding, atol=1e-5)
        else:
            assert one.probabilities == pytest.approx(alone.probabilities, abs=1e-5)
    with pytest.raises(RouteError, match="pass None for text 1 there"):
        base.predict(texts[:2], "single", pairs=[None, "x"])
    with pytest.raises(RouteError, match="with one for text 0"):
        base.predict(texts[:2], "joint", pairs=[None, "x"])
    for name in ("joint", "apart", "single"):
        base.remove(name)


def test_classification_reads_pairs_apart_too(base: ob.Base) -> None:
    rows = [{**row, "label": "far" if i % 5 < 2 else "near"} for i, row in enumerate(scored(60))]
    data = ob.load_data(rows, task="classification", label="label")
    run = ob.train(base, data, "lora(rank=2)", pairs="apart", **FAST)
    (answer,) = base.predict([sentence(1)], run.name, pairs=[sentence(2)])
    assert set(answer.probabilities) == {"far", "near"} and sum(answer.probabilities.values()) == pytest.approx(1)
    base.remove(run.name)


def test_auto_reads_apart_only_where_the_frozen_base_is_clearly_better_at_it(base: ob.Base) -> None:
    """Whether two texts are equal is seen from their cosine; noise as labels says nothing for reading apart."""

    def rows(label) -> list[dict[str, str]]:
        pairs = [(sentence(i), sentence(i if i % 2 else i + 5, 3)) for i in range(120)]
        return [{"text": a, "text_pair": b, "label": label(i)} for i, (a, b) in enumerate(pairs)]

    def said(label) -> tuple[str, list[str]]:
        notes: list[str] = []
        run = ob.train(base, rows(label), "lora(rank=2)", report=Notes(notes), **FAST)
        how = base.adapters[run.name].task["pairs"]
        base.remove(run.name)
        return how, [note for note in notes if "pair" in note]

    how, notes = said(lambda i: "same" if i % 2 else "other")
    assert how == "apart" and "clearly better" in notes[0]
    coin = torch.randint(2, (120,), generator=torch.Generator().manual_seed(2)).tolist()
    how, notes = said(lambda i: "heads" if coin[i] else "tails")
    assert how == "joint" and "one row" in notes[0]


def test_an_adapter_with_words_of_its_own_reads_pairs_by_itself(base: ob.Base) -> None:
    """The frozen base, which knows no new word, decides on its own tokens; a second run asks it nothing again."""
    pairs = [(f"zorblax {sentence(i)}", f"zorblax {sentence(i if i % 2 else i + 5, 3)}") for i in range(120)]
    rows = [{"text": a, "text_pair": b, "label": "same" if i % 2 else "other"} for i, (a, b) in enumerate(pairs)]
    for method in ("tokens(words=['zorblax']) + lora(rank=2)", "lora(rank=2)"):
        run = ob.train(base, rows, method, **FAST)
        assert base.adapters[run.name].task["pairs"] == "apart"
        (answer,) = base.predict([rows[0]["text"]], run.name, pairs=[rows[0]["text_pair"]])
        assert set(answer.probabilities) == {"same", "other"}
        base.remove(run.name)


class Notes(ob.training.loop.Reporter):
    """Keeps what a run says."""

    def __init__(self, kept: list[str]):
        self.kept = kept

    def note(self, text: str) -> None:
        self.kept.append(text)


def test_pairs_is_refused_where_it_has_no_meaning(base: ob.Base) -> None:
    single = ob.load_data([{"text": sentence(i), "score": i / 7} for i in range(40)], task="regression")
    with pytest.raises(ConfigError, match="no meaning for single texts"):
        make_task(base, single, pairs="apart")
    double = ob.load_data(scored(), task="regression")
    with pytest.raises(ConfigError, match="a template joins the two texts"):
        make_task(base, double, pairs="apart", template="{text} / {text_pair}")
    assert make_task(base, double, template="{text} / {text_pair}")["pairs"] == "joint"
    with pytest.raises(ConfigError, match="pairs = 'both'"):
        make_task(base, double, pairs="both")


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data sets are not here")
def test_an_adapter_beats_the_frozen_base_on_stsb() -> None:
    run = ob.train(ob.load_base("minilm"), SHARED / "data" / "stsb")
    assert run.metric == "spearman" and run.test is not None
    assert run.test.low > 0, run.test.sentence()
