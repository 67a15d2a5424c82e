"""`onebase train`: one adapter from a data file, with the base's own score beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import options as o
from onebase.cli import workers
from onebase.cli.failures import UsageError
from onebase.cli.many import Asked, train_jobs
from onebase.cli.output import Output

if TYPE_CHECKING:
    from onebase.cli.merge import Chosen
    from onebase.data import Data

NOT_SETTINGS = (
    "as_json",
    "debug",
    "config",
    "sets",
    "yes",
    "jobs",
    "grid",
    "seeds",
    "processes",
    "shard",
    "track",
    "ray",
    "ray_workers",
)
MANY = "Many jobs in one pass"
DTYPES = ("float32", "bfloat16", "float16")
NEW: tuple[str, dict[str, Any]] = ("the defaults", {})  # of a run to resume that is not there


def train(
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "-d", metavar="PATH", help="A .csv, .tsv, .jsonl, .txt, a folder of splits, or of data sets."
        ),
    ] = None,
    base: o.BaseName = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "-m", metavar="NAME", autocompletion=o.known_methods, help="Such as lora, or 'lora(rank=16)'."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the adapter. Default: the data's name.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            rich_help_panel=o.DATA,
            help="Such as classification, tokens, chat, embeddings. Default: by columns.",
        ),
    ] = None,
    text: o.TextColumn = None,
    text_pair: o.TextPairColumn = None,
    label: o.LabelColumns = None,
    prompt: o.PromptColumn = None,
    completion: o.CompletionColumn = None,
    column: o.Columns = None,
    group: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", rich_help_panel=o.DATA, help="Rows that share its value stay in one split."),
    ] = None,
    encoding: o.Encoding = None,
    delimiter: o.Delimiter = None,
    quote: o.Quote = None,
    sheet: o.Sheet = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", rich_help_panel=o.DATA, help="Most rows of each split.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", rich_help_panel=o.DATA, help="Tokens per row, at most.")
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", rich_help_panel=o.DATA, help="Such as 'Review: {text}'; for chats chatml."),
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(metavar="HOW", rich_help_panel=o.DATA, help="mean, first or last token.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(rich_help_panel=o.TRAINING, help="Peak learning rate. Default: by method.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", rich_help_panel=o.TRAINING, help="Passes over the rows, at most.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", rich_help_panel=o.TRAINING, help="Rows per forward.")
    ] = None,
    accumulate: Annotated[
        int | None, typer.Option(metavar="N", rich_help_panel=o.TRAINING, help="Batches per step.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", rich_help_panel=o.TRAINING, help="Of splits, start, order and dropout.")
    ] = None,
    track: o.Track = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    quantize: Annotated[
        str | None, typer.Option(metavar="HOW", help="Keep the base's linear maps in int8, int4 or nf4.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML, JSON or TOML with the long options as keys.")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any setting: warmup=0.06, method.rank=16. Repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run: the latest, or the one of --name.")
    ] = False,
    init_from: Annotated[
        str | None,
        typer.Option(
            "--init-from", metavar="REF", autocompletion=o.stored_names, help="A stored adapter to start from."
        ),
    ] = None,
    jobs: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=MANY, help="YAML, JSON or TOML with a list of jobs.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=A,B", rich_help_panel=MANY, help="Each value: lr=1e-4,5e-4. Repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", rich_help_panel=MANY, help="Runs of each setting.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained; train and store nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing; train has no question to ask.")] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", min=1, metavar="N", rich_help_panel=o.TRAINING, help="Processes that share each step's rows."
        ),
    ] = None,
    shard: Annotated[
        bool, typer.Option("--shard", rich_help_panel=o.TRAINING, help="Split the base's layers over the processes.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", rich_help_panel=o.TRAINING, help="Train in workers of Ray Train.")
    ] = False,
    ray_workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, metavar="N", rich_help_panel=o.TRAINING, help="Workers of --ray."),
    ] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Train and score, but store nothing.")] = False,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Train an adapter and store it as NAME@VERSION, with the base's own score beside it.

    A folder of data sets, --jobs, --grid or --seeds train many adapters in one pass.
    The command line goes before --set, --set before --config, --config before the defaults of the method.
    """
    given = {key: value for key, value in locals().items() if key not in NOT_SETTINGS}
    roles = o.roles_of(given.pop("column"))
    given["label"] = label[0] if label and len(label) == 1 else None
    if label and len(label) > 1:
        if "labels" in roles:
            raise UsageError("the columns of labels are named by --label and by --column: leave one out")
        roles["labels"] = label
    if both := [role for role in roles if given.get(role) is not None]:
        raise UsageError(
            f"the column of {both[0]} is named by --{both[0].replace('_', '-')} and by --column: leave one out"
        )
    given |= roles
    given |= {"dry_run": dry_run or None, "no_save": no_save or None, "resume": resume or None}
    out = workers.output(as_json)
    if ray_workers and not ray:
        raise UsageError("--workers are those of --ray: add it, or use --processes N on this machine")
    if ray and processes:
        raise UsageError("--processes and --ray both start the workers: leave one out")
    if shard and (processes or ray_workers or workers.launched()[1]) == 1:
        raise UsageError("--shard splits the base over several processes: add --processes N, or start it with torchrun")
    if track:
        from onebase.training.tracking import check_trackers

        check_trackers(track)  # before data is read and a base is loaded
    from onebase.cli.merge import choose
    from onebase.comparison.defaults import METHOD

    asked = Asked(jobs, tuple(grid or ()), seeds)
    if asked.many(data):
        if processes or shard or ray:
            raise UsageError("many jobs train in one process: leave --processes, --ray and --shard out")
        chosen = choose(given, sets or [], config, "lora", _inherited(init_from))
        _check_place(chosen, here=not chosen.get("dry_run"))
        train_jobs(asked, chosen, method is not None, out, track)
        return
    below = _interrupted(name, out) if resume else _inherited(init_from)
    chosen = choose(given, sets or [], config, METHOD, below)
    for sentence in chosen.replaced:
        out.note(sentence)
    if resume and name is not None and below == NEW:
        _say_new(name, chosen, out)
    _check_place(chosen, here=not (ray or chosen.get("dry_run")))
    stored_as = _checked_name(chosen)
    if ray and not chosen.get("dry_run"):
        from onebase.cli import ray_workers as on_ray

        on_ray.start(ray_workers or 1)
        return
    if not chosen.get("dry_run") and workers.hand_over(processes):
        workers.start(processes or 1)
        return
    with workers.first_speaks():
        found = _load(chosen, out)
    why = ""
    if not chosen.named:
        from onebase.comparison.defaults import default_method

        why = default_method(found.kind, len(found.train), found.train.text_pair is not None)[1]
        out.note(f"method {why}")
    if chosen.get("dry_run"):
        from onebase.cli.dry_run import show_plan

        show_plan(chosen, found, stored_as, out)
        return
    with workers.first_speaks():
        _train(chosen, found, stored_as, out, shard, why, track)


