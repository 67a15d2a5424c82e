"""What is saved below the first delta: many adapters on one text, and epochs of an adapter in the upper layers.

    python benchmarks/trunk.py --data ../shared/data/cr

One CPU thread, the embedded base. Rounds are interleaved; each figure is a median with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import onebase as ob
from onebase.core.anchor import Anchor

RESULTS = Path(__file__).parent / "results" / "trunk.json"
ADAPTERS, WORDS = 50, 120
UPPER = "lora(sites='re:encoder/[45]/')"


def spread(values: list[float]) -> list[float]:
    """Return the lower quartile, the median and the upper one."""
    return [round(value, 4) for value in statistics.quantiles(values, n=4)]


def interleaved(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return processor seconds of each way, the first round left out."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.process_time()
            way()
            if number:
                taken[name].append(time.process_time() - began)
    return taken


def one_text(rounds: int) -> dict[str, Any]:
    """Measure many adapters on one text, with and without a shared trunk, and the plain base on it once."""
    with ob.load_base("minilm", dtype="float32") as base:
        names = [f"a{i}" for i in range(ADAPTERS)]
        for i, name in enumerate(names):
            base.add(name, UPPER, seed=i)
        text = " ".join(["The", "room", "was", "warm", "and", "quiet"] * (WORDS // 6))
        original = Anchor._may_share

        def ask() -> list[Any]:
            return base.predict([text] * ADAPTERS, names, batch_size=ADAPTERS)

        def ask_apart() -> list[Any]:
            Anchor._may_share = lambda *_: False  # type: ignore[method-assign]
            try:
                return ask()
            finally:
                Anchor._may_share = original  # type: ignore[method-assign]

        pairs = zip(ask(), ask_apart())
        gap = max(float((a.embedding - b.embedding).abs().max()) for a, b in pairs)  # type: ignore[operator]
        found = interleaved({"shared": ask, "apart": ask_apart, "base": lambda: base.predict([text])}, rounds)
        ratios = [b / a for a, b in zip(found["shared"], found["apart"])]
        return {"gap": gap, "faster": spread(ratios), **{name: spread(values) for name, values in found.items()}}


def epochs(data: str, rounds: int, count: int) -> dict[str, Any]:
    """Measure training of an adapter in the two upper layers, with states kept and computed anew."""
    loaded = ob.load_data(data)
    last: dict[str, Any] = {}
    with ob.load_base("minilm", dtype="float32") as base:

        def train(keep: int) -> Callable[[], None]:
            def way() -> None:
                run = ob.train(base, loaded, UPPER, keep_mb=keep, epochs=count, patience=0, seed=1)
                base.remove(run.name)
                last["kept" if keep else "anew"] = run

            return way

        found = interleaved({"kept": train(1024), "anew": train(0)}, rounds)
        runs = {name: {"value": run.value, "loss": run.history.epochs[-1]["loss"]} for name, run in last.items()}
        ratios = [b / a for a, b in zip(found["kept"], found["anew"])]
        return {
            "epochs": count, "faster": spread(ratios), **{name: spread(values) for name, values in found.items()},
            "runs": runs, "kept_states": last["kept"].history.notes["kept"],
            "kernels": {name: run.history.notes["kernels"] for name, run in last.items()},
        }  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {"one_text": one_text(4 * given.rounds), "training": epochs(given.data, given.rounds, given.epochs)}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
