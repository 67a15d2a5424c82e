"""The result of training, for people and for programs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onebase.cli.output import Output, aligned, count, metric_range, percent, size
from onebase.cli.progress import clock

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data
    from onebase.training import Run


BESIDE = {"recall@1": "recall@1", "recall@10": "recall@10", "exact_match": "exact match", "chrf": "chrF"}
WRITTEN = ("exact_match", "chrf")


def show_run(run: Run, data: Data, base: Base, out: Output) -> None:
    """Print what training gave."""
    for sentence in run.notes[len(data.notes) :]:  # those of the data were said before
        out.note(sentence)
    if out.as_json:
        out.document(as_document(run, base))
        return
    from onebase.tasks.metrics import metric_of

    history, about = run.history, metric_of(run.metric)
    better = "higher" if about.higher else "lower"
    done = max((int(entry["epoch"]) for entry in history.epochs), default=0)
    kept = f"epoch {history.best} of {done}" if history.best else f"the start: none of {done} epochs was better"
    head = base.adapters[run.name].base_head
    own = about.own if head is None else "its own head, base frozen"
    difference = run.test.sentence() if run.test else "not tested"
    pairs = [
        ("adapter", run.ref or "not stored (--no-save)"),
        ("method", run.method),
        ("scored on", f"{count(int(run.metrics['n']), 'row')} of {run.split}; {run.metric}, {better} is better"),
        ("base", f"{metric_range(run.metric, run.base_value, run.base_interval)}  {own}"),
        ("with adapter", metric_range(run.metric, run.value, run.interval)),
        ("difference", difference),
        ("parameters", f"{run.parameters:,}, {percent(run.share, 2)} of the base's"),
    ]
    pairs += beside(run.metrics, run.base_metrics)
    if run.bytes:
        pairs.append(("file", size(run.bytes)))
    pairs.append(("training", f"{clock(history.seconds)}, kept {kept}"))
    for line in aligned(pairs):
        out.line(line)
    if run.ref:
        out.line()
        out.line("Next:")
        for command in next_commands(run, bool(base.adapters[run.name].task["pair"])):
            out.line(f"  {command}")


def beside(adapter: dict[str, Any], base: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return lines of the metrics that are shown beside the one that counts, base against adapter."""
    lines = []
    for name, title in BESIDE.items():
        if name in adapter:
            shown = [f"{metrics[name]:.3g}" for metrics in (base or {}, adapter) if name in metrics]
            written = adapter.get("generated") if name in WRITTEN else None
            rows = "" if written is None else f" on the first {count(written, 'row')}"
            lines.append((title, " with the base, ".join(shown) + (" with adapter" if base else "") + rows))
    return lines


def draw_curves(runs: Sequence[Run], out: Output) -> None:
    """Draw the curves of stored runs, each into its own folder, and say where they are, or once why there are none."""
    from onebase.store import Store
    from onebase.training.curves import MISSING, place_of_curves, write_curves

    root = Store().root
    written = [write_curves(run, place_of_curves(root, run.ref)) for run in runs]
    found = [str(path) for path in written if path is not None]
    if found:
        out.note(f"curves: {found[0]}" + (f" and {len(found) - 1} more" if found[1:] else ""))
    elif runs:
        out.note(MISSING)


def next_commands(run: Run, pair: bool) -> list[str]:
    """Return commands worth trying with a stored adapter."""
    name = shlex.quote(run.name)
    from onebase.tasks import get_task

    if get_task(run.kind).embeds:
        use = f'onebase predict -a {name} --json "..."'
    elif not get_task(run.kind).writes:
        use = f'onebase predict -a {name} "..."' + (' --pair "..."' if pair else "")
    else:
        use = f'onebase generate -a {name} "..."'
    return [use, f"onebase eval {name} -d FILE", f"onebase show {name}", "onebase ls"]


def as_document(run: Run, base: Base) -> dict[str, Any]:
    """Return a run as JSON values."""
    test = run.test
    return {
        "ref": run.ref or None,
        "name": run.name,
        "stored": bool(run.ref),
        "base": base.id,
        "method": run.method,
        "kind": run.kind,
        "labels": run.labels,
        "split": run.split,
        "metric": run.metric,
        "adapter_score": {"value": run.value, "interval": run.interval, "metrics": run.metrics},
        "base_score": {"value": run.base_value, "interval": run.base_interval, "metrics": run.base_metrics},
        "test": None if test is None else test_document(test),
        "parameters": run.parameters,
        "share": run.share,
        "bytes": run.bytes,
        "settings": run.settings.plain(),
        "history": run.history,
        "notes": run.notes,
    }


def test_document(test: Any) -> dict[str, Any]:
    """Return a paired test as JSON values, with its sentence."""
    return {
        "name": test.test,
        "difference": test.difference,
        "interval": [test.low, test.high],
        "p_value": test.p_value,
        "n": test.n,
        "fixed": test.fixed,
        "broken": test.broken,
        "sentence": test.sentence(),
    }
