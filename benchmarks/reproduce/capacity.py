"""How much prompts can learn: two classes and seventy-seven, against LoRA.

python benchmarks/reproduce/capacity.py --data ../shared/data
"""

from __future__ import annotations

from harness import Asked, Bench, Study, Verdict, lower, parser, within

TASKS = ("cr", "banking77")
METHODS = {
    "prompt of 20": "prompt(length=20)",
    "prompt of 100": "prompt(length=100)",
    "lora of rank 1": "lora(rank=1, alpha=2.0)",
    "lora of rank 8": "lora",
}
STUDY = Study(
    "capacity",
    "What prompts can learn, against LoRA",
    "Virtual tokens cannot change how much the base attends to one token of the text over another; they only add to "
    "what attention gives out. So they bring out what the base can do already, and tasks that need something new are "
    "learned by LoRA and not by them, however long they are (Petrov et al. 2024, arXiv 2310.19698, sections 4 and 5). "
    "Expected then: a larger gap between prompts and LoRA with many classes than with two.",
    "The paper's tasks are made by hand; these are reviews with two classes and questions to a bank with 77. Head and "
    "base are the same for all, and the head is trained too, so many classes cost a head what they cost the base.",
)


def main() -> None:
    """Run what is asked for."""
    options = parser(STUDY)
    options.add_argument("--tasks", nargs=2, default=TASKS, help="one with few classes, one with many")
    given = options.parse_args()
    bench = Bench(STUDY, given)
    for seed in range(given.seeds):
        for task in given.tasks:
            bench.train(
                bench.data(task), [Asked({"task": task, "method": m}, method, seed) for m, method in METHODS.items()]
            )
    few, many = given.tasks
    gaps = {
        task: bench.apart({"task": task, "method": "lora of rank 8"}, {"task": task, "method": "prompt of 100"})
        for task in given.tasks
    }
    verdicts = [
        Verdict(lower(gap), f"on {task} prompts of 100 against LoRA: {within(gap)}") for task, gap in gaps.items()
    ]
    one, two = gaps[few], gaps[many]
    verdicts.append(
        Verdict(
            None if one is None or two is None else two[0] < one[0],
            f"the gap with many classes ({many}) against that with few ({few}): "
            + ("not measured" if one is None or two is None else f"{100 * (two[0] - one[0]):+.1f} points"),
        )
    )
    table = [
        {
            "task": task,
            "classes": len(bench.data(task).labels),
            "method": m,
            "trained values": rows[0]["parameters"],
            "accuracy": bench.mean(task=task, method=m),
            "base's own head": rows[0]["own"],
            "seeds": len(rows),
        }
        for task in given.tasks
        for m in METHODS
        if (rows := bench.find(task=task, method=m))
    ]
    bench.write(verdicts, table, draw(bench, list(given.tasks)))


def draw(bench: Bench, tasks: list[str]):
    """Draw the scores of each task by method, above those of the base's own head."""
    from harness import COLOURS
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for number, method in enumerate(METHODS):
        values = [bench.mean(task=t, method=method) or 0.0 for t in tasks]
        axes.bar([i + 0.2 * number for i in range(len(tasks))], values, 0.2, label=method, color=COLOURS[number])
    for i, task in enumerate(tasks):
        rows = bench.find(task=task)
        if rows:
            axes.hlines(
                rows[0]["own"],
                i - 0.1,
                i + 0.7,
                color="#7f7f7f",
                linestyle="--",
                label=None if i else "the base's own head",
            )
    axes.set_xticks([i + 0.3 for i in range(len(tasks))], tasks)
    axes.set_ylabel("score on test rows")
    axes.legend(fontsize=8, framealpha=0.8)
    return figure


if __name__ == "__main__":
    main()
