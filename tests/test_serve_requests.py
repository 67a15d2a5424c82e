"""What a request may have, what it is told, and how its text goes on where the prompt ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers as tf
from families import make, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from onebase.base import Base
from onebase.serve.keys import Key, hashed
from onebase.store import Store
from serving import ADMIN, serving

LABELS = {"kind": "classification", "labels": ["bad", "good"], "pooling": "mean", "max_length": 32}
POSITIONS = 64
ASK = {"Authorization": f"Bearer {ADMIN}"}
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def pieces_tokenizer() -> Any:
    """Words with the space in front of them, and bytes for what is none of them, as SentencePiece has it."""
    known = ["<s>", "</s>", "<unk>", *BYTES, "\u2581", "\u2581a", "a", "\u2581red", "\u2581cat", "s", ",", "é"]
    raw = Tokenizer(models.Unigram([(word, -1.0 - (word in BYTES) * 9) for word in known], 2, byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # type: ignore[assignment]
    raw.decoder = decoders.Sequence([  # type: ignore[assignment]
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return _wrapped(raw)


def bytes_tokenizer() -> Any:
    """Bytes alone, as byte-level BPE writes them."""
    known = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(known, [], unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(False)  # type: ignore[assignment]
    raw.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return _wrapped(raw)


def _wrapped(raw: Tokenizer) -> Any:
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _writer(tokenizer: Any) -> Base:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, max_position_embeddings=POSITIONS,
    )  # fmt: skip
    return Base(tf.LlamaForCausalLM(config).eval(), tokenizer, id="tiny")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A base that writes and three versions of an adapter that labels; one key sees neither."""
    base, store = Base(make("llama"), tiny_tokenizer(), id="tiny"), Store(tmp_path_factory.mktemp("requests"))
    base.add("reviews", "lora(rank=1)", task=LABELS)
    for _ in range(3):
        base.save("reviews", store=store)
    store.promote("reviews@2", "prod")
    base.remove("reviews")
    with serving(base, store, [Key(hashed("few"), frozenset({"use"}), frozenset({"revues"}))]) as found:
        yield found


def said(answer: Any) -> str:
    return answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", [pieces_tokenizer, bytes_tokenizer])
def test_a_text_goes_on_where_the_prompt_ends(tmp_path, kind):
    """Prompt and text are one text; what is streamed and the tokens of log probabilities add up to it."""
    tokenizer = kind()
    with serving(_writer(tokenizer), Store(tmp_path)) as here:
        spaced = 0
        for seed in range(24):
            prompt = ("a red cat", "a é", "a 😀", "a red", [0, *tokenizer("😀")["input_ids"][:-1]])[seed % 5]
            body = {"model": "base", "prompt": prompt, "max_tokens": 12, "temperature": 100, "seed": seed}
            answer = here.call("POST", "/v1/completions", body | {"logprobs": 2}).json()
            text, chances = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
            lines = here.call("POST", "/v1/completions", body | {"stream": True}).text.splitlines()
            streamed = [json.loads(line[6:])["choices"] for line in lines if line.startswith("data: {")]
            assert "".join(choices[0]["text"] for choices in streamed) == text
            if isinstance(prompt, str):
                read = tokenizer(prompt)["input_ids"]
                sampled = {"max_new_tokens": 12, "temperature": 100.0, "seed": seed, "do_sample": True}
                new = here.engine.base.generate([prompt], return_ids=True, **sampled)[0]
                whole = tokenizer.decode(read + new, skip_special_tokens=True)
                if "\ufffd" not in whole:
                    assert prompt + text == whole
            if "\ufffd" not in text + "".join(chances["tokens"]):
                assert "".join(chances["tokens"]) == text
            spaced += text.startswith(" ")
        if kind is pieces_tokenizer:
            places = [tokenizer.convert_tokens_to_ids(word) for word in ("\u2581a", "\u2581cat", "s")]
            after = here.engine.tail_of(tokenizer("a red")["input_ids"])
            assert here.engine.text_of(places, after) == " a cats" and here.engine.text_of(places) == "a cats"


def test_what_a_base_cannot_read_is_refused(tmp_path):
    """400 with the limit and the length, streamed or not; without a length, as much as there is room for."""
    with serving(_writer(pieces_tokenizer()), Store(tmp_path)) as here:
        assert here.call("GET", "/v1/models/base").json()["max_length"] == POSITIONS
        for more in ({}, {"stream": True}, {"max_tokens": 1}):
            refused = here.call("POST", "/v1/completions", {"model": "base", "prompt": [5] * 65, **more})
            assert refused.status_code == 400 and "has 65 tokens" in said(refused) and "at most 64" in said(refused)
        body = {"model": "base", "prompt": [5] * 60, "logprobs": 0}
        refused = here.call("POST", "/v1/completions", body | {"max_tokens": 5})
        assert refused.status_code == 400 and "max_tokens can be 4 at most" in said(refused)
        for more in ({}, {"max_tokens": 4}):
            assert here.call("POST", "/v1/completions", body | more).json()["usage"]["completion_tokens"] <= 4


