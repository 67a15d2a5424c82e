"""A real server process: its answers are those of `base.predict` and `base.generate`, whoever asks beside whom."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import checks
import pytest
from families import make, tiny_tokenizer

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

import onebase as ob  # noqa: E402
from onebase.serve.keys import hashed  # noqa: E402
from onebase.store import Store  # noqa: E402
from serving import until  # noqa: E402

METHODS = {"lora": "lora", "bottle": "bottleneck(size=4)", "prefix": "prefix(length=3)", "prompt": "prompt(length=3)"}
TEXTS = ["the red cat sat on the mat", "a dog", "the old house saw the big tree", "the sad cat"]
ADMIN, USER = "admin-key-of-this-test", "user-key-of-this-test"


def start(folder, home, port, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "onebase", "serve", "-b", folder, "--port", str(port), "--keys", home / "k.json"],
        env={**os.environ, "ONEBASE_HOME": str(home), **env}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def wait(process, address):
    for _ in range(1200):
        try:
            if httpx.get(address + "/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.25)
    raise AssertionError("the server did not start")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Served:
    """A server and what it should answer."""

    def __init__(self, tmp, family, task):
        self.folder, self.home = tmp / "base", tmp / "home"
        self.home.mkdir()
        make(family).save_pretrained(self.folder)
        tiny_tokenizer().save_pretrained(self.folder)
        keys = [
            {"hash": hashed(ADMIN), "scopes": ["use", "admin"]},
            {"hash": hashed(USER), "scopes": ["use"], "adapters": ["lora", "base"]},
        ]
        (self.home / "k.json").write_text(json.dumps(keys))
        self.base, self.store = ob.load_base(self.folder), Store(self.home)
        for number, (name, method) in enumerate(METHODS.items()):
            for version in (1, 2):
                made = self.base.add("made", method, task=task, seed=number)
                checks.disturb(made.module, seed=10 * number + version, size=0.3)
                if made.head is not None:
                    checks.disturb(made.head, seed=version, size=1.0)
                self.base.save("made", as_name=name, store=self.store)
                self.base.remove("made")
            self.base.load(f"{name}@2", name=name, store=self.store)
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self):
        self.process = start(self.folder, self.home, self.port)
        wait(self.process, self.address)

    def call(self, method, path, body=None, key=ADMIN, **more):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.request(method, self.address + path, json=body, headers=headers, timeout=60, **more)

    def close(self):
        self.process.terminate()
        self.process.communicate(timeout=60)
        self.base.close()


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    task = {"kind": "classification", "labels": ["bad", "good"], "pooling": "mean", "max_length": 32}
    served = Served(tmp_path_factory.mktemp("serve"), "bert", task)
    yield served
    served.close()


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    served = Served(
        tmp_path_factory.mktemp("writer"),
        "llama",
        {"kind": "causal-lm", "labels": [], "pooling": "mean", "max_length": 64},
    )
    yield served
    served.close()


def test_answers_of_many_clients_are_those_of_predict(labels):
    """Forty requests at once, with several adapters each, and the base."""
    expected = {n: labels.base.predict(TEXTS, adapter=n) for n in METHODS}
    names = list(METHODS)

    def ask(i):
        model = [names[i % 4], names[(i + 1) % 4]]
        return model, labels.call("POST", "/v1/classify", {"model": model, "input": TEXTS})

    with ThreadPoolExecutor(10) as pool:
        for model, answer in pool.map(ask, range(40)):
            assert answer.status_code == 200, answer.text
            data = answer.json()["data"]
            assert [(d["index"], d["model"]) for d in data] == [(i, m) for i in range(len(TEXTS)) for m in model]
            for one in data:
                wanted = expected[one["model"]][one["index"]]
                assert one["label"] == wanted.label
                assert one["ref"] == one["model"] + "@2"
                for label, chance in wanted.probabilities.items():
                    assert abs(one["probabilities"][label] - chance) < 1e-5
    stats = labels.call("GET", "/v1/stats").json()
    assert any(len(batch["adapters"]) > 1 for batch in stats["batches"]), "no batch mixed adapters"


def test_embeddings_are_those_of_the_base(labels):
    """Floats and base64 are the same numbers."""
    import base64

    import numpy as np

    wanted = [p.embedding.numpy() for p in labels.base.predict(TEXTS)]
    plain = labels.call("POST", "/v1/embeddings", {"model": "base", "input": TEXTS}).json()["data"]
    coded = labels.call("POST", "/v1/embeddings", {"model": "base", "input": TEXTS, "encoding_format": "base64"}).json()
    for i, vector in enumerate(wanted):
        assert np.abs(np.asarray(plain[i]["embedding"]) - vector).max() < 1e-5
        raw = np.frombuffer(base64.b64decode(coded["data"][i]["embedding"]), "<f4")
        assert np.abs(raw - vector).max() < 1e-5


def test_a_misspelt_name_is_never_the_base(labels):
    """404 with the nearest name."""
    answer = labels.call("POST", "/v1/classify", {"model": "lorra", "input": "a"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "lora" in answer.json()["error"]["nearest"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/classify", {"model": "lora"}, 400),
        ("/v1/classify", {"model": "lora", "input": "a", "colour": 1}, 400),
        ("/v1/classify", {"model": "lora", "input": []}, 400),
        ("/v1/classify", {"model": "lora", "input": [{"text": "a", "pair": "b"}]}, 400),
        ("/v1/classify", {"model": "lora", "input": ["a"] * 2000}, 413),
        ("/v1/classify", {"model": "lora", "input": "a" * 5_000_000}, 413),
        ("/v1/classify", {"model": "../../etc/passwd", "input": "a"}, 404),
        ("/v1/classify", {"model": "lora@9", "input": "a"}, 404),
        ("/v1/completions", {"model": "lora", "prompt": "a"}, 400),
        ("/v1/embeddings", {"model": "lora", "input": "a"}, 400),
        ("/v1/rerank", {"model": "lora", "query": "a", "documents": ["b"]}, 400),
        ("/v1/adapters/lora/promote", {"version": 9, "alias": "prod"}, 404),
        ("/v1/adapters/lora/rollback", {"alias": "nothing"}, 409),
    ],
)
def test_wrong_requests_are_refused_in_openais_shape(labels, path, body, status):
    """Every error has a message and a type."""
    answer = labels.call("POST", path, body)
    assert answer.status_code in ({status} if status != 409 else {404, 409}), answer.text
    assert answer.json()["error"]["message"]
    assert answer.json()["error"]["type"].endswith("_error")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"model": 1e999}'])
def test_broken_bodies_are_no_500(labels, raw):
    """Whatever the bytes are."""
    headers = {"Authorization": f"Bearer {ADMIN}", "content-type": "application/json"}
    answer = httpx.post(labels.address + "/v1/classify", content=raw, headers=headers)
    assert answer.status_code == 400, answer.text
    assert "error" in answer.json()


def test_keys_open_only_what_they_may(labels):
    """No key, a wrong one, one without admin, and one for some adapters."""
    ask = {"model": "bottle", "input": "a"}
    assert labels.call("POST", "/v1/classify", ask, key=None).status_code == 401
    assert labels.call("POST", "/v1/classify", ask, key="nonsense").status_code == 401
    hidden = labels.call("POST", "/v1/classify", ask, key=USER)
    assert hidden.status_code == 404
    assert "bottle" not in hidden.json()["error"]["message"].replace("'bottle'", "", 1)
    assert "bottle" not in json.dumps(hidden.json()["error"].get("nearest"))
    assert labels.call("POST", "/v1/classify", {"model": "lora", "input": "a"}, key=USER).status_code == 200
    for path in ("/v1/models", "/v1/adapters", "/v1/stats"):
        seen = labels.call("GET", path, key=USER).text
        assert "bottle" not in seen
        assert "prefix@" not in seen
    assert labels.call("GET", "/metrics", key=None).status_code == 401
    assert labels.call("GET", "/metrics", key=USER).status_code == 403
    assert labels.call("GET", "/v1/adapters/bottle", key=USER).status_code == 404
    assert labels.call("POST", "/v1/adapters", {"ref": "lora"}, key=USER).status_code == 403


def test_an_alias_goes_live_without_a_restart(labels):
    """Promotion through the API, and by another process; then back."""

    def digest():
        return labels.call("POST", "/v1/classify", {"model": "prompt@prod", "input": "a"}).json()["data"][0]["digest"]

    one, two = (labels.store.resolve(f"prompt@{v}").digest for v in (1, 2))
    assert labels.call("POST", "/v1/adapters/prompt/promote", {"version": 1, "alias": "prod"}).status_code == 200
    assert digest() == one
    labels.store.promote("prompt@2", "prod")
    assert digest() == two
    assert labels.call("POST", "/v1/adapters/prompt/rollback", {"alias": "prod"}).json()["ref"] == "prompt@1"
    assert digest() == one


def test_a_damaged_adapter_is_refused_and_the_others_answer(labels):
    """422 that says why, for that one only."""
    stored = labels.store.resolve("bottle@1")
    file = stored.path / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] + b"\x00" * 8)
    try:
        refused = labels.call("POST", "/v1/classify", {"model": ["bottle@1"], "input": "a"})
        assert refused.status_code == 422, refused.text
        assert labels.call("POST", "/v1/classify", {"model": "bottle@2", "input": "a"}).status_code == 200
    finally:
        file.write_bytes(whole)


def test_withdrawn_adapters_are_gone_until_they_are_loaded(labels):
    """DELETE frees, POST serves again."""
    assert labels.call("POST", "/v1/classify", {"model": "prefix", "input": "a"}).status_code == 200
    assert "prefix@2" in labels.call("DELETE", "/v1/adapters/prefix").json()["freed"]
    assert labels.call("POST", "/v1/classify", {"model": "prefix", "input": "a"}).status_code == 404
    assert labels.call("POST", "/v1/adapters", {"ref": "prefix@2", "pin": True}).json()["state"] == "device"
    assert labels.call("POST", "/v1/classify", {"model": "prefix", "input": "a"}).status_code == 200


def test_metrics_and_models_name_what_is_there(labels):
    """Prometheus text, the list of models, the schema."""
    labels.call("POST", "/v1/classify", {"model": "lora", "input": "a"})
    text = labels.call("GET", "/metrics").text
    assert 'onebase_adapter_requests{ref="lora@2"}' in text
    assert "vllm:lora_requests_info" in text
    models = {m["id"]: m for m in labels.call("GET", "/v1/models").json()["data"]}
    assert set(models) == {"base", *METHODS}
    assert models["lora"]["digest"] == labels.store.resolve("lora@2").digest
    assert "/v1/classify" in httpx.get(labels.address + "/openapi.json").json()["paths"]


def test_texts_are_those_of_generate(writer):
    """Greedy, sampled by seed, streamed, stopped; many clients at once."""
    prompts = ["the red cat", "the old dog sat on", "a"]

    def ask(name):
        body = {"model": name, "prompt": prompts, "max_tokens": 8}
        return name, writer.call("POST", "/v1/completions", body)

    with ThreadPoolExecutor(5) as pool:
        for name, answer in pool.map(ask, [*METHODS, "base"] * 2):
            assert answer.status_code == 200, answer.text
            found = [c["text"] for c in answer.json()["choices"]]
            own = None if name == "base" else name
            wanted = [writer.base.generate([p], adapter=own, max_new_tokens=8)[0] for p in prompts]
            assert found == [text and " " + text for text in wanted]  # they go on where the prompts end
    body = {"model": "lora", "prompt": "the red cat", "max_tokens": 8, "temperature": 1.2, "seed": 5, "n": 3}
    found = [c["text"] for c in writer.call("POST", "/v1/completions", body).json()["choices"]]
    wanted = writer.base.generate(
        ["the red cat"], "lora", max_new_tokens=8, temperature=1.2, seed=5, do_sample=True, num_return_sequences=3
    )[0]
    assert [text.removeprefix(" ") for text in found] == wanted


def test_the_openai_client_works_unchanged(writer):
    """Completions, a stream of them, models, errors."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=writer.address + "/v1", api_key=ADMIN, max_retries=0)
    whole = client.completions.create(model="bottle", prompt="the red cat", max_tokens=8)
    pieces = client.completions.create(model="bottle", prompt="the red cat", max_tokens=8, stream=True)
    streamed = [piece for piece in pieces if piece.choices]
    assert "".join(piece.choices[0].text for piece in streamed) == whole.choices[0].text
    assert streamed[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert {model.id for model in client.models.list()} == {"base", *METHODS}
    word = whole.choices[0].text.split()[1]
    stopped = client.completions.create(model="bottle", prompt="the red cat", max_tokens=8, stop=word)
    assert stopped.choices[0].text == whole.choices[0].text.split(word)[0]
    assert stopped.choices[0].finish_reason == "stop"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="botle", prompt="a")


