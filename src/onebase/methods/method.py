"""What a method is: a frozen config that chooses sites and builds the module of an adapter."""

from __future__ import annotations

import dataclasses
import numbers
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from onebase.core.contracts import AdapterModule
from onebase.core.patterns import safe_pattern
from onebase.core.site import Site
from onebase.errors import ConfigError, unknown

PARTS = ("q", "k", "v", "o", "gate", "up", "down")
PAPER = ("q", "v")


@dataclass(frozen=True, eq=False)
class Init:
    """What a method may draw on while it builds.

    Attributes:
        generator: CPU generator; the only source of randomness.
        embed: text -> (n, D) embedded input of its tokens, without special tokens.
        kv: text, n -> {kv site: (K, V)}, each (n, heads, head dim): what n tokens of text look like to attention;
            the text is repeated when it is shorter than n.
        embed_ids: token ids -> (n, D).
        labels: label names of the task, () if it has none.
        frequent: k -> the ids of the k most frequent tokens, of the training data where there is some.
        word_ids: words of the method's `vocabulary` -> (their ids, those that are new to the base's tokenizer).
    """

    generator: torch.Generator
    embed: Callable[[str], Tensor]
    kv: Callable[[str, int], dict[str, tuple[Tensor, Tensor]]]
    embed_ids: Callable[[Sequence[int]], Tensor]
    labels: tuple[str, ...]
    frequent: Callable[[int], list[int]]
    word_ids: Callable[[Sequence[str]], tuple[list[int], set[str]]]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of adaptation: frozen, keyword-only, validated on construction.

    Subclasses are frozen keyword-only dataclasses with a class attribute `name` and implement `select` and `build`.

    Class attributes:
        name: the registered name.
        summary: one line for lists.
        epsilon: largest change of a logit at initialisation: 0.0 is identity; None where the method starts away
            from the base by design (prompts, prefixes).
        mergeable: whether its effect is a change of weights.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    epsilon: ClassVar[float | None] = 0.0
    mergeable: ClassVar[bool] = False

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites to adapt, out of every site of the base.

        Raises:
            ConfigError, UnknownNameError, UnsupportedError: when a pattern matches nothing or a site cannot serve.
        """
        raise NotImplementedError

    def needs(self, sites: Sequence[Site]) -> list[Site]:
        """Return the sites that get a delta, out of every site of the base: those that the base may not refuse.

        Raises:
            ConfigError, UnknownNameError, UnsupportedError: as `select`.
        """
        return self.select(sites)

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build the module of one adapter.

        Args:
            sites: what `select` returned, in the order of the base.
            init: randomness, and what the base knows of words; nothing else may decide the start.

        Returns:
            A delta per site, float32, on the CPU. The same `init` gives the same values.

        Raises:
            UnsupportedError: a site has not what the method reads, such as a weight matrix.
        """
        raise NotImplementedError

    def vocabulary(self) -> tuple[str, ...]:
        """Return the words that this adapter's tokenizer must keep whole; () leaves the base's as it is."""
        return ()

    def __add__(self, other: Method) -> Method:
        """Return the union of two methods, in written order."""
        from onebase.methods.union import Union

        return Union.of(self, other) if isinstance(other, Method) else NotImplemented

    def settings(self) -> dict[str, Any]:
        """Return the settings as plain JSON values; `from_settings` reads them back."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def shorthand(self) -> str:
        """Return ``name(key=value, ...)`` with the settings that differ from the defaults."""
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != (f.default if f.default_factory is dataclasses.MISSING else f.default_factory())
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Build from a mapping of settings.

        Args:
            settings: JSON values by name; lists become tuples, and what is not named keeps its default.

        Returns:
            The method, validated.

        Raises:
            UnknownNameError: a setting that this method does not have.
            ConfigError: a value of the wrong type or out of range.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in settings:
            if key not in fields:
                raise unknown(f"setting of method {cls.name}", key, fields)
        hints = typing.get_type_hints(cls)
        values = {key: _coerce(f"{cls.name}.{key}", value, hints[key]) for key, value in settings.items()}
        return cls(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _coerce(where: str, value: Any, hint: Any) -> Any:
    """Check a literal or JSON value against a field's type; lists become tuples, digits in keys become ints."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        origin, args = typing.get_origin(option), typing.get_args(option)
        if option is type(None) and value is None:
            return None
        if option is bool and isinstance(value, bool):
            return value
        plain = plain_number(value)
        if option is int and type(plain) is int:
            return plain
        if option is float and type(plain) in (int, float):
            return float(plain)
        if option is str and isinstance(value, str):
            return value
        if origin is typing.Literal and value in args:
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(_coerce(where, v, args[0]) for v in value)
        if origin in (dict, Mapping) and isinstance(value, Mapping):
            return {_coerce_key(where, k, args[0]): _coerce(where, v, args[1]) for k, v in value.items()}
    shown = " or ".join(str(getattr(o, "__name__", o)) if typing.get_origin(o) is None else str(o) for o in options)
    raise ConfigError(f"{where} = {value!r}: expected {shown.replace('typing.', '')}")


