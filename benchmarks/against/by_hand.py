"""Worker: a training loop written by hand, with batches of similar lengths: what is left without any library.

Batches of 32 are cut from the rows sorted by length, and come in random order. LoRA and bottleneck are modules put in
the place of the base's own. Attention is what transformers takes by default.
"""

from __future__ import annotations

from typing import Any

import common
import torch
from torch import Tensor, nn
from transformers import AutoModel, get_linear_schedule_with_warmup


class LoRALinear(nn.Module):
    """A frozen linear map with a low-rank change beside it."""

    def __init__(self, inner: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.inner, self.scale, self.drop = inner, alpha / rank, nn.Dropout(dropout)
        self.down = nn.Linear(inner.in_features, rank, bias=False)
        self.up = nn.Linear(rank, inner.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., d_out)."""
        return self.inner(x) + self.up(self.down(self.drop(x))) * self.scale


class Behind(nn.Module):
    """A frozen linear map with a bottleneck behind it."""

    def __init__(self, inner: nn.Linear, size: int, dropout: float):
        super().__init__()
        self.inner, self.drop = inner, nn.Dropout(dropout)
        self.down, self.up = nn.Linear(inner.out_features, size), nn.Linear(size, inner.out_features)
        nn.init.normal_(self.down.weight, std=1e-2)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., d_out)."""
        h = self.inner(x)
        return h + self.up(nn.functional.gelu(self.down(self.drop(h))))


class Classifier(nn.Module):
    """A frozen BERT with an adapter, mean pooling and a linear head."""

    def __init__(self, given: Any, labels: int):
        super().__init__()
        self.body = AutoModel.from_pretrained(given.base, add_pooling_layer=False).requires_grad_(False)
        self.head = nn.Linear(self.body.config.hidden_size, labels)
        for layer in self.body.encoder.layer:
            if given.method == "lora":
                own = layer.attention.self
                own.query = LoRALinear(own.query, 8, 16, given.dropout)
                own.value = LoRALinear(own.value, 8, 16, given.dropout)
            elif given.method == "bottleneck":
                for part in (layer.attention.output, layer.output):
                    part.dense = Behind(part.dense, 32, given.dropout)
                    part.LayerNorm.requires_grad_(True)
            else:
                raise SystemExit(f"not written by hand: {given.method}")
        for module in self.body.modules():  # the base's own dropout is off, as everywhere
            if type(module) is nn.Dropout and module.p == self.body.config.hidden_dropout_prob:
                module.p = 0.0
        for layer in self.body.encoder.layer:
            for module in layer.modules():
                if isinstance(module, (LoRALinear, Behind)):
                    module.drop.p = given.dropout
            layer.attention.self.dropout_prob = 0.0
        self.body.config.attention_probs_dropout_prob = 0.0

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits (B, labels)."""
        states = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
        real = mask[..., None].to(states.dtype)
        return self.head((states * real).sum(1) / real.sum(1))


def encoded(given: Any, tokenizer: Any, folder: str, split: str) -> tuple[list[list[int]], list[int]]:
    """Return token ids and label numbers."""
    names, rows = common.label_names(folder), common.read(folder, split)
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=given.max_length)["input_ids"]
    return ids, [names.index(row["label"]) for row in rows]


def batches(ids: list[list[int]], labels: list[int], size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return (ids, mask, labels) of rows of similar length."""
    order, found = sorted(range(len(ids)), key=lambda i: len(ids[i])), []
    for start in range(0, len(order), size):
        some = order[start : start + size]
        width = max(len(ids[i]) for i in some)
        padded = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in some])
        mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in some])
        found.append((padded, mask, torch.tensor([labels[i] for i in some])))
    return found


def train(given: Any, tokenizer: Any, folder: str) -> tuple[Classifier, common.Timer, int]:
    """Train once; return the model, the times and the number of rows."""
    ids, labels = encoded(given, tokenizer, folder, "train")
    model = Classifier(given, len(set(labels))).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": common.DECAY}, {"params": others, "weight_decay": 0.0}], lr=given.lr
    )
    ready = batches(ids, labels, common.ROWS)
    steps = len(ready) * given.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, max(1, round(common.WARMUP * steps)), steps)
    generator, timer = torch.Generator().manual_seed(given.seed), common.Timer()
    timer.start()
    for _ in range(given.epochs):
        for number in torch.randperm(len(ready), generator=generator).tolist():
            tokens, mask, wanted = ready[number]
            with torch.autocast("cpu", torch.bfloat16, enabled=given.bf16):
                logits = model(tokens, mask)
            nn.functional.cross_entropy(logits.float(), wanted).backward()
            nn.utils.clip_grad_norm_(trained, common.CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    timer.stop()
    return model, timer, len(ids) * given.epochs


@torch.no_grad()
def accuracy(given: Any, model: Classifier, tokenizer: Any, folder: str) -> float:
    """Return the share of the test rows that are labelled right."""
    model.eval()
    ids, labels = encoded(given, tokenizer, folder, "test")
    parts = batches(ids, labels, 64)
    return sum(int((model(tokens, mask).argmax(-1) == wanted).sum()) for tokens, mask, wanted in parts) / len(ids)


def main() -> None:
    """Train and answer."""
    given, before, tokenizer = common.begin()
    train(given, tokenizer, given.warm)
    model, timer, count = train(given, tokenizer, given.folder)
    score = {"accuracy": accuracy(given, model, tokenizer, given.folder)} if given.score else {}
    common.answer(before, timer, count, **score)


if __name__ == "__main__":
    main()
