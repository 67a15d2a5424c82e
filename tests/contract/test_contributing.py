"""The method that CONTRIBUTING.md shows passes the contract of the built-in ones."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import checks
import pytest
from families import make
from methods import variants

from onebase.base import Base
from onebase.extend import unregister
from onebase.methods import method_names, parse_method
from onebase.store import Store

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
NAME = "blockscale"


@pytest.fixture
def example(tmp_path):
    """Import the page's example from a file, as its reader would, and forget it afterwards."""
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    source = next(block for block in blocks if f'"{NAME}"' in block)
    path = tmp_path / "blockscale.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("blockscale_of_the_page", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield parse_method(NAME)
    finally:
        unregister(NAME)
        del sys.modules[spec.name]
    assert NAME not in method_names()


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_example_keeps_the_contract(family, example, tokenizer, tmp_path):
    """The start is the base, rows mix exactly, only the adapter trains, files come back, the base is left as it was."""
    model = make(family)
    before = checks.snapshot(model)
    with Base(model, tokenizer) as base:
        assert checks.carried(base, variants(NAME))
        checks.starts_at_the_base(base, "a", example)
        names = checks.attach(base, {"a": example, "b": parse_method("lora(rank=2)"), "c": example})
        checks.adapters_are_visible(base, names)
        checks.mixed_equals_alone(base, names)
        checks.trains_only_the_adapter(base, "a")
        checks.folds_and_reloads(base, "a", Store(tmp_path / "store"))
    assert checks.differences(before, checks.snapshot(model)) == []
