"""Scores against plain PyTorch: LoRA written by hand on the transformers model, the same rows, start and settings.

And what is said about scores, against scipy and the formulas of textbooks, on the predictions that were kept.
"""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

import onebase as ob
from onebase.loading import embedded_folder
from onebase.training.loop import Reporter

CR = Path(__file__).parents[2] / "shared" / "data" / "cr"
PLACES = {  # of BERT's linear maps -> names of sites
    "attention.self.query": "attention/q", "attention.self.key": "attention/k", "attention.self.value": "attention/v",
    "attention.output.dense": "attention/o", "intermediate.dense": "mlp/up", "output.dense": "mlp/down",
}  # fmt: skip
RANK, ALPHA, SEED, BATCH, EPOCHS, LR, HEAD_LR, DECAY = 4, 8.0, 3, 16, 2, 2e-3, 1e-3, 0.01

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(embedded_folder() is None, reason="the embedded base is not installed (extra 'demo')"),
]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    """Real reviews where they are there, made ones elsewhere."""
    sizes = {"train": 64, "validation": 32, "test": 96}
    if CR.is_dir():
        texts = {split: (CR / f"{split}.csv").read_text(encoding="utf-8") for split in sizes}
        return {split: list(csv.DictReader(io.StringIO(texts[split])))[:n] for split, n in sizes.items()}
    words = [("lovely", "good"), ("fine", "good"), ("awful", "bad"), ("poor", "bad")]
    made = [{"text": f"The {i} rooms were {w}, I{' do not' * (i % 3 == 0)} come again.", "label": label}
            for i in range(80) for w, label in words]  # fmt: skip
    return {"train": made[:64], "validation": made[64:96], "test": made[96:192]}


class Keeps(Reporter):
    """Keeps the adapter as it is after every epoch."""

    def __init__(self, base: ob.Base):
        self.base, self.kept = base, []

    def epoch(self, entry: dict[str, float]) -> None:
        (adapter,) = self.base.adapters.values()
        self.kept.append(adapter.snapshot())


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    """Return a run of this package, its base, what its adapter started from and was after every epoch."""
    folder = tmp_path_factory.mktemp("rows")
    for split, many in rows.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(many)
    base = ob.load_base("minilm", dtype="float32")
    base.add("start", ob.LoRA(rank=RANK, alpha=ALPHA), seed=SEED)
    start = {site: delta.A.detach().clone() for site, delta in base.adapters["start"].module.items()}
    base.remove("start")
    keeps = Keeps(base)
    done = ob.train(
        base, folder, ob.LoRA(rank=RANK, alpha=ALPHA), lr=LR, head_lr=HEAD_LR, epochs=EPOCHS, batch_size=BATCH,
        weight_decay=DECAY, seed=SEED, patience=0, dtype="float32", attention="eager", report=keeps,
    )  # fmt: skip
    return done, base, start, keeps.kept


