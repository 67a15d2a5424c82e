"""The method that `onebase train` takes where none is named, and the measurements that it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

METHOD = "lora"
NEAR = 2  # times more or fewer training rows than were measured, beyond which the measurement says little


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Test scores of the embedded base with each method's defaults, means over the runs in `benchmarks/results`.

    Full fine-tuning has its best rate by validation there.

    Attributes:
        data, what: name of the data, and what it is.
        kind, pair: of the task, and whether it is about pairs of texts.
        rows: of training.
        scores: method -> score; 'base' is the base with its own head, or by itself.
    """

    data: str
    what: str
    kind: str = "classification"
    pair: bool = False
    rows: int
    scores: Mapping[str, float]

    def sentence(self) -> str:
        """Say what was measured."""
        said = [f"{name} {score:.3f}".replace(" 0.", " .") for name, score in self.scores.items()]
        return f"{self.what}: {', '.join(said)}"


MEASURED = (
    Measured(data="cr", what="customer reviews", rows=2825,
             scores={"lora": 0.906, "bottleneck": 0.903, "full": 0.907, "base": 0.840}),
    Measured(data="trec6", what="kinds of questions", rows=4871,
             scores={"lora": 0.963, "bottleneck": 0.965, "full": 0.967, "base": 0.904}),
    Measured(data="sst2", what="film reviews", rows=6909,
             scores={"lora": 0.881, "bottleneck": 0.872, "full": 0.887, "base": 0.816}),
    Measured(data="subj", what="subjectivity", rows=7500,
             scores={"lora": 0.953, "bottleneck": 0.956, "full": 0.958, "base": 0.921}),
    Measured(data="banking77", what="intents of bank customers", rows=8992,
             scores={"lora": 0.930, "full": 0.932, "base": 0.931}),
    Measured(data="mrpc", what="paraphrases", pair=True, rows=3667,
             scores={"lora": 0.795, "full": 0.795, "base": 0.726}),
    Measured(data="rte", what="entailment", pair=True, rows=2238, scores={"lora": 0.606, "base": 0.625}),
    Measured(data="stsb", what="similarity", kind="regression", pair=True, rows=5692,
             scores={"lora": 0.837, "base": 0.828}),
)  # fmt: skip


def default_method(kind: str, rows: int, pair: bool = False) -> tuple[str, str]:
    """Return the method that is taken where none is named and, in a sentence, why.

    Args:
        kind: of the task.
        rows: of training.
        pair: whether the task is about pairs of texts.
    """
    mine = [m for m in MEASURED if (m.kind, m.pair) == (kind, pair)]
    near = [m for m in mine if m.rows / NEAR <= rows <= m.rows * NEAR]
    facts = "; ".join(m.sentence() for m in near)
    if near and not pair:
        gap = max(max(m.scores.values()) - m.scores[METHOD] for m in near)
        below = f"at most {100 * gap:.1f} points below the best" if gap > 0 else "as good as any"
        why = f"{below} at this size ({facts})"
    elif near:  # entailment was not better with it than without
        why = f"it helped with some pairs and not with others ({facts}), so look at both scores"
    elif mine:
        why = f"measured on {_listed([f'{m.rows:,}' for m in mine])} rows, which says little about {rows:,}"
    else:
        why = f"as for classification; nothing was measured on {kind} data{' of pairs' * pair} here"
    return METHOD, f"{METHOD}, because no method is named: {why}; onebase compare measures methods on your data"


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
