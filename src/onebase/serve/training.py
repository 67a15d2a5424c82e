"""Training beside a server: one process at a time, its progress kept for whoever asks.

An adapter that was trained goes into the store the server reads, so it can be asked when it is done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

from onebase.errors import ConfigError, TrainingError, UnknownNameError, unknown
from onebase.serve.bodies import Body

SAMPLES = {
    "reviews": {
        "title": "Customer reviews, English and French",
        "rows": 871,
        "labels": ["negative", "neutral", "positive"],
        "task": "classification",
    }
}
KEPT = 20  # finished runs that are remembered
POINTS = 500  # of a loss curve; beyond that every second one goes
SECONDS_TO_STOP = 10.0


class TrainingRequest(Body):
    """What to train."""

    name: str = Field("reviews", min_length=1, max_length=64, description="Of the adapter in the store.")
    method: str = Field("lora", min_length=1, max_length=200, description="A method or its shorthand, lora(rank=16).")
    sample: str | None = Field(None, max_length=64, description="Data that come along; GET /v1/samples lists them.")
    csv: str | None = Field(None, description="Instead: a table with a line of column names.")
    text: str | None = Field(None, max_length=200, description="Column of the text; found by default.")
    label: str | None = Field(None, max_length=200, description="Column of the label; found by default.")
    epochs: int | None = Field(None, ge=1, le=50, description="Passes over the rows, at most.")
    lr: float | None = Field(None, gt=0, lt=10, description="Peak learning rate; the method's by default.")
    seed: int = Field(0, ge=0, lt=2**31)


class Training:
    """One run and everything known about it.

    Attributes:
        state: running, done, failed or cancelled.
    """

    def __init__(self, request: TrainingRequest):
        self.id = uuid.uuid4().hex[:12]
        self.request, self.state, self.created = request, "running", time.time()
        self.finished: float | None = None
        self.facts: dict[str, Any] = {
            "losses": [], "history": [], "notes": [], "phase": "Reading the data", "metrics": None,
            "base_metrics": None, "ref": None, "error": None,
        }  # fmt: skip
        self.stopping, self.lock, self.concluded = False, threading.Lock(), threading.Event()
        self.process: subprocess.Popen[str] | None = None
        self.folder: Path | None = None

    def plain(self) -> dict[str, Any]:
        """Return the run as JSON values."""
        with self.lock:
            facts = {key: list(value) if isinstance(value, list) else value for key, value in self.facts.items()}
        return {
            "id": self.id, "object": "training", "state": self.state, "name": self.request.name,
            "method": self.request.method, "created": self.created, "finished": self.finished, **facts,
        }  # fmt: skip

    def take(self, line: str) -> None:
        """Take one line of the process."""
        try:
            said = json.loads(line)
            event = said.pop("event")
        except (ValueError, KeyError, AttributeError, TypeError):
            return  # a library printed something
        with self.lock:
            if event == "start":
                self.facts |= {"total_steps": said["steps"], "total_epochs": said["epochs"], "phase": "Training"}
            elif event == "step":
                steps = self.facts["losses"]
                steps.append([said["step"], said["loss"]])
                self.facts |= {key: said[key] for key in ("rows_per_second", "seconds_left")}
                if len(steps) > POINTS:
                    del steps[1:-1:2]
            elif event == "epoch":
                scores = said["scores"]
                value = next((scores[name] for name in scores if name not in ("epoch", "loss", "train_loss")), None)
                step, loss = self.facts["losses"][-1] if self.facts["losses"] else (0, None)
                entry = {"epoch": scores.get("epoch"), "step": step, "loss": loss, "validation": value}
                self.facts["history"].append(entry | {"scores": scores})
            elif event == "note":
                self.facts["notes"].append(said["text"])
            elif event == "done":
                name, score, own = said["metric"], said.pop("score"), said.pop("base_score")
                self.facts |= {**said, "phase": "Done", "metrics": {name: score}, "base_metrics": {name: own}}
            elif event == "failed":
                self.facts["error"] = said["message"]
            else:
                self.facts |= said


class Trainings:
    """The runs of one server; one at a time.

    Args:
        base: what `load_base` takes: the base the server serves.
        home: ONEBASE_HOME of the store that is served; the environment's by default.
        done: called with name@version when an adapter was stored.
    """

    def __init__(self, base: str, home: str | Path | None = None, done: Callable[[str], None] | None = None):
        self.base, self.home, self.done = base, home, done
        self.runs: OrderedDict[str, Training] = OrderedDict()
        self.lock = threading.Lock()

    def start(self, request: TrainingRequest) -> Training:
        """Start a run.

        Raises:
            ConfigError: the request cannot be done.
            TrainingError: another run is going on.
            UnknownNameError: no method of this name.
        """
        self._check(request)
        with self.lock:
            going = [run for run in self.runs.values() if run.finished is None]
            if going:
                raise TrainingError(
                    f"{going[0].request.name!r} is being trained; one adapter is trained at a time: wait for it, or "
                    f"stop it (DELETE /v1/training/{going[0].id})"
                )
            run = Training(request)
            self.runs[run.id] = run
            for old in [key for key, one in self.runs.items() if one.finished is not None][:-KEPT]:
                del self.runs[old]
            run.process = self._spawn(run)
        threading.Thread(target=self._follow, args=(run,), name=f"training-{run.id}", daemon=True).start()
        return run

    def get(self, key: str) -> Training:
        """Return a run.

        Raises:
            UnknownNameError: no run of this id.
        """
        if key not in self.runs:
            raise UnknownNameError(f"no training {key!r}; GET /v1/training lists them")
        return self.runs[key]

    def stop(self, key: str) -> Training:
        """End a run; nothing of it is stored. A finished one is left as it is."""
        run = self.get(key)
        if run.finished is None and run.process is not None:
            run.stopping = True
            run.process.terminate()
            try:
                run.process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                run.process.kill()
            run.concluded.wait(SECONDS_TO_STOP)
        return run

    def close(self) -> None:
        """End whatever is going on."""
        for key in list(self.runs):
            self.stop(key)

    def _check(self, request: TrainingRequest) -> None:
        from onebase.methods.registry import parse_method
        from onebase.store.names import check_new_name

        check_new_name(request.name)
        parse_method(request.method)
        if (request.sample is None) == (request.csv is None):
            raise ConfigError("expected either sample or csv: GET /v1/samples lists the samples")
        if request.sample is not None and request.sample not in SAMPLES:
            raise unknown("sample", request.sample, SAMPLES)

    def _spawn(self, run: Training) -> subprocess.Popen[str]:
        import tempfile

        from onebase.demo.run import REVIEWS

        asked = run.request
        spec = asked.model_dump(exclude_none=True, exclude={"csv", "sample"}) | {"base": self.base}
        if asked.sample is not None:
            spec |= {"data": str(REVIEWS), "text": "text", "label": "label"}
            spec = {**_sample_settings(asked.method), **spec}
        else:
            run.folder = Path(tempfile.mkdtemp(prefix="onebase-training-"))
            (run.folder / "table.csv").write_text(asked.csv or "", encoding="utf-8")
            spec["data"] = str(run.folder / "table.csv")
        threads = max(1, (os.cpu_count() or 2) // 2)  # the other half answers
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if self.home is not None:
            environment["ONEBASE_HOME"] = str(self.home)
        process = subprocess.Popen(
            [sys.executable, "-m", "onebase.serve.training_process"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True,
            encoding="utf-8", errors="replace",
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(json.dumps(spec) + "\n")
        process.stdin.close()
        return process

    def _follow(self, run: Training) -> None:
        process, said = run.process, []
        assert process is not None and process.stdout is not None and process.stderr is not None
        errors = process.stderr
        reader = threading.Thread(target=lambda: said.extend(list(errors)[-20:]), daemon=True)
        reader.start()
        for line in process.stdout:
            run.take(line)
        code = process.wait()
        reader.join()
        for stream in (process.stdout, errors):
            stream.close()
        if run.folder is not None:
            import shutil

            shutil.rmtree(run.folder, ignore_errors=True)
        result = run.facts["ref"]
        if result is not None and self.done is not None:
            self.done(result)
        state = "done" if code == 0 and result else "cancelled" if run.stopping else "failed"
        if state == "failed" and run.facts["error"] is None:
            with run.lock:
                run.facts["error"] = f"the process ended with code {code}: " + "".join(said).strip()[-800:]
        run.state, run.finished = state, time.time()
        run.concluded.set()


def _sample_settings(method: str) -> dict[str, Any]:
    """Return the settings the demo trains a method with: the sample has few rows."""
    from onebase.demo.teach import SETTINGS
    from onebase.methods.registry import parse_method

    return {"patience": 0, **SETTINGS.get(parse_method(method).name, {})}