class HandLoRA(nn.Module):
    """``W x + alpha / r B A x`` beside a frozen linear map."""

    def __init__(self, own: nn.Linear, a: torch.Tensor):
        super().__init__()
        self.own, self.A = own, nn.Parameter(a.clone())
        self.B = nn.Parameter(torch.zeros(own.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x) + (x @ self.A.T) @ self.B.T * (ALPHA / RANK)


def by_hand(rows, start, own_head, labels) -> list[tuple[float, torch.Tensor]]:
    """Train with plain PyTorch; return after every epoch its mean loss and the logits of the test rows."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    model = AutoModel.from_pretrained(embedded_folder(), dtype=torch.float32, attn_implementation="eager").eval()
    model.requires_grad_(False)
    maps = []
    for number, layer in enumerate(model.encoder.layer):
        for path, part in PLACES.items():
            parent = layer.get_submodule(path.rpartition(".")[0])
            new = HandLoRA(layer.get_submodule(path), start[f"encoder/{number}/{part}"])
            setattr(parent, path.rpartition(".")[2], new)
            maps.append(new)
    weight = nn.Parameter(own_head["weight"].clone())
    bias = nn.Parameter(own_head["bias"].clone())

    def logits(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        mean = (states * mask).sum(1) / mask.sum(1)
        return (mean - own_head["center"]) * own_head["scale"] @ weight.T + bias

    low = [p for m in maps for p in (m.A, m.B)]
    optimizer = torch.optim.AdamW([
        {"params": low, "lr": LR, "weight_decay": DECAY},
        {"params": [weight], "lr": HEAD_LR, "weight_decay": DECAY},
        {"params": [bias], "lr": HEAD_LR, "weight_decay": 0.0},
    ])  # fmt: skip
    rates = [group["lr"] for group in optimizer.param_groups]
    texts = [row["text"] for row in rows["train"]]
    targets = torch.tensor([labels.index(row["label"]) for row in rows["train"]])
    steps = EPOCHS * math.ceil(len(texts) / BATCH)
    warm, step, order, found = max(1, round(0.1 * steps)), 0, torch.Generator().manual_seed(SEED), []
    for _ in range(EPOCHS):
        total = 0.0
        places = torch.randperm(len(texts), generator=order)
        for batch in places.split(BATCH):
            factor = min((step + 1) / warm, (steps - step) / max(1, steps - warm))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
            loss = F.cross_entropy(logits([texts[i] for i in batch]), targets[batch])
            total += float(loss.detach()) * len(batch)
            loss.backward()
            nn.utils.clip_grad_norm_([*low, weight, bias], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        with torch.no_grad():
            found.append((total / len(texts), torch.cat([logits([row["text"]]) for row in rows["test"]])))
    return found


def test_final_logits_are_those_of_plain_pytorch(rows, run) -> None:
    done, base, start, kept = run
    adapter = base.adapters[done.name]
    own = {name: t.detach() for name, t in adapter.base_head.state_dict().items()}
    texts, best = [row["text"] for row in rows["test"]], adapter.snapshot()
    epochs = zip(kept, done.history.epochs[1:], by_hand(rows, start, own, adapter.labels), strict=True)
    try:
        for tensors, entry, (loss, expected) in epochs:
            assert entry["loss"] == pytest.approx(loss, abs=1e-4)
            adapter.put(tensors)
            for answer, logits in zip(base.predict(texts, done.name), expected, strict=True):
                found = [answer.probabilities[label] for label in adapter.labels]
                margin = math.log(found[1] / found[0])  # of two labels the margin is all that the chances tell
                assert margin == pytest.approx(float(logits[1] - logits[0]), abs=1e-4)
    finally:
        adapter.put(best)


def test_what_is_said_of_a_run_is_scipys(rows, run) -> None:
    from onebase.evaluation import evaluate_examples
    from onebase.examples import encode_rows

    done, base, _, kept = run
    adapter = base.adapters[done.name]
    adapter.put(kept[-1])  # of few rows the start may be kept, which answers as the base does
    data = ob.load_data(rows["train"] + rows["test"], text="text", label="label")
    found = evaluate_examples(base, done.name, encode_rows(base, adapter.task, data.train), "train")
    gold = [str(label) for label in data.train.label]
    right = [p.label == g for p, g in zip(base.predict(list(data.train.text), done.name), gold, strict=True)]
    assert found.adapter.value == pytest.approx(np.mean(right))
    wilson = stats.binomtest(sum(right), len(right)).proportion_ci(0.95, method="wilson")
    assert found.adapter.interval == pytest.approx((wilson.low, wilson.high))
    before = found.base.correct
    fixed = sum(new and not old for old, new in zip(before, right))
    broken = sum(old and not new for old, new in zip(before, right))
    assert (found.test.fixed, found.test.broken) == (fixed, broken) and fixed + broken
    assert found.test.p_value == pytest.approx(stats.binomtest(fixed, fixed + broken).pvalue)
    assert found.test.difference == pytest.approx((fixed - broken) / len(right))


def test_what_is_said_of_a_comparison_follows_from_its_records(rows, tmp_path) -> None:
    """Scores, intervals and Holm's p-values, computed again from the predictions in the records."""
    from onebase.comparison.running import document

    with ob.load_base("minilm", dtype="float32") as base:
        found = document(ob.compare(base, rows["train"] + rows["test"], folder=tmp_path, seeds=2, epochs=1,
                                    methods=["full", "lora", "bitfit"], budget=3600))  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    runs: dict[str, list[np.ndarray]] = {}
    for record in records:
        if record["stage"] == "final":
            runs.setdefault(record["method"], []).append(np.array(record["rows"]))
    results = {r["method"]: r for r in found["results"]}
    assert set(results) == set(runs) == {"full", "lora", "bitfit", "head only"}

    def drawn(many: list[np.ndarray], seed: int, draws: int = 4000) -> np.ndarray:
        draw = np.random.default_rng(seed)
        n, scores = len(many[0]), []
        for _ in range(draws):
            rows = draw.integers(0, n, n)
            scores.append(np.mean([many[i][rows].mean() for i in draw.integers(0, len(many), len(many))]))
        return np.array(scores)

    for method, many in runs.items():
        r = results[method]
        assert r["value"] == pytest.approx(np.mean([m.mean() for m in many]))
        low, high = np.quantile(drawn(many, 7), (0.025, 0.975))
        assert (r["low"], r["high"]) == pytest.approx((low, high), abs=0.02)  # both are simulations
    for key, against in (("p_full", "full"), ("p_best", found["results"][0]["method"])):
        others = [m for m in results if m != against]
        single = [results[m]["versus"][against][1] for m in others]
        order = np.argsort(single, kind="stable")
        adjusted = np.maximum.accumulate([min(1.0, (len(order) - i) * single[j]) for i, j in enumerate(order)])
        for rank, j in enumerate(order):
            assert results[others[j]][key] == pytest.approx(adjusted[rank])
    for method in ("lora", "bitfit", "head only"):  # the paired test, over one bootstrap of our own
        a, b, draw = runs["full"], runs[method], np.random.default_rng(11)
        n, differences = len(a[0]), []
        for _ in range(4000):
            rows = draw.integers(0, n, n)
            one = np.mean([a[i][rows].mean() for i in draw.integers(0, len(a), len(a))])
            differences.append(np.mean([b[i][rows].mean() for i in draw.integers(0, len(b), len(b))]) - one)
        p = min(1.0, 2 * (1 + min(np.sum(np.array(differences) <= 0), np.sum(np.array(differences) >= 0))) / 4001)
        assert results[method]["versus"]["full"][1] == pytest.approx(p, abs=0.05)
