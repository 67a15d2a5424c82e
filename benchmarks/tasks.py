"""Every kind of task with the defaults: the adapter against the base's own score, with a paired test.

    python benchmarks/tasks.py --data ../shared/data --tasks mrpc,rte,stsb
    python benchmarks/tasks.py --summary

Every run appends one line to benchmarks/results/tasks.jsonl; runs that are there already are skipped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import onebase as ob

RESULTS = Path(__file__).parent / "results" / "tasks.jsonl"
TASKS = "rte,mrpc,tvseries_fr,unfair_tos,cola,stsb,imdb,banking77"


def known() -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run_one(base: ob.Base, source: Path, method: str, seed: int) -> dict[str, Any]:
    """Train one adapter with the defaults and score it beside the base."""
    began = time.perf_counter()
    run = ob.train(base, source, method, seed=seed)
    base.remove(run.name)
    test = run.test
    return {
        "data": source.name, "method": method, "seed": seed, "kind": run.kind, "metric": run.metric,
        "base": run.base_value, "value": run.value, "base_interval": run.base_interval, "interval": run.interval,
        "difference": None if test is None else test.difference, "p": None if test is None else test.p_value,
        "difference_interval": None if test is None else (test.low, test.high),
        "metrics": {k: v for k, v in run.metrics.items() if isinstance(v, float)},
        "share": run.share, "epochs": len(run.history.epochs) - 1, "best": run.history.best,
        "rows_per_second": run.history.rows / run.history.seconds, "seconds": time.perf_counter() - began,
    }  # fmt: skip


def summary() -> None:
    """Print a line per run."""
    for row in known():
        low, high = row.get("difference_interval") or (float("nan"),) * 2
        notes = "" if low * high > 0 else " (within the noise)"
        notes += f", pairs {row['pairs']}" if "pairs" in row else ""
        print(
            f"{row['data']:12} {row['method']:10} seed {row['seed']} {row['metric']:10} base {row['base']:.4f} adapter "
            f"{row['value']:.4f} difference {low:+.4f} to {high:+.4f}{notes}"
        )


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--methods", default="lora", help="separated by ;")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--base", default="minilm")
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        return summary()
    base = ob.load_base(args.base)
    for task in args.tasks.split(","):
        for method in args.methods.split(";"):
            for seed in range(args.seeds):
                key = task, method, seed
                if key in {(r["data"], r["method"], r["seed"]) for r in known() if r.get("pairs") != "joint"}:
                    continue
                row = run_one(base, args.data / task, method, seed)
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    return None


if __name__ == "__main__":
    main()
