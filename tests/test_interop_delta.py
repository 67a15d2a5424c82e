"""PEFT methods without a form of their own here: what peft computes is what we compute."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import checks
import pytest
import torch
from families import FIRST, VOCABULARY, make
from safetensors.torch import load_file, save_file

from onebase import Base
from onebase.errors import ConfigError, CorruptError, MismatchError, UnsupportedError

peft = pytest.importorskip("peft", reason="the package peft is not installed (extra 'peft')")
pytestmark = pytest.mark.filterwarnings("ignore")  # of peft's own code

METHODS = {
    "LoHa": {"r": 2, "alpha": 4, "init_weights": False},
    "LoKr": {"r": 2, "alpha": 4, "init_weights": False},
    "OFT": {"oft_block_size": 4, "r": 0, "init_weights": False},
    "BOFT": {"boft_block_size": 4, "init_weights": False},
    "HRA": {"r": 2, "init_weights": False},
    "FourierFT": {"n_frequency": 20, "init_weights": False},
    "VBLoRA": {"num_vectors": 8, "vector_length": 4, "r": 2, "topk": 2},
}
TARGETS = {"bert": ["query", "value"], "llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def write(folder: Path, family: str, method: str) -> torch.Tensor:
    """Let peft write an adapter; return what it answers."""
    torch.manual_seed(3)
    config = getattr(peft, f"{method}Config")(target_modules=TARGETS[family], **METHODS[method])
    model = peft.get_peft_model(make(family), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    with torch.no_grad():
        return checks.values(model(input_ids=ids()))


def ids() -> torch.Tensor:
    return torch.randint(FIRST, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def answer(base: Base, name: str | None) -> torch.Tensor:
    with torch.no_grad(), base.use(name):
        return checks.values(base.model(input_ids=ids()))


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_what_peft_computes_is_what_we_compute(tokenizer, tmp_path, family, method):
    theirs = write(tmp_path / "a", family, method)
    with Base(make(family), tokenizer) as base:
        adapter = base.import_adapter(tmp_path / "a", name="x")
        ours = answer(base, "x")
        assert checks.gap(ours, theirs) <= 2e-5 * checks.size(theirs)
        assert checks.gap(ours, answer(base, None)) > checks.VISIBLE
        notes = adapter.config["provenance"]["notes"]
        assert any("the same function" in note for note in notes)
        base.save("x")
        base.remove("x")
        base.load("x")
        assert torch.equal(answer(base, "x"), ours)


def test_fused_maps_become_their_parts(tokenizer, tmp_path):
    theirs = write(tmp_path / "a", "gpt2", "FourierFT")
    with Base(make("gpt2"), tokenizer) as base:
        base.import_adapter(tmp_path / "a", name="x")
        assert checks.gap(answer(base, "x"), theirs) <= 2e-5 * checks.size(theirs)


def test_a_chosen_rank_says_what_is_lost(tokenizer, tmp_path):
    write(tmp_path / "a", "bert", "LoHa")
    with Base(make("bert"), tokenizer) as base:
        exact = base.import_adapter(tmp_path / "a", name="exact")
        less = base.import_adapter(tmp_path / "a", name="less", rank=1)
        assert less.method.name == "lora" and "is lost" in less.config["provenance"]["notes"][0]
        stated = float(less.config["provenance"]["notes"][0].split("at most ")[1].split()[0])
        lost = []
        for site, delta in less.module.items():
            whole = exact.module.deltas[site].merged(torch.zeros(delta.B.shape[0], delta.A.shape[1]), None)[0]
            lost.append(float((whole - delta.scale * delta.B @ delta.A).norm() / whole.norm()))
        assert stated == pytest.approx(max(lost), rel=0.01) and stated > 0.01
        with pytest.raises(ConfigError, match="rank"):
            base.import_adapter(tmp_path / "a", name="no", rank=0)


def test_damaged_and_foreign_files_are_refused(tokenizer, tmp_path):
    write(tmp_path / "a", "bert", "LoHa")
    file = tmp_path / "a" / "adapter_model.safetensors"
    good, config = load_file(file), json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    key = next(iter(good))
    with Base(make("bert"), tokenizer) as base:
        for tensors, error, words in (
            ({k: t for k, t in good.items() if k != key}, MismatchError, "missing"),
            ({**good, key: good[key][:1]}, MismatchError, "shape"),
            ({**good, key: good[key] * float("nan")}, CorruptError, "NaN"),
            ({**good, "base_model.model.encoder.nothing": good[key].clone()}, MismatchError, "nothing"),
        ):
            save_file({k: t.contiguous() for k, t in tensors.items()}, file)
            with pytest.raises(error, match=words):
                base.import_adapter(tmp_path / "a", name="x")
        save_file(good, file)
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["nowhere"]}))
        with pytest.raises(UnsupportedError, match="peft cannot put"):
            base.import_adapter(tmp_path / "a", name="x")
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NOSUCH"}))
        with pytest.raises(UnsupportedError, match="NOSUCH"):
            base.import_adapter(tmp_path / "a", name="x")
        assert not base.adapters
