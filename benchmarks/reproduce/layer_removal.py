"""Accuracy after the adapters of some layers are taken away, without training again.

python benchmarks/reproduce/layer_removal.py --data ../shared/data
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from harness import ALSO, Asked, Bench, Row, Study, Verdict, parser

from onebase.core.contracts import AdapterModule
from onebase.examples import encode_rows, run_examples
from onebase.tasks import get_task

STUDY = Study(
    "layer-removal",
    "Adapters of some layers removed after training",
    "Removing the adapters of one layer costs little, at most 2 points; removing all of them leaves the guess of the "
    "majority. Adapters of lower layers matter less: on MNLI removing those of layers 0 to 4 barely changes the result "
    "(Houlsby et al. 2019, arXiv 1902.00751, section 3.6, figure 6 left and middle).",
    "The head stays as it was trained beside the adapters. Six layers instead of twelve or twenty-four.",
)


def removed(bench: Bench, data: Any, layers: int):
    """Return what scores a trained adapter with the adapters of every span of layers taken away."""

    def then(one: Asked, run: Any) -> Iterator[Row]:
        adapter = bench.base.adapters[run.name]
        whole = adapter.module
        examples = encode_rows(bench.base, adapter.task, data.test if len(data.test) else data.validation)
        for first in range(layers):
            for last in range(first, layers):
                out = {f"/{i}/" for i in range(first, last + 1)}
                adapter.module = AdapterModule({n: d for n, d in whole.items() if not any(o in n for o in out)})
                adapter.bind()
                found = run_examples(bench.base, run.name, examples)
                value = get_task(adapter.task["kind"]).judge(adapter.task, adapter.head, examples, found).value
                yield {
                    "first": first,
                    "last": last,
                    "seed": one.seed,
                    "value": value,
                    "metric": run.metric,
                    "whole": run.value,
                    "correct": None,
                }
        adapter.module = whole
        adapter.bind()

    return then


def main() -> None:
    """Run what is asked for."""
    options = parser(STUDY)
    options.add_argument("--method", default="bottleneck(norms=False)", help="adapters whose layers are removed")
    given = options.parse_args()
    bench = Bench(STUDY, given)
    data, layers = bench.data(), bench.base.anatomy.layers
    bench.train(
        data,
        [Asked({"first": None, "method": given.method}, given.method, seed) for seed in range(given.seeds)],
        removed(bench, data, layers),
    )
    whole = bench.mean(first=None)
    drops = {
        (a, b): 100 * (whole - value)
        for a in range(layers)
        for b in range(a, layers)
        if whole is not None and (value := bench.mean(first=a, last=b)) is not None
    }
    bench.write(verdicts(drops, layers, data), table(bench, whole, drops), draw(drops, layers))


def verdicts(drops: dict[tuple[int, int], float], layers: int, data: Any) -> list[Verdict]:
    """Judge the parts of the finding."""
    if not drops:
        return [Verdict(None, "nothing was measured")]
    single = {i: drops[i, i] for i in range(layers)}
    worst = max(single, key=lambda i: single[i])
    half = layers // 2
    lower, upper = drops[0, half - 1], drops[half, layers - 1]
    labels = list((data.test if len(data.test) else data.validation).label)
    majority = max(labels.count(label) for label in set(labels)) / len(labels)
    return [
        Verdict(single[worst] <= 2, f"the layer that costs most is {worst}: {single[worst]:.1f} points"),
        Verdict(lower < upper, f"without the lower half {lower:.1f} points less, without the upper half {upper:.1f}"),
        Verdict(
            ALSO,
            f"without all of them {drops[0, layers - 1]:.1f} points less; the majority is {100 * majority:.1f} % "
            "of the rows",
        ),
    ]


def table(bench: Bench, whole: float | None, drops: dict[tuple[int, int], float]) -> list[dict]:
    """Return the spans with their scores."""
    found = [{"layers removed": "none", "score": whole, "points lost": 0.0}]
    for (a, b), drop in sorted(drops.items(), key=lambda entry: (entry[0][1] - entry[0][0], entry[0])):
        values = [row["value"] for row in bench.find(first=a, last=b)]
        found.append(
            {
                "layers removed": str(a) if a == b else f"{a} to {b}",
                "score": statistics.fmean(values),
                "points lost": drop,
            }
        )
    return found


def draw(drops: dict[tuple[int, int], float], layers: int):
    """Draw points lost by first and last layer of the span."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    grid = [[-drops.get((a, b), float("nan")) for b in range(layers)] for a in range(layers)]
    axes.pcolormesh(grid, cmap="Reds_r")
    for (a, b), drop in drops.items():
        axes.text(b + 0.5, a + 0.5, f"{-drop:.1f}", ha="center", va="center", fontsize=9)
    places = [i + 0.5 for i in range(layers)]
    axes.set_xticks(places, range(layers))
    axes.set_yticks(places, range(layers))
    axes.invert_yaxis()
    axes.set(xlabel="last layer removed", ylabel="first layer removed", title="change of the score, points")
    return figure


if __name__ == "__main__":
    main()
