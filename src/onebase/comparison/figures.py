"""Figures of a report as inline SVG: they take the page's colour, so that they read in light, dark and print."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

# What a score is plotted against: title, key of a result, axis, log scale.
AGAINST = (
    ("parameters", "parameters", "trained values", True),
    ("bytes of a file", "bytes", "bytes of a file", True),
    ("latency", "latency", "seconds of one text, attached", False),
    ("training time", "seconds", "seconds of one run by itself", False),
    ("memory in training", "memory", "bytes of tensors", False),
)
COLOURS = ("#3b7dd8", "#d9534f", "#4c9f50", "#e69f00", "#9467bd", "#17a2b8", "#c2549d", "#8c6d31", "#7f7f7f", "#5a5ad6")


def figures_of(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures of a comparison by title: score against every cost, curves, confusion, calibration."""
    figures = {
        f"Score against {title}": _against(found, key, axis, log)
        for title, key, axis, log in AGAINST
        if sum(1 for r in found["results"] if r.get(key)) > 1
    }
    figures["Training"] = curves({r["method"]: r["curves"][:1] for r in found["results"]}, found["metric"])
    shown = next((r for r in found["results"] if r["method"] == found["advice"]["method"]), None)
    if shown and shown.get("confusion"):
        figures[f"Confusion of {shown['method']}"] = confusion(shown["confusion"], found["labels"])
    if shown and shown.get("calibration"):
        figures[f"Calibration of {shown['method']}"] = calibration(shown["calibration"], shown["ece"])
    return figures


def _against(found: Mapping[str, Any], key: str, axis: str, log: bool) -> str:
    figure, axes = _axes()
    for r in found["results"]:
        if not r.get(key):
            continue
        error = [[max(0.0, r["value"] - r["low"])], [max(0.0, r["high"] - r["value"])]]
        colour = COLOURS[1] if r["method"] == found["advice"]["method"] else COLOURS[0]
        axes.errorbar(r[key], r["value"], yerr=error, fmt="o", color=colour)
        axes.annotate(r["method"], (r[key], r["value"]), xytext=(5, 5), textcoords="offset points", fontsize=8)
    if log:
        axes.set_xscale("log")
    axes.set_xlabel(axis)
    axes.set_ylabel(found["metric"])
    return _svg(figure)


def curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], metric: str) -> str:
    """Draw the validation metric by epoch.

    Args:
        runs: per name its curves, each a list of epochs.
        metric: what is drawn.
    """
    figure, axes = _axes()
    for number, (name, many) in enumerate(runs.items()):
        for curve in many:
            points = [(e["epoch"], e[metric]) for e in curve if metric in e]
            if points:
                axes.plot(*zip(*points), marker=".", label=name, color=COLOURS[number % len(COLOURS)])
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{metric} on validation")
    if axes.lines:
        axes.legend(fontsize=8, framealpha=0)
    return _svg(figure)


def confusion(table: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """Draw a confusion matrix; many labels without numbers and names, which would not be readable."""
    side = max(3.0, min(9.0, 1.5 + 0.6 * len(labels)))
    figure, axes = _axes(side + 1, side)
    rows = [[n / max(1, sum(row)) for n in row] for row in table]
    axes.pcolormesh(rows, cmap="Blues", vmin=0, vmax=1, edgecolors="none")  # paths: an image would be a data address
    axes.invert_yaxis()
    if len(labels) <= 12:
        places = [i + 0.5 for i in range(len(labels))]
        axes.set_xticks(places, labels, rotation=45, ha="right")
        axes.set_yticks(places, labels)
        for i, row in enumerate(table):
            for j, n in enumerate(row):
                axes.text(j + 0.5, i + 0.5, str(n), ha="center", va="center", fontsize=9,
                          color="#ffffff" if rows[i][j] > 0.5 else "#111111")  # fmt: skip
    axes.set_xlabel("predicted")
    axes.set_ylabel("actual")
    return _svg(figure)


def calibration(bins: Sequence[Sequence[float]], error: float) -> str:
    """Draw accuracy against confidence; points are bins, as large as they have answers."""
    figure, axes = _axes(5, 4)
    axes.plot([0, 1], [0, 1], color="#888888", linestyle=":")
    total = sum(b[2] for b in bins)
    axes.scatter([b[0] for b in bins], [b[1] for b in bins], s=[20 + 400 * b[2] / total for b in bins],
                 color=COLOURS[0], alpha=0.7)  # fmt: skip
    axes.set_xlabel("confidence")
    axes.set_ylabel("share of right answers")
    axes.set_title(f"expected calibration error {error:.3f}", fontsize=10)
    return _svg(figure)


def _axes(width: float = 8, height: float = 4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    """Return the drawing alone: its header and metadata name addresses, and a page must not."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # black is the page's ink; text has no fill of its own, so it gets one
    text = re.sub("<text(?=[ >])", '<text fill="currentColor"', text.replace("#000000", "currentColor"))
    # inside HTML the namespaces are known
    return re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
