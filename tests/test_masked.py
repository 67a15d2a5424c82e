"""Masked language modelling: what is hidden, the base's head, losses, runs that repeat, filling masks."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import onebase as ob
from onebase.compose import stack
from onebase.encode import IGNORED, Encoded
from onebase.errors import ConfigError, DataError, OnebaseError, UnsupportedError
from onebase.examples import encode, run_examples
from onebase.heads import TiedHead
from onebase.tasks import get_task
from onebase.tasks.masked import hide
from onebase.training.prepare import make_task

sys.path.insert(0, str(Path(__file__).parent / "contract"))
from families import COMMON, SPECIAL, TEXTS, tiny_tokenizer

FAST: dict[str, Any] = {"epochs": 2, "batch_size": 8, "seed": 0, "attention": "keep", "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT with its head for masked tokens, as a checkpoint."""
    path = tmp_path_factory.mktemp("masked") / "tiny-masked"
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(0)
    config = tf.BertConfig(**{**COMMON, "vocab_size": len(tokenizer)})
    tf.BertForMaskedLM(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(folder: Path) -> Any:
    found = ob.load_base(folder)
    yield found
    found.close()


def texts(count: int = 40) -> list[dict[str, str]]:
    draw = random.Random(0)
    return [{"text": f"{draw.choice(TEXTS)} and {draw.choice(TEXTS)}"} for _ in range(count)]


def test_fifteen_in_a_hundred_are_hidden_as_the_paper_says() -> None:
    row = Encoded((0, *range(10, 210), 2))
    common = frozenset(range(4, 1000))
    kinds: Counter[str] = Counter()
    for number in range(400):
        found = hide(row, random.Random(number), 3, tuple(common), common)
        assert found.labels is not None and found.labels[0] == found.labels[-1] == IGNORED
        chosen = [place for place, label in enumerate(found.labels) if label != IGNORED]
        assert len(chosen) == 30 and all(found.labels[place] == row.ids[place] for place in chosen)
        assert all(found.ids[p] == row.ids[p] for p in range(len(row.ids)) if p not in chosen)
        kinds.update("mask" if found.ids[p] == 3 else "same" if found.ids[p] == row.ids[p] else "other" for p in chosen)
    total = sum(kinds.values())
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.015)
    assert kinds["same"] / total == pytest.approx(0.1, abs=0.012)
    short = hide(Encoded((0, 10, 2)), random.Random(0), 3, (10, 11), frozenset((10, 11)))
    assert short.labels == (IGNORED, 10, IGNORED)
    assert hide(Encoded((0, 2)), random.Random(0), 3, (10,), frozenset((10,))).labels == (IGNORED, IGNORED)


def test_masks_depend_on_seed_epoch_and_row_only(base: ob.Base) -> None:
    data = ob.load_data(texts(), task="masked-lm")
    spec, task = make_task(base, data), get_task("masked-lm")
    train, again = (encode(base, spec, data)["train"] for _ in range(2))
    assert [r.ids for r in train.rows] == [r.ids for r in again.rows]  # what is scored is fixed
    first, same = task.for_epoch(train, 7, 1), task.for_epoch(again, 7, 1)
    assert [r.ids for r in first.rows] == [r.ids for r in same.rows]
    assert [r.labels for r in task.for_epoch(first, 7, 1).rows] == [r.labels for r in first.rows]  # nothing adds up
    for other in (task.for_epoch(train, 7, 2), task.for_epoch(train, 8, 1), train):
        assert [r.labels for r in other.rows] != [r.labels for r in first.rows]
    for row, plain in zip(first.rows, train.facts["plain"]):
        assert tuple(b if b != IGNORED else a for a, b in zip(row.ids, row.labels or ())) == plain.ids


