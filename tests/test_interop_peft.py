"""PEFT's files, both ways: what PeftModel computes is what an imported adapter computes, and the reverse."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checks
import pytest
import torch
import transformers as tf
from checks import with_cache
from families import CASES as FAMILY_CASES
from families import COMMON, FIRST, PRESENT, T5, VOCABULARY
from safetensors.torch import load_file, save_file
from torch import nn

from onebase import Base, parse_method
from onebase.errors import ConfigError, CorruptError, MismatchError, UnsupportedError

peft = pytest.importorskip("peft", reason="the package peft is not installed (extra 'peft')")

EQUAL = 1e-5  # largest difference of a logit in float32, relative to the largest where that is above 1
VISIBLE = 1e-3  # an adapter that changes no logit by this much is not tested


@dataclass(frozen=True)
class Case:
    """One round trip.

    Attributes:
        model: builds the tiny model.
        config: PEFT's settings for it.
        method: name of what it becomes here.
        virtual: columns that PEFT's output has before those of the text.
        slow: not in the default run.
        exact: the way back is possible too.
    """

    model: str
    config: Any
    method: str
    virtual: int = 0
    slow: bool = False
    exact: bool = True
    kwargs: dict[str, Any] = field(default_factory=dict)


def bert() -> nn.Module:
    return tf.BertModel(tf.BertConfig(**COMMON))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "bert-mlm": lambda: tf.BertForMaskedLM(tf.BertConfig(**COMMON)),
    "roberta": PRESENT["roberta"].build,
    "gpt2": PRESENT["gpt2"].build,
    "llama": PRESENT["llama"].build,
    "llama-bare": lambda: tf.LlamaModel(tf.LlamaConfig(**COMMON, num_key_value_heads=2)),
    "gemma3": PRESENT["gemma3"].build,
    "t5": PRESENT["t5"].build,
    "t5-gated": PRESENT["t5-gated"].build,
    "t5-encoder": lambda: tf.T5Model(tf.T5Config(**T5)),
}
CLM, S2S = {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_2_SEQ_LM"}
CONV = {"fan_in_fan_out": True, **CLM}


def lora(r: int = 4, **more: Any) -> Any:
    return peft.LoraConfig(r=r, **more)


def cases() -> dict[str, Case]:
    ia3, vera, norms = peft.IA3Config, peft.VeraConfig, peft.LNTuningConfig
    prompt, encoder, prefix = peft.PromptTuningConfig, peft.PromptEncoderConfig, peft.PrefixTuningConfig
    two = ["query", "value"]
    return {
        "bert lora": Case("bert", lora(target_modules=two), "lora"),
        "bert lora patterns": Case(
            "bert",
            lora(target_modules=[*two, "output.dense"], rank_pattern={"layer.0.attention.self.query": 2},
                 alpha_pattern={"value": 3}),
            "lora",
        ),
        "bert-mlm rslora": Case("bert-mlm", lora(target_modules=two, use_rslora=True, lora_alpha=7), "lora"),
        "bert dora": Case("bert", lora(target_modules=["query", "intermediate.dense"], use_dora=True), "dora"),
        "bert one layer": Case("bert", lora(target_modules=two, layers_to_transform=[1]), "lora", slow=True),
        "bert excluded": Case(
            "bert", lora(target_modules=two, exclude_modules=["encoder.layer.0.attention.self.query"]), "lora"
        ),
        "roberta regex": Case("roberta", lora(target_modules=r".*attention\.self\.(query|key)"), "lora", slow=True),
        "gpt2 lora": Case("gpt2", lora(target_modules=["c_attn"], **CONV), "lora"),
        "gpt2 lora all": Case("gpt2", lora(target_modules="all-linear", **CONV), "lora"),
        "gpt2 dora": Case("gpt2", lora(target_modules=["c_attn", "c_fc"], use_dora=True, **CONV), "dora"),
        "llama lora all": Case("llama", lora(target_modules="all-linear", **CLM), "lora"),
        "llama regex dora": Case("llama", lora(target_modules=r".*\.(q|k)_proj", use_dora=True, **CLM), "dora"),
        "llama-bare lora": Case("llama-bare", lora(target_modules=["q_proj"]), "lora", slow=True),
        "llama dropout": Case("llama", lora(target_modules=["o_proj"], lora_dropout=0.5, **CLM), "lora", slow=True),
        "t5 lora": Case("t5", lora(target_modules=["q", "v"], **S2S), "lora"),
        "t5-gated lora": Case("t5-gated", lora(target_modules=["wi_0", "wi_1", "wo"], **S2S), "lora", slow=True),
        "bert ia3": Case("bert", ia3(target_modules=["key", "value", "intermediate.dense", "output.dense"],
                                     feedforward_modules=["output.dense"]), "ia3"),
        "gpt2 ia3": Case("gpt2", ia3(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"],
                                     **CONV), "ia3"),
        "llama ia3": Case("llama", ia3(target_modules=["k_proj", "v_proj", "down_proj"],
                                       feedforward_modules=["down_proj"], **CLM), "ia3"),
        "t5 dora": Case("t5", lora(target_modules=["q", "wi", "wo"], use_dora=True, **S2S), "dora"),
        "t5 vera": Case("t5", vera(r=8, target_modules=["q", "v"], **S2S), "vera"),
        "t5 norms": Case("t5", norms(target_modules=["layer_norm"], exclude_modules=[r"final_layer_norm"], **S2S),
                         "layernorm"),
        "t5 p-tuning": Case("t5", encoder(num_virtual_tokens=4, encoder_hidden_size=16, **S2S), "prompt"),
        "t5 ia3": Case("t5", ia3(target_modules=["k", "v", "wo"], feedforward_modules=["wo"], **S2S), "ia3"),
        "bert vera": Case("bert", vera(r=8, target_modules=two), "vera"),
        "bert vera drawn": Case(
            "bert", vera(r=8, target_modules=["query", "intermediate.dense"], save_projection=False), "vera"
        ),
        "gpt2 vera": Case("gpt2", vera(r=8, target_modules=["c_attn"], **CONV), "lora"),
        "llama vera": Case("llama", vera(r=8, target_modules=["q_proj", "down_proj"], **CLM), "vera"),
        "bert norms": Case("bert", norms(target_modules=["attention.output.LayerNorm"]), "layernorm"),
        "gpt2 norms": Case("gpt2", norms(target_modules=["ln_1", "ln_2"], **CLM), "layernorm"),
        "llama norms": Case("llama", norms(target_modules=["input_layernorm", "post_attention_layernorm"], **CLM),
                            "layernorm"),
        "gpt2 prompt": Case("gpt2", prompt(num_virtual_tokens=5, **CLM), "prompt", virtual=5),
        "llama prompt": Case("llama", prompt(num_virtual_tokens=5, **CLM), "prompt", virtual=5),
        "bert prompt": Case("bert", prompt(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"), "prompt", virtual=3),
        "t5 prompt": Case("t5", prompt(num_virtual_tokens=5, **S2S), "prompt"),
        "llama p-tuning": Case(
            "llama", encoder(num_virtual_tokens=5, encoder_hidden_size=16, **CLM), "prompt", virtual=5
        ),
        "gpt2 prefix": Case("gpt2", prefix(num_virtual_tokens=5, **CLM), "prefix"),
        "llama prefix": Case(
            "llama", prefix(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=16, **CLM), "prefix"
        ),
        "gemma3 prefix slides": Case("gemma3", prefix(num_virtual_tokens=3, **CLM), "prefix"),
        "bert prefix": Case("bert", prefix(num_virtual_tokens=5, task_type="FEATURE_EXTRACTION"), "prefix"),
    }  # fmt: skip


with warnings.catch_warnings():  # PEFT warns that it leaves VeRA's matrices out, which is what is tested
    warnings.simplefilter("ignore")
    CASES = cases()
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if case.slow else []) for name, case in CASES.items()]


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """PEFT warns of much that these tests do on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def write(model: nn.Module, config: Any, folder: Path, seed: int = 1) -> None:
    """Let PEFT write a file whose every value is disturbed."""
    wrapped = quietly(peft.get_peft_model, copy.deepcopy(model), copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    quietly(wrapped.save_pretrained, str(folder))


def text(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(FIRST, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | ({"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {})  # type: ignore[union-attr]


def values(output: Any) -> torch.Tensor:
    return output.logits if "logits" in output else output.last_hidden_state


def of_peft(model: nn.Module, folder: Path, virtual: int) -> torch.Tensor:
    loaded = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(model), str(folder)).eval()
    with torch.no_grad():
        return values(quietly(loaded, **text(model)))[:, virtual:]


def ours(base: Base, name: str | None) -> torch.Tensor:
    with torch.no_grad(), base.use(name):
        return values(base.model(**text(base.model)))


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) / max(1.0, float(one.abs().max()))


def test_enough_shapes_go_round():
    """The families that people have most adapters of are here with most methods."""
    of = {family: sum(case.model.startswith(family) for case in CASES.values()) for family in ("bert", "gpt2", "llama",
                                                                                               "t5")}  # fmt: skip
    assert sum(of.values()) >= 30 and min(of.values()) >= 8


@pytest.mark.parametrize("name", NAMES)
def test_a_round_trip_keeps_the_logits(name, tmp_path):
    """PEFT writes, onebase computes the same; onebase writes, PEFT computes the same."""
    case, model = CASES[name], make(CASES[name].model)
    write(model, case.config, tmp_path / "theirs")
    expected = of_peft(model, tmp_path / "theirs", case.virtual)
    with Base(copy.deepcopy(model)) as base:
        adapter = base.import_adapter(tmp_path / "theirs", name="a")
        assert adapter.method.name == case.method
        assert gap(expected, ours(base, None)) > VISIBLE
        assert gap(expected, ours(base, "a")) <= EQUAL
        written = base.export("a", tmp_path / "ours")
        assert written.gap <= EQUAL * max(1.0, written.size)
        assert list(base.adapters) == ["a"]
        assert gap(of_peft(model, tmp_path / "ours", case.virtual), expected) <= EQUAL
        again = base.import_adapter(tmp_path / "ours", name="b")
        assert gap(ours(base, "b"), expected) <= EQUAL
        assert again.method.name == case.method


def headed_logits(loaded: Any, full: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return PEFT's logits; its own call of prefixes on classifiers does not know transformers' name for the cache."""
    if loaded.active_peft_config.peft_type != "PREFIX_TUNING":
        return quietly(loaded, **batch).logits
    mask = torch.ones(2, batch["input_ids"].shape[1] + loaded.active_peft_config.num_virtual_tokens)
    inner = loaded.base_model
    cache = with_cache(inner.base_model, loaded.get_prompt(2))
    states = inner.base_model(batch["input_ids"], attention_mask=mask, **cache)
    if hasattr(inner, "score"):
        return inner.score(states.last_hidden_state[:, -1])
    return inner.classifier(states.pooler_output)


@pytest.mark.parametrize(
    ("family", "headed", "config"),
    [
        ("bert", tf.BertForSequenceClassification, lora(target_modules=["query", "value"], task_type="SEQ_CLS")),
        ("roberta", tf.RobertaForSequenceClassification, lora(target_modules=["query"], task_type="SEQ_CLS")),
        ("gpt2", tf.GPT2ForSequenceClassification, lora(target_modules=["c_attn"], fan_in_fan_out=True,
                                                        task_type="SEQ_CLS")),
        ("llama", tf.LlamaForSequenceClassification, lora(target_modules=["q_proj"], task_type="SEQ_CLS")),
        ("bert", tf.BertForSequenceClassification, peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")),
        ("gpt2", tf.GPT2ForSequenceClassification, peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")),
    ],
    ids=["bert", "roberta", "gpt2", "llama", "bert prefix", "gpt2 prefix"],
)  # fmt: skip
def test_heads_travel_both_ways(family, headed, config, tmp_path):
    """The classifier of a headed class becomes a head on the bare base, with labels, and goes back."""
    torch.manual_seed(0)
    settings = copy.deepcopy(make(family).config)
    settings.num_labels = 3
    full = headed(settings).eval()
    bare = copy.deepcopy(full.base_model)
    write(full, config, tmp_path / "theirs")
    loaded = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(full), str(tmp_path / "theirs")).eval()
    batch = text(full)
    with torch.no_grad():
        expected = headed_logits(loaded, full, batch)
    with Base(bare) as base:
        adapter = base.import_adapter(tmp_path / "theirs", name="a", labels=["x", "y", "z"])
        assert adapter.labels == ("x", "y", "z")
        with torch.no_grad():
            assert gap(expected, torch.stack(base.outputs(batch, ["a", "a"]))) <= EQUAL
        base.export("a", tmp_path / "ours")
    back = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(full), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert gap(expected, headed_logits(back, full, batch)) <= EQUAL


def test_a_pooler_that_the_base_lacks_comes_from_its_checkpoint(tmp_path, tokenizer):
    """A base with a head for masked tokens has no pooler; the classifier of the file reads the checkpoint's."""
    torch.manual_seed(0)
    tf.BertForPreTraining(tf.BertConfig(**COMMON)).save_pretrained(tmp_path / "base")
    full = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3).eval()
    write(full, lora(target_modules=["query"], task_type="SEQ_CLS"), tmp_path / "theirs")
    loaded = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(full), str(tmp_path / "theirs")).eval()
    batch = text(full)
    with torch.no_grad():
        expected = quietly(loaded, **batch).logits
    with Base(tf.BertForMaskedLM.from_pretrained(tmp_path / "base").eval()) as base, torch.no_grad():
        base.import_adapter(tmp_path / "theirs", name="a")
        assert gap(expected, torch.stack(base.outputs(batch, ["a", "a"]))) <= EQUAL
    with Base(make("bert-mlm")) as base, pytest.raises(UnsupportedError, match="reads the pooler"):
        base.import_adapter(tmp_path / "theirs")


def test_a_changed_pooler_is_folded_into_the_head(tmp_path):
    torch.manual_seed(0)
    full = tf.BertForSequenceClassification(tf.BertConfig(**COMMON, num_labels=3)).eval()
    write(full, lora(target_modules="all-linear", task_type="SEQ_CLS"), tmp_path / "theirs")
    loaded = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(full), str(tmp_path / "theirs")).eval()
    with torch.no_grad():
        expected = quietly(loaded, **text(full)).logits
    with Base(copy.deepcopy(full.bert)) as base, torch.no_grad():
        base.import_adapter(tmp_path / "theirs", name="a")
        assert gap(expected, torch.stack(base.outputs(text(full), ["a", "a"]))) <= EQUAL
        base.export("a", tmp_path / "ours")
    back = quietly(peft.PeftModel.from_pretrained, copy.deepcopy(full), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert gap(expected, quietly(back, **text(full)).logits) <= EQUAL


def test_a_prefix_that_leaves_positions_is_turned_for_rotary_bases(tmp_path):
    """PEFT moves texts by P; keys that are moved by P as well are read as before."""
    model = make("llama")
    with Base(copy.deepcopy(model)) as base:
        torch.manual_seed(3)
        base.add("a", "prefix(length=4, init='random', init_std=1.0)")
        expected = ours(base, "a")
        assert base.export("a", tmp_path / "out").gap <= EQUAL
    assert gap(of_peft(model, tmp_path / "out", 0), expected) <= EQUAL


def test_a_scale_of_shared_values_has_no_place(tmp_path):
    """Llama's values serve several heads, so a scale of what enters the output map is no scale of values."""
    config = peft.IA3Config(target_modules=["v_proj", "o_proj"], feedforward_modules=["o_proj"], **CLM)
    write(make("llama"), config, tmp_path / "x")
    with Base(make("llama")) as base, pytest.raises(MismatchError, match="what values of single heads give"):
        base.import_adapter(tmp_path / "x")


def test_an_attention_outputs_scale_becomes_one_of_values(tmp_path):
    model = make("bert")
    config = peft.IA3Config(target_modules=["value", "output.dense"], feedforward_modules=["output.dense"])
    write(model, config, tmp_path / "x")
    with Base(copy.deepcopy(model)) as base:
        adapter = base.import_adapter(tmp_path / "x", name="a")
        assert gap(of_peft(model, tmp_path / "x", 0), ours(base, "a")) <= EQUAL
        assert "scale of the values" in adapter.config["provenance"]["notes"][0]


def test_a_missing_folder_is_looked_up_and_explained():
    with Base(make("bert")) as base, pytest.raises(ConfigError, match="is no folder, and the hub answered"):
        base.import_adapter("nobody/nothing-at-all")


def test_a_standardised_head_is_folded(tmp_path):
    """A head that centres and scales its input is written as the plain map that computes the same."""
    from onebase.store.interop.peft_head import plain_linear

    torch.manual_seed(0)
    with Base(make("roberta")) as base:
        task = {"kind": "classification", "labels": ["a", "b"], "pooling": "first", "max_length": 60, "template": "",
                "pair": False, "head": {"hidden": 32, "activation": "tanh"}}  # fmt: skip
        adapter = base.add("a", "lora(rank=2)", task=task)
        head: Any = adapter.head
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += torch.randn(parameter.shape) * 0.2
            head.center.copy_(torch.randn(32))
            head.scale.copy_(torch.rand(32) + 0.5)
        weight, bias = plain_linear(head)
        hidden = torch.randn(5, 32)
        expected = nn.functional.linear((hidden - head.center) * head.scale, head.weight, head.bias).detach()
        assert gap(expected, nn.functional.linear(hidden, weight, bias)) <= EQUAL
        assert base.export("a", tmp_path / "out").gap <= EQUAL


def tampered(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Path:
    """Rewrite a PEFT folder after changing its settings and tensors."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


KEY = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
FAULTS: dict[str, tuple[Any, type[Exception], str]] = {
    "new setting": (lambda c, t: c.update(use_magic=True), UnsupportedError, "use_magic = True"),
    "biases": (lambda c, t: c.update(bias="all"), UnsupportedError, "bias = 'all'"),
    "pissa": (lambda c, t: c.update(init_lora_weights="pissa"), UnsupportedError, "changes the base's own weights"),
    "other method": (lambda c, t: c.update(peft_type="NOSUCH"), UnsupportedError, "peft_type 'NOSUCH'"),
    "activated": (lambda c, t: c.update(alora_invocation_tokens=[1]), UnsupportedError, "alora_invocation_tokens"),
    "nan": (lambda c, t: t[KEY].fill_(float("nan")), CorruptError, "NaN or infinite"),
    "missing": (lambda c, t: t.pop(KEY), MismatchError, "missing tensor base_model.model.encoder.layer.0"),
    "extra": (lambda c, t: t.update({KEY + ".x": torch.ones(1)}), MismatchError, r"weight\.x"),
    "module": (
        lambda c, t: t.update({KEY.replace("layer.0", "layer.9"): t[KEY].clone()}), MismatchError, "no module 'enc.*9",
    ),
    "shape": (lambda c, t: t.update({KEY: t[KEY][:, :-1]}), MismatchError, r"\(4, 31\), this base needs \(4, 32\)"),
    "rank": (lambda c, t: c.update(r=3), MismatchError, r"this base needs \(3, 32\)"),
    "target": (lambda c, t: c.update(target_modules=["query", "key", "value"]), MismatchError, "which has no tensors"),
    "no target": (lambda c, t: c.update(target_modules=["value"]), MismatchError, "does not name"),
    "head": (
        lambda c, t: t.update({"base_model.model.classifier.weight": torch.ones(2, 32)}), MismatchError, "classifier.w",
    ),
    "embeddings": (
        lambda c, t: t.update({"base_model.model.embeddings.word_embeddings.lora_embedding_A": torch.ones(4, 64)}),
        MismatchError, "lora_embedding_A",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_carried_is_an_error_that_names_it(fault, tmp_path):
    change, error, words = FAULTS[fault]
    model = make("bert")
    write(model, lora(target_modules=["query", "value"]), tmp_path / "x")
    tampered(tmp_path / "x", change)
    with Base(model) as base:
        with pytest.raises(error, match=words):
            base.import_adapter(tmp_path / "x")
        assert not base.adapters


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path):
    model = make("bert")
    write(model, lora(target_modules=["query"]), tmp_path / "x")
    torch.save(load_file(tmp_path / "x" / "adapter_model.safetensors"), tmp_path / "x" / "adapter_model.bin")
    (tmp_path / "x" / "adapter_model.safetensors").unlink()
    with Base(model) as base, pytest.raises(UnsupportedError, match=r"python -m onebase\.store\.interop\.pickle"):
        base.import_adapter(tmp_path / "x")


def test_another_bases_file_is_refused(tmp_path):
    write(make("llama"), lora(target_modules=["q_proj"], **CLM), tmp_path / "x")
    with Base(make("bert")) as base, pytest.raises(MismatchError, match="this base has no module"):
        base.import_adapter(tmp_path / "x")


def test_norms_outside_of_layers_are_refused_unless_unchanged(tmp_path):
    model = make("llama")
    write(model, peft.LNTuningConfig(target_modules=["input_layernorm", "norm"], **CLM), tmp_path / "x")
    with Base(model) as base:
        with pytest.raises(MismatchError, match=r"model\.norm: onebase adapts the norms of layers"):
            base.import_adapter(tmp_path / "x")
        key = "base_model.model.model.norm.ln_tuning_layers.weight"
        tampered(tmp_path / "x", lambda c, t: t.update({key: model.model.norm.weight.detach().clone()}))
        base.import_adapter(tmp_path / "x")


@pytest.mark.parametrize(
    ("family", "method", "words"),
    [
        ("bert", "bottleneck", "PEFT has no form"),
        ("bert", "bitfit", "PEFT has no form"),
        ("llama", "hira(rank=2)", "PEFT has no form"),
        ("bert", "lora(rank=2) + bitfit", "PEFT has no form"),
        ("gpt2", "prefix(length=2, init='random')", "positions='follow'"),
        ("t5", "prefix(length=2, init='random')", "relative positions"),
    ],
)
def test_what_has_no_form_in_peft_is_refused(family, method, words, tmp_path):
    with Base(make(family)) as base:
        base.add("a", method)
        with pytest.raises(UnsupportedError, match=words):
            base.export("a", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["lora(rank=3)", "dora(rank=2)", "adalora(rank=3, target=1)", "vera(rank=4)",
                                    "lora(rank=2, sites='q') + lora(rank=3, sites=('q', 'v'))"])  # fmt: skip
def test_trained_parts_of_a_fused_map_are_written_as_one(method, tmp_path):
    """q, k and v have an A each; PEFT has one for the whole map, of the sum of the ranks."""
    model = make("gpt2")
    with Base(copy.deepcopy(model)) as base:
        adapter = base.add("a", method)
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += torch.randn(parameter.shape) * 0.1
        base.export("a", tmp_path / "out")
        expected = ours(base, "a")
        assert gap(expected, ours(base, None)) > VISIBLE
    assert gap(of_peft(model, tmp_path / "out", 0), expected) <= EQUAL


def test_positions_follow_row_by_row_and_in_generation(tokenizer):
    """A prefix that takes positions: padded rows equal themselves alone, beside other adapters, and with a cache."""
    for family in ("gpt2", "llama", "gemma3", "bert", "roberta"):
        with Base(make(family), tokenizer) as base:
            torch.manual_seed(2)
            for name, method in {"a": "prefix(length=3, init='random', init_std=1.0, positions='follow', slides=True)",
                                 "b": "prefix(length=2, init='random', init_std=1.0)"}.items():  # fmt: skip
                base.add(name, method)
            ids = torch.randint(FIRST, VOCABULARY, (3, 8))
            mask = torch.ones_like(ids)
            mask[0, 5:] = 0
            batch = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
            names = ["a", "b", None]
            with torch.no_grad(), base.use(names):
                mixed = values(base.model(**batch))
            for row, name in enumerate(names):
                length = int(mask[row].sum())
                alone = {key: value[row : row + 1, :length] for key, value in batch.items()}
                with torch.no_grad(), base.use(name):
                    one = values(base.model(**alone))
                assert gap(one, mixed[row : row + 1, :length]) <= EQUAL, (family, name)
                with torch.no_grad():
                    together, own = base.states(batch, names)[row, :length], base.states(alone, name)[0]
                assert gap(own, together) <= EQUAL, (family, name)
            if base.has_lm_head:
                prompts = ["the cold river runs", "a small bird"]
                with_cache = base.generate(prompts, ["a", "a"], max_new_tokens=6, return_ids=True)
                without = base.generate(prompts, ["a", "a"], max_new_tokens=6, return_ids=True, use_cache=False)
                assert with_cache == without, family


FOLLOW = "prefix(length={}, init='random', init_std=1.0, positions='follow', slides={})"


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "distilbert", "gpt2", "opt", "llama", "gemma3", "mistral", "bart"]
)
def test_positions_that_follow_in_every_mixture(family, tokenizer):
    """The contract of all methods, with prefixes that take positions beside those that take none."""
    torch.manual_seed(0)
    with Base(FAMILY_CASES[family].build().eval(), tokenizer) as base:  # type: ignore[attr-defined]
        methods = {"a": FOLLOW.format(3, True), "b": FOLLOW.format(2, False), "c": "prefix(length=4, init='random')",
                   "d": "lora(rank=2)", "e": "prompt(length=2, init='uniform')"}  # fmt: skip
        names = checks.attach(base, {name: parse_method(method) for name, method in methods.items()})
        assert names == list(methods)
        checks.mixed_equals_alone(base, [*names, None])


def test_sliding_needs_windows_that_look_back():
    torch.manual_seed(0)
    with Base(FAMILY_CASES["modernbert"].build().eval()) as base:  # type: ignore[attr-defined]
        base.add("a", FOLLOW.format(2, False))
        with pytest.raises(UnsupportedError, match="look both ways"):
            base.add("b", FOLLOW.format(2, True))


def test_positions_that_follow_need_positions():
    with Base(make("t5")) as base, pytest.raises(UnsupportedError, match="counts none"):
        base.add("a", "prefix(init='random', positions='follow')")
    with Base(make("gpt2")) as base, pytest.raises(ConfigError, match="slides"):
        base.add("a", "prefix(init='random', slides=True)")
