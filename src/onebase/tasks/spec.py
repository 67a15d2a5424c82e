"""A task spec from a file is checked before anything is built from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from onebase.errors import ConfigError, UnknownNameError
from onebase.tasks.registry import get_task
from onebase.tasks.task import Task

# kind -> labels without which there is no head
LEAST_LABELS = {"classification": 2, "image-classification": 2, "multilabel": 1, "tokens": 1}
LEAST = {"overlap": 0, "answer_length": 1, "cache_tokens": 1, "generate": 0}  # of options that count something
POOLINGS = ("mean", "first", "last")
WIDEST = 2**16  # units of a head's hidden layer: more than any base has features
SHORTEST, LONGEST = 4, 2**24  # tokens of a text; the longest is beyond any base, and keeps sums in 64 bits


def template_problem(task: Task, template: str, pair: bool) -> str:
    """Say what is wrong with a template, or ''.

    Args:
        task: whose places it must have.
        template: the text; '' is none.
        pair: there is a second text.
    """
    places = [*task.places, *(["text_pair"] if pair and "text" in task.places else [])]
    if template and (not places or any("{" + place + "}" not in template for place in places)):
        return f"template {template!r}: expected places for {places or 'nothing (plain text)'}"
    return ""


def spec_problems(spec: Mapping[str, Any], limit: int | None) -> Iterator[str]:
    """Say what is wrong with a task spec, one message per field.

    Args:
        spec: as stored.
        limit: positions of the base; None where there is no limit.
    """
    kind = spec.get("kind")
    try:
        task = get_task(kind)  # type: ignore[arg-type]
    except (UnknownNameError, TypeError) as error:
        yield f"task kind {kind!r}: {error}"
        return
    labels = spec.get("labels")
    least = LEAST_LABELS.get(str(kind), 0)
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        yield f"task labels = {labels!r}: expected a list of texts"
    elif len(set(labels)) < len(labels):
        yield f"task labels = {labels!r}: a label is there twice"
    elif len(labels) < least:
        yield f"task labels = {labels!r}: {kind} has at least {least}"
    yield from _field_problems(task, spec, limit)
    template = spec.get("template", "")
    if isinstance(template, str) and (problem := template_problem(task, template, spec.get("pair") is True)):
        yield f"task {problem}"


def check_options(task: Task, spec: Mapping[str, Any], limit: int | None) -> None:
    """Raise ConfigError for values of a new spec that no task can use, before the task reads them.

    Args:
        task: whose spec it is.
        spec: labels, and what is known of the data, may still be missing.
        limit: positions of the base; None where there is no limit.
    """
    _refuse([*_field_problems(task, spec, limit), *_range_problems(task, spec)])


def check_spec(spec: Mapping[str, Any], limit: int | None) -> None:
    """Raise ConfigError for a new spec that could be stored and not be loaded again."""
    _refuse([*spec_problems(spec, limit)])


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ConfigError("; ".join(problems))


def _field_problems(task: Task, spec: Mapping[str, Any], limit: int | None) -> Iterator[str]:
    """Say what is wrong with the type of a field, or with a field that every task has."""
    if spec.get("pooling") not in POOLINGS:
        yield f"task pooling = {spec.get('pooling')!r}: expected {', '.join(POOLINGS)}"
    length, longest = spec.get("max_length"), LONGEST if limit is None else limit
    if type(length) is not int or not SHORTEST <= length <= longest:
        yield f"task max_length = {length!r}: expected {SHORTEST} to {longest} tokens"
    if not isinstance(spec.get("template", ""), str):
        yield f"task template = {spec['template']!r}: expected a text"
    if type(spec.get("pair", False)) is not bool:
        yield f"task pair = {spec.get('pair')!r}: expected true or false"
    yield from _head_problems(spec.get("head"))
    for name, default in task.options.items():
        value = spec.get(name, default)
        if type(default) in (bool, int) and type(value) is not type(default):
            expected = "a whole number" if type(default) is int else "true or false"
            yield f"task {name} = {value!r}: expected {expected}"


def _range_problems(task: Task, spec: Mapping[str, Any]) -> Iterator[str]:
    """Say which options are out of range. A stored spec is not asked: an odd overlap is read as a smaller one."""
    for name, least in LEAST.items():
        value = spec.get(name, least)
        if name in task.options and type(value) is int and value < least:
            yield f"task {name} = {value!r}: expected at least {least}"
    overlap, length = spec.get("overlap"), spec.get("max_length")
    given = overlap != task.options.get("overlap", overlap)  # the default is cut to fit
    if given and isinstance(overlap, int) and isinstance(length, int) and overlap >= length:
        yield f"task overlap = {overlap!r}: expected fewer tokens than max_length = {length}"


def _head_problems(form: Any) -> Iterator[str]:
    """Say what is wrong with the hidden layer of a head: {"hidden": units, "activation": name}, or None."""
    from onebase.heads import ACTIVATIONS

    if form is None:
        return
    if not isinstance(form, Mapping) or set(form) != {"hidden", "activation"}:
        yield f"task head {form!r}: expected hidden and activation"
    elif type(form["hidden"]) is not int or not 1 <= form["hidden"] <= WIDEST:
        yield f"task head hidden {form['hidden']!r}: expected 1 to {WIDEST}"
    elif not isinstance(form["activation"], str) or form["activation"] not in ACTIVATIONS:
        yield f"task head activation {form['activation']!r}: expected {', '.join(ACTIVATIONS)}"
