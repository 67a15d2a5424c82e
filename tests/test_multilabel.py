"""Several labels per text: thresholds, the loss by hand, windows, every way to write labels, bad data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import TEXTS, make, tiny_tokenizer
from sklearn.metrics import f1_score
from typer.testing import CliRunner

import onebase as ob
from onebase.cli.main import app
from onebase.encode import encode_windows
from onebase.errors import ConfigError, DataError
from onebase.examples import encode, run_examples
from onebase.heads import LinearHead
from onebase.tasks import get_task
from onebase.tasks.multilabel import PRIOR, LabelsHead, best_threshold, highest
from onebase.training.prepare import make_task

FAST = {"epochs": 2, "batch_size": 16, "seed": 0, "attention": "keep", "dtype": "float32"}
WORDS = list(dict.fromkeys(word for text in TEXTS for word in text.split()))
TOPICS = {
    "food": ["bread", "soup", "cheese"],
    "sport": ["football", "tennis", "rowing"],
    "law": ["court", "judge", "trial"],
}


def topics(count: int = 80) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for i in range(count):
        names = [name for j, name in enumerate(TOPICS) if (i >> j) & 1 and (name != "law" or i % 3 == 0)]
        words = [TOPICS[name][i % 3] for name in names] or ["weather"]
        rows.append({"text": f"Number {i} is about {' and '.join(words)}.", "labels": names})
    return rows


def long_rows(count: int = 48) -> list[dict[str, object]]:
    """Word sequences of 5 to 50 words; the label says whether one word is anywhere in them."""
    rows: list[dict[str, object]] = []
    for i in range(count):
        words = [WORDS[(i * 7 + j * (1 + i % 3)) % len(WORDS)] for j in range(5 + 15 * (i % 4))]
        rows.append({"text": " ".join(words), "labels": [w for w in ("river", "tree") if w in words]})
    return rows


@pytest.fixture(scope="module")
def base() -> ob.Base:
    return ob.load_base("minilm")


@pytest.fixture(scope="module")
def tiny() -> ob.Base:
    return ob.Base(make("bert"), tiny_tokenizer(), id="tiny")


def test_the_best_threshold_of_many_rows_and_one_half_of_few() -> None:
    random = torch.Generator().manual_seed(0)
    targets = (torch.rand(400, generator=random) < 0.3).double()
    chances = torch.sigmoid(2 * targets - 2.5 + torch.randn(400, generator=random)).double()
    found = best_threshold(chances, targets)
    grid = [(f1_score(targets, chances >= t), t) for t in np.linspace(0.01, 0.99, 981)]
    top, at = max(grid)
    positive = float(targets.sum())
    assert f1_score(targets, chances >= found) > top - 0.02
    assert found == pytest.approx(0.5 + positive / (positive + PRIOR) * (at - 0.5), abs=0.02)
    assert best_threshold(torch.tensor([0.1, 0.2]).double(), torch.zeros(2).double()) == 0.5
    one = best_threshold(torch.tensor([0.1, 0.3, 0.2]).double(), torch.tensor([0.0, 1.0, 0.0]).double())
    assert one == 0.5  # a single positive row moves it to .5 - .25 / 11, which gives the row no label either
    assert best_threshold(torch.full((90,), 0.4).double(), torch.tensor([1.0] * 40 + [0.0] * 50).double()) < 0.4


def test_loss_is_the_weighted_cross_entropy_of_each_label(tiny: ob.Base) -> None:
    data = ob.load_data(topics(), task="multilabel")
    assert data.labels == ("food", "law", "sport")
    spec = make_task(tiny, data)
    counts = [sum(name in many for many in data.train["labels"]) for name in data.labels]
    expected = [min(max((len(data.train) - c) / c, 1), 10) for c in counts]
    assert spec["weights"] == pytest.approx(expected, rel=1e-3)
    tiny.add("topics", "lora(rank=2)", task=spec)
    head = tiny.adapters["topics"].head
    assert isinstance(head, LabelsHead)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    examples = encode(tiny, spec, data)["train"]
    found = run_examples(tiny, "topics", examples)
    for i in (0, 3, 11):
        chances = torch.sigmoid(found.values[i].double())
        y = [float(name in data.train["labels"][i]) for name in data.labels]
        terms = [-(w * t * torch.log(p) + (1 - t) * torch.log(1 - p)) for p, t, w in zip(chances, y, spec["weights"])]
        assert float(sum(terms) / 3) == pytest.approx(float(found.sums[i]), rel=1e-4)
    tiny.remove("topics")


def test_a_label_counts_where_any_window_has_it(tiny: ob.Base) -> None:
    data = ob.load_data(long_rows(), task="multilabel")
    run = ob.train(tiny, data, "lora(rank=2)", max_length=16, overlap=4, **FAST)
    spec, head = tiny.adapters[run.name].task, tiny.adapters[run.name].head
    assert isinstance(head, LabelsHead)
    examples = encode(tiny, spec, data)["train"]
    assert examples.units == len(data.train) < len(examples)
    found = run_examples(tiny, run.name, examples)
    top = highest(examples, found.values)
    assert examples.unit is not None
    for unit in (0, 5, examples.units - 1):
        rows = [found.values[i] for i in (examples.unit == unit).nonzero().flatten().tolist()]
        assert torch.equal(top[unit], torch.stack(rows).amax(0))
    text = max(data.train.text, key=len)
    (answer,) = tiny.predict([text], run.name)
    assert answer.windows == len(encode_windows(tiny.tokenizer, spec, [text])[0]) > 1
    unit = data.train.text.index(text)
    assert list(answer.probabilities.values()) == pytest.approx(torch.sigmoid(top[unit]).tolist(), abs=1e-5)
    scores = get_task("multilabel").judge(spec, head, examples, found)
    actual = [[name in many for name in data.labels] for many in data.train["labels"]]
    given = (torch.sigmoid(top) >= head.thresholds).numpy()
    assert scores.value == pytest.approx(f1_score(actual, given, average="micro", zero_division=1.0))
    tiny.remove(run.name)


def test_an_adapter_is_trained_stored_and_asked(base: ob.Base) -> None:
    run = ob.train(base, topics(), "lora(rank=2)", name="topics", task="multilabel", **FAST | {"epochs": 4})
    assert run.metric == "micro_f1" and {"macro_f1", "exact_match", "per_label"} <= run.metrics.keys()
    assert run.base_value > 0.5 and run.test is not None and run.test.test == "paired bootstrap"
    text = "Number 7 is about soup and football."
    (before,) = base.predict([text], "topics")
    assert before.labels is not None and {"food", "sport"} <= set(before.labels)
    assert set(before.probabilities) == {"food", "law", "sport"}
    kept = base.adapters["topics"].head.thresholds.clone()  # type: ignore[union-attr]
    base.remove("topics")
    base.load("topics")
    assert torch.equal(base.adapters["topics"].head.thresholds, kept)  # type: ignore[union-attr]
    mixed = base.predict([text, "short", text], ["topics", None, "topics"])
    assert mixed[0].labels == before.labels and mixed[1].labels is None
    assert mixed[2].probabilities == pytest.approx(before.probabilities, abs=1e-5)
    result = ob.evaluate(base, topics(30), "topics")
    assert result.base is not None and result.rows == 30 and result.test is not None
    with pytest.raises(DataError, match="'travel'"):
        ob.evaluate(base, [{"text": f"text {i}", "labels": "travel"} for i in range(10)], "topics")
    base.remove("topics")


def test_the_command_line_shows_labels(tmp_path, base: ob.Base) -> None:
    ob.train(base, topics(), "lora(rank=2)", name="topics", task="multilabel", **FAST)
    base.remove("topics")
    path, table = tmp_path / "topics.jsonl", tmp_path / "out.csv"
    path.write_text("\n".join(json.dumps(row) for row in topics(20)))
    call = CliRunner().invoke
    plan = call(app, ["train", "-d", str(path), "--task", "multilabel", "--dry-run"])
    assert plan.exit_code == 0 and "label: " in plan.stdout and "food (" in plan.stdout, plan.output
    scored = call(app, ["eval", "topics", "-d", str(path)])
    assert scored.exit_code == 0 and "micro_f1" in scored.stdout and "precision" in scored.stdout, scored.output
    said = call(app, ["predict", "-a", "topics", "Number 7 is about soup and football."])
    assert said.exit_code == 0 and "food" in said.stdout, said.output
    assert call(app, ["predict", "-a", "topics", "-f", str(path), "-o", str(table)]).exit_code == 0
    assert table.read_text().splitlines()[0].endswith("topics.labels,topics.p(food),topics.p(law),topics.p(sport)")
    document = "Number 1 is about soup. Number 2 is about the weather. Number 3 is about football and soup."
    parts = call(app, ["predict", "-a", "topics", "--split", "sentences", "--json", document])
    assert parts.exit_code == 0, parts.output
    flagged = json.loads(parts.stdout)["flagged"]
    assert {(f["index"], f["label"]) for f in flagged} >= {(0, "food"), (2, "food"), (2, "sport")}


def test_rare_labels_weigh_as_asked(tiny: ob.Base) -> None:
    rows = [{"text": f"text {i}", "labels": ["all"] + (["rare"] if i % 25 == 0 else [])} for i in range(200)]
    data = ob.load_data(rows, task="multilabel")
    assert make_task(tiny, data)["weights"] == [1.0, 10.0]
    balanced = make_task(tiny, data, class_weights="balanced")["weights"]
    assert balanced[0] < 0.01 and balanced[1] > 15
    assert "weights" not in make_task(tiny, data, class_weights="none")
    with pytest.raises(ConfigError, match="class_weights = 'heavy'"):
        make_task(tiny, data, class_weights="heavy")


def test_a_label_that_is_always_or_never_there_has_a_finite_baseline() -> None:
    from onebase.tasks.frozen import fit_labels

    x = torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
    y = torch.stack([torch.zeros(600), torch.ones(600), (x[:, 0] > 0).float()], 1)
    head = LinearHead(4, 3)
    fit_labels(head, x, y, x[:0], y[:0], [1.0, 1.0, 1.0])
    out = head(x).detach()
    assert bool((out[:, 0] < 0).all()) and bool((out[:, 1] > 0).all())
    assert float(((out[:, 2] > 0) == y[:, 2].bool()).double().mean()) > 0.9


def test_labels_are_read_in_every_way_people_write_them(tmp_path) -> None:
    rows = topics(24)
    data = ob.load_data(rows, task="multilabel")
    for mark in "|;,":
        written = [{"text": row["text"], "labels": mark.join(row["labels"])} for row in rows]  # type: ignore[arg-type]
        assert ob.load_data(written, task="multilabel").digest == data.digest
    flags = [{"text": row["text"], **{n: int(n in row["labels"]) for n in sorted(TOPICS)}} for row in rows]  # type: ignore[operator]
    assert ob.load_data(flags, task="multilabel").digest == data.digest
    assert ob.load_data(flags, columns={"labels": ["food", "law", "sport"]}).digest == data.digest
    two = ob.load_data(flags, columns={"labels": ["food", "sport"]}, limit=10)
    assert two.labels == ("food", "sport") and len(two.train) == 10
    lines = "\n".join(f'"{row["text"]}",{";".join(row["labels"])}' for row in rows)  # type: ignore[arg-type]
    (tmp_path / "a.csv").write_text("text,labels\n" + lines)
    assert ob.load_data(tmp_path / "a.csv", task="multilabel").digest == data.digest


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "missing label"), (["a", "a"], "label given twice"), (3.5, "no list"), (["a", " "], "empty")],
)
def test_labels_that_cannot_be_read_are_named_by_row(value: object, said: str) -> None:
    rows = topics(20)
    rows[4]["labels"] = value
    with pytest.raises(DataError, match="row 5") as error:
        ob.load_data(rows, task="multilabel")
    assert said in str(error.value)


def test_flags_that_are_neither_0_nor_1_and_rows_without_any_label_are_refused() -> None:
    rows = [{"text": f"text {i}", "a": i % 2, "b": "2" if i == 3 else "0"} for i in range(20)]
    with pytest.raises(DataError, match="neither 0 nor 1: column 'b' holds '2'"):
        ob.load_data(rows, columns={"labels": ["a", "b"]})
    with pytest.raises(DataError, match="no row has any label"):
        ob.load_data([{"text": f"text {i}", "labels": ""} for i in range(20)], task="multilabel")
