"""Adapters left out of the lowest layers: time of a training step, and accuracy.

python benchmarks/reproduce/lowest_layers.py --data ../shared/data
"""

from __future__ import annotations

import statistics

from harness import ALSO, Asked, Bench, Study, Verdict, parser, within

from onebase.comparison.measuring import alone

STUDY = Study(
    "lowest-layers",
    "Adapters left out of the lowest layers",
    "Leaving out the adapters of the first layers keeps most of the quality and saves time: nothing below the first "
    "adapter needs a gradient (Rücklé et al. 2021, AdapterDrop, arXiv 2010.11918, section 3).",
    "Time is that of an optimizer step by itself on this machine. The states below the first adapter can be kept "
    "between epochs too (`keep_mb`); that is not used here, where they are computed at every step.",
)
ROUNDS = 5


def main() -> None:
    """Run what is asked for."""
    options = parser(STUDY)
    options.add_argument("--preset", default="houlsby")
    given = options.parse_args()
    bench = Bench(STUDY, given)
    layers = bench.base.anatomy.layers

    def method(k: int) -> str:
        return f"bottleneck(preset={given.preset!r}, leave_out={tuple(range(k))!r})"

    counts = range(layers)
    for seed in range(given.seeds):
        bench.train(bench.data(), [Asked({"part": "accuracy", "left out": k}, method(k), seed) for k in counts])
    for number in range(ROUNDS):  # in turn, so that a busy moment meets all of them
        for k in counts:
            facts = {"part": "time", "left out": k, "round": number}
            if not bench.has(facts):
                taken, _ = alone(bench.base, bench.data(rows=256), method(k), 1e-3)
                bench.add({**facts, "value": 1000 * taken.seconds_per_row, "memory": taken.memory})
    times = {
        k: statistics.median(values)
        for k in counts
        if (values := [r["value"] for r in bench.find(part="time", **{"left out": k})])
    }
    table = [
        {
            "lowest layers left out": k,
            "ms a training row": times.get(k),
            "over all layers": times[k] / times[0] if k in times else None,
            "accuracy": bench.mean(part="accuracy", **{"left out": k}),
            "trained values": rows[0]["parameters"],
        }
        for k in counts
        if (rows := bench.find(part="accuracy", **{"left out": k}))
    ]
    bench.write(verdicts(bench, times, layers), table, draw(bench, times))


def verdicts(bench: Bench, times: dict[int, float], layers: int) -> list[Verdict]:
    """Judge the parts of the finding."""
    half = layers // 2
    gap = bench.apart({"part": "accuracy", "left out": 0}, {"part": "accuracy", "left out": half})
    faster = None if half not in times else times[half] < times[0]
    words = "not measured" if half not in times else f"{times[half] / times[0]:.2f} times the time of a step"
    most = bench.apart({"part": "accuracy", "left out": 0}, {"part": "accuracy", "left out": layers - 1})
    return [
        Verdict(faster, f"without the lower {half} of {layers}: {words}"),
        Verdict(None if gap is None else gap[2] >= 0 or gap[0] > -0.01, f"without the lower {half}: {within(gap)}"),
        Verdict(ALSO, f"with the adapters of the top layer alone: {within(most)}"),
    ]


def draw(bench: Bench, times: dict[int, float]):
    """Draw accuracy against the time of a row."""
    from harness import COLOURS
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for k, taken in times.items():
        values = [r["value"] for r in bench.find(part="accuracy", **{"left out": k})]
        if values:
            middle = statistics.fmean(values)
            axes.errorbar(
                taken, middle, yerr=[[middle - min(values)], [max(values) - middle]], fmt="o", color=COLOURS[0]
            )
            axes.annotate(f"{k} left out", (taken, middle), xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="ms of a training row", ylabel="accuracy")
    return figure


if __name__ == "__main__":
    main()
