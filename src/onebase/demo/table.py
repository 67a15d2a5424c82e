"""The demo's numbers as lines of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LANGUAGES = {"en": "English", "fr": "French"}


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align cells: the first column to the left, the others to the right.

    Args:
        rows: cells, as many in each row; the first row is the heading.

    Returns:
        A line per row.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    return lines


def score_lines(adapters: Sequence[dict[str, Any]]) -> list[str]:
    """Show each adapter beside its base: scores, interval, size, time; then the gains with their tests."""
    head = ("adapter", "base", "adapter", "95 % interval", "trainable", "of base", "file", "training")
    rows = [head, *(_score_row(a) for a in adapters)]
    return [
        "Accuracy on the test reviews. Base: the best linear head on the frozen base, its own score.",
        *columns(rows),
        "Gain over the base, on the same rows:",
        *(f"  {a['name']}: {a['sentence']}" for a in adapters),
    ]


def _score_row(a: dict[str, Any]) -> tuple[str, ...]:
    low, high = a["interval"]
    return (
        a["name"],
        _percent(a["base_accuracy"]),
        _percent(a["accuracy"]),
        f"{100 * low:.1f} to {_percent(high)}",
        f"{a['parameters']:,}",
        f"{100 * a['share']:.2f} %",
        f"{a['bytes'] / 1e6:.2f} MB",
        f"{a['seconds']:.1f} s",
    )


def language_lines(adapters: Sequence[dict[str, Any]]) -> list[str]:
    """Show the accuracy on each language, base and adapter, and what was gained on the language the base reads."""
    codes = list(adapters[0]["languages"])
    head = ["accuracy on", *(f"{LANGUAGES.get(c, c)}: {who}" for c in codes for who in ("base", "adapter"))]
    rows = [head]
    for a in adapters:
        scores = (_percent(a[who][code]) for code in codes for who in ("base_languages", "languages"))
        rows.append([a["name"], *scores])
    return [
        *columns(rows),
        "This base reads English: gain on the English rows alone (for French texts choose a base that reads French).",
        *(f"  {a['name']}: {a['language_gains']['en']['sentence']}" for a in adapters),
    ]


def mixed_lines(mixed: dict[str, Any]) -> list[str]:
    """Show the mixed batch row by row, and how far it is from each row alone."""
    rows = mixed["rows"]
    width = max(len(_who(row)) for row in rows)
    verdict = "equal" if mixed["equal"] else "NOT equal, which is a bug"
    return [
        f"One batch of {len(rows)} sentences that no adapter has seen, one call, another adapter in each row:",
        *(f"  {_who(row).ljust(width)}  {_said(row).ljust(34)}  {row['text']}" for row in rows),
        f"Mixed batch against each row alone: {verdict}. Largest difference: "
        f"{mixed['max_probability_difference']:.1e} of a probability, "
        f"{mixed['max_embedding_difference']:.1e} of an embedding's numbers.",
    ]


def _who(row: dict[str, Any]) -> str:
    return row["adapter"] or "(plain base)"


def _said(row: dict[str, Any]) -> str:
    if row["label"] is None:
        return f"an embedding of {row['embedding_size']} numbers"
    wrong = "" if row["label"] == row["meant"] else f" (is {row['meant']})"
    return f"{row['label']} {row['probabilities'][row['label']]:.2f}{wrong}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
