"""Chat: the assistant's tokens exactly, templates that hide them, cutting, generation by turns, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TEXTS, make
from torch.nn import functional as F
from typer.testing import CliRunner

import onebase as ob
from onebase.cli.main import app
from onebase.data.messages import as_messages
from onebase.encode import IGNORED
from onebase.errors import ConfigError, DataError, UnsupportedError
from onebase.examples import encode, forward
from onebase.generation import RowStop, until
from onebase.store import Store
from onebase.tasks import get_task
from onebase.tasks.conversations import Unfit, end_of_turn, labelled, prompt_of, shortened, template_of
from onebase.training.prepare import make_task

SHARED = Path(__file__).parents[2] / "shared"
FAST: dict[str, Any] = {"epochs": 1, "batch_size": 8, "seed": 0, "attention": "keep", "dtype": "float32"}
SIMPLE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} </s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}] {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} </s>{% endgeneration %}{% else %}{{ m['content'] }} </s>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
# Leaves out the content of every answer but the last one, as templates of models that think do with thoughts.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}[assistant] gone </s>\n{% else %}"
    "[{{ m['role'] }}] {{ m['content'] }} </s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TALK = [
    {"role": "system", "content": "be warm"},
    {"role": "user", "content": "the cold river"},
    {"role": "assistant", "content": "runs under the old bridge"},
    {"role": "tool", "content": "rain down"},
    {"role": "user", "content": "a small bird"},
    {"role": "assistant", "content": "sings in the tree"},
    {"role": "user", "content": "and nobody answers"},
]


def talks(count: int = 24, turns: int = 1) -> list[dict[str, Any]]:
    words = [*TEXTS[0].split(), *TEXTS[1].split()]
    made = []
    for i in range(count):
        messages = [{"role": "system", "content": "be good"}]
        for t in range(turns):
            said = [words[(i * 5 + t * 3 + j) % len(words)] for j in range(3)]
            messages += [{"role": "user", "content": " ".join(said)}]
            messages += [{"role": "assistant", "content": " ".join(said[::-1])}]
        made.append({"messages": messages})
    return made


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    """A tokenizer of single characters (and three special tokens), which nothing is unknown to."""
    import string

    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    characters = ["<s>", "<pad>", "</s>", *string.printable]
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    raw.decoder = decoders.Fuse()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", pad_token="<pad>", eos_token="</s>", model_max_length=400
    )


@pytest.fixture()
def base(byte_tokenizer: Any) -> Any:
    """A tiny decoder over characters."""
    import copy

    import transformers as tf

    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        max_position_embeddings=512,
    )  # fmt: skip
    with ob.Base(tf.LlamaForCausalLM(config).eval(), copy.deepcopy(byte_tokenizer), id="tiny") as found:
        yield found


def owned(tokenizer: Any, ids: list[int], own: list[bool]) -> list[str]:
    """Return the runs of the assistant's tokens as text."""
    runs, before = [], False
    for token, mine in zip(ids, own):
        if mine:
            runs = runs if before else [*runs, []]  # type: ignore[list-item]
            runs[-1].append(token)
        before = mine
    return ["".join(tokenizer.convert_ids_to_tokens(run)) for run in runs]


def test_only_the_assistants_turns_with_their_ends(byte_tokenizer: Any) -> None:
    for template, end in ((SIMPLE, "</s>"), (MARKED, "</s>"), ("chatml", "</s>")):
        stop = end_of_turn(byte_tokenizer, template)
        ids, own = labelled(byte_tokenizer, template, stop, TALK)
        space = "" if template == "chatml" else " "
        assert owned(byte_tokenizer, ids, own) == [TALK[i]["content"] + space + end for i in (2, 5)], template
        assert "".join(byte_tokenizer.convert_ids_to_tokens(stop)) == end
        # a prompt is what came before an answer in training
        for i in (2, 5):
            before = prompt_of(byte_tokenizer, template, TALK[:i])
            assert ids[: len(before)] == before and own[len(before)] and not own[len(before) - 1]
    plain = byte_tokenizer.apply_chat_template(TALK, chat_template=SIMPLE, tokenize=True, return_dict=False)
    assert labelled(byte_tokenizer, SIMPLE, [2], TALK)[0] == list(plain)


