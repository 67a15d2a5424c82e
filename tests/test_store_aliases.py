"""Aliases name versions that exist; rollback, diff and gc do what they say."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from onebase.errors import ConfigError, CorruptError, StoreError, UnknownNameError
from onebase.store import Store
from test_store import settings


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "home")
    for value in (1.0, 2.0, 4.0):
        metrics = {"adapter": {"accuracy": value / 8}}
        store.save("reviews", config=settings(metrics=metrics), tensors={"w": torch.full((4,), value)})
    return store


def test_an_alias_resolves_wherever_a_reference_does(store):
    store.promote("reviews@2", "prod")
    assert store.resolve("reviews@prod").ref == "reviews@2"
    assert store.resolve("reviews").ref == "reviews@3"
    store.promote("reviews@prod", "live")
    assert store.aliases("reviews") == {"prod": 2, "live": 2}
    with pytest.raises(UnknownNameError, match=r"no alias 'prdo'. It has: 1, 2, 3, live, prod"):
        store.resolve("reviews@prdo")


def test_rollback_walks_back_and_passes_over_what_is_gone(store):
    for version in (1, 2, 3, 1):
        store.promote(f"reviews@{version}", "prod")
    store.remove("reviews@3")
    assert store.rollback("reviews", "prod").version == 2
    assert store.rollback("reviews", "prod").version == 1
    with pytest.raises(StoreError, match="named nothing before reviews@1"):
        store.rollback("reviews", "prod")
    with pytest.raises(UnknownNameError, match="unknown alias of 'reviews' 'prd'"):
        store.rollback("reviews", "prd")


@pytest.mark.parametrize("ref", ["reviews@2", "reviews@prod", "reviews"])
def test_a_version_that_an_alias_names_stays_unless_forced(store, ref):
    store.promote("reviews@2", "prod")
    with pytest.raises(StoreError, match="reviews@2 is 'prod'"):
        store.remove(ref)
    assert len(store.list()) == 3
    assert 2 in [place.version for place in store.remove(ref, force=True)]
    assert store.aliases("reviews") == {}


def test_a_damaged_version_is_not_promoted(store):
    (store.resolve("reviews@1").path / "README.md").unlink()
    with pytest.raises(CorruptError, match=r"missing file README\.md"):
        store.promote("reviews@1", "prod")
    assert store.aliases("reviews") == {}


@pytest.mark.parametrize("alias", ["", "3", "a b", "../x", "-a", "x" * 33, "a@b", "ü"])
def test_bad_aliases(store, alias):
    with pytest.raises(ConfigError, match="alias"):
        store.promote("reviews@1", alias)


@pytest.mark.parametrize("text", ["", "[]", '{"prod": 3}', '{"prod": []}', '{"prod": ["1"]}', '{"../x": [1]}', "{" * 9])
def test_a_damaged_file_of_aliases_is_named(store, text):
    (store.root / "adapters" / "reviews" / ".aliases.json").write_text(text)
    for act in (lambda: store.resolve("reviews@prod"), lambda: store.remove("reviews@1")):
        with pytest.raises(CorruptError, match=r"\.aliases\.json"):
            act()
    assert store.resolve("reviews@2").version == 2


def test_diff(store):
    found = store.diff("reviews@1", "reviews@2")
    assert (found.same, found.settings) == (False, {})
    assert found.metrics == {"adapter.accuracy": (0.125, 0.25)}
    assert found.tensors == {"w": 1.0}
    assert (found.distance, found.relative) == (2.0, 1.0)
    assert store.diff("reviews@1", "reviews@1").same
    other = settings(method={"name": "ia3", "settings": {}})
    store.save("other", config=other, tensors={"w": torch.zeros(5), "v": torch.ones(1)})
    found = store.diff("reviews@1", "other")
    assert found.settings["method.name"] == ("lora", "ia3")
    assert found.tensors == {"v": None, "w": None}


def test_gc_lists_first_and_keeps_what_is_named(store):
    store.promote("reviews@1", "prod")
    old, new = store.root / ".tmp" / "save-old", store.root / ".tmp" / "save-new"
    old.mkdir()
    new.mkdir()
    os.utime(old, (time.time() - 7200,) * 2)
    assert store.gc().leftovers == (old,)
    assert [v.ref for v in store.gc(keep=1).versions] == ["reviews@2"]
    assert old.exists() and len(store.list()) == 3
    store.gc(keep=1, apply=True)
    assert [s.ref for s in store.list()] == ["reviews@1", "reviews@3"]
    assert (old.exists(), new.exists()) == (False, True)
    with pytest.raises(ConfigError, match="keep = 0"):
        store.gc(keep=0)


def test_the_commands(store, monkeypatch):
    from typer.testing import CliRunner

    from onebase.cli.main import app

    monkeypatch.setenv("ONEBASE_HOME", str(store.root))

    def run(*words: str, code: int = 0) -> dict:
        result = CliRunner().invoke(app, [*words, "--json"])
        assert result.exit_code == code, result.output
        return json.loads(result.stdout)

    assert run("promote", "reviews@1", "prod")["ref"] == "reviews@1"
    assert run("promote", "reviews@2", "prod")["version"] == 2
    assert run("rollback", "reviews", "prod")["version"] == 1
    assert run("show", "reviews@prod")["ref"] == "reviews@1"
    assert [row["aliases"] for row in run("ls")["adapters"]] == [["prod"], [], []]
    assert run("diff", "reviews@prod", "reviews@3")["relative"] == 3.0
    assert "reviews@1 is 'prod'" in str(run("rm", "reviews@prod", "--yes", code=1))
    assert run("gc", "--keep", "1") == {"removed": False, "leftovers": [], "versions": ["reviews@2"], "kept": {}}
    assert run("gc", "--keep", "1", "--yes")["removed"]
    assert run("rm", "reviews", "--yes", "--force")["removed"] == ["reviews@1", "reviews@3"]
    for words in (["diff", "x", "y"], ["promote", "x@1", "prod"], ["rollback", "x", "prod"]):
        assert CliRunner().invoke(app, words).exit_code != 0


def test_the_commands_speak_to_people(store, monkeypatch):
    from typer.testing import CliRunner

    from onebase.cli.main import app

    monkeypatch.setenv("ONEBASE_HOME", str(store.root))
    said = {words: CliRunner().invoke(app, words.split()).stdout for words in (
        "promote reviews@1 prod", "diff reviews@1 reviews@2", "diff reviews@1 reviews@prod", "gc --keep 1", "ls"
    )}  # fmt: skip
    assert said["promote reviews@1 prod"] == "reviews@prod is reviews@1\n"
    assert "all tensors: distance 2, 1 of the norm of reviews@1" in said["diff reviews@1 reviews@2"]
    assert "the same settings and tensors" in said["diff reviews@1 reviews@prod"]
    assert said["gc --keep 1"] == "reviews@2\n"
    assert "reviews@1 prod" in said["ls"]