def test_a_client_that_leaves_frees_its_place(writer):
    """The row stops at the next step, and nothing stays in the queue."""
    body = {"model": "lora", "prompt": "the", "max_tokens": 40, "stream": True}
    for _ in range(3):
        with httpx.stream(
            "POST", writer.address + "/v1/completions", json=body, headers={"Authorization": f"Bearer {ADMIN}"}
        ) as answer:
            next(answer.iter_lines())
    for _ in range(100):
        if writer.call("GET", "/v1/stats").json()["queue"]["prompts"] == 0:
            return
        time.sleep(0.1)
    raise AssertionError("prompts of clients that left are still there")


def test_a_restart_under_load_loses_nothing_for_clients_that_retry(labels):
    """Clients ask while the process is killed and started again."""
    wanted = labels.base.predict(TEXTS[0], adapter="lora")[0].label
    over, wrong, answered = threading.Event(), [], []

    def ask():
        while not over.is_set():
            limit = time.monotonic() + 240  # the process starts anew meanwhile, on however busy a machine
            while time.monotonic() < limit:
                try:
                    answer = labels.call("POST", "/v1/classify", {"model": "lora", "input": TEXTS[0]})
                except httpx.HTTPError:
                    time.sleep(0.1)
                    continue
                if answer.status_code == 200:
                    answered.append(answer.json()["data"][0]["label"])
                    break
                time.sleep(0.1)
            else:
                wrong.append("no answer in four minutes")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: answered, "nobody answers", 240)
    before = len(answered)
    labels.process.kill()
    labels.process.communicate()
    labels.start()
    until(lambda: len(answered) > before + 4, "nobody answers after the restart", 240)
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(answered) == {wanted}


def test_a_text_cut_off_by_its_deadline_is_no_answer():
    """What was written until then is not handed out as complete."""
    from onebase.base import Base
    from onebase.serve.asked import Late, Prompt, Sampling
    from onebase.serve.engine import Engine
    from onebase.serve.settings import ServeSettings

    with Base(make("llama"), tiny_tokenizer()) as base:
        engine = Engine(base, ServeSettings())
        try:
            for tokens in (8, 40):  # the first one warms up, and has time
                limit = time.monotonic() + (30 if tokens == 8 else 0.02)
                (item,) = engine.write([Prompt("the red cat", None, Sampling(tokens), 0, ())], limit)
                if tokens == 8:
                    assert item.payload.future.result(30)[0].written > 0
                    continue
                with pytest.raises(Late):
                    item.payload.future.result(30)
        finally:
            engine.close()
