"""`onebase train --dry-run`: what would be trained, without the base's weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from onebase.cli.output import Output, aligned, listing, percent, shorten
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.cli.merge import Chosen
    from onebase.data import Data

SAMPLES = 3
SPLITS = ("train", "validation", "test")


def show_plan(chosen: Chosen, data: Data, name: str, out: Output) -> None:
    """Print what `train` would do with these options."""
    plan = make_plan(chosen, data, name)
    if out.as_json:
        out.document(plan)
        return
    labels = ", ".join(f"{label} ({number})" for label, number in plan["labels"].items())
    steps = plan["steps"]
    pairs = [
        ("would train", f"{name}, method {chosen.method.shorthand()}, on base {plan['base']}"),
        ("data", f"{data.source}: {data.kind}"),
        ("rows", ", ".join(f"{rows:,} {split}" for split, rows in plan["rows"].items())),
        ("columns", ", ".join(f"{role} = {column!r}" for role, column in data.columns.items()) or "plain text"),
        ("labels", labels or "none"),
        (
            "parameters",
            f"{plan['parameters']:,}, {percent(plan['share'], 2)} of the base's {plan['base_parameters']:,}",
        ),
        ("method", listing(plan["method"]["settings"])),
        ("task", listing({k: v for k, v in plan["task"].items() if k not in ("labels", "kind")})),
        ("training", listing(plan["settings"])),
        ("steps", f"{steps} at most"),
    ]
    for line in aligned(pairs):
        out.line(line)
    for number, sample in enumerate(plan["samples"], 1):
        out.line()
        out.line(f"sample {number}  {sample['tokens']} tokens" + (f", {sample['cut']} cut" if sample["cut"] else ""))
        out.line(f"  {shorten(sample['text'], 300)}")
        if sample["label"] is not None:
            out.line(f"  label: {sample['label']}")
    out.note("dry run: nothing was trained, nothing was stored")


def make_plan(chosen: Chosen, data: Data, name: str) -> dict[str, Any]:
    """Return what would be trained, as JSON values."""
    from onebase.build import build_adapter
    from onebase.examples import encode
    from onebase.training.prepare import label_counts, make_task
    from onebase.training.settings import settings_for

    base, total = outline(chosen.get("base"))
    kept = {key: chosen.get(key) for key in ("max_length", "template", "pooling")}
    task = make_task(base, data, **kept, **chosen.task_options(data.kind))
    settings = settings_for(chosen.method, chosen.settings_only(data.kind), base.anatomy.hidden_size)
    trainable = build_adapter(base, name, chosen.method, task, 0, empty=True).count()
    examples = encode(base, task, data)["train"]
    counts = label_counts(data)
    per_step = settings.batch_size * settings.accumulate
    return {
        "dry_run": True,
        "name": name,
        "base": base.id,
        "base_parameters": total,
        "data": {"source": data.source, "kind": data.kind, "digest": data.digest, "columns": data.columns},
        "rows": {split: len(getattr(data, split)) for split in SPLITS},
        "splits_made": data.splits_made,
        "labels": {label: counts[label] for label in data.labels},
        "notes": list(data.notes),
        "method": {"name": chosen.method.name, "settings": chosen.method.settings()},
        "task": task,
        "parameters": trainable,
        "share": trainable / total,
        "settings": settings.plain(),
        "steps": math.ceil(len(examples) / per_step) * settings.epochs,
        "samples": [_sample(base, task, data, examples, i) for i in range(min(SAMPLES, len(examples)))],
    }


def outline(name: str | None) -> tuple[Base, int]:
    """Build a base from its config and tokenizer alone: its shapes are right, its weights are arbitrary.

    Returns:
        The base, and how many parameters it has.
    """
    import torch
    from transformers import AutoConfig

    from onebase.base import Base
    from onebase.cli.bases import quiet
    from onebase.cli.options import default_base
    from onebase.loading import _loader, _locate, _not_found, readers

    quiet()
    wanted = name or default_base()
    source, shown = _locate(wanted)
    try:
        config = AutoConfig.from_pretrained(source)
        tokenizer, processor = readers(config, source, {})
    except (OSError, ValueError) as error:
        raise ConfigError(_not_found(wanted, error)) from error
    with torch.device("meta"):
        model = _loader(config).from_config(config)
    total = sum(p.numel() for p in model.parameters())
    model.to_empty(device="cpu")  # address space only: pages are taken when they are written to
    return Base(model, tokenizer, processor=processor, id=shown), total


def _sample(base: Base, task: dict[str, Any], data: Data, examples: Any, i: int) -> dict[str, Any]:
    """Return one training row as the base will read it."""
    from onebase.encode import render

    rows, row = data.train, examples.rows[i]
    if data.kind in ("causal-lm", "masked-lm"):  # rows are blocks of the joined text, not its paragraphs
        return {"text": base.tokenizer.decode(row.ids), "label": None, "tokens": len(row.ids), "cut": row.cut}
    if row.image is not None:
        return {"text": rows["image"][i], "label": rows["label"][i], "tokens": len(row.ids), "cut": 0}
    if not rows.text and rows.get("query") is None:  # kinds without a text, whose rows may be windows
        text = base.tokenizer.decode(row.ids)
        return {"text": text, "label": None, "tokens": len(row.ids), "cut": row.cut}
    i = i if examples.unit is None else int(examples.unit[i])
    first, second = rows.get("query") or rows.text, rows.get("document") or rows.text_pair
    fields = {"text": first[i]}
    if second is not None:
        fields["text_pair"] = second[i]
    if rows.completion is not None:
        fields = {"prompt": rows.text[i], "completion": rows.completion[i]}
    text = render(task["template"], fields) if task["template"] else "  |  ".join(fields.values())
    label = next((column[i] for column in (rows.label, rows.get("score")) if column is not None), None)
    labels = rows.get("labels")
    label = label if labels is None else ", ".join(labels[i]) or "(none)"
    return {"text": text, "label": label, "tokens": len(row.ids), "cut": row.cut}
