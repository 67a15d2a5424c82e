"""From single runs to medians, ratios and a table."""

from __future__ import annotations

import statistics
from typing import Any

CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
FIRST = ("onebase", "onebase, one pass")  # whom the others are compared with


def spread(values: list[float]) -> dict[str, float]:
    """Return the median with the lowest and highest value, or the quartiles of four values and more."""
    middle = statistics.median(values)
    low, high = min(values), max(values)
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured by case and name.

    Ratios are of neighbours: the other's time over ours in the same round.
    """
    clock = CLOCKS[found["facts"]["clock"]]
    cases: dict[str, Any] = {}
    for case in dict.fromkeys(run["case"] for run in found["runs"]):
        speed = [run for run in found["runs"] if run["case"] == case and run["kind"] == "speed"]
        scored = [run for run in found["runs"] if run["case"] == case and run["kind"] == "accuracy"]
        ours = {run["round"]: run[clock] for run in speed if run["who"] in FIRST}
        cases[case] = {}
        for name in dict.fromkeys(run["who"] for run in speed):
            mine = [run for run in speed if run["who"] == name]
            about: dict[str, Any] = {
                "ms_per_step": spread([run[clock] / run["steps"] * 1000 for run in mine]),
                "rows_per_second": spread([run["rows"] / run[clock] for run in mine]),
                "peak_mib": spread([run["peak_mib"] for run in mine]),
            }
            ratios = [run[clock] / ours[run["round"]] for run in mine if run["round"] in ours]
            if ratios:
                about["onebase_is_faster"] = spread(ratios)
            operations = found["operations"].get(case)
            if operations and name in FIRST:
                dtype = "bfloat16" if "dtype=bfloat16" in mine[0].get("kernels", "") else "float32"
                limit = found["peak_gflops"][dtype] * 1e9
                about["share_of_peak"] = spread([operations / run[clock] / limit for run in mine])
            values = [run["accuracy"] for run in scored if run["who"] == name]
            if values:
                about["accuracy"] = spread(values)
            cases[case][name] = about
    return cases


def table(cases: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return everything as one markdown page."""
    lines = [
        "# Training beside other libraries",
        "",
        f"The embedded base, {facts['rows_per_step']} rows per optimizer step, {facts['steps']} steps (fewer of long "
        f"texts) in {facts['rounds']} interleaved rounds, {facts['threads']} thread(s), {facts['clock']} time, torch "
        f"{facts['versions']['torch']}. Medians, with their range in brackets. Memory is the peak of a process beyond "
        "what it holds after its imports. `benchmarks/peers.py` made this page.",
    ]
    for case, rows in cases.items():
        scored = any("accuracy" in about for about in rows.values())
        lines += ["", f"## {case}", ""]
        lines += ["| | ms per step | onebase is faster | peak MiB |" + (" accuracy |" if scored else "")]
        lines += ["|---|---|---|---|" + ("---|" if scored else "")]
        for name, about in rows.items():
            cells = [name, _cell(about["ms_per_step"], 0), _cell(about.get("onebase_is_faster"), 2, " x")]
            cells += [_cell(about["peak_mib"], 0)]
            cells += [_cell(about.get("accuracy"), 4)] if scored else []
            lines.append("| " + " | ".join(cells) + " |")
        for about in rows.values():
            if "share_of_peak" in about:
                lines += [
                    "",
                    f"onebase reaches {_cell(about['share_of_peak'], 2)} of the rate of matrix products alone.",
                ]
    return "\n".join(lines) + "\n"


def _cell(value: dict[str, float] | None, digits: int, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value['median']:.{digits}f}{unit} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"
