"""`onebase import`, `export` and `merge`, as a person calls them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from families import COMMON, make
from typer.testing import CliRunner

from onebase.cli.main import app

peft = pytest.importorskip("peft", reason="the package peft is not installed (extra 'peft')")


@pytest.fixture
def base_folder(tmp_path, tokenizer) -> Path:
    folder = tmp_path / "tiny-bert"
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(**COMMON)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(folder: Path) -> None:
    """Let PEFT write a classifier on the same backbone."""
    torch.manual_seed(0)
    full = tf.BertForSequenceClassification(tf.BertConfig(**COMMON, num_labels=2))
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(full, config).save_pretrained(str(folder))


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, (done.output, done.stderr)
    return done.stdout


def test_import_show_predict_export(base_folder, tmp_path):
    write(tmp_path / "theirs")
    said = run("import", tmp_path / "theirs", "--name", "mine", "-b", base_folder, "--label", "good,bad")
    assert "mine@1" in said
    assert "unverified" in said
    assert "unverified" in run("ls")
    assert "unverified: imported from a peft file" in run("show", "mine")
    found = json.loads(run("ls", "--json"))["adapters"][0]
    assert found["verified"] is False
    answers = json.loads(run("predict", "-a", "mine", "--json", "a small bird sings", "-b", base_folder))
    assert "good" in json.dumps(answers)
    said = run("export", "mine", "--to", "peft", "--out", tmp_path / "out", "-b", base_folder)
    assert "agreement" in said
    assert "probes, largest difference" in said
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    said = run("merge", "mine", "--out", tmp_path / "full", "-b", base_folder)
    assert "does not hold it" in said
    assert tf.AutoModel.from_pretrained(tmp_path / "full").config.model_type == "bert"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["export", "x", "--to", "gguf", "--out", "o"], 1, "convert_hf_to_gguf.py"),
        (["export", "x", "--to", "pefft", "--out", "o"], 1, "peft"),
        (["export", "x", "--out", "o"], 1, "onebase ls"),
    ],
)
def test_mistakes_end_before_a_base_is_loaded(words, code, message):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == code
    assert message in done.stderr


def test_an_unsupported_file_is_one_message(base_folder, tmp_path):
    write(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps({**config, "bias": "all", "use_magic": 1}))
    done = CliRunner().invoke(app, ["import", str(tmp_path / "theirs"), "-b", str(base_folder)])
    assert done.exit_code == 1
    assert "bias = 'all'" in done.stderr
    assert "use_magic = 1" in done.stderr


@pytest.mark.parametrize(
    "form", [3, {"hidden": 32}, {"hidden": 10**12, "activation": "tanh"}, {"hidden": 8, "activation": ["tanh"]}]
)
def test_a_heads_form_is_checked_before_it_is_built(form):
    from onebase.tasks.spec import spec_problems

    spec = {"kind": "classification", "labels": ["a", "b"], "pooling": "first", "max_length": 60, "template": "",
            "pair": False}  # fmt: skip
    assert not [*spec_problems({**spec, "head": {"hidden": 32, "activation": "tanh"}}, 64)]
    assert any("task head" in problem for problem in spec_problems({**spec, "head": form}, 64))


def test_a_t5_goes_through_the_store(tokenizer, tmp_path):
    """Imported, saved, loaded again in another base: the same answers, and still unverified."""
    from onebase import Base, Store

    config = peft.LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(make("t5"), config).save_pretrained(str(tmp_path / "x"))
    with Base(make("t5"), tokenizer) as base:
        before = base.import_adapter(tmp_path / "x", name="x").tensors()
        base.save("x")
    with Base(make("t5"), tokenizer) as base:
        after = base.load("x")
        assert all(torch.equal(t, before[key]) for key, t in after.tensors().items())
    provenance = Store().resolve("x").config.provenance
    assert provenance["imported"]["format"] == "peft"
    assert provenance["imported"]["unverified"] is True
