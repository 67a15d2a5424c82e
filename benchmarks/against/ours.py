"""Worker: onebase, through its public functions, with its defaults for everything that is not set for everybody."""

from __future__ import annotations

from typing import Any

import common
import pandas  # noqa: F401  what onebase imports when it is needed: memory is read after the imports of all workers
import sklearn.linear_model  # noqa: F401
import torch
import transformers  # noqa: F401
from scipy import optimize, stats  # noqa: F401

import onebase as ob
from onebase.training.loop import Reporter

METHODS = {
    "lora": "lora(rank=8, alpha=16, sites='paper', dropout={dropout})",
    "bottleneck": "bottleneck(preset='houlsby', size=32, dropout={dropout})",
    "ia3": "ia3",
    "prompt": "prompt(length=10)",
    "bitfit": "bitfit",
}


class Watch(Reporter):
    """Times from the start of training to its last step; scoring a handful of rows lies between."""

    def __init__(self) -> None:
        self.timer = common.Timer()
        self.kernels = ""

    def start(self, steps: int, epochs: int) -> None:
        """Begin."""
        self.timer.start()

    def note(self, text: str) -> None:
        """Keep what was chosen."""
        if text.startswith("computing with"):
            self.kernels = text

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        """Take the time."""
        self.timer.stop()


def settings(given: Any, lr: float) -> dict[str, Any]:
    """Return what all runs are trained with."""
    return {
        "lr": lr, "epochs": given.epochs, "batch_size": common.ROWS, "warmup": common.WARMUP, "patience": 0,
        "weight_decay": common.DECAY, "clip": common.CLIP, "seed": given.seed, "max_length": given.max_length,
        "windows": False,  # the others cut long texts, so that all train on the same rows
    }  # fmt: skip


def one(base: ob.Base, given: Any, folder: str, method: str, lr: float) -> tuple[Watch, Any]:
    """Train one adapter."""
    watch = Watch()
    shorthand = METHODS[method].format(dropout=given.dropout)
    run = ob.train(base, folder, shorthand, report=watch, **settings(given, lr))
    base.remove(run.name)
    return watch, run


def many(base: ob.Base, given: Any, jobs: list[tuple[str, str, float]]) -> tuple[Watch, list[Any]]:
    """Train all jobs in one pass."""
    watch = Watch()
    chosen = [
        ob.Job(data=folder, method=METHODS[method].format(dropout=given.dropout), name=f"j{i}", **settings(given, lr))
        for i, (method, folder, lr) in enumerate(jobs)
    ]
    runs = ob.train_many(base, chosen, report=watch, save=False)
    for run in runs:
        base.remove(run.name)
    return watch, runs


def main() -> None:
    """Train and answer."""
    given = common.arguments()
    torch.set_num_threads(given.threads)
    before = common.resident()
    base = ob.load_base(given.base)
    if not given.jobs:
        one(base, given, given.warm, given.method, given.lr)
        watch, run = one(base, given, given.folder, given.method, given.lr)
        rows = run.history.rows
        score = {"accuracy": run.metrics["accuracy"], "base": run.base_metrics["accuracy"]} if given.score else {}
        common.answer(before, watch.timer, rows, kernels=watch.kernels, parameters=run.parameters, **score)
        return
    jobs = [(m, folder, float(lr)) for m, folder, lr in (text.split(":") for text in given.jobs.split(","))]
    total = common.Timer()
    if given.joint:
        many(base, given, [(m, given.warm, lr) for m, _, lr in jobs[:4]])
        watch, runs = many(base, given, jobs)
        total, watches = watch.timer, [watch]
    else:
        one(base, given, given.warm, given.method, given.lr)
        pairs = [one(base, given, folder, method, lr) for method, folder, lr in jobs]
        watches, runs = [watch for watch, _ in pairs], [run for _, run in pairs]
        total.wall, total.cpu = sum(w.timer.wall for w in watches), sum(w.timer.cpu for w in watches)
    rows = sum(run.history.rows for run in runs)
    score = {"accuracy": sum(run.metrics["accuracy"] for run in runs) / len(runs)} if given.score else {}
    common.answer(before, total, rows, kernels=watches[0].kernels, **score)


if __name__ == "__main__":
    main()
