"""What all workers share: their arguments, the rows, the clock, the memory, and the line they answer with.

A worker is a process of its own, because the peak of a process's memory never falls and one library needs another
transformers. It reads plain files, trains, and prints one JSON line. Nothing here imports onebase.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

ROWS = 32  # per optimizer step, for everybody
WARMUP, DECAY, CLIP = 0.1, 0.01, 1.0  # share of the steps, weight decay, largest norm: for everybody


def arguments() -> argparse.Namespace:
    """Read what the driver asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True, help="train.csv, validation.csv and test.csv")
    parser.add_argument("--warm", required=True, help="the same with few rows, trained on before")
    parser.add_argument("--base", required=True, help="folder of the base")
    parser.add_argument("--method", required=True, help="lora, bottleneck, ia3, prompt, prefix")
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapter; the base has none anywhere")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--grouped", action="store_true", help="batches of similar lengths")
    parser.add_argument("--score", action="store_true", help="answer with the accuracy on the test rows, too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", default="", help="several jobs, METHOD:FOLDER:LR each, separated by commas")
    parser.add_argument("--joint", action="store_true", help="the jobs in one pass")
    return parser.parse_args()


def begin() -> tuple[argparse.Namespace, float, Any]:
    """Read the arguments, set threads and seed, and load the tokenizer; call it when everything is imported.

    Returns:
        The arguments, MiB resident now, and the tokenizer.
    """
    import torch
    from transformers import AutoTokenizer

    given = arguments()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    before = resident()
    return given, before, AutoTokenizer.from_pretrained(given.base)


def read(folder: str, split: str) -> list[dict[str, str]]:
    """Return the rows of a split, with a text and a label."""
    with (Path(folder) / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def label_names(folder: str) -> list[str]:
    """Return the labels of a data set, sorted."""
    return sorted({row["label"] for row in read(folder, "train")})


class Timer:
    """Wall and processor seconds between `start` and the last `stop`."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.began: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        """Begin."""
        self.began = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """Take the time; another `stop` later counts from the same start."""
        self.wall, self.cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]


def resident(key: str = "VmRSS") -> float:
    """Return MiB of this process: resident now, or its peak (``VmHWM``). Linux alone tells."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def answer(before: float, timer: Timer, rows: int, **more: Any) -> None:
    """Print the result.

    Args:
        before: MiB resident after the imports.
        timer: of the training alone.
        rows: rows that were trained on meanwhile.
        more: further facts.
    """
    found = {
        "seconds": timer.wall, "cpu_seconds": timer.cpu, "rows": rows, "steps": -(-rows // ROWS),
        "peak_mib": resident("VmHWM") - before, **more,
    }  # fmt: skip
    print("RESULT " + json.dumps(found), flush=True)
