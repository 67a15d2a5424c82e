"""Jobs for `train_many`: one by one, a folder of data sets, a file of jobs, or a grid over one data set."""

from __future__ import annotations

import ast
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onebase.data import Data
from onebase.data.files import EXTENSIONS, SPLIT_NAMES
from onebase.data.load import taken
from onebase.errors import ConfigError, OnebaseError, unknown
from onebase.methods.method import Method
from onebase.methods.registry import parse_method
from onebase.store.names import check_name, clean_name, name_of_path
from onebase.store.plain_files import read_plain
from onebase.tasks.registry import option_names
from onebase.training.prepare import DEFAULT_METHOD, reading_options
from onebase.training.settings import Settings

ENTRY = (
    "data", "method", "name", "settings", "columns", "task", "limit", "group", "max_length", "template", "pooling",
    "init_from", "grid", "seeds",
)  # fmt: skip


class Job:
    """One adapter to train: data, method, name, and everything else that `train` takes.

    Args:
        data: what `load_data` takes.
        method: a method or its shorthand.
        name: the adapter's, and where it is stored; None attaches it under the method's name and stores nothing.
        more: columns, task options and training settings, as for `train`.

    Example:
        >>> Job(data="reviews.csv", method="bottleneck", name="reviews", lr=1e-3)
        Job('reviews': bottleneck)
    """

    def __init__(self, data: Any, method: str | Method | None = None, name: str | None = None, **more: Any):
        self.data, self.name, self.more = data, name, more
        self.method = None if method is None else parse_method(method)

    def __repr__(self) -> str:
        method = "default method" if self.method is None else self.method.shorthand()
        return f"Job({self.name!r}: {method})"


def jobs_of(source: Sequence[Job] | str | Path) -> list[Job]:
    """Return jobs as they are, those of a file (`read_jobs`), or those of a folder of data sets (`folder_jobs`)."""
    if not isinstance(source, (str, Path)):
        return list(source)
    path = Path(source).expanduser()
    return folder_jobs(path) if path.is_dir() else read_jobs(path)


# -- a folder of data sets -----------------------------------------------------------------------------------------


def holds_data_sets(folder: str | Path) -> bool:
    """Whether a path is a folder of data sets: a folder without files that are called as splits are."""
    path = Path(folder).expanduser()
    if not path.is_dir() or any(_stem(entry) in SPLIT_NAMES for entry in path.iterdir() if _is_data(entry)):
        return False
    return any(_is_data(entry) for entry in path.iterdir())


