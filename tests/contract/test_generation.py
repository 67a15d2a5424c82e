"""Generation of mixed batches: greedy, beams and seeded sampling, with and without cache; streams; wrong names."""

from __future__ import annotations

import threading
from typing import Any

import checks
import pytest
import torch
from families import WRITERS, WRITING, make, pairs
from methods import every, variants
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer

from onebase.base import Base
from onebase.core.anchor import output_cache
from onebase.errors import ConfigError, DataError, RouteError, UnknownNameError
from onebase.generation import prompts_of, seeds_of
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


COUNTING = {
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "min_length": 6,
    "forced_bos_token_id": 9,
    "bad_words_ids": [[*two, i] for two in ((1, 5), (5, 1)) for i in range(4, 60)],  # 1 is padding
    "sequence_bias": [[[1, 5, 9], 40.0], [[5, 1, 8], 40.0]],
    "repetition_penalty": 3,
}
WAYS: tuple[dict[str, Any], ...] = ({}, {"num_beams": 2, "num_return_sequences": 2}, {"seed": 4, "top_k": 9})


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_padding_is_no_text_for_any_setting(family, name, tokenizer):
    """Settings that look at the prompt see a row's own, whether the caller or the model's own config sets them."""
    model = make(family)
    prompts, setting = [[5], [6, 7, 8, 9, 10, 11], [5, 1], [12, 13, 14], [7, 6, 5]], {name: COUNTING[name]}
    more = {"max_new_tokens": 6, "return_ids": True}
    if name == "min_length":  # many tokens end a text, so that texts are short without it
        more["eos_token_id"] = list(range(2, 64, 3))
    if "ngram" in name:  # few tokens are left, so that the padding token, 1, is among those that are written
        more["suppress_tokens"] = [i for i in range(64) if i != 1 and not 20 <= i < 27]
    with Base(model, tokenizer) as base:
        checks.attach(base, {"a": variants("lora")["lora-0"], "b": variants("prompt")["prompt-0"]})
        names = ["a", None, "b", "a", "b"]

        def alone_and_together(**settings: Any) -> list[Any]:
            mixed = base.generate(prompts, names, **more, **settings)
            for prompt, name, found in zip(prompts, names, mixed, strict=True):
                assert base.generate([prompt], name, **more, **settings) == [found], prompt
            return mixed

        wanted = [alone_and_together(**way, **setting) for way in WAYS]
        if family != "t5" or name not in ("bad_words_ids", "sequence_bias"):  # its decoder does not see the prompt
            assert wanted != [alone_and_together(**way) for way in WAYS]
        setattr(model.generation_config, name, COUNTING[name])
        if name != "repetition_penalty":  # transformers wants a float there
            assert [alone_and_together(**way) for way in WAYS] == wanted


def letters() -> Any:
    """Return a tokenizer with a token for each letter."""
    ids = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", " ", *"abcdefghijklmnopqrstuvwxyz"])}
    raw = Tokenizer(models.BPE(ids | {chr(0x3B1 + i): 31 + i for i in range(33)}, [], unk_token="<unk>"))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("way", [{}, {"seed": 3}, {"num_beams": 2}])
