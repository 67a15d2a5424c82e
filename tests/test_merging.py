"""Merging: the model alone answers as the attached adapter does, and unmerging gives the original bits back."""

from __future__ import annotations

import copy
from typing import Any

import checks
import pytest
import torch
import transformers as tf
from families import COMMON, FIRST, VOCABULARY, make
from methods import variants

from onebase import Base
from onebase.errors import OnebaseError, UnsupportedError
from onebase.methods import method_names

EQUAL = 1e-5
METHODS = {
    "lora": "lora(rank=3, ranks={'q': 2})",
    "dora": "dora(rank=2)",
    "hira": "hira(rank=2)",
    "ia3": "ia3",
    "vera": "vera(rank=4)",
    "adalora": "adalora(rank=3, target=1)",
    "bitfit": "bitfit",
    "layernorm": "layernorm",
    "union": "lora(rank=2) + ia3 + layernorm",
}
FAMILIES = ("bert", "gpt2", "llama", "t5", "gpt-neox")


def attach(base: Base, method: str) -> None:
    checks.disturb(base.add("a", method).module, 1)


def row(base: Base, name: str | None) -> torch.Tensor:
    ids = torch.randint(FIRST, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(1))[0]
    return checks.call_alone(base, ids, name)


def direct(base: Base) -> torch.Tensor:
    """Call the model without any route."""
    ids = torch.randint(FIRST, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return checks.values(base.model(**checks.inputs(base, ids)))[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_is_attached_and_unmerged_is_the_base(family, method, tokenizer):
    with Base(make(family), tokenizer) as base, torch.no_grad():
        if method == "bitfit" and family in ("llama", "t5"):
            pytest.skip(f"{family} has no biases: refused when added")
        attach(base, METHODS[method])
        before = {key: t.clone() for key, t in base.model.state_dict().items()}
        plain, attached = direct(base), row(base, "a").squeeze(0)
        base.merge("a")
        assert checks.gap(direct(base), attached) <= EQUAL * checks.size(attached)
        assert checks.gap(direct(base), plain) > checks.VISIBLE / 4
        base.unmerge()
        assert torch.equal(direct(base), plain)
        assert all(torch.equal(t, before[key]) for key, t in base.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_original_bits_return_twenty_times(dtype, tokenizer):
    with Base(make("llama").to(dtype), tokenizer) as base:
        for name, method in {"a": "dora(rank=2)", "b": "lora(rank=4) + ia3"}.items():
            checks.disturb(base.add(name, method).module, 2)
        before = {key: t.clone() for key, t in base.model.state_dict().items()}
        fingerprint = base.fingerprint()
        for turn in range(20):
            base.merge("ab"[turn % 2])
            assert any(not torch.equal(t, before[key]) for key, t in base.model.state_dict().items())
            base.unmerge()
            assert all(torch.equal(t, before[key]) for key, t in base.model.state_dict().items())
        assert base.fingerprint() == fingerprint


UNMERGED = {"bottleneck", "loreft", "prefix", "prompt", "tokens", "mam"}  # no changes of weights


@pytest.mark.parametrize("method", method_names())
def test_every_method_that_merges_gives_the_bits_back_twenty_times(method, tokenizer):
    """Each of twenty merges changes weights, answers as the first one did, and leaves no trace."""
    with Base(make("bert"), tokenizer) as base:
        setting = METHODS["union"] if method == "union" else next(iter(variants(method).values()))
        checks.disturb(base.add("a", setting).module, 2)
        before = {key: t.clone() for key, t in base.model.state_dict().items()}
        if method in UNMERGED:
            with pytest.raises(UnsupportedError):
                base.merge("a")
            return
        merged = []
        for _ in range(20):
            base.merge("a")
            merged.append(direct(base))
            base.unmerge()
            assert all(torch.equal(t, before[key]) for key, t in base.model.state_dict().items())
        assert all(torch.equal(merged[0], other) for other in merged[1:])
        assert checks.gap(merged[0], direct(base)) > checks.VISIBLE / 4


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("llama", "prefix(length=2, init='random')", "keys and values of attention"),
        ("llama", "prompt(length=2, init='uniform')", "tokens of the input"),
        ("bert", "bottleneck", "no weight of the base holds"),
        ("bert", "loreft", "no weight of the base holds"),
        ("llama", "lora(rank=2) + prefix(length=2, init='random')", "keys and values"),
        ("llama", "bitfit(create=True)", "adds a bias and Linear at .* has none"),
    ],
)
def test_what_is_no_change_of_weights_is_refused_and_changes_nothing(family, method, words, tokenizer):
    with Base(make(family), tokenizer) as base:
        attach(base, method)
        before = {key: t.clone() for key, t in base.model.state_dict().items()}
        with pytest.raises(UnsupportedError, match=words):
            base.merge("a")
        assert all(torch.equal(t, before[key]) for key, t in base.model.state_dict().items())
        row(base, "a")  # not left in the merged state


def test_a_merged_base_takes_no_routes(tokenizer):
    with Base(make("llama"), tokenizer) as base:
        attach(base, "lora(rank=2)")
        numbers = base.ids(["a"])
        base.merge("a")
        calls: list[Any] = [
            lambda: base.use("a").__enter__(),
            lambda: base.use(None).__enter__(),
            lambda: base.predict("cold river", "a"),
            lambda: base.add("b", "lora"),
            lambda: base.merge("a"),
            lambda: base.remove("a"),
            lambda: base.save("a"),
            lambda: base.model(input_ids=torch.tensor([[5, 6]]), adapter_ids=numbers),
        ]
        for call in calls:
            with pytest.raises(OnebaseError, match="is merged into this base"):
                call()
        base.unmerge()
        with pytest.raises(OnebaseError, match="no adapter is merged"):
            base.unmerge()
        base.remove("a")


def test_closing_gives_the_bits_back(tokenizer):
    model = make("bert")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    base = Base(model, tokenizer)
    attach(base, "lora(rank=2)")
    base.merge("a")
    base.close()
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("method", ["lora", "dora", "hira", "ia3", "vera"])
def test_a_merged_folder_is_a_plain_model(method, tokenizer, tmp_path):
    with Base(make("llama"), tokenizer) as base:
        attach(base, METHODS[method])
        done = base.export("a", tmp_path / "model", to="merged")
        assert done.gap <= EQUAL * max(1.0, done.size)
        attached = row(base, "a").squeeze(0)
        ids = torch.randint(FIRST, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(1))
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert checks.gap(plain(input_ids=ids).logits[0], attached) <= EQUAL * checks.size(attached)
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "model")("river").input_ids == tokenizer("river").input_ids


