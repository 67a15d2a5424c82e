"""The method that `onebase train` takes where none is named, and the measurement that it comes from."""

from __future__ import annotations

METHOD = "lora"
# benchmarks/results/quality.jsonl, embedded base, test rows, means over three seeds: cr (2,825 training rows) LoRA
# .9078, bottleneck .9031; trec6 (4,871) LoRA .9667, bottleneck .9647. Full fine-tuning with its best rate on validation:
# .9025 on cr, three seeds; .9670 on trec6, two.
MEASURED = (2_825, 4_871)
SCORES = (
    "on customer reviews .908 against .903 of bottlenecks and .903 of full fine-tuning, on questions .967, .965, .967"
)


def default_method(kind: str, rows: int) -> tuple[str, str]:
    """Return the method that is taken where none is named and, in a sentence, why.

    Args:
        kind: of the task.
        rows: of training.
    """
    if kind == "classification" and MEASURED[0] / 2 <= rows <= MEASURED[1] * 2:
        return METHOD, f"{METHOD}, because no method is named: as good as any at this size ({SCORES})"
    where = f"{kind} data" if kind != "classification" else f"{rows:,} rows"
    return METHOD, (
        f"{METHOD}, because no method is named: best on {MEASURED[0]:,} and {MEASURED[1]:,} rows of classification, which "
        f"says little about {where}; onebase compare measures it on yours"
    )
