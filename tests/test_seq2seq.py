"""Sequence to sequence: targets on encoder-decoders and decoders, cutting, what is written, the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TEXTS, make
from torch.nn import functional as F
from typer.testing import CliRunner

import onebase as ob
from onebase.cli.main import app
from onebase.encode import IGNORED
from onebase.errors import ConfigError, DataError, RouteError
from onebase.examples import encode, forward
from onebase.store import Store
from onebase.tasks.seq2seq import source_of, target_ids
from onebase.tasks.written import chrf, exact_match
from onebase.training.prepare import make_task

FAST: dict[str, Any] = {"epochs": 1, "batch_size": 8, "seed": 0, "attention": "keep", "dtype": "float32"}
WORDS = list(dict.fromkeys(" ".join(TEXTS).split()))


def pairs(count: int = 24, length: int = 4) -> list[dict[str, str]]:
    """Return sources and targets that are the source's words in reverse."""
    made = []
    for i in range(count):
        words = [WORDS[(i * 5 + j * (i % 3 + 1)) % len(WORDS)] for j in range(length + i % 3)]
        made.append({"source": " ".join(words), "target": " ".join(reversed(words))})
    return made


@pytest.fixture(params=["t5", "llama"])
def base(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    with ob.Base(make(request.param), tokenizer, id="tiny") as found:
        yield found


def test_the_loss_is_that_of_the_target_and_its_end(base: ob.Base) -> None:
    data = ob.load_data(pairs(), task="seq2seq")
    spec = make_task(base, data)
    examples = encode(base, spec, data)["train"]
    base.add("a", "lora(rank=2)", task=spec)
    part = forward(base, "a", examples, [0, 3, 1])
    tokenizer = base.tokenizer
    for row, i in enumerate([0, 3, 1]):
        source, target = data.train["source"][i], data.train["target"][i]
        wanted = [*tokenizer(target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad(), base.use("a"):
            if base.is_encoder_decoder:
                ids = tokenizer(source, return_tensors="pt")["input_ids"]
                expected = base.model(input_ids=ids, labels=torch.tensor([wanted])).loss * len(wanted)
            else:
                head = tokenizer(source + "\n")["input_ids"]
                logits = base.model(input_ids=torch.tensor([head + wanted])).logits[0, len(head) - 1 : -1]
                expected = F.cross_entropy(logits, torch.tensor(wanted), reduction="sum")
        assert part.sums.tolist()[row] == pytest.approx(float(expected), abs=1e-4)
        assert int(part.counts[row]) == len(wanted)


def test_training_stores_and_loads_and_rows_mix(base: ob.Base, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    run = ob.train(base, pairs(), "lora(rank=2)", task="seq2seq", name="reverse", store=store, generate=3, **FAST)
    assert run.kind == "seq2seq" and run.metric == "perplexity" and run.test is not None
    assert run.metrics["generated"] == run.base_metrics["generated"] == run.metrics["n"] == 2  # test has two rows
    assert 0 <= run.metrics["exact_match"] <= 1 and 0 <= run.metrics["chrf"] <= 100
    assert run.metrics["perplexity"] == pytest.approx(math.exp(run.metrics["loss"]))
    base.add("other", "bottleneck", seed=3)
    prompts = ["the cold river", "a small bird sings", "old bridge"]
    alone = [base.generate(p, "reverse", max_new_tokens=5)[0] for p in prompts]
    mixed = base.generate([prompts[0], "the rain", *prompts[1:]], ["reverse", "other", "reverse", "reverse"],
                          max_new_tokens=5)  # fmt: skip
    assert [mixed[0], *mixed[2:]] == alone
    base.remove("reverse")
    base.load("reverse", store=store)
    assert [base.generate(p, "reverse", max_new_tokens=5)[0] for p in prompts] == alone
    again = ob.evaluate(base, pairs(), "reverse", generate=2)
    assert again.rows == 24 and again.base is not None and again.adapter.metrics["generated"] == 2
    assert "chrf" in again.base.metrics and "chrf" not in ob.evaluate(base, pairs(), "reverse", generate=0).base.metrics
    with pytest.raises(ob.errors.UnsupportedError, match="writes text"):
        base.predict(["x"], "reverse")


def test_what_is_written_is_measured_exactly(base: ob.Base) -> None:
    """The plain base is asked for its own texts: then every one is an exact match."""
    data = ob.load_data(pairs(), task="seq2seq")
    spec = make_task(base, data, generate=4)
    examples = encode(base, spec, data)["train"]
    base.add("a", "lora(rank=2)", task=spec)
    prompts = [list(row.ids) if base.is_encoder_decoder else source_of(row) for row in examples.rows[:4]]
    longest = max(sum(label != IGNORED for label in row.labels or ()) for row in examples.rows[:4])
    written = [base.generate([p], "a", max_new_tokens=longest)[0] for p in prompts]
    examples.facts["targets"] = tuple(written)
    from onebase.tasks import get_task

    found = get_task("seq2seq").extras(base, spec, "a", examples, 4)
    assert found == {"generated": 4, "exact_match": 1.0, "chrf": pytest.approx(100.0)}
    # the prompt of a source is what training saw before the target
    if not base.is_encoder_decoder:
        assert get_task("seq2seq").prompt(base, spec, data.train["source"][0]) == prompts[0]


def test_templates_and_cutting(base: ob.Base) -> None:
    rows = pairs(length=30)
    data = ob.load_data(rows, task="seq2seq")
    template = "the {source} down" if base.is_encoder_decoder else "the {source} down {target}"
    spec = make_task(base, data, template=template, max_length=24)
    examples = encode(base, spec, data)["train"]
    assert examples.cut == len(examples)
    tokenizer = base.tokenizer
    first, last = (tokenizer(word)["input_ids"][0] for word in ("the", "down"))
    for row in examples.rows:
        source = list(row.ids) if base.is_encoder_decoder else source_of(row)
        assert source[0] == first and source[-1] == last and 12 <= len(source) <= 24  # the template stays whole
        assert len(row.ids) <= 24 and len(row.labels or ()) <= 24 and row.cut > 0
    with pytest.raises(ConfigError, match="one \\{source\\}, and after it one"):
        make_task(base, data, template="{target} {source}")
    with pytest.raises(ConfigError, match="expected places"):
        make_task(base, data, template="only {target}")
    with pytest.raises(ConfigError, match="generate = -1"):
        make_task(base, data, generate=-1)
    long = make_task(base, data, template="cold " * 30 + template, max_length=24)
    with pytest.raises(ConfigError, match="alone needs"):
        encode(base, long, data)


def test_a_tokenizer_that_ends_texts_itself_ends_them_once(tokenizer: Any) -> None:
    import copy

    from tokenizers.processors import TemplateProcessing

    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    with ob.Base(make("t5"), own, id="tiny") as base:
        assert target_ids(base, "the river") == own("the river")["input_ids"]
        assert target_ids(base, "the river").count(2) == 1
        spec = make_task(base, ob.load_data(pairs(length=30), task="seq2seq"), max_length=16)
        row = encode(base, spec, ob.load_data(pairs(length=30), task="seq2seq"))["train"].rows[0]
        assert len(row.ids) == 16 and row.ids[-1] == 2  # a source that is cut still ends


def test_chrf_by_hand() -> None:
    # unigrams: 2 of 3 and 2 of 2; bigrams: 1 of 2 and 1 of 1; no longer n-gram is wanted
    precision, recall = (2 / 3 + 1 / 2) / 2, 1.0
    assert chrf(["a b c"], ["ab"]) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))
    assert chrf(["same text", "x"], ["same text", "x"]) == pytest.approx(100) and chrf(["abc"], ["xyz"]) == 0
    assert chrf([""], ["x"]) == 0 and exact_match([" a ", "b"], ["a", "c"]) == 0.5


def test_bad_data(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    rows = [*pairs(8), {"source": "", "target": "x"}, {"source": "y", "target": None}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"(?s)empty source.*line 9.*line 10"):
        ob.load_data(path, task="seq2seq")
    found = ob.load_data([{"de": r["source"], "fr": r["target"]} for r in pairs()], source="de", target="fr")
    assert found.kind == "seq2seq" and found.columns == {"source": "de", "target": "fr"}
    with pytest.raises(ob.errors.UnknownNameError, match=r"unknown option or role of load_data 'sauce'.*'source'"):
        ob.load_data(pairs(), sauce="source")


def test_a_conversation_is_no_prompt_here(base: ob.Base) -> None:
    base.add("a", "lora(rank=2)", task=make_task(base, ob.load_data(pairs(), task="seq2seq")))
    with pytest.raises(ConfigError, match="takes text as a prompt"):
        base.generate([{"role": "user", "content": "x"}], "a")
    with pytest.raises(RouteError):
        base.generate(["x", "y"], ["a"])


def test_command_line(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "tiny"
    make("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, pairs())))

    def run(*args: str) -> Any:
        found = CliRunner().invoke(app, [*args, "--json"])
        assert found.exit_code == 0, found.output
        return json.loads(found.stdout)

    made = run("train", "-d", str(data), "-b", str(folder), "--task", "seq2seq", "--epochs", "1", "--set", "generate=2",
               "--set", "attention=keep", "--set", "train.dtype=float32")  # fmt: skip
    assert made["kind"] == "seq2seq" and made["adapter_score"]["metrics"]["generated"] == 2
    scored = run("eval", "pairs", "-d", str(data), "-b", str(folder), "--generate", "3")
    assert scored["adapter_score"]["metrics"]["generated"] == 3 and scored["base_score"]["metrics"]["chrf"] >= 0
    texts = run("generate", "-a", "pairs", "-b", str(folder), "--max-new-tokens", "3", "the river")
    assert isinstance(texts["rows"][0]["texts"]["pairs"][0], str)
    shown = CliRunner().invoke(app, ["eval", "pairs", "-d", str(data), "-b", str(folder), "--generate", "3"])
    assert shown.exit_code == 0 and "chrF" in shown.stdout and "on the first 3 rows" in shown.stdout
    card = (Store().resolve("pairs").path / "README.md").read_text()
    assert "pipeline_tag: text-generation" in card and 'base.generate(["some text"]' in card
    plan = run("train", "-d", str(data), "-b", str(folder), "--task", "seq2seq", "--dry-run")
    assert plan["samples"][0]["tokens"] > 0


def test_columns_of_any_role_at_the_command_line(tmp_path: Path, tokenizer: Any) -> None:
    folder, data, flags = tmp_path / "tiny", tmp_path / "pairs.jsonl", tmp_path / "flags.jsonl"
    make("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data.write_text("\n".join(json.dumps({"de": row["source"], "fr": row["target"]}) for row in pairs()))
    flags.write_text("\n".join(json.dumps({"text": f"the {i}", "x": i % 2, "y": int(i % 3 == 0)}) for i in range(30)))

    def plan(path: Path, *args: str, code: int = 0) -> Any:
        found = CliRunner().invoke(app, ["train", "-d", str(path), "-b", str(folder), "--dry-run", "--json", *args])
        assert found.exit_code == code, found.output
        return found.output if code else json.loads(found.stdout)["data"]

    for args in (["--column", "source=de", "--column", "target=fr"], ["--set", "source=de", "--set", "target=fr"]):
        found = plan(data, *args)
        assert found["kind"] == "seq2seq" and found["columns"] == {"source": "de", "target": "fr"}
    assert plan(flags, "--column", "labels=x", "--column", "labels=y")["columns"]["labels"] == "x, y"
    twice = plan(data, "--column", "source=de", "--column", "source=fr", code=2)
    assert "--column source is given twice: 'de' and 'fr'" in twice
    assert "by --text and by --column" in plan(flags, "--text", "text", "--column", "text=x", code=2)
