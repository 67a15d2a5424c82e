"""What a batch of many adapters costs: 64 rows with an adapter each against the base alone.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/forward.py              # all cases, writes results/forward.json
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/forward.py --only lora --loop --dry
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/forward.py --spread --dry   # bank or loop, by rows per adapter

Cases: a method each; `loaded`, 1,000 adapters of which none, or one, is routed: forward, switching, adding, removing;
`memory`, what they take beyond their tensors' bytes; `peft`, the same mixed batch in PEFT.

Times are processor time of the one thread, so that what else the machine does counts little; calls of the compared
variants take turns. A result is the median of the ratios of neighbours, with their quartiles. `--loop` takes the banks
away, to show what they are worth.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import onebase as ob
from onebase.base import Base
from onebase.core import bank, plan

RESULTS = Path(__file__).parent / "results" / "forward.json"
ROWS, TOKENS, ADAPTERS, LOADED = 64, 54, 64, 1000
PREFIX = 10  # virtual tokens of prompts and prefixes


def turns(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Call the variants in turn; return seconds per call of each."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    return seconds


def ratio(over: list[float], under: list[float]) -> dict[str, float]:
    """Return the median of the ratios of neighbouring calls, and their quartiles."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under)], n=4)
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def milliseconds(seconds: list[float]) -> float:
    """Return the median in milliseconds."""
    return round(statistics.median(seconds) * 1e3, 4)