def test_the_loss_is_that_of_transformers(base: ob.Base) -> None:
    data = ob.load_data(texts(), task="masked-lm")
    spec = make_task(base, data, max_length=12)
    examples = encode(base, spec, data)["train"]
    assert len(examples) > examples.units  # windows
    found = run_examples(base, None, examples, 16, spec)
    for number, row in enumerate(examples.rows):
        with torch.no_grad():
            own = base.model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels]))
        assert float(found.sums[number] / found.counts[number]) == pytest.approx(float(own.loss), rel=1e-4)
    scores = get_task("masked-lm").judge(spec, None, examples, found)
    assert scores.metrics["n"] == examples.units and 0 <= scores.metrics["masked_accuracy"] <= 1
    assert scores.value == pytest.approx(float((found.sums.sum() / found.counts.sum()).exp()), rel=1e-4)


def test_a_run_repeats_and_stores_and_loads(base: ob.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ob.load_data(texts(60), task="masked-lm")
    store = ob.Store(tmp_path)
    run = ob.train(base, data, "lora(rank=4)", name="words", store=store, lr=2e-2, **FAST)
    assert run.kind == "masked-lm" and run.metric == "perplexity" and run.test is not None
    assert run.value < run.base_value  # the random base knows nothing
    first = base.adapters["words"].snapshot()
    again = ob.train(base, data, "lora(rank=4)", lr=2e-2, **FAST)
    assert all(torch.equal(first[key], value) for key, value in base.adapters[again.name].tensors().items())
    base.remove(again.name)
    text = "the cold <mask> runs under the old bridge"
    before = base.fill(text, "words", top=3)[0].facts()
    base.remove("words")
    base.load("words", store=store)
    assert base.fill(text, "words", top=3)[0].facts() == before
    assert base.predict(text, "words")[0].spans == base.fill(text, "words")[0].spans
    assert ob.evaluate(base, texts(20), "words").base is not None
    base.remove("words")


def test_masks_are_filled_mixed_as_alone(base: ob.Base) -> None:
    base.add("lora", "lora(rank=2)")
    base.add("prompt", "prompt(length=3)")
    torch.manual_seed(1)
    for name in ("lora", "prompt"):
        for parameter in base.adapters[name].module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    given = ["the cold <mask> runs under <mask>", "<mask> was easy", "a small bird sings in the <mask> tree"]
    names = ["lora", "prompt", None]
    mixed = base.fill(given, names, top=2)
    assert [len(found.spans or ()) for found in mixed] == [4, 2, 2]
    for text, name, found in zip(given, names, mixed):
        assert all(text[s.start : s.end] == "<mask>" for s in found.spans or ())
        (alone,) = base.fill([text], name, top=2)
        assert [s.text for s in alone.spans or ()] == [s.text for s in found.spans or ()]
        assert [s.probability for s in alone.spans or ()] == pytest.approx(
            [s.probability for s in found.spans or ()], abs=1e-6
        )
    row = base.tokenizer(given[2], return_tensors="pt")
    with torch.no_grad():
        logits = base.model(**row).logits[0]
    place = row["input_ids"][0].tolist().index(base.tokenizer.mask_token_id)
    best = torch.softmax(logits[place], -1).max(0)
    assert mixed[2].spans is not None and mixed[2].spans[0].probability == pytest.approx(float(best.values), rel=1e-4)
    assert mixed[2].spans[0].text == base.tokenizer.decode([int(best.indices)])
    with pytest.raises(DataError, match="text 1 has no <mask>"):
        base.fill(["a <mask>", "none here"])
    with pytest.raises(ConfigError, match="top = 0"):
        base.fill("a <mask>", top=0)
    base.remove("lora")
    base.remove("prompt")


def test_bases_are_loaded_with_the_head_that_their_checkpoint_has(base: ob.Base, folder: Path, tmp_path: Path) -> None:
    assert base.has_masked_head and not base.has_lm_head and type(base.model).__name__ == "BertForMaskedLM"
    assert ob.load_base(folder).fingerprint() == base.fingerprint()
    before = base.fingerprint()
    other = ob.load_base(folder)
    with torch.no_grad():
        other.model.get_parameter("cls.predictions.bias").add_(1.0)
    assert other.fingerprint() != before  # the head is part of the base
    backbone = tf.BertModel(tf.BertConfig(**{**COMMON, "vocab_size": len(base.tokenizer)})).eval()
    incomplete = tmp_path / "incomplete"
    backbone.save_pretrained(incomplete)
    base.tokenizer.save_pretrained(incomplete)
    config = tf.AutoConfig.from_pretrained(incomplete)
    config.architectures = ["BertForMaskedLM"]  # what it says is not what it has
    config.save_pretrained(incomplete)
    found = ob.load_base(incomplete)
    assert not found.has_masked_head and type(found.model).__name__ == "BertModel"
    with pytest.raises(UnsupportedError, match="has no head for masked tokens, so only adapters trained with"):
        found.fill("a <mask>")


@pytest.fixture(scope="module")
def headless(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same encoder from a checkpoint without its head."""
    path = tmp_path_factory.mktemp("headless") / "tiny"
    tf.AutoModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(path)
    tf.AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    found = ob.load_base(path)
    yield found
    found.close()


def test_a_base_without_the_head_gets_one_of_its_embeddings(headless: ob.Base, tmp_path: Path) -> None:
    assert not headless.has_masked_head
    store, rows = ob.Store(tmp_path), texts(160)
    data = ob.load_data({"train": rows[:120], "validation": rows[120:140], "test": rows[140:]}, task="mlm")
    fingerprint = headless.fingerprint()
    run = ob.train(headless, data, "lora(rank=4)", name="words", store=store, lr=1e-2, **{**FAST, "epochs": 6})
    assert run.kind == "masked-lm" and run.metric == "perplexity" and run.test is not None
    uniform = len(headless.tokenizer)
    assert run.value < run.base_value < uniform  # the start knows at least how frequent words are
    assert headless.fingerprint() == fingerprint
    adapter = headless.adapters["words"]
    assert isinstance(adapter.head, TiedHead) and isinstance(adapter.base_head, TiedHead)
    assert not any(t.shape == (uniform, 32) for t in adapter.tensors().values())  # the embeddings are not stored
    text = "the cold <mask> runs under the old bridge"
    before = headless.fill(text, "words", top=3)[0].facts()

    batch = headless.tokenizer(text, return_tensors="pt")
    place = batch["input_ids"][0].tolist().index(headless.tokenizer.mask_token_id)
    with torch.no_grad(), headless.use("words"):
        state = headless.model(**batch).last_hidden_state[0, place]
        head = adapter.head
        mapped = (state - head.center) * head.scale @ head.weight.T + head.bias
        logits = headless.model.embeddings.word_embeddings.weight @ mapped + head.words
    best = torch.softmax(logits, -1).max(0)
    assert before["spans"][0]["probability"] == pytest.approx(float(best.values), rel=1e-4)
    assert before["spans"][0]["text"] == headless.tokenizer.decode([int(best.indices)])

    headless.remove("words")
    headless.load("words", store=store)
    assert headless.fill(text, "words", top=3)[0].facts() == before
    own = ob.evaluate(headless, data, "words")
    assert own.base is not None
    assert (own.adapter.value, own.base.value) == pytest.approx((run.value, run.base_value), rel=1e-5)
    headless.remove("words")


def test_other_trainers_get_logits_and_a_loss(headless: ob.Base) -> None:
    data = ob.load_data(texts(40), task="masked-lm")
    ob.train(headless, data, "lora(rank=2)", name="words", **FAST)
    examples = encode(headless, headless.adapters["words"].task, data)["validation"]
    row = examples.rows[0]
    with torch.no_grad():
        out = headless.as_model("words")(torch.tensor([row.ids]), labels=torch.tensor([row.labels]))
    assert out.logits.shape == (1, len(row.ids), len(headless.tokenizer))
    found = run_examples(headless, "words", examples)
    assert float(out.loss) == pytest.approx(float(found.sums[0] / found.counts[0]), rel=1e-5)
    headless.remove("words")


def test_tied_heads_share_batches_with_other_tasks(headless: ob.Base) -> None:
    rows = [{"text": f"{TEXTS[i % 4]} {('good', 'bad')[i % 2]} {i}", "label": ("y", "n")[i % 2]} for i in range(40)]
    labels, plain = ob.load_data(rows), ob.load_data(texts(60), task="masked-lm")
    runs = ob.train_many(
        headless,
        [
            ob.Job(labels, "lora(rank=2)", "labels", **FAST),
            ob.Job(plain, "bottleneck(size=4)", "fr", **FAST),
        ],
    )
    assert {run.name: run.kind for run in runs} == {"labels": "classification", "fr": "masked-lm"}
    ob.train(headless, plain, "bottleneck(size=4)", name="alone", **FAST)
    for key, value in headless.adapters["alone"].tensors().items():
        assert torch.allclose(headless.adapters["fr"].tensors()[key], value, atol=1e-5), key
    given = ["the cold <mask> runs", "<mask> was easy"]
    mixed = headless.fill(given, ["fr", "alone"], top=2)
    for text, name, found in zip(given, ("fr", "alone"), mixed):
        (single,) = headless.fill([text], name, top=2)
        assert [s.text for s in single.spans or ()] == [s.text for s in found.spans or ()]
    headless.add("up", stack("fr", "labels"))
    assert headless.predict("the cold river good", "up")[0].label in ("y", "n")
    with pytest.raises(UnsupportedError, match="the plain base was asked"):
        headless.fill(given, ["fr", None])
    for name in ("up", "labels", "fr", "alone"):
        headless.remove(name)


def test_what_cannot_fill_masks_says_so(headless: ob.Base, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    decoder = ob.Base(
        tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2)), tokenizer
    )
    with pytest.raises(UnsupportedError, match="needs an encoder that reads text"):
        ob.train(decoder, ob.load_data(texts(), task="masked-lm"), "lora")
    store, data = ob.Store(tmp_path), ob.load_data(texts(60), task="masked-lm")
    ob.train(headless, data, "lora(rank=2)", name="words", store=store, **FAST)
    headless.adapters["words"].task["tied"]["words"] += 1
    headless.save("words", store=store)
    headless.remove("words")
    with pytest.raises(OnebaseError, match="embeddings"):
        headless.load("words@2", store=store)
    headless.load("words@1", store=store)
    headless.remove("words")


def test_classification_works_on_a_base_with_a_masked_head(base: ob.Base, tmp_path: Path) -> None:
    rows = [{"text": f"{TEXTS[i % 4]} {('good', 'bad')[i % 2]}", "label": ("yes", "no")[i % 2]} for i in range(40)]
    rows = [{**row, "text": f"{row['text']} {TEXTS[i % 5].split()[i % 7]}"} for i, row in enumerate(rows)]
    store = ob.Store(tmp_path)
    run = ob.train(base, ob.load_data({"train": rows, "validation": rows[:10]}), name="labels", store=store, **FAST)
    assert run.metric == "accuracy"
    before = base.predict("the cold river good", "labels")[0].probabilities
    batch = base.tokenizer(["the cold river good"], return_tensors="pt")
    with torch.no_grad():
        plain = base.model.bert(**batch).last_hidden_state
    assert torch.allclose(base.states(dict(batch), None), plain, atol=1e-6)
    other = ob.load_base(base.model.config._name_or_path)
    other.load("labels", store=store)
    assert other.predict("the cold river good", "labels")[0].probabilities == pytest.approx(before, abs=1e-6)
    with pytest.raises(UnsupportedError, match="it fills no masks"):
        base.fill("a <mask>", "labels")
    base.remove("labels")


def test_other_masked_families_fill_too(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    size = len(tokenizer)
    torch.manual_seed(0)
    small = {**SPECIAL, "vocab_size": size}
    models = [
        tf.RobertaForMaskedLM(tf.RobertaConfig(**{**COMMON, "vocab_size": size, "max_position_embeddings": 66})),
        tf.DistilBertForMaskedLM(tf.DistilBertConfig(**small, dim=32, hidden_dim=48, n_layers=2, n_heads=4)),
    ]
    for model in models:
        path = tmp_path / type(model).__name__
        model.eval().save_pretrained(path)
        tokenizer.save_pretrained(path)
        with ob.load_base(path) as base:
            assert base.has_masked_head and type(base.model) is type(model)
            run = ob.train(base, ob.load_data(texts(), task="masked-lm"), "prompt(length=2)", name="p", **FAST)
            assert run.value > 1 and len(base.fill("the <mask> river", "p")[0].spans or ()) == 1
