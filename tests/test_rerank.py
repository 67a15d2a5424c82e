"""Reranking: metrics by hand, relevance in 0 to 1, queries kept together, ranking, the command line."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from families import make, tiny_tokenizer
from sklearn.metrics import average_precision_score
from typer.testing import CliRunner

import onebase as ob
from onebase.cli.main import app
from onebase.cli.output import SHARES
from onebase.errors import DataError, UnsupportedError
from onebase.examples import encode, run_examples
from onebase.heads import LinearHead
from onebase.tasks.metrics import METRICS, average_precision
from onebase.tasks.rerank import reciprocal_ranks
from onebase.training.prepare import make_task

FAST = {"epochs": 1, "batch_size": 16, "seed": 0, "attention": "keep", "dtype": "float32"}
THINGS = ["river", "bread", "court", "piano", "engine", "garden", "winter", "market", "bridge", "doctor"]


def searches(queries: int = 30, documents: int = 3) -> list[dict[str, object]]:
    """Per query documents of which the first one is about the same thing."""
    rows: list[dict[str, object]] = []
    for i in range(queries):
        for j in range(documents):
            thing = THINGS[(i + j * (1 + i // 10)) % len(THINGS)]
            text = f"A note on the {thing}, number {i * 10 + j}."
            rows.append({"query": f"What about the {THINGS[i % 10]} ({i})?", "document": text, "label": int(j == 0)})
    return rows


@pytest.fixture(scope="module")
def base() -> ob.Base:
    return ob.load_base("minilm")


@pytest.fixture(scope="module")
def tiny() -> ob.Base:
    return ob.Base(make("bert"), tiny_tokenizer(), id="tiny")


def test_reciprocal_ranks_by_hand() -> None:
    pairs = np.array([[0.9, 0], [0.5, 1], [0.4, 1], [0.1, 0], [0.8, 1], [0.7, 0], [0.6, 0], [0.3, 1], [0.3, 0]])
    group = [0, 0, 0, 1, 2, 3, 3, 4, 4]
    # query 0: the best relevant one is second; 1 and 2 have one document; 3 has none that is relevant; 4 is a tie
    assert reciprocal_ranks(pairs, group).tolist() == [0.5, 0.5]


def test_average_precision_is_that_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    for digits in (1, 8):  # one digit: many ties
        rows = np.stack([np.round(random.random(60), digits), random.random(60) < 0.3], 1)
        assert average_precision(rows) == pytest.approx(average_precision_score(rows[:, 1], rows[:, 0]))
    assert average_precision(np.array([[1.0, 0.0], [2.0, 0.0]])) == 0.0


def test_relevance_is_scaled_and_the_loss_is_cross_entropy(tiny: ob.Base) -> None:
    rows = [{"query": f"the river {i // 3}", "document": f"cold rain {i}", "label": i % 3 * 2 + 1} for i in range(60)]
    data = ob.load_data(rows, task="rerank")
    spec = make_task(tiny, data)
    assert (spec["lowest"], spec["highest"], spec["pair"]) == (1.0, 5.0, True)
    tiny.add("search", "lora(rank=2)", task=spec)
    head = tiny.adapters["search"].head
    assert isinstance(head, LinearHead)
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(0))
    examples = encode(tiny, spec, data)["train"]
    assert examples.targets is not None
    assert examples.targets[:, 0].tolist() == [(float(x) - 1) / 4 for x in data.train["label"]]
    found = run_examples(tiny, "search", examples)
    for i in (0, 1, 2):
        p, t = torch.sigmoid(found.values[i].double()).item(), examples.targets[i].item()
        assert -(t * np.log(p) + (1 - t) * np.log(1 - p)) == pytest.approx(float(found.sums[i]), rel=1e-4)
    tiny.remove("search")


def test_documents_of_a_query_stay_on_one_side() -> None:
    data = ob.load_data(searches(), task="rerank")
    sides = [set(rows["query"]) for rows in (data.train, data.validation, data.test)]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    limited = ob.load_data(searches(), task="rerank", limit=9)
    assert len(set(limited.train["query"])) == 3  # whole queries


def test_an_adapter_is_trained_stored_and_ranks(base: ob.Base) -> None:
    run = ob.train(base, searches(), "lora(rank=2)", name="search", task="rerank", **FAST)
    assert run.metric == "mrr" and {"relevance", "first", "queries"} <= run.metrics.keys()
    assert run.base_value > 0.7 and run.test is not None and run.test.n == run.metrics["queries"]
    query, documents = (
        "What about the piano (99)?",
        [f"A note on the {t}, number 5." for t in ("bread", "piano", "court")],
    )
    ranked = base.rank(query, documents, "search")
    assert sorted(i for i, _ in ranked) == [0, 1, 2] and ranked[0][0] == 1
    assert all(0 <= a <= 1 for _, a in ranked) and ranked == sorted(ranked, key=lambda pair: -pair[1])
    alone = [base.predict(query, "search", pairs=d)[0].value for d in documents]
    assert [value for _, value in sorted(ranked)] == pytest.approx(alone, abs=1e-5)
    base.remove("search")
    base.load("search")
    assert base.rank(query, documents, "search")[0] == (1, pytest.approx(ranked[0][1], abs=1e-5))
    result = ob.evaluate(base, searches(8), "search")
    assert result.adapter.metric == "mrr" and result.base is not None
    base.add("other", "lora(rank=2)")
    with pytest.raises(UnsupportedError, match="trained for rerank"):
        base.rank(query, documents, "other")
    assert base.rank(query, documents[0], "search") == base.rank(query, documents[:1], "search")
    base.remove("other")
    base.remove("search")


def test_queries_with_one_document_give_average_precision(tiny: ob.Base) -> None:
    rows = [{"query": f"the river {i}", "document": f"cold rain {i}", "label": i % 2} for i in range(60)]
    run = ob.train(tiny, rows, "lora(rank=2)", task="rerank", **FAST)
    assert run.metric == "relevance" and "mrr" not in run.metrics and run.test is not None
    tiny.remove(run.name)


def test_relevance_that_is_no_number_is_named_by_row() -> None:
    rows = searches(10)
    rows[2]["label"] = "yes"
    with pytest.raises(DataError, match=r"row 3.*no number: 'yes'"):
        ob.load_data(rows, task="rerank")
    with pytest.raises(DataError, match="every label is 1"):
        ob.load_data([{**row, "label": 1} for row in searches(10)], task="rerank")


def test_the_command_line_from_training_to_answers(tmp_path, base: ob.Base) -> None:
    path = tmp_path / "searches.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["query", "document", "label"])
        writer.writeheader()
        writer.writerows(searches())
    call = CliRunner().invoke
    sets = [word for key, value in FAST.items() for word in ("--set", f"{key}={value}")]
    plan = call(app, ["train", "-d", str(path), "--task", "rerank", "--dry-run", "--json"])
    assert plan.exit_code == 0 and json.loads(plan.stdout)["data"]["kind"] == "rerank", plan.output
    done = call(
        app, ["train", "-d", str(path), "--task", "rerank", "--name", "find", "-m", "lora(rank=2)", "--json", *sets]
    )
    assert done.exit_code == 0 and json.loads(done.stdout)["metric"] == "mrr", done.output
    scored = call(app, ["eval", "find", "-d", str(path)])
    assert scored.exit_code == 0 and "mrr" in scored.stdout
    said = call(app, ["predict", "-a", "find", "What about the piano?", "--pair", "A note on the piano."])
    assert said.exit_code == 0 and 0.5 < float(said.stdout.splitlines()[1].split("\t")[2]) <= 1, said.output
    answer = call(app, ["predict", "-a", "find", "--json", "-f", str(path)])
    rows = json.loads(answer.stdout)["rows"]
    assert len(rows) == 90 and set(rows[0]["predictions"]["find"]) == {"value", "cut"}
    table = tmp_path / "out.csv"
    assert call(app, ["predict", "-a", "find", "-f", str(path), "-o", str(table)]).exit_code == 0
    assert "find.value" in table.read_text().splitlines()[0]


def test_shares_are_shown_as_the_metrics_say() -> None:
    assert {name for name, metric in METRICS.items() if metric.percent} <= set(SHARES)
