"""The public surface: exactly these names, each of which resolves and is documented."""

from __future__ import annotations

import inspect

import pytest

import onebase

SURFACE = [
    "Base",
    "Bottleneck",
    "Data",
    "Job",
    "LoRA",
    "Method",
    "Prediction",
    "Prefix",
    "Prompt",
    "Run",
    "Store",
    "compare",
    "errors",
    "evaluate",
    "extend",
    "load_base",
    "load_data",
    "parse_method",
    "train",
    "train_many",
]


def test_all_is_the_surface() -> None:
    assert sorted(onebase.__all__) == SURFACE
    assert len(SURFACE) <= 20
    assert dir(onebase) == SURFACE


@pytest.mark.parametrize("name", SURFACE)
def test_every_name_resolves_and_says_what_it_is(name: str) -> None:
    thing = getattr(onebase, name)
    assert inspect.getdoc(thing), name


def test_functions_stay_functions_after_their_packages_are_imported() -> None:
    import onebase.evaluation
    import onebase.training

    assert callable(onebase.train)
    assert callable(onebase.evaluate)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = onebase.trian  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["Base", "Run", "Store"])
def test_public_methods_are_documented(name: str) -> None:
    for attribute, value in vars(getattr(onebase, name)).items():
        if not attribute.startswith("_") and callable(value):
            assert inspect.getdoc(value), f"{name}.{attribute}"