def test_a_text_ends_at_a_stop_string(family, way, tokenizer):
    """The stop string ends its row alone; it is written, as transformers does."""
    with Base(make(family), letters()) as base:
        checks.attach(base, {"a": variants("lora")["lora-0"]})
        prompts, names = ["x", "the cold river", "ab", "the cold river"], ["a", None, None, "a"]
        call: dict[str, Any] = {"max_new_tokens": 8, "suppress_tokens": [0, 1, 2, 3], **way}  # letters only
        free = base.generate(prompts, names, **call)
        stop = [free[0][2:4], free[1][3]]
        found = base.generate(prompts, names, stop_strings=stop, **call)
        assert found[0] != free[0] and found[1] != free[1]
        for prompt, name, text, other in zip(prompts, names, found, free, strict=True):
            assert base.generate(prompt, name, stop_strings=stop, **call) == [text]
            if "num_beams" not in way:  # a beam that ends early makes room for others
                assert text == other[: min((other.index(s) + len(s) for s in stop if s in other), default=8)]
        base.model.generation_config.stop_strings = stop
        assert base.generate(prompts, names, **call) == found


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"typical_p": 0.5, "seed": 1}, "typical_p = 0.5 is not taken here: draw with temperature"),
        ({"epsilon_cutoff": 0.1, "seed": 1}, "epsilon_cutoff"),
        ({"eta_cutoff": 0.1}, "eta_cutoff"),
        ({"top_h": 0.5, "seed": 1}, "top_h"),
        ({"max_length": 5}, "pass max_new_tokens"),
        ({"length_penalty": 2.0}, "pass num_beams"),
        ({"early_stopping": True}, "pass num_beams"),
        ({"early_stopping": "soon", "num_beams": 2}, "early_stopping = 'soon'"),
        ({"pad_token_id": 3}, "pad_token_id = 3"),
        ({"bos_token_id": 5}, "bos_token_id = 5"),
        ({"return_dict_in_generate": True}, "bind"),
        ({"output_scores": True}, "bind"),
        ({"num_beam_groups": 2, "num_beams": 2}, "num_beam_groups"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"token_healing": True}, "token_healing"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: expected a whole number of at least 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5"),
        ({"max_new_tokens": "4"}, "max_new_tokens = '4'"),
        ({"max_new_tokens": True}, "max_new_tokens = True"),
        ({"num_return_sequences": 0}, "num_return_sequences = 0"),
        ({"num_beams": 0}, "num_beams = 0"),
        ({"top_k": -1, "seed": 1}, "top_k = -1"),
        ({"top_k": 2.5, "seed": 1}, "top_k = 2.5"),
        ({"top_p": 2, "seed": 1}, "top_p = 2: expected a number above 0 and up to 1"),
        ({"top_p": 0, "seed": 1}, "top_p = 0"),
        ({"top_p": float("nan"), "seed": 1}, "top_p = nan"),
        ({"min_p": 3, "seed": 1}, "min_p = 3: expected a number from 0 to 1"),
        ({"temperature": 0, "seed": 1}, "temperature = 0: .*greedy"),
        ({"temperature": "1", "seed": 1}, "temperature = '1'"),
        ({"temperature": float("inf"), "seed": 1}, "temperature = inf"),
        ({"seed": [1.5, 2]}, "seed = 1.5: expected a whole number"),
        ({"seed": ["a", "b"]}, "seed = 'a'"),
        ({"seed": [True, False]}, "seed = True"),
        ({"repetition_penalty": -1}, "repetition_penalty = -1: expected a positive number"),
        ({"min_new_tokens": 1.5}, "min_new_tokens = 1.5"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size = -1"),
        ({"eos_token_id": "a"}, "eos_token_id = 'a'"),
        ({"bad_words_ids": [5]}, "bad_words_ids"),
        ({"stop_strings": [""]}, "none of them empty"),
        ({"stop_strings": 5}, "stop_strings = 5"),
        ({"stop_strings": ["a"]}, "this tokenizer .*pass eos_token_id"),  # it has words and no letters
    ],
)
def test_settings_without_effect_or_out_of_range_are_refused(settings, says, tokenizer):
    """The error names the setting, its value and the way out, and comes before the base computes anything."""
    with Base(make("llama"), tokenizer) as base:
        base.model.register_forward_hook(lambda *_: pytest.fail("computed"))
        with pytest.raises(ConfigError, match=says):
            base.generate([[5], [6, 7]], **{"max_new_tokens": 3, **settings})


def test_settings_in_other_numbers_are_taken(tokenizer):
    """Whole numbers of NumPy and torch count, as do values that switch a setting off."""
    import numpy as np

    with Base(make("llama"), tokenizer) as base:
        call = {"return_ids": True, "max_new_tokens": np.int64(3)}
        drawn = base.generate([[5], [6, 7]], seed=np.array([1, 2]), temperature=np.float32(1), top_k=0, **call)
        assert drawn == base.generate([[5], [6, 7]], seed=[1, 2], **call)
        plain = base.generate([[5], [6, 7]], **call)
        ids = [torch.tensor([5]), np.array([6, 7])]
        off = {"typical_p": None, "return_dict_in_generate": False, "no_repeat_ngram_size": 0, "stop_strings": []}
        assert plain == base.generate(ids, **call, **off)
        base.model.generation_config.return_dict_in_generate = True
        assert plain == base.generate(ids, **call)
    assert seeds_of(None, 2) is None and seeds_of(5, 2) == [5, 5] and seeds_of((1, 2), 2) == [1, 2]
    assert seeds_of("a", 2) == ["a", "a"] and seeds_of(1.5, 1) == [1.5]
    assert seeds_of(np.int64(4), 2) == [4, 4] and seeds_of(torch.tensor([1, 2]), 2) == [1, 2]
    with pytest.raises(RouteError, match="2 prompts but 1 seeds"):
        seeds_of([1], 2)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_what_is_no_prompt_is_refused(family, tokenizer):
    """A flat list of ids, no ids, ids that the base does not know, and other things."""
    with Base(make(family), tokenizer) as base:
        base.add("a", "tokens(words=('zxqv',))")
        wrong = (
            ([1, 2, 3], r"prompt 0 is 1: .*list in a list: \[\[1, \.\.\.\]\]"),
            ([[5], []], "prompt 1 has no token ids"),
            ([[1, 99999]], "prompt 0 has token id 99999: expected 0 to "),
            ([[1, -5]], "token id -5"),
            (["the", None], "prompt 1 is None: expected a text"),
            ([["a", "b"]], "prompt 0 is"),
            ([[1.5]], "prompt 0 is"),
            ([b"ab"], "prompt 0 is"),
            ([torch.ones(2, 2)], "prompt 0 is"),
        )
        for prompts, says in wrong:
            with pytest.raises(DataError, match=says):
                base.generate(prompts, max_new_tokens=2)
        for given in (None, 5, {"role": "user", "content": "x"}):
            with pytest.raises(DataError, match=r"prompts = .*expected a text"):
                prompts_of(given)
        assert prompts_of("a") == ["a"] and prompts_of(("a", [5])) == ["a", [5]]
        new = base.tokenizer_of("a").convert_tokens_to_ids("zxqv")
        base.generate([[5, new]], "a", max_new_tokens=2)
        with pytest.raises(DataError, match=f"token id {new}"):
            base.generate([[5, new]], max_new_tokens=2)
