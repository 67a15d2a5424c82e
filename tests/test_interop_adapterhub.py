"""AdapterHub's files, both ways, against their formulas written out in plain PyTorch."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import COMMON, FIRST, PRESENT, SPECIAL, VOCABULARY
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from onebase import Base
from onebase.errors import CorruptError, MismatchError, UnsupportedError

EQUAL = 1e-5
REAL = Path(__file__).parents[2] / "shared" / "models" / "adapters_real"
TASK = {"kind": "classification", "labels": ["a", "b"], "pooling": "first"}
ACTIVE = {"relu": F.relu, "swish": F.silu}


def bert() -> Any:
    torch.manual_seed(0)
    return tf.BertModel(tf.BertConfig(**COMMON)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return PRESENT["gpt2"].build().eval()  # type: ignore[return-value]


def bottleneck(**more: Any) -> dict[str, Any]:
    return {
        "mh_adapter": False, "output_adapter": True, "non_linearity": "relu", "reduction_factor": 4,
        "original_ln_before": True, "original_ln_after": True, "residual_before_ln": True, "ln_before": False,
        "adapter_residual_before_ln": False, "ln_after": False, "is_parallel": False, "scaling": 1.0, **more,
    }  # fmt: skip


CONFIGS = {
    "seq_bn": bottleneck(),
    "double_seq_bn": bottleneck(mh_adapter=True, original_ln_before=False, non_linearity="swish"),
    "par_bn": bottleneck(original_ln_before=False, is_parallel=True, scaling=4.0),
}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def places(config: dict[str, Any], kind: str, root: str) -> list[str]:
    names = {"bert": ("attention.output.adapters", "output.adapters"),
             "gpt2": ("attention_adapters.adapters", "output_adapters.adapters")}[kind]  # fmt: skip
    chosen = names if config["mh_adapter"] else names[1:]
    return [f"{root}.{i}.{name}.N.adapter_" for i in range(2) for name in chosen]


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], kind: str = "bert", head: Any = None
) -> Path:
    folder.mkdir()
    about = {"hidden_size": 32, "model_class": "X", "model_name": "x", "model_type": kind, "name": "N", "version": "1"}
    (folder / "adapter_config.json").write_text(json.dumps({"config": config, **about}))
    save_file({key: t.contiguous() for key, t in tensors.items()}, folder / "adapter.safetensors")
    if head is not None:
        (folder / "head_config.json").write_text(json.dumps({"config": head[0], **about}))
        save_file(head[1], folder / "model_head.safetensors")
    return folder


def made(config: dict[str, Any], kind: str, root: str) -> dict[str, Tensor]:
    tensors = {}
    for n, place in enumerate(places(config, kind, root)):
        tensors |= {place + "down.0.weight": noise(8, 32, seed=4 * n), place + "down.0.bias": noise(8, seed=4 * n + 1),
                    place + "up.weight": noise(32, 8, seed=4 * n + 2),
                    place + "up.bias": noise(32, seed=4 * n + 3)}  # fmt: skip
    return tensors


class Hub(nn.Module):
    """`LN(h' + x)` of BERT's output modules, with the library's formula for h'."""

    def __init__(self, old: Any, tensors: dict[str, Tensor], place: str, config: dict[str, Any]):
        super().__init__()
        self.old, self.config = old, config
        self.weights = [tensors[place + key] for key in ("down.0.weight", "down.0.bias", "up.weight", "up.bias")]

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        h, config = self.old.dense(hidden), self.config
        z = x if config["is_parallel"] else self.old.LayerNorm(h + x) if config["original_ln_before"] else h
        down, down_bias, up, up_bias = self.weights
        change = F.linear(ACTIVE[config["non_linearity"]](F.linear(z, down, down_bias)), up, up_bias)
        return self.old.LayerNorm(h + config["scaling"] * change + x)


