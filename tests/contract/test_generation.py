"""Generation of mixed batches: greedy, beams and seeded sampling, with and without cache; streams; wrong names."""

from __future__ import annotations

import threading

import checks
import pytest
import torch
from families import WRITERS, WRITING, make, pairs
from methods import every, variants
from transformers import TextIteratorStreamer

from onebase.base import Base
from onebase.core.anchor import output_cache
from onebase.errors import RouteError, UnknownNameError
from onebase.methods import method_names

NEW = 5
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 30, "num_return_sequences": 2},
}


def prompts_for(count: int, seed: int = 7) -> list[list[int]]:
    """Draw prompts of different lengths."""
    return [row.tolist() for row in checks.draw([None] * count, seed).tokens]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "attention"), pairs(WRITING))
def test_each_row_generates_as_if_alone(family, attention, mode, tokenizer):
    """A row of a mixed batch gets the tokens that it gets alone; with the cache and without."""
    settings = {**MODES[mode], "max_new_tokens": NEW, "return_ids": True}
    sampled = mode == "sampling"
    with Base(make(family, attention), tokenizer) as base:
        # two settings per method in the beam test: three beams cost three times as much
        chosen = {n: m for name in method_names() for n, m in list(variants(name).items())[:2]}
        names = [*checks.attach(base, chosen if mode == "beams" else every()), None]
        prompts = prompts_for(len(names))
        seeds = list(range(50, 50 + len(names)))
        mixed = base.generate(prompts, names, **settings, **({"seed": seeds} if sampled else {}))
        for prompt, name, seed, found in zip(prompts, names, seeds, mixed, strict=True):
            alone = base.generate([prompt], name, **settings, **({"seed": seed} if sampled else {}))
            assert alone == [found], name
        slow = base.generate(prompts, names, use_cache=False, **settings, **({"seed": seeds} if sampled else {}))
        assert slow == mixed
        same = base.generate(
            prompts[-1:] * len(names), names, **settings, **({"seed": [3] * len(names)} if sampled else {})
        )
        assert len({str(found) for found in same}) > 1, "no adapter changes what is written"


