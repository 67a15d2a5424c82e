"""One set of training options out of the command line, --set, --config and the defaults, in this order."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.cli.failures import UsageError, misspelt

if TYPE_CHECKING:
    from onebase.methods.method import Method

# What `train` takes beside training settings and the method, by kind of value.
COLUMNS = ("text", "text_pair", "label", "prompt", "completion")
ROLES = (
    "labels", "score", "tokens", "tags", "spans", "question", "context", "answers", "answer_start", "source", "target",
    "messages", "anchor", "positive", "negative", "query", "document",
)  # fmt: skip
FILES = ("encoding", "delimiter", "quote", "sheet")
TEXTS = (
    "base",
    "data",
    "name",
    "task",
    *COLUMNS,
    *ROLES,
    "template",
    "pooling",
    "device",
    "dtype",
    "quantize",
    "init_from",
    "group",
    *FILES,
)
NUMBERS = ("limit", "max_length")
SWITCHES = ("dry_run", "no_save", "resume")
OPTIONS = (*TEXTS, *NUMBERS, *SWITCHES)
# Written before a training setting; needed only for train.dtype, as dtype alone is the base's.
TRAIN = "train."


@dataclass
class Chosen:
    """What training was asked for.

    Attributes:
        options: the options by name, as far as given.
        settings: training settings by name, as far as given.
        method: the method with all its settings.
        replaced: what a stronger source replaced as a whole, one sentence each.
        named: whether a source named the method, or a setting of it.
    """

    options: dict[str, Any]
    settings: dict[str, Any]
    method: Method
    replaced: list[str] = field(default_factory=list)
    named: bool = True

    def get(self, name: str, default: Any = None) -> Any:
        """Return an option, or the default where it was not given."""
        value = self.options.get(name)
        return default if value is None else value

    def command(self) -> dict[str, Any]:
        """Return everything that another run must be given to be the same, as `choose` reads it."""
        data = self.options.get("data")
        kept = {key: value for key, value in self.options.items() if key not in SWITCHES}
        if data is not None and Path(data).expanduser().exists():
            kept["data"] = str(Path(data).expanduser().resolve())
        settings = {(f"{TRAIN}{key}" if key in OPTIONS else key): value for key, value in self.settings.items()}
        return {**kept, **settings, "method": {"name": self.method.name, **self.method.settings()}}

    def task_options(self, kind: str) -> dict[str, Any]:
        """Return the settings that are options of a task."""
        from onebase.tasks import get_task

        return {key: value for key, value in self.settings.items() if key in get_task(kind).options}

    def settings_only(self, kind: str) -> dict[str, Any]:
        """Return the settings of training itself."""
        return {key: value for key, value in self.settings.items() if key not in self.task_options(kind)}


@dataclass
class _Source:
    """One place where options come from."""

    title: str
    values: dict[str, Any]
    method: str | None = None
    method_settings: dict[str, Any] = field(default_factory=dict)


def choose(
    line: Mapping[str, Any],
    sets: Sequence[str],
    config: Path | None,
    default_method: str,
    below: tuple[str, Mapping[str, Any]] | None = None,
) -> Chosen:
    """Merge all sources.

    Args:
        line: options of the command line by name; None where not given.
        sets: ``key=value`` texts.
        config: a .yaml, .yml, .json or .toml file, or None.
        default_method: where no source names a method.
        below: title and options of a source that all others replace, or None.

    Returns:
        What was asked for.

    Raises:
        UsageError: an unknown key (with the nearest one), a value of a wrong type, or a key given twice.
    """
    from onebase.tasks.registry import option_names
    from onebase.training.settings import Settings

    known = [*Settings.__dataclass_fields__, *option_names()]
    sources = [_from_line(line), _from_sets(sets)] + ([_from_file(config)] if config else [])
    if below is not None:
        sources.append(_sorted_out(below[0], below[1].items()))
    options: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for source in reversed(sources):
        for key, value in source.values.items():
            setting = key.removeprefix(TRAIN)
            if key not in OPTIONS and setting not in known:
                raise misspelt(f"key in {source.title}:", key, [*OPTIONS, *known, "method"])
            kept, name = (options, key) if key in OPTIONS else (settings, setting)
            if value is None:  # null: back to the default
                kept.pop(name, None)
            else:
                kept[name] = _checked(source.title, key, value)
    method, replaced = _merge_method(sources, default_method)
    named = any(source.method or source.method_settings for source in sources)
    return Chosen(options, settings, method, replaced, named)


def _from_line(line: Mapping[str, Any]) -> _Source:
    return _sorted_out("the command line", ((key, value) for key, value in line.items() if value is not None))


def _from_sets(sets: Sequence[str]) -> _Source:
    pairs = []
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {text!r}: expected key=value, such as warmup=0.06 or method.rank=16")
        pairs.append((key, value if _plain_key(key) in (*TEXTS, "method") else literal(value)))
    return _sorted_out("--set", pairs)


def _from_file(path: Path) -> _Source:
    from onebase.cli.config_file import read_config

    return _sorted_out(path.name, read_config(path).items())


def _sorted_out(title: str, pairs: Any) -> _Source:
    """Separate the method's keys from the others, and refuse a key that is given twice."""
    source = _Source(title, {})
    seen: set[str] = set()
    for given, value in _flat(pairs):
        key = _plain_key(given)
        if key in seen:
            raise UsageError(f"{title}: {given!r} is given twice")
        seen.add(key)
        if key == "method":
            source.method, settings = _read_method(title, value)
            source.method_settings = settings | source.method_settings
        elif key.startswith("method."):
            source.method_settings[key.removeprefix("method.")] = value
        else:
            source.values[key] = value
    return source