def by_hand(model: Any, tensors: dict[str, Tensor], config: dict[str, Any]) -> Any:
    model = copy.deepcopy(model)
    for i, layer in enumerate(model.encoder.layer):
        layer.output = Hub(layer.output, tensors, f"bert.encoder.layer.{i}.output.adapters.N.adapter_", config)
        if config["mh_adapter"]:
            place = f"bert.encoder.layer.{i}.attention.output.adapters.N.adapter_"
            layer.attention.output = Hub(layer.attention.output, tensors, place, config)
    return model


def ids() -> Tensor:
    return torch.randint(FIRST, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))


def states(base: Base, name: str | None) -> Tensor:
    with torch.no_grad(), base.use(name):
        output = base.model(input_ids=ids())
    return output.logits if "logits" in output else output.last_hidden_state


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) / max(1.0, float(one.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_bottlenecks_of_bert_compute_the_librarys_formulas(name, tmp_path):
    config, model = CONFIGS[name], bert()
    tensors = made(config, "bert", "bert.encoder.layer")
    head = {"heads.N.1.weight": noise(32, 32, seed=90), "heads.N.1.bias": noise(32, seed=91),
            "heads.N.4.weight": noise(3, 32, seed=92), "heads.N.4.bias": noise(3, seed=93)}  # fmt: skip
    settings = {"head_type": "classification", "layers": 2, "activation_function": "tanh", "num_labels": 3,
                "label2id": {"z": 2, "x": 0, "y": 1}}  # fmt: skip
    folder = write(tmp_path / "in", config, tensors, head=(settings, head))
    with torch.no_grad():
        expected = by_hand(model, tensors, config)(input_ids=ids()).last_hidden_state
        inner = torch.tanh(F.linear(expected[:, 0], head["heads.N.1.weight"], head["heads.N.1.bias"]))
        logits = F.linear(inner, head["heads.N.4.weight"], head["heads.N.4.bias"])
    with Base(model) as base:
        adapter = base.import_adapter(folder, name="N")
        assert adapter.labels == ("x", "y", "z")
        assert gap(expected, states(base, "N")) <= EQUAL
        assert gap(expected, states(base, None)) > 1e-2
        batch = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
        with torch.no_grad():
            assert gap(logits, torch.stack(base.outputs(batch, ["N", "N"]))) <= EQUAL
        assert base.export("N", tmp_path / "out", to="adapterhub").gap <= EQUAL
    written = load_file(tmp_path / "out" / "adapter.safetensors")
    assert {f"bert.{key}" for key in written} == tensors.keys()  # a bare class writes no prefix
    assert all(torch.equal(written[key.removeprefix("bert.")], value) for key, value in tensors.items())
    again = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["config"]
    assert {key: again[key] for key in config} == config
    assert load_file(tmp_path / "out" / "model_head.safetensors").keys() == head.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_bottlenecks_where_norms_come_first(name, tmp_path):
    """GPT-2: there is no norm behind a branch, so seq_bn reads h + x."""
    config, model = CONFIGS[name], gpt2()
    tensors = made(config, "gpt2", "transformer.h")
    folder = write(tmp_path / "in", config, tensors, kind="gpt2")

    def change(place: str, h: Tensor, x: Tensor) -> Tensor:
        z = x if config["is_parallel"] else h + x if config["original_ln_before"] else h
        get = [tensors[place + key] for key in ("down.0.weight", "down.0.bias", "up.weight", "up.bias")]
        return config["scaling"] * F.linear(ACTIVE[config["non_linearity"]](F.linear(z, *get[:2])), *get[2:])

    with torch.no_grad():
        backbone = model.transformer
        x = backbone.wte(ids()) + backbone.wpe(torch.arange(9))
        mask = torch.full((9, 9), -1e9).triu(1)[None, None]
        for i, block in enumerate(backbone.h):
            h = block.attn(block.ln_1(x), attention_mask=mask)[0]
            if config["mh_adapter"]:
                h = h + change(f"transformer.h.{i}.attention_adapters.adapters.N.adapter_", h, x)
            x = x + h
            h = block.mlp(block.ln_2(x))
            x = x + h + change(f"transformer.h.{i}.output_adapters.adapters.N.adapter_", h, x)
        expected = model.lm_head(backbone.ln_f(x))
    with Base(model) as base:
        base.import_adapter(folder, name="N")
        assert gap(expected, states(base, "N")) <= EQUAL
        base.export("N", tmp_path / "out", to="adapterhub")
    assert load_file(tmp_path / "out" / "adapter.safetensors").keys() == tensors.keys()


def test_lora_ia3_and_prefix(tmp_path):
    model = bert()
    lora = {"architecture": "lora", "r": 4, "alpha": 8, "attn_matrices": ["q", "v"], "selfattn_lora": True,
            "intermediate_lora": False, "output_lora": False, "composition_mode": "add",
            "init_weights": "lora"}  # fmt: skip
    ia3 = {
        **lora,
        "r": 1,
        "alpha": 1,
        "composition_mode": "scale",
        "attn_matrices": ["k", "v"],
        "intermediate_lora": True,
    }
    loras, scales = {}, {}
    for i in range(2):
        layer = f"bert.encoder.layer.{i}"
        for n, part in enumerate(("query", "value")):
            root = f"{layer}.attention.self.{part}.loras.N."
            loras |= {root + "lora_A": noise(4, 32, seed=n + 9 * i), root + "lora_B": noise(32, 4, seed=n + 5 + 9 * i)}
        for n, part in enumerate(("key", "value")):
            scales[f"{layer}.attention.self.{part}.loras.N.lora_B"] = 1 + noise(32, 1, seed=n + 9 * i)
        scales[f"{layer}.intermediate.dense.loras.N.lora_B"] = 1 + noise(48, 1, seed=7 + 9 * i)
    with torch.no_grad():
        merged, scaled = copy.deepcopy(model), copy.deepcopy(model)
        for key, b in loras.items():
            if key.endswith("lora_B"):
                a = loras[key.replace("lora_B", "lora_A")]
                merged.get_submodule(key.removeprefix("bert.").removesuffix(".loras.N.lora_B")).weight += 2.0 * b @ a
        for key, factor in scales.items():
            linear = scaled.get_submodule(key.removeprefix("bert.").removesuffix(".loras.N.lora_B"))
            linear.weight *= factor
            linear.bias *= factor[:, 0]
        expected = [m(input_ids=ids()).last_hidden_state for m in (merged, scaled)]
    flat = noise(3 * 2 * 2 * 32, seed=40)
    prefix = {"architecture": "prefix_tuning", "flat": True, "prefix_length": 3}
    end = "prefix_tunings.N.self_prefix.control_trans"
    again = f"bert.encoder.layer.0.attention.self.prefix_tuning.pool.{end}"
    pool = {f"bert.prefix_tuning.{end}": flat, again: flat.clone()}
    with Base(model) as base:
        base.import_adapter(write(tmp_path / "lora", lora, loras), name="lora")
        base.import_adapter(write(tmp_path / "ia3", ia3, scales), name="ia3")
        base.import_adapter(write(tmp_path / "prefix", prefix, pool), name="prefix")
        assert gap(expected[0], states(base, "lora")) <= EQUAL
        assert gap(expected[1], states(base, "ia3")) <= EQUAL
        keys = base.adapters["prefix"].tensors()["deltas.encoder/1/attention/kv.keys"]
        assert torch.equal(keys, flat.view(3, 4, 4, 8)[:, 2])
        for name in ("lora", "ia3", "prefix"):
            before = states(base, name)
            base.export(name, tmp_path / f"{name}-out", to="adapterhub")
            base.import_adapter(tmp_path / f"{name}-out", name=f"{name}-again")
            assert gap(before, states(base, f"{name}-again")) <= EQUAL


def prompted(model: Any, tokens: Tensor, behind: int, keep: bool = False) -> Tensor:
    """States of the texts when virtual tokens stand behind the embeddings' norm; the texts keep their positions.

    keep: the virtual tokens' too.
    """
    with torch.no_grad():
        states = model.embeddings(input_ids=ids())
        states = torch.cat([states[:, :behind], tokens.expand(2, -1, -1), states[:, behind:]], 1)
        for layer in model.encoder.layer:
            out = layer(states)
            states = out[0] if isinstance(out, tuple) else out
    return states if keep else torch.cat([states[:, :behind], states[:, behind + len(tokens) :]], 1)


@pytest.mark.parametrize(("combine", "behind"), [("prefix", 0), ("prefix_after_bos", 1)])
def test_prompts_stand_behind_the_embeddings(combine, behind, tmp_path):
    model, tokens = bert(), noise(3, 32, seed=50)
    config = {"architecture": "prompt_tuning", "combine": combine, "prompt_length": 3, "prompt_init": "random_uniform",
              "random_uniform_scale": 0.5}  # fmt: skip
    key = "bert.prompt_tuning.prompt_tunings.N.prompt_embedding.weight"
    head = {f"heads.N.{n}.{what}": noise(*shape, seed=n) for n, rows in ((1, 32), (4, 3))
            for what, shape in (("weight", (rows, 32)), ("bias", (rows,)))}  # fmt: skip
    settings = {"head_type": "classification", "layers": 2, "activation_function": "tanh", "num_labels": 3}
    folder = write(tmp_path / "in", config, {key: tokens}, head=(settings, head))
    with Base(model) as base:
        adapter = base.import_adapter(folder, name="N")
        longer = prompted(model, tokens, behind, keep=True)  # the head reads its first token, virtual or not
        inner = torch.tanh(F.linear(longer[:, 0], head["heads.N.1.weight"], head["heads.N.1.bias"]))
        expected = F.linear(inner, head["heads.N.4.weight"], head["heads.N.4.bias"])
        batch = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
        assert adapter.method.leads == (not behind)
        with torch.no_grad():
            assert gap(expected, torch.stack(list(base.outputs(batch, ["N", "N"])))) <= EQUAL
        base.export("N", tmp_path / "headed", to="adapterhub")
        base.import_adapter(tmp_path / "headed", name="headed-again")
        with torch.no_grad():  # a mixed batch
            assert gap(expected, torch.stack(list(base.outputs(batch, ["headed-again", "N"])))) <= EQUAL
        assert gap(states(base, "headed-again"), states(base, "N")) == 0
        base.remove("N")
        (folder / "head_config.json").unlink()
        base.import_adapter(folder, name="N")
        assert gap(prompted(model, tokens, behind), states(base, "N")) <= EQUAL
        base.export("N", tmp_path / "out", to="adapterhub")
        base.import_adapter(tmp_path / "out", name="again")
        assert gap(states(base, "again"), states(base, "N")) == 0
        written = load_file(tmp_path / "out" / "adapter.safetensors")
        assert {name.removeprefix("bert.") for name in written} == {key.removeprefix("bert.")}
        base.add("plain", "prompt(length=3, init='uniform')")
        for name, to, words in (("plain", "adapterhub", "embeddings' norm"), ("N", "peft", "in front of")):
            with pytest.raises(UnsupportedError, match=words):
                base.export(name, tmp_path / "no", to=to)
        base.add("headed", "prompt(length=2, init='uniform', place='embedded')", task=TASK)
        with pytest.raises(UnsupportedError, match="leads=True"):
            base.export("headed", tmp_path / "no", to="adapterhub")
        base.add("first", "prompt(length=2, init='uniform', place='embedded', leads=True)", task=TASK)
        with pytest.raises(UnsupportedError, match="with a head"):
            base.export("first", tmp_path / "no", to="adapterhub", head=False)


FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "gating": ({"use_gating": True}, UnsupportedError, "use_gating"),
    "order": ({"adapter_residual_before_ln": True}, UnsupportedError, "adapter_residual_before_ln = True"),
    "new": ({"magic": 3}, UnsupportedError, "magic = 3"),
    "activation": ({"non_linearity": "leakyrelu"}, MismatchError, "leakyrelu"),
    "learned scale": ({"scaling": "learned"}, MismatchError, "scaling = 'learned'"),
    "prompt": ({"architecture": "prompt_tuning"}, UnsupportedError, "non_linearity = "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_carried_is_named(fault, tmp_path):
    change, error, words = FAULTS[fault]
    config = {**CONFIGS["seq_bn"], **change}
    write(tmp_path / "in", config, made(CONFIGS["seq_bn"], "bert", "bert.encoder.layer"))
    with Base(bert()) as base, pytest.raises(error, match=words):
        base.import_adapter(tmp_path / "in")


@pytest.mark.parametrize("count", [10**9, 10**30, "many", None])
def test_a_number_of_labels_is_not_believed(count, tmp_path):
    """Names are made for the rows that the head has, never for as many as the settings say."""
    config = CONFIGS["seq_bn"]
    head = {f"heads.N.{n}.{what}": noise(*shape, seed=n) for n, rows in ((1, 32), (4, 3))
            for what, shape in (("weight", (rows, 32)), ("bias", (rows,)))}  # fmt: skip
    settings = {"head_type": "classification", "layers": 2, "activation_function": "tanh", "num_labels": count}
    folder = write(tmp_path / "in", config, made(config, "bert", "bert.encoder.layer"), head=(settings, head))
    with Base(bert()) as base:
        with pytest.raises((MismatchError, CorruptError), match=r"num_labels|many|NoneType"):
            base.import_adapter(folder)
        assert not base.adapters


def test_trained_norms_and_other_methods_are_refused(tmp_path):
    with Base(bert()) as base:
        base.add("houlsby", "bottleneck")
        base.add("dora", "dora(rank=2)")
        for name in ("houlsby", "dora"):
            with pytest.raises(UnsupportedError, match="no form"):
                base.export(name, tmp_path / "out", to="adapterhub")


def test_reading_the_sum_needs_norms_in_their_place():
    with Base(gpt2()) as base, pytest.raises(UnsupportedError, match="use reads='sum'"):
        base.add("a", "bottleneck(preset='pfeiffer', reads='normed')")


def convert(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "onebase.store.interop.pickle", str(source), str(target)]
    return subprocess.run(words, capture_output=True, text=True)


def test_pickles_are_converted_apart_and_run_nothing(tmp_path):
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "good.bin")
    assert convert(tmp_path / "good.bin", tmp_path / "good.safetensors").returncode == 0
    assert torch.equal(load_file(tmp_path / "good.safetensors")["a"], tensors["a"])

    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "evil.bin").write_bytes(pickle.dumps({"a": Evil()}))
    done = convert(tmp_path / "evil.bin", tmp_path / "evil.safetensors")
    assert done.returncode == 1
    assert "was not converted" in done.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "evil.safetensors").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real adapter files are not beside this checkout")