def test_values_that_change_nothing_are_taken(here):
    """Clients send every field they know; what would change the answer is refused."""
    body = {"model": "base", "prompt": "the red cat", "max_tokens": 2}
    neutral = {
        "frequency_penalty": 0, "presence_penalty": None, "best_of": 1, "echo": False, "n": 1, "logit_bias": {},
        "suffix": None, "stop": None, "seed": None, "stream": None, "logprobs": None, "top_k": -1, "user": None,
    }  # fmt: skip
    plain, same = (here.call("POST", "/v1/completions", body | more) for more in ({}, neutral))
    assert same.status_code == 200 and same.json()["choices"] == plain.json()["choices"]
    assert here.call("POST", "/v1/completions", body | {"n": 2, "best_of": 2}).status_code == 200
    for more in (
        {"frequency_penalty": 0.5},
        {"best_of": 3},
        {"echo": True},
        {"logit_bias": {"5": 1}},
        {"colour": None},
    ):
        refused = here.call("POST", "/v1/completions", body | more)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == next(iter(more))
    assert here.call("POST", "/v1/completions", {"model": None, "prompt": "a"}).status_code == 400


def test_bodies_that_are_no_json_are_said_to_be_none(here):
    """The character, or the header that is missing."""
    post = here.client.post
    broken = post(
        "/v1/completions", content=b'{"model": "base", "prompt"', headers=ASK | {"content-type": "application/json"}
    )
    assert said(broken).startswith("body: not JSON: ") and "at character 26" in said(broken)
    assert broken.json()["error"]["param"] is None
    for more in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        bare = post("/v1/completions", content=b'{"model": "base", "prompt": "a"}', headers=ASK | more)
        assert bare.status_code == 400 and "send Content-Type: application/json" in said(bare)


def test_a_late_answer_names_the_limit_that_applied(here):
    """That of the request, or that of the server."""
    body = {"model": "base", "prompt": "the", "max_tokens": 40}
    late = here.client.post("/v1/completions", json=body, headers=ASK | {"x-timeout-seconds": "0.0001"})
    assert late.status_code == 504 and "0.0001 seconds (x-timeout-seconds of the request)" in said(late)


def test_a_withdrawn_version_is_said_to_be_withdrawn(here):
    """Not among those that are known, with the way back; its alias as well."""
    assert here.call("DELETE", "/v1/adapters/reviews@2").status_code == 200
    try:
        for model in ("reviews@2", "reviews@prod"):
            gone = here.call("POST", "/v1/classify", {"model": model, "input": "a"})
            assert gone.status_code == 404 and "version 2 was withdrawn" in said(gone)
            assert 'POST /v1/adapters {"ref": "reviews@2"}' in said(gone) and said(gone).endswith("Others: 1, 3.")
        missing = here.call("POST", "/v1/classify", {"model": "reviews@9", "input": "a"})
        assert said(missing).endswith("Known: 1, 3.")
        assert here.call("POST", "/v1/adapters", {"ref": "reviews@2"}).status_code == 200
        assert here.call("POST", "/v1/classify", {"model": "reviews@prod", "input": "a"}).status_code == 200
    finally:
        here.call("POST", "/v1/adapters", {"ref": "reviews@2"})


@pytest.mark.parametrize("model", ["REVIEWS", "revews", "rvw", "reviews@prd", "bas", "?"])
def test_the_nearest_names_are_those_of_the_message(here, model):
    """The same ones, for programs."""
    error = here.call("POST", "/v1/classify", {"model": model, "input": "a"}).json()["error"]
    close = error["message"].partition("Did you mean ")[2].partition("? ")[0]
    assert error["nearest"] == [one.strip("'") for one in close.split(" or ") if one]
    assert bool(error["nearest"]) == (model != "?")
    hidden = here.call("POST", "/v1/classify", {"model": model, "input": "a"}, key="few").json()["error"]
    assert "reviews" not in hidden["nearest"]


def test_chats_are_counted_under_their_own_path(here):
    here.call("POST", "/v1/chat/completions", {"model": "base", "messages": []})
    here.call("GET", "/v1/adapters/reviews")
    text = here.call("GET", "/metrics").text
    assert 'path="/v1/chat/completions"' in text and 'path="/v1/chat"' not in text
    assert 'path="/v1/adapters"' in text and 'path="/v1/adapters/reviews"' not in text


def test_the_name_of_the_plain_base_is_not_trained(here):
    refused = here.call("POST", "/v1/training", {"sample": "reviews", "name": "base"})
    assert refused.status_code == 400 and "'my-base'" in said(refused)
    refused = here.call("POST", "/v1/load_lora_adapter", {"lora_name": "base", "lora_path": "reviews@1"})
    assert refused.status_code == 400 and "means the plain base" in said(refused)


def run(*words: str, **more: Any) -> Any:
    return subprocess.run([sys.executable, "-m", "onebase", "serve", *words], capture_output=True, text=True, **more)


def test_a_new_key_is_alone_on_stdout():
    """So that a shell can take it; its hash is beside it."""
    made = run("--new-key")
    key = made.stdout.strip()
    assert made.returncode == 0 and len(key) > 40 and key.split() == [key]
    assert hashed(key) in made.stderr and key not in made.stderr


def test_a_port_that_is_taken_is_one_error(tmp_path):
    """Nothing is said before, no base is loaded, and the way out is named."""
    make("bert").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        env = {**os.environ, "ONEBASE_HOME": str(tmp_path / "home")}
        failed = run("-b", str(tmp_path / "base"), "--port", str(port), env=env)
    assert failed.returncode == 1 and not failed.stdout
    assert failed.stderr.startswith(f"error: port {port} of 127.0.0.1 is in use") and "--port" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
