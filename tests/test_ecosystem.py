"""`base.as_model` inside the libraries people train and serve with, each the real one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import onebase as ob

sys.path.insert(0, str(Path(__file__).parent / "contract"))
import checks
from families import make
from test_as_model import TASK, tiny_data
from transformers import Trainer, TrainingArguments


def arguments(folder: Path, **settings) -> TrainingArguments:
    """Return the settings of a short run on the CPU."""
    return TrainingArguments(
        output_dir=str(folder), logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
        dataloader_pin_memory=False, per_device_train_batch_size=5, max_steps=12, learning_rate=2e-2, **settings,
    )  # fmt: skip


def test_trainer_keeps_the_best_and_goes_on_from_a_checkpoint(tokenizer, tmp_path) -> None:
    """The optimizer and the checkpoints hold the adapter only; resume and load_best_model_at_end work."""
    from safetensors.torch import load_file

    data = tiny_data(tokenizer, labels=True)
    settings = {
        "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False,
        "save_total_limit": 4,
    }  # fmt: skip

    def trainer(base: ob.Base, folder: Path, **more) -> Trainer:
        base.add("a", "lora(rank=2)", task=TASK, seed=3)
        return Trainer(
            base.as_model("a"), arguments(folder, **settings, **more), train_dataset=data, eval_dataset=data[:6]
        )

    with ob.Base(make("bert"), tokenizer) as base:
        before = checks.snapshot(base.model)
        first = trainer(base, tmp_path / "run")
        first.train()
        held = {id(p) for group in first.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in base.adapters["a"].parameters()}
        kept = {key: t.clone() for key, t in base.adapters["a"].tensors().items()}
        scores = {e["step"]: e["eval_loss"] for e in first.state.log_history if "eval_loss" in e}
        assert first.state.best_metric == min(scores.values())
        own = {tuple(t.shape) for t in kept.values()}
        for folder in (tmp_path / "run").glob("checkpoint-*"):
            saved = load_file(folder / "model.safetensors")
            assert {tuple(t.shape) for t in saved.values()} <= own
            assert sum(t.numel() for t in saved.values()) <= sum(t.numel() for t in kept.values())
        base.remove("a")
        again = trainer(base, tmp_path / "again")
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
        assert again.state.global_step == 12
        for key, value in base.adapters["a"].tensors().items():
            assert torch.allclose(value, kept[key], atol=1e-6), key
        base.remove("a")
        assert checks.differences(before, checks.snapshot(base.model)) == []


def test_pipeline_answers_as_the_base_does(tokenizer) -> None:
    """transformers' pipeline over the module gives the probabilities of `predict`."""
    from transformers import pipeline

    texts = ["a cold river", "the old bridge"]
    with ob.Base(make("bert"), tokenizer) as base:
        base.add("a", "lora(rank=2)", task=TASK)
        checks.disturb(base.adapters["a"].head, 1)
        checks.disturb(base.adapters["a"].module, 2)
        model = base.as_model("a")
        model.config.id2label = {0: "a", 1: "b"}
        run = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, device="cpu")
        for found, expected in zip(run(texts), base.predict(texts, "a")):
            given = {each["label"]: each["score"] for each in found}
            assert given == pytest.approx(expected.probabilities, abs=1e-5)