def _flat(pairs: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a mapping under ``method`` or ``train`` holds, with the name of the mapping before it."""
    for key, value in pairs:
        if _plain_key(key) == "method" and isinstance(value, Mapping):
            inner = dict(value)
            if "name" in inner:
                yield "method", inner.pop("name")
            settings = inner.pop("settings", None)
            for name, setting in [*inner.items(), *(settings.items() if isinstance(settings, Mapping) else ())]:
                yield f"method.{name}", setting
        elif _plain_key(key) == "train" and isinstance(value, Mapping):
            for name, setting in value.items():
                yield f"{TRAIN}{name}", setting
        else:
            yield str(key), value


def _plain_key(key: object) -> str:
    """Write a key in one way: ``--batch-size`` and ``train.batch_size`` are ``batch_size``."""
    text = str(key).strip().removeprefix("--")
    setting = text.removeprefix(TRAIN).replace("-", "_")
    if text.startswith(TRAIN):
        return TRAIN + setting if setting in OPTIONS else setting
    head, dot, rest = text.partition(".")
    return head.replace("-", "_") + dot + rest


def _read_method(title: str, value: Any) -> tuple[str, dict[str, Any]]:
    from onebase.methods.registry import _parse

    if not isinstance(value, str):
        raise UsageError(f"{title}: method = {value!r}: expected a name or a shorthand such as lora(rank=16)")
    return _parse(value)


def _merge_method(sources: Sequence[_Source], default: str) -> tuple[Method, list[str]]:
    """Take the name from the strongest source that has one; settings of the same method add up."""
    from onebase.errors import UnknownNameError
    from onebase.methods.registry import get_method

    strongest = next((s for s in sources if s.method), None)
    name = strongest.method if strongest and strongest.method else default
    settings: dict[str, Any] = {}
    replaced = []
    for source in reversed(sources):
        if source.method in (None, name):
            settings |= source.method_settings
        else:
            replaced.append(f"method {source.method} of {source.title} is replaced by {name}")
    try:
        cls = get_method(name)
        return cls.from_settings({key: _number(value, cls, key) for key, value in settings.items()}), replaced
    except UnknownNameError as error:
        raise UsageError(str(error)) from error


def _number(value: Any, cls: type[Method], key: str) -> Any:
    """Read a number that a file spells as text: YAML takes 5e-4 for a text."""
    hint = getattr(cls.__dataclass_fields__.get(key), "type", "")
    return literal(value) if isinstance(value, str) and "str" not in str(hint) and "Literal" not in str(hint) else value


def literal(text: str) -> Any:
    """Read ``0.06``, ``true``, ``none``, ``('q', 'v')``; anything else is text."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.strip().lower() in words:
        return words[text.strip().lower()]
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _checked(title: str, key: str, value: Any) -> Any:
    """Check the type of an option; training settings are checked where they are used."""
    if key == "labels" and isinstance(value, list):  # columns of 0 and 1
        good, expected = all(isinstance(name, str) for name in value), "a list of columns"
    elif key in TEXTS:
        good, expected = isinstance(value, str), "text (in quotes)"
    elif key in NUMBERS:
        good, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif key in SWITCHES:
        good, expected = isinstance(value, bool), "true or false"
    else:
        return literal(value) if isinstance(value, str) else value
    if not good:
        raise UsageError(f"{title}: {key} = {value!r}: expected {expected}")
    return value
