"""Accuracy against the rank of LoRA, on queries and values and on every map.

python benchmarks/reproduce/rank.py --data ../shared/data
"""

from __future__ import annotations

from harness import Asked, Bench, Study, Verdict, parser, plot, within

RANKS = (1, 2, 4, 8, 16, 32, 64)
PLACES = {"q and v": "paper", "every map": "all"}
STUDY = Study(
    "rank",
    "Accuracy against the rank of LoRA",
    "A rank of 1 is enough on q and v of GPT-3: 73.4 % on WikiSQL against 73.8 % with rank 8 and 73.5 % with rank 64; "
    "more rank does not cover a more meaningful subspace (Hu et al. 2021, arXiv 2106.09685, section 7.2, table 6).",
    "alpha is twice the rank, so that the scale is the same for all ranks, as in the paper's searches.",
)


def main() -> None:
    """Run what is asked for."""
    options = parser(STUDY)
    options.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    given = options.parse_args()
    bench = Bench(STUDY, given)
    for seed in range(given.seeds):
        bench.train(
            bench.data(),
            [
                Asked({"place": place, "rank": r}, f"lora(rank={r}, alpha={2.0 * r}, sites={sites!r})", seed)
                for place, sites in PLACES.items()
                for r in given.ranks
            ],
        )
    verdicts = []
    for place in PLACES:
        means = {r: bench.mean(place=place, rank=r) for r in given.ranks}
        best = max(given.ranks, key=lambda r: means[r] or 0.0)
        low = min(given.ranks)
        if best == low:
            verdicts.append(Verdict(True, f"on {place} rank {low} has the highest mean of all"))
            continue
        gap = bench.apart({"place": place, "rank": best}, {"place": place, "rank": low})
        verdicts.append(
            Verdict(
                None if gap is None else gap[2] >= 0,
                f"on {place} rank {low} against the best one, {best}: {within(gap)}",
            )
        )
    table = [
        {
            "maps": place,
            "rank": r,
            "trained values": rows[0]["parameters"],
            "accuracy": bench.mean(place=place, rank=r),
            "seeds": len(rows),
        }
        for place in PLACES
        for r in given.ranks
        if (rows := bench.find(place=place, rank=r))
    ]
    series = {
        place: [(r, [x["value"] for x in bench.find(place=place, rank=r)]) for r in given.ranks] for place in PLACES
    }
    own = next((r["own"] for r in bench.find()), None)
    bench.write(verdicts, table, plot(series, "rank", "accuracy", lines={"the base's own head": own}))


if __name__ == "__main__":
    main()
