"""What a stored composition is made of stays in the store, unless somebody insists."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from onebase.base import Base
from onebase.compose import combine, stack
from onebase.errors import StoreError
from onebase.store import Store

sys.path.insert(0, str(Path(__file__).parent / "contract"))
import checks
from families import make


@pytest.fixture(params=["folder", "url"])
def store(request, tmp_path, monkeypatch) -> Store:
    """a@1, a@2, b@1, mix@1 of a@1 and b@1, outer@1 of mix@1 and c@1."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    if request.param == "url":
        pytest.importorskip("fsspec")
    store = Store(tmp_path / "s" if request.param == "folder" else f"file://{tmp_path}/s")
    from families import tiny_tokenizer

    with Base(make("bert"), tiny_tokenizer()) as base:
        for number, name in enumerate("abc"):
            checks.disturb(base.add(name, "lora(rank=2)", seed=number).module, number)
            base.save(name, store=store)
        base.add("mix", combine("a", "b"))
        base.save("mix", store=store)
        base.add("outer", stack("mix", "c"))
        base.save("outer", store=store)
        checks.disturb(base.adapters["a"].module, 9)
        base.save("a", store=store)
    return store


def refs(store: Store) -> list[str]:
    """Return every version in the store."""
    return [place.ref for place in store._places()]


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("a@1", "a@1 is a part of mix@1"),
        ("a", "a@1 is a part of mix@1"),
        ("b", "b@1 is a part of mix@1"),
        ("mix", "mix@1 is a part of outer@1"),
        ("c@1", "c@1 is a part of outer@1"),
    ],
)
def test_a_part_is_not_removed_unless_forced(store, ref, message) -> None:
    before = refs(store)
    with pytest.raises(StoreError, match=f"{message}.*Remove the composition first, or pass --force"):
        store.remove(ref)
    assert refs(store) == before
    assert store.remove(ref, force=True)
    assert len(refs(store)) < len(before)


def test_what_nothing_is_made_of_goes(store) -> None:
    assert [gone.ref for gone in store.remove("a@2")] == ["a@2"]
    assert [gone.ref for name in ("outer", "mix", "a", "b", "c") for gone in store.remove(name)][:2] == [
        "outer@1", "mix@1",
    ]  # fmt: skip
    assert refs(store) == []


def test_gc_keeps_parts_and_says_what_for(store) -> None:
    found = store.gc(keep=1, apply=True)
    assert found.versions == ()
    assert {place.ref: [user.ref for user in users] for place, users in found.kept.items()} == {"a@1": ["mix@1"]}
    store.remove("outer")
    store.remove("mix")
    assert [place.ref for place in store.gc(keep=1, apply=True).versions] == ["a@1"]
    assert refs(store) == ["a@2", "b@1", "c@1"]


def test_old_compositions_go_and_their_parts_with_them(store) -> None:
    """A part of a composition that stays because another is made of it stays too; else both go at once."""
    from families import tiny_tokenizer

    with Base(make("bert"), tiny_tokenizer()) as base:
        base.load("a", store=store)
        base.load("b", store=store)
        base.add("mix", combine("a", "b"))
        base.save("mix", store=store)
        kept = store.gc(keep=1).kept
        assert {place.ref for place in kept} == {"a@1", "mix@1"}  # outer@1 needs mix@1, which needs a@1
        base.load("c", store=store)
        base.add("outer", stack("mix", "c"))
        base.save("outer", store=store)
    found = store.gc(keep=1, apply=True)
    assert {place.ref for place in found.versions} == {"a@1", "mix@1", "outer@1"} and not found.kept
    assert refs(store) == ["a@2", "b@1", "c@1", "mix@2", "outer@2"]


def test_damaged_configs_need_nothing(tmp_path) -> None:
    """What cannot be loaded is no reason to keep a version, and none to fail."""
    import torch

    from test_store import settings

    store = Store(tmp_path)
    part = store.save("a", config=settings(), tensors={"w": torch.ones(2)})
    deep: dict = {"kind": "stack", "parts": [{"adapter": "a", "ref": "a@1", "digest": part.digest}]}
    for _ in range(100):
        deep = {"kind": "stack", "parts": [{"composition": deep}]}
    whole = store.save("mix", config=settings(), tensors={"w": torch.ones(2)})
    good = json.loads((whole.path / "adapter_config.json").read_text())
    for damage in (
        b'{"parts"', b'{"method": {"settings": {"parts": 3}}}', b'["parts"]', b'{"method": ["parts"]}',
        json.dumps({**good, "method": {"name": "x", "settings": deep}}).encode(),
        json.dumps({**good, "method": {"name": "x", "settings": {"parts": [3, {"digest": 4}, None]}}}).encode(),
    ):  # fmt: skip
        (whole.path / "adapter_config.json").write_bytes(damage)
        assert store._needs().of([part]) == {}
    (whole.path / "adapter_config.json").unlink()
    (whole.path / "adapter_config.json").mkdir()
    assert [gone.ref for gone in store.remove("a")] == ["a@1"]


def test_the_commands_say_which_composition(store) -> None:
    from typer.testing import CliRunner

    from onebase.cli.main import app

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, list(words), env={"ONEBASE_HOME": getattr(store, "url", str(store.root))})
        return done.exit_code, done.output + done.stderr

    code, said = run("rm", "b", "--yes")
    assert code and "b@1 is a part of mix@1" in said
    code, said = run("gc", "--keep", "1")
    assert code == 0 and "a@1 stays: mix@1 is made of it" in said
    assert run("rm", "a", "b", "mix", "outer", "--yes")[0] == 0
    assert refs(store) == ["c@1"]
