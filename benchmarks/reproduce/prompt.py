"""Accuracy against the length of prompts and how they start.

python benchmarks/reproduce/prompt.py --data ../shared/data
"""

from __future__ import annotations

from harness import Asked, Bench, Study, Verdict, higher, parser, plot, within

LENGTHS = (1, 5, 20, 100, 150)
STARTS = ("labels", "vocabulary", "uniform")
STUDY = Study(
    "prompt",
    "Length and start of prompts",
    "Beyond one token longer prompts are much better for all but the largest models; beyond 20 tokens gains are small. "
    "Starts from label words or from the vocabulary are better than random uniform ones, and for the largest model it "
    "does not matter (Lester et al. 2021, arXiv 2104.08691, section 3.2, figure 3).",
    "An encoder with a head of its own instead of T5 that writes the label, so a prompt of one token starts from the "
    "accuracy of the base's head.",
)


def main() -> None:
    """Run what is asked for."""
    options = parser(STUDY)
    options.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    given = options.parse_args()
    bench = Bench(STUDY, given)
    for seed in range(given.seeds):
        bench.train(
            bench.data(),
            [
                Asked({"start": start, "length": n}, f"prompt(length={n}, init={start!r})", seed)
                for start in STARTS
                for n in given.lengths
            ],
        )
    table = [
        {
            "start": s,
            "length": n,
            "accuracy": bench.mean(start=s, length=n),
            "seeds": len(bench.find(start=s, length=n)),
        }
        for s in STARTS
        for n in given.lengths
    ]
    series = {s: [(n, [r["value"] for r in bench.find(start=s, length=n)]) for n in given.lengths] for s in STARTS}
    own = next((r["own"] for r in bench.find()), None)
    bench.write(
        verdicts(bench, sorted(given.lengths)),
        table,
        plot(series, "tokens of the prompt", "accuracy", lines={"the base's own head": own}),
    )


def verdicts(bench: Bench, lengths: list[int]) -> list[Verdict]:
    """Judge the parts of the finding."""
    some = min(lengths, key=lambda n: abs(n - 20))
    long = bench.apart({"start": "labels", "length": lengths[0]}, {"start": "labels", "length": some})
    longer = bench.apart({"start": "labels", "length": some}, {"start": "labels", "length": lengths[-1]})
    found = [
        Verdict(
            higher(long),
            f"{some} tokens against {lengths[0]}: {within(long)}",
        ),
        Verdict(
            None if longer is None or long is None or some == lengths[-1] else longer[0] < long[0] / 2,
            f"{lengths[-1]} tokens against {some}: {within(longer)}",
        ),
    ]
    for start in ("labels", "vocabulary"):
        gap = bench.apart({"start": "uniform", "length": some}, {"start": start, "length": some})
        found.append(
            Verdict(
                higher(gap),
                f"{some} tokens from {start} against random ones: {within(gap)}",
            )
        )
    return found


if __name__ == "__main__":
    main()
