"""Push and pull with the hub's real client, in a process of its own, against a local server that speaks its routes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hub_server import Hub
from onebase.store import Store
from onebase.store.schema import TENSORS_FILE

CONFIG = {
    "method": {"name": "lora", "settings": {"rank": 2}},
    "task": {"kind": "classification", "labels": ["a", "b"]},
    "base": {"id": "me/base", "fingerprint": "f" * 8, "model_type": "bert", "hidden_size": 8, "layers": 1,
             "config_digest": "c", "parameters": 10},
    "tokenizer": {"digest": "t"}, "provenance": {}, "probes": {}, "parameters": 4000,
    "metrics": {"adapter": {"accuracy": 0.9}, "base": {"accuracy": 0.5}, "split": "test"},
}  # fmt: skip


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.shutdown()
    hub.server_close()


def onebase(hub: Hub, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Call the program: endpoint, cache and token of the client are read when it is imported."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_x",
           "HF_HOME": str(home / "cache"), "ONEBASE_HOME": str(home / "store"), "NO_PROXY": "127.0.0.1"}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "onebase", *words], env=env, capture_output=True, text=True, timeout=120
    )


def ok(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def save(home: Path, seed: int = 0, size: int = 1000):
    torch.manual_seed(seed)
    return Store(home / "store").save("reviews", config=CONFIG, tensors={"deltas.x": torch.randn(2, size)})


def test_a_pushed_adapter_is_pulled_bit_by_bit_at_its_revision(hub, tmp_path):
    first = save(tmp_path / "one")
    pushed = ok(onebase(hub, tmp_path / "one", "push", "reviews", "me/reviews", "--json"))
    second = save(tmp_path / "one", 1)
    ok(onebase(hub, tmp_path / "one", "push", "reviews@2", "me/reviews", "--json"))
    card = hub.blobs[hub.commit("me/reviews", pushed["revision"])[1]["README.md"][0]].decode()
    for said in ("library_name: onebase", 'base_model: "me/base"', '- "lora"', "metrics:"):
        assert said in card
    pulled = ok(onebase(hub, tmp_path / "two", "pull", f"me/reviews@{pushed['revision']}", "--json"))
    assert pulled["same"] and pulled["digest"] == first.digest and pulled["revision"] == pushed["revision"]
    newest = ok(onebase(hub, tmp_path / "two", "pull", "me/reviews", "--json"))
    assert newest["digest"] == second.digest and newest["ref"] == "reviews@2"
    there = Store(tmp_path / "two" / "store")
    assert torch.equal(there.resolve("reviews@1").tensors()["deltas.x"], first.tensors()["deltas.x"])
    again = ok(onebase(hub, tmp_path / "two", "pull", "me/reviews", "--json"))
    assert again["ref"] == "reviews@2" and len(there.list()) == 2
    other = ok(onebase(hub, tmp_path / "two", "pull", "me/reviews", "--name", "mine", "--json"))
    assert not other["same"]
    assert there.resolve("mine").config.provenance["pulled"]["digest"] == second.digest


IMPORT = """
import json, sys
import onebase as ob
with ob.load_base(sys.argv[1]) as base:
    found = [base.import_adapter(source) if not number else base.import_adapter(source, name="newest")
             for number, source in enumerate(sys.argv[2:])]
    print(json.dumps([[a.name, a.method.rank, a.config["provenance"]["imported"]["revision"]] for a in found]))
"""


@pytest.mark.slow  # a process of its own
def test_a_foreign_adapter_is_fetched_at_the_revision_that_was_asked_for(hub, tmp_path):
    """What another library pushed is imported at a commit, which is written down; other files stay where they are."""
    import hashlib
    import warnings

    peft = pytest.importorskip("peft")
    from families import make, tiny_tokenizer

    make("bert").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    commits = []
    for rank in (2, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(r=rank, target_modules=["query"], init_lora_weights=False)
            peft.get_peft_model(make("bert"), config).save_pretrained(str(tmp_path / f"x{rank}"))
        (tmp_path / f"x{rank}" / "large.bin").write_bytes(b"x" * 1000)
        files = {}
        for path in (tmp_path / f"x{rank}").iterdir():
            content = path.read_bytes()
            files[path.name] = (hashlib.sha1(content).hexdigest(), False)
            hub.blobs[files[path.name][0]] = content
        commits.append(hashlib.sha1(str(files).encode()).hexdigest())
        hub.repos.setdefault("me/My.adapter", []).append((commits[-1], files))
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
           "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}  # fmt: skip
    words = [str(tmp_path / "base"), f"me/My.adapter@{commits[0]}", "me/My.adapter"]
    done = subprocess.run([sys.executable, "-c", IMPORT, *words], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["My.adapter", 2, commits[0]], ["newest", 3, commits[1]]]
    fetched = {path.rpartition("/")[2] for method, path, _ in hub.log if method == "GET" and "/resolve/" in path}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.slow  # five processes and 24 MB
def test_a_cut_off_transfer_goes_on(hub, tmp_path):
    save(tmp_path / "one", size=3_000_000)  # 24 MB: the client writes pieces of 10
    hub.refuse = 1
    failed = onebase(hub, tmp_path / "one", "push", "reviews", "me/reviews")
    assert failed.returncode == 1 and "cannot push reviews@1" in failed.stderr and not hub.repos["me/reviews"]
    ok(onebase(hub, tmp_path / "one", "push", "reviews", "me/reviews", "--json"))
    ok(onebase(hub, tmp_path / "one", "push", "reviews", "me/reviews", "--json"))
    assert (
        sum(method == "PUT" for method, _, _ in hub.log) == 2
    )  # the refused one, and one: the third had nothing to send
    hub.fail = 1
    ok(onebase(hub, tmp_path / "two", "pull", "me/reviews", "--json"))
    starts = [asked for _, path, asked in hub.log if path.endswith(TENSORS_FILE) and asked]
    assert starts and all(asked != "bytes=0-" for asked in starts)  # it went on from where it stopped


@pytest.mark.slow  # eight processes
def test_what_is_wrong_is_said(hub, tmp_path):
    save(tmp_path / "one")
    ok(onebase(hub, tmp_path / "one", "push", "reviews", "me/reviews", "--json"))
    missing = onebase(hub, tmp_path / "two", "pull", "me/other")
    assert missing.returncode == 1 and "me/other" in missing.stderr and "Check the name" in missing.stderr
    wrong = onebase(hub, tmp_path / "two", "pull", "me/reviews@0123456")
    assert wrong.returncode == 1 and "0123456" in wrong.stderr
    large = hub.commit("me/reviews", "main")[1][TENSORS_FILE][0]
    hub.blobs[large] = hub.blobs[large][:-4] + b"\1\2\3\4"
    damaged = onebase(hub, tmp_path / "two", "pull", "me/reviews")
    assert damaged.returncode == 1 and "sha256" in damaged.stderr
    assert Store(tmp_path / "two" / "store").list() == []
    save(tmp_path / "three", 5)
    del hub.blobs[large]
    hub.repos.clear()
    ok(onebase(hub, tmp_path / "one", "push", "reviews", "me/reviews", "--json"))
    taken = onebase(hub, tmp_path / "three", "pull", "me/reviews")
    assert taken.returncode == 2 and "--name" in taken.stderr
