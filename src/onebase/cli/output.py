"""What commands print: results on stdout (a document, lines or a table), everything else on stderr."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# As onebase.tasks.metrics says, which would load torch.
SHARES = (
    "accuracy", "macro_f1", "weighted_f1", "micro_f1", "entity_f1", "token_accuracy", "answer_f1", "relevance"
)  # fmt: skip
PLAIN_SHARES = ("spearman", "mrr")


class Output:
    """Where a command writes.

    Args:
        as_json: the result is exactly one JSON document on stdout.
    """

    def __init__(self, as_json: bool):
        self.as_json = as_json

    def note(self, text: str) -> None:
        """Say something on stderr."""
        print(text, file=sys.stderr, flush=True)

    def document(self, value: Any) -> None:
        """Print the one JSON document."""
        # escapes where the stream is not UTF-8: any reader understands them
        utf8 = (getattr(sys.stdout, "encoding", "") or "").lower().replace("-", "") == "utf8"
        text = json.dumps(plain(value), indent=2, ensure_ascii=not utf8, allow_nan=False)
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            text = json.dumps(plain(value), indent=2, allow_nan=False)
        print(text)

    def line(self, text: str = "") -> None:
        """Print one line of the result."""
        print(text)

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[Any]],
        right: Iterable[str] = (),
        optional: Sequence[str] = (),
    ) -> None:
        """Print rows: aligned to the width of a terminal, tab-separated for a pipe or a file.

        Args:
            columns: names.
            rows: cells; None is shown as nothing.
            right: columns of numbers.
            optional: columns that a narrow terminal goes without, the first one first.
        """
        cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
        if not sys.stdout.isatty():
            for row in [list(columns), *cells]:
                print("\t".join(" ".join(cell.split()) for cell in row))
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console(highlight=False)
        kept, hidden = _fitting(list(columns), cells, list(optional), console.width)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for i in kept:
            table.add_column(columns[i], justify="right" if columns[i] in right else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(row[i]) for i in kept))
        console.print(table)
        if hidden:
            self.note(f"no room for {', '.join(hidden)}: widen the terminal, or use --json")


def _fitting(
    columns: list[str], cells: list[list[str]], optional: list[str], width: int
) -> tuple[list[int], list[str]]:
    """Return the positions of the columns that fit, and the names of those left out."""
    gap = 3  # between two columns
    needs = {name: max(len(name), *(len(row[i]) for row in cells)) + gap for i, name in enumerate(columns) if cells}
    hidden = []
    while optional and sum(needs.values()) > width:
        hidden.append(optional.pop(0))
        needs.pop(hidden[-1], None)
    return [i for i, name in enumerate(columns) if name not in hidden], hidden


def plain(value: Any) -> Any:
    """Turn a result into JSON values; numbers that JSON lacks become None."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    listed = getattr(value, "tolist", None)  # arrays and tensors
    return str(value) if listed is None else plain(listed())


def percent(share: float, digits: int = 1) -> str:
    """Show a share such as 0.8125 as ``81.2 %``."""
    return f"{100 * share:.{digits}f} %"


def size(count: int) -> str:
    """Show a number of bytes: ``612 kB``."""
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= step:
            return f"{count / step:.1f} {unit}"
    return f"{count} B"


def count(number: int, noun: str, plural: str = "") -> str:
    """Show ``1 row`` or ``1,200 rows``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def metric_value(metric: str, value: float | None) -> str:
    """Show a metric in its unit: shares as per cent, those between 0 and 1 that are none with three decimals, anything
    else with two."""
    if value is None:
        return "-"
    return percent(value) if metric in SHARES else f"{value:.3f}" if metric in PLAIN_SHARES else f"{value:.2f}"


def metric_range(metric: str, value: float | None, interval: Sequence[float] | None) -> str:
    """Show a metric with its 95 % interval: ``81.2 % (74.6 to 86.4)``."""
    shown = metric_value(metric, value)
    if value is None or interval is None:
        return shown
    low, high = (metric_value(metric, end).removesuffix(" %") for end in interval)
    return f"{shown} ({low} to {high})"


def shorten(text: str, width: int) -> str:
    """Put a text on one line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: max(1, width - 1)] + "…"


def aligned(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return ``name  value`` lines with the values under each other."""
    listed = list(pairs)
    width = max((len(name) for name, _ in listed), default=0)
    return [f"{name:<{width}}  {value}" for name, value in listed]


def listing(values: Mapping[str, Any]) -> str:
    """Show settings or facts as ``rank = 8, sites = 'all'``."""
    return ", ".join(f"{key} = {_shown(value)}" for key, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "{" + listing(value) + "}"
    return "[" + ", ".join(map(_shown, value)) + "]" if isinstance(value, list | tuple) else repr(value)
