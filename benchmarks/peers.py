"""Training beside other libraries: time, memory and accuracy on the same rows, steps and base.

    python benchmarks/peers.py --data DATA --quick --hub ~/hub-env --threads 2      # some minutes
    python benchmarks/peers.py --data DATA --hub ~/hub-env --threads 2 --epochs 3   # hours: accuracy as well

Who: onebase; PEFT with the Trainer of transformers, as its users start it (float32, batches in random order, padded to
their longest row) and tuned (bfloat16 autocast, lengths grouped); AdapterHub's `adapters` with its AdapterTrainer, in
an environment that this script makes (`--hub FOLDER`); and a loop written by hand with batches of similar lengths, in
float32 and bfloat16. All train on the same rows, 32 per step, with AdamW, the same rate, its rise and fall, clipping,
and no dropout in the base. Speed is that of the given steps after others were made to warm up. Every measured run is a
process of its own; runs take turns in rounds, and ratios are those of neighbours in a round.

Writes results/peers.json with every single run, results/peers.md and results/peers.svg.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from against import drawing, figures
from against.environment import make_environment

HERE = Path(__file__).parent
WARM_STEPS, ROWS = 3, 32
RESULT = "RESULT "


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        method: of the adapters; '' for many jobs.
        data: folder of the data set.
        max_length: tokens per row.
        lr: for everybody.
    """

    method: str
    data: str
    max_length: int
    lr: float


CASES = {
    "lora-sst2": Case("lora", "sst2", 128, 2e-3),
    "bottleneck-sst2": Case("bottleneck", "sst2", 128, 1e-3),
    "lora-imdb": Case("lora", "imdb", 256, 2e-3),
    "bottleneck-imdb": Case("bottleneck", "imdb", 256, 1e-3),
    "sixteen": Case("", "", 128, 0.0),
}
TASKS = ("cr", "sst2", "subj", "trec6")
METHODS = {"lora": 2e-3, "ia3": 3e-3, "prompt": 5e-2, "bitfit": 1e-3}  # what PEFT, or plain torch, can train as well


@dataclass(frozen=True)
class Who:
    """A worker with its options.

    Attributes:
        script: in `against/`.
        options: of it.
        methods: that it has.
    """

    script: str
    options: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("lora", "bottleneck")


EVERYBODY = {
    "onebase": Who("ours"),
    "PEFT, as started": Who("peft_trainer", (), ("lora",)),
    "PEFT, bf16, grouped": Who("peft_trainer", ("--bf16", "--grouped"), ("lora",)),
    "AdapterHub, as started": Who("adapterhub"),
    "AdapterHub, bf16, grouped": Who("adapterhub", ("--bf16", "--grouped")),
    "by hand, sorted": Who("by_hand"),
    "by hand, sorted, bf16": Who("by_hand", ("--bf16",)),
}
SIXTEEN = {
    "onebase, one pass": Who("ours", ("--joint",)),
    "onebase, one by one": Who("ours"),
    "PEFT, one by one": Who("peft_trainer"),
    "PEFT, one by one, bf16, grouped": Who("peft_trainer", ("--bf16", "--grouped")),
}


def people(case: str) -> dict[str, Who]:
    """Return who takes part in a case."""
    if case == "sixteen":
        return SIXTEEN
    return {name: who for name, who in EVERYBODY.items() if CASES[case].method in who.methods}


# -- what workers read -------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{"text": row["text"], "label": row["label"]} for row in csv.DictReader(file)]


