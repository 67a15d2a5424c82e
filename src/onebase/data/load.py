"""One call from a file, folder, DataFrame or list to checked splits of strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.data.check import Problems, check_classes, check_count, checked_rows
from onebase.data.columns import ROLE_NAMES, find_columns
from onebase.data.files import Table, read_source
from onebase.data.rows import KINDS, SPLITS, Data, Kind, Rows, are_scores, digest_of, natural_order
from onebase.data.splits import _keys, make_splits, sample
from onebase.errors import ConfigError, DataError, unknown

if TYPE_CHECKING:
    import pandas

    Records = Sequence[Mapping[str, Any]] | pandas.DataFrame
    Source = str | Path | Records | Mapping[str, Records]


def load(
    source: Source,
    /,
    *,
    task: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    **roles: str | None,
) -> Data:
    """Read data, find its columns, check every row, and split it where it does not come split.

    Values are read as strings exactly as written: the labels "NA", "null", "1" and "001" stay what they are.

    Args:
        source: a .csv, .tsv, .jsonl or .txt file; a folder with files train, validation (or valid, val, dev)
            and test of one of these kinds; a pandas DataFrame; a list of dicts; or a dict of split -> one
            of the latter two.
        task: one of `KINDS`: "classification", "causal-lm", "completion", "seq2seq", "chat", "embeddings" ...; by
            default what the columns say. A .txt is always "causal-lm". Rows for embeddings with two texts and a
            score become "similarity".
        text: column of the text; found by name, or by content, where not given. Likewise for the next four.
        text_pair: column of the second text, for pairs.
        label: column of the label.
        prompt: column of the prompt, for completion.
        completion: column of the completion.
        seed: which rows are held out and sampled; the same seed gives the same rows on every machine.
        limit: the most rows of each split to keep (a stratified sample); None keeps all.
        roles: columns of the roles of other kinds: source, target, messages, anchor, positive, negative, score.

    Returns:
        The data. Without a test file in a folder `test` is empty, which `notes` says.

    Raises:
        DataError: the data cannot be used; all problems of all rows at once, by file, line and column.
        UnknownNameError: a column or task that does not exist.
        ConfigError: an option that does not fit the data, or a limit that is too small.

    Example:
        >>> rows = [{"text": f"{w} film {i}", "label": w} for i in range(20) for w in ("good", "bad")]
        >>> data = load(rows)
        >>> data.labels, len(data.train), len(data.validation), len(data.test)
        (('bad', 'good'), 32, 4, 4)
    """
    kind = _checked_task(task)
    for role in roles:
        if role not in ROLE_NAMES:
            raise unknown("role of a column", role, ROLE_NAMES)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1 row, or None for all rows.")
    name, tables = read_source(source)
    asked = {"text": text, "text_pair": text_pair, "label": label, "prompt": prompt, "completion": completion}
    asked |= roles
    kind, columns = _roles(tables, asked, kind, name)
    given = _checked_splits(name, tables, columns, kind)
    running = tables["train"].running
    splits, notes = _complete(given, seed, running, tables["train"].name)
    labels = natural_order([v for rows in splits.values() for v in rows.label or ()])
    if limit is not None:
        splits = _limited(splits, labels, limit, seed, running)
        notes.append(f"Each split is limited to {limit} rows.")
    notes += _notes_on(labels, given)
    return Data(
        kind=kind,
        labels=labels,
        source=name,
        digest=digest_of(kind, splits),
        splits_made="validation" not in given,
        columns=columns if not running else {},
        notes=tuple(notes),
        **splits,
    )


def _checked_task(task: str | None) -> Kind | None:
    for kind in KINDS:
        if task == kind:
            return kind
    if task is None:
        return None
    raise unknown("task", task, KINDS)


def _roles(
    tables: Mapping[str, Table], asked: Mapping[str, str | None], task: Kind | None, name: str
) -> tuple[Kind, dict[str, str]]:
    if "train" not in tables:
        raise DataError(f"{name}: splits {', '.join(tables) or 'none'}; expected at least train. Add it.")
    if not tables["train"].running:
        return find_columns(tables["train"], asked, task)
    for role, column in asked.items():
        if column is not None:
            raise ConfigError(f"{name}: plain text has no columns, so {role}={column!r} has no meaning. Leave it out.")
    if task not in (None, "causal-lm"):
        raise ConfigError(f"{name}: plain text is causal-lm data, not {task}. Pass a .csv or .jsonl with columns.")
    return "causal-lm", {"text": "text"}


def _checked_splits(name: str, tables: Mapping[str, Table], columns: dict[str, str], kind: Kind) -> dict[str, Rows]:
    """Return the rows of each split given; all problems in all of them are raised together."""
    problems = Problems(name)
    ordered = [split for split in SPLITS if split in tables]
    rows = {split: checked_rows(tables[split], columns, kind, problems) for split in ordered}
    usable = {split: found for split, found in rows.items() if found is not None}
    if "train" in usable and kind != "causal-lm":
        check_count(tables["train"], usable["train"], problems)
    if "train" in usable and kind == "classification":
        check_classes(tables, usable, columns["label"], problems)
    problems.raise_any()
    return usable


def _complete(given: dict[str, Rows], seed: int, running: bool, name: str) -> tuple[dict[str, Rows], list[str]]:
    """Cut the splits that are not given: both where only train is, validation where test is."""
    if "validation" in given:
        made, notes = {}, []
    elif "test" in given:
        made = make_splits(given["train"], ("validation",), seed, running, name)
        notes = ["Validation was cut from train (10 %); test is as given."]
    else:
        made = make_splits(given["train"], ("validation", "test"), seed, running, name)
        notes = ["Train, validation and test were cut from the rows (80, 10 and 10 %)."]
    splits = given | made
    if "test" not in splits:
        splits["test"] = given["train"].select(())
        notes.append("There is no test split: test is empty.")
    return {split: splits[split] for split in SPLITS}, notes


def _limited(splits: dict[str, Rows], labels: tuple[str, ...], limit: int, seed: int, running: bool) -> dict[str, Rows]:
    if limit < len(labels) and not are_scores(labels):
        raise ConfigError(
            f"limit is {limit}, but there are {len(labels)} classes and training needs a row of each. "
            f"Pass a limit of at least {len(labels)}."
        )
    return {split: sample(rows, limit, seed, running) for split, rows in splits.items()}


def _notes_on(labels: tuple[str, ...], given: dict[str, Rows]) -> list[str]:
    notes = []
    if are_scores(labels):
        notes.append(f"The {len(labels)} labels are scores: not stratified, and held-out values may be new to train.")
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(label.strip().casefold(), []).append(label)
    notes += [
        f"The labels {' and '.join(map(repr, same))} differ in case or outer spaces only."
        for same in alike.values()
        if len(same) > 1
    ]
    known = set(_keys(given["train"]))
    for split in given:
        shared = sum(content in known for content in _keys(given[split])) if split != "train" else 0
        if shared:
            notes.append(f"{shared} rows of {split} have a text that is also in train; they are kept as given.")
    return notes
