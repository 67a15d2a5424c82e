"""Curves of a run: loss and validation metric by epoch, as one SVG file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onebase.training.run import Run

MISSING = "no curves were drawn: matplotlib is not installed (extra 'report')"
FILE = "curves.svg"


def write_curves(run: Run, folder: Path) -> Path | None:
    """Draw loss, validation loss and the validation metric of every epoch, and which epoch was kept.

    Args:
        run: a run that is over.
        folder: made if it is not there.

    Returns:
        The file; None where matplotlib is not installed, or nothing was trained.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    entries = run.history.epochs
    names = [key for entry in entries for key in entry if key not in ("epoch", "loss", "validation_loss")]
    metric = next(iter(dict.fromkeys(names)), None)
    if not entries:
        return None
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for key, title in (("loss", "training"), ("validation_loss", "validation")):
        points = [(entry["epoch"], entry[key]) for entry in entries if key in entry]
        left.plot([x for x, _ in points], [y for _, y in points], marker="o", label=title)
    left.set(xlabel="epoch", ylabel="loss", title=run.name)
    left.legend()
    if metric is not None:
        points = [(entry["epoch"], entry[metric]) for entry in entries if metric in entry]
        right.plot([x for x, _ in points], [y for _, y in points], marker="o", color="C2")
        right.axvline(run.history.best, linestyle=":", color="grey", label="kept")
        right.set(xlabel="epoch", ylabel=metric.replace("_", " "), title=f"{run.method}, validation")
        right.legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / FILE, format="svg", metadata={"Date": None})
    return folder / FILE


def place_of_curves(root: Path, ref: str) -> Path:
    """Return the folder of a stored run: beside the versions, whose files are covered by digests."""
    return root / "runs" / ref
