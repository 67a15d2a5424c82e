"""Quality of the default recipes against full fine-tuning: the same rows, batches, start of the head and stopping.

    python benchmarks/quality.py --data ../shared/data --tasks cr,trec6 --methods "lora;bottleneck;full" --seeds 3
    python benchmarks/quality.py --summary

Every run appends one line to benchmarks/results/quality.jsonl, with the bits of the test rows that it got right; runs
that are there already are skipped. Full fine-tuning searches its learning rate on validation with seed 0 and then uses
the best one for every seed. The summary tests each method against it, over seeds and rows, Holm-adjusted over tasks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import onebase as ob
from onebase.methods.registry import parse_method
from onebase.statistics import holm, paired_seeds
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
        "right": packed(run.scores.adapter.correct),
    }  # fmt: skip


def packed(right: Sequence[bool]) -> str:
    """Write which rows were answered right: how many rows, then a digit of base 16 for four of them."""
    return f"{len(right)}:{np.packbits(np.asarray(right, bool)).tobytes().hex()}"


def unpacked(text: str) -> np.ndarray:
    """Read what `packed` wrote: (rows,) of 0 and 1."""
    count, bits = text.split(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))[: int(count)].astype(float)


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
    against_full(table)


def against_full(table: dict[tuple[str, str, str], list[dict[str, Any]]]) -> None:
    """Print the paired test of each method against full fine-tuning at its best rate, where rows are recorded."""
    whole: dict[str, list[dict[str, Any]]] = {}
    for (data, method, _), rows in table.items():
        if method == "full" and len(rows) > len(whole.get(data, ())):
            whole[data] = rows
    for method in sorted({name for _, name, _ in table} - {"full"}):
        tests = {}
        for (data, name, _), rows in sorted(table.items()):
            if name == method and data in whole and all(row.get("right") for row in (*rows, *whole[data])):
                full, own = ([unpacked(row["right"]) for row in some] for some in (whole[data], rows))
                tests[data] = paired_seeds(full, own, draws=10_000)
        adjusted = holm([test.p_value for test in tests.values()])
        for (data, test), p in zip(tests.items(), adjusted):
            print(f"{data:12} {method} against full: {100 * test.difference:+.2f} points, p = {test.p_value:.3f}, "
                  f"{p:.3f} over {len(tests)} tasks")  # fmt: skip


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
