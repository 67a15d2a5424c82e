"""Question answering: spans to tokens and back, the best span, losses, no answer, virtual tokens, bad rows."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import onebase as ob
from onebase.encode import Encoded, encode_contexts
from onebase.errors import ConfigError, DataError
from onebase.examples import encode, forward, run_examples
from onebase.tasks import get_task
from onebase.tasks.answering import NOWHERE, answer_f1, candidates, compare_answers, normalised, token_span
from onebase.tasks.qa import NO_ANSWER, SpanHead, _span_loss, best_margin
from onebase.training.prepare import make_task

sys.path.insert(0, str(Path(__file__).parent / "contract"))
from families import TEXTS, make

FAST: dict[str, Any] = {"batch_size": 16, "seed": 0, "attention": "keep", "dtype": "float32"}
PEOPLE, PLACES = ["Anna", "Paul", "Maria", "John", "Lena", "Omar"], ["Paris", "Berlin", "Rome", "Oslo", "Lyon"]


def questions(count: int = 60, none: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Return questions on small notes; every `none`-th has no answer."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        who, where, year = draw.choice(PEOPLE), draw.choice(PLACES), f"19{draw.randrange(10, 99)}"
        context = f"Note {i}. {who} moved to {where} in {year}. The weather was cold, and nobody came."
        question, answer = draw.choice([("Who moved?", who), ("Where to?", where), ("In which year?", year)])
        if none and i % none == 0:
            question, answer = "What did it cost?", ""
        rows.append({"question": question, "context": context, "answer": answer})
    return rows


@pytest.fixture(scope="module")
def base() -> Any:
    found = ob.load_base("minilm")
    yield found
    found.close()


@pytest.fixture(scope="module")
def run(base: ob.Base, tmp_path_factory: pytest.TempPathFactory) -> ob.Run:
    store = ob.Store(tmp_path_factory.mktemp("store"))
    return ob.train(base, questions(80, none=5), "lora(rank=8)", name="notes", store=store, epochs=2, **FAST)


def test_answers_compare_as_in_squad() -> None:
    assert normalised("  The U.S.  Army, a force ") == "us army force"
    assert answer_f1("the cat sat", "A cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert answer_f1("dog", "cat") == 0 and answer_f1("", "") == 1 and answer_f1("the", "") == 1
    assert compare_answers("Paris", ["in Paris", "paris"]) == (1.0, 1.0)
    assert compare_answers("", []) == (1.0, 1.0) and compare_answers("x", []) == (0.0, 0.0)


def test_every_answer_in_every_window_maps_to_its_exact_characters(base: ob.Base) -> None:
    context = (
        "  In 1889, Élodie O'Neill-Smith (27) paid $3.50 at café “Zürich”;\n\nlater  unbelievably 1,000,000 more. " * 4
    )
    spec = {"max_length": 40, "windows": True, "overlap": 12}
    (rows,) = encode_contexts(base.tokenizer, spec, ["who paid?"], [context])
    assert len(rows) > 3 and all(len(row.ids) <= 40 for row in rows)
    pieces, found = (
        ["Élodie O'Neill-Smith", "27", "$3.50", "Zürich", "1889", "1,000,000 more", "later  unbelievably"],
        0,
    )
    for piece in pieces:
        start = context.index(piece, 110)
        for row in rows:
            first, last = token_span(row, start, start + len(piece))
            spots = [spot for spot in row.offsets or () if spot is not None]
            inside = spots[0][0] <= start and spots[-1][1] >= start + len(piece)
            assert (first, last) == (NOWHERE, NOWHERE) or inside
            if not inside:
                continue
            found += 1
            logits = torch.full((len(row.ids), 2), -20.0)
            logits[first, 0], logits[last, 1] = 20.0, 20.0
            (best, *_), nothing = candidates([row], [logits], context, 12, 3)
            assert context[best.start : best.end] == piece and best.start == start
            assert best.score == pytest.approx(0.0, abs=1e-6) and nothing < -30
    assert found >= len(pieces)


def test_windows_cover_the_context_and_a_long_question_is_cut(base: ob.Base) -> None:
    context = " ".join(f"word{i}" for i in range(80))
    spec = {"max_length": 48, "windows": True, "overlap": 8}
    (rows,) = encode_contexts(base.tokenizer, spec, ["what? " * 60], [context])
    assert all(len(row.ids) <= 48 and row.cut > 0 for row in rows)
    covered = {spot for row in rows for spot in row.offsets or () if spot is not None}
    whole = base.tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert covered == set(whole)
    (short,) = encode_contexts(base.tokenizer, {**spec, "windows": False}, ["what?"], [context])
    assert len(short) == 1 and short[0].cut == len(base.tokenizer("what?", context)["input_ids"]) - 48


def test_the_best_span_is_the_best_of_all(base: ob.Base) -> None:
    context = "one two three four five six seven eight nine ten"
    (rows,) = encode_contexts(base.tokenizer, {"max_length": 64}, ["which?"], [context])
    row, longest = rows[0], 3
    for seed in range(5):
        logits = torch.randn(len(row.ids) + 4, 2, generator=torch.Generator().manual_seed(seed))  # padded
        sure = torch.log_softmax(logits[: len(row.ids)].double(), 0)
        every = {}
        for i, a in enumerate(row.offsets or ()):
            for j, b in enumerate(row.offsets or ()):
                if a is not None and b is not None and i <= j < i + longest:
                    every[a[0], b[1]] = float(sure[i, 0] + sure[j, 1])
        expected = sorted(every.items(), key=lambda item: -item[1])[:5]
        ranked, nothing = candidates(rows, [logits], context, longest, 5)
        assert [(c.start, c.end) for c in ranked] == [place for place, _ in expected]
        assert [c.score for c in ranked] == pytest.approx([score for _, score in expected])
        assert nothing == pytest.approx(float(sure[0].sum()))


def test_the_loss_is_the_mean_of_two_cross_entropies(tokenizer: Any) -> None:
    """Tiny random BERT: each window's plain cross-entropies of start and end; padding changes nothing."""
    with ob.Base(make("bert"), tokenizer) as base:
        rows = [
            {"question": "the river", "context": " ".join([text, TEXTS[(i + 1) % 5]] * (i % 2 + 1)), "answer": "the"}
            for i, text in enumerate(TEXTS[:3])
        ] * 4
        data = ob.load_data({"train": rows, "validation": rows[:2]})
        spec = make_task(base, data, max_length=16, overlap=4)
        examples = encode(base, spec, data)["train"]
        assert len(examples) > examples.units and examples.targets is not None
        assert any(t.tolist() == [NOWHERE, NOWHERE] for t in examples.targets)
        head = SpanHead(32).requires_grad_(False)
        torch.manual_seed(0)
        torch.nn.init.normal_(head.weight)
        found = run_examples(base, None, examples, 5, spec, head)
        for number, row in enumerate(examples.rows):
            with torch.no_grad():
                logits = head(base.model(input_ids=torch.tensor([row.ids])).last_hidden_state[0])
            plain = [F.cross_entropy(logits[None, :, k], examples.targets[number, k][None]) for k in (0, 1)]
            assert float(found.sums[number]) == pytest.approx(float(sum(plain)) / 2, rel=1e-4)
            assert torch.allclose(found.values[number][: len(row.ids)], logits, atol=1e-5)
        assert torch.equal(found.counts, torch.ones(len(examples)))
        flat = torch.cat([value[: len(row.ids)] for value, row in zip(found.values, examples.rows)])
        sizes = torch.tensor([len(row.ids) for row in examples.rows])
        window = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        targets = examples.targets + (sizes.cumsum(0) - sizes)[:, None]
        assert float(_span_loss(flat, window, targets)) == pytest.approx(float(found.sums.mean()), rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5"])
def test_virtual_tokens_do_not_shift_answers(family: str, tokenizer: Any) -> None:
    """A prompt made of the embeddings of words answers as these words before the question do, at the same places."""
    words, context = "the cold river", "we walk along the river and talk about the work of the day"
    with ob.Base(make(family), tokenizer) as base, torch.no_grad():
        data = ob.load_data(
            [{"question": TEXTS[1], "context": f"{context} {w}", "answer": w} for w in TEXTS[3].split()]
        )
        spec = make_task(base, data, max_length=48)
        for name, method in (("a", "prompt(length=3, init='uniform')"), ("x", "prefix(length=4)")):
            base.add(name, method, task=spec)
            torch.manual_seed(0)
            torch.nn.init.normal_(base.adapters[name].head.weight)  # type: ignore[union-attr]
        ids = torch.tensor(tokenizer(words)["input_ids"])
        next(base.adapters["a"].module.parameters()).copy_(base.anatomy.stacks[0].embed(ids))  # type: ignore[operator]
        question = "the small bird"
        (row,) = get_task("qa").encode_inputs(base, spec, [question], [context])[0]
        longer = torch.cat([ids, torch.tensor(row.ids)])[None]
        with base.use(None):
            states = base.states({"input_ids": longer, "attention_mask": torch.ones_like(longer)}, None)[0]
        logits = base.adapters["a"].head(states)[len(ids) :]  # type: ignore[misc]
        (expected, *_), _ = candidates([row], [logits], context, spec["answer_length"], 5)
        mixed = base.predict([question] * 3, ["a", "x", "a"], pairs=[context, context, context + " " + context])
        assert mixed[0].spans is not None
        best = mixed[0].spans[0]
        assert (best.start, best.end) == (expected.start, expected.end)
        assert best.probability == pytest.approx(float(torch.tensor(expected.score).exp()), rel=1e-3)
        for answer in mixed:
            for span in answer.spans or ():
                assert span.text and span.text in context + " " + context and not span.text.startswith(" ")


def test_the_margin_is_the_best_of_all() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        trials = [(draw.uniform(-3, 3), draw.choice([-1.0, 1.0, 0.5])) for _ in range(draw.randrange(1, 9))]
        best = best_margin(trials)
        gain = sum(g for lead, g in trials if lead > best)
        assert gain == pytest.approx(
            max(sum(g for lead, g in trials if lead > cut) for cut in [-9.0, 0.0, *(lead for lead, _ in trials)])
        )
    assert best_margin([]) == 0.0 and best_margin([(2.0, 1.0), (-1.0, -1.0)]) == 0.0


def test_a_run_scores_and_answers(base: ob.Base, run: ob.Run) -> None:
    assert run.metric == "answer_f1" and run.kind == "qa" and run.value > 0.7
    assert run.test is not None and run.test.test == "paired bootstrap" and 0 <= run.base_value <= 1
    context = "Note 7.  Omar moved to Lyon in 1955. The weather was cold, and nobody came."
    found = base.predict(["Who moved?", "What did it cost?"], "notes", pairs=[context] * 2)
    best = found[0].spans[0]  # type: ignore[index]
    assert (best.text, best.label) == ("Omar", "") and context[best.start : best.end] == "Omar"
    nothing = found[1].spans[0]  # type: ignore[index]
    assert (nothing.text, nothing.label, nothing.start, nothing.end) == ("", NO_ANSWER, 0, 0)
    assert all(0 <= span.probability <= 1 for answer in found for span in answer.spans or ())
    again = ob.evaluate(base, questions(20, none=5, seed=9), "notes")
    assert again.base is not None and again.test is not None and again.adapter.value > 0.6
    assert {"exact_match", "answered_f1", "no_answer_accuracy", "loss"} <= again.adapter.metrics.keys()


def test_an_answer_deep_in_a_long_context_is_found(base: ob.Base, run: ob.Run) -> None:
    adapter = base.adapters["notes"]
    whole = dict(adapter.task)
    adapter.task = {**whole, "max_length": 64, "overlap": 24}
    filler = "The river was quiet and the road was empty, and there was nothing to report from there. "
    context = filler * 8 + "Note 3. Lena moved to Oslo in 1931. " + filler * 2
    try:
        (answer,) = base.predict("Who moved?", "notes", pairs=context)
    finally:
        adapter.task = whole
    assert answer.windows > 3
    best = answer.spans[0]  # type: ignore[index]
    assert best.text == "Lena" and best.start == context.index("Lena")


def test_mixed_rows_answer_as_alone_and_stored_ones_the_same(base: ob.Base, run: ob.Run, tmp_path: Path) -> None:
    store = ob.Store(tmp_path)
    base.add("other", "prompt(length=4)", task=dict(base.adapters["notes"].task), seed=1)
    base.adapters["other"].head.load_state_dict(base.adapters["notes"].head.state_dict())  # type: ignore[union-attr]
    contexts = [row["context"] for row in questions(4, seed=4)]
    names = ["notes", "other", None, "notes"]
    mixed = base.predict(["Who moved?"] * 4, names, pairs=contexts)
    base.save("other", store=store)
    base.remove("other")
    base.load("other", store=store)
    for name, context, found in zip(names, contexts, mixed):
        (alone,) = base.predict("Who moved?", name, pairs=context)
        if name is None:
            assert torch.allclose(found.embedding, alone.embedding, atol=1e-5)  # type: ignore[arg-type]
            continue
        assert [(s.start, s.end) for s in found.spans or ()] == [(s.start, s.end) for s in alone.spans or ()]
        assert [s.probability for s in found.spans or ()] == pytest.approx(
            [s.probability for s in alone.spans or ()], rel=1e-3, abs=1e-9
        )
    base.remove("other")


def test_answers_in_every_shape(tmp_path: Path) -> None:
    context = "The bridge was built in 1889, and repaired in 1921."
    shapes = [
        {"answers": {"text": ["1889", "in 1889"], "answer_start": [24, 21]}},
        {"answers": [{"text": "1889", "answer_start": 24}]},
        {"answers": ["1889"]},
        {"answers": {"text": [], "answer_start": []}},
        {"answers": []},
        {"answers": "1889"},
        {"answers": None},
        {"answers": '{"text": ["1921"], "answer_start": [46]}'},
    ]
    rows = [{"question": "When?", "context": f"{context} {i}", **shape} for i, shape in enumerate(shapes)]
    path = tmp_path / "qa.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = ob.load_data({"train": rows})
    assert data.kind == "qa"
    for loaded in (data, ob.load_data(path)):
        found = {}
        for rows_of in (loaded.train, loaded.validation, loaded.test):
            found |= {c[-1]: a for c, a in zip(rows_of["context"], rows_of["answers"])}
        one = (("1889", 24),)
        assert [found[str(i)] for i in range(8)] == [
            (("1889", 24), ("in 1889", 21)), one, one, (), (), one, (), (("1921", 46),)
        ]  # fmt: skip
    flat = tmp_path / "flat.csv"
    flat.write_text(
        "question,context,answer,answer_start\n" + f'When?,"{context}",1921,46\n' * 8 + f'Why?,"{context}",,\n'
    )
    with pytest.raises(DataError, match="1 different texts in 9 rows"):
        ob.load_data(flat)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("1890", "answer that is not in its context: '1890' does not occur in it"),
        ({"text": ["1889"], "answer_start": [3]}, "is said to start at 3, where the context has ' bri'"),
        ({"text": ["1889"], "answer_start": [1, 2]}, "answers without as many starts: 1 texts, 2 starts"),
        (
            {"text": ["1889"], "answer_start": ["x"]},
            "answer start that is no position: 'x'; expected characters from 0",
        ),
        ([""], "empty answer"),
    ],
)
def test_bad_answers_are_named(answers: Any, message: str) -> None:
    rows = [{"question": "When?", "context": f"The bridge was built in 1889. {i}", "answers": "1889"} for i in range(9)]
    rows[5]["answers"] = answers
    with pytest.raises(DataError, match=f"row 6, column 'answers': .*{message}"):
        ob.load_data(rows)


