"""LayerNorm tuning: train gains and biases of the norms only.

Paper: Zhao et al. 2023, Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning, arXiv 2312.11420.
Formula: h' = h + dgamma * n(x) + dbeta, n(x) recomputed from the norm's input; dbeta where the norm has a bias.
Parameters: sum over norms of d, or 2 d.
Start: dgamma = dbeta = 0, so the start is exactly the base.
Differs: the norms of all layers are trained; a norm behind the last layer and norms of single heads (of queries and
    keys) are not. A change of gain is added to n(x), never a rescale of h: pretrained gains can be almost zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from onebase.core.contracts import AdapterModule, Delta
from onebase.core.site import Site
from onebase.errors import UnsupportedError, unknown
from onebase.methods.method import Init, Method
from onebase.methods.normdelta import NormDelta
from onebase.methods.registry import register

SUBLAYERS = ("attention", "cross", "mlp")


@register
@dataclass(frozen=True, kw_only=True)
class LayerNorm(Method):
    """Train gains and biases of the norms only (arXiv 2312.11420).

    Attributes:
        sublayers: whose norms: attention, cross, mlp. The paper: all of them.
        bias: train the biases too, where the norms have one.
    """

    name: ClassVar[str] = "layernorm"
    summary: ClassVar[str] = "train gains and biases of the norms only; merges into the base"
    mergeable: ClassVar[bool] = True

    sublayers: tuple[str, ...] = SUBLAYERS
    bias: bool = True

    def __post_init__(self) -> None:
        for sublayer in self.sublayers:
            if sublayer not in SUBLAYERS:
                raise unknown("sub-layer in layernorm.sublayers", sublayer, SUBLAYERS)

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the norms of the sub-layers.

        Raises:
            UnsupportedError: there are none with a gain.
        """
        chosen = [site for site in sites if site.kind == "norm" and site.sublayer in self.sublayers]
        if not chosen:
            raise UnsupportedError(
                f"layernorm: this base has no norm with a gain in sublayers={self.sublayers!r}; use bitfit or lora"
            )
        return chosen

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build the changes of gain and bias."""
        deltas: dict[str, Delta] = {}
        for site in sites:
            assert site.norm is not None
            deltas[site.name] = NormDelta(site.d_out, site.norm, self.bias)
        return AdapterModule(deltas)
