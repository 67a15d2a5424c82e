"""Which kinds of data a set of columns can be: what people name, then what the column names say together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onebase.data.kinds import KINDS, ROLES
from onebase.data.table import Table

# Columns that together mean one kind, where nobody said what the task is. "question" alone may be a text, "target" a
# label, "source" where a text comes from: only these combinations are plain.
_SIGNATURES: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("chat", (("messages", "conversations"),)),
    ("tokens", (("tokens", "words"), ("tags", "ner_tags", "pos_tags", "labels", "ner", "pos", "tag"))),
    ("tokens", (("text", "sentence", "content", "texte", "phrase"), ("spans", "entities", "entités"))),
    ("qa", (("question",), ("context",), ("answers", "answer", "answer_text"))),
    ("seq2seq", (("source", "src"), ("target", "tgt"))),
    ("seq2seq", (("document", "article", "dialogue", "text"), ("summary", "highlights"))),
    ("image-classification", (("image", "image_path", "image_file", "img", "picture", "photo"),
                              ("label", "labels", "class", "category", "classe", "étiquette"))),
    ("embeddings", (("anchor", "query"), ("positive", "pos"))),
    ("rerank", (("query",), ("document", "passage", "doc"), ("label", "relevance", "score", "relevant"))),
    ("completion", (("prompt", "instruction"), ("completion", "response", "output", "answer", "target", "reply",
                                                "réponse", "reponse", "sortie", "cible"))),
)  # fmt: skip
_LABELLED = {"text", "text_pair", "label"}


def fitting_kinds(table: Table, given: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the kinds that the named roles, else the columns, can mean; at least one."""
    if given:
        named = _kinds_with(table, given)
        if named:
            return named
    plain = {column.strip().casefold() for column in table.cells}
    kinds = list(dict.fromkeys(kind for kind, groups in _SIGNATURES if all(plain & set(group) for group in groups)))
    spanned = kinds == ["tokens"] and not plain & {"tokens", "words"}
    if (kinds == ["seq2seq"] or spanned) and plain & (_label_names() - {"target"}):
        # A label beside a plain text is a class even where a column is called "source", "summary" or "entities".
        return ["classification"] if {"text", "label"} <= plain else [*kinds, "classification"]
    if kinds == ["image-classification"] and plain & {"text", *ROLES["text"].names.split()}:
        return [*kinds, "classification"]
    if kinds == ["completion"] and "label" in plain:
        return ["completion", "classification"]
    if kinds:
        return kinds
    return ["multilabel"] if _is_multilabel(table) else ["classification"]


def _kinds_with(table: Table, given: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the kinds that have all roles named; text and label are those of labels before any other."""
    roles = set(given) - {"answer_start"} | ({"answers"} if "answer_start" in given else set())
    if roles <= _LABELLED:
        label = given.get("label", ())
        listed = _are_lists(table.cells[label[0]]) if label else _is_multilabel(table)
        return ["multilabel" if listed or len(label) > 1 else "classification"]
    kinds = [kind for kind, what in KINDS.items() if roles <= set(what.roles) or roles <= set(what.other)]
    return [kind for kind in kinds if kind != "similarity"] or kinds  # regression, unless similarity is asked for


def _is_multilabel(table: Table) -> bool:
    """Say whether labels are lists, or stand in two or more columns of zeros and ones beside one text."""
    plain = {column: column.strip().casefold() for column in table.cells}
    names = {"label", "labels", *ROLES["labels"].names.split()}
    listed = [column for column in table.cells if plain[column] in names and _are_lists(table.cells[column])]
    if listed:
        return True
    if any(name in _label_names() for name in plain.values()):
        return False
    flags = [column for column in table.cells if set(map(str, table.cells[column])) <= {"0", "1"}]
    flags = [column for column in flags if plain[column] not in ("id", "idx", "index")]
    return len(flags) > 1


def _label_names() -> set[str]:
    return {ROLES["label"].first, *ROLES["label"].names.split()}


def _are_lists(values: Iterable[Any]) -> bool:
    seen = [value for value in values if value is not None]
    return bool(seen) and all(isinstance(value, list | tuple) for value in seen)
