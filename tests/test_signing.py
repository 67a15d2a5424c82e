"""Signatures: what a trusted key signed loads, and nothing else where keys are trusted."""

from __future__ import annotations

import json
import shutil
import stat

import pytest
import torch
from typer.testing import CliRunner

from onebase.cli.main import app
from onebase.errors import ConfigError, CorruptError, StoreError
from onebase.store import Store
from onebase.store.signing import SIGNATURE_FILE, VARIABLE, make_key, read_signature, sign
from test_hub import CONFIG

pytest.importorskip("cryptography")


@pytest.fixture
def stored(tmp_path):
    return Store(tmp_path / "s").save("a", config=CONFIG, tensors={"x": torch.ones(3)})


def test_only_what_a_trusted_key_signed_loads(stored, tmp_path, monkeypatch):
    mine, other = make_key(tmp_path / "mine"), make_key(tmp_path / "other")
    stored.verify()  # nobody said whom to trust
    keys = tmp_path / "keys"
    keys.mkdir()
    shutil.copy(mine, keys)
    monkeypatch.setenv(VARIABLE, str(keys))
    with pytest.raises(StoreError, match="not signed"):
        stored.tensors()
    signature = sign(stored, tmp_path / "mine")
    assert torch.equal(stored.tensors()["x"], torch.ones(3))
    assert read_signature(stored.path, stored.digest) == signature
    sign(stored, tmp_path / "other")
    with pytest.raises(StoreError, match="none of the 1 trusted"):
        stored.tensors()
    monkeypatch.setenv(VARIABLE, str(other))
    stored.verify()


def test_the_digest_is_the_same_and_the_key_is_private(stored, tmp_path):
    make_key(tmp_path / "mine")
    before = stored.digest
    sign(stored, tmp_path / "mine")
    assert Store(tmp_path / "s").resolve("a").digest == before
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o600
    with pytest.raises(StoreError, match="never replaced"):
        make_key(tmp_path / "mine")


@pytest.mark.parametrize("trusting", [True, False])
def test_forged_and_damaged_signatures_are_refused(stored, tmp_path, monkeypatch, trusting):
    public = make_key(tmp_path / "mine")
    make_key(tmp_path / "other")
    if trusting:
        monkeypatch.setenv(VARIABLE, str(public))
    sign(stored, tmp_path / "other")
    theirs = json.loads((stored.path / SIGNATURE_FILE).read_text())
    sign(stored, tmp_path / "mine")
    good = json.loads((stored.path / SIGNATURE_FILE).read_text())
    second = Store(tmp_path / "s").save("a", config=CONFIG, tensors={"x": torch.zeros(3)})
    for body, words in (
        ({**theirs, "key": good["key"]}, "forged"),
        ({**good, "signature": "AAAA"}, "forged"),
        ({**good, "signature": "?"}, "signature.json"),
        ({**good, "key": "zz"}, "signature.json"),
        ({**good, "digest": second.digest}, "another adapter"),
        ({**good, "algorithm": "rsa"}, "rsa"),
        ({"key": good["key"]}, "no signature"),
        ([], "no signature"),
    ):
        (stored.path / SIGNATURE_FILE).write_text(json.dumps(body))
        with pytest.raises(CorruptError, match=words):
            stored.tensors()
    shutil.copy(stored.path / SIGNATURE_FILE, second.path)
    (second.path / SIGNATURE_FILE).write_text(json.dumps(good))  # a signature is of one digest
    with pytest.raises(CorruptError, match="another adapter"):
        second.tensors()


def test_wrong_keys_are_named(stored, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("no key")
    with pytest.raises(ConfigError, match="keygen"):
        sign(stored, tmp_path / "text")
    with pytest.raises(ConfigError, match="keygen"):
        sign(stored, tmp_path / "missing")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "text"))
    with pytest.raises(ConfigError, match="no public key"):
        stored.tensors()
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv(VARIABLE, str(empty))
    with pytest.raises(ConfigError, match=r"no \*\.pub"):
        stored.tensors()


def test_damaged_versions_are_not_signed(stored, tmp_path):
    make_key(tmp_path / "mine")
    (stored.path / "README.md").write_text("other")
    with pytest.raises(CorruptError, match=r"README\.md"):
        sign(stored, tmp_path / "mine")


def test_the_commands(tmp_path):
    Store().save("a", config=CONFIG, tensors={"x": torch.ones(3)})

    def run(*words: str) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, (done.output, done.stderr)
        return done.stdout

    assert VARIABLE in run("keygen", str(tmp_path / "k"))
    assert "a@1" in run("sign", "a", "--key", str(tmp_path / "k"))
    assert "signed by" in run("show", "a")
