"""The engine of a server: where adapters are, who waits for whom, and that texts are those of `base.generate`."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import checks
import pytest
import torch
from families import make, tiny_tokenizer

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from onebase.base import Base  # noqa: E402
from onebase.serve.asked import Prompt, Row, Sampling  # noqa: E402
from onebase.serve.engine import Engine  # noqa: E402
from onebase.serve.scheduler import Overloaded  # noqa: E402
from onebase.serve.settings import ServeSettings  # noqa: E402
from onebase.serve.turns import Turns  # noqa: E402
from onebase.store import Store, Stored  # noqa: E402
from serving import serving, until  # noqa: E402

LABELS = {"kind": "classification", "labels": ["bad", "good"], "pooling": "mean", "max_length": 32}
WRITES = {"kind": "causal-lm", "labels": [], "pooling": "mean", "max_length": 64}
METHODS = {"lora": "lora", "prefix": "prefix(length=3)", "prompt": "prompt(length=3)", "other": "lora(rank=2)"}


def stored(family: str, folder: Any, task: dict[str, Any], methods: dict[str, str]) -> tuple[Base, Base, Store]:
    """Return a base to serve, one with the adapters attached to compare with, and the store."""
    served, plain = (Base(make(family), tiny_tokenizer(), id="tiny") for _ in range(2))
    store = Store(folder)
    for number, (name, method) in enumerate(methods.items()):
        adapter = plain.add(name, method, task=task, seed=number)
        checks.disturb(adapter.module, seed=number + 1, size=0.3)
        if adapter.head is not None:
            checks.disturb(adapter.head, seed=number, size=1.0)
        plain.save(name, store=store)
    return served, plain, store


@pytest.fixture()
def labels(tmp_path):
    """Four adapters of one size that label."""
    served, plain, store = stored("bert", tmp_path, LABELS, dict.fromkeys("abcd", "lora"))
    yield served, plain, store
    plain.close()


@pytest.fixture(params=["llama", "gemma3"])
def writer(request, tmp_path):
    """Adapters that write, on a base whose texts can join, and on one whose texts cannot."""
    served, plain, store = stored(request.param, tmp_path, WRITES, METHODS)
    yield request.param, served, plain, store
    plain.close()


def label(engine: Engine, adapter: Stored | None, text: str = "the red cat") -> Any:
    (item,) = engine.ask([Row(text, None, adapter)])
    return item.payload.future.result(30)[0]


# -- tiers -------------------------------------------------------------------------------------------------------------


def test_a_slow_load_delays_nobody_else(labels, monkeypatch):
    """A disk that hangs: adapters that are loaded, and the base, answer meanwhile."""
    served, plain, store = labels
    hangs, reading = threading.Event(), threading.Event()
    tensors = Stored.tensors

    def slow(self: Stored) -> Any:
        if self.name == "b":
            reading.set()
            assert hangs.wait(60)
        return tensors(self)

    monkeypatch.setattr(Stored, "tensors", slow)
    engine = Engine(served, ServeSettings())
    try:
        a, b = store.resolve("a"), store.resolve("b")
        wanted = [plain.predict("the red cat", n)[0].probabilities for n in "ab"]
        assert label(engine, a).probabilities == pytest.approx(wanted[0], abs=1e-5)
        (waits,) = engine.ask([Row("the red cat", None, b)])
        assert reading.wait(30)
        for _ in range(3):
            assert label(engine, a).probabilities == pytest.approx(wanted[0], abs=1e-5)
            assert label(engine, None).embedding is not None
        assert not waits.payload.future.done()
        hangs.set()
        assert waits.payload.future.result(30)[0].probabilities == pytest.approx(wanted[1], abs=1e-5)
    finally:
        hangs.set()
        engine.close()


def test_the_least_recently_used_goes_and_what_is_pinned_stays(labels):
    """Room for two on the device and one beside it."""
    served, plain, store = labels
    refs = {name: store.resolve(name) for name in "abcd"}
    size = sum(t.numel() * t.element_size() for t in plain.adapters["a"].tensors().values())
    engine = Engine(served, ServeSettings(device_bytes=2 * size + 8, memory_bytes=size + 8))

    def states() -> dict[str, str]:
        entries = engine.tiers.entries.values()
        return {e.stored.name: e.state for e in entries}

    try:
        for name in "abac":  # b is the one that was used longest ago
            label(engine, refs[name])
        assert states() == {"a": "device", "b": "memory", "c": "device"}
        assert sorted(n.partition("@")[0] for n in served.adapters) == ["a", "c"]
        engine.tiers.pin(refs["a"].digest, True)
        label(engine, refs["d"])  # c goes although a is older; one of b and c has no room in memory
        assert states() == {"a": "device", "b": "disk", "c": "memory", "d": "device"}
        label(engine, refs["b"])
        assert states()["a"] == states()["b"] == "device"
        engine.tiers.pin(refs["b"].digest, True)
        with pytest.raises(Overloaded, match="pinned adapters leave no room"):
            label(engine, refs["c"])
        engine.tiers.pin(refs["b"].digest, False)
        for name in "abcd":
            answer = label(engine, refs[name])
            assert answer.probabilities == pytest.approx(plain.predict("the red cat", name)[0].probabilities, abs=1e-5)
        assert engine.tiers.usage()["device"]["bytes"] <= 2 * size + 8
    finally:
        engine.close()


def test_unloading_waits_for_who_uses_it(labels):
    """An adapter in use is taken off its base when the last one is done, and its memory is free then."""
    served, _, store = labels
    engine = Engine(served, ServeSettings())
    try:
        a = store.resolve("a")
        entry = engine.tiers.lease(a).result(30)
        assert engine.tiers.withdraw(a.digest)
        time.sleep(0.1)
        assert entry.name in served.adapters and entry.doomed
        engine.tiers.release(entry)
        until(lambda: entry.name not in served.adapters, "it is attached still")
        until(lambda: not engine.tiers.entries, "it is kept still")
        assert entry.adapter is None
        label(engine, a)  # asked for again, it comes back
    finally:
        engine.close()


# -- rows --------------------------------------------------------------------------------------------------------------


def test_a_busy_adapter_holds_up_no_other(labels):
    """Four hundred rows of one adapter wait when one row of another comes: it is in one of the next batches."""
    served, _, store = labels
    a, b = store.resolve("a"), store.resolve("b")
    engine = Engine(served, ServeSettings(batch_rows=8))
    try:
        label(engine, a), label(engine, b)
        done = len(engine.batches)
        with engine.turns:  # nothing is computed until both are there
            rows = [Row(f"the red cat {i}", None, a) for i in range(400)]
            busy = engine.ask(rows)
            until(lambda: engine.rows.sizes()[0].get("a@1", 0) >= 300, "the rows are not there")
            light = engine.ask([Row("the old dog", None, b)])
        light[0].payload.future.result(60)
        assert not busy[-1].payload.future.done()
        engine.cancel(busy)
        batches = list(engine.batches)[done:]
        first = next(i for i, batch in enumerate(batches) if "b@1" in batch["adapters"])
        assert first <= 2, batches[: first + 1]
    finally:
        engine.close()


def test_full_queues_are_429_with_a_time_to_wait(labels):
    """Of one adapter, and of the server; others are served, and so is everybody once there is room."""
    served, _, store = labels
    with serving(served, store, waiting_rows=6, waiting_rows_each=4) as here:
        ask = {"model": "a", "input": ["the red cat"] * 4}
        assert here.call("POST", "/v1/classify", ask).status_code == 200
        with here.engine.turns, ThreadPoolExecutor(1) as pool:
            first = pool.submit(here.call, "POST", "/v1/classify", ask)
            until(lambda: here.engine.admitted.total == 4, "the rows are not there")
            full = here.call("POST", "/v1/classify", ask)
            assert full.status_code == 429, full.text
            assert 1 <= int(full.headers["retry-after"]) <= 30
            assert full.json()["error"]["type"] == "rate_limit_error"
            other = here.call("POST", "/v1/classify", {"model": "b", "input": ["x"] * 3})
            assert other.status_code == 429 and "the server holds" in other.json()["error"]["message"]
            stats = here.call("GET", "/v1/stats").json()
            assert stats["requests"]["rejected"] == 2
            here.engine.turns.give()  # the thread that answers goes on
            assert first.result(60).status_code == 200
            here.engine.turns.take()
        assert here.call("POST", "/v1/classify", ask).status_code == 200
        assert here.engine.admitted.total == 0


def test_a_client_that_leaves_takes_its_rows_along(labels):
    """What has not begun is never computed; leases and places are given back."""
    served, _, store = labels
    with serving(served, store, waiting_rows=8) as here:
        label(here.engine, store.resolve("a"))
        done = len(here.engine.batches)
        with here.engine.turns:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    here.address + "/v1/classify", json={"model": "a", "input": ["one", "two", "three", "four"]},
                    headers={"Authorization": "Bearer admin-key-of-this-test"}, timeout=0.5,
                )  # fmt: skip
            until(lambda: here.engine.admitted.total == 0, "the rows are still there")
        (entry,) = here.engine.tiers.entries.values()
        until(lambda: entry.leases == 0, "the lease is not given back")
        label(here.engine, store.resolve("a"))
        assert sum(batch["rows"] for batch in list(here.engine.batches)[done:]) <= 1 + 4
        assert here.call("GET", "/v1/stats").json()["requests"]["cancelled"] == 1


# -- texts -------------------------------------------------------------------------------------------------------------


def test_texts_of_all_settings_at_once_are_those_of_generate(writer):
    """Thirty texts with other lengths, temperatures, cuts, seeds and stops, from many threads."""
    family, served, plain, store = writer
    words = [
        "the",
        "red",
        "cat",
        "sat",
        "on",
        "the",
        "old",
        "mat",
        "and",
        "a",
        "dog",
        "saw",
        "it",
        "run",
        "by",
        "the",
        "big",
        "tree",
    ]
    shapes = [{}, {"temperature": 0.8}, {"temperature": 1.3, "top_k": 5}, {"temperature": 1.0, "top_p": 0.8},
              {"temperature": 1.6, "min_p": 0.05}]  # fmt: skip
    asked = []
    for i in range(30):
        name = [*METHODS, None][i % 5]
        prompt = " ".join(words[i % 7 : i % 7 + 1 + i % 6])
        asked.append((name, prompt, 1 + (5 * i) % 11, shapes[(i * 3) % 5 if i % 2 else i % 3], i))
    wanted = [
        plain.generate([p], n, max_new_tokens=m, **(shape and {**shape, "do_sample": True, "seed": seed}))[0]
        for n, p, m, shape, seed in asked
    ]
    engine = Engine(served, ServeSettings(group_prompts=5))
    try:
        items = []
        for n, p, m, shape, seed in asked:
            adapter = None if n is None else store.resolve(n)
            items += engine.write([Prompt(p, adapter, Sampling(m, **shape), seed, ())])
        found = [item.payload.future.result(120)[0] for item in items]
        assert [one.text.removeprefix(" ") for one in found] == wanted  # a text goes on where its prompt ends
        assert (engine.writer.apart is None) == (family == "llama"), engine.writer.apart
        assert all(entry.leases == 0 for entry in engine.tiers.entries.values())
        assert engine.writing.total == 0
    finally:
        engine.close()


def test_a_short_text_does_not_wait_for_a_long_one(writer):
    """It comes later and is done first, though an adapter that is busy has taken every place."""
    _, served, _, store = writer
    engine = Engine(served, ServeSettings(group_prompts=4, new_tokens=400))
    try:
        lora = store.resolve("lora")
        sampled = {"temperature": 1.0}  # greedy texts of so small a base end or repeat
        begun = threading.Event()
        long = engine.write([
            Prompt("the red cat", lora, Sampling(300, **sampled), seed, (), lambda text, tokens: begun.set())
            for seed in range(4)
        ])  # fmt: skip
        assert begun.wait(60)
        (short,) = engine.write([Prompt("the old dog", store.resolve("other"), Sampling(2, **sampled), 5, ())])
        assert short.payload.future.result(60)[0].written <= 2
        assert not any(item.payload.future.done() and item.payload.future.result()[0].written > 200 for item in long)
        engine.cancel(long)
        until(lambda: engine.writing.total == 0, "texts that nobody waits for are written still")
    finally:
        engine.close()


def test_log_probabilities_are_those_of_a_plain_forward(writer):
    """Completions: in whole answers and in streams, to 1e-5, with what was most probable beside them."""
    _, served, plain, store = writer
    with serving(served, store) as here:
        body = {
            "model": "prompt",
            "prompt": "the red cat",
            "max_tokens": 6,
            "logprobs": 3,
            "temperature": 0.9,
            "seed": 4,
        }
        answer = here.call("POST", "/v1/completions", body).json()["choices"][0]
        ids = plain.tokenizer("the red cat")["input_ids"]
        new = plain.generate(["the red cat"], "prompt", max_new_tokens=6, temperature=0.9, do_sample=True, seed=4,
                             return_ids=True)[0]  # fmt: skip
        with torch.no_grad(), plain.use("prompt"):
            logits = plain.model(input_ids=torch.tensor([ids + new])).logits[0].float().log_softmax(-1)
        chances = answer["logprobs"]

        def word_of(token: int) -> str:  # as it stands in a text; ids beyond the tokenizer's are nothing
            word = plain.tokenizer.decode([token])
            return word and " " + word

        assert len(chances["tokens"]) == len(new) > 2
        for place, token in enumerate(new):
            row = logits[len(ids) + place - 1]
            assert chances["token_logprobs"][place] == pytest.approx(float(row[token]), abs=1e-5)
            best = row.topk(3)
            named = {word_of(i): v for i, v in zip(best.indices.tolist(), best.values.tolist())}
            shown = chances["top_logprobs"][place]
            assert {word: shown[word] for word in named} == pytest.approx(named, abs=1e-5)
            word = word_of(token)
            assert word == chances["tokens"][place] and word in shown
            assert answer["text"][chances["text_offset"][place] :].startswith(word)
        headers = {"Authorization": "Bearer admin-key-of-this-test"}
        with httpx.stream(
            "POST", here.address + "/v1/completions", json=body | {"stream": True}, headers=headers
        ) as got:
            lines = [line[6:] for line in got.iter_lines() if line.startswith("data: {")]
        streamed: list[float] = []
        for line in lines:
            part = json.loads(line)["choices"][0]["logprobs"]
            streamed += part["token_logprobs"] if part else []
        assert streamed == pytest.approx(chances["token_logprobs"], abs=1e-6)
        plain_one = here.call("POST", "/v1/completions", {"model": "prompt", "prompt": "the"}).json()
        assert plain_one["choices"][0]["logprobs"] is None


# -- threads -----------------------------------------------------------------------------------------------------------


def test_several_threads_answer_what_predict_answers(tmp_path):
    """Rows of all methods, in many small requests, while other adapters come and go."""
    methods = {"lora": "lora", "bottleneck": "bottleneck(size=4)", "prefix": "prefix(length=3)", "prompt": "prompt"}
    served, plain, store = stored("bert", tmp_path, LABELS, {**methods, "more": "ia3", "last": "dora(rank=2)"})
    threads = torch.get_num_threads()
    engine = Engine(served, ServeSettings(answering=3))
    try:
        assert sum(thread.name.startswith("onebase-rows") for thread in threading.enumerate()) == 3
        assert torch.get_num_threads() == threads
        known = {name: store.resolve(name) for name in [*methods, "more", "last"]}
        texts = [
            " ".join(["the", "red", "cat", "old", "dog"][(i * k) % 5] for k in range(1, 3 + i % 7)) for i in range(40)
        ]
        wanted = {name: [p.probabilities for p in plain.predict(texts, name)] for name in known}

        def ask(number: int) -> list[tuple[str, int, Any]]:
            asked = [(name, (number * 7 + i) % 40) for i, name in enumerate(known)]
            rows = engine.ask([Row(texts[i], None, known[name]) for name, i in asked])
            if number % 5 == 0:
                engine.tiers.withdraw(known["more"].digest)
            return [(name, i, item.payload.future.result(60)[0]) for (name, i), item in zip(asked, rows)]

        with ThreadPoolExecutor(12) as pool:
            for answers in pool.map(ask, range(120)):
                for name, i, answer in answers:
                    assert answer.probabilities == pytest.approx(wanted[name][i], abs=1e-5), (name, i)
    finally:
        engine.close()
        plain.close()
    assert served.predict(texts[:2], None)[0].embedding is not None


def test_the_turn_is_shared_by_those_who_share_and_by_nobody_else():
    """Two share; one alone waits for both, and who comes behind it waits for it, sharing or not."""
    turns, order = Turns(), []

    def alone() -> None:
        with turns:
            order.append("alone")

    def together() -> None:
        with turns.shared():
            order.append("shared")

    with ThreadPoolExecutor(3) as pool:
        with turns.shared():
            with turns.shared():  # at the same time
                first = pool.submit(alone)
                until(lambda: len(turns._waiting) == 1, "nobody waits")
                second = pool.submit(together)
                until(lambda: len(turns._waiting) == 2, "the second does not wait")
            assert not order
        first.result(10), second.result(10)
    assert order == ["alone", "shared"]
    with turns:  # free again
        pass


KEPT = """
import resource, sys, torch
from onebase.devices import keep_memory

if sys.argv[1] == "keep":
    keep_memory()

def layer(number):
    parts = [torch.empty((3 << 20) + 4096 * number).fill_(1.0) for _ in range(5)]  # larger than any before

layer(0), layer(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for number in range(2, 12):
    layer(number)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is kept is what glibc can be told")
def test_memory_is_kept_for_the_next_layer():
    """A process that asks for it takes no pages anew; one that does not takes those of every layer again."""
    run = [subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, text=True) for how in ("keep", "no")]
    kept, returned = (int(one.stdout) for one in run)
    assert 5 * kept < returned, (kept, returned)
