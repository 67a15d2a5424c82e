"""Replicas on Ray Serve and workers of Ray Train, as users start them; they need the extra `ray`."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import onebase as ob
from onebase.store import Store

pytestmark = pytest.mark.slow
ROWS = [
    {"text": f"{word} film {i}", "label": label} for i in range(20) for word, label in (("fine", "y"), ("bad", "n"))
]
TEXTS = [f"a {word} film in {i} parts" for i in range(8) for word in ("fine", "dull", "bad")]


@pytest.fixture(scope="module", autouse=True)
def _ray() -> None:
    pytest.importorskip("ray.serve", reason="the extra 'ray' is not installed")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two adapters of different methods, one of them in two versions."""
    found = Store(tmp_path_factory.mktemp("store"))
    with ob.load_base("minilm") as base:
        for name, method, lr in (("one", "lora(rank=2)", 1e-3), ("one", "lora(rank=2)", 1e-2), ("two", "prefix", 1e-2)):
            run = ob.train(base, ROWS, method, name=name, store=found, epochs=1, lr=lr, restore="best")
            base.remove(run.name)
    return found


@pytest.fixture
def address(store: Store) -> Iterator[str]:
    """`onebase serve --ray --replicas 2`, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "-b", "minilm", "--ray", "--replicas", "2", "--port", str(port)]
    environment = {**os.environ, "ONEBASE_HOME": str(store.root), "ONEBASE_API_KEY": "secret"}
    log = store.root / "server.log"
    with log.open("w") as said:
        process = subprocess.Popen([sys.executable, "-m", "onebase", *words], env=environment, stderr=said)
    where = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, log.read_text()
            try:
                if httpx.get(f"{where}/ready", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(1)
        yield where
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()


def test_two_replicas_give_the_same_answers(address: str, store: Store) -> None:
    headers = {"Authorization": "Bearer secret"}

    def ask(model: str, text: str) -> tuple[str, dict[str, float]]:
        with httpx.Client(base_url=address, headers=headers, timeout=60) as client:
            answer = client.post("/v1/classify", json={"model": model, "input": [text]})
            assert answer.status_code == 200, answer.text
            (row,) = answer.json()["data"]
            return row["ref"], row["probabilities"]

    def stats(_: int) -> Any:
        return httpx.get(f"{address}/v1/stats", headers=headers, timeout=60).json()

    with ThreadPoolExecutor(8) as pool:
        assert len({found["process"]["id"] for found in pool.map(stats, range(40))}) == 2
        asked = [(name, text) for text in TEXTS for name in ("one", "one@1", "two")]
        answers = list(pool.map(lambda pair: ask(*pair), asked * 2))
        loads = {found["process"]["id"]: found["tiers"]["loads"] for found in pool.map(stats, range(40))}
    assert len(loads) == 2 and min(loads.values()) > 0  # both answered
    with ob.load_base("minilm") as base:
        for name in ("one", "one@1", "two"):
            base.load(name, name=name, store=store)
        expected = {(n, t): base.predict([t], n)[0].probabilities for n, t in asked}
    refs = {"one": "one@2", "one@1": "one@1", "two": "two@1"}
    for (name, text), (ref, found) in zip(asked * 2, answers):
        assert ref == refs[name]
        assert found == pytest.approx(expected[name, text], abs=1e-5)

    wrong = httpx.post(f"{address}/v1/classify", json={"model": "on", "input": "x"}, headers=headers)
    assert wrong.status_code == 404 and "one" in wrong.text
    assert httpx.get(f"{address}/v1/models", headers={"Authorization": "Bearer other"}).status_code == 401
    store.promote("one@1", "prod")
    assert {ask("one@prod", TEXTS[0])[0] for _ in range(8)} == {"one@1"}


def test_workers_of_ray_train_equal_one_process(tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS))

    def train(home: str, *more: str) -> subprocess.CompletedProcess[str]:
        words = ["-d", "rows.csv", "-b", "minilm", "-m", "lora(rank=2)", "--name", "r", "--epochs", "2", "--lr", "1e-3"]
        sets = ["--batch-size", "6", "--set", "attention=keep", "--set", "train.dtype=float32"]
        return subprocess.run(
            [sys.executable, "-m", "onebase", "train", *words, *sets, *more], cwd=tmp_path, capture_output=True,
            text=True, env={**os.environ, "ONEBASE_HOME": str(tmp_path / home)}, check=False,
        )  # fmt: skip

    one, two = train("one"), train("two", "--ray", "--workers", "2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    assert two.stdout.count("r@1") == 1 and two.stderr.count("epoch 2/2") == 1  # the first worker speaks
    alone, together = (Store(tmp_path / home).resolve("r").tensors() for home in ("one", "two"))
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        assert (value - together[key]).abs().max() < 1e-4, key
    wrong = train("two", "--ray", "--workers", "2", "--label", "nope")
    assert wrong.returncode == 1 and "'nope'" in wrong.stderr and "Traceback" not in wrong.stderr
    usage = train("two", "--workers", "2")
    assert usage.returncode == 2 and "add it" in usage.stderr
