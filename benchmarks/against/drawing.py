"""The picture: how many times as fast onebase is, by case."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(cases: dict[str, Any], path: Path) -> None:
    """Write an SVG with one panel per case: a bar per peer with its range, ours as the line at 1."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    bars = {
        case: [(n, a["onebase_is_faster"]) for n, a in rows.items() if "onebase_is_faster" in a]
        for case, rows in cases.items()
    }
    bars = {case: rows for case, rows in bars.items() if rows}
    if not bars:
        return
    heights = [len(rows) + 1 for rows in bars.values()]
    figure, axes = pyplot.subplots(
        len(bars), 1, figsize=(8, 0.32 * sum(heights) + 0.8), sharex=True, squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    for axis, (case, rows) in zip(axes[:, 0], bars.items()):
        for place, (_, ratio) in enumerate(rows):
            error = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            axis.barh(place, ratio["median"], xerr=error, color="#4477aa", ecolor="#222222", height=0.7)
        axis.set_yticks(range(len(rows)), [name for name, _ in rows])
        axis.invert_yaxis()
        axis.axvline(1.0, color="#cc3311", linewidth=1)
        axis.set_title(case, loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("time of the same steps, onebase = 1")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