def test_real_files_of_both_libraries_load(tmp_path):
    """Files that others trained, on random bases of their shapes: the real bases are not needed to read them."""
    import shutil

    wide = {**SPECIAL, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 64,
            "max_position_embeddings": 66}  # fmt: skip
    folder = tmp_path / "xlmt"
    shutil.copytree(REAL / "xlmt_sentiment_houlsby", folder)
    with Base(tf.XLMRobertaModel(tf.XLMRobertaConfig(**wide))) as base:
        with pytest.raises(UnsupportedError, match="Convert it"):
            base.import_adapter(folder)
        assert convert(folder / "pytorch_adapter.bin", folder / "adapter.safetensors").returncode == 0
        assert convert(folder / "pytorch_model_head.bin", folder / "model_head.safetensors").returncode == 0
        adapter = base.import_adapter(folder, name="x")
        assert adapter.labels == ("Neg", "Neu", "Pos")
        assert adapter.method.shorthand() == (
            "bottleneck(preset='pfeiffer', size=48, activation='relu', scale=1.0, norms=False, reads='normed')"
        )
        assert gap(states(base, "x"), states(base, None)) > 1e-3
    gpt = tf.GPT2Config(**SPECIAL, n_embd=768, n_layer=12, n_head=12, n_positions=64, n_inner=64)
    with Base(tf.GPT2Model(gpt)) as base:
        adapter = base.import_adapter(REAL / "peft_lora_gpt2", name="y")
        assert len(adapter.labels) == 6
        assert adapter.task["pooling"] == "last"
        assert gap(states(base, "y"), states(base, None)) > 1e-3
