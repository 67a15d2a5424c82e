"""What the Trainer of transformers needs, in versions 4 and 5: encoded rows, arguments, a callback that times."""

from __future__ import annotations

import inspect
from typing import Any

import common
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Encoded(Dataset):
    """Rows as a tokenizer gives them, with labels.

    Args:
        rows: texts and labels.
        labels: all labels, in order.
        tokenizer: of the base.
        max_length: tokens at most.
    """

    def __init__(self, rows: list[dict[str, str]], labels: list[str], tokenizer: Any, max_length: int):
        found = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length)
        self.rows = [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels.index(row["label"])}
            for ids, row in zip(found["input_ids"], rows)
        ]
        self.lengths = [len(row["input_ids"]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


class Clock(TrainerCallback):
    """Times training from its first batch to its last step."""

    def __init__(self) -> None:
        self.timer = common.Timer()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Begin."""
        self.timer.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Take the time."""
        self.timer.stop()


def training_arguments(given: Any, folder: str) -> TrainingArguments:
    """Return arguments for this worker, whatever the version of transformers calls them."""
    known = inspect.signature(TrainingArguments).parameters
    more: dict[str, Any] = {"use_cpu": True} if "use_cpu" in known else {"no_cuda": True}
    if given.grouped:
        old = "group_by_length" in known
        more |= {"group_by_length": True} if old else {"train_sampling_strategy": "group_by_length"}
    return TrainingArguments(
        output_dir=folder, per_device_train_batch_size=common.ROWS, num_train_epochs=given.epochs,
        learning_rate=given.lr, warmup_steps=_warmup(given), weight_decay=common.DECAY,
        max_grad_norm=common.CLIP, seed=given.seed, bf16=given.bf16, save_strategy="no", eval_strategy="no",
        report_to=[], disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False, **more,
    )  # fmt: skip


def _warmup(given: Any) -> int:
    steps = -(-len(common.read(given.folder, "train")) // common.ROWS) * given.epochs
    return max(1, round(common.WARMUP * steps))


def run(trainer_class: Any, model: Any, given: Any, tokenizer: Any, train: Encoded, folder: str) -> common.Timer:
    """Train a model once; return its times."""
    clock = Clock()
    trainer = trainer_class(
        model=model, args=training_arguments(given, folder), train_dataset=train, callbacks=[clock],
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    trainer.train()
    return clock.timer


@torch.no_grad()
def accuracy(model: Any, rows: Encoded, tokenizer: Any) -> float:
    """Return the share of rows that are labelled right."""
    model.eval()
    collate, hits = DataCollatorWithPadding(tokenizer), 0
    order = sorted(range(len(rows)), key=lambda i: rows.lengths[i])
    for start in range(0, len(order), 64):
        batch = collate([rows[i] for i in order[start : start + 64]])
        labels = batch.pop("labels")
        hits += int((model(**batch).logits.argmax(-1) == labels).sum())
    return hits / len(rows)
