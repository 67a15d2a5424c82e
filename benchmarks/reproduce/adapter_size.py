"""Accuracy against the size of adapters, beside the top layers, the norms alone and the whole base.

python benchmarks/reproduce/adapter_size.py --data ../shared/data
"""

from __future__ import annotations

from harness import FULL, Asked, Bench, Study, Verdict, lower, parser, plot, within

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STUDY = Study(
    "adapter-size",
    "Accuracy against the size of adapters",
    "Adapters of a few per cent of the parameters come close to full fine-tuning over a wide range of sizes. "
    "Fine-tuning only the top layers loses much with as few parameters: on MNLI the top layer alone reaches 77.8 %, "
    "adapters of size 64 with a quarter of its parameters 83.7 %, all of BERT 84.4 %. Training the norms alone is poor "
    "(Houlsby et al. 2019, arXiv 1902.00751, section 3.4, figures 3 and 4).",
    "The top layers are trained by changes of their linear maps and biases; their norms stay. Every method has its own "
    "default rate.",
)


def main() -> None:
    """Run what is asked for."""
    options = parser(STUDY)
    options.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    given = options.parse_args()
    bench = Bench(STUDY, given)
    layers = bench.base.anatomy.layers
    tops = list(range(1, layers + 1))

    def top(k: int) -> str:
        wanted = "|".join(str(layers - 1 - i) for i in range(k))
        return f"dense(sites='re:/({wanted})/', bias=True)"

    for seed in range(given.seeds):  # a seed of everything, then the next: a run that was stopped has whole seeds
        asked = [Asked({"what": "bottleneck", "size": n}, f"bottleneck(size={n})", seed) for n in given.sizes]
        asked += [Asked({"what": "top layers", "size": k}, top(k), seed) for k in tops]
        asked += [Asked({"what": "norms", "size": 0}, "layernorm", seed), Asked({"what": FULL, "size": 0}, FULL, seed)]
        bench.train(bench.data(), asked)

    def points(what: str, sizes: list[int]) -> list[tuple[float, list[float]]]:
        rows = [bench.find(what=what, size=size) for size in sizes]
        return [(many[0]["parameters"], [r["value"] for r in many]) for many in rows if many]

    series = {
        "adapters": points("bottleneck", list(given.sizes)),
        "top layers": points("top layers", tops),
        "norms alone": points("norms", [0]),
        "full": points(FULL, [0]),
    }
    own = next((r["own"] for r in bench.find()), None)
    table = [
        {
            "method": what,
            "size or layers": size,
            "trained values": rows[0]["parameters"],
            "accuracy": bench.mean(what=what, size=size),
            "seeds": len(rows),
        }
        for what, size in [
            *(("bottleneck", n) for n in given.sizes),
            *(("top layers", k) for k in tops),
            ("norms", 0),
            (FULL, 0),
        ]
        if (rows := bench.find(what=what, size=size))
    ]
    bench.write(
        verdicts(bench, list(given.sizes)),
        table,
        plot(series, "trained values", "accuracy", lines={"the base's own head": own}),
    )


def verdicts(bench: Bench, sizes: list[int]) -> list[Verdict]:
    """Judge the parts of the finding."""
    full = {"what": FULL, "size": 0}
    near = {size: bench.apart(full, {"what": "bottleneck", "size": size}) for size in sizes}
    close = [size for size, found in near.items() if found is not None and found[2] >= 0]
    middle = min(sizes, key=lambda size: abs(size - 64))
    found = [
        Verdict(
            None if near[middle] is None else len(close) > len(sizes) / 2,
            "adapters that are not worse than full fine-tuning beyond the noise: sizes "
            f"{', '.join(map(str, close)) or 'none'}; size {middle}: {within(near[middle])}",
        )
    ]
    top = bench.apart({"what": "bottleneck", "size": middle}, {"what": "top layers", "size": 1})
    found.append(Verdict(lower(top), f"the top layer alone against adapters of size {middle}: {within(top)}"))
    norms = bench.apart({"what": "bottleneck", "size": middle}, {"what": "norms", "size": 0})
    found.append(
        Verdict(
            lower(norms),
            f"the norms alone against adapters of size {middle}: {within(norms)}",
        )
    )
    return found


if __name__ == "__main__":
    main()