def test_vllm_gets_one_rank_and_one_scale(tokenizer, tmp_path):
    import json

    from safetensors.torch import load_file

    with Base(make("llama"), tokenizer) as base:
        attach(base, "lora(rank=3, ranks={'q': 2}, alphas={'v': 5.0}, rslora=True)")
        done = base.export("a", tmp_path / "out", to="vllm")
        assert done.gap <= EQUAL * max(1.0, done.size)
        assert any("--max-lora-rank 8" in note for note in done.notes)
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (3, 3, {}, {})
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert {len(t) for key, t in tensors.items() if "lora_A" in key} == {3}
        checks.disturb(base.add("dora", "dora(rank=2)").module, 1)
        checks.disturb(base.add("ia3", "ia3").module, 1)
        for name, words in {"dora": "reads no DoRA", "ia3": "LoRA only"}.items():
            with pytest.raises(UnsupportedError, match=words):
                base.export(name, tmp_path / name, to="vllm")
            assert not (tmp_path / name).exists()
    with Base(make("gpt2"), tokenizer) as base:
        attach(base, "lora(rank=2)")
        with pytest.raises(UnsupportedError, match="known here to serve LoRA"):
            base.export("a", tmp_path / "gpt2", to="vllm")


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_converters_of_full_models_are_named(kind, tokenizer, tmp_path):
    with Base(make("llama"), tokenizer) as base:
        attach(base, "lora(rank=2)")
        with pytest.raises(UnsupportedError, match="pip install"):
            base.export("a", tmp_path / "out", to=kind)


def test_a_head_is_not_part_of_a_merged_model(tokenizer, tmp_path):
    task = {"kind": "classification", "labels": ["x", "y"], "pooling": "mean", "max_length": 60, "template": "",
            "pair": False}  # fmt: skip
    with Base(tf.BertModel(tf.BertConfig(**COMMON)).eval(), copy.deepcopy(tokenizer)) as base:
        checks.disturb(base.add("a", "lora(rank=2)", task=task).module, 1)
        done = base.export("a", tmp_path / "out", to="merged")
        assert any("does not hold it" in note for note in done.notes)
