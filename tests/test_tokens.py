"""Token classification: words, tags and entities by hand, windows, losses, scores, predictions, bad rows."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import onebase as ob
from onebase.encode import IGNORED, Encoded, encode_windows
from onebase.errors import ConfigError, DataError
from onebase.examples import encode, run_examples
from onebase.tasks import Examples, get_task
from onebase.tasks.tagging import (
    bio_tags,
    entities,
    entity_counts,
    find_words,
    is_bio,
    place_words,
    tag_counts,
    words_of_span,
)
from onebase.tasks.task import Found
from onebase.training.prepare import make_task

sys.path.insert(0, str(Path(__file__).parent / "contract"))
from families import TEXTS, make

FAST: dict[str, Any] = {"epochs": 1, "batch_size": 16, "seed": 0, "attention": "keep", "dtype": "float32"}
PEOPLE, PLACES = ["Anna", "Paul", "Maria", "John", "Lena", "Omar"], ["Paris", "Berlin", "Rome", "Oslo", "Lyon"]


def sentences(count: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Return sentences with persons of one or two words, and places."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        one, place = draw.choice(PEOPLE), draw.choice(PLACES)
        words = draw.choice(
            [["Then", one, "walked", "to", place, "."], [place, "was", "cold", "and", one, "Smith", "left"]]
        )
        kind = {**dict.fromkeys(PEOPLE, "B-PER"), "Smith": "I-PER", **dict.fromkeys(PLACES, "B-LOC")}
        rows.append({"tokens": [*words, str(i)], "tags": [kind.get(word, "O") for word in [*words, str(i)]]})
    return rows


@pytest.fixture(scope="module")
def base() -> Any:
    found = ob.load_base("minilm")
    yield found
    found.close()


@pytest.fixture(scope="module")
def run(base: ob.Base, tmp_path_factory: pytest.TempPathFactory) -> ob.Run:
    store = ob.Store(tmp_path_factory.mktemp("store"))
    return ob.train(base, sentences(), "lora(rank=4)", name="names", store=store, **FAST)


def test_words_are_runs_of_letters_and_single_signs() -> None:
    text = "L'été, 3.5 km – non_stop"
    assert [text[a:b] for a, b in find_words(text)] == ["L", "'", "été", ",", "3", ".", "5", "km", "–", "non_stop"]
    assert find_words(" \n\t") == []
    assert words_of_span(find_words("the Paris airport"), 6, 8) == (1, 2)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-A I-A O B-B", [(1, 3, "A"), (4, 5, "B")]),
        ("B-A B-A I-A", [(0, 1, "A"), (1, 3, "A")]),
        ("I-A I-A O I-B", [(0, 2, "A"), (3, 4, "B")]),  # IOB1
        ("I-A B-A I-B", [(0, 1, "A"), (1, 2, "A"), (2, 3, "B")]),
        ("S-A B-A I-A E-A S-B O", [(0, 1, "A"), (1, 4, "A"), (4, 5, "B")]),  # BIOES
        ("U-A B-B L-B I-B", [(0, 1, "A"), (1, 3, "B"), (3, 4, "B")]),  # BILOU, and a tag too many
        ("O O", []),
    ],
)
def test_entities_by_hand(tags: str, found: list[tuple[int, int, str]]) -> None:
    assert entities(tags.split()) == found
    assert entities(bio_tags(found, len(tags.split()))) == found


def test_what_counts_as_bio() -> None:
    assert is_bio(["O", "B-PER", "I-PER"]) and is_bio(["S-a-b"])
    assert not is_bio(["O"]) and not is_bio(["NOUN", "O"]) and not is_bio(["B-PER", "X"]) and not is_bio(["B-"])


def test_counts_by_hand() -> None:
    right = ["B-A", "I-A", "O", "B-B", "O", "B-A"]
    mine = ["B-A", "I-A", "O", "B-A", "O", "O"]
    assert entity_counts(mine, right) == {"A": (1, 1, 1), "B": (0, 0, 1)}
    assert entity_counts(["B-A", "O", "O", "O", "O", "O"], right)["A"] == (0, 1, 2)  # half an entity is none
    assert tag_counts(["D", "O", "N"], ["D", "N", "V"]) == {"D": (1, 0, 0), "N": (0, 1, 1), "V": (0, 0, 1)}


def test_first_pieces_are_those_of_a_tokenizer_that_is_given_words(base: ob.Base) -> None:
    words = ["Kuschelbär", "isn't", "in", "U.S.", "waterproofing", "!", "naïveté"]
    tags = ["X", "O", "O", "X", "O", "O", "X", "O"]
    loaded = ob.load_data([{"tokens": [*words, str(i)], "tags": tags} for i in range(30)])
    spec = make_task(base, loaded)
    row = encode(base, spec, loaded)["train"].rows[0]
    own = base.tokenizer([*loaded.train["tokens"][0]], is_split_into_words=True)
    assert list(row.ids) == own["input_ids"]
    expected, seen = [], set()
    for word in own.word_ids():
        first = word is not None and word not in seen
        seen.add(word)
        expected.append(spec["labels"].index(loaded.train["tags"][0][word]) if first else IGNORED)
    assert list(row.labels or ()) == expected


def long_sentence(number: int, length: int = 90) -> dict[str, Any]:
    draw = random.Random(number)
    words = [draw.choice(["unbelievable", "Paris", "walked", "Smithsonian", "and"]) for _ in range(length)]
    return {"tokens": words, "tags": ["B-LOC" if word == "Paris" else "O" for word in words]}


def test_each_word_counts_once_where_it_has_most_context(base: ob.Base) -> None:
    words = long_sentence(3)["tokens"]
    text = " ".join(words)
    spots = find_words(text)
    rows = encode_windows(base.tokenizer, {"max_length": 32, "windows": True, "overlap": 12}, [text], offsets=True)[0]
    assert len(rows) > 3
    found = place_words(rows, text, spots)
    whole = encode_windows(base.tokenizer, {"max_length": 512}, [text], offsets=True)[0][0]
    for (start, _), place in zip(spots, found):
        assert place is not None
        window, token = place
        assert (rows[window].offsets or ())[token][0] == start  # type: ignore[index]
        context = {}
        for i, row in enumerate(rows):
            texty = [t for t, spot in enumerate(row.offsets or ()) if spot is not None]
            for t in texty:
                if (row.offsets or ())[t][0] == start:  # type: ignore[index]
                    left = 999 if i == 0 else t - texty[0]
                    right = 999 if i == len(rows) - 1 else texty[-1] - t
                    context[i] = min(left, right)
        assert context[window] == max(context.values())
    assert place_words([whole], text, spots) == [
        (0, next(t for t, s in enumerate(whole.offsets or ()) if s and s[0] == start)) for start, _ in spots
    ]


def test_a_cut_word_has_no_place_and_is_not_found(base: ob.Base) -> None:
    data = ob.load_data([long_sentence(i) for i in range(30)])
    spec = make_task(base, data, max_length=32, windows=False)
    examples = encode(base, spec, data)["train"]
    assert examples.cut == len(data.train) and "words were cut" in examples.facts["notes"][0]
    tags = examples.facts["tags"][0]
    assert len(examples.facts["words"][0]) < len(tags) == 90


@pytest.mark.parametrize("max_length", [60, 16])
def test_the_loss_is_the_plain_cross_entropy_of_every_word(tokenizer: Any, max_length: int) -> None:
    """Tiny random BERT, one token per word: windows or not, each word adds its cross-entropy once."""
    with ob.Base(make("bert"), tokenizer) as base:
        rows = [
            {"tokens": text.split() * 2, "tags": ["B-X" if len(w) > 4 else "O" for w in text.split() * 2]}
            for text in TEXTS
        ] * 4
        rows = [{"tokens": [*r["tokens"], "the"] * (i % 2 + 1), "tags": [*r["tags"], "O"] * (i % 2 + 1)}
                for i, r in enumerate(rows)]  # fmt: skip
        data = ob.load_data({"train": rows, "validation": rows[:3]})
        spec = make_task(base, data, max_length=max_length, overlap=6)
        examples = encode(base, spec, data)["train"]
        assert (len(examples) > examples.units) == (max_length == 16)
        head = get_task("tokens").head(spec, 32)
        assert head is not None
        torch.manual_seed(0)
        torch.nn.init.normal_(head.weight)  # type: ignore[arg-type]
        found = run_examples(base, None, examples, 7, spec, head)
        assert found.counts.sum() == sum(len(r["tokens"]) for r in rows)
        total, checked = 0.0, 0
        head.requires_grad_(False)
        for number, row in enumerate(examples.rows):
            with torch.no_grad():
                states = base.model(input_ids=torch.tensor([row.ids])).last_hidden_state[0]
            labels = torch.tensor(row.labels)
            total += float(F.cross_entropy(head(states), labels, ignore_index=IGNORED, reduction="sum"))
            best = head(states)[labels != IGNORED].argmax(-1)
            assert torch.equal(found.values[number], best)
            checked += int((labels != IGNORED).sum())
        assert checked == found.counts.sum()
        assert float(found.sums.sum()) == pytest.approx(total, rel=1e-5)
        out = torch.randn(2, 9, 3)
        labels = torch.tensor([[IGNORED, 1, 2, IGNORED, 0, 0, 0, 0, 0], [IGNORED, 2] + [IGNORED] * 7])
        sums, counts = get_task("tokens").tensor_loss(out, labels, spec)
        assert counts.tolist() == [7, 1]
        assert float(sums[1]) == pytest.approx(float(F.cross_entropy(out[1, 1:2], torch.tensor([2]))), rel=1e-5)


def test_scores_by_hand() -> None:
    labels = ["O", "B-A", "I-A", "B-B", "I-B"]
    spec = {"labels": labels, "scheme": "bio", "metric": "entity_f1"}
    right = [["B-A", "I-A", "O"], ["O", "B-B"], ["O", "O"]]
    mine = [[1, 2, 0], [1, 3], [0, 0]]
    facts = {"tags": right, "words": [[0, 1, 2], [0, 1], [0, 1]]}
    rows = tuple(Encoded((0,)) for _ in right)
    found = Found(torch.ones(3), torch.tensor([3.0, 2.0, 2.0]), [torch.tensor(m) for m in mine])
    scores = get_task("tokens").judge(spec, None, Examples(rows, facts=facts), found)
    assert scores.value == pytest.approx(2 * 2 / (2 * 2 + 1 + 0)) and scores.metric == "entity_f1"
    assert scores.metrics["precision"] == pytest.approx(2 / 3) and scores.metrics["recall"] == 1.0
    assert scores.metrics["per_label"]["A"] == pytest.approx(
        {"precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1}
    )
    assert scores.metrics["token_accuracy"] == pytest.approx(6 / 7)
    assert np.array_equal(scores.rows, [[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert scores.interval[0] <= scores.value <= scores.interval[1]
    plain = {"labels": ["D", "N"], "scheme": "plain", "metric": "token_accuracy"}
    facts = {"tags": [["D", "N", "N"]], "words": [[0, 1]]}  # the third word was cut
    found = Found(torch.ones(1), torch.tensor([2.0]), [torch.tensor([0, 0])])
    assert get_task("tokens").judge(plain, None, Examples(rows[:1], facts=facts), found).value == pytest.approx(1 / 3)


def test_a_run_scores_and_answers(base: ob.Base, run: ob.Run) -> None:
    assert run.metric == "entity_f1" and run.value > 0.8 and run.kind == "tokens"
    assert run.test is not None and run.test.test == "paired bootstrap" and run.base_value > 0.5
    assert run.labels == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    text = "  Then Maria  Smith walked to\nRome."
    (answer,) = base.predict([text], "names")
    assert answer.spans is not None and answer.label is None
    assert [(s.text, s.label) for s in answer.spans] == [("Maria  Smith", "PER"), ("Rome", "LOC")]
    assert all(text[s.start : s.end] == s.text and 0.3 < s.probability <= 1 for s in answer.spans)
    again = ob.evaluate(base, sentences(20, seed=5), "names")
    assert again.base is not None and again.test is not None and again.rows == 20


def test_loaded_answers_are_those_that_were_stored(base: ob.Base, tmp_path: Path) -> None:
    store = ob.Store(tmp_path)
    ob.train(base, sentences(40), "bottleneck(size=4)", name="kept", store=store, **FAST)
    text = "Then Maria Smith walked to Rome, and Omar left."
    before = base.predict([text], "kept")[0].facts()
    base.remove("kept")
    base.load("kept", store=store)
    assert base.predict([text], "kept")[0].facts() == before
    base.remove("kept")


def test_mixed_rows_answer_as_alone(base: ob.Base, run: ob.Run) -> None:
    base.add("prompted", "prompt(length=5)", task=dict(base.adapters["names"].task), seed=3)
    base.adapters["prompted"].head.load_state_dict(base.adapters["names"].head.state_dict())  # type: ignore[union-attr]
    texts = ["Then Maria Smith walked to Rome.", "a short one", "Oslo was cold and John Smith left for Paris", "Anna"]
    names = ["names", None, "prompted", "names"]
    mixed = base.predict(texts, names)
    for text, name, found in zip(texts, names, mixed):
        (alone,) = base.predict([text], name)
        if name is None:
            assert torch.allclose(found.embedding, alone.embedding, atol=1e-5)  # type: ignore[arg-type]
            continue
        assert found.spans is not None and alone.spans is not None
        assert [(s.start, s.end, s.label) for s in found.spans] == [(s.start, s.end, s.label) for s in alone.spans]
        assert [s.probability for s in found.spans] == pytest.approx([s.probability for s in alone.spans], abs=1e-5)
    base.remove("prompted")


def test_a_long_text_is_answered_in_windows(base: ob.Base, run: ob.Run) -> None:
    adapter = base.adapters["names"]
    whole, short = dict(adapter.task), {**adapter.task, "max_length": 24, "overlap": 8}
    text = " ".join(["Then", "Maria", "Smith", "walked", "to", "Rome", ",", "and", "it", "was", "cold", "."] * 6)
    adapter.task = short
    try:
        (answer,) = base.predict([text], "names")
    finally:
        adapter.task = whole
    assert answer.windows > 3 and answer.spans is not None
    assert [s.text for s in answer.spans] == ["Maria Smith", "Rome"] * 6


def test_plain_tags_are_scored_by_word(base: ob.Base) -> None:
    kind = {"walked": "VERB", "was": "VERB", "left": "VERB", "to": "ADP", "and": "CONJ", ".": "PUNCT", "cold": "ADJ"}
    rows = [{"tokens": r["tokens"], "tags": [kind.get(w, "NOUN") for w in r["tokens"]]} for r in sentences(40)]
    run = ob.train(base, rows, "lora(rank=2)", **FAST)
    assert run.metric == "token_accuracy" and run.value > 0.8 and run.test is not None
    (answer,) = base.predict(["Anna walked to Rome."], run.name)
    assert [s.text for s in answer.spans or ()] == ["Anna", "walked", "to", "Rome", "."]
    base.remove(run.name)
    rows = [{"tokens": r["tokens"], "tags": [kind.get(w, "O") for w in r["tokens"]]} for r in rows]
    assert make_task(base, ob.load_data(rows))["metric"] == "micro_f1"
    with pytest.raises(ConfigError, match="scheme = 'bio', but rows has tags such as"):
        make_task(base, ob.load_data(rows), scheme="bio")
    assert make_task(base, ob.load_data(sentences()), scheme="plain")["metric"] == "micro_f1"


def test_texts_with_spans(base: ob.Base, tmp_path: Path) -> None:
    rows = []
    for i in range(30):
        text = f"Number {i}: Anna Smith-Berg saw the Parisians."
        spans = [{"start": text.index("Anna"), "end": text.index(" saw"), "label": "PER"}]
        spans.append({"start": text.index("Paris"), "end": text.index("ians"), "label": "LOC"})
        rows.append({"text": text, "spans": spans})
    path = tmp_path / "spans.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = ob.load_data(path)
    assert data.kind == "tokens" and data.labels == ("LOC", "PER")
    assert data.train["spans"][0] == tuple((s["start"], s["end"], s["label"]) for s in rows[0]["spans"])
    spec = make_task(base, data)
    assert spec["labels"] == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]
    examples = encode(base, spec, data)["train"]
    words = find_words(rows[0]["text"])
    marked = [
        (rows[0]["text"][words[a][0] : words[b - 1][1]], kind) for a, b, kind in entities(examples.facts["tags"][0])
    ]
    assert marked == [("Anna Smith-Berg", "PER"), ("Parisians", "LOC")]
    assert examples.facts["notes"] == [f"{len(data.train)} spans cut words, and were widened to whole words."]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"tags": ["O"]}, r"row 3, column 'tags': 1 tags for [67] tokens; expected one each"),
        ({"tags": None}, r"row 3, column 'tags'"),
        ({"tokens": ["a", "", "b"]}, r"row 3, column 'tokens': .*empty or nested item: '' in \['a', '', 'b'\]"),
        ({"tokens": ["a", ["b"]], "tags": ["O", "O"]}, r"row 3, column 'tokens': .*empty or nested item: \['b'\]"),
    ],
)
def test_bad_rows_are_named(bad: dict[str, Any], message: str) -> None:
    rows = sentences(20)
    rows[2] = {**rows[2], "tokens": rows[2]["tokens"][:7], "tags": rows[2]["tags"][:7]} | bad
    with pytest.raises(DataError, match=message):
        ob.load_data(rows)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        (
            [{"start": 3, "end": 900, "label": "A"}],
            "span that is not within its text: from 3 to 900 of a text of 17 ch",
        ),
        ([{"start": -1, "end": 3, "label": "A"}], "span that is not within its text: from -1 to 3"),
        ([{"start": 3, "end": 3, "label": "A"}], "span that is not within its text: from 3 to 3"),
        ([{"start": "x", "end": 3, "label": "A"}], "span that is not within its text: from x to 3"),
        ([{"start": 4, "end": 5, "label": "A"}], "span of white space: from 4 to 5"),
        ([{"start": 0, "end": 3}], r"span without start, end and label: {'start': 0, 'end': 3}; expected all three"),
        ([{"start": 0, "end": 3, "label": " "}], "missing label"),
        ([[0, 3, "A"]], r"span without start, end and label: \[0, 3, 'A'\]"),
        (
            [{"start": 2, "end": 5, "label": "B"}, {"start": 0, "end": 3, "label": "A"}],
            "two spans that overlap: 'A' from 0 to 3 and 'B' from 2 to 5",
        ),
        ([{"start": 0, "end": 3, "label": "A", "text": "ome"}], "span that is not at its start: 'ome' .* has 'som'"),
        ("nothing", r"spans that are no list: 'nothing'; expected \[{'start'"),
        ({"start": 0}, "spans that are no list"),
        (None, "missing spans: expected a list, empty where nothing is marked"),
    ],
)
def test_bad_spans_are_named(spans: Any, message: str) -> None:
    rows = [{"text": f"some text of mine {i}", "spans": []} for i in range(12)]
    rows[4] = {"text": "some text of mine", "spans": spans}
    with pytest.raises(DataError, match=f"1 problem .*\n  rows, row 5, column 'spans': {message}"):
        ob.load_data(rows)


def test_tags_that_training_lacks_or_that_are_nothing(base: ob.Base) -> None:
    rows = sentences(20)
    strange = [{"tokens": ["Acme", "grew"], "tags": ["B-ORG", "O"]}]
    with pytest.raises(DataError, match="validation, row 1, column 'tags': 'B-ORG' is not a label of train"):
        ob.load_data({"train": rows, "validation": strange})
    spec = make_task(base, ob.load_data(rows))
    other = ob.load_data([{"tokens": ["Acme", f"grew{i}"], "tags": ["B-ORG", "O"]} for i in range(20)])
    with pytest.raises(DataError, match=r"rows, row 1: 'B-ORG' not among the tags of training(.|\n)*Correct or remove"):
        encode(base, spec, other)
    nothing = [{"tokens": r["tokens"], "tags": ["O"] * len(r["tokens"])} for r in rows]
    with pytest.raises(DataError, match="rows: every label in column 'tags' is 'O'"):
        ob.load_data(nothing)
    unmarked = [{"text": f"some text {i}", "spans": []} for i in range(20)]
    with pytest.raises(DataError, match="rows: no row has any label in column 'spans'"):
        ob.load_data(unmarked)
    marked = [{"text": f"Acme {i}", "spans": [{"start": 0, "end": 4, "label": "ORG"}]} for i in range(20)]
    new = [{"text": "Oslo", "spans": [{"start": 0, "end": 4, "label": "LOC"}]}]
    with pytest.raises(DataError, match="validation, row 1, column 'spans': 'LOC' is not a label of train"):
        ob.load_data({"train": marked, "validation": new})


def test_a_prefix_that_training_lacks_is_no_new_tag(base: ob.Base) -> None:
    """Where training has persons of one word only, held-out ones of two, or in BIOES, are still persons."""
    rows = [{"tokens": ["Anna", "left", str(i)], "tags": ["B-PER", "O", "O"]} for i in range(20)]
    held = [
        {"tokens": ["Maria", "Smith", "left"], "tags": ["B-PER", "I-PER", "O"]},
        {"tokens": ["Omar", "left"], "tags": ["S-PER", "O"]},
    ]
    data = ob.load_data({"train": rows, "validation": held})
    examples = encode(base, make_task(base, data), data)["validation"]
    assert examples.facts["tags"] == [["B-PER", "I-PER", "O"], ["B-PER", "O"]]
    plain = [{"tokens": ["Anna", "left", str(i)], "tags": ["PER", "V", "V"]} for i in range(20)]
    with pytest.raises(DataError, match="row 1, column 'tags': 'B-PER' is not a label of train"):
        ob.load_data({"train": plain, "validation": held})


@pytest.mark.parametrize("memory", [2**26, 300], ids=["held", "on disk"])
def test_spans_in_every_format(memory: int, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = []
    for i in range(30):
        spans = [{"start": 0, "end": 4, "label": "PER"}, {"start": 10, "end": 14, "label": "LOC"}]
        rows.append({"text": f"Anna left Rome {i}", "spans": spans[: i % 3][::-1]})
    written = [{**row, "spans": json.dumps(row["spans"]) if row["spans"] else ""} for row in rows]
    frame = pandas.DataFrame(rows)
    for name, write in {
        "a.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, rows))),
        "a.json": lambda path: path.write_text(json.dumps(rows)),
        "a.csv": lambda path: pandas.DataFrame(written).to_csv(path, index=False),
        "a.parquet": frame.to_parquet,
    }.items():
        write(tmp_path / name)
    sources: list[Any] = [rows, frame, *(tmp_path / f"a.{end}" for end in ("jsonl", "json", "csv", "parquet"))]
    sources.append(pandas.read_parquet(tmp_path / "a.parquet"))
    loaded = [ob.load_data(source, memory=memory) for source in sources]
    for data in loaded:
        assert data.kind == "tokens" and data.labels == ("LOC", "PER") and data.digest == loaded[0].digest
        for split in data.splits.values():
            for text, spans in zip(split["text"], split["spans"]):
                both = ((0, 4, "PER"), (10, 14, "LOC"))
                assert spans == both[: int(text.split()[-1]) % 3] and all(span.label for span in spans)


def test_which_columns_are_words_and_which_are_spans() -> None:
    spans = [{"start": 0, "end": 4, "label": "PER"}]
    rows = [{"body": f"Anna {i}", "marks": spans, "label": "x", "text": "t", "entities": []} for i in range(20)]
    named = ob.load_data(rows, columns={"text": "body", "spans": "marks"})
    assert named.kind == "tokens" and named.columns == {"text": "body", "spans": "marks"}
    assert ob.load_data(rows, task="tokens", text="body", label="marks").labels == ("PER",)
    assert ob.load_data([{"text": f"t {i}", "label": "ab"[i % 2], "entities": []} for i in range(20)]).kind == (
        "classification"
    )
    both = [{"text": f"Anna {i}", "spans": spans, "tokens": ["Anna", str(i)], "tags": ["A", "B"]} for i in range(20)]
    assert set(ob.load_data(both).columns) == {"tokens", "tags"}
    assert set(ob.load_data(both, columns={"spans": "spans"}).columns) == {"text", "spans"}
    with pytest.raises(ConfigError, match=r"--column spans=NAME.*has no meaning for tokens data"):
        ob.load_data(both, columns={"spans": "spans", "tags": "tags"}, task="tokens")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onebase.cli.main import app

    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
    path = tmp_path / "names.jsonl"
    path.write_text("\n".join(map(json.dumps, sentences(40))), encoding="utf-8")
    runner = CliRunner()
    made = runner.invoke(app, ["train", "-d", str(path), "--epochs", "1", "-m", "lora(rank=2)", "--json"])
    assert made.exit_code == 0, made.output
    document = json.loads(made.stdout)
    assert document["metric"] == "entity_f1" and document["base_score"]["metrics"]["n"] == 4
    shown = runner.invoke(app, ["predict", "-a", "names", "Then Anna walked to Rome.", "--json"])
    (row,) = json.loads(shown.stdout)["rows"]
    assert [span["text"] for span in row["predictions"]["names"]["spans"]] == ["Anna", "Rome"]
    table = runner.invoke(app, ["predict", "-a", "names", "Then Anna walked to Rome."])
    assert "Anna (PER), Rome (LOC)" in table.stdout
    written = tmp_path / "out.csv"
    runner.invoke(app, ["predict", "-a", "names", "Then Anna walked to Rome.", "-o", str(written)])
    assert "names.spans" in written.read_text() and "PER" in written.read_text()
    scored = runner.invoke(app, ["eval", "names", "-d", str(path)])
    assert scored.exit_code == 0 and "entity_f1" in scored.stdout and "PER" in scored.stdout
    planned = runner.invoke(app, ["train", "-d", str(path), "--dry-run", "--json"])
    assert json.loads(planned.stdout)["labels"]["B-PER"] > 0
