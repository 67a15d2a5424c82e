"""Bases in fewer bits: every method on torchao's int8 and int4 as on any base; what cannot work is refused."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import onebase as ob
from onebase.errors import ConfigError, MismatchError, UnsupportedError
from onebase.quantization import LIBRARIES
from onebase.store import Store
from onebase.training.full import trained_whole

sys.path.insert(0, str(Path(__file__).parent / "contract"))
import checks
from families import make, tiny_tokenizer
from methods import every

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the libraries, about themselves
    pytest.importorskip("torchao")

ROWS = [
    {"text": f"the {thing} was {word}", "label": "good" if word in ("fine", "great", "warm") else "bad"}
    for thing in ("river", "bridge", "road", "bird", "tree", "rain")
    for word in ("fine", "great", "warm", "awful", "poor", "cold")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Checkpoints whose maps have a multiple of 32 inputs."""
    found = {}
    for family in ("bert", "llama"):
        config = make(family).config
        config.hidden_size, config.intermediate_size, config.head_dim = 64, 96, 16
        torch.manual_seed(0)
        model = type(make(family))(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        found[family] = str(tmp_path_factory.mktemp(family))
        model.save_pretrained(found[family])
        tiny_tokenizer().save_pretrained(found[family])
    return found


def load(folder: str, quantize: str | None) -> ob.Base:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ob.load_base(folder, quantize=quantize, device="cpu")


@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        ("bert", "int8"),
        ("llama", "int4"),
        pytest.param("bert", "int4", marks=pytest.mark.slow),
        pytest.param("llama", "int8", marks=pytest.mark.slow),
    ],
)
def test_every_method_mixed_equals_alone(folders, family, quantize):
    """Outputs and gradients of every method in one batch; the base is another one than without quantization."""
    with load(folders[family], quantize) as base, load(folders[family], None) as plain:
        assert base.quantization == quantize and plain.quantization == ""
        names = checks.attach(base, every())
        assert len(names) == len(every())
        checks.mixed_equals_alone(base, names)
        row = checks.draw([None]).tokens[0]
        with torch.no_grad():
            assert checks.gap(checks.call_alone(base, row, None), checks.call_alone(plain, row, None)) > 1e-4
        for site in base.anatomy.sites.values():
            if site.kind == "linear":
                own, other = site.weight(), plain.anatomy.sites[site.name].weight()
                assert own.dtype == torch.float32 and 0 < checks.gap(own, other) < 0.1 * float(other.abs().max())


@pytest.mark.parametrize("method", ["dora(rank=2)", "hira(rank=2)"])
def test_methods_that_read_weights_equal_their_formula(folders, method):
    """On an int8 base they are what they are on a plain base with the same, rounded weights."""
    with load(folders["bert"], "int8") as base, load(folders["bert"], None) as plain, torch.no_grad():
        for site in base.anatomy.sites.values():
            if site.kind == "linear":
                plain.anatomy.sites[site.name].module.weight.copy_(site.weight())
        row = checks.draw([None]).tokens[0]
        found = []
        for each in (base, plain):
            checks.disturb(each.add("a", method, seed=1).module, 2)
            found.append(checks.call_alone(each, row, "a"))
        assert checks.gap(*found) <= checks.LOGITS * checks.size(found[0])


def test_training_storing_and_loading(folders, tmp_path):
    """An adapter says what it was trained on, and fits nothing else."""
    store = Store(tmp_path)
    with load(folders["bert"], "int8") as base:
        run = ob.train(base, ROWS, "lora(rank=2)", name="r", store=store, epochs=3, batch_size=8, lr=1e-2)
        losses = [entry["loss"] for entry in run.history.epochs[1:]]
        assert losses[-1] < losses[0]
        assert store.resolve("r").config.provenance["quantization"] == "int8"
        answers = base.predict([row["text"] for row in ROWS[:4]], "r")
        with pytest.raises(UnsupportedError, match=r"quantized \(int8\)"):
            base.merge("r")
        base.remove("r")
        base.load("r", store=store)
        for one, other in zip(base.predict([row["text"] for row in ROWS[:4]], "r"), answers):
            assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
        base.remove("r")
        with pytest.raises(UnsupportedError, match="cannot be trained"), trained_whole(base, ROWS):
            pass
        first = base.fingerprint()
    with load(folders["bert"], "int8") as again:
        assert again.fingerprint() == first
    for quantize, stated in (("int4", "in int4"), (None, "not quantized")):
        with load(folders["bert"], quantize) as other:
            assert other.fingerprint() != first
            with pytest.raises(MismatchError, match=rf"made for a base in int8, this base is {stated}"):
                other.load("r", store=store)
    with load(folders["bert"], None) as plain:
        plain.save(plain.add("p", "lora(rank=2)").name, store=store)
        assert "quantization" not in store.resolve("p").config.provenance
    with load(folders["bert"], "int8") as base, pytest.raises(MismatchError, match="a base without any"):
        base.load("p", store=store)


def test_fingerprints_see_every_weight(folders):
    """Quantized tensors claim one place for all; a changed code of any of them is another base."""
    with load(folders["bert"], "int8") as base:
        first = base.fingerprint()
        for number in (0, 1):
            weight: Any = base.anatomy.stacks[0].layers[number].attention.self.key.weight
            weight.qdata[0, 0] += 1
            second = fresh(base)
            assert second != first
            weight.qdata[0, 0] -= 1
        assert fresh(base) == first


def fresh(base: ob.Base) -> str:
    """Return the fingerprint, not the remembered one."""
    from onebase.store import fingerprint_model

    return fingerprint_model(base.model, recompute=True)


def test_what_cannot_be_asked_for(folders):
    with pytest.raises(ConfigError, match="quantize = 'int3': expected int8, int4, nf4"):
        load(folders["bert"], "int3")


def test_bitsandbytes_on_a_cpu_is_refused(folders):
    """4 bits lose gradients there, and LLM.int8 rounds inputs: no adapter is added."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModel, BitsAndBytesConfig

    with load(folders["bert"], "nf4") as base:
        assert base.quantization == "nf4"
        with pytest.raises(UnsupportedError, match=r"\(nf4\).*encoder\.layer\.0"):
            base.add("a", "lora")
        assert not base.adapters
    eight = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModel.from_pretrained(folders["bert"], quantization_config=eight, device_map="cpu", dtype=torch.float32)
    with ob.Base(model) as base, pytest.raises(UnsupportedError, match=r"\(LLM.int8\).*rounded"):
        base.add("a", "lora")


def test_a_map_without_a_gradient_is_refused(folders, monkeypatch):
    """Whatever form a library brings is tried before anything stands on it."""
    with load(folders["bert"], "int8") as base:
        original = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: original(self, x.detach()) + 0 * x)
        with pytest.raises(UnsupportedError, match="no right gradient"):
            base.add("a", "lora")


def test_the_page_lists_every_setting():
    page = (Path(__file__).parents[1] / "docs" / "quantized.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|", page, re.M)
    assert dict(rows[1:]) == LIBRARIES


def test_commands_load_the_base_as_the_adapter_needs_it(folders):
    """`onebase predict` and `onebase eval` need no setting; `onebase train` has one."""
    from onebase.cli.bases import open_adapters
    from onebase.cli.output import Output

    with load(folders["bert"], "int4") as base:
        base.save(base.add("q", "lora(rank=2)").name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, routes = open_adapters(["q"], folders["bert"], "cpu", None, Output(True))
    assert base.quantization == "int4" and routes == {"q": "q"}
    base.close()