def test_settings_and_data_that_cannot_be(base: ob.Base) -> None:
    data = ob.load_data(questions(20))
    with pytest.raises(ConfigError, match="answer_length = 0"):
        make_task(base, data, answer_length=0)
    with pytest.raises(ConfigError, match="max_length = 8: question and context need at least 16"):
        make_task(base, data, max_length=8)
    mixed = ob.load_data({"train": questions(20), "validation": questions(5, none=2, seed=1)})
    with pytest.raises(DataError, match="row 1: no answer, but every question of the training rows has one"):
        encode(base, make_task(base, mixed), mixed)
    with pytest.raises(DataError, match="no question has an answer in the training rows"):
        make_task(base, ob.load_data(questions(20, none=1)))


def test_gradients_reach_adapter_and_head(base: ob.Base, run: ob.Run) -> None:
    data = ob.load_data(questions(20, none=4))
    adapter = base.adapters["notes"]
    examples = encode(base, adapter.task, data)["train"]
    forward(base, "notes", examples, [0, 1, 2]).sums.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter.parameters())
    for parameter in adapter.parameters():
        parameter.grad = None
    model = base.as_model("notes")
    rows = [Encoded(examples.rows[i].ids, examples.rows[i].types) for i in (0, 1)]
    from onebase.encode import collate, pad_id

    assert examples.targets is not None
    out = model(**collate(rows, pad_id(base.tokenizer)), labels=examples.targets[:2])
    with torch.no_grad():
        assert float(out.loss.detach()) == pytest.approx(
            float(forward(base, "notes", examples, [0, 1]).sums.mean()), rel=1e-4
        )


