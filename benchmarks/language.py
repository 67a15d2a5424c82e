"""A language adapter under a task adapter (MAD-X, arXiv 2005.00052): French on an English base, with it and without.

    python benchmarks/language.py --data ../shared/data --blocks 600 --rows 600

The base is the embedded English one. The language adapter is trained on plain French text, by masked words, with a head
made of the base's own embeddings; then it is frozen, and task adapters are trained alone and on top of it, on the same
rows from the same start. One line per run goes to benchmarks/results/language.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import onebase as ob
from onebase.compose import stack

RESULTS = Path(__file__).parent / "results" / "language.jsonl"


def line(run: Any, began: float, **facts: Any) -> dict[str, Any]:
    """Return one result."""
    test = run.test
    return {
        **facts, "metric": run.metric, "base": run.base_value, "value": run.value, "interval": run.interval,
        "difference": None if test is None else test.difference, "epochs": len(run.history.epochs) - 1,
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip


def main() -> None:
    """Train the language adapter, then each task with it and without."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--text", default="novels_fr")
    parser.add_argument("--tasks", default="allocine_fr,tvseries_fr")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--language-method", default="lora(rank=16)")
    parser.add_argument("--blocks", type=int, help="most rows of plain text")
    parser.add_argument("--rows", type=int, help="most rows of each task")
    parser.add_argument("--epochs", type=int, help="of the language adapter")
    parser.add_argument("--seeds", type=int, default=1)
    words = parser.parse_args()
    torch.set_num_threads(1)
    base = ob.load_base("minilm")
    results = []

    def note(result: dict[str, Any]) -> None:
        results.append(result)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(result) + "\n")
        print(result, flush=True)

    began = time.perf_counter()
    text = words.data / words.text
    options = {} if words.epochs is None else {"epochs": words.epochs}
    run = ob.train(
        base, text, words.language_method, name="fr", task="masked-lm", max_length=128, limit=words.blocks, **options
    )
    note(line(run, began, data=words.text, method=words.language_method, blocks=words.blocks))
    for task in words.tasks.split(","):
        for seed in range(words.seeds):
            for method in (words.method, stack("fr", ob.parse_method(words.method))):
                began = time.perf_counter()
                run = ob.train(base, words.data / task, method, limit=words.rows, max_length=128, seed=seed)
                base.remove(run.name)
                shown = method if isinstance(method, str) else method.shorthand()
                note(line(run, began, data=task, method=shown, rows=words.rows, seed=seed))


if __name__ == "__main__":
    main()
