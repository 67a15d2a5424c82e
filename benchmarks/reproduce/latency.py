"""Time of a call: the base, merged and attached LoRA, adapters, prefixes and prompts, by batch and length.

    python benchmarks/reproduce/latency.py

One thread; processor time of calls that are made in turn, so that a busy moment meets all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import COLOURS, Bench, Study, Verdict

METHODS = {
    "lora-qv": "lora(sites='paper')",
    "lora": "lora",
    "bottleneck": "bottleneck(norms=False)",
    "bottleneck-norms": "bottleneck",
    "prefix": "prefix(length=10)",
    "prompt": "prompt(length=10)",
}
MERGED = "lora-qv, merged"
STUDY = Study(
    "latency",
    "Latency of methods",
    "Adapter layers add latency where batches are small: on GPT-2 medium, 20.7 and 30.3 % for two kinds of adapters "
    "at one text of 128 tokens, and 2.2 and 3.0 % at 32 texts of 512. Merged LoRA adds none "
    "(Hu et al. 2021, arXiv 2106.09685, section 3 and table 1).",
    "An encoder on one CPU thread instead of a decoder on a GPU: here a small batch does not leave processors idle, so "
    "what is added is more of what is computed, not of what is waited for.",
)


def options() -> argparse.Namespace:
    """Read the options."""
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--base", default="minilm")
    found.add_argument("--batches", type=int, nargs="+", default=(1, 4, 16, 32))
    found.add_argument("--lengths", type=int, nargs="+", default=(16, 64, 128, 256))
    found.add_argument("--seeds", type=int, default=3, help="repetitions, each with other adapters and texts")
    found.add_argument("--rounds", type=int, default=7)
    found.add_argument("--out", type=Path, default=Path("docs/results"))
    given = found.parse_args()
    given.limit, given.epochs = None, 0
    return given


def calls(base: Any, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def plain() -> Any:
        return base.model(**inputs)

    def under(name: str) -> Callable[[], Any]:
        def call() -> Any:
            with base.use(name):
                return base.model(**inputs)

        return call

    return {"base": plain, **{name: under(name) for name in METHODS}}


def measure(base: Any, ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a call by name."""
    taken: dict[str, list[float]] = {name: [] for name in ("base", MERGED, *METHODS)}
    ways = calls(base, ids)
    with torch.no_grad():
        for number in range(rounds + 1):
            for name, way in ways.items():
                taken[name] += _timed(way)[bool(not number) :]
            base.merge("lora-qv")  # merged weights are the base's own call
            taken[MERGED] += _timed(ways["base"])[bool(not number) :]
            base.unmerge()
    return {name: 1000 * statistics.median(many) for name, many in taken.items()}


def _timed(way: Callable[[], Any]) -> list[float]:
    began = time.process_time()
    way()
    return [time.process_time() - began]


def main() -> None:
    """Measure and write."""
    torch.set_num_threads(1)
    given = options()
    bench = Bench(STUDY, given)
    vocabulary = bench.base.model.get_input_embeddings().weight.shape[0]
    for seed in range(given.seeds):
        for name, method in METHODS.items():
            bench.base.add(name, method, seed=seed)
            for parameter in bench.base.adapters[name].parameters():
                with torch.no_grad():  # as after training: zeros would be as fast, but are not what is served
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        for length in given.lengths:
            for batch in given.batches:
                facts = {"batch": batch, "length": length, "seed": seed}
                if not bench.has(facts):
                    ids = torch.randint(
                        1000, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed)
                    )
                    bench.add({**facts, "ms": measure(bench.base, ids, given.rounds)})
        for name in METHODS:
            bench.base.remove(name)
    cells = [(b, n) for n in given.lengths for b in given.batches]
    added = {cell: _added(bench, *cell) for cell in cells}
    table = [
        {"batch": b, "tokens": n, "base, ms": _base(bench, b, n), **{k: f"{v:+.1f} %" for k, v in added[b, n].items()}}
        for b, n in cells
    ]
    bench.write(verdicts(added, cells), table, draw(added, cells))


def _added(bench: Bench, batch: int, length: int) -> dict[str, float]:
    """Return per cent over the base by name, the median over repetitions."""
    rows = [row["ms"] for row in bench.find(batch=batch, length=length)]
    return {name: statistics.median(100 * (r[name] / r["base"] - 1) for r in rows) for name in (MERGED, *METHODS)}


def _base(bench: Bench, batch: int, length: int) -> float:
    return statistics.median(row["ms"]["base"] for row in bench.find(batch=batch, length=length))


def verdicts(added: dict[tuple[int, int], dict[str, float]], cells: list[tuple[int, int]]) -> list[Verdict]:
    """Judge the parts of the finding."""
    small, large = min(cells, key=lambda c: c[0] * c[1]), max(cells, key=lambda c: c[0] * c[1])
    merged = {cell: added[cell][MERGED] for cell in cells}
    middle = statistics.median(merged.values())
    one, many = added[small]["bottleneck"], added[large]["bottleneck"]
    return [
        Verdict(
            abs(middle) < 3,
            f"merged LoRA adds {middle:+.1f} % in the median cell, {min(merged.values()):+.1f} to "
            f"{max(merged.values()):+.1f} %",
        ),
        Verdict(
            one > many,
            f"a bottleneck adds {one:+.1f} % to {small[0]} x {small[1]} tokens and {many:+.1f} % to "
            f"{large[0]} x {large[1]}",
        ),
        Verdict(
            added[small]["lora-qv"] < one,
            f"LoRA on q and v, attached, adds {added[small]['lora-qv']:+.1f} % to {small[0]} x {small[1]} tokens",
        ),
    ]


def draw(added: dict[tuple[int, int], dict[str, float]], cells: list[tuple[int, int]]):
    """Draw per cent over the base by cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for number, name in enumerate((MERGED, *METHODS)):
        axes.plot(
            range(len(cells)),
            [added[cell][name] for cell in cells],
            marker="o",
            label=name,
            color=COLOURS[number % len(COLOURS)],
        )
    axes.set_xticks(range(len(cells)), [f"{b} x {n}" for b, n in cells], rotation=60)
    axes.set(xlabel="texts x tokens", ylabel="% over the base")
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.legend(fontsize=8, framealpha=0)
    return figure


if __name__ == "__main__":
    main()
