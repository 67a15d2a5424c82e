"""One call from files or objects to checked splits of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.data.check import Problems, check_classes, check_count, check_scores, checked_rows, note_mixtures
from onebase.data.columns import Columns, find_columns, match_column
from onebase.data.files import Format, read_source
from onebase.data.kinds import KINDS, PLAIN, ROLES, SHORT, TARGETS
from onebase.data.rows import SPLITS, Data, Rows, are_scores, class_names, digest_of, natural_order
from onebase.data.splits import keys, make_splits, sample
from onebase.data.table import MEMORY, Table
from onebase.errors import ConfigError, DataError, unknown

if TYPE_CHECKING:
    import pandas

    Records = Sequence[Mapping[str, Any]] | pandas.DataFrame | Any
    Source = str | Path | Records | Mapping[str, Records]

Given = dict[str, Rows]
# Options of `load` that are no roles, for misspelt ones.
_OPTIONS = ("task", "columns", "group", "seed", "limit", "encoding", "delimiter", "quote", "sheet", "memory", "whole")


def load(
    source: Source,
    /,
    *,
    task: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | Sequence[str] | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    group: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    quote: str | None = None,
    sheet: str | None = None,
    memory: int = MEMORY,
    whole: bool = False,
    **roles: str | Sequence[str] | None,
) -> Data:
    """Read data, find its columns, check every row, and split it where it does not come split.

    Values are read as strings exactly as written: the labels "NA", "null", "1" and "001" stay what they are. Nothing
    is dropped: a row that cannot be used is an error, and lines that hold no row are counted in the notes.

    Args:
        source: a file (.csv, .tsv, .json, .jsonl, .parquet, .xlsx, .txt, .conll; text also with .gz); a folder with
            files train, validation (or valid, val, dev) and test of one of these kinds; a folder of pictures, a folder
            per class, in folders of splits or not; a pandas DataFrame; a list of
            dicts; a Dataset or IterableDataset; a dict of split -> one of the latter four; or a data set of the hub as
            ``owner/name``, ``owner/name:config`` or ``hf://name``.
        task: a kind of data (`onebase.data.KINDS` lists them with their roles); by default what the columns say. Many
            different numbers with fractions as labels make it "regression"; name "classification" to keep them names.
            "embeddings" of two texts and a score is "similarity".
        text: column of the text; found by name, or by content, where not given. Likewise for the next four.
        text_pair: column of the second text, for pairs.
        label: column of what is to be predicted: label, score, tags, or labels (one column of lists or of names
            separated by | ; or , or several columns of 0 and 1).
        prompt: column of the prompt, for completion.
        completion: column of the completion.
        columns: role -> column for any role (`onebase.data.ROLES`), such as ``{"question": "frage"}``.
        group: column whose equal values stay on one side of splits that are made: the author, the document ...
        seed: which rows are held out and sampled; the same seed gives the same rows on every machine.
        limit: the most rows of each split to keep (a stratified sample); None keeps all.
        encoding: of text files, such as "cp1252"; by default that of the byte order mark, else UTF-8.
        delimiter: of CSV files; found in the header by default.
        quote: of CSV files; '"' by default, "none" where quotes are ordinary characters.
        sheet: of an Excel workbook; the only one that holds something by default.
        memory: bytes of rows of a split to hold in memory (roughly); beyond it rows are kept in a temporary file and
            read from there by index.
        whole: take one file or table to be scored only: nothing is cut, all rows are in `train`, and what only training
            needs (enough rows, several classes) is not asked for. What comes in splits is read as always.
        roles: the column of any further role by its name: ``source="de", target="fr"``; the same as in `columns`.

    Returns:
        The data. Without a test file in a folder `test` is empty, which `notes` says.

    Raises:
        DataError: the data cannot be used; all problems of all rows at once, by file, line and column.
        UnknownNameError: a column, role, option or task that does not exist.
        ConfigError: an option that does not fit the data, or a limit that is too small.

    Example:
        >>> rows = [{"text": f"{w} film {i}", "label": w} for i in range(20) for w in ("good", "bad")]
        >>> data = load(rows)
        >>> data.labels, len(data.train), len(data.validation), len(data.test)
        (('bad', 'good'), 32, 4, 4)
    """
    task = SHORT.get(task or "", task)
    if task is not None and task not in KINDS:
        raise unknown("task", task, KINDS)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1 row, or None for all rows.")
    named = {"text": text, "text_pair": text_pair, "label": label, "prompt": prompt, "completion": completion}
    told = Format(encoding=encoding, delimiter=delimiter, quote=quote, sheet=sheet)
    asked = _asked({**named, **roles}, columns)
    name, tables, notes = read_source(source, told, task, memory)
    kind, found = _roles(tables, asked, task, name, group)
    running = tables["train"].running
    whole = whole and tuple(tables) == ("train",)
    kind, given, said = _checked_splits(name, tables, found, kind, task, group, learning=not whole)
    splits, made = _uncut(given) if whole else _complete(given, seed, running, tables["train"].name, kind)
    labels = _labels_of(splits, kind)
    notes = [*notes, *said, *made]
    if limit is not None:
        splits = _limited(splits, labels, limit, seed, running, kind)
        notes.append(f"Each split is limited to {limit} rows.")
    notes += [sentence for table in tables.values() for sentence in table.said()]
    notes += _notes_on(labels, given, kind, task)
    return Data(
        kind=kind,
        labels=labels,
        source=name,
        digest=digest_of(kind, splits),
        splits_made="validation" not in given and not whole,
        given=tuple(given),
        columns={role: ", ".join(names) for role, names in found.items()} if not running else {},
        notes=tuple(notes),
        **splits,
    )


def taken(data: Any, *, seed: int = 0, **options: Any) -> Data:
    """Return data that was loaded before as it is, else load it.

    Raises:
        ConfigError: options of reading are given for data that was read already.
    """
    if not isinstance(data, Data):
        return load(data, seed=seed, **options)
    given = [key for key, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"{', '.join(given)} given with data that is already loaded: pass them to load_data")
    return data


def _asked(
    named: Mapping[str, str | Sequence[str] | None], columns: Mapping[str, str | Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    """Return role -> columns that the person named, each as a keyword or in `columns`."""
    for name in named:
        if name not in ROLES:
            raise unknown("option or role of load_data", name, [*_OPTIONS, *ROLES])
    for role in columns or {}:
        if role not in ROLES:
            raise unknown("role of a column", role, ROLES)
        if named.get(role) is not None:
            raise ConfigError(f"the column of {role} is named twice: {named[role]!r} and {(columns or {})[role]!r}.")
    both = {**named, **(columns or {})}
    return {
        role: (value,) if isinstance(value, str) else tuple(value) for role, value in both.items() if value is not None
    }


def _roles(
    tables: Mapping[str, Table], asked: Mapping[str, Sequence[str]], task: str | None, name: str, group: str | None
) -> tuple[str, Columns]:
    if "train" not in tables:
        raise DataError(f"{name}: splits {', '.join(tables) or 'none'}; expected at least train. Add it.")
    train = tables["train"]
    if not train.running:
        if group is not None and match_column(train, group) is None:
            raise unknown(f"column for --group in {train.name}:", group, train.cells)
        return find_columns(train, asked, task, [match_column(train, group) or ""] if group else [])
    for role, columns in [*asked.items(), *([("group", [group])] if group else [])]:
        shown = ", ".join(map(repr, columns))
        raise ConfigError(f"{name}: plain text has no columns, so {role}={shown} has no meaning. Leave it out.")
    if task not in (None, *PLAIN):
        raise ConfigError(f"{name}: plain text is causal-lm data, not {task}. Pass a .csv or .jsonl with columns.")
    return task or "causal-lm", {"text": ("text",)}


def _checked_splits(
    name: str,
    tables: Mapping[str, Table],
    columns: Columns,
    kind: str,
    task: str | None,
    group: str | None,
    learning: bool,
) -> tuple[str, Given, list[str]]:
    """Return the kind, the rows of each split given and notes; all problems in all of them are raised together.

    What only training needs is asked for where `learning`.
    """
    if kind == "classification" and task is None and _measured(tables["train"], columns["label"][0]):
        kind = "regression"
        columns["score"] = columns.pop("label")
    problems = Problems(name)
    notes: list[str] = []
    rows: dict[str, Rows | None] = {}
    for split in (split for split in SPLITS if split in tables):
        if split != "train" and _is_unlabelled_test(tables[split], columns, kind):
            notes.append(f"{split} has no labels: its {len(tables[split]):,} rows are not used.")
            continue
        notes += note_mixtures(tables[split], columns, problems)
        rows[split] = checked_rows(tables[split], columns, kind, problems, group if split == "train" else None)
    usable = {split: found for split, found in rows.items() if found is not None}
    if "train" in usable:
        train, target = tables["train"], next((role for role in TARGETS if role in columns), "")
        if learning and kind not in PLAIN:
            check_count(train, usable["train"], problems)
        if target not in ("score", "") and kind != "rerank":
            if learning:
                check_classes(tables, usable, target, ", ".join(columns[target]), problems)
        elif target:
            check_scores(train, usable["train"], target, columns[target][0], problems, learning)
    problems.raise_any()
    return kind, usable, notes


def _measured(table: Table, column: str) -> bool:
    """Say whether a label column holds measurements; of a large file the first rows decide."""
    values = table.cells[column]
    return all(value is None or isinstance(value, str | int | float) for value in values) and are_scores(
        {"" if value is None else str(value) for value in values}
    )


def _is_unlabelled_test(table: Table, columns: Columns, kind: str) -> bool:
    """Say whether a split of a data set of the hub carries only the mark of no label (-1, read as None)."""
    column = match_column(table, columns.get("label", ("",))[0])
    return (
        kind == "classification"
        and column is not None
        and table.unit == "row"
        and table.again is None
        and all(value is None for value in table.cells[column])
    )


def _complete(given: Given, seed: int, running: bool, name: str, kind: str) -> tuple[Given, list[str]]:
    """Cut the splits that are not given: both where only train is, validation where test is."""
    if "validation" in given:
        made, notes = {}, []
    elif "test" in given:
        made = make_splits(given["train"], ("validation",), seed, running, name, kind)
        notes = ["Validation was cut from train (10 %); test is as given."]
    else:
        made = make_splits(given["train"], ("validation", "test"), seed, running, name, kind)
        notes = ["Train, validation and test were cut from the rows (80, 10 and 10 %)."]
    splits = {split: _without_group(rows) for split, rows in (given | made).items()}
    if "test" not in splits:
        splits["test"] = splits["train"].select(())
        notes.append("There is no test split: test is empty.")
    return {split: splits[split] for split in SPLITS}, notes


def _uncut(given: Given) -> tuple[Given, list[str]]:
    """Leave all rows in train: they are scored, and nothing is held out from them."""
    rows = _without_group(given["train"])
    return {"train": rows, "validation": rows.select(()), "test": rows.select(())}, []


def _without_group(rows: Rows) -> Rows:
    """Drop the column of the groups: it is for splitting only."""
    if rows.get("group") is None:
        return rows
    kept = {role: rows[role] for role in rows.roles if role != "group"}
    return Rows(places=rows.places, file=rows.file, unit=rows.unit, **kept)


def _labels_of(splits: Given, kind: str) -> tuple[str, ...]:
    return natural_order(name for rows in splits.values() for name in class_names(rows, kind))


def _limited(splits: Given, labels: tuple[str, ...], limit: int, seed: int, running: bool, kind: str) -> Given:
    if kind == "classification" and limit < len(labels):
        raise ConfigError(
            f"limit is {limit}, but there are {len(labels)} classes and training needs a row of each. "
            f"Pass a limit of at least {len(labels)}."
        )
    return {split: sample(rows, limit, seed, running, kind) for split, rows in splits.items()}


def _notes_on(labels: tuple[str, ...], given: Given, kind: str, task: str | None) -> list[str]:
    notes = []
    if kind == "regression" and task is None:
        notes.append("The labels are measurements: this is regression. To take them for classes name classification.")
    elif kind == "similarity" and task == "embeddings":
        notes.append("The pairs have scores: this is similarity. To take pairs for positives name anchor and positive.")
    elif kind == "classification" and are_scores(labels):
        notes.append(f"The {len(labels)} labels are numbers, and taken for names of classes as asked.")
    alike: dict[str, list[str]] = {}
    for label in labels:
        alike.setdefault(label.strip().casefold(), []).append(label)
    notes += [
        f"The labels {' and '.join(map(repr, same))} differ in case or outer spaces only."
        for same in alike.values()
        if len(same) > 1
    ]
    return notes + _notes_on_leaks(given, kind)


def _notes_on_leaks(given: Given, kind: str) -> list[str]:
    """Count the held-out rows whose text is also in train, by 64 bits of a hash per row."""
    if kind in PLAIN or len(given) == 1:
        return []
    import numpy as np

    hashed = {
        split: np.fromiter((hash(key) for key in keys(rows, kind, KINDS[kind].known)), dtype=np.int64, count=len(rows))
        for split, rows in given.items()
    }
    notes = []
    for split in given:
        shared = 0 if split == "train" else int(np.isin(hashed[split], hashed["train"]).sum())
        if shared:
            notes.append(f"{shared} rows of {split} have a text that is also in train; they are kept as given.")
    return notes
