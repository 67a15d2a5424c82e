"""Requests that nobody should send: none ends in a 500, and no key learns of what is not its own."""

from __future__ import annotations

import json
import random
import socket
from typing import Any

import pytest
from families import make, tiny_tokenizer

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from onebase.base import Base
from onebase.serve.keys import Key, hashed
from onebase.store import Store
from serving import ADMIN, serving

LABELS = {"kind": "classification", "labels": ["bad", "good"], "pooling": "mean", "max_length": 32}
WRITES = {"kind": "causal-lm", "labels": [], "pooling": "mean", "max_length": 32}
SOME, SOME_ADMIN = "key-for-some", "admin-key-for-some"
JSON = {"Authorization": f"Bearer {ADMIN}", "content-type": "application/json"}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A decoder that labels and writes; one key sees the adapter `mine` only."""
    base, store = Base(make("llama"), tiny_tokenizer(), id="tiny"), Store(tmp_path_factory.mktemp("hostile"))
    for name, task in (("mine", LABELS), ("hidden1", LABELS), ("poet", WRITES)):
        base.add(name, "lora", task=task)
        base.save(name, store=store)
        base.remove(name)
    some = frozenset({"mine", "later"})
    keys = [Key(hashed(SOME), frozenset({"use"}), some), Key(hashed(SOME_ADMIN), frozenset({"admin"}), some)]
    limits = {"body_bytes": 20_000, "table_bytes": 30_000, "body_timeout": 0.5, "request_rows": 64, "new_tokens": 16}
    with serving(base, store, keys, **limits) as found:
        yield found


def post(here: Any, path: str, raw: bytes) -> Any:
    return here.client.post(path, content=raw, headers=JSON)


@pytest.mark.parametrize(
    ("path", "raw", "status"),
    [
        ("/v1/classify", rb'{"model": "mine", "input": "\ud800"}', 400),
        ("/v1/classify", rb'{"model": "mine", "input": ["a", {"text": "b", "pair": "\udfff"}]}', 400),
        ("/v1/classify", rb'{"\ud800": 1}', 400),
        ("/v1/classify", rb'{"model": "\ud800", "input": "a"}', 400),
        ("/v1/chat/completions", rb'{"model": "poet", "messages": [{"role": "user", "content": "\ud800"}]}', 400),
        ("/v1/completions", rb'{"model": "poet", "prompt": "a", "stop": ["\ud800"]}', 400),
        ("/v1/completions", b'{"model": "poet", "prompt": [1e400]}', 400),
        ("/v1/completions", b'{"model": "poet", "prompt": [99999999999999999999]}', 400),
        ("/v1/completions", b'{"model": "poet", "prompt": [-1]}', 400),
        ("/v1/completions", b'{"model": "poet", "prompt": "a", "temperature": NaN}', 400),
        ("/v1/completions", b'{"model": "poet", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
        ("/v1/classify", b'{"model": "mine", "input": ' + b"[" * 9000, 400),
        ("/v1/classify", b'{"model": "mine", "input": ' + b'{"a":' * 3000, 400),
        ("/v1/classify", b"\x00" * 100, 400),
        ("/v1/classify", b'{"model": "mine@' + b"9" * 280 + b'", "input": "a"}', 404),
        ("/v1/classify", b'{"model": "mi\\u0000ne", "input": "a"}', 404),
        ("/v1/classify", json.dumps({"model": ["mine"] * 60, "input": ["a"] * 60}).encode(), 413),
        ("/v1/classify", json.dumps({"model": "m" * 301, "input": "a"}).encode(), 400),
        ("/v1/embeddings", b'{"model": "base", "input": [""]}', 200),
        ("/v1/adapters/mine/promote", json.dumps({"version": 1, "alias": "../up"}).encode(), 409),
        ("/v1/adapters/mine/promote", b'{"version": ' + b"9" * 4000 + b', "alias": "prod"}', 404),
        ("/v1/adapters", b'{"ref": "base"}', 400),
        ("/v1/load_lora_adapter", b'{"lora_name": "../x", "lora_path": "mine"}', 400),
    ],
)
def test_malformed_bodies_are_refused_with_a_reason(here, path, raw, status):
    """Halves of characters, depths, numbers beyond every type."""
    answer = post(here, path, raw)
    assert answer.status_code == status, answer.text
    if status >= 400:
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "ref", ["mine@" + "9" * 5000, "mine@٣", "mine@", "mine@01", "mine@9", "nobody", "%00", "..%2fmine"]
)
def test_nothing_odd_is_withdrawn(here, ref):
    """Only a name or a version that is there."""
    assert here.client.delete(f"/v1/adapters/{ref}", headers=JSON).status_code in (404, 405)
    assert here.call("POST", "/v1/classify", {"model": "mine", "input": "a"}).status_code == 200


@pytest.mark.parametrize("given", ["nan", "-1", "0", "soon", "inf"])
def test_deadlines_that_are_none(here, given):
    """400, and never no limit."""
    asked = {"model": "mine", "input": "a"}
    answer = here.client.post("/v1/classify", json=asked, headers=JSON | {"x-timeout-seconds": given})
    assert answer.status_code == 400 and "expected seconds" in answer.json()["error"]["message"]


def test_bodies_and_tables_have_limits_that_agree(here):
    """What a table may have fits a body of its route; other routes keep their own limit."""
    big = {"model": "mine", "input": "a" * 25_000}
    assert here.call("POST", "/v1/classify", big).status_code == 413

    def train(table: str) -> Any:  # with a sample as well, so that nothing is trained
        return here.call("POST", "/v1/training", {"sample": "reviews", "csv": table})

    assert train("\n" * 29_000).status_code == 400  # 58 thousand bytes of JSON
    over = train("a" * 30_001)
    assert over.status_code == 413 and "csv has 30001 bytes" in over.json()["error"]["message"]
    assert train("\n" * 31_000).status_code == 413


def test_a_body_that_drips_is_cut_off(here):
    """408 after the time that a body has, and others are answered meanwhile."""
    host, _, port = here.address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as slow:
        slow.sendall(
            f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n"
            "Content-Type: application/json\r\nContent-Length: 500\r\n\r\n{".encode()
        )
        assert here.call("POST", "/v1/classify", {"model": "mine", "input": "a"}).status_code == 200
        assert b"408" in slow.recv(200).split(b"\r\n")[0]


@pytest.mark.parametrize("key", ["", "x", ADMIN[:-1], ADMIN + "x", "ü" * 40, hashed(ADMIN)])
def test_wrong_keys_open_nothing(here, key):
    """Neither a part of one, nor its hash."""
    for method, path in ROUTES:
        headers = {"Authorization": f"Bearer {key}".strip().encode()}
        answer = here.client.request(method, path.format("mine"), json={}, headers=headers)
        assert answer.status_code == 401, (method, path, answer.text)


ROUTES = [
    ("GET", "/v1/models"), ("GET", "/v1/models/{}"), ("GET", "/v1/adapters"), ("GET", "/v1/adapters/{}"),
    ("GET", "/v1/stats"), ("GET", "/metrics"), ("GET", "/v1/training"), ("GET", "/v1/training/{}"),
    ("GET", "/v1/samples"),    ("DELETE", "/v1/adapters/{}"), ("DELETE", "/v1/training/{}"),
]  # fmt: skip
BODIES = {
    "/v1/classify": {"model": "{}", "input": "a"},
    "/v1/embeddings": {"model": "{}", "input": "a"},
    "/v1/rerank": {"model": "{}", "query": "a", "documents": ["b"]},
    "/v1/completions": {"model": "{}", "prompt": "a"},
    "/v1/chat/completions": {"model": "{}", "messages": [{"role": "user", "content": "a"}]},
    "/v1/adapters": {"ref": "{}"},
    "/v1/adapters/{}/promote": {"version": 1, "alias": "prod"},
    "/v1/adapters/{}/rollback": {"alias": "prod"},
    "/v1/load_lora_adapter": {"lora_name": "later", "lora_path": "{}"},
    "/v1/unload_lora_adapter": {"lora_name": "{}"},
}


@pytest.mark.parametrize("key", [SOME, SOME_ADMIN])
def test_a_key_for_some_cannot_tell_what_else_there_is(here, key):
    """Every route answers alike for an adapter that is hidden and for one that does not exist."""
    asked: list[tuple[str, str, Any]] = [(method, path, None) for method, path in ROUTES]
    asked += [("POST", path, body) for path, body in BODIES.items()]
    here.call("POST", "/v1/classify", {"model": "hidden1", "input": "a"})  # it is in use
    for method, path, body in asked:
        for form in ("{}", "{}@1", "{}@prod", "base:{}"):
            seen = []
            for name in ("hidden1", "hidden2"):
                whole = form.format(name)
                sent = None if body is None else json.loads(json.dumps(body).replace("{}", whole))
                answer = here.call(method, path.format(whole), sent, key=key)
                seen.append((answer.status_code, answer.text.replace(name, "NAME")))
            if path in ("/v1/stats", "/metrics") or "{}" not in path + json.dumps(body):
                assert "hidden1" not in seen[0][1] and "poet" not in seen[0][1], path
                break
            assert seen[0] == seen[1], (method, path, form)
            assert seen[0][0] in (400, 403, 404), (method, path, seen[0])
            assert "poet" not in seen[0][1]
    ghost = here.call("GET", "/v1/adapters/later", key=key)  # it may use this one, which does not exist
    assert ghost.status_code == 404 and "hidden1" not in ghost.text and "poet" not in ghost.text
    listed = here.call("GET", "/v1/adapters", key=key).json()
    assert listed["tiers"]["device"]["adapters"] <= 1 and listed["tiers"]["disk"]["adapters"] == 1
    assert here.call("POST", "/v1/classify", {"model": "hidden1", "input": "a"}).status_code == 200


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_requests_made_of_the_schema_are_no_500(here):
    """Schemathesis: right and wrong requests for every route, with names of adapters that are there."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(here.address + "/openapi.json")
    chance = random.Random(0)
    done = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.label == "POST /v1/training":  # a process each
            continue
        for mode in schemathesis.GenerationMode:

            @settings(max_examples=40, deadline=None, database=None, derandomize=True,
                      suppress_health_check=list(HealthCheck), phases=[Phase.generate])  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                nonlocal done
                if isinstance(case.body, dict) and "model" in case.body and chance.random() < 0.8:
                    case.body["model"] = chance.choice(["mine", "poet", "base", "mine@1"])
                answer = case.call(headers={"Authorization": f"Bearer {ADMIN}"}, timeout=60)
                assert answer.status_code < 500, (case.as_curl_command(), answer.text)
                done += 1

            try:
                check()
            except Exception as error:
                if type(error).__name__ != "Unsatisfiable":  # a route without parameters has no wrong requests
                    raise
    assert done > 500
    assert here.call("POST", "/v1/classify", {"model": "base", "input": "a"}).status_code == 200
