"""TRL's trainers over `base.as_model`: the real library, a real decoder, one model in memory."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch

import onebase as ob
from onebase.errors import ConfigError, UnsupportedError

sys.path.insert(0, str(Path(__file__).parent / "contract"))
import checks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the library's own imports
    trl = pytest.importorskip("trl")
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

datasets = pytest.importorskip("datasets")
DECODER = Path(__file__).parents[2] / "shared" / "models" / "stories260K"
pytestmark = [
    pytest.mark.skipif(not DECODER.is_dir(), reason="needs the small decoder"),
    pytest.mark.filterwarnings("ignore"),
]

STORIES = [
    "Once upon a time there was a little dog.",
    "The sun was warm and Tom was happy.",
    "Lily had a red ball and a blue hat.",
    "One day the cat sat on the big tree.",
]
PAIRS = [
    {"prompt": "One day the cat", "chosen": " sat on the big tree.", "rejected": " ate ate ate ate."},
    {"prompt": "Lily had", "chosen": " a red ball.", "rejected": " the the the of of."},
    {"prompt": "Tom was", "chosen": " happy.", "rejected": " blue blue."},
    {"prompt": "The dog", "chosen": " ran to the park.", "rejected": " was was hat."},
]


@pytest.fixture
def base():
    """The small decoder, whose every tensor must be the same in the end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DECODER)
    with ob.Base(model, AutoTokenizer.from_pretrained(DECODER)) as base:
        before = checks.snapshot(model)
        config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
        yield base
        base.gradient_checkpointing(False)
        for name in list(base.adapters):
            base.remove(name)
        assert checks.differences(before, checks.snapshot(model)) == []
        assert model.config.to_dict() == config.to_dict()
        assert model.generation_config.to_dict() == generation.to_dict()


def settings(folder: Path, **more) -> dict:
    """Return the settings of a short run on the CPU."""
    return {
        "output_dir": str(folder), "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 4, "logging_steps": 1, "max_steps": 6, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "bf16": False, "dataloader_pin_memory": False, **more,
    }  # fmt: skip


def held(trainer) -> set[int]:
    """Return the ids of what the optimizer moves."""
    return {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}


def losses(trainer) -> list[float]:
    """Return the loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["lora(rank=4)", "prompt(length=4)", "prefix(length=4)"])
def test_sft_trains_the_adapter_and_nothing_else(method, base, tmp_path) -> None:
    """TRL multiplies hidden states by the LM head itself; its first loss is the base's own, and then it falls."""
    base.add("a", method, seed=1)
    model = base.as_model("a")
    start = {key: t.clone() for key, t in base.adapters["a"].tensors().items()}
    data = datasets.Dataset.from_list([{"text": text} for text in STORIES])
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**settings(tmp_path), max_length=64), train_dataset=data,
        processing_class=base.tokenizer,
    )  # fmt: skip
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad(), base.use("a"):
        expected = float(base.model(**batch).loss)
    trainer.train()
    assert held(trainer) == {id(p) for p in base.adapters["a"].parameters()}
    found = losses(trainer)
    assert found[0] == pytest.approx(expected, abs=1e-4)
    assert found[-1] < found[0] - 0.05, found
    assert any(not torch.equal(t, start[key]) for key, t in base.adapters["a"].tensors().items())
    model.save_pretrained(tmp_path / "out")
    wanted = base.generate(STORIES[0], "a", max_new_tokens=4, return_ids=True)
    base.load(str(tmp_path / "out"), name="again")
    assert base.generate(STORIES[0], "again", max_new_tokens=4, return_ids=True) == wanted
    assert "sft" in base.adapters["again"].config["provenance"]["tags"]


def test_dpo_has_the_plain_base_as_its_reference(base, tmp_path) -> None:
    """The loss starts at log 2 where the adapter changes nothing yet, and falls; dropout is off as TRL wants it.

    With a reference of each step, with one computed before, and with layers that are computed again: the same losses.
    """
    found = []
    for name, more in {
        "a": {"gradient_checkpointing": False},
        "b": {"gradient_checkpointing": True},
        "c": {"precompute_ref_log_probs": True},
    }.items():
        base.add(name, "lora(rank=4, dropout=0.5)", seed=1)
        model, reference = base.as_model(name), base.as_model(None)
        trainer = DPOTrainer(
            model=model, ref_model=reference, train_dataset=datasets.Dataset.from_list(PAIRS),
            args=DPOConfig(**settings(tmp_path, max_steps=4, **more), max_length=64),
            processing_class=base.tokenizer,
        )  # fmt: skip
        assert not list(reference.parameters())
        trainer.train()
        assert held(trainer) == {id(p) for p in base.adapters[name].parameters()}
        assert not any(module.training for module in base.adapters[name].module.modules())
        base.gradient_checkpointing(False)
        found.append(losses(trainer))
    assert found[0][0] == pytest.approx(math.log(2), abs=1e-4)
    assert found[0][-1] < found[0][0] - 0.05, found
    assert found[1] == pytest.approx(found[0], abs=1e-4)
    assert found[2] == pytest.approx(found[0], abs=1e-4)


def test_the_reference_is_another_one_on_another_base(base) -> None:
    """TRL caches a reference's values by the hash of its state, so the state must tell bases apart."""
    from trl.trainer.utils import hash_module

    own, weight = hash_module(base.as_model(None)), base.model.model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
        other = hash_module(base.as_model(None))
        weight.copy_(kept)
    assert other != own == hash_module(base.as_model(None))
    with pytest.raises(ConfigError, match="plain base"):
        base.as_model(None).save_pretrained("nowhere")


def test_a_head_of_its_own_is_not_left_out(base) -> None:
    """A trainer that computes tokens from hidden states would ignore a classifier's head."""
    task = {"kind": "classification", "labels": ["a", "b"], "pooling": "mean", "max_length": 60, "template": "",
            "pair": False}  # fmt: skip
    base.add("c", "lora(rank=2)", task=task)
    model = base.as_model("c")
    assert not model.can_generate()
    for call in (lambda: model.base_model, model.get_output_embeddings, model.generate):
        with pytest.raises(UnsupportedError, match="classification head"):
            call()


def test_the_text_pipeline_writes_as_the_base_does(base) -> None:
    """transformers' own pipeline over the module gives the texts of `base.generate`."""
    from transformers import pipeline

    base.add("a", "lora(rank=2)")
    checks.disturb(base.adapters["a"].module, 2)
    write = pipeline("text-generation", model=base.as_model("a"), tokenizer=base.tokenizer, device="cpu")
    found = write(STORIES[1], max_new_tokens=5, do_sample=False, return_full_text=False)[0]["generated_text"]
    ids = base.generate(STORIES[1], "a", max_new_tokens=5, return_ids=True)[0]
    assert ids != base.generate(STORIES[1], max_new_tokens=5, return_ids=True)[0]
    assert found == base.tokenizer.decode(ids, skip_special_tokens=True)
