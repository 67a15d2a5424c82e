"""What a base makes of data: tokens per row, rows that are cut, and samples with the trained tokens marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from onebase.data.findings import spread
from onebase.data.splits import sample

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows
    from onebase.encode import Encoded

COUNTED = 5_000  # rows of a split whose tokens are counted; of more, a seeded sample of as many
SAMPLES = 3
OPEN, CLOSE = "[[", "]]"  # around what the loss is on


def look(name: str, data: Data, max_length: int | None, template: str | None) -> dict[str, Any]:
    """Encode data as training would.

    Args:
        name: the base; only its config and tokenizer are loaded.
        data: checked data.
        max_length, template: as for training.

    Returns:
        `splits` (lengths, cut, counted), `limit`, `samples` and `said`, sentences for people.

    Raises:
        DataError, UnsupportedError: training would refuse the data on this base.
        ConfigError: no such base, or a setting that does not fit.
    """
    from onebase.cli.dry_run import outline
    from onebase.encode import IGNORED
    from onebase.examples import encode
    from onebase.training.prepare import make_task

    base, _ = outline(name)
    task = make_task(base, data, max_length=max_length, template=template)
    running = data.kind == "causal-lm"
    parts = {split: sample(rows, COUNTED, 0, running, data.kind) for split, rows in data.splits.items()}
    windows = bool(task.get("windows"))  # counted as whole rows, which training reads in windows
    examples = encode(base, {**task, "windows": False} if windows else task, replace(data, **parts))
    found: dict[str, Any] = {}
    said = [f"base {base.id}: at most {task['max_length']} tokens per row"]
    for split, encoded in examples.items():
        if not len(encoded):
            continue
        whole, counted = len(data.splits[split]), len(parts[split])
        # Plain text is cut into blocks, which lose nothing.
        lengths = [len(row.ids) + row.cut for row in encoded.rows]
        cut = 0 if running else round(encoded.cut * whole / counted)
        found[split] = {"lengths": spread(lengths), "cut": cut, "counted": counted}
        if counted < whole:
            said.append(f"tokens of {split} are counted on {counted:,} of its {whole:,} rows; cut rows are estimated")
        if cut:
            fate = "would be read in windows" if windows else "would be cut (--max-length)"
            said.append(f"{'' if windows else 'warning: '}{cut:,} of {whole:,} rows of {split} are longer and {fate}")
    train = examples["train"]
    samples = []
    for i in range(min(SAMPLES, len(train))):
        row, unit = train.rows[i], i if train.unit is None else int(train.unit[i])
        trained = None if row.labels is None else [label != IGNORED for label in row.labels]
        samples.append(
            {
                "place": parts["train"].place(unit) if not running else f"block {i + 1} of train",
                "tokens": len(row.ids),
                "cut": row.cut,
                "rendered": rendered(base, row, trained if base_reads(row) else None),
                "target": "" if running else target(base, parts["train"], unit, row),
            }
        )
    return {"base": base.id, "limit": task["max_length"], "splits": found, "samples": samples, "said": said}


def base_reads(row: Any) -> bool:
    """Say whether a row's labels stand at its own tokens, and not in another sequence (of an encoder-decoder)."""
    return (
        row.labels is not None
        and len(row.labels) == len(row.ids)
        and all(label in (-100, token) for label, token in zip(row.labels, row.ids))
    )


def rendered(base: Base, row: Encoded, trained: Sequence[bool] | None) -> str:
    """Write a row as its tokens say, what the loss is on between ``[[`` and ``]]``; of a picture its file."""
    if row.image is not None:
        return str(row.image.source)
    ids = row.ids
    if trained is None:
        return base.tokenizer.decode(list(ids))
    parts, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            text = base.tokenizer.decode(list(ids[start:end]))
            parts.append(f"{OPEN}{text}{CLOSE}" if trained[start] else text)
            start = end
    return "".join(parts)


def target(base: Base, rows: Rows, index: int, row: Any) -> str:
    """Write what a row is to give, where that is not part of its own tokens."""
    for role in ("label", "labels", "score", "tags"):
        values = rows.get(role)
        if values is not None:
            value = values[index]
            return value if isinstance(value, str) else f"{value}" if isinstance(value, float) else " ".join(value)
    if rows.get("spans") is not None:
        text = rows["text"][index]
        return ", ".join(f"{text[span.start : span.end]} ({span.label})" for span in rows["spans"][index])
    if row.labels is not None and not base_reads(row):
        return OPEN + base.tokenizer.decode([label for label in row.labels if label >= 0]) + CLOSE
    return ""
