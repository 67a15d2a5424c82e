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
from pathlib import Path
from typing import Any

import onebase as ob
from onebase.methods.registry import parse_method
from onebase.training.full import RATES, Full, trained_whole
from onebase.training.settings import settings_for

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"


def run_one(base: ob.Base, data: Any, method: str, seed: int, **settings: Any) -> dict[str, Any]:
    """Train and score one adapter, or the whole base."""
    began = time.perf_counter()
    if method == "full":
        with trained_whole(base, data, seed=seed, **settings) as run:
            pass
        assert run.value != run.base_value or run.history.best == 0, "the base did not move"
    else:
        run = ob.train(base, data, method, seed=seed, **settings)
        base.remove(run.name)
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
    chosen = Full() if method == "full" else parse_method(method)
    lr = settings_for(chosen, settings, base.anatomy.hidden_size).lr  # a recipe may have changed
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
                tried = [once(base, data, method, 0, lr=lr, **settings) for lr in RATES]
                best = max(tried, key=lambda row: row["validation"])["lr"]
                for seed in range(args.seeds):
                    once(base, data, method, seed, lr=best, **settings)
                continue
            for seed in range(args.seeds):
                once(base, data, method, seed, **settings)
    return None


if __name__ == "__main__":
    main()
