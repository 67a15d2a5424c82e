"""`onebase train` with many jobs: a folder of data sets, a file of jobs, or a grid, in one pass over one base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from onebase.cli import options as o
from onebase.cli.failures import UsageError
from onebase.cli.output import Output, metric_range, metric_value

if TYPE_CHECKING:
    from onebase.cli.merge import Chosen
    from onebase.training import Failed, Job, Run

# What may be said beside --jobs: everything else is in the file.
BESIDE_JOBS = ("base", "device", "dtype", "quantize", "dry_run", "no_save", "resume")


@dataclass(frozen=True)
class Asked:
    """What makes one run of `train` many: None and empty where nothing does."""

    jobs: Path | None = None
    grid: tuple[str, ...] = ()
    seeds: int = 1

    def many(self, data: str | None) -> bool:
        """Whether several jobs are asked for."""
        if self.jobs is not None or self.grid or self.seeds > 1:
            return True
        if data is None or not Path(data).expanduser().is_dir():
            return False
        from onebase.training.jobs import holds_data_sets

        return holds_data_sets(data)


def train_jobs(asked: Asked, chosen: Chosen, method_given: bool, out: Output, track: list[str] | None = None) -> None:
    """Train several jobs and show them in one table; exits with 1 where one of them was stopped."""
    from onebase.store import Store
    from onebase.training.jobs import data_of, left_out
    from onebase.training.prepare import reading_options

    jobs = _jobs(asked, chosen, method_given)
    if asked.jobs is None and not asked.grid and asked.seeds == 1 and left_out(chosen.get("data")):
        out.note(f"left out, as no data: {', '.join(left_out(chosen.get('data')))}")
    store = Store()
    for job in jobs:
        store.check(job.name or "")
    seen: set[str] = set()
    for job in jobs:  # all data is read and checked before a base is loaded
        data = data_of(job)
        if data.digest not in seen:
            rows = ", ".join(f"{len(getattr(data, s)):,} {s}" for s in ("train", "validation", "test"))
            out.note(f"data {data.source}: {data.kind}, {rows} rows")
            for sentence in data.notes:
                out.note(f"  {sentence}")
        seen.add(data.digest)
        job.data = data
        reading_options(job.more)  # takes out what was needed to read it
    if chosen.get("dry_run"):
        _show_plan(jobs, chosen, out)
        return
    _train(jobs, chosen, out, track)


def _jobs(asked: Asked, chosen: Chosen, method_given: bool) -> list[Job]:
    from onebase.cli.merge import COLUMNS, FILES, ROLES
    from onebase.cli.train import name_of
    from onebase.training.jobs import folder_jobs, grid_jobs, holds_data_sets, read_grid, read_jobs

    if asked.jobs is not None:
        given = [key for key in (*chosen.options, *chosen.settings) if key not in BESIDE_JOBS]
        given += ["method"] * method_given + ["grid"] * bool(asked.grid) + ["seeds"] * (asked.seeds > 1)
        if given:
            raise UsageError(f"--jobs says everything about its jobs: leave {', '.join(given)} out, or put it there")
        return read_jobs(asked.jobs)
    data = chosen.get("data")
    if data is None:
        raise UsageError("--grid and --seeds need data: pass --data FILE")
    asked_for = ("task", *COLUMNS, *FILES, "limit", "group", "max_length", "template", "pooling")
    more = {key: chosen.get(key) for key in asked_for}
    more["init_from"] = chosen.get("init_from")
    more["columns"] = {role: chosen.get(role) for role in ROLES if chosen.get(role) is not None} or None
    more = {key: value for key, value in more.items() if value is not None} | chosen.settings
    if holds_data_sets(data):
        if asked.grid or asked.seeds > 1 or chosen.get("name"):
            raise UsageError(
                "a folder of data sets makes one job of each: leave --grid, --seeds and --name out, or use --jobs"
            )
        return folder_jobs(data, chosen.method, **more)
    name = chosen.get("name") or name_of(data)
    return grid_jobs(data, chosen.method, name, read_grid(asked.grid), asked.seeds, **more)


def _train(jobs: list[Job], chosen: Chosen, out: Output, track: list[str] | None) -> None:
    from onebase.cli.bases import open_base
    from onebase.cli.progress import reporter
    from onebase.cli.result import as_document, draw_curves
    from onebase.training import Failed, train_many

    where = chosen.get("device"), chosen.get("dtype")
    base = open_base(chosen.get("base", o.default_base()), *where, out, chosen.get("quantize"))
    out.note(f"training {len(jobs)} jobs on {base.id} in one pass: {', '.join(str(job.name) for job in jobs)}")
    report, save = reporter(), not chosen.get("no_save", False)
    try:
        runs = train_many(base, jobs, report=report, resume=bool(chosen.get("resume")), save=save, track=track)
    except KeyboardInterrupt:
        if save:
            out.note("interrupted; to go on from the last checkpoint: the same command with --resume")
        raise
    finally:
        report.end()
    draw_curves([run for run in runs if not isinstance(run, Failed) and run.ref], out)
    if out.as_json:
        out.document({"base": base.id, "jobs": [
            {"name": run.name, "method": run.method, "error": str(run.error)} if isinstance(run, Failed)
            else as_document(run, base) for run in runs
        ]})  # fmt: skip
    else:
        _show(runs, out)
    if any(isinstance(run, Failed) for run in runs):
        raise typer.Exit(1)


def _show(runs: list[Run | Failed], out: Output) -> None:
    from onebase.training import Failed

    rows: list[list[Any]] = []
    for run in runs:
        if isinstance(run, Failed):
            rows.append([run.name, run.method, None, None, "stopped", None, None, None])
            continue
        p = None if run.test is None else f"{run.test.p_value:.2g}"
        rows.append(
            [run.name, run.method, run.metric, metric_value(run.metric, run.base_value),
             metric_range(run.metric, run.value, run.interval), p, int(run.metrics["n"]), run.ref or "not stored"]
        )  # fmt: skip
    columns = ["job", "method", "metric", "base", "with adapter (95 %)", "p", "rows", "stored as"]
    out.table(columns, rows, right=["p", "rows"], optional=["rows", "method"])
    for run in runs:
        if isinstance(run, Failed):
            out.note(f"{run.name} was stopped: {run.error}")


def _show_plan(jobs: list[Job], chosen: Chosen, out: Output) -> None:
    """Print what would be trained; nothing is."""
    import math

    from onebase.build import build_adapter
    from onebase.cli.dry_run import outline
    from onebase.examples import encode
    from onebase.methods.registry import parse_method
    from onebase.tasks import get_task
    from onebase.training.prepare import DEFAULT_METHOD, make_task
    from onebase.training.settings import settings_for

    base, total = outline(chosen.get("base"))
    plans: list[dict[str, Any]] = []
    encoded: dict[Any, int] = {}
    for job in jobs:
        data, more, method = job.data, dict(job.more), job.method or parse_method(DEFAULT_METHOD)
        task_keys = {"max_length", "template", "pooling", *get_task(data.kind).options}
        task = make_task(base, data, **{key: more.pop(key) for key in list(more) if key in task_keys})
        more.pop("init_from", None)
        settings = settings_for(method, more, base.anatomy.hidden_size)
        key = (data.digest, repr(sorted(task.items(), key=str)))
        if key not in encoded:
            encoded[key] = len(encode(base, task, data)["train"])
        steps = math.ceil(encoded[key] / (settings.batch_size * settings.accumulate)) * settings.epochs
        count = build_adapter(base, str(job.name), method, task, 0, empty=True).count()
        plans.append({
            "name": job.name, "data": data.source, "kind": data.kind, "method": method.shorthand(),
            "rows": {split: len(getattr(data, split)) for split in ("train", "validation", "test")},
            "parameters": count, "share": count / total, "settings": settings.plain(), "steps": steps,
        })  # fmt: skip
    if out.as_json:
        out.document({"dry_run": True, "base": base.id, "jobs": plans})
        return
    columns = ["job", "data", "kind", "method", "lr", "seed", "train rows", "steps", "parameters"]
    rows = [
        [p["name"], p["data"], p["kind"], p["method"], f"{p['settings']['lr']:g}", p["settings"]["seed"],
         p["rows"]["train"], p["steps"], f"{p['parameters']:,}"]
        for p in plans
    ]  # fmt: skip
    out.table(columns, rows, right=columns[4:], optional=["kind", "seed", "train rows"])
    out.note("dry run: nothing was trained, nothing was stored")
