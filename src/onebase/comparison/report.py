"""The report of comparisons and runs: one HTML file that needs nothing else, with JSON and CSV beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.comparison import pages
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.training import Run

COLUMNS = ("method", "value", "low", "high", "p_best", "p_full", "parameters", "share", "bytes", "total_bytes", "seconds",
           "memory", "latency", "merged_latency", "throughput", "slowdown", "forgetting", "ece", "fixed", "broken",
           "mergeable", "lr")  # fmt: skip
RECORDS = ("comparison.json", "run.json")  # what a folder of a comparison or of a training run holds


def read_record(folder: Path) -> dict[str, Any]:
    """Return what `onebase compare` or `onebase train` wrote into a folder.

    Raises:
        ConfigError: there is neither, or it cannot be read.
    """
    for name in RECORDS:
        if (folder / name).is_file():
            try:
                return json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{folder / name} is no JSON: {error}") from error
    raise ConfigError(f"no {' or '.join(RECORDS)} in {folder}: pass folders that onebase compare or train wrote")


def write_report(found: Mapping[str, Any] | Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write report.html, report.json and report.csv.

    Args:
        found: a comparison or a run as JSON values, or several, which share the page.
        folder: where; it is made if it is not there.

    Returns:
        The HTML file.

    Raises:
        ConfigError: the extra 'report' is not installed.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("a report needs jinja2 and matplotlib: pip install 'onebase[report]'") from None
    many = [found] if isinstance(found, Mapping) else list(found)
    environment = jinja2.Environment(autoescape=True)
    environment.filters["num"] = _number
    sections = [_section(environment, each) for each in many]
    title = ", ".join(dict.fromkeys(str(each["data"]) for each in many))
    page = environment.from_string(pages.PAGE).render(title=title, sections=sections)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").write_text(page, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    rows = [(each["data"], r) for each in many for r in each.get("results", [each])]
    with (folder / "report.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("data", *COLUMNS))
        writer.writerows([[data, *(r.get(name) for name in COLUMNS)] for data, r in rows])
    return folder / "report.html"


def _section(environment: Any, found: Mapping[str, Any]) -> str:
    from onebase.comparison.figures import curves, figures_of

    facts = {**found.get("settings", {}), **found.get("versions", {}), **found.get("machine", {})}
    if "results" in found:
        return environment.from_string(pages.COMPARISON).render(**found, figures=figures_of(found), facts=facts)
    figures = {"Training": curves({found["method"]: found["curves"]}, found["metric"])}
    return environment.from_string(pages.RUN).render(**found, figures=figures, facts=facts)


def _number(value: Any, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def run_record(run: Run, base: Base, data: str, command: str = "", why: str = "") -> dict[str, Any]:
    """Return a training run as JSON values, as run.json holds it.

    Args:
        run: what was trained.
        base: on what.
        data: the data's name.
        command: what the user typed.
        why: why the method was chosen, '' where the user named it.
    """
    from dataclasses import asdict

    from onebase.comparison.running import versions

    found = {
        "base": base.id, "data": data, "ref": run.ref, "method": run.method, "kind": run.kind, "split": run.split,
        "rows": int(run.metrics["n"]), "metric": run.metric, "value": run.value, "base_value": run.base_value,
        "interval": list(run.interval), "base_interval": list(run.base_interval), "low": run.interval[0],
        "high": run.interval[1], "test": None if run.test is None else asdict(run.test),
        "parameters": run.parameters, "share": run.share, "bytes": run.bytes, "seconds": run.history.seconds,
        "lr": run.settings.lr, "metrics": run.metrics, "base_metrics": run.base_metrics,
        "curves": [run.history.epochs], "settings": run.settings.plain(), "versions": versions(),
        "notes": run.notes, "command": command, "why": why,
    }  # fmt: skip
    return json.loads(json.dumps(found, default=str))
