"""``python -m onebase.support [FAMILY ...]``: sweep every text class, write docs/support.md; fails on wrong answers.

Classes run in a worker process with limits on its time and memory, so that one that hangs or dies costs only itself.
With names, only these are tried, their answers are printed, and nothing is written.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SECONDS = 40  # of processor time for one class: several classes of two layers still have towers of full size
MEMORY = 12 << 30  # bytes of address space of the worker
PAGE = Path(__file__).parents[3] / "docs" / "support.md"


class TooSlow(BaseException):
    """A class used up its time; no `Exception`, so that nothing on the way takes it for a refusal."""


def work(names: list[str]) -> None:
    """Try classes one after the other and print one JSON line for each."""
    import resource
    import signal
    import warnings

    import torch
    import transformers

    from onebase.support.trial import Trial, as_plain, attempt

    def stop(*_: Any) -> None:
        raise TooSlow

    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(50)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, stop)
    for name in names:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            trial = attempt(name)
        except TooSlow:
            trial = Trial(name, reason=f"not built: it takes more than {SECONDS} s")
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("RESULT " + json.dumps(as_plain(trial)), flush=True)


def sweep(names: list[str]) -> Iterator[Any]:
    """Yield one trial per class; a worker that dies is replaced, and its class is noted."""
    from onebase.support.trial import Trial

    todo = list(names)
    while todo:
        command = [sys.executable, "-m", "onebase.support", "--work", *todo]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert worker.stdout is not None
        for line in worker.stdout:
            if line.startswith("RESULT "):
                found = json.loads(line[7:])
                todo.remove(found["model_type"])
                yield Trial(**{**found, "padding": tuple(found["padding"])})
        if worker.wait() and todo:
            yield Trial(todo.pop(0), reason="not built: the process died")


def main(names: list[str]) -> int:
    """Sweep; return the exit code."""
    import transformers

    from onebase.support.page import render
    from onebase.support.shrink import text_types
    from onebase.support.trial import tried

    trials = []
    for trial in sweep(names or text_types()):
        trials.append(trial)
        shown = trial.reason or ", ".join(f"{m}: {answer}" for m, answer in trial.methods.items())
        print(f"{trial.model_type} ({trial.source or 'none'}) {shown}", flush=True)
        for wrong in trial.wrong:
            print(f"  WRONG {wrong}", flush=True)
    if not names:
        PAGE.write_text(render(trials, tried(), transformers.__version__), encoding="utf-8")
    return 1 if any(trial.wrong for trial in trials) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2:])
    else:
        sys.exit(main(sys.argv[1:]))
