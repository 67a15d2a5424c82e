"""Classification beyond the plain case: long texts in windows, uneven classes, which epoch is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import make

import onebase as ob
from onebase.encode import encode_windows
from onebase.errors import ConfigError
from onebase.examples import encode
from onebase.tasks.classification import UNEVEN, evenness
from onebase.training.job import Checked
from onebase.training.prepare import make_task
from onebase.training.settings import settings_for

FAST = {"epochs": 2, "batch_size": 16, "seed": 0, "attention": "keep", "dtype": "float32"}
WORDS = [
    "the",
    "meeting",
    "starts",
    "at",
    "nine",
    "and",
    "nothing",
    "about",
    "this",
    "river",
    "was",
    "easy",
    "to",
    "read",
    "before",
    "noon",
]


@pytest.fixture(scope="module")
def base() -> ob.Base:
    return ob.load_base("minilm")


def long_text(number: int, length: int = 120) -> str:
    return " ".join(WORDS[(number * 7 + i * (number % 3 + 1)) % len(WORDS)] for i in range(length))


def test_windows_cover_a_long_text_and_short_ones_stay_whole(base: ob.Base) -> None:
    texts = ["short", long_text(1), "another short one"]
    found = encode_windows(base.tokenizer, {"max_length": 32, "windows": True, "overlap": 8}, texts)
    assert [len(many) > 1 for many in found] == [False, True, False]
    whole = base.tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    joined = list(found[1][0].ids[1:-1])
    for row in found[1][1:]:
        assert len(row.ids) <= 32 and joined[-8:] == list(row.ids[1:9])
        joined += row.ids[9:-1]
    assert joined == whole and all(row.cut == 0 for many in found for row in many)
    cut = encode_windows(base.tokenizer, {"max_length": 32, "windows": False}, texts)[1]
    assert len(cut) == 1 and cut[0].cut == len(whole) + 2 - 32


def test_a_windowed_text_counts_once_and_is_averaged(base: ob.Base) -> None:
    rows = [{"text": long_text(i) if i % 4 == 0 else long_text(i, 12), "label": "ab"[i % 2]} for i in range(40)]
    data = ob.load_data(rows)
    spec = make_task(base, data, max_length=32, overlap=8)
    examples = encode(base, spec, data)["train"]
    assert len(examples) > examples.units == len(data.train)
    assert examples.weight is not None and examples.unit is not None
    weights = torch.zeros(examples.units).index_add_(0, examples.unit, examples.weight)
    assert torch.allclose(weights, torch.ones(examples.units))
    run = ob.train(base, data, "lora(rank=2)", name=None, max_length=32, overlap=8, **FAST)
    text = long_text(4)
    (answer,) = base.predict([text], run.name)
    windows = encode_windows(base.tokenizer, base.adapters[run.name].task, [text])[0]
    assert answer.windows == len(windows) > 1
    logits = []
    for row in windows:
        batch = {"input_ids": torch.tensor([row.ids]), "attention_mask": torch.ones(1, len(row.ids), dtype=torch.long)}
        logits.append(base.outputs(batch, [run.name])[0])
    expected = torch.softmax(torch.stack(logits).mean(0), -1)
    assert torch.allclose(torch.tensor(list(answer.probabilities.values())), expected, atol=1e-5)
    mixed = base.predict([text, "short", text], [run.name, None, run.name])
    assert mixed[0].probabilities == pytest.approx(answer.probabilities, abs=1e-5)
    base.remove(run.name)


def test_uneven_classes_weigh_more_and_macro_f1_counts(base: ob.Base) -> None:
    assert evenness([50, 50]) == pytest.approx(1.0) and evenness([89, 11]) < 0.8 < evenness([70, 30]) < UNEVEN
    assert evenness([67, 33]) > UNEVEN
    rows = [{"text": long_text(i, 9) + f" {i}", "label": "rare" if i % 10 == 0 else "usual"} for i in range(100)]
    data = ob.load_data(rows)
    spec = make_task(base, data)
    assert spec["metric"] == "macro_f1" and spec["weights"][0] > 4 * spec["weights"][1]
    assert "weights" not in make_task(base, data, class_weights="none")
    run = ob.train(base, data, "lora(rank=2)", **FAST)
    assert run.metric == "macro_f1" and run.test is not None and run.test.test == "paired bootstrap"
    base.remove(run.name)
    with pytest.raises(ConfigError, match="class_weights = 'heavy'"):
        make_task(base, data, class_weights="heavy")
    with pytest.raises(ConfigError, match="has no meaning for classification"):
        make_task(base, data, thresholds=3)


@pytest.mark.parametrize(("restore", "kept"), [("latest", 3), ("best", 2)])
def test_which_epoch_is_kept(base: ob.Base, monkeypatch: pytest.MonkeyPatch, restore: str, kept: int) -> None:
    """Scores are scripted: the third epoch is within the noise of the second, the fourth is not."""
    from onebase.training import prepare as module

    script = iter([0.5, 0.6, 0.9, 0.89, 0.7])
    states: list[dict[str, torch.Tensor]] = []

    def scorer(base, adapter, examples):  # type: ignore[no-untyped-def]
        def check() -> Checked:
            states.append(adapter.snapshot())
            value = next(script)
            return Checked(value, 0.02, {"accuracy": value, "validation_loss": 1 - value})

        return check

    monkeypatch.setattr(module, "_scorer", scorer)
    rows = [{"text": long_text(i, 8) + f" {i}", "label": "ab"[i % 2]} for i in range(40)]
    run = ob.train(base, rows, "lora(rank=2)", restore=restore, **FAST | {"epochs": 4})
    assert run.history.best == kept
    own = base.adapters[run.name].tensors()
    assert all(torch.equal(own[key], value) for key, value in states[kept].items())
    base.remove(run.name)


@pytest.fixture
def tiny(tokenizer) -> ob.Base:
    return ob.Base(make("bert"), tokenizer, id="tiny")


def rows_of_two(count: int = 24) -> list[dict[str, str]]:
    return [{"text": f"{WORDS[i % 16]} {WORDS[i * 5 % 16]} {i}", "label": "ab"[i % 2]} for i in range(count)]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("windows", "no", "expected true or false"),
        ("windows", 1, "expected true or false"),
        ("overlap", "x", "expected a whole number"),
        ("overlap", -5, "expected at least 0"),
        ("overlap", 10**6, "expected fewer tokens than max_length"),
        ("max_length", 32.0, "expected 4 to"),
        ("max_length", "32", "expected 4 to"),
        ("max_length", 2, "expected 4 to"),
        ("template", 5, "expected a text"),
        ("pooling", "max", "expected mean, first, last"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_before_training(
    tiny: ob.Base, option: str, value: object, words: str
) -> None:
    shown = f"{option} = {value!r}: {words}"
    with pytest.raises(ConfigError, match=shown):
        make_task(tiny, ob.load_data(rows_of_two()), **{option: value})
    with pytest.raises(ConfigError, match=shown):
        tiny.add("a", "lora(rank=2)", task={"kind": "classification", "labels": ["a", "b"], option: value})
    assert not tiny.adapters


def test_numbers_of_other_libraries_are_numbers(tiny: ob.Base) -> None:
    spec = make_task(tiny, ob.load_data(rows_of_two()), max_length=np.int64(16), overlap=np.int32(4))
    assert (type(spec["max_length"]), type(spec["overlap"])) == (int, int)
    settings = settings_for("lora", {"lr": np.float32(1e-3), "seed": np.int64(3), "clip": np.int8(1)})
    assert settings.lr == pytest.approx(1e-3) and type(settings.lr) is float and type(settings.seed) is int
    for name, value in (("seed", True), ("lr", True), ("seed", np.float64(1.5))):
        with pytest.raises(ConfigError, match=f"train.{name}"):
            settings_for("lora", {name: value})
    for name in ("weight_decay", "clip"):
        with pytest.raises(ConfigError, match=f"train.{name} = -1.0: expected a number from 0"):
            settings_for("lora", {name: -1})
        assert getattr(settings_for("lora", {name: 0}), name) == 0
    with pytest.raises(ConfigError, match=r"train\.lr = 0\.0: expected a number from above 0"):
        settings_for("lora", {"lr": 0})


PARTIAL = [
    {},
    {"max_length": 16},
    {"kind": "classification", "labels": ("a", "b")},
    {"kind": "classification", "labels": ["a", "b"], "pair": True},
    {"kind": "multilabel", "labels": ["a", "b"]},
    {"kind": "regression"},
    {"kind": "rerank"},
    {"kind": "qa"},
    {"kind": "tokens", "labels": ["O", "B-x", "I-x"]},
    {"kind": "masked-lm"},
    {"kind": "embeddings"},
]
WRITING = [{"kind": "causal-lm"}, {"kind": "completion"}, {"kind": "seq2seq"}]


@pytest.mark.parametrize("task", PARTIAL, ids=str)
def test_a_partial_task_answers_is_stored_and_is_loaded(tokenizer, task: dict[str, object]) -> None:
    base = ob.Base(make("bert"), tokenizer, id="tiny")
    if task.get("kind") == "masked-lm":
        added = base.add("a", "lora(rank=2)", task=task)
        assert added.head is not None and "tied" in added.task
        return
    base.add("a", "lora(rank=2)", task=task)
    pairs = ["the river was cold"] if base.adapters["a"].task["pair"] else None
    before = base.predict("nothing about this", "a", pairs=pairs)[0].facts()
    ref = base.save("a").ref
    base.remove("a")
    base.load(ref)
    assert base.predict("nothing about this", "a", pairs=pairs)[0].facts() == before
    again = base.add("again", "lora(rank=2)", task=base.adapters["a"].task)
    assert again.task == base.adapters["a"].task  # a whole spec stays as it is


@pytest.mark.parametrize("task", WRITING, ids=str)
def test_a_partial_task_that_writes_is_stored_and_is_loaded(tokenizer, task: dict[str, object]) -> None:
    base = ob.Base(make("llama"), tokenizer, id="tiny")
    base.add("a", "lora(rank=2)", task=task)
    before = base.generate("good", "a", max_new_tokens=3)
    ref = base.save("a").ref
    base.remove("a")
    base.load(ref)
    assert base.generate("good", "a", max_new_tokens=3) == before


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (5, "task = 5: expected a mapping"),
        ({"labels": ["a"]}, "without a kind"),
        ({"kind": 3}, "task kind = 3"),
        ({"kind": "classification"}, "has at least 2"),
        ({"kind": "classification", "labels": "ab"}, "expected a list of texts"),
        ({"kind": "classification", "labels": ["a", "a"]}, "a label is there twice"),
        ({"kind": "classification", "labels": ["a", "b"], "max_len": 3}, "max_len = 3.*Did you mean 'max_length'"),
        ({"kind": "classification", "labels": ["a", "b"], "class_weights": "balanced"}, "give weights"),
    ],
    ids=str,
)
def test_a_task_that_is_none_is_refused(tiny: ob.Base, task: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny.add("a", "lora(rank=2)", task=task)  # type: ignore[arg-type]
    assert not tiny.adapters
