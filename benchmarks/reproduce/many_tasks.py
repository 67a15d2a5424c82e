"""Many tasks with full fine-tuning, adapters, LoRA, prefixes and prompts, and what all of them take together.

python benchmarks/reproduce/many_tasks.py --data ../shared/data
"""

from __future__ import annotations

import statistics

from harness import ALSO, COLOURS, FULL, Asked, Bench, Study, Verdict, parser

TASKS = ("cr", "subj", "trec6", "mrpc", "rte", "cola", "sst2", "ag_news")
METHODS = (FULL, "bottleneck", "lora", "prefix", "prompt")
STUDY = Study(
    "many-tasks",
    "Many tasks over one base",
    "On GLUE adapters are within 0.4 points of full fine-tuning (80.0 against 80.4) and train 3.6 % of the parameters "
    "per task: for all nine tasks 1.3 times the base's parameters, and full fine-tuning 9 times (Houlsby et al. 2019, "
    "arXiv 1902.00751, table 1).",
    "The tasks are those of the data folder, each with its own test split and metric; a base of 22 million parameters "
    "instead of 330 million; every method has its default rate.",
)


def main() -> None:
    """Run what is asked for."""
    options = parser(STUDY)
    options.add_argument("--tasks", nargs="+", default=TASKS)
    options.add_argument("--methods", nargs="+", default=METHODS)
    given = options.parse_args()
    bench = Bench(STUDY, given)
    for seed in range(given.seeds):
        for task in given.tasks:
            bench.train(bench.data(task), [Asked({"task": task, "method": m}, m, seed) for m in given.methods])
    values = sum(p.numel() for p in bench.base.model.parameters())
    table = []
    for method in given.methods:
        scores = {task: bench.mean(task=task, method=method) for task in given.tasks}
        trained = [rows[0]["parameters"] for task in given.tasks if (rows := bench.find(task=task, method=method))]
        total = sum(trained) + (0 if method == FULL else values)
        known = [v for v in scores.values() if v is not None]
        table.append(
            {
                "method": method,
                **scores,
                "mean": statistics.fmean(known) if known else None,
                "values a task": round(statistics.fmean(trained)) if trained else None,
                "values for all": total,
                "over the base": total / values,
            }
        )
    bench.write(verdicts(bench, table, given), table, draw(table, list(given.tasks)))


def verdicts(bench: Bench, table: list[dict], given) -> list[Verdict]:
    """Judge the parts of the finding."""
    by = {row["method"]: row for row in table}
    if not {FULL, "bottleneck"} <= by.keys() or by[FULL]["mean"] is None or by["bottleneck"]["mean"] is None:
        return [Verdict(None, "full fine-tuning and adapters were not both measured")]
    found = []
    for method in (m for m in given.methods if m != FULL and by[m]["mean"] is not None):
        gap = 100 * (by[method]["mean"] - by[FULL]["mean"])
        worse = [
            t
            for t in given.tasks
            if (d := bench.apart({"task": t, "method": FULL}, {"task": t, "method": method})) and d[2] < 0
        ]
        words = (
            f"{method} is {gap:+.1f} points from full fine-tuning on average, with {by[method]['over the base']:.2f} "
            f"times the base's values for all {len(given.tasks)} tasks (full: {by[FULL]['over the base']:.1f}); worse "
            f"beyond the noise on {', '.join(worse) or 'none'}"
        )
        found.append(Verdict(gap >= -0.4 if method == "bottleneck" else ALSO, words))
    return found


def draw(table: list[dict], tasks: list[str]):
    """Draw the scores of each task by method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    width = 0.8 / max(1, len(table))
    for number, row in enumerate(table):
        places = [i + number * width for i in range(len(tasks))]
        axes.bar(
            places,
            [row[t] or 0.0 for t in tasks],
            width,
            color=COLOURS[number % len(COLOURS)],
            label=f"{row['method']}, {row['over the base']:.2f} x base for all",
        )
    axes.set_xticks([i + 0.4 for i in range(len(tasks))], tasks)
    low = min((row[t] for row in table for t in tasks if row[t] is not None), default=0.0)
    axes.set_ylim(max(0.0, low - 0.1), 1.0)
    axes.set_ylabel("score on test rows")
    axes.legend(fontsize=8, framealpha=0.8)
    return figure


if __name__ == "__main__":
    main()