def plain_number(value: Any) -> Any:
    """Return a number of any library, such as numpy's, as Python's own; anything else, and a truth value, as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def whole(name: str, value: Any, least: int | None = None) -> int:
    """Return a setting as an int, from any type that counts as a whole number; raise where it is none."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        raise ConfigError(
            f"{name} = {value!r}: expected a whole number" + ("" if least is None else f" of at least {least}")
        )
    return number


def _coerce_key(where: str, key: Any, hint: Any) -> Any:
    if hint is int and isinstance(key, str) and key.lstrip("-").isdigit():
        return int(key)
    return _coerce(where, key, hint)


def check(condition: bool, where: str, value: object, expected: str) -> None:
    """Raise ConfigError unless a setting is as it must be: ``lora.rank = 0: expected at least 1``.

    Args:
        condition: whether it is.
        where: method and setting, such as ``lora.rank``.
        value: what was given.
        expected: what would be right, as the end of the message.

    Raises:
        ConfigError: the condition does not hold.
    """
    if not condition:
        raise ConfigError(f"{where} = {value!r}: expected {expected}")


def match_linears(sites: Iterable[Site], wanted: str | Sequence[str], where: str) -> list[Site]:
    """Return linear sites by part or regular expression.

    Args:
        sites: every site of the base.
        wanted: ``all`` (every linear of every layer), ``paper`` (q and v), a part name, ``re:PATTERN`` that is
            searched in the full site name, or a sequence of part names and patterns.
        where: the setting, for messages.

    Raises:
        UnknownNameError: a part that this base does not have.
        ConfigError: a pattern that matches nothing or is no regular expression.
    """
    linears = [site for site in sites if site.kind == "linear"]
    if wanted == "all":
        return [site for site in linears if site.path]  # a role without a module is no linear; asked by name it raises
    patterns = PAPER if wanted == "paper" else (wanted,) if isinstance(wanted, str) else tuple(wanted)
    check(bool(patterns), where, wanted, "at least one part or pattern")
    chosen: dict[str, Site] = {}
    for pattern in patterns:
        found = [site for site in linears if matches(site, pattern, where)]
        if not found and pattern.startswith("re:"):
            raise ConfigError(f"{where}: {pattern!r} matches no site; sites look like {linears[0].name!r}")
        if not found:
            raise unknown(f"part in {where}", pattern, {site.part for site in linears} | {"all", "paper"})
        chosen.update((site.name, site) for site in found)
    return [site for site in linears if site.name in chosen]


def matches(site: Site, pattern: str, where: str) -> bool:
    """Whether a site is the part `pattern`, or matches ``re:PATTERN`` anywhere in its name."""
    if not pattern.startswith("re:"):
        return site.part == pattern
    try:
        return safe_pattern(pattern[3:]).search(site.name) is not None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
