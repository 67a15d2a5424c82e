"""Accuracy against the scale at which adapters start.

python benchmarks/reproduce/initial_scale.py --data ../shared/data
"""

from __future__ import annotations

from harness import Asked, Bench, Study, Verdict, lower, parser, plot, within

SCALES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STUDY = Study(
    "initial-scale",
    "Accuracy against the initial scale of adapters",
    "Adapters are robust to standard deviations of their start below 1e-2; larger ones are worse, on CoLA more than on "
    "MNLI (Houlsby et al. 2019, arXiv 1902.00751, section 3.6, figure 6 right).",
    "The paper draws both maps with this deviation; here the lower map is drawn and the upper one starts at zero, so "
    "that every start is exactly the base: a large scale cannot disturb the first step.",
)


def main() -> None:
    """Run what is asked for."""
    options = parser(STUDY)
    options.add_argument("--scales", type=float, nargs="+", default=SCALES)
    given = options.parse_args()
    bench = Bench(STUDY, given)
    for seed in range(given.seeds):
        asked = [Asked({"scale": s}, f"bottleneck(init_std={s!r})", seed) for s in given.scales]
        bench.train(bench.data(), asked)
    small = [s for s in given.scales if s <= 1e-2]
    large = [s for s in given.scales if s > 1e-2]
    best = max(small or given.scales, key=lambda s: bench.mean(scale=s) or 0.0)
    found = {s: bench.apart({"scale": best}, {"scale": s}) for s in given.scales if s != best}
    worse = [s for s in small if s != best and found[s] is not None and found[s][2] < 0]
    verdicts = [
        Verdict(
            None if not small else not worse,
            f"scales up to 1e-2 that are worse than the best one ({best:g}) beyond the noise: "
            f"{', '.join(f'{s:g}' for s in worse) or 'none'}",
        )
    ]
    verdicts += [
        Verdict(lower(found[s]), f"scale {s:g} against {best:g}: {within(found[s])}") for s in large if s != best
    ]
    table = [
        {"scale": f"{s:g}", "accuracy": bench.mean(scale=s), "seeds": len(bench.find(scale=s))} for s in given.scales
    ]
    own = next((r["own"] for r in bench.find()), None)
    series = {"adapters": [(s, [r["value"] for r in bench.find(scale=s)]) for s in given.scales]}
    bench.write(
        verdicts, table, plot(series, "standard deviation at the start", "accuracy", lines={"the base's own head": own})
    )


if __name__ == "__main__":
    main()
