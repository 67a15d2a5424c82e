"""What each process of tests/test_processes.py runs: a case by name, its tensors written to a file by the first one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "contract"))
from families import make, tiny_tokenizer

import onebase as ob
from onebase import processes
from onebase.store import Store
from onebase.training.job import JobState
from onebase.training.loop import Reporter
from onebase.training.shard import shard

WORDS = ["cold", "river", "old", "bridge", "road", "small", "bird", "tall", "tree", "rain"]
# 27 training rows and steps of 5 or 6: shares are uneven, and the last step of an epoch has fewer rows than processes
ROWS = [{"text": " ".join(WORDS[(i * k) % 10] for k in range(1, 4 + i % 5)), "label": "xy"[i % 2]} for i in range(33)]
PAIRS = [{"prompt": WORDS[i % 10], "completion": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 3])} for i in range(31)]
NEAR = [{"anchor": f"{a} {b}", "positive": f"{b} {a} rain"} for a in WORDS[:5] for b in WORDS[5:]]
EXACT = {"attention": "keep", "dtype": "float32", "patience": 0, "restore": "best", "lr": 1e-3, "batch_size": 6}
SINGLE = {
    "classification": ("bert", ROWS, "lora(rank=2, dropout=0.5)", {}),
    "last": ("bert", ROWS, "bottleneck(size=3)", {"batch_size": 5, "accumulate": 5}),
    "one-row": ("bert", ROWS, "lora(rank=2)", {"batch_size": 1}),
    "completion": ("llama", PAIRS, "lora(rank=2)", {}),
    "union": ("bert", ROWS, "prefix(length=2)+lora(rank=2)", {}),
    "adalora": ("bert", ROWS, "adalora(rank=2, target=1)", {}),
    "dora": ("llama", ROWS, "dora(rank=2)", {}),
    "hira": ("llama", ROWS, "hira(rank=2)", {}),
    "prompt": ("llama", ROWS, "prompt(length=2)", {}),
    "checkpointed": ("bert", ROWS, "bottleneck(size=3)", {"checkpointing": True}),
    "embeddings": ("bert", NEAR, "lora(rank=2)", {"cache_tokens": 64}),
}


class Stop(Reporter):
    """Stops the first process at a step."""

    def __init__(self, at: int):
        self.at = at

    def step(self, step: int, *_: float) -> None:
        """Stop."""
        if step == self.at:
            raise KeyboardInterrupt


STARTS: dict[str, dict[str, torch.Tensor]] = {}
LAST: dict[str, torch.Tensor] = {}  # of the last step: the epoch that is kept may be the start
MOVED: list[float] = []


def in_double() -> None:
    """Let adapters be trained in float64, so that the order of sums hardly shows, and keep their last values."""
    begin, end = JobState.__init__, JobState.end

    def double(self, base, adapter, *given) -> None:
        adapter.module.double()
        begin(self, base, adapter, *given)
        STARTS[adapter.name] = adapter.snapshot()

    def keep(self) -> None:
        last, start = self.adapter.snapshot(), STARTS[self.adapter.name]
        LAST.update({f"{self.adapter.name}.{key}": t for key, t in last.items()})
        MOVED.append(max(float((last[key] - start[key]).abs().max()) for key in last))
        end(self)

    JobState.__init__, JobState.end = double, keep


def base_of(family: str, double: bool = True) -> ob.Base:
    """Return a tiny random base; the same in every process."""
    torch.manual_seed(0)
    return ob.Base(make(family).double() if double else make(family), tiny_tokenizer())


def single(case: str, out: Path, split: bool = False, **more) -> dict[str, torch.Tensor]:
    """Train one adapter and store it."""
    family, rows, method, settings = SINGLE[case]
    with base_of(family) as base:
        if split:
            shard(base)
        given = {"epochs": 4, **EXACT, **settings, **more}
        run = ob.train(base, rows, method, name=case, store=Store(out / "store"), seed=1, **given)
        assert run.ref == f"{case}@1" and run.bytes > 0
        about = {"value": torch.tensor([run.value, run.base_value]), "steps": torch.tensor([float(run.history.steps)])}
        return LAST | about


def many(out: Path) -> dict[str, torch.Tensor]:
    """Train several adapters in one pass, one of which couples the rows of a step."""
    with base_of("bert") as base:
        given = {**EXACT, "epochs": 3}
        jobs = [
            ob.Job(ROWS, "lora(rank=2)", "a", seed=1, **given),
            ob.Job(ROWS, "bottleneck(size=3)", "b", seed=2, **{**given, "batch_size": 1, "epochs": 1}),
            ob.Job(NEAR, "lora(rank=2)", "c", seed=3, **given),
        ]
        runs = ob.train_many(base, jobs, store=Store(out / "store"))
        assert all(run.ref == f"{run.name}@1" for run in runs)
        return LAST


def interrupted(out: Path, at: int) -> dict[str, torch.Tensor]:
    """Go on with a run that was stopped; dropout is drawn again as in one that was not."""
    with base_of("bert") as base:
        given = {**EXACT, "epochs": 3, "save_steps": 2, "seed": 1, "store": Store(out / "store"), "name": "r"}
        if at:
            ob.train(base, ROWS, "lora(rank=2, dropout=0.5)", report=Stop(at), **given)
        ob.train(base, ROWS, "lora(rank=2, dropout=0.5)", resume=True, **given)
        return LAST


def main(case: str, out: Path, *more: str) -> None:
    """Run a case; the first process writes what it gave."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    in_double()
    if case == "many":
        found = many(out)
    elif case == "interrupted":
        found = interrupted(out, int(more[0]))
    else:
        found = single(case, out, split="shard" in more and processes.launched() > 1)
    assert min(MOVED) > 1e-3, MOVED
    if processes.rank() == 0:
        save_file({key: t.contiguous() for key, t in found.items()}, out / "tensors.safetensors")
    processes.leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
