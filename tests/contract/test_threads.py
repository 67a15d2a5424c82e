"""Many threads and tasks inside one base at once: each gets the answer of its own adapter."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import checks
import pytest
import torch
from families import make
from methods import every

from onebase.base import Base
from onebase.tasks import get_task

THREADS = 50


def crowd(base: Base, names: list, work) -> dict[int, torch.Tensor]:
    """Run `work(i, name)` in 50 threads that all wait for each other in the middle of the same forward."""
    barrier = threading.Barrier(THREADS)
    layer = base.anatomy.stacks[0].layers[1]
    answers, errors = {}, []

    def hold(*_) -> None:
        barrier.wait(60)

    handle = layer.register_forward_pre_hook(hold)

    def run(i: int) -> None:
        try:
            with torch.no_grad():
                answers[i] = work(i, names[i % len(names)])
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        handle.remove()
    assert errors == []
    return answers


@pytest.mark.parametrize("way", ["use", "bind", "ids", "mixed"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_fifty_threads_in_one_forward(family, way, tokenizer):
    """Every thread is held between two layers together with all others, and still gets its own adapter."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        names = [*checks.attach(base, every()), None]
        rows = checks.draw([None] * THREADS).tokens
        alone = [checks.call_alone(base, rows[i], names[i % len(names)]) for i in range(THREADS)]

        def work(i, name):
            if way == "use":
                return checks.call_alone(base, rows[i], name)
            call = checks.inputs(base, rows[i][None])
            if way == "bind":
                return checks.values(base.bind(name)(**call))[0]
            if way == "ids":
                return checks.values(base.model(**call, adapter_ids=base.ids([name])))[0]
            return checks.call_rows(base, checks.Rows((rows[i], rows[i - 1]), (name, names[0])), "left")[0]

        for i, answer in crowd(base, names, work).items():
            assert checks.gap(answer, alone[i]) <= checks.LOGITS, names[i % len(names)]


def test_fifty_threads_predict(tokenizer):
    """`predict` from 50 threads at once."""
    with Base(make("bert"), tokenizer) as base:
        names = checks.attach(base, every())
        task = {
            "kind": "classification",
            "labels": ["good", "bad"],
            "pooling": "mean",
            "max_length": 60,
            "template": "",
            "pair": False,
        }
        for name in names[::2]:
            base.adapters[name].task = task
            base.adapters[name].head = get_task("classification").head(task, base.anatomy.hidden_size)
            checks.disturb(base.adapters[name].head, len(name))
        names.append(None)
        texts = [f"the cold river {'and the road ' * (i % 4)}" for i in range(THREADS)]
        alone = [base.predict(texts[i], names[i % len(names)])[0] for i in range(THREADS)]
        for i, found in crowd(base, names, lambda i, name: base.predict(texts[i], name)[0]).items():
            assert (found.adapter, found.label) == (alone[i].adapter, alone[i].label)
            assert found.probabilities == pytest.approx(alone[i].probabilities, abs=1e-6)
            if alone[i].embedding is not None:
                assert checks.gap(found.embedding, alone[i].embedding) <= checks.LOGITS


def test_executor_with_bind(tokenizer):
    """A pool's threads are used again and again; a bound call leaves no route behind in them."""
    with Base(make("gpt2"), tokenizer) as base:
        names = [*checks.attach(base, every()), None]
        row = checks.draw([None]).tokens[0]
        alone = {name: checks.call_alone(base, row, name) for name in names}
        with ThreadPoolExecutor(4) as pool:
            for _ in range(2):
                jobs = {n: pool.submit(base.bind(n), **checks.inputs(base, row[None])) for n in names}
                for name, job in jobs.items():
                    assert checks.gap(checks.values(job.result())[0], alone[name]) <= checks.LOGITS
            bare = pool.submit(base.model, **checks.inputs(base, row[None])).result()
            assert checks.gap(checks.values(bare)[0], alone[None]) <= checks.LOGITS


def test_bind_carries_any_function(tokenizer):
    """`bind(name, function)` routes whatever the function calls."""
    with Base(make("gpt2"), tokenizer) as base:
        checks.attach(base, {"a": every()["lora-0"]})
        row = checks.draw([None]).tokens[0]

        def twice(scale):
            return scale * checks.values(base.model(**checks.inputs(base, row[None])))[0]

        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(base.bind("a", twice), 2.0).result()
        assert torch.equal(found, 2.0 * checks.call_alone(base, row, "a"))


def test_asyncio_tasks_keep_their_routes(tokenizer):
    """Tasks that take turns inside `use`, and `asyncio.to_thread`, each keep their own route."""
    with Base(make("gpt2"), tokenizer) as base:
        names = [*checks.attach(base, every()), None]
        row = checks.draw([None]).tokens[0]
        alone = {name: checks.call_alone(base, row, name) for name in names}

        def call():
            return checks.values(base.model(**checks.inputs(base, row[None])))[0]

        async def task(name, threaded):
            with base.use(name):
                await asyncio.sleep(0)
                first = await asyncio.to_thread(call) if threaded else call()
                await asyncio.sleep(0)
                return first, call()

        async def everybody():
            return await asyncio.gather(*(task(n, threaded) for n in names for threaded in (False, True)))

        for i, answers in enumerate(asyncio.run(everybody())):
            for answer in answers:
                assert torch.equal(answer, alone[names[i // 2]])
