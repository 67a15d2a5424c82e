"""Worker: PEFT with the Trainer of transformers, as its users start it, or with bfloat16 and grouped lengths."""

from __future__ import annotations

import tempfile
from typing import Any

import common
import peft
import trainers
from transformers import AutoModelForSequenceClassification, Trainer


def config(method: str, dropout: float) -> Any:
    """Return PEFT's configuration of a method."""
    kind: dict[str, Any] = {"task_type": peft.TaskType.SEQ_CLS}
    if method == "lora":
        return peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], lora_dropout=dropout, **kind)
    if method == "ia3":
        return peft.IA3Config(
            target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], **kind
        )
    if method == "prompt":
        return peft.PromptTuningConfig(num_virtual_tokens=10, **kind)
    if method == "bitfit":
        return None
    raise SystemExit(f"PEFT has no {method}")


def build(given: Any, folder: str, method: str) -> Any:
    """Return a base with a new adapter and a new head."""
    names = common.label_names(folder)
    model = AutoModelForSequenceClassification.from_pretrained(given.base, num_labels=len(names), **trainers.NO_DROPOUT)
    chosen = config(method, given.dropout)
    if chosen is None:  # biases, without PEFT: the model's own parameters
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("bias" in name or "classifier" in name)
        return model
    return peft.get_peft_model(model, chosen)


def train(given: Any, tokenizer: Any, folder: str, method: str) -> tuple[Any, common.Timer, int]:
    """Train once; return the model, the times and the number of rows."""
    model = build(given, folder, method)
    rows = trainers.Encoded(common.read(folder, "train"), common.label_names(folder), tokenizer, given.max_length)
    with tempfile.TemporaryDirectory() as work:
        timer = trainers.run(Trainer, model, given, tokenizer, rows, work)
    return model, timer, len(rows) * given.epochs


def score(given: Any, model: Any, tokenizer: Any, folder: str) -> float:
    """Return the accuracy on the test rows."""
    rows = trainers.Encoded(common.read(folder, "test"), common.label_names(folder), tokenizer, given.max_length)
    return trainers.accuracy(model, rows, tokenizer)


def main() -> None:
    """Train and answer."""
    given, before, tokenizer = common.begin()
    train(given, tokenizer, given.warm, given.method)
    jobs = (
        [text.split(":") for text in given.jobs.split(",")] if given.jobs else [[given.method, given.folder, given.lr]]
    )
    total, count, scores = common.Timer(), 0, []
    for method, folder, lr in jobs:
        given.lr, given.folder = float(lr), folder
        model, timer, rows = train(given, tokenizer, folder, method)
        total.wall, total.cpu, count = total.wall + timer.wall, total.cpu + timer.cpu, count + rows
        scores += [score(given, model, tokenizer, folder)] if given.score else []
    common.answer(before, total, count, **({"accuracy": sum(scores) / len(scores)} if scores else {}))


if __name__ == "__main__":
    main()
