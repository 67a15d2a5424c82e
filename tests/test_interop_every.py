"""Every method of the installed peft: imported so that it answers alike, or refused by its name with the reason."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from onebase import Base
from onebase.errors import ConfigError, CorruptError, MismatchError, UnsupportedError
from onebase.exchange import CONVERTERS, FORMATS

sys.path.insert(0, str(Path(__file__).parent / "contract"))
import checks
from families import FIRST, VOCABULARY, make
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft", reason="the package peft is not installed (extra 'peft')")
mapping = pytest.importorskip("peft.mapping")
pytestmark = pytest.mark.filterwarnings("ignore")  # of peft's own code

KINDS = {getattr(kind, "value", str(kind)): config for kind, config in mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
# What a method needs on a model of width 32 beside the maps that it is put on.
NEEDS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 8},
    "IA3": {"feedforward_modules": []},
    "LN_TUNING": {"target_modules": ["output.LayerNorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2, "r": 2},
    "WAVEFT": {"n_frequency": 20},
}
# Methods that nothing here computes, and words of the reason. Some cannot be written on this model at all.
REFUSED = {
    "ADAPTION_PROMPT": "gate",
    "CARTRIDGE": "KV cache",
    "CPT": "tokens of examples",
    "LILY": "router",
    "MULTITASK_PROMPT_TUNING": "task number",
    "POLY": "task number",
    "SHADOW": "smaller network",
    "TRAINABLE_TOKENS": "word_embeddings",
    "XLORA": "token by token",
}


def settings(kind: str) -> Any:
    """Return the config of a method for the query and value maps of BERT."""
    known = {f.name for f in fields(KINDS[kind])}
    chosen = {"target_modules": ["query", "value"], "task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 4}
    if kind == "TRAINABLE_TOKENS":
        chosen |= {"token_indices": [5, 6], "target_modules": ["word_embeddings"]}
    return KINDS[kind](**{key: value for key, value in {**chosen, **NEEDS.get(kind, {})}.items() if key in known})


def ids() -> torch.Tensor:
    return torch.randint(FIRST, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def theirs(model: Any) -> torch.Tensor:
    """Return what peft answers at the tokens of the text."""
    with torch.no_grad():
        return model(input_ids=ids(), attention_mask=torch.ones_like(ids())).last_hidden_state[:, -9:]


def write(kind: str, folder: Path) -> torch.Tensor | None:
    """Let peft write an adapter; return what it answers, None where it cannot be put on this model."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.get_peft_model(make("bert"), settings(kind)).eval()
        except ValueError:
            assert kind in REFUSED, f"peft cannot put {kind} on this model: say what it needs"
            folder.mkdir()
            (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "target_modules": ["query"]}))
            save_file({"base_model.model.x": torch.ones(2)}, folder / "adapter_model.safetensors")
            return None
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(str(folder))
        if kind in REFUSED:
            return None
        loaded = peft.PeftModel.from_pretrained(make("bert"), str(folder)).eval()
        return theirs(loaded)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k == "ADAMSS" else k for k in sorted(KINDS)]
)
def test_every_method_is_carried_or_refused_by_name(kind, tmp_path) -> None:
    expected = write(kind, tmp_path / "x")
    with Base(make("bert")) as base:
        if kind in REFUSED:
            with pytest.raises(UnsupportedError, match=REFUSED[kind]) as caught:
                base.import_adapter(tmp_path / "x", name="x")
            assert kind in str(caught.value) or kind == "TRAINABLE_TOKENS"
            assert not base.adapters
            return
        base.import_adapter(tmp_path / "x", name="x")
        with torch.no_grad():
            with base.use("x"):
                ours = base.model(input_ids=ids()).last_hidden_state
            with base.use(None):
                plain = base.model(input_ids=ids()).last_hidden_state
        assert checks.gap(ours, expected) <= 1e-5 * checks.size(expected)
        assert checks.gap(ours, plain) > checks.VISIBLE


def test_whole_numbers_are_places_and_no_damage(tmp_path) -> None:
    """SHiRA keeps where its values are as whole numbers: others of them there are damage, and said to be."""
    write("SHIRA", tmp_path / "x")
    file = tmp_path / "x" / "adapter_model.safetensors"
    good = load_file(file)
    places = [key for key in good if key.endswith("indices")]
    assert places
    with Base(make("bert")) as base:
        for damage, error in (
            ({places[0]: good[places[0]] + 10**6}, UnsupportedError),
            ({places[0]: good[places[0]].float() * float("nan")}, CorruptError),
            ({places[0]: good[places[0]][:, :3].contiguous()}, MismatchError),
        ):
            save_file({**good, **damage}, file)
            with pytest.raises(error, match=r"SHIRA|indices"):
                base.import_adapter(tmp_path / "x")
        assert not base.adapters
    write("LORA", tmp_path / "y")
    file = tmp_path / "y" / "adapter_model.safetensors"
    save_file({key: t.to(torch.int64) for key, t in load_file(file).items()}, file)
    with Base(make("bert")) as base, pytest.raises(CorruptError, match="int64, expected floating point"):
        base.import_adapter(tmp_path / "y")


BOMBS: dict[str, dict[str, Any]] = {
    "LORA": {"r": 10**9},
    "VERA": {"r": 10**9, "save_projection": False},
    "LOHA": {"r": 10**9},
    "FOURIERFT": {"n_frequency": 10**12},
    "VBLORA": {"num_vectors": 10**10},
    "PROMPT_TUNING": {"num_virtual_tokens": 10**10},
    "PREFIX_TUNING": {"num_virtual_tokens": 10**10, "num_layers": 10**6},
    "LORA regex": {"target_modules": "(.*.*)*x"},
}


@pytest.mark.parametrize("kind", BOMBS)
def test_settings_that_ask_for_memory_are_refused_first(kind, tmp_path) -> None:
    """A tiny file with huge settings costs nothing: it is an error about the setting, in little memory."""
    import resource

    write(kind.split()[0], tmp_path / "x")
    path = tmp_path / "x" / "adapter_config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, **BOMBS[kind]}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Base(make("bert")) as base, pytest.raises((ConfigError, MismatchError, UnsupportedError, CorruptError)):
        base.import_adapter(tmp_path / "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


REASONS = {
    "peft": "PEFT has no form that computes", "vllm": "vLLM: BertModel is not among", "merged": "no weight of the base",
    "adapterhub": "AdapterHub library has no form", "onnx": "no weight of the base", "gguf": "convert_lora_to_gguf",
}  # fmt: skip


@pytest.mark.parametrize("to", [*FORMATS, *CONVERTERS])
def test_every_format_says_why_it_cannot_hold_an_adapter(to, tmp_path) -> None:
    """A change at positions has no form in any of them: each refuses for its own reason and leaves nothing behind."""
    if to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    with Base(make("bert")) as base:
        checks.disturb(base.add("a", "loreft(rank=2)").module, 1)
        before = {key: t.clone() for key, t in base.model.state_dict().items()}
        with pytest.raises(UnsupportedError, match=REASONS[to]):
            base.export("a", tmp_path / "out", to=to)
        assert all(torch.equal(t, before[key]) for key, t in base.model.state_dict().items())
    assert not [*tmp_path.iterdir()]


def test_the_file_is_left_as_it_was(tmp_path) -> None:
    """Reading through peft writes nothing, and the base has its bits."""
    write("LOHA", tmp_path / "x")
    files = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    model = make("bert")
    before = {key: t.clone() for key, t in copy.deepcopy(model).state_dict().items()}
    with Base(model) as base:
        base.import_adapter(tmp_path / "x", name="x")
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == files
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
