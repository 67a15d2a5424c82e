"""Conversations over HTTP and in the terminal, with an adapter that was trained on them."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import checks
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

import onebase as ob
from onebase.cli.main import app
from onebase.store import Store
from onebase.tasks import get_task
from serving import ADMIN, serving

TALK = [{"role": "system", "content": "be warm"}, {"role": "user", "content": "say x"}]
WRITES = {"kind": "causal-lm", "labels": [], "pooling": "mean", "max_length": 64}


def save_base(folder: Path) -> None:
    """A tiny decoder over single characters."""
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = ["<s>", "<pad>", "</s>", *string.printable]
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    raw.decoder = decoders.Fuse()  # type: ignore[assignment]
    tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", model_max_length=400
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(characters), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, pad_token_id=1, eos_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).eval().save_pretrained(folder)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A base's folder, a store, and the base with what is in it: a chat adapter, and one that continues texts."""
    tmp = tmp_path_factory.mktemp("chat")
    save_base(tmp / "base")
    base, store = ob.load_base(tmp / "base"), Store(tmp / "home")
    rows = [{"messages": [{"role": "user", "content": f"say {c}"}, {"role": "assistant", "content": c * 2}]}
            for c in string.ascii_lowercase]  # fmt: skip
    ob.train(base, rows, "lora(rank=4)", name="echo", store=store, template="chatml", lr=1e-2, epochs=1, batch_size=8,
             attention="keep", dtype="float32")  # fmt: skip
    checks.disturb(base.adapters["echo"].module, seed=2, size=0.2)  # so small a base would say nothing otherwise
    base.save("echo", store=store)
    checks.disturb(base.add("free", "prompt(length=2)", task=WRITES).module, seed=4, size=0.3)
    base.save("free", store=store)
    yield tmp / "base", store, base
    base.close()


def test_the_chat_route_answers_as_generate_does(chatty):
    """Whole, streamed through OpenAI's client, and with log probabilities of a plain forward."""
    openai = pytest.importorskip("openai")
    folder, store, base = chatty
    with serving(ob.load_base(folder), store) as here:
        wanted = base.generate([TALK], "echo", max_new_tokens=8)[0]
        assert wanted
        client = openai.OpenAI(base_url=here.address + "/v1", api_key=ADMIN, max_retries=0)
        asked: dict[str, Any] = {"model": "echo", "messages": TALK, "max_tokens": 8}
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        assert whole.choices[0].message.content == wanted
        assert whole.model_extra["ref"] == "echo@2"
        pieces = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == wanted
        assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens > 1

        read = get_task("chat").prompt(base, base.adapters["echo"].task, TALK)
        new = base.generate([read], "echo", max_new_tokens=8, return_ids=True)[0]
        with torch.no_grad(), base.use("echo"):
            rows = base.model(input_ids=torch.tensor([read + new])).logits[0].float().log_softmax(-1)
        content = whole.choices[0].logprobs.content
        assert [c.token for c in content] == [base.tokenizer.decode([i]) for i in new]
        for place, (token, one) in enumerate(zip(new, content)):
            row = rows[len(read) + place - 1]
            assert one.logprob == pytest.approx(float(row[token]), abs=1e-5)
            assert [t.logprob for t in one.top_logprobs] == pytest.approx(row.topk(2).values.tolist(), abs=1e-5)
            assert bytes(one.bytes).decode() == one.token

        for model, why in (("base", "no chat template"), ("free", "takes text as a prompt")):
            refused = here.call("POST", "/v1/chat/completions", {"model": model, "messages": TALK})
            assert refused.status_code == 400 and why in refused.json()["error"]["message"]
        wrong = here.call("POST", "/v1/chat/completions", {**asked, "top_logprobs": 2})
        assert wrong.status_code == 400 and "no effect without logprobs" in wrong.json()["error"]["message"]


def test_a_conversation_in_the_terminal(chatty, monkeypatch):
    """Lines in, answers out; adapters are switched, what was said is remembered or forgotten, the end of input ends."""
    folder, store, base = chatty
    monkeypatch.setenv("ONEBASE_HOME", str(store.root))
    lines = ["say x", "say y", "/use free", "the cat", "/use nobody", "/what", "/use echo", "/new", "say z"]
    words = ["chat", "echo", "-b", str(folder), "--max-new-tokens", "6"]
    found = CliRunner().invoke(app, words, input="".join(line + "\n" for line in lines))
    assert found.exit_code == 0, found.output

    def turn(content: str, role: str = "user") -> dict[str, str]:
        return {"role": role, "content": content}

    def answer(prompt: Any, name: str) -> str:
        return base.generate([prompt], name, max_new_tokens=6)[0]

    one = answer([turn("say x")], "echo")
    two = answer([turn("say x"), turn(one, "assistant"), turn("say y")], "echo")
    wanted = [one, two, answer("the cat", "free"), answer([turn("say z")], "echo")]
    assert all(wanted)
    assert found.stdout == "".join(text + "\n" for text in wanted)
    assert "unknown model 'nobody'" in found.stderr and "unknown command '/what'" in found.stderr


def test_what_is_said_comes_in_pieces_and_an_interrupt_forgets_it(chatty):
    """As `onebase chat` shows it."""
    from onebase.cli.chat import Talk
    from onebase.serve.asked import Sampling
    from onebase.serve.catalog import Catalog
    from onebase.serve.engine import Engine
    from onebase.serve.settings import ServeSettings

    folder, store, _ = chatty
    engine = Engine(ob.load_base(folder), ServeSettings())
    try:
        talk = Talk(engine, Catalog([store]), Sampling(60, 1.5), seed=3, system="be good")
        talk.use("echo")
        pieces: list[str] = []
        text = talk.say("say a", pieces.append)
        assert "".join(pieces) == text and len(pieces) > 1
        assert json.loads(json.dumps(talk.turns))[-1] == {"role": "assistant", "content": text}

        def interrupt(piece: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            talk.say("say b", interrupt)
        assert [t["content"] for t in talk.turns] == ["be good", "say a", text]
    finally:
        engine.close()
