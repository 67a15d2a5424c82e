"""Regression: numbers in their own unit, the loss and the baseline by hand, windows, bad data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import make, tiny_tokenizer
from scipy.stats import spearmanr

import onebase as ob
from onebase.encode import encode_windows
from onebase.errors import DataError
from onebase.examples import encode, run_examples
from onebase.tasks import get_task
from onebase.tasks.frozen import PENALTIES, fit_numbers
from onebase.tasks.metrics import rank_correlation
from onebase.tasks.regression import NumberHead
from onebase.training.prepare import make_task

FAST = {"epochs": 2, "batch_size": 16, "seed": 0, "attention": "keep", "dtype": "float32"}
GOOD, BAD = ["superb", "moving", "brilliant"], ["dull", "clumsy", "awful"]


def stars(count: int = 60) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for i in range(count):
        share = i % 4
        words = [GOOD[(i + j) % 3] if j < share else BAD[(i + j) % 3] for j in range(3)]
        rows.append({"text": f"A {' and '.join(words)} film, scene {i}.", "score": f"{100 + 10.25 * share}"})
    return rows


@pytest.fixture(scope="module")
def base() -> ob.Base:
    return ob.load_base("minilm")


@pytest.fixture(scope="module")
def tiny() -> ob.Base:
    return ob.Base(make("bert"), tiny_tokenizer(), id="tiny")


def test_ridge_is_the_ridge_of_scikit_learn() -> None:
    from sklearn.linear_model import Ridge

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=generator) * 3 + 1, torch.randn(50, generator=generator)
    head = NumberHead(6, 0.0, 1.0)
    fit_numbers(head, x, y, x[:20], y[:20])
    inputs = ((x - head.center) * head.scale).double().numpy()
    errors = {}
    for penalty in PENALTIES:
        model = Ridge(alpha=penalty * 50).fit(inputs, y.numpy())
        errors[penalty] = float(((model.predict(inputs[:20]) - y[:20].numpy()) ** 2).mean())
    best = Ridge(alpha=min(errors, key=errors.__getitem__) * 50).fit(inputs, y.numpy())
    assert np.allclose(head(x)[:, 0].detach().numpy(), best.predict(inputs), atol=1e-4)


def test_rank_correlation_is_spearmans() -> None:
    random = np.random.default_rng(0)
    for digits in (0, 1, 8):
        rows = np.stack([random.normal(size=80), np.round(random.normal(size=80), digits)], 1)
        assert rank_correlation(rows) == pytest.approx(float(spearmanr(*rows.T).statistic))
    assert rank_correlation(np.ones((5, 2))) == 0.0


def test_loss_and_values_are_in_their_units(tiny: ob.Base) -> None:
    data = ob.load_data(stars(), task="regression")
    spec = make_task(tiny, data)
    targets = torch.tensor([float(score) for score in data.train["score"]])
    assert spec["center"] == pytest.approx(float(targets.mean())) and spec["scale"] == pytest.approx(
        float(targets.std())
    )
    tiny.add("number", "lora(rank=2)", task=spec)
    examples = encode(tiny, spec, data)["train"]
    found = run_examples(tiny, "number", examples)
    values = torch.stack(found.values).view(-1)
    assert torch.allclose(values, torch.full_like(values, spec["center"]))  # weights of zero give the mean
    assert torch.allclose(found.sums, ((values - targets) / spec["scale"]) ** 2, atol=1e-5)
    scores = get_task("regression").judge(spec, None, examples, found)
    assert scores.metrics["rmse"] == pytest.approx(float((values - targets).pow(2).mean().sqrt()), rel=1e-4)
    model = tiny.as_model("number")
    ids = torch.tensor([examples.rows[0].ids])
    out = model(input_ids=ids, labels=targets[:1])
    assert float(out.loss.detach()) == pytest.approx(float(found.sums[0]), rel=1e-4)
    tiny.remove("number")


def test_an_adapter_is_trained_stored_and_asked(base: ob.Base) -> None:
    run = ob.train(base, stars(), "lora(rank=2)", name="stars", task="regression", **FAST)
    assert run.metric == "spearman" and run.base_value > 0.3 and {"pearson", "mae", "rmse"} <= run.metrics.keys()
    assert run.test is not None and run.test.test == "paired bootstrap"
    good, bad = (base.predict(f"A {w} film, scene 99.", "stars")[0] for w in ("superb and moving", "dull and awful"))
    assert good.value is not None and bad.value is not None and 60 < bad.value < good.value < 180
    assert good.facts() == {"value": good.value, "cut": 0}
    base.remove("stars")
    base.load("stars")
    assert base.predict("A superb and moving film, scene 99.", "stars")[0].value == pytest.approx(good.value, abs=1e-4)
    result = ob.evaluate(base, stars(20), "stars")
    assert result.base is not None and result.rows == 20 and result.adapter.metric == "spearman"
    base.remove("stars")


def test_windows_of_a_long_text_are_averaged(tiny: ob.Base) -> None:
    data = ob.load_data(
        [{"text": " ".join(f"{i} {j}" for j in range(6 * (1 + i % 4))), "score": i / 3} for i in range(40)]
    )
    assert data.kind == "regression"
    run = ob.train(tiny, data, "lora(rank=2)", max_length=16, overlap=4, **FAST)
    text = data.train.text[max(range(len(data.train)), key=lambda i: len(data.train.text[i]))]
    (answer,) = tiny.predict([text], run.name)
    windows = encode_windows(tiny.tokenizer, tiny.adapters[run.name].task, [text])[0]
    assert answer.windows == len(windows) > 1
    values = []
    for row in windows:
        ids = torch.tensor([row.ids])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        values.append(tiny.outputs(batch, [run.name])[0].detach())
    assert answer.value == pytest.approx(float(torch.stack(values).mean()), abs=1e-4)
    tiny.remove(run.name)


def test_measurements_in_a_label_column_are_a_regression(tmp_path) -> None:
    rows = [{"text": f"text {i}", "label": f"{i / 8}"} for i in range(60)]
    for data in (ob.load_data(rows), ob.load_data(rows, task="regression"), ob.load_data(rows, label="label")):
        assert data.kind == "regression" and data.scores and data.columns == {"text": "text", "score": "label"}
    (tmp_path / "a.csv").write_text("text,label\n" + "\n".join(f"text {i},{i}" for i in range(10)))
    assert ob.load_data(tmp_path / "a.csv", task="regression").train.get("score") is not None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x", "no number: 'x'"),
        ("1,5", "write decimals with a point"),
        ("inf", "not finite"),
        ("", "missing"),
    ],
)
def test_a_score_that_is_no_number_is_named_by_row(value: str, said: str) -> None:
    rows = stars(20)
    rows[6]["score"] = value
    with pytest.raises(DataError, match="row 7") as error:
        ob.load_data(rows, task="regression")
    assert said in str(error.value)


def test_one_value_only_is_refused() -> None:
    with pytest.raises(DataError, match="every score is 3"):
        ob.load_data([{"text": f"text {i}", "score": 3} for i in range(20)], task="regression")