def test_templates_that_hide_the_assistants_tokens_are_refused(byte_tokenizer: Any) -> None:
    with pytest.raises(Unfit, match="first 3 turns are rendered otherwise"):
        labelled(byte_tokenizer, FORGETFUL, [2], TALK)
    assert labelled(byte_tokenizer, FORGETFUL, [2], TALK[:3])[0]  # a single answer is the last one
    strict = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(Unfit, match="no system turns here"):
        labelled(byte_tokenizer, "{% for m in messages %}{% endfor %}" + strict, [2], TALK)
    with pytest.raises(ConfigError, match="writes nothing at the end"):
        end_of_turn(byte_tokenizer, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(Unfit, match="no form for tool calls"):
        labelled(byte_tokenizer, "chatml", [], [{"role": "assistant", "content": "", "tool_calls": [1]}])


def test_a_token_across_a_border_is_refused() -> None:
    """Words are cut at white space alone, so ``[assistant]the`` is one token, and no place lies in it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: i for i, w in enumerate(["<unk>", "</s>", "[user]hi", "[assistant]", "[assistant]yes"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    template = SIMPLE.replace("] {", "]{").replace("[assistant] ", "[assistant]")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(Unfit, match="joins the characters at the border of turn 1"):
        labelled(tokenizer, template, [1], talk)


def test_the_loss_is_that_of_the_answers(base: ob.Base) -> None:
    data = ob.load_data([{"messages": TALK}, *talks(9)], task="chat")
    spec = make_task(base, data, template=SIMPLE)
    assert spec["template"] == "" and spec["stop"] == [2]
    examples = get_task("chat").encode(base, spec, data.train.select([0]))
    base.add("a", "lora(rank=2)", task=spec)
    talk = data.train["messages"][0]
    ids, own = labelled(base.tokenizer, SIMPLE, [2], talk)
    with torch.no_grad(), base.use("a"):
        logits = base.model(input_ids=torch.tensor([ids])).logits[0]
    losses = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    expected = losses[torch.tensor(own[1:])].sum()
    part = forward(base, "a", examples, [0])
    assert part.sums.tolist()[0] == pytest.approx(float(expected), abs=1e-3)
    assert int(part.counts[0]) == sum(own)


def test_long_conversations_lose_their_first_turns(base: ob.Base) -> None:
    data = ob.load_data(talks(12, turns=5), task="chat")
    spec = make_task(base, data, template=SIMPLE, max_length=160)
    examples = encode(base, spec, data)["train"]
    assert examples.cut == len(examples)
    for row, talk in zip(examples.rows, data.train["messages"]):
        ids = list(row.ids)
        text = "".join(base.tokenizer.convert_ids_to_tokens(ids))
        kept = text.count("[user]")
        assert 1 <= kept < 5 and len(ids) <= 160 and row.cut > 0
        shorter = [talk[0], *talk[1 + 2 * (5 - kept) :]]  # the system's turn, and the last exchanges, whole
        assert ids == labelled(base.tokenizer, SIMPLE, [2], shorter)[0]
    assert shortened(TALK) == [TALK[0], *TALK[4:]] and shortened(TALK[:4]) is None
    # a single exchange that is too long loses its end; where no answer is left anywhere there is nothing to learn
    one = get_task("chat").encode(base, spec | {"max_length": 72}, data.train)
    assert all(len(row.ids) <= 72 for row in one.rows) and max(len(row.ids) for row in one.rows) == 72
    with pytest.raises(DataError, match="no token of the assistant is left"):
        get_task("chat").encode(base, spec | {"max_length": 10}, data.train)


def test_training_generation_and_storing(base: ob.Base, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    rows = [{"messages": [{"role": "user", "content": f"say {c}"}, {"role": "assistant", "content": c * 2}]}
            for c in "abcdefghijklmnopqrstuvwxyz"]  # fmt: skip
    assert base.tokenizer.chat_template is None
    with pytest.raises(ConfigError, match="has no chat template: pass template='chatml'"):
        ob.train(base, rows, "lora(rank=2)", **FAST)
    run = ob.train(base, rows, "lora(rank=4)", name="echo", store=store, template="chatml", lr=1e-2,
                   **FAST | {"epochs": 2})  # fmt: skip
    assert run.kind == "chat" and run.metric == "perplexity" and run.value < run.base_value
    talk = [{"role": "system", "content": "be warm"}, {"role": "user", "content": "say x"}]
    text = base.generate("say x", "echo", max_new_tokens=4)
    assert text == base.generate([talk[1]], "echo", max_new_tokens=4)  # plain text is a turn of the user
    ids = get_task("chat").prompt(base, base.adapters["echo"].task, talk)
    assert base.generate(talk, "echo", max_new_tokens=4) == base.generate([ids], "echo", max_new_tokens=4)
    base.add("other", "lora(rank=2)", seed=4)
    mixed = base.generate(["say x", "free", talk], ["echo", "other", "echo"], max_new_tokens=4)
    assert [mixed[0], mixed[2]] == [text[0], base.generate(talk, "echo", max_new_tokens=4)[0]]
    base.remove("echo")
    base.load("echo", store=store)
    assert base.generate("say x", "echo", max_new_tokens=4) == text
    assert ob.evaluate(base, rows, "echo").adapter.metrics["n"] == 26
    with pytest.raises(ConfigError, match="last message is the assistant's already"):
        base.generate([*talk, {"role": "assistant", "content": "x"}], "echo")
    with pytest.raises(ConfigError, match="no chat template"):
        base.generate(talk)
    with pytest.raises(ConfigError, match="takes text as a prompt"):
        base.generate(talk, "other")
    base.tokenizer.chat_template = SIMPLE  # the plain base of a chat model is asked by its own template
    own = base.tokenizer(base.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    assert base.generate(talk, max_new_tokens=4) == base.generate([own["input_ids"]], max_new_tokens=4)


def test_a_row_stops_at_its_adapters_end_of_turn(base: ob.Base) -> None:
    """Whatever a row writes first is declared its end of turn: then it writes nothing, and its neighbours go on."""
    data = ob.load_data(talks(), task="chat")
    spec = make_task(base, data, template="chatml")
    base.add("free", "lora(rank=2)", task=spec | {"stop": []})
    prompts = ["the river", "old bridge"]
    whole = base.generate(prompts, "free", max_new_tokens=6, return_ids=True)
    stop = whole[0][2:4]
    base.add("stops", "lora(rank=2)", task=spec | {"stop": stop})
    first = next(i for i in range(5) if whole[0][i : i + 2] == stop)
    for beams in (1, 2):
        found = base.generate([prompts[0], *prompts], ["stops", "free", "free"], max_new_tokens=6, return_ids=True,
                              num_beams=beams)  # fmt: skip
        if beams == 1:
            assert found == [whole[0][:first], *whole]
        assert all(found[0][i : i + 2] != stop for i in range(len(found[0])))
    done = RowStop([[5, 6], ()], start=1)
    ids = torch.tensor([[9, 5, 6], [9, 9, 5], [9, 5, 6], [0, 5, 6]])
    assert done(ids, None).tolist() == [True, False, False, False]
    assert RowStop([[5, 6]], start=2)(torch.tensor([[5, 6, 6]]), None).tolist() == [False]  # half of it is the prompt
    assert until([1, 5, 6, 7], {9}, 0, (5, 6)) == [1]


def test_bad_conversations_and_bases(base: ob.Base, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "talks.jsonl"
    bad = [
        {"messages": []},
        {"messages": [{"role": "user", "content": "alone"}]},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]},
        {"messages": "no list"},
    ]
    path.write_text("\n".join(map(json.dumps, [*talks(8), *bad])))
    told = [
        r"line 9, column 'messages': messages that are no list: \[\]; expected \[\{'role'",
        r"line 10, .*no message of the role assistant, so nothing to learn",
        r"line 11, .*message 1: 'robot'; expected system, .*assistant",
        r"line 12, .*message 2 \(assistant\): ' '; expected text",
        r"line 13, .*messages that are not JSON: 'no list'\nNo row was dropped. Correct or remove these",
    ]
    with pytest.raises(DataError, match="(?s)5 problems.*" + ".*".join(told)):
        ob.load_data(path)
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    assert as_messages(json.dumps(shared)) == as_messages(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    )
    data = ob.load_data([{"conversations": [*shared, {"from": "human", "value": str(i)}]} for i in range(20)])
    assert data.kind == "chat"
    with pytest.raises(
        DataError, match=r"(?s)of \d+ conversations cannot be used.*conversation 1 \('be good'\).*turns"
    ):
        many = ob.load_data(talks(12, turns=3))
        encode(base, make_task(base, many, template=FORGETFUL), many)
    with pytest.raises(ConfigError, match="Jinja template that reads messages"):
        make_task(base, data, template="User: {text}")
    with ob.Base(make("t5"), tokenizer, id="t5") as other, pytest.raises(UnsupportedError, match="decoder-only"):
        make_task(other, data, template="chatml")


def test_command_line(base: ob.Base, tmp_path: Path) -> None:
    folder, data, asked = tmp_path / "tiny", tmp_path / "talks.jsonl", tmp_path / "asked.jsonl"
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    data.write_text("\n".join(map(json.dumps, talks())))
    asked.write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"messages": TALK[:2]}))

    def run(*args: str, code: int = 0) -> Any:
        found = CliRunner().invoke(app, [*args, "-b", str(folder)])
        assert found.exit_code == code, found.output
        return found.output if code else found.stdout

    fast = ["--epochs", "1", "--set", "attention=keep", "--set", "train.dtype=float32", "--template", "chatml"]
    assert json.loads(run("train", "-d", str(data), *fast, "--json"))["kind"] == "chat"
    assert "[" not in run("generate", "-a", "talks", "--max-new-tokens", "2", "hello", "--json")[:1]
    found = json.loads(run("generate", "-a", "talks", "--messages", str(asked), "--max-new-tokens", "3", "--json"))
    assert [len(row["prompt"]) for row in found["rows"]] == [7, 2]
    assert base.tokenizer.chat_template is None and "leave out texts" in run(
        "generate", "-a", "talks", "--messages", str(asked), "hello", code=2
    )
    assert "nobody answers" in run("generate", "-a", "talks", "--messages", str(asked), "--max-new-tokens", "2")
    asked.write_text(json.dumps({"messages": TALK[:3]}))
    assert "line 1" in run("generate", "-a", "talks", "--messages", str(asked), code=1)
    assert "perplexity" in run("eval", "talks", "-d", str(data))
    assert "sample 1" in run("train", "-d", str(data), *fast, "--dry-run")


@pytest.mark.skipif(not (SHARED / "models" / "stories260K").is_dir(), reason="the shared models are not here")
@pytest.mark.parametrize("name", ["stories260K", "novels-5m"])
def test_real_tokenizers(name: str) -> None:
    """ChatML in plain tokens on pretrained bases: answers are whole, prompts agree with training, training helps."""
    with ob.load_base(str(SHARED / "models" / name)) as base:
        tokenizer = base.tokenizer
        assert not tokenizer.chat_template and template_of(tokenizer, "chatml") == "chatml"
        stop = end_of_turn(tokenizer, "chatml")
        ids, own = labelled(tokenizer, "chatml", stop, TALK)
        for i in (2, 5):
            before = prompt_of(tokenizer, "chatml", TALK[:i])
            assert ids[: len(before)] == before and own[len(before)] and not own[len(before) - 1]
        answers = [token for token, mine in zip(ids, own) if mine]
        text = tokenizer.decode(answers)
        assert TALK[2]["content"] in text and TALK[5]["content"] in text and "river" not in text
        rows = [{"messages": [{"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": "Yes."}]}
                for i in range(48)]  # fmt: skip
        run = ob.train(base, rows, "lora(rank=4)", template="chatml", **FAST | {"epochs": 12, "lr": 1e-2})
        assert run.value < 0.5 * run.base_value
        if name == "novels-5m":  # the other never saw its end of text, whose frozen embedding it cannot write
            assert base.generate("Question 3", run.name, max_new_tokens=30) == ["Yes."]
        assert all(label == IGNORED for label in encode(base, base.adapters[run.name].task,
                   ob.load_data(rows))["train"].rows[0].labels[:3])  # fmt: skip
