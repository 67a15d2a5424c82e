"""The results in benchmarks/results that belong to a method: what was measured, or nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from onebase_docs.text import code, table

FOLDER = Path(__file__).parents[2] / "benchmarks" / "results"
NOTHING = "Nothing yet: `benchmarks/results` holds no run of this method.\n"
DEVICES = {"tasks.jsonl": "CPU", "tasks-h100.jsonl": "H100"}


def lines(name: str) -> list[dict[str, Any]]:
    """Return the rows of a file of results, [] where there is none."""
    file = FOLDER / name
    return [json.loads(line) for line in file.read_text("utf-8").splitlines() if line] if file.is_file() else []


def of_method(name: str) -> str:
    """Return what was measured with a method, as Markdown."""
    parts = [part for part in (_against_full(name), _tasks(name), _language(name), _mixed(name)) if part]
    return "\n".join(parts) if parts else NOTHING


def _is(row: dict[str, Any], name: str) -> bool:
    return str(row.get("method", "")).partition("(")[0] == name and "+" not in str(row.get("method"))


def _against_full(name: str) -> str:
    """Return mean accuracies beside full fine-tuning's and the base's own."""
    runs = [row for row in lines("quality.jsonl") if _is(row, name)]
    if not runs:
        return ""
    rows = []
    for data in dict.fromkeys(row["data"] for row in runs):
        for method in dict.fromkeys(row["method"] for row in runs if row["data"] == data):
            mine = [row for row in runs if (row["data"], row["method"]) == (data, method)]
            rows.append((data, code(method), f"{mine[0]['base']:.4f}", _means(mine)))
        full = full_runs(data)
        if full:
            rows.append((data, "full fine-tuning", f"{full[0]['base']:.4f}", _means(full)))
    said = "Accuracy on the test rows, embedded base, the same rows and stopping rule (`benchmarks/quality.py`); full "
    said += "fine-tuning at the learning rate that was best on validation.\n"
    return said + "\n" + table(("data", "method", "base's own", "after training"), rows)


def full_runs(data: str) -> list[dict[str, Any]]:
    """Return the runs of full fine-tuning on some data, at the rate that validation chose for seed 0."""
    runs = [row for row in lines("quality.jsonl") if row["method"] == "full" and row["data"] == data]
    first = [row for row in runs if row["seed"] == 0]
    if not first:
        return []
    rate = max(first, key=lambda row: row["validation"])["lr"]
    return [row for row in runs if row["lr"] == rate]


def _means(runs: Iterable[dict[str, Any]]) -> str:
    values = [row["value"] for row in runs]
    return f"{statistics.mean(values):.4f} ({len(values)} run{'s' if len(values) > 1 else ''})"


def _tasks(name: str) -> str:
    """Return the runs over kinds of tasks: base, adapter, and the interval of the paired difference."""
    rows = []
    for file, device in DEVICES.items():
        for row in (row for row in lines(file) if _is(row, name)):
            low, high = row.get("difference_interval") or (None, None)
            noise = "" if low is None else f"{low:+.3f} to {high:+.3f}"
            if low is not None and low <= 0 <= high:
                noise += " (within the noise)"
            values = (f"{row['base']:.4f}", f"{row['value']:.4f}", noise)
            data = f"{row['data']} (pairs={row['pairs']})" if "pairs" in row else row["data"]
            rows.append((data, device, row["metric"], *values))
    if not rows:
        return ""
    columns = ("data", "device", "metric", "base's own", "with adapter", "difference (95 %)")
    return "With the defaults, one seed, embedded base (`benchmarks/tasks.py`), good and bad:\n\n" + table(
        columns, rows
    )


def _language(name: str) -> str:
    """Return what a language adapter of this method did to the perplexity of another language."""
    return "\n".join(
        f"Plain text in a language that the base was not made for ({row['data']}, {code(row['method'])}, "
        f"`benchmarks/language.py`): {row['metric']} {row['base']:,.0f} without, {row['value']:,.0f} with the adapter "
        f"(95 %: {row['interval'][0]:,.0f} to {row['interval'][1]:,.0f}).\n"
        for row in lines("language.jsonl")
        if _is(row, name) and "interval" in row
    )


def _mixed(name: str) -> str:
    """Return what a batch of many adapters costs over the base alone."""
    file = FOLDER / "forward.json"
    found = json.loads(file.read_text("utf-8")).get("bank", {}).get(name) if file.is_file() else None
    over = (found or {}).get("over_base")
    if not over:
        return ""
    more, low, high = (100 * (over[key] - 1) for key in ("median", "low", "high"))
    return (
        "A batch of 64 rows with 64 adapters, one per row, takes "
        f"{more:+.1f} % time over the base alone (quartiles {low:+.1f} to {high:+.1f}; one CPU thread, bfloat16, "
        "`benchmarks/forward.py`).\n"
    )