def write(folder: Path, splits: dict[str, list[dict[str, str]]]) -> str:
    """Write splits as CSV files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ("text", "label"))
            writer.writeheader()
            writer.writerows(rows)
    return str(folder)


def some(rows: list[dict[str, str]], count: int, seed: int) -> list[dict[str, str]]:
    """Return random rows, among them one of every label."""
    rows = rows[:]
    random.Random(seed).shuffle(rows)
    first = {row["label"]: i for i, row in reversed(list(enumerate(rows)))}
    ahead = sorted(first.values())
    return [rows[i] for i in ahead] + [row for i, row in enumerate(rows) if i not in set(ahead)][: count - len(ahead)]


def cut(data: Path, work: Path, steps: int, seed: int) -> tuple[str, str]:
    """Write the rows that speed is measured on, and those to warm up with; validation and test are a handful."""
    splits = {split: read(data / f"{split}.csv") for split in ("train", "validation", "test")}
    few = {split: some(splits[split], 16, seed) for split in ("validation", "test")}
    timed = write(work / f"{data.name}-{steps}", {"train": some(splits["train"], steps * ROWS, seed), **few})
    warm = write(work / f"{data.name}-warm", {"train": some(splits["train"], WARM_STEPS * ROWS, seed + 1), **few})
    return timed, warm


def save_base(work: Path) -> str:
    """Write the embedded base as a plain checkpoint that every library reads."""
    import onebase as ob

    folder = work / "base"
    with ob.load_base("minilm", dtype="float32") as base:
        base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    return str(folder)


# -- measuring ---------------------------------------------------------------------------------------------------------


class Bench:
    """Starts workers and collects what they answer.

    Args:
        given: arguments of the command.
        work: folder for what workers read.
    """

    def __init__(self, given: argparse.Namespace, work: Path):
        self.given, self.work, self.base = given, work, save_base(work)
        self.hub = None if given.hub is None else make_environment(Path(given.hub).expanduser())
        self.found: list[dict[str, Any]] = []

    def call(self, who: Who, options: list[str]) -> dict[str, Any]:
        """Run one worker to its end; raises with its output where it fails."""
        python = self.hub if who.script == "adapterhub" else sys.executable
        threads = str(self.given.threads)
        command = [str(python), str(HERE / "against" / f"{who.script}.py"), *options, *who.options]
        command += ["--base", self.base, "--threads", threads, "--dropout", str(self.given.dropout)]
        environment = os.environ | {
            "OMP_NUM_THREADS": threads,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if who.script == "adapterhub":
            environment.pop("PYTHONPATH", None)
        # its home is a folder of its own, so that a choice measured before is not found again
        environment["ONEBASE_HOME"] = str(self.work / "home")
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
        if done.returncode or not lines:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(lines[-1][len(RESULT) :])

    def keep(self, kind: str, case: str, name: str, number: int, found: dict[str, Any]) -> None:
        """Remember a result and say it."""
        self.found.append({"kind": kind, "case": case, "who": name, "round": number, **found})
        seconds = found[figures.CLOCKS[self.given.clock]]
        more = f", accuracy {found['accuracy']:.4f}" if "accuracy" in found else ""
        print(f"{kind} {case} {number} {name}: {seconds:.2f} s, {found['peak_mib']:.0f} MiB{more}", flush=True)

    def present(self, case: str) -> dict[str, Who]:
        """Return who is measured: AdapterHub only where there is an environment for it."""
        everybody = people(case).items()
        chosen = {name: who for name, who in everybody if who.script != "adapterhub" or self.hub is not None}
        wanted = [name for name in self.given.who.split(";") if name]
        return {name: who for name, who in chosen.items() if not wanted or name in wanted}

    def options(self, case: str, steps: int | None) -> list[str]:
        """Return a worker's options for a case; `steps` None: all rows."""
        about, data = CASES[case], Path(self.given.data).expanduser()
        if case == "sixteen":
            limit = self.given.limit if steps is None else min(steps * ROWS, self.given.limit)
            folders = {task: cut(data / task, self.work, -(-limit // ROWS), 0) for task in TASKS}
            if steps is None:  # scored on all test rows
                for task in TASKS:
                    write(Path(folders[task][0]), {s: read(data / task / f"{s}.csv") for s in ("validation", "test")})
            jobs = ",".join(f"{m}:{folders[task][0]}:{lr}" for task in TASKS for m, lr in METHODS.items())
            chosen = ["--jobs", jobs, "--folder", folders["sst2"][0], "--warm", folders["sst2"][1]]
            return [*chosen, "--method", "lora", "--lr", "2e-3", "--max-length", str(about.max_length)]
        timed, warm = cut(data / about.data, self.work, steps or WARM_STEPS, 0)
        folder = str(data / about.data) if steps is None else timed
        return [
            "--folder", folder, "--warm", warm, "--method", about.method, "--lr", str(about.lr),
            "--max-length", str(about.max_length),
        ]  # fmt: skip

    def steps(self, case: str) -> int:
        """Return how many steps of a case are timed."""
        long = case.endswith("imdb") or case == "sixteen"
        return max(2, self.given.steps // self.given.shorter) if long else self.given.steps

    def speed(self, case: str) -> None:
        """Measure time and memory in rounds."""
        options, present = self.options(case, self.steps(case)), self.present(case)
        for number in range(self.given.rounds):
            names = list(present)
            random.Random(number).shuffle(names)  # who comes after whom
            for name in names:
                self.keep("speed", case, name, number, self.call(present[name], options))

    def accuracy(self, case: str) -> None:
        """Train on all rows for as many epochs and score the test rows."""
        options = self.options(case, None)
        for seed in range(self.given.seeds):
            for name, who in self.present(case).items():
                more = ["--epochs", str(self.given.epochs), "--score", "--seed", str(seed)]
                self.keep("accuracy", case, name, seed, self.call(who, [*options, *more]))

    def peak(self) -> dict[str, float]:
        """Return the rates of this machine's matrix products, GFLOP/s by dtype."""
        import peak
        import torch

        torch.set_num_threads(self.given.threads)
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        return {name: round(peak.peak(384, 1536, dtype, self.given.threads), 1) for name, dtype in dtypes.items()}

    def operations(self, case: str) -> float | None:
        """Return the floating-point operations of a case's measured rows, padding not counted."""
        from peak import training_flops
        from transformers import AutoConfig, AutoTokenizer

        if case == "sixteen":
            return None
        options = self.options(
            case, self.given.steps if "imdb" not in case else max(2, self.given.steps // self.given.shorter)
        )
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        texts = [row["text"] for row in read(Path(options[1]) / "train.csv")]
        ids = tokenizer(texts, truncation=True, max_length=CASES[case].max_length)["input_ids"]
        return training_flops(AutoConfig.from_pretrained(self.base), [len(row) for row in ids], CASES[case].method)


def facts(given: argparse.Namespace) -> dict[str, Any]:
    """Return where and how it was measured."""
    from importlib.metadata import version

    return {
        "base": "minilm", "rows_per_step": ROWS, "steps": given.steps, "rounds": given.rounds, "threads": given.threads,
        "clock": given.clock, "dropout": given.dropout, "epochs": given.epochs, "machine": platform.machine(),
        "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }  # fmt: skip


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of data sets: sst2, imdb, cr, subj, trec6")
    parser.add_argument("--hub", help="folder of the environment for `adapters`; made where it is missing")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--who", default="", help="names between semicolons; everybody by default")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps that are timed")
    parser.add_argument("--rows", type=int, help="the same in rows")
    parser.add_argument("--shorter", type=int, default=3, help="texts of imdb, and jobs: so many times fewer steps")
    parser.add_argument("--limit", type=int, default=960, help="rows of each of the sixteen jobs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=0, help="measure accuracy after so many epochs; 0: do not")
    parser.add_argument("--seeds", type=int, default=3, help="of accuracy")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA and bottleneck; the base has none")
    parser.add_argument("--clock", choices=list(figures.CLOCKS), default="wall", help="cpu where a machine is busy")
    parser.add_argument("--quick", action="store_true", help="9 steps, one round: below 10 minutes on two cores")
    parser.add_argument("--out", default=str(HERE / "results"), help="folder of the results")
    given = parser.parse_args()
    if given.quick:
        given.steps, given.rounds = 9, 1
    given.steps = given.steps if given.rows is None else -(-given.rows // ROWS)
    if unknown := set(given.cases.split(",")) - set(CASES):
        raise SystemExit(f"--cases: no {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return given


def main() -> None:
    """Measure, write, draw."""
    given = parse()
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(given, Path(work))
        cases = given.cases.split(",")
        peaks = bench.peak()
        for case in cases:
            bench.speed(case)
        if given.epochs:
            for case in cases:
                bench.accuracy(case)
        operations = {case: bench.operations(case) for case in cases}
    found = {"facts": facts(given), "peak_gflops": peaks, "operations": operations, "runs": bench.found}
    summary = figures.summary(found)
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "peers.json").write_text(json.dumps({"summary": summary, **found}, indent=1) + "\n")
    (out / "peers.md").write_text(figures.table(summary, found["facts"]))
    drawing.draw(summary, out / "peers.svg")
    print((out / "peers.md").read_text())


if __name__ == "__main__":
    main()