def test_the_command_line(base: ob.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onebase.cli.main import app

    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
    path = tmp_path / "notes.jsonl"
    path.write_text("\n".join(map(json.dumps, questions(40, none=5))), encoding="utf-8")
    runner = CliRunner()
    made = runner.invoke(app, ["train", "-d", str(path), "--epochs", "1", "-m", "lora(rank=4)", "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["metric"] == "answer_f1"
    context = "Note 7. Omar moved to Lyon in 1955."
    shown = runner.invoke(app, ["predict", "-a", "notes", "Who moved?", "--pair", context, "--json"])
    assert shown.exit_code == 0, shown.output
    spans = json.loads(shown.stdout)["rows"][0]["predictions"]["notes"]["spans"]
    assert spans and all(context[s["start"] : s["end"]] == s["text"] for s in spans)
    table = runner.invoke(app, ["predict", "-a", "notes", "-f", str(path)])
    assert table.exit_code == 0 and len(table.stdout.splitlines()) == 41
    scored = runner.invoke(app, ["eval", "notes", "-d", str(path), "--json"])
    assert json.loads(scored.stdout)["base_score"]["metrics"]["n"] == 40
    planned = runner.invoke(app, ["train", "-d", str(path), "--dry-run"])
    assert planned.exit_code == 0 and "moved to" in planned.stdout
