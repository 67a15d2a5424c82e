"""Kinds of data: found from columns where that is plain, refused where it is not, each cell checked for its role."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onebase.data import KINDS, ROLES, Answer, load
from onebase.data.messages import as_messages
from onebase.data.misfit import Misfit
from onebase.errors import ConfigError, DataError, UnknownNameError

WORDS = ["Ann", "lives", "in", "Rome"]
TAGS = ["B-PER", "O", "O", "B-LOC"]
CONTEXT = "Ann lives in Rome, which is number {}."


def each(make: Any, count: int = 40) -> list[dict[str, Any]]:
    return [make(i) for i in range(count)]


def said(speaker: str, content: str) -> dict[str, str]:
    return {"role": speaker, "content": content}


SHAPES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "classes": (
        "classification",
        each(lambda i: {"text": f"t {i}", "label": "ab"[i % 2]}),
        {"text": "t 0", "label": "a"},
    ),
    "lists of labels": (
        "multilabel",
        each(lambda i: {"text": f"t {i}", "labels": [["a"], ["a", "b"], []][i % 3]}),
        {"text": "t 0", "labels": ("a",)},
    ),
    "columns of flags": (
        "multilabel",
        each(lambda i: {"id": i, "comment_text": f"t {i}", "toxic": "1", "rude": str(i % 2)}),
        {"text": "t 0", "labels": ("toxic",)},
    ),
    "numbers": (
        "regression",
        each(lambda i: {"sentence1": f"t {i}", "sentence2": "u", "score": f"{i / 8}"}),
        {"text": "t 0", "text_pair": "u", "score": 0.0},
    ),
    "tags": (
        "tokens",
        each(lambda i: {"id": str(i), "tokens": [*WORDS, str(i)], "ner_tags": [*TAGS, "O"]}),
        {"tokens": (*WORDS, "0"), "tags": (*TAGS, "O")},
    ),
    "SQuAD": (
        "qa",
        each(
            lambda i: {
                "question": f"Where {i}?",
                "context": CONTEXT.format(i),
                "answers": {"text": ["Rome"], "answer_start": [13]} if i % 2 == 0 else {"text": [], "answer_start": []},
            }
        ),
        {"question": "Where 0?", "context": CONTEXT.format(0), "answers": (Answer("Rome", 13),)},
    ),
    "flat answers": (
        "qa",
        each(
            lambda i: {"question": f"Where {i}?", "context": CONTEXT.format(i), "answer": "Rome", "answer_start": "13"}
        ),
        {"question": "Where 0?", "context": CONTEXT.format(0), "answers": (Answer("Rome", 13),)},
    ),
    "source": (
        "seq2seq",
        each(lambda i: {"source": f"s {i}", "target": f"t {i}"}),
        {"source": "s 0", "target": "t 0"},
    ),
    "summaries": (
        "seq2seq",
        each(lambda i: {"article": f"s {i}", "highlights": f"t {i}"}),
        {"source": "s 0", "target": "t 0"},
    ),
    "OpenAI": (
        "chat",
        each(lambda i: {"messages": [said("system", "Be."), said("user", f"q {i}"), said("assistant", "a")]}),
        {"messages": (said("system", "Be."), said("user", "q 0"), said("assistant", "a"))},
    ),
    "ShareGPT": (
        "chat",
        each(lambda i: {"conversations": [{"from": "human", "value": f"q {i}"}, {"from": "gpt", "value": "a"}]}),
        {"messages": (said("user", "q 0"), said("assistant", "a"))},
    ),
    "triplets": (
        "embeddings",
        each(lambda i: {"anchor": f"a {i}", "positive": f"p {i}", "negative": f"n {i}"}),
        {"anchor": "a 0", "positive": "p 0", "negative": "n 0"},
    ),
    "relevance": (
        "rerank",
        each(lambda i: {"query": f"q {i // 2}", "document": f"d {i}", "label": i % 2}),
        {"query": "q 0", "document": "d 0", "label": 0.0},
    ),
    "prompts": (
        "completion",
        each(lambda i: {"instruction": f"p {i}", "response": f"c {i}"}),
        {"prompt": "p 0", "completion": "c 0"},
    ),
}


@pytest.mark.parametrize("memory", [2**26, 300], ids=["held", "on disk"])
@pytest.mark.parametrize("form", ["list", "jsonl", "parquet"])
@pytest.mark.parametrize("name", SHAPES)
def test_kinds_are_found(name: str, form: str, memory: int, tmp_path: Path) -> None:
    kind, rows, first = SHAPES[name]
    source: Any = rows
    if form == "jsonl":
        source = tmp_path / "a.jsonl"
        source.write_text("\n".join(map(json.dumps, rows)))
    elif form == "parquet":
        pandas = pytest.importorskip("pandas")
        source = tmp_path / "a.parquet"
        pandas.DataFrame(rows).to_parquet(source)
    data = load(source, memory=memory)
    assert data.kind == kind and set(data.train.roles) == set(first)
    found = {json.dumps(rows.row(i)): rows.row(i) for rows in data.splits.values() for i in range(len(rows))}
    assert json.dumps({role: first[role] for role in data.train.roles}) in found
    assert first in found.values() and len(found) == len(rows)
    assert data.digest == load(rows).digest
    assert data.scores == (kind in ("regression", "rerank"))


def test_the_table_of_kinds_is_whole() -> None:
    for name, kind in KINDS.items():
        assert {*kind.roles, *kind.same} <= ROLES.keys() and set(kind.optional) <= set(kind.roles), name
        assert not kind.classes or kind.classes in kind.roles


def test_named_tasks_and_columns() -> None:
    rows = each(lambda i: {"a": f"t {i}", "b": f"u {i}", "c": "x|y" if i % 2 else "x"})
    data = load(rows, task="multilabel", text="a", label="c")
    assert data.kind == "multilabel" and data.labels == ("x", "y") and set(data.train["labels"]) == {("x", "y"), ("x",)}
    pairs = load(rows, columns={"source": "a", "target": "b"})
    assert pairs.kind == "seq2seq" and pairs.columns == {"source": "a", "target": "b"}
    assert load(rows, task="embeddings", columns={"anchor": "a", "positive": "b"}).train.get("negative") is None
    assert load(rows, task="masked-lm", text="a").kind == "masked-lm"
    with pytest.raises(UnknownNameError, match=r"role of a column 'sauce'.*Did you mean 'source'"):
        load(rows, columns={"sauce": "a"})
    assert load(rows, source="a", target="b", label=None, score=None) == pairs
    with pytest.raises(UnknownNameError, match=r"option or role of load_data 'tsak'.*Did you mean 'task'"):
        load(rows, tsak="qa")
    with pytest.raises(ConfigError, match=r"column of target is named twice: 'b' and 'c'"):
        load(rows, target="b", columns={"target": "c"})
    with pytest.raises(ConfigError, match=r"column of text is named twice"):
        load(rows, text="a", columns={"text": "b"})
    with pytest.raises(DataError, match=r"no column found for the question of qa data.*--column question=NAME"):
        load(rows, task="qa")
    flags = each(lambda i: {"text": f"t {i}", "x": str(i % 2), "y": "1", "label": "k"})
    assert load(flags, label=["x", "y"]).labels == ("x", "y")
    graded = each(lambda i: {"text": f"t {i}", "score": str(i % 3)})
    assert load(graded).kind == "classification" and load(graded, task="regression").train["score"][0] in (
        0.0,
        1.0,
        2.0,
    )
    assert load(graded, task="regression", label="score").columns == {"text": "text", "score": "score"}


def test_embeddings_of_pairs_with_scores_are_similarity() -> None:
    pairs = each(lambda i: {"sentence1": f"a {i}", "sentence2": f"b {i}", "similarity": i / 10})
    data = load(pairs, task="embeddings")
    assert data.kind == "similarity" and data.train["score"][0] == int(data.train["text"][0][2:]) / 10
    assert any("have scores: this is similarity" in note for note in data.notes)
    assert data == replace(load(pairs, task="similarity"), notes=data.notes)
    named = each(lambda i: {"x": f"a {i}", "y": f"b {i}", "z": i / 10})
    for role in ("score", "label"):
        found = load(named, task="embeddings", text="x", text_pair="y", **{role: "z"})
        assert found.kind == "similarity" and found.digest == data.digest
    # what is named decides, and so do columns called anchor and positive
    positives = load(pairs, task="embeddings", anchor="sentence1", positive="sentence2")
    assert positives.kind == "embeddings" and not positives.notes[1:]
    odd = each(lambda i: {"anchor": f"a {i}", "positive": f"b {i}", "text": "t", "text_pair": "u", "score": i / 10})
    assert load(odd, task="embeddings").kind == "embeddings"
    assert load([{k: row[k] for k in ("sentence1", "sentence2")} for row in pairs], task="embeddings").kind == (
        "embeddings"
    )
    pairs[4]["similarity"] = "high"
    with pytest.raises(DataError, match=r"row 5, column 'similarity': score that is no number: 'high'"):
        load(pairs, task="embeddings")


def test_conversations_are_tuples_of_messages() -> None:
    rows: list[dict[str, Any]] = each(lambda i: {"messages": (said("user", f"q {i}"), said("assistant", "a"))})
    data = load(rows)
    assert data.kind == "chat" and all(isinstance(talk, tuple) for talk in data.train["messages"])
    assert data.digest == load([{"messages": json.dumps(row["messages"])} for row in rows]).digest
    open_ended = [said("user", "q")]
    assert as_messages(open_ended, answered=False) == tuple(open_ended)
    with pytest.raises(Misfit, match="the last message is the assistant's already; leave it out"):
        as_messages(rows[0]["messages"], answered=False)


def test_what_is_not_plain_lists_the_tasks() -> None:
    with pytest.raises(DataError, match=r"fit two tasks: seq2seq and classification.*--task seq2seq, or --task class"):
        load(each(lambda i: {"text": f"t {i}", "summary": f"s {i}", "score": str(i % 5)}))
    with pytest.raises(DataError, match=r"fit two tasks: chat and completion"):
        load(each(lambda i: {"messages": [], "prompt": "p", "completion": "c"}))
    with pytest.raises(DataError, match=r"'ner_tags' or 'pos_tags' could be the tags column.*--column tags=NAME"):
        load(each(lambda i: {"tokens": ["a"], "ner_tags": ["O"], "pos_tags": ["N"]}))
    rows = each(lambda i: {"text": f"t {i}", "label": "ab"[i % 2], "source": "web", "target": "x"})
    assert load(rows).kind == "classification"


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"text": "t", "labels": ["a", "a"]}, {}, "label given twice"),
    ({"text": "t", "labels": [None]}, {}, "missing label"),
    ({"text": "t", "labels": None}, {"task": "multilabel"}, "missing label"),
    ({"text": "t", "labels": 3}, {"task": "multilabel"}, "labels that are no list"),
    ({"text": "t", "toxic": "2", "rude": "1"}, {"label": ["toxic", "rude"]}, "neither 0 nor 1.*'toxic' holds '2'"),
    ({"text": "t", "score": "nan"}, {"task": "regression"}, "score that is not finite"),
    ({"text": "t", "score": "3,5"}, {"task": "regression"}, "no number.*'3,5'.*write decimals with a point"),
    ({"text": "t", "label": float("inf")}, {}, "label that is infinite"),
    ({"text": "t", "label": float("nan")}, {}, "missing label"),
    ({"tokens": ["a", "b"], "tags": ["O"]}, {}, "1 tags for 2 tokens"),
    ({"tokens": ["a", ""], "tags": ["O", "O"]}, {}, "empty or nested item"),
    ({"tokens": [], "tags": []}, {}, "empty tokens"),
    ({"question": "q", "context": "Rome", "answers": {"text": ["Paris"], "answer_start": [0]}}, {}, "not at its start"),
    ({"question": "q", "context": "Rome", "answers": ["Paris"]}, {}, "not in its context"),
    ({"question": "q", "context": "Rome", "answers": {"text": ["Rome"], "answer_start": []}}, {}, "as many starts"),
    ({"question": "q", "context": "Rome", "answers": {"text": ["R"], "answer_start": ["x"]}}, {}, "no position"),
    ({"messages": "not json"}, {}, "not JSON"),
    ({"messages": []}, {}, "no list"),
    ({"messages": [said("user", "q")]}, {}, "without an assistant"),
    ({"messages": [said("wizard", "q")]}, {}, "unknown role.*'wizard'"),
    ({"messages": [said("user", ""), said("assistant", "a")]}, {}, "message 1 \\(user\\).*expected text"),
    ({"query": "q", "document": "d", "label": "good"}, {}, "no number.*'good'"),
]


@pytest.mark.parametrize(("bad", "options", "message"), BAD)
def test_cells_that_do_not_fit_are_named(bad: dict[str, Any], options: dict[str, Any], message: str) -> None:
    good = {
        "text": "fine", "labels": ["a"], "toxic": "0", "rude": "1", "score": "1.5", "label": "1", "tokens": ["w"],
        "tags": ["O"], "question": "q", "context": "c", "answers": ["c"], "query": "q", "document": "d",
        "messages": [said("user", "q"), said("assistant", "a")],
    }  # fmt: skip
    rows = [{key: good[key] for key in bad} for _ in range(10)]
    rows[6] = bad
    with pytest.raises(DataError, match=rf"(?s)rows, row 7, column .*{message}") as caught:
        load(rows, **options)
    assert caught.value.problems[0][1].startswith("rows, row 7")


def test_files_of_words_and_tags(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- O\n\n" + "".join(f"Ann NN B-PER\nsaid VB O\n{i} CD O\n\n" for i in range(20))
    for name, options in (("a.conll", {}), ("a.txt", {"task": "tokens"}), ("a.bio", {})):
        (tmp_path / name).write_text(text)
        data = load(tmp_path / name, **options)
        assert data.kind == "tokens" and data.labels == ("B-PER", "O")
        assert ("Ann", "said", "0") in data.train["tokens"] + data.validation["tokens"] + data.test["tokens"]
        assert any("1 lines of comments or document marks" in note for note in data.notes)
    first = data.train.place(0)
    assert first.startswith("a.bio, line ")
    (tmp_path / "a.conll").write_text(text + "alone\n")
    with pytest.raises(DataError, match=r"a\.conll: line 83: 1 columns in 'alone'; expected 3"):
        load(tmp_path / "a.conll")


def test_squad_files(tmp_path: Path) -> None:
    qas = [{"id": str(i), "question": f"q {i}", "answers": [{"text": "Rome", "answer_start": 3}]} for i in range(2)]
    articles = [{"title": "t", "paragraphs": [{"context": f"In Rome {i}", "qas": qas}]} for i in range(20)]
    (tmp_path / "a.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    data = load(tmp_path / "a.json")
    assert data.kind == "qa" and sum(map(len, data.splits.values())) == 40
    assert set(data.train["answers"]) == {(Answer("Rome", 3),)}
    assert not set(data.train["context"]) & set(data.test["context"])  # questions of a text stay together


def test_mixed_types_are_named(tmp_path: Path) -> None:
    rows = each(lambda i: {"text": f"t {i}", "label": 1 if i % 2 else "one"})
    with pytest.raises(DataError, match=r"(?s)label column of mixed types.*number 1 in row 2, word 'one' in row 1"):
        load(rows)
    rows = each(lambda i: {"text": i if i == 5 else f"t {i}", "label": "ab"[i % 2]})
    assert any("column 'text' mixes types (number 5 in row 6" in note for note in load(rows).notes)


def test_labels_that_teach_nothing() -> None:
    with pytest.raises(DataError, match=r"each of the 40 rows has a label of its own in column 'label'"):
        load(each(lambda i: {"text": f"t {i}", "label": f"id {i}"}))
    with pytest.raises(DataError, match=r"every score is 2\.5; there is nothing to learn"):
        load(each(lambda i: {"text": f"t {i}", "score": "2.5"}), task="regression")
    with pytest.raises(DataError, match=r"no row has any label"):
        load(each(lambda i: {"text": f"t {i}", "labels": []}))


def test_missing_numbers_do_not_turn_scores_into_classes() -> None:
    rows = each(lambda i: {"text": f"t {i}", "label": "NaN" if i == 4 else f"{i / 8}"})
    with pytest.raises(DataError, match=r"row 5, column 'label': score that is not finite: NaN"):
        load(rows)


def test_header_less_files(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\n".join(f"I liked this one {i} times more than that,{('good', 'bad')[i % 2]}" for i in range(20)))
    with pytest.raises(DataError, match=r"an example, not a header"):
        load(path)
    path.write_text("\n".join(f"I liked this one {i} times more than that,{i},{i + 2}" for i in range(20)))
    with pytest.raises(DataError, match=r"The first line looks like an example: add a line of column names"):
        load(path)
