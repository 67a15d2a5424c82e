"""The registry of methods and the shorthand that names them: ``"lora(rank=16)"``."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from onebase.errors import ConfigError, UnknownNameError, unknown

if TYPE_CHECKING:
    from onebase.methods.method import Method

Class = TypeVar("Class", bound="type[Method]")

# Name -> module. Listing the names must not import torch.
BUILT_IN = {
    "adalora": "onebase.methods.adalora",
    "bitfit": "onebase.methods.bitfit",
    "bottleneck": "onebase.methods.bottleneck",
    "dense": "onebase.methods.dense",
    "dora": "onebase.methods.dora",
    "hira": "onebase.methods.hira",
    "ia3": "onebase.methods.ia3",
    "layernorm": "onebase.methods.layernorm",
    "lora": "onebase.methods.lora",
    "loreft": "onebase.methods.loreft",
    "mam": "onebase.methods.mam",
    "prefix": "onebase.methods.prefix",
    "prompt": "onebase.methods.prompt",
    "tokens": "onebase.methods.tokens",
    "union": "onebase.methods.union",
    "vera": "onebase.methods.vera",
}
ENTRY_POINTS = "onebase.methods"
# What papers call forms of a method -> the method and its settings.
FORMS = {preset: ("bottleneck", {"preset": preset}) for preset in ("houlsby", "pfeiffer", "parallel")}
# What is compared with adapters and is none.
NO_ADAPTERS = {
    "full": "full fine-tuning changes the base itself and makes no adapter",
    "head": "a head alone leaves the base as it is, and every adapter is compared with it anyway",
}

_REGISTERED: dict[str, type[Method]] = {}


def register(cls: Class) -> Class:
    """Make a method known under its `name`: for the command line, files, tests and shorthand.

    Args:
        cls: a frozen dataclass derived from `Method`, with a class attribute `name`.

    Returns:
        The class, so that this is a decorator.

    Raises:
        ConfigError: the name is taken by another class, or is no identifier.
    """
    name = cls.name
    if not name.isidentifier() or name != name.lower():
        raise ConfigError(f"method name {name!r} must be a lower-case identifier")
    taken = _REGISTERED.get(name)
    if taken is not None and taken.__qualname__ != cls.__qualname__:
        raise ConfigError(f"method name {name!r} is taken by {taken.__module__}.{taken.__qualname__}")
    if taken is None and name in BUILT_IN and cls.__module__ != BUILT_IN[name]:
        raise ConfigError(f"method name {name!r} is taken by {BUILT_IN[name]}")
    _REGISTERED[name] = cls
    return cls


def unregister(name: str) -> None:
    """Forget a method that was registered at run time."""
    _REGISTERED.pop(name, None)


def _entry_points() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def method_names() -> list[str]:
    """Return every known method name, sorted, without importing torch."""
    return sorted({*BUILT_IN, *_REGISTERED, *_entry_points()})


def get_method(name: str) -> type[Method]:
    """Return the class of a method.

    Raises:
        UnknownNameError: no method has this name.
    """
    if name not in _REGISTERED:
        if name in BUILT_IN:
            importlib.import_module(BUILT_IN[name])
        elif name in (points := _entry_points()):
            register(points[name].load())
    if name not in _REGISTERED and name in NO_ADAPTERS:
        raise UnknownNameError(f"method {name!r}: {NO_ADAPTERS[name]}; onebase compare measures what it gains")
    if name not in _REGISTERED:
        raise unknown("method", name, method_names())
    return _REGISTERED[name]


def all_methods() -> dict[str, type[Method]]:
    """Return name -> class of every known method."""
    return {name: get_method(name) for name in method_names()}


def parse_method(given: str | Method | Mapping[str, Any]) -> Method:
    """Return a method from a shorthand string, a stored mapping or a method.

    Args:
        given: ``"lora"``, ``"lora(rank=16, sites='paper')"`` (arguments are literals and are never evaluated),
            ``"prefix + bottleneck(preset='parallel')"``, ``"pfeiffer"`` for ``"bottleneck(preset='pfeiffer')"``,
            ``{"name": "lora", "settings": {"rank": 16}}``, or a method instance.

    Raises:
        ConfigError: not a call with literal keyword arguments, a mapping with other keys, no method at all, or a wrong
            setting.
        UnknownNameError: no such method or setting.
    """
    if isinstance(given, str):
        name, settings = _parse(given)
    elif isinstance(given, Mapping):
        name, settings = _parse_mapping(given)
    else:
        return _instance(given)
    return get_method(name).from_settings(settings)


def _parse_mapping(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Read ``{"name": ..., "settings": {...}}``; a setting beside the name would be left out in silence."""
    how = "expected a name and settings, such as {'name': 'lora', 'settings': {'rank': 4}}"
    strange = sorted(map(str, given.keys() - {"name", "settings"}))
    if strange:
        raise ConfigError(f"method {dict(given)!r} has {', '.join(strange)}: {how}")
    name, settings = given.get("name"), given.get("settings")
    if not isinstance(name, str) or not isinstance(settings, Mapping | None):
        raise ConfigError(f"method {dict(given)!r}: {how}")
    return name, dict(settings or {})


def _instance(given: Any) -> Method:
    """Return what is a method already."""
    from onebase.methods.method import Method

    if isinstance(given, Method):
        return given
    if isinstance(given, type) and issubclass(given, Method):
        raise ConfigError(f"method {given.__name__} is a class: pass one of it, {given.__name__}()")
    raise ConfigError(f"method = {given!r}: expected a method such as LoRA(rank=4), or its shorthand 'lora(rank=4)'")


def split_methods(given: Sequence[str]) -> list[str]:
    """Return shorthands one by one of lists with commas, such as ``"lora(rank=4, alpha=8),prefix"``."""
    found = []
    for text in given:
        try:
            node = ast.parse(f"({text},)", mode="eval").body
            parts = [ast.unparse(part) for part in node.elts]  # type: ignore[attr-defined]
        except (SyntaxError, ValueError, AttributeError, RecursionError, MemoryError):
            parts = [text]  # `parse_method` says what is wrong with it
        found += parts
    return found


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Read ``name(key=literal, ...)``, or several of them with + between as the parts of a union."""
    how = f"method {text!r}: write name(key=literal, ...), e.g. lora(rank=16), or several with + between"
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise ConfigError(how) from None
    calls: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):  # a + b + c is (a + b) + c
        calls.insert(0, node.right)
        node = node.left
    found = [_parse_call(call, text, how) for call in (node, *calls)]
    if len(found) == 1:
        return found[0]
    return "union", {"parts": [{"name": name, "settings": settings} for name, settings in found]}


def _parse_call(node: ast.expr, text: str, how: str) -> tuple[str, dict[str, Any]]:
    if isinstance(node, ast.Name):
        return _form(node.id, {})
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ConfigError(how)
    settings: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in settings:
            raise ConfigError(how)
        try:
            settings[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise ConfigError(f"method {text!r}: the value of {keyword.arg!r} is not a literal") from None
    return _form(node.func.id, settings)


def _form(name: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Write what papers call a form of a method as that method; a method that was registered as such comes first."""
    if name not in FORMS or name in method_names():
        return name, settings
    method, own = FORMS[name]
    for key in own.keys() & settings.keys():
        raise ConfigError(f"method {name!r} is {method}({key}={own[key]!r}): leave {key} out")
    return method, own | settings
