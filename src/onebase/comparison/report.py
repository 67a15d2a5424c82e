"""The report of a comparison: one HTML file that needs nothing else, with JSON and CSV beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onebase.errors import ConfigError

COLUMNS = ("method", "value", "low", "high", "parameters", "share", "bytes", "seconds", "latency", "throughput",
           "slowdown", "mergeable", "lr")  # fmt: skip

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison on {{ data }}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ccc; --mark: #eef4ff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181c; --line: #444; --mark: #1f2a3d; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } tr.chosen { background: var(--mark); font-weight: 600; }
figure { margin: 1.5rem 0; background: #fff; } figure svg { max-width: 100%; height: auto; }
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
</style></head><body>
<h1>{{ advice.method or "No method fits" }}</h1>
<p>on {{ data }} ({{ kind }}), base {{ base }}
{% if advice.runner_up %}; runner-up: {{ advice.runner_up }}{% endif %}</p>
<ul>{% for s in advice.reasons %}<li>{{ s }}</li>{% endfor %}</ul>
{% if cut %}<h2>What was cut</h2><ul>{% for s in cut %}<li>{{ s }}</li>{% endfor %}</ul>{% endif %}
{% if advice.excluded %}<h2>Not considered</h2><ul>
{% for m, why in advice.excluded.items() %}<li>{{ m }}: {{ why }}</li>{% endfor %}</ul>{% endif %}
<h2>Measured</h2><div class="wide"><table>
<tr><th>method</th><th>{{ metric }}</th><th>95 % interval</th><th>seeds</th><th>trained</th><th>share</th>
<th>bytes</th><th>training s</th><th>one text ms</th><th>texts/s</th><th>slowdown</th><th>merges</th><th>rate</th></tr>
{% for r in results %}<tr{% if r.method == advice.method %} class="chosen"{% endif %}><td>{{ r.method }}</td>
<td>{{ "%.4f" | format(r.value) }}</td><td>{{ "%.4f" | format(r.low) }} to {{ "%.4f" | format(r.high) }}</td>
<td>{{ r["values"] | length }}</td><td>{{ "{:,}".format(r.parameters) }}</td>
<td>{{ "%.2f" | format(100 * r.share) }} %</td><td>{{ "{:,}".format(r.bytes) }}</td>
<td>{{ "%.1f" | format(r.seconds) }}</td><td>{{ "%.1f" | format(1000 * r.latency) }}</td>
<td>{{ "%.0f" | format(r.throughput) }}</td><td>{{ "%.2f" | format(r.slowdown) }}</td>
<td>{{ "yes" if r.mergeable else "no" }}</td><td>{{ r.lr if r.lr is not none else "" }}</td></tr>
{% endfor %}</table></div>
<p>Within the noise of the best: {{ advice.equal | join(", ") }}. Beaten by none on score, file and speed at once:
{{ advice.front | join(", ") }}.</p>
{% for title, figure in figures.items() %}<h2>{{ title }}</h2><figure>{{ figure | safe }}</figure>{% endfor %}
</body></html>
"""


def write_report(found: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html, report.json and report.csv.

    Args:
        found: a comparison as JSON values, as comparison.json holds it.
        folder: where; it is made if it is not there.

    Returns:
        The HTML file.

    Raises:
        ConfigError: the extra 'report' is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise ConfigError("a report needs jinja2 and matplotlib: pip install 'onebase[report]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"Score against size of the file": _pareto(found), "Training": _curves(found)}
    page = jinja2.Environment(autoescape=True).from_string(PAGE).render(**found, figures=figures)
    (folder / "report.html").write_text(page, encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    with (folder / "report.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows([[result[name] for name in COLUMNS] for result in found["results"]])
    return folder / "report.html"


def _pareto(found: Mapping[str, Any]) -> str:
    figure, axes = _axes()
    for r in found["results"]:
        size = max(r["bytes"], 1)
        axes.errorbar(size, r["value"], yerr=[[max(0.0, r["value"] - r["low"])], [max(0.0, r["high"] - r["value"])]],
                      fmt="o", color="#c33" if r["method"] == found["advice"]["method"] else "#369")  # fmt: skip
        axes.annotate(r["method"], (size, r["value"]), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("bytes of a file")
    axes.set_ylabel(found["metric"])
    return _svg(figure)


def _curves(found: Mapping[str, Any]) -> str:
    figure, axes = _axes()
    for r in found["results"]:
        points = [(e["epoch"], e[found["metric"]]) for curve in r["curves"][:1] for e in curve if found["metric"] in e]
        if points:
            axes.plot(*zip(*points), marker=".", label=r["method"])
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{found['metric']} on validation, first seed")
    if axes.lines:
        axes.legend(fontsize=8)
    return _svg(figure)


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Any) -> str:
    """Return the drawing alone: its header and metadata name addresses, and a page must not."""
    import re

    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # inside HTML the namespaces are known
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
