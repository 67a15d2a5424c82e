"""Texts that come and go while others are written: token for token what `base.generate` writes for each alone."""

from __future__ import annotations

import random

import checks
import pytest
from families import PRESENT, make, tiny_tokenizer

from onebase.base import Base
from onebase.decoding import Decoding, problem_of

METHODS = {
    "lora": "lora(rank=4)",
    "bottle": "bottleneck(size=4)",
    "prefix": "prefix(length=3)",
    "short": "prompt(length=2)",
    "long": "prompt(length=5)",
    "loreft": "loreft(rank=2)",
    "follow": "prefix(length=2, positions='follow')",
}
JOINS = ("bert-decoder", "gpt2", "opt", "opt-post", "llama", "qwen3")


def adapted(family: str) -> Base:
    base = Base(make(family), tiny_tokenizer())
    for number, (name, method) in enumerate(METHODS.items()):
        checks.disturb(base.add(name, method, seed=number).module, seed=number, size=0.3)
    return base


@pytest.mark.parametrize("family", JOINS)
def test_rows_that_come_and_go_write_what_they_write_alone(family: str) -> None:
    """Twelve texts of all methods and the base: at every step some come in, and whoever is done leaves."""
    chance = random.Random(1)
    with adapted(family) as base:
        names = [*METHODS, None] * 2
        prompts = [[chance.randrange(4, 60) for _ in range(chance.randrange(1, 9))] for _ in names]
        most = [chance.randrange(1, 9) for _ in names]
        asked = list(zip(prompts, names, most))
        wanted = [base.generate([p], n, max_new_tokens=m, return_ids=True)[0] for p, n, m in asked]
        decoding, waiting, running = Decoding(base), list(range(len(names))), []
        found: dict[int, list[int]] = {i: [] for i in waiting}
        widest = 0
        while waiting or running:
            new, waiting = waiting[: (size := chance.randrange(0, 3))], waiting[size:]
            if new:
                scores = decoding.join([prompts[i] for i in new], [names[i] for i in new])
                running += new
                for i, row in zip(new, scores):
                    found[i].append(int(row.argmax()))
            on = [row for row, i in enumerate(running) if len(found[i]) < most[i] and found[i][-1] != 2]
            decoding.keep(on)
            running = [running[row] for row in on]
            widest = max(widest, len(running))
            if running:
                for i, row in zip(running, decoding.step([found[i][-1] for i in running])):
                    found[i].append(int(row.argmax()))
                on = [row for row, i in enumerate(running) if len(found[i]) < most[i] and found[i][-1] != 2]
                decoding.keep(on)
                running = [running[row] for row in on]
        assert widest > 2
        for i, ids in enumerate(wanted):
            own = found[i][:-1] if found[i][-1] == 2 else found[i]
            while own and own[-1] == 1:  # `generate` cannot tell a last pad from padding
                own = own[:-1]
            assert own == ids, (names[i], prompts[i])


@pytest.mark.parametrize("family", [name for name, case in PRESENT.items() if case.writes])
def test_a_base_proves_that_its_texts_can_join(family: str) -> None:
    """Windows and encoders cannot, and say why; the base is left as it was either way."""
    with Base(make(family), tiny_tokenizer()) as base:
        base.add("own", "lora")
        before = base.generate("the red cat", "own", max_new_tokens=4)
        problem = problem_of(base)
        assert (problem is None) == (family in JOINS), problem
        assert list(base.adapters) == ["own"]
        assert base.generate("the red cat", "own", max_new_tokens=4) == before


def test_a_cache_that_is_joined_wrongly_is_found() -> None:
    """The proof fails when rows are put together a column off, as it would with a library that changed."""
    from onebase import decoding

    aligned = decoding._left
    with Base(make("llama"), tiny_tokenizer()) as base:
        assert problem_of(base) is None
        try:
            decoding._left = lambda states, width: aligned(states, width).roll(1, 2)
            assert "written otherwise" in str(problem_of(base))
        finally:
            decoding._left = aligned


def test_a_model_with_rules_of_its_own_is_written_in_groups() -> None:
    """`generate` applies a repetition penalty to the whole text, which nothing here knows."""
    model = make("llama")
    model.generation_config.repetition_penalty = 1.3
    with Base(model, tiny_tokenizer()) as base:
        assert "repetition_penalty" in str(problem_of(base))


def test_rows_of_one_batch_draw_by_their_own_settings() -> None:
    """Greedy rows, and rows with other temperatures, cuts and seeds, side by side."""
    from onebase.encode import Encoded
    from onebase.generation import RowSampler, Shape, write_rows

    shapes = [None, Shape(0.7), Shape(1.3, top_k=5), Shape(0.7), Shape(1.0, top_p=0.8), Shape(1.5, min_p=0.1), None]
    seeds = [None, 1, 2, 3, 4, 5, None]
    prompts = [[5 + i, 9, 7][: 1 + i % 3] for i in range(len(shapes))]
    with adapted("llama") as base:
        names = list(METHODS)
        rows = [Encoded(tuple(p)) for p in prompts]
        mixed = write_rows(base, rows, names, 6, {}, [RowSampler(seeds, shapes)])
        for prompt, name, shape, seed, ids in zip(prompts, names, shapes, seeds, mixed):
            drawn = {} if shape is None else {"do_sample": True, "seed": seed, **vars(shape)}
            assert base.generate([prompt], name, max_new_tokens=6, return_ids=True, **drawn)[0] == ids