def folder_jobs(folder: str | Path, method: str | Method | None = None, **more: Any) -> list[Job]:
    """Return one job per data set of a folder: its data files, and its folders of splits, in order of their names.

    Args:
        folder: holds the data sets; files that are no data are left out.
        method, more: of every job.

    Raises:
        ConfigError: no data set is there, or two have one name.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"no folder {str(path)!r}: expected a folder with a data set in each file or folder")
    if any(_stem(entry) in SPLIT_NAMES for entry in path.iterdir() if _is_data(entry)):
        raise ConfigError(f"{path} holds the splits of one data set: train on it alone, or give the folder above it")
    found: dict[str, Path] = {}
    for entry in sorted(entry for entry in path.iterdir() if _is_data(entry)):
        name = clean_name(_stem(entry)) if entry.is_file() else name_of_path(entry)
        if name in found:
            raise ConfigError(f"{path}: {found[name].name} and {entry.name} would both be called {name!r}: rename one")
        found[name] = entry
    if not found:
        raise ConfigError(f"{path} holds no data set: expected files such as {', '.join(EXTENSIONS)}, or folders")
    return [Job(str(entry), method, name, **more) for name, entry in found.items()]


def left_out(folder: str | Path) -> list[str]:
    """Return the names in a folder of data sets that are no data; hidden ones do not count."""
    return sorted(e.name for e in Path(folder).expanduser().iterdir() if not _is_data(e) and e.name[0] != ".")


def _is_data(entry: Path) -> bool:
    if entry.name.startswith("."):
        return False
    if entry.is_dir():
        return any(_is_data(inner) and inner.is_file() for inner in entry.iterdir())
    return entry.name.lower().removesuffix(".gz").endswith(EXTENSIONS)


def _stem(entry: Path) -> str:
    name = entry.name.removesuffix(".gz")
    return Path(name).stem if entry.is_file() else name


# -- a grid ----------------------------------------------------------------------------------------------------------


def grid_jobs(
    data: Any,
    method: str | Method | None,
    name: str | None,
    grid: Mapping[str, Sequence[Any]],
    seeds: int = 1,
    **more: Any,
) -> list[Job]:
    """Return a job for every combination of settings, on one data set that is read once.

    Args:
        data: what `load_data` takes. Rows are split by the given seed; further seeds change start, order and dropout.
        method: a method or its shorthand.
        name: the names' beginning: ``reviews-lr0.0005-rank8-seed1``; None stores nothing.
        grid: training settings, task options or settings of the method -> values. A key that is both is written
            ``train.KEY`` or ``method.KEY``.
        seeds: runs of each combination, with the seeds from the given one on.
        more: of every job.

    Raises:
        UnknownNameError: a key that is neither.
        ConfigError: a key without values, or given twice; a value of a wrong type.
    """
    method = parse_method(method or DEFAULT_METHOD)
    own = {field.name for field in dataclasses.fields(method)}
    general = {*Settings.__dataclass_fields__, *option_names()}
    places = {key: _place(key, own, general, method.name) for key in grid}
    if seeds < 1:
        raise ConfigError(f"seeds = {seeds!r}: expected at least 1")
    if seeds > 1 and ("train", "seed") in places.values():
        raise ConfigError("the grid has a key seed: leave seeds out, or the key")
    for key, values in grid.items():
        if not values or isinstance(values, str) or len({repr(v) for v in values}) < len(values):
            raise ConfigError(f"grid {key} = {values!r}: expected a list of different values")
        if places[key][1] in more and places[key][0] == "train":
            raise ConfigError(f"{key} is in the grid and set to {more[places[key][1]]!r} as well: leave one out")
    first = more.get("seed") or 0
    source = taken(data, seed=first, **reading_options(more))
    jobs = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values))
        changed = {places[key][1]: value for key, value in chosen.items() if places[key][0] == "method"}
        settings = {places[key][1]: value for key, value in chosen.items() if places[key][0] == "train"}
        one = method.from_settings({**method.settings(), **changed}) if changed else method
        for seed in range(first, first + seeds):
            parts = [f"{places[key][1]}{_shown(value)}" for key, value in chosen.items()]
            parts += [f"seed{seed}"] if seeds > 1 else []
            title = None if name is None else "-".join([name, *parts])
            if title is not None and clean_name(title) != title:
                raise ConfigError(f"the grid makes a name {title!r}, which cannot be stored: give a shorter name")
            own_seed = {"seed": seed} if seeds > 1 else {}
            jobs.append(Job(source, one, title, **{**more, **settings, **own_seed}))
    return jobs


def _place(key: str, own: set[str], general: set[str], method: str) -> tuple[str, str]:
    """Return where a key of a grid belongs, 'train' or 'method', and its name there."""
    where, dot, rest = key.partition(".")
    if dot and where in ("train", "method"):
        if rest not in (general if where == "train" else own):
            raise unknown(f"{where} setting of the grid", rest, general if where == "train" else own)
        return where, rest
    if key in own and key in general:
        raise ConfigError(f"grid {key}: write train.{key} or method.{key}, as {method} has a setting of this name, too")
    if key not in own and key not in general:
        raise unknown(f"key of the grid (for {method})", key, own | general)
    return ("method" if key in own else "train"), key


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(c if c.isalnum() or c in "._" else "-" for c in text).strip("-.").replace("e-0", "e-")


def read_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Read ``lr=1e-4,5e-4`` texts: a key, and values between commas; a value with commas of its own has brackets.

    Raises:
        ConfigError: not of this form, or a key given twice.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        parts = _split(values)
        if not equals or not key.strip() or not all(parts):
            raise ConfigError(f"grid {text!r}: expected KEY=VALUE,VALUE such as lr=1e-4,5e-4")
        if key.strip() in found:
            raise ConfigError(f"grid {key.strip()} is given twice")
        found[key.strip()] = [_literal(part) for part in parts]
    return found


def _split(text: str) -> list[str]:
    """Split at the commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        if c == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def _literal(text: Any) -> Any:
    """Read a number, a quoted text, a tuple, true or false; anything else is text. YAML takes 5e-4 for text."""
    if not isinstance(text, str):
        return text
    words = {"true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# -- a file of jobs --------------------------------------------------------------------------------------------------


def read_jobs(path: str | Path) -> list[Job]:
    """Read a file of jobs: YAML, JSON or TOML with a list `jobs` (in YAML and JSON the list may be all there is).

    An entry has `data` (relative to the file) and may have `method`, `name` (the data's by default), `settings` (of
    training and of the task), `columns` (role -> column), `task`, `limit`, `group`, `max_length`, `template`,
    `pooling`, `init_from`, and `grid` (key -> values) with `seeds`, which make several jobs of it.

    Example::

        jobs:
          - data: reviews.csv
            method: lora(rank=8)
            settings: {lr: 1e-3, epochs: 3}
          - data: topics.jsonl
            name: topics
            method: bottleneck
            grid: {lr: [5e-4, 1e-3]}
            seeds: 2

    Raises:
        ConfigError: everything that is wrong, by file, entry and key.
    """
    path = Path(path).expanduser()
    found = read_plain(path, "jobs")
    if isinstance(found, dict):
        if extra := found.keys() - {"jobs"}:
            raise ConfigError(f"{path.name}: {unknown('key', sorted(map(str, extra))[0], ['jobs'])}")
        found = found.get("jobs")
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{path.name}: expected a list of jobs, each with data, method, name, settings")
    jobs: list[Job] = []
    wrong: list[str] = []
    for number, entry in enumerate(found, 1):
        try:
            jobs += _entry_jobs(path, entry)
        except OnebaseError as error:
            wrong.append(f"{path.name}, job {number}: {error}")
    names = [job.name for job in jobs]
    for name in sorted({name for name in names if name is not None and names.count(name) > 1}):
        wrong.append(f"{path.name}: several jobs are called {name!r}: give each a key name")
    if wrong:
        raise ConfigError("\n".join(wrong))
    return jobs


def _entry_jobs(path: Path, entry: Any) -> list[Job]:
    """Return the jobs of one entry; raises with the key that is wrong."""
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{entry!r}: expected keys and values such as data: reviews.csv")
    for key in entry:
        if key not in ENTRY:
            hint = " (it belongs under settings)" if key in Settings.__dataclass_fields__ else ""
            raise ConfigError(f"{unknown('key', str(key), ENTRY)}{hint}")
    data = _typed(entry, "data", str, "text: a file or a folder of splits")
    if data is None:
        raise ConfigError("the key data is missing: name a file or a folder of splits")
    if (path.parent / Path(data).expanduser()).exists():
        data = str(path.parent / Path(data).expanduser())
    name = _typed(entry, "name", str, "text") or name_of_path(data)
    check_name(name)
    method = parse_method(entry.get("method") or DEFAULT_METHOD)
    more: dict[str, Any] = {}
    for key in ("task", "group", "template", "pooling", "init_from"):
        more[key] = _typed(entry, key, str, "text")
    for key in ("limit", "max_length"):
        more[key] = _typed(entry, key, int, "a whole number")
    more["columns"] = _typed(entry, "columns", Mapping, "role: column")
    more = {key: value for key, value in more.items() if value is not None}
    settings = _typed(entry, "settings", Mapping, "keys and values such as lr: 0.0005") or {}
    known = {*Settings.__dataclass_fields__, *option_names()}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"settings: {unknown('setting', str(key), known)}")
        more[key] = _literal(value)
    grid = _typed(entry, "grid", Mapping, "keys and lists of values") or {}
    seeds = _typed(entry, "seeds", int, "a whole number")
    if not grid and seeds in (None, 1):
        return [Job(data, method, name, **more)]
    for key, values in grid.items():
        if not isinstance(values, list):
            raise ConfigError(f"grid: {key} = {values!r}: expected a list of values")
    lists = {str(key): [_literal(value) for value in values] for key, values in grid.items()}
    return grid_jobs(data, method, name, lists, 1 if seeds is None else seeds, **more)


def _typed(entry: Mapping[str, Any], key: str, kind: Any, expected: str) -> Any:
    value = entry.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise ConfigError(f"{key} = {value!r}: expected {expected}")
    return value


def data_of(job: Job) -> Data:
    """Read a job's data as `train_many` would."""
    more = dict(job.more)
    reading = reading_options(more)
    return taken(job.data, seed=more.get("seed") or 0, **reading)
