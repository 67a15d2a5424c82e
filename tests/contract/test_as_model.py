"""An adapter as a module for other people's training loops: its parameters and state are the adapter's alone."""

from __future__ import annotations

import checks
import pytest
import torch
from families import FAMILIES, TEXTS, WRITERS, make
from methods import every, variants
from transformers import Trainer, TrainingArguments

from onebase.base import Base
from onebase.errors import ConfigError
from onebase.methods import method_names

TASK = {
    "kind": "classification",
    "labels": ["a", "b"],
    "pooling": "mean",
    "max_length": 60,
    "template": "",
    "pair": False,
}
METHODS = method_names()


def tiny_data(tokenizer, labels: bool) -> list[dict]:
    """Rows of token ids of one length, labelled by their first word."""
    rows = []
    for text in TEXTS:
        for word, label in (("good", 0), ("bad", 1)):
            ids = tokenizer(f"{word} {text}")["input_ids"][:8]
            row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
            rows.append(row | {"labels": label if labels else list(ids)})
    return rows


def arguments(folder, **settings) -> TrainingArguments:
    """Return the settings of a short run on the CPU."""
    return TrainingArguments(
        output_dir=str(folder),
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=1,
        **{"per_device_train_batch_size": 5, "max_steps": 12, "learning_rate": 2e-2, **settings},
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_state_are_the_adapters(family, tokenizer):
    """Parameters and state are those of adapter and head; the base is not in the module tree."""
    with Base(make(family), tokenizer) as base:
        for name, method in checks.carried(base, every()).items():
            adapter = base.add(name, method, task=TASK)
            model = base.as_model(name)
            own = {id(p) for p in adapter.parameters()}
            assert {id(p) for p in model.parameters()} == own
            shapes = sorted(tuple(t.shape) for t in adapter.tensors().values())
            unique = {t.data_ptr() if t.numel() else k: t for k, t in model.state_dict().items()}
            assert sorted(tuple(t.shape) for t in unique.values()) == shapes
            assert not {id(m) for m in model.modules()} & {id(m) for m in base.model.modules()}
            base.remove(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_logits_of_a_classifier(family, tokenizer):
    """Logits are those of `base.outputs` in a mixed batch, the loss is cross entropy, gradients reach the adapter."""
    with Base(make(family), tokenizer) as base:
        names = checks.attach(base, every(), task=TASK)
        ids, mask = checks.draw(names).padded("right")
        for i, name in enumerate(names):
            checks.disturb(base.adapters[name].head, i)
        batch = {"input_ids": ids, "attention_mask": mask}
        mixed = base.outputs(batch, names)
        labels = torch.arange(len(names)) % 2
        for i, name in enumerate(names):
            out = base.as_model(name)(**batch, labels=labels)
            assert checks.gap(out.logits[i], mixed[i]) <= checks.LOGITS
            assert checks.gap(out.loss, torch.nn.functional.cross_entropy(out.logits, labels)) <= 1e-6
        with pytest.raises(ConfigError, match="position_ids"):
            base.as_model(names[0])(**batch, position_ids=ids)


@pytest.mark.parametrize("family", WRITERS)
def test_loss_of_a_language_model(family, tokenizer):
    """Without a head the base's own LM head answers, with the loss of transformers at the callers' positions."""
    with Base(make(family), tokenizer) as base:
        names = checks.attach(base, every())
        ids = torch.stack([checks.draw([None, None]).tokens[1]] * 2)
        for name in names:
            out = base.as_model(name)(input_ids=ids, labels=ids)
            assert out.logits.shape[:2] == ids.shape
            logits, wanted = (out.logits, ids) if base.is_encoder_decoder else (out.logits[:, :-1], ids[:, 1:])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            assert checks.gap(out.loss, loss) <= checks.LOGITS


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_trainer_trains_the_adapter_and_nothing_else(family, method, tokenizer, tmp_path):
    """transformers' Trainer: the loss falls, the base keeps every bit, the saved folder loads and answers alike."""
    name, setting = next(iter(variants(method).items()))
    with Base(make(family), tokenizer) as base:
        before = checks.snapshot(base.model)
        base.add(name, setting, task=TASK)
        model = base.as_model(name)
        start = {key: t.clone() for key, t in base.adapters[name].tensors().items()}
        data = tiny_data(tokenizer, labels=True)
        trainer = Trainer(model=model, args=arguments(tmp_path / "run"), train_dataset=data)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert sum(losses[-3:]) / 3 < losses[0] - 0.02, losses
        moved = [key for key, t in base.adapters[name].tensors().items() if not torch.equal(t, start[key])]
        assert any(key.startswith("head.") for key in moved) and any(not key.startswith("head.") for key in moved)
        model.save_pretrained(tmp_path / "out")
        expected = base.predict(TEXTS, name)
        base.remove(name)
        loaded = base.load(str(tmp_path / "out"), name="again")
        assert loaded.labels == ("a", "b")
        assert [p.probabilities for p in base.predict(TEXTS, "again")] == [p.probabilities for p in expected]
        base.remove("again")
        assert checks.differences(before, checks.snapshot(base.model)) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_trainer_trains_a_writer(family, method, checkpointed, tokenizer, tmp_path):
    """The same with the LM head, and with Trainer's own checkpointing switch."""
    name, setting = next(iter(variants(method).items()))
    with Base(make(family), tokenizer) as base:
        before = checks.snapshot(base.model)
        base.add(name, setting)
        settings = {"activation_checkpointing": True} if checkpointed else {}
        if method in ("ia3", "layernorm", "loreft"):  # few values on a random model: they must go far to show
            settings |= {"learning_rate": 0.3, "max_steps": 30}
        trainer = Trainer(
            model=base.as_model(name),
            args=arguments(tmp_path, **settings),
            train_dataset=tiny_data(tokenizer, labels=False),
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert sum(losses[-3:]) / 3 < losses[0] - 0.02, losses
        base.gradient_checkpointing(False)
        base.remove(name)
        assert checks.differences(before, checks.snapshot(base.model)) == []


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_accumulated_micro_batches_are_one_batch(family, tokenizer, tmp_path):
    """One step over two micro-batches of unequal label counts equals one step over both together."""
    data = tiny_data(tokenizer, labels=family == "bert")[:4]
    if family == "llama":
        data[0]["labels"][:5] = [-100] * 5
    ends = []
    for size, times in ((4, 1), (2, 2)):
        with Base(make(family), tokenizer) as base:
            checks.attach(base, {"a": every()["lora-0"]}, task=TASK if family == "bert" else None)
            settings = {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": times,
                "optim": "sgd",
                "max_steps": 1,
            }
            trainer = Trainer(base.as_model("a"), arguments(tmp_path, **settings), train_dataset=data)
            batch = {key: torch.tensor([row[key] for row in data]) for key in data[0]}
            loss = float(trainer.model(**batch).loss.detach())
            trainer.train()
            assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)
            ends.append({key: t.clone() for key, t in base.adapters["a"].tensors().items()})
    assert max(checks.gap(ends[0][key], ends[1][key]) for key in ends[0]) <= 1e-6


@pytest.mark.parametrize("name", ["lora-0", "prefix-2", "prompt-2"])
def test_saving_in_the_middle_of_training(name, tokenizer, tmp_path):
    """After `save_pretrained` the module still holds the parameters that the base applies, and the file is folded."""
    with Base(make("bert"), tokenizer) as base:
        checks.attach(base, {name: every()[name]}, task=TASK)
        model = base.as_model(name)
        held = list(model.parameters())
        row = checks.draw([None]).tokens[0]
        before = checks.call_alone(base, row, name).detach()
        model.save_pretrained(tmp_path / "out")
        assert all(a is b for a, b in zip(held, base.adapters[name].parameters(), strict=True))
        base.load(str(tmp_path / "out"), name="stored")
        assert checks.gap(before, checks.call_alone(base, row, "stored")) <= checks.LOGITS
        checks.disturb(model.adapter, 3)
        assert checks.gap(before, checks.call_alone(base, row, name)) > checks.VISIBLE


@pytest.mark.parametrize("name", ["prefix-2", "prompt-2"])
def test_storing_in_the_middle_of_training(name, tokenizer):
    """After `base.save` a module made by `as_model` still holds the parameters that the base applies."""
    with Base(make("bert"), tokenizer) as base:
        checks.attach(base, {name: every()[name]})
        held = list(base.as_model(name).parameters())
        base.save(name)
        assert [id(p) for p in held] == [id(p) for p in base.adapters[name].parameters()]
