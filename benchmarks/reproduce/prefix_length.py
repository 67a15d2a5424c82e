"""Accuracy against the length of prefixes, and prefixes against full fine-tuning on few examples.

python benchmarks/reproduce/prefix_length.py --data ../shared/data
"""

from __future__ import annotations

from harness import FULL, Asked, Bench, Study, Verdict, higher, lower, parser, plot, within

LENGTHS = (1, 2, 4, 8, 16, 32, 64, 128)
EXAMPLES = (50, 100, 200, 500)
STUDY = Study(
    "prefix-length",
    "Length of prefixes, and few examples",
    "Performance rises with the length of the prefix up to a threshold, 10 for tables to text and 200 for summaries, "
    "and falls slightly behind it. With 50 to 500 examples prefixes are better than full fine-tuning, by 2.9 BLEU on "
    "average (Li and Liang 2021, arXiv 2101.00190, sections 6.3 and 7.1, figures 3 and 4).",
    "Classification by an encoder instead of writing by a decoder; prefixes start from words and are trained directly. "
    "All start from the base's own head, so few examples are no start from nothing.",
)
FEW = {"prefix": "prefix(length=16)", "lora": "lora", FULL: FULL}


def main() -> None:
    """Run what is asked for."""
    options = parser(STUDY)
    options.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options.add_argument("--examples", type=int, nargs="+", default=EXAMPLES)
    given = options.parse_args()
    bench = Bench(STUDY, given)
    for seed in range(given.seeds):
        bench.train(
            bench.data(), [Asked({"part": "length", "length": n}, f"prefix(length={n})", seed) for n in given.lengths]
        )
        for n in given.examples:
            bench.train(
                bench.data(rows=n),
                [Asked({"part": "few", "examples": n, "method": m}, method, seed) for m, method in FEW.items()],
            )
    table = [
        {
            "measured": f"prefix of {n}",
            "training rows": len(bench.data().train),
            "accuracy": bench.mean(part="length", length=n),
            "seeds": len(bench.find(part="length", length=n)),
        }
        for n in given.lengths
    ]
    table += [
        {
            "measured": m,
            "training rows": n,
            "accuracy": bench.mean(part="few", examples=n, method=m),
            "seeds": len(bench.find(part="few", examples=n, method=m)),
        }
        for n in given.examples
        for m in FEW
    ]
    series = {
        f"{m}, by examples": [
            (n, [r["value"] for r in bench.find(part="few", examples=n, method=m)]) for n in given.examples
        ]
        for m in FEW
    }
    series = {
        "prefix, by length": [(n, [r["value"] for r in bench.find(part="length", length=n)]) for n in given.lengths],
        **series,
    }
    bench.write(
        verdicts(bench, list(given.lengths), list(given.examples)),
        table,
        plot(series, "length of the prefix, or examples", "accuracy"),
    )


def verdicts(bench: Bench, lengths: list[int], examples: list[int]) -> list[Verdict]:
    """Judge the parts of the finding."""
    best = max(lengths, key=lambda n: bench.mean(part="length", length=n) or 0.0)
    rise = bench.apart({"part": "length", "length": min(lengths)}, {"part": "length", "length": best})
    fall = bench.apart({"part": "length", "length": best}, {"part": "length", "length": max(lengths)})
    found = [
        Verdict(
            higher(rise),
            f"the best length, {best}, against {min(lengths)}: {within(rise)}",
        ),
        Verdict(
            lower(fall),
            f"the longest prefix, {max(lengths)}, against the best one: {within(fall)}",
        ),
    ]
    for n in examples:
        gap = bench.apart(
            {"part": "few", "examples": n, "method": FULL}, {"part": "few", "examples": n, "method": "prefix"}
        )
        said = f"with {n} examples prefixes against full fine-tuning: {within(gap)}"
        found.append(Verdict(higher(gap), said))
    return found


if __name__ == "__main__":
    main()
