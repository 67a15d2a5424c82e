"""Quality of the default recipes against full fine-tuning: the same rows, batches, start of the head and stopping.

    python benchmarks/quality.py --data ../shared/data --tasks cr,trec6 --methods "lora;bottleneck;full" --seeds 3
    python benchmarks/quality.py --summary

Every run appends one line to benchmarks/results/quality.jsonl; runs that are there already are skipped. Full
fine-tuning searches its learning rate on validation with seed 0 and then uses the best one for every seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import onebase as ob
from onebase.adapter import Adapter
from onebase.core.contracts import AdapterModule
from onebase.extend import Init, Method, Site, register, unregister
from onebase.methods.registry import parse_method
from onebase.tasks import get_task
from onebase.training import prepare as run_module
from onebase.training.settings import settings_for

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
FULL_RATES = (2e-5, 5e-5, 1e-4)


@register
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Full fine-tuning in the guise of a method, so that the very same loop trains it."""

    name: ClassVar[str] = "full"

    def select(self, sites: list[Site]) -> list[Site]:  # type: ignore[override]
        """Adapt no site: the base itself is trained."""
        return []

    def build(self, sites: list[Site], init: Init) -> AdapterModule:  # type: ignore[override]
        """Build nothing."""
        return AdapterModule({})


class FullAdapter(Adapter):
    """An adapter whose parameters are the base's own."""

    model: nn.Module

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield base and head."""
        yield from self.model.parameters()
        assert self.head is not None
        yield from self.head.parameters()

    def tensors(self) -> dict[str, Tensor]:
        """Return base and head."""
        return super().tensors() | {f"base.{n}": p.detach() for n, p in self.model.named_parameters()}

    def put(self, tensors: dict[str, Tensor]) -> None:  # type: ignore[override]
        """Restore base and head."""
        own = self.tensors()
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)


def run_one(base: ob.Base, data: Any, method: str, seed: int, **settings: Any) -> dict[str, Any]:
    """Train and score one adapter, or the whole base."""
    began = time.perf_counter()
    original = run_module.build_adapter
    start = [p.detach().clone() for p in base.model.parameters()] if method == "full" else []

    def build_full(base: ob.Base, name: str, method: Method, task: dict, seed: int, **_: Any) -> Adapter:
        adapter = FullAdapter(name, method, AdapterModule({}), task)
        adapter.model = base.model
        adapter.head = get_task(task["kind"]).head(task, base.anatomy.hidden_size)
        return adapter

    if method == "full":
        base.model.requires_grad_(True)
        run_module.build_adapter = build_full  # type: ignore[assignment]
    try:
        run = ob.train(base, data, method, seed=seed, **settings)
        base.remove(run.name)
    finally:
        run_module.build_adapter = original
        base.model.requires_grad_(False)
        with torch.no_grad():
            for parameter, value in zip(base.model.parameters(), start):
                parameter.copy_(value)
    return {
        "data": data.source, "method": method, "seed": seed, "settings": settings, "lr": run.settings.lr,
        "value": run.value, "base": run.base_value, "validation": max(e["accuracy"] for e in run.history.epochs),
        "share": run.share, "best": run.history.best, "epochs": len(run.history.epochs) - 1,
        "rows_per_second": run.history.rows / run.history.seconds, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def known() -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def once(base: ob.Base, data: Any, method: str, seed: int, **settings: Any) -> dict[str, Any]:
    """Return a finished run, or make it now."""
    lr = settings_for(parse_method(method), settings, base.anatomy.hidden_size).lr  # a recipe may have changed
    for row in known():
        found = (row["data"], row["method"], row["seed"], row["settings"], row["lr"])
        if found == (data.source, method, seed, settings, lr):
            return row
    row = run_one(base, data, method, seed, **settings)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)
    return row


def summary() -> None:
    """Print mean accuracy per task and method."""
    table: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in known():
        table.setdefault((row["data"], row["method"], json.dumps(row["settings"] | {"lr": row["lr"]})), []).append(row)
    for (data, method, settings), rows in sorted(table.items()):
        values = [row["value"] for row in rows]
        print(
            f"{data:12} {method:30} {settings:40} n={len(rows)} mean {statistics.mean(values):.4f} "
            f"base {rows[0]['base']:.4f} val {statistics.mean(r['validation'] for r in rows):.4f} "
            f"best {[r['best'] for r in rows]} {statistics.mean(r['rows_per_second'] for r in rows):.0f} rows/s"
        )


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", default="sst2,cr,subj,trec6")
    parser.add_argument("--methods", default="lora;bottleneck;full", help="separated by ;")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--set", action="append", default=[], help="training setting key=value")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        return summary()
    settings = {k: json.loads(v) for k, v in (pair.split("=", 1) for pair in args.set)}
    base = ob.load_base(args.base)
    for task in args.tasks.split(","):
        data = ob.load_data(args.data / task)
        for method in args.methods.split(";"):
            if method == "full" and "lr" not in settings:
                tried = [once(base, data, method, 0, lr=lr, **settings) for lr in FULL_RATES]
                best = max(tried, key=lambda row: row["validation"])["lr"]
                for seed in range(args.seeds):
                    once(base, data, method, seed, lr=best, **settings)
                continue
            for seed in range(args.seeds):
                once(base, data, method, seed, **settings)
    unregister("full")
    return None


if __name__ == "__main__":
    main()
