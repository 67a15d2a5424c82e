"""`--processes N`: the same command in N processes that train together, through torch's own launcher."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from onebase.cli.failures import INTERRUPTED, UsageError
from onebase.cli.output import Output

START_SECONDS = 1200  # as torchrun waits for processes to join
GRACE = 3.0  # seconds that another process waits before it fails, for the first one to say why


class Silent(Output):
    """Prints nothing: the output of every process but the first."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def document(self, value: Any) -> None:
        """Print nothing."""

    def line(self, text: str = "") -> None:
        """Print nothing."""

    def table(self, *_: Any, **__: Any) -> None:
        """Print nothing."""


def launched() -> tuple[int, int]:
    """Return (rank, number) of this process among those that a launcher such as torchrun started."""
    if "WORLD_SIZE" not in os.environ:  # torch is not loaded to find out
        return 0, 1
    from onebase import processes

    return processes.rank(), processes.launched()


def output(as_json: bool) -> Output:
    """Return where this process prints: the first one alone does."""
    return Output(as_json) if launched()[0] == 0 else Silent(as_json)


@contextmanager
def first_speaks() -> Iterator[None]:
    """Let the first process fail first where all fail alike: its message is the one that is shown."""
    try:
        yield
    except Exception:
        if launched()[0] > 0:
            time.sleep(GRACE)
        raise


def hand_over(count: int | None) -> bool:
    """Say whether the command has to be started in `count` processes; False in one of them.

    Raises:
        UsageError: a launcher started another number.
    """
    number = launched()[1]
    if count is None or count == number:
        return False
    if number > 1:
        raise UsageError(f"--processes {count}, but a launcher started {number}: leave --processes out under torchrun")
    return count > 1


def start(count: int) -> None:
    """Run this command line in `count` processes on this machine, and exit as they did.

    The first process prints. What another one says is shown only where it failed and the first one did not say why.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    threads = str(max(1, (os.cpu_count() or 1) // count))
    os.environ.setdefault("OMP_NUM_THREADS", threads)  # processes that share cores slow each other
    with tempfile.TemporaryDirectory() as folder:
        hidden: dict[int, Std] = dict.fromkeys(range(1, count), Std.ALL)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            rdzv_configs={"timeout": START_SECONDS},
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=hidden),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "onebase", *sys.argv[1:])
        except ChildFailedError as error:
            code = error.failures[0].exitcode if 0 in error.failures else error.get_first_failure()[1].exitcode
            if 0 not in error.failures or code < 0:
                rank, failure = error.get_first_failure()
                code = failure.exitcode
                _show(Path(folder), rank, code)
            raise typer.Exit(code if code > 0 else 1) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def _show(folder: Path, rank: int, code: int) -> None:
    text = "".join(path.read_text("utf-8", "replace") for path in folder.rglob(f"{rank}/stderr.log"))
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
    print(f"process {rank} {ended}\n{text}".rstrip(), file=sys.stderr)
