"""The process that trains for a server: settings come on stdin as one JSON object, progress leaves as JSON lines.

A process of its own, because a training step would hold the server's base and its threads. It loads the base a second
time. The server reads the lines; what it does with them is in `training.py`.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from onebase.training.loop import Reporter

LINES = 0.2  # seconds between two lines of steps: a person reads no faster


class JsonLines(Reporter):
    """Progress as one JSON object a line."""

    def __init__(self, stream: Any):
        self.stream, self.last, self.steps = stream, 0.0, 0

    def say(self, event: str, **facts: Any) -> None:
        """Write one line."""
        self.stream.write(json.dumps({"event": event, **facts}, default=float) + "\n")
        self.stream.flush()

    def start(self, steps: int, epochs: int) -> None:
        """Say how long it will be."""
        self.steps = steps
        self.say("start", steps=steps, epochs=epochs)

    def step(self, step: int, loss: float, rows_per_second: float, seconds_left: float) -> None:
        """Say the loss, not more often than a person reads; the last step always."""
        import time

        now = time.monotonic()
        if now - self.last >= LINES or step == self.steps:
            self.last = now
            self.say("step", step=step, loss=loss, rows_per_second=rows_per_second, seconds_left=seconds_left)

    def epoch(self, entry: dict[str, float]) -> None:
        """Say the scores of an epoch."""
        self.say("epoch", scores=entry)

    def note(self, text: str) -> None:
        """Pass a sentence on."""
        self.say("note", text=text)


def run(spec: dict[str, Any], report: JsonLines) -> None:
    """Train one adapter and store it.

    Args:
        spec: base, data, method, name, and any setting of `onebase.train`.
        report: where progress goes; the last event is ``done``.
    """
    import transformers

    from onebase.data import load
    from onebase.loading import load_base
    from onebase.training import train

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base_name, source = spec.pop("base"), spec.pop("data")
    columns = {role: spec.pop(role) for role in ("text", "label") if spec.get(role)}
    data = load(source, seed=spec.get("seed", 0), **columns)
    report.say("data", rows={"train": len(data.train), "validation": len(data.validation), "test": len(data.test)})
    report.say("phase", phase="Loading the base")
    with load_base(base_name) as base:
        report.say("phase", phase="Computing the base's own score")
        run = train(base, data, spec.pop("method"), name=spec.pop("name"), report=report, **spec)
        report.say(
            "done",
            ref=run.ref, method=run.method, metric=run.metric, split=run.split, score=run.value,
            base_score=run.base_value, interval=run.interval, base_interval=run.base_interval,
            sentence=run.test.sentence() if run.test else None, parameters=run.parameters, bytes=run.bytes,
            seconds=run.history.seconds,
        )  # fmt: skip


def main() -> int:
    """Train what stdin says."""
    from onebase.errors import OnebaseError

    if hasattr(os, "nice"):
        os.nice(10)  # answers come first
    stream, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not break the lines
    report = JsonLines(stream)
    try:
        run(json.loads(sys.stdin.readline()), report)
    except OnebaseError as error:
        report.say("failed", message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