def _train(
    chosen: Chosen, data: Data, name: str, out: Output, shard: bool, why: str = "", track: list[str] | None = None
) -> None:
    from onebase.cli.bases import open_base
    from onebase.cli.progress import reporter
    from onebase.cli.result import draw_curves, show_run
    from onebase.processes import active, join, leave
    from onebase.training import train as train_adapter

    join()
    where = chosen.get("device"), chosen.get("dtype")
    base = open_base(chosen.get("base", o.default_base()), *where, out, chosen.get("quantize"))
    if shard:
        from onebase.training.shard import shard as split

        out.note(split(base))
    saved = not chosen.get("no_save", False)
    out.note(f"training {chosen.method.shorthand()} on {base.id}" + (f", to be stored as {name}" if saved else ""))
    report = reporter()
    try:
        run = train_adapter(
            base,
            data,
            chosen.method,
            name=name if saved else None,
            max_length=chosen.get("max_length"),
            template=chosen.get("template"),
            pooling=chosen.get("pooling"),
            report=report,
            resume=bool(chosen.get("resume")),
            init_from=chosen.get("init_from"),
            remember={"command": chosen.command()},
            track=track,
            **chosen.settings,
        )
    except KeyboardInterrupt:
        if saved:
            out.note(f"interrupted; to go on from the last checkpoint: onebase train --resume --name {name}")
        raise
    finally:
        report.end()
    if run.ref and active().first:
        draw_curves([run], out)
    show_run(run, data, base, out)
    if run.ref and active().first:
        _report(run, base, data, why, out)
    leave()


def _report(run: Any, base: Any, data: Data, why: str, out: Output) -> None:
    """Write the record of a stored run, and its report where the extra is installed."""
    import json
    import shlex
    import sys

    from onebase.cli.report import report_folder
    from onebase.comparison.report import run_record, write_report
    from onebase.errors import ConfigError

    record = run_record(run, base, data.source, shlex.join(["onebase", *sys.argv[1:]]), why)
    folder = report_folder(run.ref)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    try:
        out.note(f"report {write_report(record, folder)}")
    except ConfigError as error:  # the extra is not installed: everything else is done
        out.note(str(error))


