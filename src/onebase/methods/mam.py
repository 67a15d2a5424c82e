"""MAM: mix and match, a prefix in attention and a parallel bottleneck beside the MLP.

Paper: He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366, section 4.6.
Formula: ``prefix(length=30) + bottleneck(preset='parallel')``, with the formulas of both.
Parameters: the sum of both.
Start: away from the base, because of the prefix.
Differs: the paper's bottleneck is 512 of 1024 for summaries, a `reduction` of 2; the default 8 suits smaller data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onebase.methods.bottleneck import Bottleneck
from onebase.methods.method import Method, check
from onebase.methods.prefix import Prefix
from onebase.methods.registry import register
from onebase.methods.union import Composite


@register
@dataclass(frozen=True, kw_only=True)
class MAM(Composite):
    """A prefix in attention and a parallel bottleneck beside the MLP (arXiv 2110.04366).

    Attributes:
        length: of the prefix, 1 to 1024; the paper uses 30.
        reduction: width of the base through units of the bottleneck, at least 1.
        scale: of the bottleneck; the paper uses 4.
    """

    name: ClassVar[str] = "mam"
    summary: ClassVar[str] = "a prefix in attention and a parallel bottleneck beside the MLP"
    epsilon: ClassVar[float | None] = None

    length: int = 30
    reduction: float = 8.0
    scale: float = 4.0

    def __post_init__(self) -> None:
        check(1 <= self.length <= 1024, "mam.length", self.length, "1 to 1024")
        check(self.reduction >= 1, "mam.reduction", self.reduction, "at least 1")
        self.members()  # checks the rest

    def members(self) -> tuple[Method, ...]:
        """Return the two parts."""
        return (
            Prefix(length=self.length),
            Bottleneck(preset="parallel", reduction=self.reduction, scale=self.scale),
        )
