"""`--ray --workers N`: the same command in N workers of Ray Train, on this machine or a cluster.

Ray starts the workers and connects them; then they are the processes of `onebase.processes`, as under torchrun: each
runs this command line. What the first one prints comes back here, and its exit code is this program's. Data, base
and store are read by path, so on a cluster they are on a disk that all machines share.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from onebase.cli.failures import INTERRUPTED, UsageError
from onebase.clusters import connected, share

FLAGS, VALUED = ("--ray",), ("--workers",)
CARRIED = ("ONEBASE_", "HF_", "OMP_", "TRANSFORMERS_")  # of the environment
OVER = "exit"


def without(words: Sequence[str]) -> list[str]:
    """Return a command line without the options that start workers.

    Example:
        >>> without(["train", "--ray", "--workers", "2", "-d", "x.csv"])
        ['train', '-d', 'x.csv']
    """
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in VALUED:
            skip = True
        elif word not in FLAGS and not word.startswith(tuple(f"{name}=" for name in VALUED)):
            kept.append(word)
    return kept


def start(count: int) -> None:
    """Run this command line in `count` workers, and exit as the first one did.

    Raises:
        UsageError: Ray Train is not installed.
    """
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.util.queue import Queue
    except ImportError as error:
        raise UsageError(
            f"--ray needs a package that is not installed ({error.name}): pip install 'onebase[ray]'"
        ) from None
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    with connected(ray, logging.CRITICAL, {"RAY_USAGE_STATS_ENABLED": "0"}):
        have = ray.cluster_resources()
        cores, cards = share(have.get("CPU", 1.0), count), have.get("GPU", 0.0) >= count
        said, ends = Queue(actor_options={"num_cpus": 0}), list[int | None]()
        listener = threading.Thread(target=_listen, args=(said, ends), daemon=True)
        listener.start()
        environment = {name: value for name, value in os.environ.items() if name.startswith(CARRIED)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, int(cores))))
        failed: Exception | None = None
        with tempfile.TemporaryDirectory() as folder:
            trainer = TorchTrainer(
                _work,
                train_loop_config={
                    "words": without(sys.argv[1:]), "folder": os.getcwd(), "environment": environment, "said": said,
                },
                scaling_config=ScalingConfig(num_workers=count, use_gpu=cards, resources_per_worker={"CPU": cores}),
                torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cards else "gloo"),
                # Ray would print everything a second time
                run_config=RunConfig(
                    storage_path=folder, worker_runtime_env={"env_vars": {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}}
                ),
            )  # fmt: skip
            try:
                trainer.fit()
            except KeyboardInterrupt:
                raise typer.Exit(INTERRUPTED) from None
            except Exception as error:
                failed = error
        said.put((OVER, None))  # behind what the first worker said, its own end among it
        listener.join(10)
    code = ends[0] if ends else None
    if code is None and failed is not None:
        print(f"error: a worker of Ray failed: {str(failed).strip().splitlines()[-1]}", file=sys.stderr)
        code = 1
    if code:
        raise typer.Exit(code)


def _listen(said: Any, ends: list[int | None]) -> None:
    """Print what the first worker says until it is over; its exit code goes to `ends`, None where it gave none."""
    while True:
        where, what = said.get()
        if where == OVER:
            ends.append(what)
            return
        stream = sys.stdout if where == "stdout" else sys.stderr
        stream.write(what)
        stream.flush()


class _Sent(io.TextIOBase):
    """A text stream that hands on what is written, in whole lines."""

    def __init__(self, said: Any, name: str):
        self.said, self.name, self.held = said, name, ""

    def writable(self) -> bool:
        """Whether it can be written to: always."""
        return True

    def write(self, text: str) -> int:
        """Take text."""
        self.held += text
        if "\n" in self.held:
            whole, self.held = self.held.rsplit("\n", 1)
            self.said.put((self.name, f"{whole}\n"))
        return len(text)

    def finish(self) -> None:
        """Hand on what is left."""
        if self.held:
            self.said.put((self.name, self.held))


@contextmanager
def _speaking(said: Any) -> Iterator[None]:
    """Send what this process prints to whoever started the workers."""
    out, err = _Sent(said, "stdout"), _Sent(said, "stderr")
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        out.finish()
        err.finish()


def _work(given: dict[str, Any]) -> None:
    """Run the command in one worker; Ray has connected it to the others."""
    from contextlib import nullcontext

    from ray import train

    os.chdir(given["folder"])
    os.environ.update(given["environment"])
    first = train.get_context().get_world_rank() == 0
    sys.argv = ["onebase", *given["words"]]
    from onebase.cli.main import app

    code = 0
    with _speaking(given["said"]) if first else nullcontext():
        try:
            app(args=given["words"])
        except SystemExit as over:
            code = over.code if isinstance(over.code, int) else 1
    if first:
        given["said"].put((OVER, code))
    if code:
        raise RuntimeError(f"worker {train.get_context().get_world_rank()} ended with {code}")
