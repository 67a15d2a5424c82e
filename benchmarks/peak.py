"""How fast this machine multiplies matrices of the sizes that training needs: the limit of every training loop.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/peak.py

A linear map of n tokens is a product (n, d_in) x (d_in, d_out); training a frozen map costs two of them, the value and
the gradient of its input. Rates are the best of several calls, in processor time of one thread or wall time of more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results" / "peak.json"
TOKENS = 1024  # of a micro-batch (onebase.devices.PACKED_TOKENS)
CALLS, REPEATS = 15, 4


def rate(m: int, k: int, n: int, dtype: torch.dtype, threads: int) -> float:
    """Return GFLOP/s of a product (m, k) x (k, n), weights stored as linear maps store them."""
    a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = float("inf")
    with torch.no_grad():
        for _ in range(CALLS):
            began = clock()
            for _ in range(REPEATS):
                torch.nn.functional.linear(a, b)
            best = min(best, (clock() - began) / REPEATS)
    return 2 * m * k * n / best / 1e9


def shapes(width: int, inner: int) -> dict[tuple[int, int], int]:
    """Return (d_in, d_out) of the maps of one layer, and how many of each there are: q, k, v, o; up; down."""
    return {(width, width): 4, (width, inner): 1, (inner, width): 1}


def peak(width: int, inner: int, dtype: torch.dtype, threads: int = 1, tokens: int = TOKENS) -> float:
    """Return GFLOP/s over the products of one layer, each as fast as it is alone."""
    work = {shape: count * shape[0] * shape[1] for shape, count in shapes(width, inner).items()}
    seconds = sum(flops / rate(tokens, *shape, dtype, threads) for shape, flops in work.items())
    return sum(work.values()) / seconds


def training_flops(config: Any, lengths: Iterable[int], method: str) -> float:
    """Return the floating-point operations that training on rows of these lengths needs, padding not counted.

    Args:
        config: of a BERT.
        lengths: tokens of the rows.
        method: 'lora' or 'bottleneck'. The first delta is in layer 0: no gradient goes below it.
    """
    lengths = list(lengths)
    n, d, inner, layers = sum(lengths), config.hidden_size, config.intermediate_size, config.num_hidden_layers
    maps = sum(count * i * o for (i, o), count in shapes(d, inner).items())
    # of layer 0: q, k and v read what is not trained; a bottleneck's first delta is behind o and behind attention
    below = 4 if method == "bottleneck" else 3
    linear = 2 * n * (2 * layers * maps - below * d * d)
    attention = sum(2 * 2 * length * length * d for length in lengths)  # of a layer: scores, and their use
    return linear + attention * (3 * layers - (2 if method == "bottleneck" else 0))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="*", default=(256, 512, 1024, 2048))
    parser.add_argument("--dry", action="store_true", help="write no result")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = table(given.width, given.inner, given.threads, given.tokens)
    print(json.dumps(found, indent=1))
    if not given.dry:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def table(width: int, inner: int, threads: int, tokens: Sequence[int]) -> dict[str, Any]:
    """Return rates by dtype and tokens."""
    facts = {
        "width": width, "inner": inner, "threads": threads, "machine": platform.machine(), "cores": os.cpu_count(),
        "torch": torch.__version__, "bf16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    }  # fmt: skip
    rates = {
        str(dtype).removeprefix("torch."): {
            str(n): {
                **{f"{i}x{o}": round(rate(n, i, o, dtype, threads), 1) for i, o in shapes(width, inner)},
                "layer": round(peak(width, inner, dtype, threads, n), 1),
            }
            for n in tokens
        }
        for dtype in (torch.float32, torch.bfloat16)
    }
    return {"gflops": rates, "facts": facts}


if __name__ == "__main__":
    main()