def _interrupted(name: str | None, out: Output) -> tuple[str, dict[str, Any]]:
    """Return how the run to go on with was called: the one of this name, or the latest."""
    from onebase.store import Store
    from onebase.training.checkpoint import interrupted, place, read
    from onebase.training.passes import interrupted_passes

    root = Store().root
    found = interrupted(root) if name is None else [p for p in [place(root, name)] if p.exists()]
    if not found and name is None:
        if interrupted_passes(root):
            raise UsageError(
                "--resume: several jobs were interrupted: give the command that trained them, and --resume"
            )
        raise UsageError("--resume: no interrupted run is there")
    if not found:
        return NEW
    out.note(f"going on with {found[0].stem}")
    return "the interrupted run", read(found[0])[1]["facts"].get("command", {})


def _say_new(name: str, chosen: Chosen, out: Output) -> None:
    """Say that no run of this name is there: it starts over where data is given, as one killed early would.

    Raises:
        UsageError: there is no data to start over with.
    """
    from onebase.store import Store
    from onebase.training.checkpoint import interrupted

    there = ", ".join(path.stem for path in interrupted(Store().root)) or "none"
    sentence = f"--resume: no interrupted run {name!r}; there are: {there}"
    if chosen.get("data") is None:
        raise UsageError(f"{sentence}. Pass one of these as --name, or --data to start anew.")
    out.note(f"{sentence}; training starts from the beginning")


def _check_place(chosen: Chosen, here: bool = True) -> None:
    """Refuse a dtype or a device that is none, or that has to be `here` and is not, before anything is loaded."""
    device, dtype = chosen.get("device"), chosen.get("dtype")
    if dtype is not None and dtype not in (*DTYPES, "auto"):
        raise UsageError(f"--dtype {dtype!r}: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if device is None:
        return
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(f"--device {device!r}: expected cpu, cuda, cuda:N (such as cuda:1) or mps") from None
    if kind == "cuda" and here and not torch.cuda.is_available():
        raise UsageError(f"--device {device!r}: there is no CUDA device here. Leave it out, or pass cpu.")


def _inherited(ref: str | None) -> tuple[str, dict[str, Any]] | None:
    """Return method and base of a stored adapter, which are the defaults where training starts from it."""
    if ref is None:
        return None
    from onebase.cli.bases import name_of_base
    from onebase.store import Store

    stored = Store().resolve(ref)
    method, quantized = stored.config.method, stored.config.provenance.get("quantization")
    options: dict[str, Any] = {"method": {"name": method.name, **method.settings}, "base": name_of_base(stored)}
    return ref, options | ({"quantize": quantized} if quantized else {})


def _load(chosen: Chosen, out: Output) -> Data:
    """Read the data, and check every setting against it before a base is loaded."""
    from onebase.cli.merge import COLUMNS, FILES, ROLES
    from onebase.data import load
    from onebase.tasks import get_task
    from onebase.training.settings import Settings, settings_for

    if chosen.get("data") is None:
        raise UsageError("train needs data: pass --data FILE, or a key data in --config")
    columns = {key: chosen.get(key) for key in ("task", *COLUMNS, *FILES, "limit", "group")}
    columns["columns"] = {role: chosen.get(role) for role in ROLES if chosen.get(role) is not None}
    of_training = {key: value for key, value in chosen.settings.items() if key in Settings.__dataclass_fields__}
    settings_for(chosen.method, of_training)
    found = load(chosen.get("data"), seed=chosen.settings.get("seed") or 0, **columns)
    settings_for(chosen.method, chosen.settings_only(found.kind))
    if get_task(found.kind).surface == "logits" and chosen.get("pooling"):
        raise UsageError(f"pooling has no meaning for {found.kind} data: leave it out")
    used = ", ".join(f"{role} = {column!r}" for role, column in found.columns.items())
    rows = ", ".join(f"{len(getattr(found, split)):,} {split}" for split in ("train", "validation", "test"))
    out.note(f"data {found.source}: {found.kind}, {rows} rows" + (f"; {used}" if used else ""))
    for sentence in found.notes:
        out.note(f"  {sentence}")
    return found


def _checked_name(chosen: Chosen) -> str:
    """Return the name to store under; a name that the store would refuse is refused before training."""
    from onebase.store import Store

    name = chosen.get("name")
    if name is None:
        name = name_of(chosen.get("data", "adapter"))
    Store().check(name)
    return name


def name_of(data: str) -> str:
    """Make a valid adapter name of a data path: ``My reviews.csv`` gives ``My-reviews``."""
    from onebase.store.names import name_of_path

    return name_of_path(data)