def inputs(tokens: int) -> dict[str, torch.Tensor]:
    """Return unpadded rows of random words."""
    ids = torch.randint(1000, 20000, (ROWS, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def add_all(base: Base, method: str, count: int) -> list[str]:
    """Attach adapters with values away from their start."""
    names = [f"a{i}" for i in range(count)]
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in base.add(name, method, seed=seed).parameters():
                parameter.add_(0.005 * torch.randn(parameter.shape, generator=generator))
    return names


def extra_columns(base: Base, batch: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """Return a call of the base with one fixed block of extra keys and values in every layer: what PREFIX columns cost.

    Written without onebase: a bare attention function that joins the block to keys and values, mask ready made.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = base.model.config
    heads, dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    block = torch.randn(ROWS, heads, PREFIX, dim, dtype=base.model.dtype)
    mask = torch.ones(ROWS, 1, TOKENS, TOKENS + PREFIX, dtype=torch.bool)
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: Any, query: Any, key: Any, value: Any, _: Any, **kw: Any) -> Any:
        return original(module, query, torch.cat([block, key], 2), torch.cat([block, value], 2), mask, **kw)

    ALL_ATTENTION_FUNCTIONS.register("bench_columns", attend)

    def call() -> Any:
        before, config._attn_implementation_internal = config._attn_implementation, "bench_columns"
        try:
            return base.model(**batch)
        finally:
            config._attn_implementation_internal = before

    return call


def mixed(base: Base, method: str, rounds: int, rows_each: int = 1) -> dict[str, Any]:
    """Measure one method: every row its own adapter, in shuffled order."""
    names = add_all(base, method, ADAPTERS // rows_each)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).tolist()
    route = [names[i // rows_each] for i in order]
    batch, longer = inputs(TOKENS), inputs(TOKENS + PREFIX)

    def routed() -> Any:
        with base.use(route):
            return base.model(**batch)

    variants: dict[str, Callable[[], Any]] = {"base": lambda: base.model(**batch), "mixed": routed}
    if method.startswith("prompt"):
        variants["tokens"] = lambda: base.model(**longer)
    if method.startswith("prefix"):
        variants["tokens"] = extra_columns(base, batch)
    seconds = turns(variants, rounds)
    for name in names:
        base.remove(name)
    found: dict[str, Any] = {"over_base": ratio(seconds["mixed"], seconds["base"])}
    if "tokens" in seconds:
        found["extra_tokens_over_base"] = ratio(seconds["tokens"], seconds["base"])
        found["over_extra_tokens"] = ratio(seconds["mixed"], seconds["tokens"])
    found["ms"] = {name: milliseconds(values) for name, values in seconds.items()}
    return found


def many_loaded(base: Base, method: str, rounds: int, count: int) -> dict[str, Any]:
    """Measure what adapters cost that are only loaded: adding, removing, switching, the plain base, and one of them."""
    batch = inputs(TOKENS)
    add_seconds: list[float] = []
    with Base(load().model) as plain, Base(load().model) as few:
        few.add("a0", method)
        for number in range(count):
            start = time.thread_time()
            base.add(f"a{number}", method)
            add_seconds.append(time.thread_time() - start)
        ways = {"plain": lambda: plain.model(**batch), "loaded": lambda: base.model(**batch)}
        ways |= {"one of one": lambda: one(few, batch), "one of many": lambda: one(base, batch)}
        seconds = turns(ways, rounds)
    switch: list[float] = []
    for i in range(2000):
        start = time.thread_time()
        with base.use(f"a{(i * 7) % count}"):
            switch.append(time.thread_time() - start)
    remove: list[float] = []
    for number in range(count):
        start = time.thread_time()
        base.remove(f"a{number}")
        remove.append(time.thread_time() - start)
    return {
        "loaded_over_plain": ratio(seconds["loaded"], seconds["plain"]),
        "one_of_1000_over_one_of_one": ratio(seconds["one of many"], seconds["one of one"]),
        "add_first_100_ms": milliseconds(add_seconds[1:100]),
        "add_last_100_ms": milliseconds(add_seconds[-100:]),
        "add_worst_of_last_100_ms": round(max(add_seconds[-100:]) * 1e3, 4),
        "switch_us": round(statistics.median(switch) * 1e6, 2),
        "remove_with_1000_loaded_ms": milliseconds(remove[:100]),
    }


def one(base: Base, batch: dict[str, torch.Tensor]) -> Any:
    """Call with one adapter on all rows."""
    with base.use("a0"):
        return base.model(**batch)


def memory(base: Base, method: str, count: int) -> dict[str, Any]:
    """Measure what many adapters take in the process beyond the bytes of their tensors."""
    base.add("first", method)  # taps and whatever else comes with the first one
    gc.collect()
    before, size = resident(), 0
    for number in range(count):
        size += sum(t.numel() * t.element_size() for t in base.add(f"a{number}", method).tensors().values())
    gc.collect()
    taken = resident() - before
    return {
        "adapters": count, "mib": round(taken / 2**20, 1), "tensors_mib": round(size / 2**20, 1),
        "over_tensors": round(taken / size, 4), "kib_beside_tensors": round((taken - size) / count / 2**10, 1),
    }  # fmt: skip


def resident() -> int:
    """Return the bytes of memory that this process has (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def in_peft(base: Base, rounds: int) -> dict[str, Any]:
    """Measure the mixed LoRA batch here and in PEFT, whose mixed batches are LoRA's alone."""
    import peft
    from transformers import AutoModel

    names = add_all(base, CASES["lora"], ADAPTERS)
    route = [names[i] for i in torch.randperm(ROWS, generator=torch.Generator().manual_seed(1)).tolist()]
    with tempfile.TemporaryDirectory() as folder:
        base.model.save_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config, adapter_name=names[0]).eval()
    for name in names[1:]:
        theirs.add_adapter(name, config)
    batch = inputs(TOKENS)

    def routed() -> Any:
        with base.use(route):
            return base.model(**batch)

    ways = {"base": lambda: base.model(**batch), "mixed": routed, "peft": lambda: theirs(**batch, adapter_names=route)}
    seconds = turns(ways, rounds)
    for name in names:
        base.remove(name)
    return {
        "over_base": ratio(seconds["mixed"], seconds["base"]),
        "peft_over_base": ratio(seconds["peft"], seconds["base"]),
        "peft_over_mixed": ratio(seconds["peft"], seconds["mixed"]),
        "ms": {name: milliseconds(values) for name, values in seconds.items()},
    }


def spread(base: Base, rounds: int) -> dict[str, Any]:
    """Compare bank and loop by rows per adapter, rows shuffled: where COPIES comes from."""
    found = {}
    for method in ("lora(rank=8, sites='paper')", "bottleneck(size=64, norms=False)"):
        for each in (2, 4, 8, 16):
            plan.COPIES, kept = 64, plan.COPIES
            found[f"{method} {each} rows each"] = {"bank": mixed(base, method, rounds, each)["over_base"]}
            plan.COPIES = kept
            with looping():
                found[f"{method} {each} rows each"]["loop"] = mixed(base, method, rounds, each)["over_base"]
            print(json.dumps(list(found.items())[-1]), flush=True)
    return found


class looping:
    """Take the banks away for a while."""

    def __enter__(self) -> None:
        self.known = dict(bank._SAME)
        for cls in self.known:
            bank._SAME[cls] = False

    def __exit__(self, *error: object) -> None:
        bank._SAME.update(self.known)


def load() -> Base:
    """Load the base under test."""
    base = ob.load_base("minilm")
    base.model.to(torch.bfloat16)
    return base


CASES = {
    "lora": "lora(rank=8, sites='paper')",
    "bottleneck": "bottleneck(preset='houlsby', size=64)",
    "prefix": f"prefix(length={PREFIX}, init='random')",
    "prompt": f"prompt(length={PREFIX}, init='uniform')",
    "ia3": "ia3",
    "bitfit": "bitfit",
}


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases, separated by commas; also 'loaded', 'memory', 'peft'")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--loop", action="store_true", help="without banks")
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--loaded", type=int, default=LOADED, help="adapters of the cases loaded and memory")
    parser.add_argument("--dry", action="store_true", help="write no result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base, found = load(), {}
    wanted = args.only.split(",") if args.only else [*CASES, "loaded", "memory", "peft"]
    with torch.no_grad():
        if args.spread:
            found["spread"] = spread(base, args.rounds)
            wanted = []
        for case in wanted:
            if case == "loaded":
                found[case] = many_loaded(base, CASES["lora"], args.rounds, args.loaded)
            elif case == "memory":
                found[case] = {name: memory(load(), CASES[name], args.loaded) for name in ("lora", "bottleneck")}
            elif case == "peft":
                found[case] = in_peft(base, args.rounds)
            elif args.loop:
                mixed(base, CASES[case], 1)  # meets the classes
                with looping():
                    found[case] = mixed(base, CASES[case], args.rounds)
            else:
                found[case] = mixed(base, CASES[case], args.rounds)
            print(case, json.dumps(found[case]), flush=True)
    if not args.dry:
        write(found, "loop" if args.loop else "bank", args.rounds)


def write(found: dict[str, Any], key: str, rounds: int) -> None:
    """Put results beside those that are there."""
    facts = {
        "base": "minilm", "dtype": "bfloat16", "rows": ROWS, "tokens": TOKENS, "adapters": ADAPTERS, "threads": 1,
        "rounds": rounds, "time": "processor time", "machine": platform.machine(), "cores": os.cpu_count(),
        "torch": torch.__version__,
    }  # fmt: skip
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[key] = {**known.get(key, {}), **found}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**known, "facts": facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
