"""Public docstrings say what goes in, what comes out, and what is raised."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import onebase
from onebase import extend

SAYS_RESULT = re.compile(r"^(Returns?|Yields?|Whether|Where|The)\b|Returns itself", re.MULTILINE)


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield every public function, and every public method that its class is the first to define."""
    for module in (onebase, extend):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                yield name, thing
            elif inspect.isclass(thing):
                for key, value in vars(thing).items():
                    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                    inherited = any(hasattr(parent, key) for parent in thing.__mro__[1:])
                    if inspect.isfunction(function) and not key.startswith("_") and not inherited:
                        yield f"{name}.{key}", function


PUBLIC = dict(public())


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_are_complete(name: str) -> None:
    function = PUBLIC[name]
    doc = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    taken = [parameter for parameter in signature.parameters if parameter not in ("self", "cls")]
    assert doc, "no docstring"
    if len(taken) > 1:
        assert "Args:" in doc
        assert [p for p in taken if not re.search(rf"\b{p}\b", doc)] == [], "parameters that are not described"
    if signature.return_annotation not in (None, "None"):
        assert SAYS_RESULT.search(doc), "what it returns is not said"
    if re.search(r"\braise (?!NotImplementedError\b)\w", inspect.getsource(function)):
        assert re.search(r"^Raise", doc, re.MULTILINE), "what it raises is not said"


@pytest.mark.parametrize("name", [n for n in onebase.__all__ if inspect.isclass(getattr(onebase, n))])
def test_fields_of_public_classes_are_described(name: str) -> None:
    """Fields of dataclasses: in the section Attributes, or by a text below the field."""
    import dataclasses

    cls = getattr(onebase, name)
    if dataclasses.is_dataclass(cls):
        source = (cls.__doc__ or "") + inspect.getsource(cls)
        for field in dataclasses.fields(cls):
            below = re.search(rf'^    {field.name}: .*\n    """', source, re.MULTILINE)
            assert below or re.search(rf"^\s+(\w+, )*{field.name}(, \w+)*: \S", cls.__doc__ or "", re.MULTILINE), (
                field.name
            )