def decode(base: Base, ids: torch.Tensor, mask: torch.Tensor, steps: torch.Tensor) -> list[torch.Tensor]:
    """Feed `steps` (B, n) token by token with a cache; return the logits (B, V) before each and after the last."""
    found = []
    if base.is_encoder_decoder:
        states = base.model.get_encoder()(input_ids=ids, attention_mask=mask)
        cache = None
        for i in range(steps.shape[1]):
            out = base.model(
                encoder_outputs=states,
                attention_mask=mask,
                decoder_input_ids=steps[:, i : i + 1],
                **checks.with_cache(base.model, cache),
                use_cache=True,
            )
            cache = output_cache(out)
            found.append(out.logits[:, -1])
        return found
    out = base.model(input_ids=ids, attention_mask=mask, use_cache=True)
    found.append(out.logits[:, -1])
    for i in range(steps.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = base.model(
            input_ids=steps[:, i : i + 1],
            attention_mask=mask,
            **checks.with_cache(base.model, output_cache(out)),
            use_cache=True,
        )
        found.append(out.logits[:, -1])
    return found


@pytest.mark.parametrize(("family", "attention"), pairs(WRITING))
def test_a_manual_decode_loop_equals_the_full_forward(family, attention, tokenizer):
    """Logits step by step over a cache equal one forward over all tokens under the same route."""
    with Base(make(family, attention), tokenizer) as base, torch.no_grad():
        names = [*checks.attach(base, every()), None]
        ids, mask = checks.draw(names).padded("left")
        steps = torch.randint(4, 64, (len(names), 6), generator=torch.Generator().manual_seed(1))
        with base.use(names, prompts=mask.sum(1).tolist()):  # the full forward holds more than the prompts
            found = torch.stack(decode(base, ids, mask, steps), 1)
            if base.is_encoder_decoder:
                full = base.model(input_ids=ids, attention_mask=mask, decoder_input_ids=steps, use_cache=False).logits
            else:
                longer = torch.cat([mask, torch.ones_like(steps)], 1)
                full = base.model(input_ids=torch.cat([ids, steps], 1), attention_mask=longer, use_cache=False).logits
                full = full[:, -steps.shape[1] - 1 :]
        for i, name in enumerate(names):
            assert checks.gap(found[i], full[i]) <= checks.LOGITS, name


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_a_cache_of_other_adapters_is_refused(family, tokenizer):
    """A cache that holds an adapter's virtual tokens serves no other route."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        base.add("a", "prompt(length=3, init='uniform')")
        base.add("b", "prompt(length=2, init='uniform')")
        ids = torch.tensor([[5, 6, 7]])
        with base.use("a"):
            cache = output_cache(base.model(input_ids=ids, use_cache=True))
        step = {"input_ids": ids[:, :1], **checks.with_cache(base.model, cache), "attention_mask": torch.ones(1, 4)}
        for other in ("b", None):
            with base.use(other), pytest.raises(RouteError, match="cache"):
                base.model(**step)


@pytest.mark.parametrize("family", WRITERS)
def test_bind_carries_beams_and_samples_into_transformers_generate(family, tokenizer):
    """`bind(names).generate` with beams gives what `base.generate` gives; greedy too."""
    with Base(make(family), tokenizer) as base:
        names = [*checks.attach(base, every())[::3], None]
        prompts = [[5, 6, 7, 8]] * len(names)
        call = {"input_ids": torch.tensor(prompts), "attention_mask": torch.ones(len(names), 4, dtype=torch.long)}
        start = 1 if base.is_encoder_decoder else 4
        for settings in ({}, {"num_beams": 3, "num_return_sequences": 3}, {"num_beams": 2}):
            expected = base.generate(prompts, names, max_new_tokens=4, return_ids=True, **settings)
            flat = [ids for many in expected for ids in many] if "num_return_sequences" in settings else expected
            out = base.bind(names).generate(**call, max_new_tokens=4, do_sample=False, **settings)
            assert len(out) == len(flat)
            for row, ids in zip(out[:, start:].tolist(), flat):
                assert row[: len(ids)] == ids


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_streamer_thread_gets_the_adapters_answer(family, tokenizer):
    """The streamer idiom, with `bind`: the thread answers with the adapter, not with the base."""
    with Base(make(family), tokenizer) as base:
        names = checks.attach(base, every())
        call = tokenizer("the cold river", return_tensors="pt", return_token_type_ids=False)
        texts = {}
        for name in (*names, None):
            streamer = TextIteratorStreamer(
                tokenizer, skip_prompt=not base.is_encoder_decoder, skip_special_tokens=True, timeout=60
            )
            settings = {**call, "max_new_tokens": 6, "do_sample": False, "streamer": streamer}
            thread = threading.Thread(target=base.bind(name).generate, kwargs=settings)
            thread.start()
            texts[name] = "".join(streamer).split()
            thread.join()
            assert texts[name] == base.generate("the cold river", name, max_new_tokens=6)[0].split()
        assert len({str(text) for text in texts.values()}) > 3


def test_a_thread_without_a_route_raises_while_another_holds_one(tokenizer):
    """`Thread(target=model.generate)` inside `use` raises; the base does not answer silently."""
    with Base(make("llama"), tokenizer) as base:
        checks.attach(base, {"a": variants("lora")["lora-0"]})
        caught, answers = [], []

        def generate():
            try:
                answers.append(base.model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2))
            except RouteError as error:
                caught.append(str(error))

        def run():
            thread = threading.Thread(target=generate)
            thread.start()
            thread.join()

        with base.use("a"):
            run()
            assert answers == [] and "base.bind" in caught[0]
        run()  # nobody holds a route now: a plain call is a plain call
        assert len(answers) == 1 and len(caught) == 1


def test_unknown_names_raise_before_any_forward(tokenizer):
    """A misspelt name is refused with the nearest one before the base computes anything."""
    with Base(make("gpt2"), tokenizer) as base:
        checks.attach(base, {"reviews": variants("lora")["lora-0"]})
        forwards = []
        for module in base.model.modules():
            module.register_forward_hook(lambda *_: forwards.append(1))
        attempts = [
            lambda: base.generate("the river", "reveiws"),
            lambda: base.generate(["the river"] * 2, ["reviews", "reveiws"]),
            lambda: base.predict("the river", "reveiws"),
            lambda: base.bind("reveiws"),
            lambda: base.ids([None, "reveiws"]),
            lambda: base.as_model("reveiws"),
            lambda: base.save("reveiws"),
            lambda: base.use(["reviews", "reveiws"]).__enter__(),
        ]
        for attempt in attempts:
            with pytest.raises(UnknownNameError, match=r"reveiws.*Did you mean 'reviews'"):
                attempt()
        assert forwards == []
        base.generate("the river", "reviews", max_new_tokens=1)
        assert forwards != []


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_wrong_numbers_of_rows_raise(family, tokenizer):
    """Names, seeds and prompts must fit."""
    with Base(make(family), tokenizer) as base:
        base.add("a", "lora")
        with pytest.raises(RouteError, match="3 texts but 2"):
            base.generate(["the"] * 3, ["a", None])
        with pytest.raises(RouteError, match="2 prompts but 1 seeds"):
            base.generate(["the"] * 2, "a", do_sample=True, seed=[1])
        with base.use(["a", None]), pytest.raises(RouteError, match="state the factor"):
            base.model.generate(input_ids=torch.tensor([[5, 6]] * 2), num_beams=2, max_new_tokens=2)
