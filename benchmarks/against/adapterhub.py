"""Worker: the `adapters` library with its AdapterTrainer; runs in an environment of its own, with transformers 4."""

from __future__ import annotations

import tempfile
from typing import Any

import adapters
import common
import trainers


def config(method: str, dropout: float) -> Any:
    """Return the library's configuration of a method."""
    if method == "lora":
        return adapters.LoRAConfig(r=8, alpha=16, dropout=dropout, attn_matrices=["q", "v"])
    if method == "bottleneck":
        return adapters.DoubleSeqBnConfig(reduction_factor=12, dropout=dropout)  # 384 / 12 = 32 units
    raise SystemExit(f"not compared with: {method}")


def train(given: Any, tokenizer: Any, folder: str) -> tuple[Any, common.Timer, int]:
    """Train once; return the model, the times and the number of rows."""
    names = common.label_names(folder)
    model = adapters.AutoAdapterModel.from_pretrained(given.base, **trainers.NO_DROPOUT)
    model.add_adapter("one", config=config(given.method, given.dropout))
    model.add_classification_head("one", num_labels=len(names))
    model.train_adapter("one")
    rows = trainers.Encoded(common.read(folder, "train"), names, tokenizer, given.max_length)
    with tempfile.TemporaryDirectory() as work:
        timer = trainers.run(adapters.AdapterTrainer, model, given, tokenizer, rows, work)
    return model, timer, len(rows) * given.epochs


def main() -> None:
    """Train and answer."""
    given, before, tokenizer = common.begin()
    train(given, tokenizer, given.warm)
    model, timer, count = train(given, tokenizer, given.folder)
    score = {}
    if given.score:
        names = common.label_names(given.folder)
        rows = trainers.Encoded(common.read(given.folder, "test"), names, tokenizer, given.max_length)
        score = {"accuracy": trainers.accuracy(model, rows, tokenizer)}
    common.answer(before, timer, count, **score)


if __name__ == "__main__":
    main()
